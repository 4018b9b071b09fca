#!/usr/bin/env bash
# The tools of the end-to-end tests: a Kubernetes control plane and kubelet, the CSI sidecars and Helm, built from the versions that
# test/e2e/tools/go.sum pins; etcd, containerd, runc, the CNI plugins and iptables from Debian.
#
# They go to a cache outside the tree, because they take half an hour to build and seldom change: HOLDFAST_E2E_CACHE, by default
# ~/.cache/holdfast-e2e. Each binary has a stamp of what it was built from; an interrupted run goes on where it was.
# --check builds and installs nothing: it succeeds if all binaries are there and current.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "e2e-tools: $1" >&2; exit 1; }

cache=${HOLDFAST_E2E_CACHE:-$HOME/.cache/holdfast-e2e}
bin=$cache/bin
check=$([ "${1:-}" = --check ] && echo 1 || true)
if [ -n "$check" ]; then
  [ -d "$bin" ] && command -v go >/dev/null || exit 1
fi
mkdir -p "$bin"
exec 9>"$cache/lock"
flock -n 9 || { [ -z "$check" ] || exit 1; echo "e2e-tools: another run fills $cache; waiting for it"; flock 9; }

[ -n "$check" ] || [ "$(id -u)" = 0 ] || fail "a cluster on this machine needs root. Run it again with sudo."
packages=()
[ -n "$check" ] || packages=(etcd-server etcd-client containerd runc containernetworking-plugins iptables iproute2 busybox-static openssl e2fsprogs xfsprogs btrfs-progs)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  command -v apt-get >/dev/null || fail "these packages are missing, and there is no apt-get to install them: ${missing[*]}"
  echo "e2e-tools: installing ${missing[*]}"
  # A service that starts by itself would take the ports of the test's own.
  printf '#!/bin/sh\nexit 101\n' >"$cache/no-services"
  chmod +x "$cache/no-services"
  [ -e /usr/sbin/policy-rc.d ] || { cp "$cache/no-services" /usr/sbin/policy-rc.d; trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

command -v go >/dev/null || fail "Go 1.26 or newer is missing. Install it from go.dev."

modules=test/e2e/tools

# build NAME PACKAGE LDFLAGS
build() {
  local name=$1 package=$2 flags="-s -w $3" stamp
  stamp=$(cat "$modules/go.mod" "$modules/go.sum" <(echo "$package $flags $(go env GOVERSION GOARCH)") | sha256sum)
  [ -x "$bin/$name" ] && [ "$(cat "$bin/.$name.stamp" 2>/dev/null)" = "$stamp" ] && return
  [ -z "$check" ] || exit 1
  echo "e2e-tools: building $name"
  (cd "$modules" && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -p "${HOLDFAST_E2E_JOBS:-2}" -buildvcs=false -ldflags "$flags" -o "$bin/.$name.new" "$package")
  mv "$bin/.$name.new" "$bin/$name"
  echo "$stamp" >"$bin/.$name.stamp"
}

version_of() { sed -nE "s|^\s+$1 (v[0-9.]+)$|\1|p" "$modules/go.mod"; }

kubernetes=$(version_of k8s.io/kubernetes)
minor=${kubernetes#v1.}
kubernetes_flags="-X k8s.io/component-base/version.gitVersion=$kubernetes -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=${minor%%.*}"
kubernetes_flags+=" -X k8s.io/client-go/pkg/version.gitVersion=$kubernetes"

build helm helm.sh/helm/v4/cmd/helm "-X helm.sh/helm/v4/internal/version.version=$(version_of helm.sh/helm/v4)"
for name in kube-apiserver kubelet kube-controller-manager kube-scheduler kube-proxy kubectl; do
  build "$name" "k8s.io/kubernetes/cmd/$name" "$kubernetes_flags"
done
sidecar() { build "$1" "github.com/kubernetes-csi/$2/cmd/$1" "-X main.version=$(version_of "github.com/kubernetes-csi/$2")"; }
sidecar csi-provisioner external-provisioner/v6
sidecar csi-attacher external-attacher/v4
sidecar csi-resizer external-resizer/v2
sidecar csi-snapshotter external-snapshotter/v8
sidecar snapshot-controller external-snapshotter/v8
[ -n "$check" ] || echo "e2e-tools: all in $bin"
