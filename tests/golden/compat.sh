#!/usr/bin/env bash
# Golden files made anew and compared with the committed ones; our adapter in real PEFT, our merged model in transformers.
# Usage: compat.sh TRAINER
source "$(dirname "$0")/../../tools/common.sh"
trainer=$1
python=$("$REPO/tools/peers-env.sh")
work=$(mktemp -d "${TMPDIR:-/tmp}/compat.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Runs a command; what it said is shown only if it fails.
quietly() {
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; die "failed: $*"; }
}

say "making the golden files anew"
quietly "$python" "$REPO/tests/golden/make_golden.py" "$REPO/models/SmolLM2-135M-Instruct" "$work/golden"
quietly "$python" "$REPO/tests/golden/families.py" "$work/golden"
quietly "$python" "$REPO/tests/golden/optimizer.py" "$work/golden"
"$python" "$REPO/tests/golden/compare_golden.py" "$REPO/tests/golden" "$work/golden"

for output in Adapter Merged Full; do
  method="LoRA, lora: {rank: 8}" format=$output rate=1e-3
  if [ "$output" = Full ]; then method=Full format=Merged rate=1e-4; fi
  cat > "$work/$output.yaml" <<YAML
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: compat}
spec:
  model: {uri: file://$REPO/models/SmolLM2-135M-Instruct}
  dataset: {train: {uri: file://$REPO/crds/examples/demo/train.jsonl}}
  method: {type: $method}
  hyperparameters: {maxSteps: 6, learningRate: "$rate", precision: FP32}
  output: {format: $format}
YAML
  say "training six steps, output $output"
  quietly "$trainer" run "$work/$output.yaml" --dir "$work/$output"
done
"$python" "$REPO/tests/golden/check_outputs.py" "$trainer" "$REPO/models/SmolLM2-135M-Instruct" "$work/Adapter/output" \
  "$work/Merged/output" "$work/Full/output"
