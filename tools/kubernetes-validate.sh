#!/usr/bin/env bash
# Puts kubernetes-validate, which knows the schemas of Kubernetes 1.25 to 1.37, into the cache and prints its program.
source "$(dirname "$0")/common.sh"

env=$CACHE/kubernetes-validate-1.37.0
if [ ! -e "$env/ready" ]; then
  say "installing kubernetes-validate into $env"
  rm -rf "$env"
  "$PYTHON" -m venv "$env"
  "$env/bin/pip" install --quiet --disable-pip-version-check kubernetes-validate==1.37.0 >&2
  touch "$env/ready"
fi
printf '%s\n' "$env/bin/kubernetes-validate"
