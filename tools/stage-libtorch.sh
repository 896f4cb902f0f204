#!/usr/bin/env bash
# Stages a CPU libtorch for tch from three wheels of the Python registry and prints its folder.
# The same libtorch_cpu.so serves CUDA: the trainer loads libtorch_cuda.so at run time where there is one.
source "$(dirname "$0")/common.sh"

if [ "$(cat "$LIBTORCH_DIR/build-version" 2>/dev/null)" = "$LIBTORCH_VERSION" ]; then
  printf '%s\n' "$LIBTORCH_DIR"
  exit
fi
[ "$(uname -m)" = x86_64 ] || die "libtorch is pinned for x86_64, found $(uname -m); build on x86_64 or set LIBTORCH to a libtorch $LIBTORCH_VERSION of your own"

work=$(mktemp -d "${TMPDIR:-/tmp}/stage-libtorch.XXXXXX")
trap 'rm -rf "$work"' EXIT
torch=$(fetch_wheel "torch==$LIBTORCH_VERSION" 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a "$work/torch")
cudart=$(fetch_wheel nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 "$work/cudart")
cupti=$(fetch_wheel nvidia-cuda-cupti==13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8 "$work/cupti")

say "unpacking libtorch $LIBTORCH_VERSION into $LIBTORCH_DIR"
stage=$LIBTORCH_DIR.partial
rm -rf "$stage"
mkdir -p "$stage/lib"
"$PYTHON" - "$stage" "$torch" "$cudart" "$cupti" <<'PY'
import pathlib, shutil, sys, zipfile

stage = pathlib.Path(sys.argv[1])
wanted = {f"torch/lib/{name}" for name in ("libc10.so", "libtorch_cpu.so", "libgomp.so.1")}
wanted |= {f"nvidia/cu13/lib/{name}" for name in ("libcudart.so.13", "libcupti.so.13")}
for wheel in sys.argv[2:]:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename in wanted:
                target = stage / "lib" / pathlib.Path(entry.filename).name
            elif entry.filename.startswith("torch/include/") and not entry.is_dir():
                target = stage / pathlib.Path(entry.filename).relative_to("torch")
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
PY
# torch-sys links -ltorch; the wheel's own libtorch.so needs libtorch_cuda, so an empty one that needs only the CPU library stands in.
echo 'int finetune_libtorch(void) { return 0; }' | gcc -x c -shared -fPIC -o "$stage/lib/libtorch.so" - -Wl,-soname,libtorch.so \
  -Wl,--no-as-needed -L"$stage/lib" -ltorch_cpu -lc10 -Wl,--allow-shlib-undefined -Wl,-rpath,'$ORIGIN'
for library in libtorch.so libtorch_cpu.so libc10.so libgomp.so.1 libcudart.so.13 libcupti.so.13; do
  [ -s "$stage/lib/$library" ] || die "$library is missing from the wheels of libtorch $LIBTORCH_VERSION"
done
echo "$LIBTORCH_VERSION" > "$stage/build-version"
rm -rf "$LIBTORCH_DIR"
mv "$stage" "$LIBTORCH_DIR"
printf '%s\n' "$LIBTORCH_DIR"
