#!/usr/bin/env bash
# Builds the program that tells what Flux, Helm and Argo CD make of an object, from the pinned Go modules of tests/kstatus, and
# prints its path. Exit 3 where this machine lacks Go.
source "$(dirname "$0")/common.sh"

module=$REPO/tests/kstatus
version=$(sed -n 's/.*sigs.k8s.io\/cli-utils v//p' "$module/go.mod")
key=$(cat "$module"/go.mod "$module"/go.sum "$module"/*.go | sha256sum | cut -c1-12)
program=$CACHE/kstatus-$version-$key
if [ ! -x "$program" ]; then
  command -v go >/dev/null || lacks "go is missing: kstatus is a Go module; install Go $(sed -n 's/^go //p' "$module/go.mod") or newer"
  say "building kstatus $version"
  mkdir -p "$CACHE"
  partial=$program.partial.$$
  (cd "$module" && CGO_ENABLED=0 go build -ldflags "-s -w" -o "$partial" .) >&2
  mv "$partial" "$program"
fi
printf '%s\n' "$program"
