#!/usr/bin/env bash
# Compares the speed of this checkout's trainer with that of the commit that tests/bench/base names, built from the history.
# Usage: gate.sh TRAINER. Where the history has no such commit, as in a shallow clone, it says so and compares nothing.
source "$(dirname "$0")/../../tools/common.sh"

new=${1:?usage: gate.sh TRAINER}
commit=$(cat "$REPO/tests/bench/base")
if ! git -C "$REPO" cat-file -e "$commit^{commit}" 2>/dev/null; then
  say "speed is not compared: this clone does not have $commit, which tests/bench/base names; \`git fetch --unshallow\` gets it"
  exit
fi
base=$CACHE/gate/$commit
if [ ! -x "$base/finetune-trainer" ]; then
  say "building the trainer of $commit"
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  git -C "$REPO" archive "$commit" | tar -x -C "$folder"
  # In the same target folder, so that the dependencies need no second build; the new trainer goes back to its place.
  cp "$new" "$folder/new"
  (cd "$folder" && cargo build --release --locked --workspace --bin finetune-trainer)
  mkdir -p "$base"
  cp "$CARGO_TARGET_DIR/release/finetune-trainer" "$base/"
  mv "$folder/new" "$new"
fi
"$PYTHON" "$REPO/tests/bench/gate.py" "$base/finetune-trainer" "$new"
