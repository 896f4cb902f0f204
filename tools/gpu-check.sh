#!/usr/bin/env bash
# Packs what checks the trainer on a machine with a GPU into gpu-check/ and prints its size; libtorch and CUDA are not in it: the
# machine's PyTorch 2.11+cu130 has them. With --cpu the package goes to the cache and runs here, in small.
# Environment: CARGO_TARGET_DIR and LIBTORCH, as make sets them.
source "$(dirname "$0")/common.sh"

MOST_MIB=60
case ${1:-} in
  "") out=$REPO/gpu-check ;;
  --cpu) out=$CACHE/gpu-check ;;
  *) die "usage: gpu-check.sh [--cpu]" ;;
esac
release=$CARGO_TARGET_DIR/release
it=$(cd "$REPO" && cargo test --release --workspace --test it --no-run --message-format=json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*\/it-[^"]*\)".*/\1/p' | tail -1)
[ -x "$it" ] || die "the integration tests could not be built: cargo test --release --workspace --test it --no-run"
rm -rf "$out"
mkdir -p "$out/release/deps" "$out/tests"
strip -o "$out/release/finetune-trainer" "$release/finetune-trainer"
strip -o "$out/release/deps/it" "$it"
XZ_OPT="-T0 -3" tar -C "$out" -cJf "$out/release.tar.xz" release
rm -r "$out/release"
cp -r "$REPO/tests/golden" "$out/tests/"
rm -f "$out"/tests/golden/*.py "$out"/tests/golden/*.sh
cp "$REPO"/tools/gpu-check/*.py "$out/"
size=$(du -sm "$out" | cut -f1)
say "$out: $size MiB"
[ "$size" -le $MOST_MIB ] || die "the package has $size MiB, at most $MOST_MIB may travel"
if [ "${1:-}" = --cpu ]; then
  exec "$PYTHON" "$out/check.py" --cpu --out "$out/out"
fi
say "on the machine with the GPU: python3 gpu-check/check.py --out DIR"
