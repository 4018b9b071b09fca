#!/usr/bin/env bash
# make kind-down: takes away the cluster, its volumes' devices, the shared disk and its file.
set -uo pipefail
directory=${HOLDFAST_KIND_DIR:-/var/tmp/holdfast-kind}
context=(--context kind-holdfast)
left=0
orderly=1

if kind get clusters 2>/dev/null | grep -qx holdfast; then
  # In order, so that every volume is closed before its node goes.
  kubectl "${context[@]}" delete statefulset/sample pod/raw --ignore-not-found --timeout=60s || orderly=0
  kubectl "${context[@]}" delete pvc --all --timeout=60s || orderly=0
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
if [ "$orderly" = 0 ]; then
  # Whose they are is known by nobody any more: those of another cluster on this machine look the same.
  echo "kind-down: the volumes could not be closed before their nodes went. What they left are those of these loop devices that nothing here uses; losetup --detach takes one away:" >&2
  losetup --list --noheadings --output NAME,BACK-FILE | grep -E ' /$' >&2
  left=1
fi
exit "$left"
