#!/usr/bin/env bash
# Fetches the chat templates that ours are compared on, from a pinned wheel, and links them to .test-data/chat_templates.
source "$(dirname "$0")/common.sh"

templates=$CACHE/test-data/trl-1.16.0/chat_templates
if [ ! -d "$templates" ]; then
  work=$(mktemp -d "${TMPDIR:-/tmp}/test-data.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  wheel=$(fetch_wheel trl==1.16.0 c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396 "$work/wheel")
  "$PYTHON" - "$wheel" "$work/out" <<'PY'
import pathlib, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as archive:
    for entry in archive.infolist():
        if entry.filename.startswith("trl/chat_templates/") and entry.filename.endswith(".jinja"):
            target = pathlib.Path(sys.argv[2], pathlib.Path(entry.filename).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
PY
  mkdir -p "$(dirname "$templates")"
  mv "$work/out" "$templates"
fi
mkdir -p "$REPO/.test-data"
ln -sfn "$templates" "$REPO/.test-data/chat_templates"
