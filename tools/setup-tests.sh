#!/usr/bin/env bash
# The conformance tools, built from the versions that tools/go.sum pins, into .cache/bin.
set -euo pipefail
cd "$(dirname "$0")"
command -v go >/dev/null || { echo "setup: Go 1.25 or newer is missing; csi-sanity is built with it. Install it from go.dev, or: apt-get install golang (Debian 13)." >&2; exit 1; }
out=../.cache/bin
mkdir -p "$out"
if ! cmp -s go.sum "$out/go.sum"; then
  echo "setup: building csi-sanity"
  go build -o "$out/csi-sanity" github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity
  go mod download github.com/container-storage-interface/spec@v1.12.0
  cp go.sum "$out/go.sum"
fi
