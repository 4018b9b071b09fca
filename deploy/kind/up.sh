#!/usr/bin/env bash
# make kind-up: a three-node kind cluster whose nodes share a loop disk, with Holdfast, and a sample StatefulSet that has written to its volumes.
# Repeating it goes on where it stopped; make kind-down takes everything away.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "kind-up: $1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "loop devices need root. Run it again with sudo."
for program in docker kind kubectl helm node losetup; do
  command -v "$program" >/dev/null || fail "$program is missing. kind: go install sigs.k8s.io/kind@v0.32.0; helm: go install helm.sh/helm/v4/cmd/helm@v4.2.4; docker and kubectl: your distribution's packages."
done
docker info >/dev/null 2>&1 || fail "docker does not answer. Start it, or add yourself to its group."

directory=${HOLDFAST_KIND_DIR:-/var/tmp/holdfast-kind}
context=(--context kind-holdfast)
mkdir -p "$directory"

kind get clusters 2>/dev/null | grep -qx holdfast || kind create cluster --config deploy/kind/kind.yaml ${HOLDFAST_KIND_IMAGE:+--image "$HOLDFAST_KIND_IMAGE"} --wait 120s

disk=$directory/disk.img
[ -e "$disk" ] || truncate -s "${HOLDFAST_KIND_SIZE:-32G}" "$disk"
device=$(losetup --associated "$disk" --output NAME --noheadings | head -1)
[ -n "$device" ] || device=$(losetup --find --show --direct-io=on "$disk")
echo "kind-up: the shared disk is $device over $disk"

# A kind node has the device nodes that were there when it started. Volumes, and the kubelet's raw block volumes, are loop devices made later.
for node in $(kind get nodes --name holdfast); do
  docker exec "$node" sh -c 'for i in $(seq 0 255); do [ -e /dev/loop$i ] || mknod /dev/loop$i b 7 $i; done'
done

node tools/images.mjs --out "$directory/images" --tag kind
for image in "$directory"/images/*.tar; do kind load image-archive --name holdfast "$image"; done

helm --kube-context kind-holdfast upgrade --install holdfast charts/holdfast --namespace holdfast-system --create-namespace \
  --values deploy/kind/values.yaml --set image.tag=kind --set "node.devices={$device}" --wait --timeout 5m
# As charts/README.md says: format once, then let the kubelets learn of the pool.
if [ ! -e "$directory/formatted" ]; then
  kubectl "${context[@]}" --namespace holdfast-system exec daemonset/holdfast-node --container agent -- \
    holdfast pool format "$device" --name kind --fencing loop
  touch "$directory/formatted"
  kubectl "${context[@]}" --namespace holdfast-system rollout restart daemonset/holdfast-node
  kubectl "${context[@]}" --namespace holdfast-system rollout status daemonset/holdfast-node --timeout=180s
fi
kubectl "${context[@]}" apply -f deploy/kind/sample.yaml
kubectl "${context[@]}" rollout status statefulset/sample --timeout=180s
kubectl "${context[@]}" wait --for=condition=Ready pod/raw --timeout=120s
echo "kind-up: the sample has written to its volumes. kubectl --context kind-holdfast get pods,pvc; make kind-down takes everything away."
