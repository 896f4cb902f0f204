#!/usr/bin/env bash
# Builds what the test cluster runs and prints its folder: Kubernetes, etcd and the tools from their Go modules,
# containerd and its helpers from Debian's packages (unpacked, never installed), and two small images.
# Each part lies in the cache under the digest of what decides it, so that a changed part alone is built again.
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/common.sh"
HERE=$REPO/tests/cluster
PARTS=$CACHE/cluster-parts

KUBERNETES_VERSION=1.36.2
VERSION_PACKAGE=k8s.io/component-base/version
DEBIAN_PACKAGES=(containerd runc containernetworking-plugins iptables nftables busybox-static
  libnftables1 libedit2 libjansson4 libgmp10 libbsd0 libmd0 libmnl0 libnftnl11 libxtables12)

digest() { sha256sum | cut -c1-12; }

# go_key MODULE FLAGS…: the part's key; only what changes the binaries counts.
go_key() {
  local module=$1
  shift
  { cat "$HERE/$module/go.mod" "$HERE/$module/go.sum"; printf '%s\n' "$@"; } | digest
}

# go_part MODULE FOLDER FLAGS…: every `tool` of a module into FOLDER.
go_part() {
  local module=$1 folder=$2
  shift 2
  [ -d "$folder" ] && return
  command -v go >/dev/null || lacks "go is missing: the test cluster is built from Go modules; install Go $(sed -n 's/^go //p' "$HERE/$module/go.mod") or newer"
  say "building $module (minutes when nothing is cached)"
  rm -rf "$folder.partial"
  mkdir -p "$folder.partial"
  (cd "$HERE/$module" && CGO_ENABLED=0 go build "$@" -o "$folder.partial/" tool)
  mv "$folder.partial" "$folder"
}

debian_part() {
  local folder=$1 work package
  [ -d "$folder" ] && return
  say "unpacking ${DEBIAN_PACKAGES[*]}"
  work=$folder.partial
  rm -rf "$work"
  mkdir -p "$work/unpacked" "$work/packages"
  fetch_debian "$work/packages" "containerd, runc and the CNI plugins come" "${DEBIAN_PACKAGES[@]}"
  for package in "$work"/packages/*.deb; do dpkg-deb -x "$package" "$work/unpacked"; done
  rm -r "$work/packages"
  mkdir "$work/bin"
  ln -s ../unpacked/usr/bin/{containerd,containerd-shim-runc-v2,ctr} ../unpacked/usr/sbin/runc ../unpacked/bin/busybox "$work/bin/"
  ln -s ../unpacked/usr/lib/cni "$work/bin/cni"
  # Only these two need libraries that a host may lack; a global LD_LIBRARY_PATH would reach every program.
  wrap "$work/bin/nft" usr/sbin/nft
  wrap "$work/bin/iptables" usr/sbin/xtables-nft-multi iptables
  mv "$work" "$folder"
}

# wrap FILE PROGRAM ARGUMENT…: a script that runs an unpacked program with the libraries beside it.
wrap() {
  local file=$1 program=$2
  shift 2
  cat > "$file" <<WRAPPER
#!/bin/sh
root=\$(dirname "\$(readlink -f "\$0")")/../unpacked
LD_LIBRARY_PATH=\$root/usr/lib/x86_64-linux-gnu:\$root/lib/x86_64-linux-gnu exec "\$root/$program" $* "\$@"
WRAPPER
  chmod 755 "$file"
}

image_part() {
  local folder=$1 busybox=$2 applets=() applet
  [ -d "$folder" ] && return
  command -v gcc >/dev/null || lacks "gcc is missing; on Debian: apt-get install gcc libc6-dev"
  say "building the pause and busybox images"
  rm -rf "$folder.partial"
  mkdir -p "$folder.partial"
  gcc -static -O2 -s -o "$folder.partial/pause" "$HERE/pause.c"
  "$REPO/images/oci_image.py" "$folder.partial/pause.tar" --name localhost/pause --tag 1 --entrypoint /pause \
    --layer --add "$folder.partial/pause=/pause" >/dev/null
  # busybox wget crashes when it is linked statically against glibc; httpd, nc and nslookup are what probes use.
  for applet in sh cat chmod cp date dd df echo env false grep head httpd id kill ls mkdir mktemp mv nc nslookup printf ps \
    pwd rm sed sleep sort stat sync tail tee test touch true uname wc which; do
    applets+=(--symlink "busybox=/bin/$applet")
  done
  "$REPO/images/oci_image.py" "$folder.partial/busybox.tar" --name localhost/busybox --tag 1 --entrypoint /bin/busybox \
    --layer --add "$busybox=/bin/busybox" "${applets[@]}" --directory /tmp=1777 >/dev/null
  mv "$folder.partial" "$folder"
}

kubernetes_flags=(-tags providerless -ldflags "-s -w -X $VERSION_PACKAGE.gitVersion=v$KUBERNETES_VERSION -X $VERSION_PACKAGE.gitMajor=${KUBERNETES_VERSION%%.*} -X $VERSION_PACKAGE.gitMinor=$(cut -d. -f2 <<< "$KUBERNETES_VERSION")")
tools_flags=(-tags "remove_all_sd enable_kubernetes_sd" -ldflags "-s -w -X helm.sh/helm/v4/internal/version.version=v4.3.1 -X github.com/prometheus/common/version.Version=3.16.0")
local_path_flags=(-ldflags "-s -w")

kubernetes=$PARTS/kubernetes-$(go_key kubernetes "${kubernetes_flags[@]}")
tools=$PARTS/tools-$(go_key tools "${tools_flags[@]}")
local_path=$PARTS/local-path-$(go_key local-path "${local_path_flags[@]}")
debian=$PARTS/debian-$({ echo 1 "$DEBIAN_RELEASE" "${DEBIAN_PACKAGES[@]}"; declare -f debian_part fetch_debian wrap; } | digest)
images=$PARTS/images-$({ echo "$debian"; declare -f image_part; cat "$HERE/pause.c" "$REPO/images/oci_image.py"; } | digest)
cluster=$CACHE/cluster-$(printf '%s\n' "$kubernetes" "$tools" "$local_path" "$debian" "$images" | digest)

if [ ! -d "$cluster" ]; then
  [ "$(uname -m)" = x86_64 ] || lacks "the test cluster is built for x86_64, found $(uname -m)"
  mkdir -p "$PARTS"
  # One build at a time: each takes every core and gigabytes of memory.
  exec 9> "$CACHE/cluster-parts.lock"
  flock 9
  debian_part "$debian"
  image_part "$images" "$debian/unpacked/bin/busybox"
  go_part kubernetes "$kubernetes" "${kubernetes_flags[@]}"
  go_part tools "$tools" "${tools_flags[@]}"
  go_part local-path "$local_path" "${local_path_flags[@]}"
  partial=$cluster.partial
  rm -rf "$partial"
  mkdir -p "$partial/bin"
  ln -s "$kubernetes"/* "$tools"/* "$local_path"/* "$debian"/bin/* "$partial/bin/"
  mv "$partial/bin/server" "$partial/bin/etcd"
  ln -s "$images" "$partial/images"
  rm -rf "$cluster"
  mv "$partial" "$cluster"
fi
printf '%s\n' "$cluster"
