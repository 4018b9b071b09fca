# syntax=docker/dockerfile:1
# The images of Holdfast, one target each: metadata-service, csi-controller, node (keeper, agent, CSI node plugin, command line).
#
#   docker build --target node -t ghcr.io/holdfast/node:0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) …
#
# tools/images.mjs assembles the same files without Docker.
ARG NODE=24
ARG DEBIAN=bookworm

FROM node:${NODE}-${DEBIAN} AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
      build-essential cmake pkg-config python3 liburing-dev libblkid-dev \
      e2fsprogs xfsprogs btrfs-progs util-linux mount \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# pnpm in the version of tools/setup.sh; better-sqlite3 and the addon are compiled for the Node that goes into the image. The two
# settings: with the headers of that Node (it has them in /usr/local), where node-gyp would fetch some from nodejs.org, and not
# taken compiled from GitHub, which no lock file pins.
RUN version=$(sed -n 's/^pnpm_version=//p' tools/setup.sh) && npm install -g --no-fund --no-audit "pnpm@$version" \
    && export npm_config_nodedir=/usr/local npm_config_build_from_source=true \
    && pnpm install --frozen-lockfile && pnpm build:native && pnpm generate
ARG SOURCE_DATE_EPOCH=1700000000
ENV SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH
RUN node tools/images.mjs --roots /roots

FROM scratch AS base
COPY --from=build /roots/base/ /
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin NODE_ENV=production
WORKDIR /
# The chart's appVersion.
ARG VERSION=0.1.0
LABEL org.opencontainers.image.licenses=Apache-2.0 org.opencontainers.image.version=$VERSION

FROM base AS metadata-service
COPY --from=build /roots/metadata-service/ /
USER 65532:65532
LABEL org.opencontainers.image.title=holdfast-metadata-service \
      org.opencontainers.image.description="The authority of a Holdfast cluster"
ENTRYPOINT ["node", "/opt/holdfast/metadata-service.js"]

FROM base AS csi-controller
COPY --from=build /roots/csi-controller/ /
USER 65532:65532
LABEL org.opencontainers.image.title=holdfast-csi-controller \
      org.opencontainers.image.description="CSI controller of Holdfast"
ENTRYPOINT ["node", "/opt/holdfast/csi-controller.js"]

FROM base AS node
COPY --from=build /roots/node-tools/ /
COPY --from=build /roots/node/ /
# It mounts file systems and makes devices: root, in a privileged container.
USER 0:0
ENV HOLDFAST_NATIVE=/opt/holdfast/holdfast.node
LABEL org.opencontainers.image.title=holdfast-node \
      org.opencontainers.image.description="Keeper, agent, CSI node plugin and command line of Holdfast"
ENTRYPOINT ["node", "/opt/holdfast/agent.js"]
