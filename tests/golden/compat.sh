#!/usr/bin/env bash
# Golden files made anew and compared with the committed ones; our adapter in real PEFT, our merged model in transformers.
# Usage: compat.sh TRAINER
source "$(dirname "$0")/../../tools/common.sh"
trainer=$1
python=$("$REPO/tools/peers-env.sh")
work=$(mktemp -d "${TMPDIR:-/tmp}/compat.XXXXXX")
trap 'rm -rf "$work"' EXIT

say "making the golden files anew"
"$python" "$REPO/tests/golden/make_golden.py" "$REPO/models/SmolLM2-135M-Instruct" "$work/golden" >/dev/null 2>&1
"$python" "$REPO/tests/golden/compare_golden.py" "$REPO/tests/golden" "$work/golden"

for format in Adapter Merged; do
  cat > "$work/$format.yaml" <<YAML
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: compat}
spec:
  model: {uri: file://$REPO/models/SmolLM2-135M-Instruct}
  dataset: {train: {uri: file://$REPO/crds/examples/demo/train.jsonl}}
  method: {type: LoRA, lora: {rank: 8}}
  hyperparameters: {maxSteps: 6, learningRate: "1e-3", precision: FP32}
  output: {format: $format}
YAML
  say "training six steps, output $format"
  "$trainer" run "$work/$format.yaml" --dir "$work/$format" >/dev/null 2>&1
done
"$python" "$REPO/tests/golden/check_outputs.py" "$trainer" "$REPO/models/SmolLM2-135M-Instruct" "$work/Adapter/output" "$work/Merged/output" 2>/dev/null
