#!/usr/bin/env bash
# The tools of `make conformance`, into the cache of the end-to-end tests: Kubernetes' storage specs as one program, and agnhost, which their pods
# run. Optional, because they take as long to build as the rest of that cache.
set -euo pipefail
cd "$(dirname "$0")/../test/e2e/conformance/suite"

bin=${HOLDFAST_E2E_CACHE:-$HOME/.cache/holdfast-e2e}/bin
mkdir -p "$bin"
command -v go >/dev/null || { echo "conformance-tools: Go 1.26 or newer is missing. Install it from go.dev." >&2; exit 1; }

version=$(sed -nE 's|^require k8s.io/kubernetes (v[0-9.]+)$|\1|p' go.mod)
minor=${version#v1.}
flags="-s -w -X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitMajor=1"
flags+=" -X k8s.io/component-base/version.gitMinor=${minor%%.*} -X k8s.io/client-go/pkg/version.gitVersion=$version"

# build NAME PACKAGE COMMAND…: unless it was built from the same
build() {
  local name=$1 package=$2 stamp
  shift 2
  stamp=$(cat go.mod go.sum ./*.go <(echo "$package $* $(go env GOVERSION GOARCH)") | sha256sum)
  [ -x "$bin/$name" ] && [ "$(cat "$bin/.$name.stamp" 2>/dev/null)" = "$stamp" ] && return
  echo "conformance-tools: building $name"
  CGO_ENABLED=0 GOFLAGS=-mod=readonly "$@" -trimpath -p "${HOLDFAST_E2E_JOBS:-2}" -buildvcs=false -o "$bin/.$name.new" "$package"
  mv "$bin/.$name.new" "$bin/$name"
  echo "$stamp" >"$bin/.$name.stamp"
}

build storage-conformance . go test -c -vet=off -ldflags "$flags"
build agnhost k8s.io/kubernetes/test/images/agnhost go build -ldflags '-s -w'
echo "conformance-tools: all in $bin"
