#!/bin/bash
# One node of the test cluster, as the first process of namespaces of its own (mount, process, host name; the network's was made
# before): when it is killed, everything of the node is gone at once, as after a power cut.
#   node.sh DIRECTORY NAME ADDRESS GATEWAY BIN IMAGE…
set -eu
dir=$1 name=$2 address=$3 gateway=$4 bin=$5
shift 5

hostname "$name"
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/log
mkdir -p /run/containerd /run/mount /var/log/pods "$dir"/{kubelet,containerd,holdfast,cni,log/pods}
mount --bind "$dir/kubelet" /var/lib/kubelet
mount --bind "$dir/containerd" /var/lib/containerd
mount --bind "$dir/holdfast" /var/lib/holdfast
mount --bind "$dir/log/pods" /var/log/pods
mount --bind "$dir/machine-id" /etc/machine-id
mount --make-rshared /

ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0

containerd --config "$dir/containerd.toml" >>"$dir/log/containerd.log" 2>&1 &
until ctr --connect-timeout 1s version >/dev/null 2>&1; do sleep 0.1; done
# Images are on the node's disk: a node that boots again has them.
[ -e "$dir/images" ] || for image; do ctr -n k8s.io images import "$image" >>"$dir/log/images.log" 2>&1; done
touch "$dir/images"

"$bin/kube-proxy" --config "$dir/proxy.json" >>"$dir/log/kube-proxy.log" 2>&1 &
"$bin/kubelet" --config "$dir/kubelet.json" --kubeconfig "$dir/kubeconfig" --root-dir /var/lib/kubelet \
  --hostname-override "$name" --node-ip "$address" --v 2 >>"$dir/log/kubelet.log" 2>&1 &
wait
