#!/usr/bin/env bash
# Prints the command that emulates a processor with AVX2 and without AVX-512 for one program: the machine's own QEMU, or that of
# Debian's package, which is unpacked and not installed. Exit 3 where this machine cannot have it.
source "$(dirname "$0")/common.sh"

# 7.2 is the first with AVX2; no version has AVX-512, so `max` is all below it.
FIRST=7.2
is_new_enough() { [ "$(printf '%s\n' "$FIRST" "$("$1" --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p')" | sort -V | head -1)" = "$FIRST" ]; }

for qemu in qemu-x86_64 qemu-x86_64-static; do
  qemu=$(command -v "$qemu") && is_new_enough "$qemu" && printf '%s -cpu max\n' "$qemu" && exit
done
qemu=$CACHE/qemu-debian-$DEBIAN_RELEASE/qemu-x86_64-static
case $qemu in *[[:space:]]*) die "$CACHE has a space in it, which a command that cargo starts tests with cannot have; set FINETUNE_CACHE" ;; esac
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
