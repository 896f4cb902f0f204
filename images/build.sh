#!/usr/bin/env bash
# Writes OCI archives of the operator and the trainer and prints, for each, file and digest.
#   images/build.sh OUT_DIR trainer|operator…
# Environment: CARGO_TARGET_DIR (the release binaries), LIBTORCH (the staged libtorch), VERSION (the tag),
# CUDA (a folder of CUDA libraries, libtorch_cuda.so among them, for a trainer that uses NVIDIA GPUs).
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=$1
shift
release=$CARGO_TARGET_DIR/release
VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' "$HERE/../Cargo.toml" | head -1)}
CERTIFICATES=/etc/ssl/certs/ca-certificates.crt

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
need() { [ -e "$1" ] || die "$1 is missing; $2"; }

# What both images share: users, names from DNS, certificates of well-known authorities.
common=(
  --user 65532:65532
  # A cluster may assign another user, which is in no file: its home would be /, where nobody may write.
  --env HOME=/tmp
  --layer
  --text $'/etc/passwd=root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin\n'
  --text $'/etc/group=root:x:0:\nnonroot:x:65532:\n'
  --text $'/etc/nsswitch.conf=hosts: files dns\n'
  --add "$CERTIFICATES=$CERTIFICATES"
  --directory /tmp=1777
)

image() { # NAME ARGUMENT…
  local name=$1 digest
  shift
  say "writing $OUT/$name.tar"
  digest=$("$HERE/oci_image.py" "$OUT/$name.tar" --name "localhost/$name" --tag "$VERSION" "$@")
  printf '%s\t%s\n' "$OUT/$name.tar" "$digest"
}

trainer() {
  local name=finetune-trainer program=$release/finetune-trainer libraries
  need "$program" "run make build"
  need "$LIBTORCH/lib/libtorch_cpu.so" "run make libtorch"
  # The libraries are a layer of their own: a new binary is a small new layer.
  libraries=(--layer --library-path "$LIBTORCH/lib" --libraries-of "$program")
  if [ -n "${CUDA:-}" ]; then
    need "$CUDA/libtorch_cuda.so" "CUDA names a folder with the CUDA libraries of PyTorch"
    name=finetune-trainer-cuda
    libraries+=(--layer --folder "$CUDA=/usr/lib/x86_64-linux-gnu" --env "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
      # Where Google's device plugin mounts the driver; elsewhere it is where the loader looks.
      --env "LD_LIBRARY_PATH=/usr/local/nvidia/lib64")
  fi
  image "$name" --entrypoint /usr/local/bin/finetune-trainer "${common[@]}" "${libraries[@]}" \
    --layer --add "$program=/usr/local/bin/finetune-trainer"
}

operator() {
  local program=$release/finetune-operator
  need "$program" "run cargo build --release -p finetune-operator"
  image finetune-operator --entrypoint /usr/local/bin/finetune-operator "${common[@]}" --layer --libraries-of "$program" \
    --layer --add "$program=/usr/local/bin/finetune-operator"
}

[ $# -ge 1 ] || die "name at least one image: trainer, operator"
need "$CERTIFICATES" "on Debian: apt-get install ca-certificates"
mkdir -p "$OUT"
for wanted in "$@"; do
  case $wanted in
    trainer) trainer ;;
    operator) operator ;;
    *) die "there is no image $wanted; there are trainer and operator" ;;
  esac
done
