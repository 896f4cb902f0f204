#!/usr/bin/env bash
# Counts the tests that proved nothing on this machine, by what they need. Usage: count-skipped.sh LOG
source "$(dirname "$0")/common.sh"

lines=$(grep -ao 'skipped: needs .*' "${1:?usage: count-skipped.sh LOG}" || true)
if [ -z "$lines" ]; then
  say "no test was skipped"
  exit
fi
sort <<< "$lines"
sed -E 's/: [^:]+(::[^:]+)*$//' <<< "$lines" | sort | uniq -c | while read -r count needs; do
  say "$count $needs"
done
