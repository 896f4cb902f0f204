#!/usr/bin/env bash
# Stages what compiles the CUDA kernels of trainer/cuda/ from five wheels of the Python registry and prints its folder, for
# CUDA_HOME. No GPU and no driver is needed.
source "$(dirname "$0")/common.sh"

if [ "$(cat "$CUDA_DIR/build-version" 2>/dev/null)" = "$CUDA_VERSION" ]; then
  printf '%s\n' "$CUDA_DIR"
  exit
fi
[ "$(uname -m)" = x86_64 ] || die "nvcc is pinned for x86_64, found $(uname -m); build on x86_64 or set CUDA_HOME to a CUDA toolkit 13.0 of your own"

work=$(mktemp -d "${TMPDIR:-/tmp}/stage-nvcc.XXXXXX")
trap 'rm -rf "$work"' EXIT
nvcc=$(fetch_wheel "nvidia-cuda-nvcc==$CUDA_VERSION" 56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03 "$work/nvcc")
nvvm=$(fetch_wheel "nvidia-nvvm==$CUDA_VERSION" c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0 "$work/nvvm")
crt=$(fetch_wheel "nvidia-cuda-crt==$CUDA_VERSION" 2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4 "$work/crt")
cudart=$(fetch_wheel nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 "$work/cudart")
cccl=$(fetch_wheel nvidia-cuda-cccl==13.0.85 e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649 "$work/cccl")

say "unpacking nvcc $CUDA_VERSION into $CUDA_DIR"
stage=$CUDA_DIR.partial
rm -rf "$stage"
mkdir -p "$stage"
"$PYTHON" - "$stage" "$nvcc" "$nvvm" "$crt" "$cudart" "$cccl" <<'PY'
import pathlib, shutil, sys, zipfile

stage, root = pathlib.Path(sys.argv[1]), "nvidia/cu13/"
# Compiled only, never linked: the linker, the runtime's libraries and the debugging tools stay where they are.
programs = {root + "bin/" + name for name in ("nvcc", "nvcc.profile", "cudafe++", "ptxas", "fatbinary")}
for wheel in sys.argv[2:]:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename
            if entry.is_dir() or not (name in programs or name.startswith((root + "include/", root + "nvvm/"))):
                continue
            target = stage / name.removeprefix(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            if target.parent.name == "bin":
                target.chmod(0o755)
PY
for file in bin/nvcc bin/cudafe++ bin/ptxas bin/fatbinary nvvm/bin/cicc nvvm/libdevice/libdevice.10.bc include/cuda.h include/cuda_bf16.h include/cccl/nv/target; do
  [ -s "$stage/$file" ] || die "$file is missing from the wheels of nvcc $CUDA_VERSION"
done
echo "$CUDA_VERSION" > "$stage/build-version"
rm -rf "$CUDA_DIR"
mv "$stage" "$CUDA_DIR"
printf '%s\n' "$CUDA_DIR"
