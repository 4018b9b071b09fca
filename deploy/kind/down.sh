#!/usr/bin/env bash
# make kind-down: takes away the cluster, its volumes' devices, the shared disk and its file.
set -uo pipefail
directory=${HOLDFAST_KIND_DIR:-/var/tmp/holdfast-kind}
context=(--context kind-holdfast)
left=0

if kind get clusters 2>/dev/null | grep -qx holdfast; then
  # In order, so that every volume is closed before its node goes.
  kubectl "${context[@]}" delete statefulset/sample pod/raw --ignore-not-found --timeout=60s
  kubectl "${context[@]}" delete pvc --all --timeout=60s
  kubectl "${context[@]}" wait --for=delete pv --all --timeout=60s 2>/dev/null
  helm --kube-context kind-holdfast uninstall holdfast --namespace holdfast-system --wait --timeout 2m
  kind delete cluster --name holdfast || left=1
fi
if [ -e "$directory/disk.img" ]; then
  for device in $(losetup --associated "$directory/disk.img" --output NAME --noheadings); do
    losetup --detach "$device" || { echo "kind-down: $device is still in use" >&2; left=1; }
  done
fi
[ "$left" = 0 ] && rm -rf "$directory"
exit "$left"
