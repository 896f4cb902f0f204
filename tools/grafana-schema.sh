#!/usr/bin/env bash
# Puts Grafana's types and the TypeScript compiler, by which dashboards are checked, into the cache and prints their folder.
source "$(dirname "$0")/common.sh"

dir=$CACHE/grafana-schema-13.2.3-typescript-5.9.3
if [ -e "$dir/ready" ]; then
  printf '%s\n' "$dir"
  exit
fi
for tool in node npm; do
  command -v "$tool" >/dev/null || die "$tool is missing; on Debian: apt-get install nodejs npm"
done
say "installing @grafana/schema and typescript into $dir"
rm -rf "$dir"
mkdir -p "$dir"
echo '{"private": true, "type": "module"}' > "$dir/package.json"
(cd "$dir" && npm install --silent --ignore-scripts --no-audit --no-fund @grafana/schema@13.2.3 typescript@5.9.3 >&2)
touch "$dir/ready"
printf '%s\n' "$dir"
