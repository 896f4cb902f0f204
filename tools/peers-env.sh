#!/usr/bin/env bash
# Makes a private Python environment with the peers that our numerics and speed are compared with (torch on CPU,
# transformers, PEFT, TRL, torchao) and prints its python. torch comes from the same three small wheels as libtorch: the CUDA
# libraries that its Python half names are replaced by stubs that are never called.
source "$(dirname "$0")/common.sh"

env=$CACHE/peers-torch-$LIBTORCH_VERSION-transformers-5.23.0-peft-0.21.2-trl-1.16.0-torchao-0.17.0
if [ -e "$env/ready" ]; then
  printf '%s\n' "$env/bin/python"
  exit
fi
for tool in gcc readelf nm; do
  command -v "$tool" >/dev/null || die "$tool is missing; on Debian: apt-get install gcc binutils"
done

rm -rf "$env"
say "installing torch, transformers, peft, trl and torchao into $env"
"$PYTHON" -m venv "$env"
pip=("$env/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" --no-deps "torch==$LIBTORCH_VERSION" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
"${pip[@]}" filelock typing-extensions 'setuptools<82' sympy networkx jinja2 fsspec 'numpy<2.5'
# --no-deps keeps pip from fetching torch's CUDA libraries; these are the dependencies that the four really import.
"${pip[@]}" transformers==5.23.0 tokenizers safetensors huggingface-hub packaging pyyaml regex requests tqdm psutil
"${pip[@]}" --no-deps peft==0.21.2 accelerate==1.15.0 trl==1.16.0
"${pip[@]}" datasets==5.2.0
# The release for this torch; its 8-bit AdamW is Python and needs nothing but torch. In a folder of its own: transformers and
# PEFT import torchao where they find it, and would start later for it in the benchmarks.
"${pip[@]}" --no-deps --target "$env/torchao" torchao==0.17.0
"$env/bin/python" "$REPO/tools/stub_cuda.py" "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib"
"$env/bin/python" -c 'import torch, transformers, peft, trl; assert not torch.cuda.is_available()'
PYTHONPATH=$env/torchao "$env/bin/python" -c 'from torchao.optim import AdamW8bit'
touch "$env/ready"
printf '%s\n' "$env/bin/python"
