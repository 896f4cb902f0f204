#!/usr/bin/env bash
# Whether the test cluster leaves anything on the host: compares mounts, cgroup folders, interfaces, firewall rules,
# sysctls and processes before a start and after each kind of end. Prints what is left and fails.
#   leaks.sh RUN_DIR [all]
# Without `all` the demo is ended in three ways: an output that is cut off, Ctrl-C, and SIGKILL of its whole group.
# Environment: CARGO_TARGET_DIR and LIBTORCH, as for tools/demo-cluster.sh, whose kinds of end are among them.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RUN=$(realpath -m "$1")
ENDS=("INT 130")
if [ "${2:-}" = all ]; then ENDS=("HUP 129" "INT 130" "TERM 143" "KILL 137"); fi
DEADLINE_SECONDS=60

die() { printf 'error: %s\n' "$*" >&2; exit 1; }
TOOLS=$("$HERE/build.sh")

# What every start may change. Other programs come and go meanwhile, other clusters too: of the groups only the first
# level is compared, where anything that escapes the cluster's own would appear.
host() {
  echo "## mounts"; cut -d' ' -f4- /proc/self/mountinfo | sort
  echo "## interfaces"; ip -o link | cut -d: -f2
  echo "## firewall"; "$TOOLS/bin/nft" list ruleset
  echo "## groups"; find /sys/fs/cgroup -mindepth 2 -maxdepth 2 -type d ! -name 'finetune-cluster-*' | sort
  echo "## sysctls"
  # Counters and the states of other programs change by themselves.
  find /proc/sys -type f -perm /200 ! -path '*/random/*' ! -name ns_last_pid ! -name 'drop_caches' ! -name 'compact_memory' \
    ! -path '/proc/sys/net/ipv[46]/route/flush' ! -name stat_refresh -print0 | sort -z | xargs -0 grep -s '' || true
}

# What is the cluster's own and must be gone.
own() {
  local group process command
  while read -r group; do if [ -d "$group" ]; then echo "group $group"; fi; done < "$GROUPS_OF_RUN"
  for process in /proc/[0-9]*; do
    # A process may end while it is looked at.
    command=$(tr '\0' ' ' 2>/dev/null < "$process/cmdline") || continue
    case $command in
      *leaks.sh*) ;;
      *"$RUN"*) echo "process ${process##*/}: $command" ;;
    esac
  done
}

# all_gone HOW: waits until nothing of the cluster is left, then compares the host.
all_gone() {
  local deadline=$((SECONDS + DEADLINE_SECONDS)) left
  while left=$(own) && [ -n "$left" ]; do
    [ $SECONDS -lt $deadline ] || die "after $1, still there: $left"
    sleep 0.2
  done
  host > "$SCRATCH/after"
  diff "$SCRATCH/before" "$SCRATCH/after" > "$SCRATCH/diff" || die "after $1 the host has changed: $(cat "$SCRATCH/diff")"
  echo "nothing is left after $1"
}

# started: remembers the groups, and that there is something to look for.
started() {
  cat "$RUN"/cgroups "$RUN"/node[2-9]/cgroups > "$GROUPS_OF_RUN" 2>/dev/null || true
  [ -n "$(own)" ] || die "the test sees nothing of a cluster that runs: it could not fail"
}

until_ready() {
  local deadline=$((SECONDS + 180))
  until grep -qx ready "$SCRATCH/hold"; do
    [ $SECONDS -lt $deadline ] || die "the cluster is not ready: $(cat "$SCRATCH/hold.log")"
    kill -0 "$1" 2>/dev/null || die "the cluster ended: $(cat "$SCRATCH/hold.log")"
    sleep 0.2
  done
}

SCRATCH=$(mktemp -d)
PARENT=
DEMO=
# Also when the test fails: without the parent `hold` ends, and `down` ends the rest.
trap 'for process in $PARENT $DEMO; do kill -9 "$process" || true; done; "$HERE/cluster" down "$RUN"; rm -rf "$SCRATCH"' EXIT
GROUPS_OF_RUN=$SCRATCH/groups
host > "$SCRATCH/before"

