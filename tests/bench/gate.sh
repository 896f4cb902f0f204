#!/usr/bin/env bash
# Compares the speed of this checkout's trainer with that of the commit that tests/bench/base names, built from the history.
# Usage: gate.sh TRAINER. Where the history has no such commit, as in a shallow clone, it says so and compares nothing.
source "$(dirname "$0")/../../tools/common.sh"

new=${1:?usage: gate.sh TRAINER}
commit=$(cat "$REPO/tests/bench/base")
git -C "$REPO" cat-file -e "$commit^{commit}" 2>/dev/null || git -C "$REPO" fetch --quiet --depth 1 origin "$commit" 2>/dev/null || true
if ! git -C "$REPO" cat-file -e "$commit^{commit}" 2>/dev/null; then
  say "speed is not compared: this clone does not have $commit, which tests/bench/base names; \`git fetch --unshallow\` gets it"
  exit
fi
base=$CACHE/gate/$commit
if [ ! -x "$base/finetune-trainer" ]; then
  say "building the trainer of $commit"
  mkdir -p "$base"
  folder=$(mktemp -d -p "$CACHE")
  trap 'rm -rf "$folder"' EXIT
  mkdir "$folder/source"
  # cargo tells by the time of a file whether it is built: with the archive's own times it would take these for built.
  git -C "$REPO" archive "$commit" | tar -x -m -C "$folder/source"
  # A copy of the target folder, so that the dependencies need no second build and this checkout's build stays its own.
  cp -a "$CARGO_TARGET_DIR" "$folder/target"
  (cd "$folder/source" && CARGO_TARGET_DIR=$folder/target cargo build --release --locked --workspace --bin finetune-trainer)
  cp "$folder/target/release/finetune-trainer" "$base/"
fi
"$PYTHON" "$REPO/tests/bench/gate.py" "$base/finetune-trainer" "$new"
