#!/usr/bin/env bash
# PID 1 of a node: prepares the private namespaces that it was started in, says so with a file, and reaps orphans.
# Killing it ends every process, mount and interface of the node.
#   namespaces.sh RUN_DIR ADDRESS|-     with an address the node gets the bridge that further nodes are joined to
set -euo pipefail
RUN=$1 ADDRESS=$2

ip link set lo up
# cgroup v1: the same hierarchies mounted anew; the root of each is now the private group that the starter moved into.
V1=$(awk '$2 ~ "^/sys/fs/cgroup/" && $3 == "cgroup" {print $2}' /proc/mounts)
umount -R /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for folder in $V1; do
  hierarchy=${folder##*/}
  mkdir -p "$folder"
  if [ "$hierarchy" = systemd ]; then
    mount -t cgroup -o none,name=systemd cgroup "$folder"
  else
    mount -t cgroup -o "$hierarchy" cgroup "$folder"
  fi
done
mount -t tmpfs tmpfs /run
mkdir -p /run/lock "$RUN/var-upper" "$RUN/var-work"
mount -t overlay overlay -o "lowerdir=/var,upperdir=$RUN/var-upper,workdir=$RUN/var-work" /var
# The host's sysctls are read-only here, those of the private network are not.
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,rw /proc/sys/net
# The kubelet insists on these values and would write them for the whole host: it reads and writes plain files instead.
mkdir -p /run/sysctl
for entry in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  file=/run/sysctl/${entry%%=*}
  mkdir -p "${file%/*}"
  echo "${entry#*=}" > "$file"
  mount --bind "$file" "/proc/sys/${entry%%=*}"
done
echo 1 > /proc/sys/net/ipv4/ip_forward
if [ "$ADDRESS" != - ]; then
  ip link add node0 type bridge
  ip addr add "$ADDRESS/24" dev node0
  ip link set node0 up
  # The kubelet and the API server want a default route; nothing answers there.
  ip route add default via 10.99.0.254 dev node0
fi
touch "$RUN/ready"
while :; do
  sleep 3600 &
  wait $!
done