"$HERE/cluster" up "$RUN"
"$HERE/cluster" node-up "$RUN"
"$HERE/cluster" enter "$RUN" kubectl run left --image localhost/busybox:1 --image-pull-policy Never --command -- sleep 3600
"$HERE/cluster" enter "$RUN" kubectl wait --for=condition=Ready pod/left --timeout=60s
started
# Another start leaves it alone, and so does the end of one that was refused.
if "$HERE/cluster" up "$RUN" 2> "$SCRATCH/refused"; then die "a second cluster was started in its place"; fi
if "$HERE/cluster" hold "$RUN" < /dev/null 2>> "$SCRATCH/refused"; then die "a second cluster was held in its place"; fi
[ "$(grep -c "a cluster runs in" "$SCRATCH/refused")" = 2 ] || die "refused for another reason: $(cat "$SCRATCH/refused")"
"$HERE/cluster" enter "$RUN" kubectl get pod left > "$SCRATCH/still"
"$HERE/cluster" down "$RUN"
all_gone "down, with two nodes and a pod that runs"

# hold_below: `hold` with a parent that keeps its input open, as a test process does. Sets PARENT and HOLD.
hold_below() {
  rm -f "$SCRATCH/input" "$SCRATCH/hold"
  mkfifo "$SCRATCH/input"
  : > "$SCRATCH/hold"
  sleep infinity > "$SCRATCH/input" &
  PARENT=$!
  "$HERE/cluster" hold "$RUN" < "$SCRATCH/input" > "$SCRATCH/hold" 2> "$SCRATCH/hold.log" &
  HOLD=$!
  until_ready "$HOLD"
  started
}

hold_below
kill -9 "$PARENT"
PARENT=
wait "$HOLD" || die "hold failed: $(cat "$SCRATCH/hold.log")"
all_gone "kill -9 of the parent of hold"

hold_below
kill -9 "$HOLD"
all_gone "kill -9 of hold itself"

# demo_until PATTERN [COMMAND…]: the demo in a session of its own, as a terminal starts it, with its output in a file or read by
# a command, until there is a cluster and the output has a line like PATTERN. Sets DEMO.
demo_until() {
  local pattern=$1 deadline=$((SECONDS + 180))
  shift
  : > "$SCRATCH/demo"
  if [ $# -gt 0 ]; then exec {OUTPUT}> >(exec "$@" > /dev/null); else exec {OUTPUT}> "$SCRATCH/demo"; fi
  env --default-signal=INT setsid "$HERE/../../tools/demo-cluster.sh" "$RUN" crds/examples/cluster.yaml \
    < /dev/null >&"$OUTPUT" 2> "$SCRATCH/demo.log" {OUTPUT}>&- &
  DEMO=$!
  exec {OUTPUT}>&-
  # What a command reads is not looked at.
  until [ -s "$RUN/init" ] && { [ $# -gt 0 ] || grep -q "$pattern" "$SCRATCH/demo"; }; do
    [ $SECONDS -lt $deadline ] || die "the demo has no cluster: $(cat "$SCRATCH/demo.log")"
    kill -0 "$DEMO" 2>/dev/null || die "the demo ended: $(cat "$SCRATCH/demo.log")"
    sleep 0.1
  done
  started
}

# demo_ended HOW STATUS
demo_ended() {
  local status=0
  wait "$DEMO" || status=$?
  DEMO=
  [ $status = "$2" ] || die "after $1 the demo's status is $status, expected $2: $(cat "$SCRATCH/demo.log")"
}

# Its first line, an empty one before it, and nobody reads on: the next one comes when the cluster is there.
demo_until "" head -n 2
demo_ended "an output that is cut off" 141
all_gone "an output that is cut off"

for end in "${ENDS[@]}"; do
  read -r signal status <<< "$end"
  # Early, while the cluster starts, or in the middle.
  case $signal in HUP | TERM) demo_until "a Kubernetes on this machine" ;; *) demo_until "images of the trainer" ;; esac
  kill "-$signal" "$DEMO"
  demo_ended "SIG$signal" "$status"
  all_gone "SIG$signal of the demo"
done

# With everything that would have ended it, as a machine does that runs out of memory.
demo_until "images of the trainer"
kill -9 -- "-$DEMO"
demo_ended "SIGKILL of its whole group" 137
[ -n "$(own)" ] || die "the test sees nothing of the cluster that was left: it could not fail"
# The kill is on its way to every one of the group; only the demo itself was waited for.
read -r owner _ < "$RUN/owner"
deadline=$((SECONDS + DEADLINE_SECONDS))
while grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$owner/status"; do
  [ $SECONDS -lt $deadline ] || die "the process that held the cluster lives on after SIGKILL: $(cat "/proc/$owner/status")"
  sleep 0.1
done
"$HERE/cluster" hold "$RUN" < /dev/null > "$SCRATCH/hold"
grep -qx ready "$SCRATCH/hold" || die "the next start did not come up"
all_gone "the next start and its end, after SIGKILL of all that would have ended the last one"
