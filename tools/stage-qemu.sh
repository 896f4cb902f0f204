#!/usr/bin/env bash
# Stages QEMU's emulation of a program on another processor from Debian's package, which is not installed, and prints the
# command that emulates one with AVX2 and without AVX-512. Exit 3 where this machine cannot have it.
source "$(dirname "$0")/common.sh"

# Debian 12 has 7.2, the first with AVX2; no version has AVX-512, so `max` is all below it.
qemu=$CACHE/qemu-debian-$DEBIAN_RELEASE/qemu-x86_64-static
if [ ! -x "$qemu" ]; then
  [ "$(uname -s)" = Linux ] || lacks "programs of another processor are emulated on Linux only, this is $(uname -s)"
  say "unpacking qemu-user-static"
  work=$(mktemp -d "${TMPDIR:-/tmp}/stage-qemu.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  fetch_debian "$work" "QEMU comes" qemu-user-static
  dpkg-deb --fsys-tarfile "$work"/qemu-user-static_*.deb | tar -x -C "$work" ./usr/bin/qemu-x86_64-static
  mkdir -p "$(dirname "$qemu")"
  mv "$work/usr/bin/qemu-x86_64-static" "$qemu.partial"
  mv "$qemu.partial" "$qemu"
fi
printf '%s -cpu max\n' "$qemu"
