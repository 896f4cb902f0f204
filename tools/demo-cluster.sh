#!/usr/bin/env bash
# The whole way on a real Kubernetes: images, helm install, kubectl apply, watch, dashboards' queries, verdict.
#   tools/demo-cluster.sh RUN_DIR JOB.yaml
# Environment: CARGO_TARGET_DIR and LIBTORCH, as for images/build.sh. The cluster ends with this script, however that ends: by an
# output that nobody reads any more, a closed terminal, Ctrl-C, SIGTERM, SIGKILL. Its exit code is that of `kubectl finetune
# watch` (0 for a job that succeeded, 1 for one that failed, 2 for one that a gate refused), or 128 and the signal.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUN=$(realpath -m "$1")
JOB=$2
PROMETHEUS=http://127.0.0.1:9090
cluster=tests/cluster/cluster
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
# Beside this script, which therefore hears signals while it waits.
beside() {
  "$@" &
  wait $!
}
inside() { beside "$cluster" enter "$RUN" "$@"; }
# What a user would type, and then it.
typed() { printf '\n$ %s\n' "$*"; }
type_in() {
  typed "$@"
  inside "$@"
}
# wait_for WHAT COMMAND…: polls a condition.
wait_for() {
  local what=$1 deadline=$((SECONDS + 60))
  shift
  until "$@"; do
    [ $SECONDS -lt $deadline ] || { echo "error: $what: not within 60 s; logs in $RUN/log" >&2; exit 1; }
    sleep 0.2
  done
}

for signal in HUP INT PIPE TERM; do
  # shellcheck disable=SC2064
  trap "exit $((128 + $(kill -l $signal)))" $signal
done

say "a Kubernetes on this machine"
# It holds the cluster as long as this script holds its input open. No child inherits that: bash closes it for programs.
coproc HOLD { exec "$cluster" hold "$RUN"; }
exec {said}<&"${HOLD[0]}"
holder=$HOLD_PID
# By number and start time, as the cluster knows it.
owner=("$holder" "$(cut -d' ' -f22 "/proc/$holder/stat")")
end() {
  # What follows is done to its end, whoever reads it.
  trap '' HUP INT PIPE TERM
  say "after $SECONDS s the cluster is taken away" 2> /dev/null || true
  kill -TERM "$holder" 2> /dev/null || true
  "$cluster" end-of "$RUN" "${owner[@]}"
}
trap end EXIT
# It has said why it could not.
read -r ready <&"$said" || { wait "$holder" || exit $?; exit 1; }
[ "$ready" = ready ]

say "images of the trainer and the operator"
# Inside, so that it ends with the cluster.
inside "$PWD/images/build.sh" "$RUN/images" trainer operator > /dev/null
push() { beside "$cluster" push "$RUN" "$RUN/images/finetune-$1.tar" "finetune-$1:demo"; }
trainer=$(push trainer)
operator=$(push operator)
rm -rf "$RUN/images"
image() { # REGISTRY/REPOSITORY@DIGEST
  local name=${1%@*}
  echo "{registry: \"${name%%/*}\", repository: ${name#*/}, digest: \"${1#*@}\"}"
}
cat > "$RUN/values.yaml" <<VALUES
image: $(image "$operator")
trainer: {image: $(image "$trainer")}
pollIntervalSeconds: 2
extraArgs: [--progress-interval-seconds=5]
profiles:
  default:
    resources: {limits: {memory: 4Gi}}
    storage: {size: 5Gi}
    pricePerHour: 0.10
VALUES
# kubectl finds the plugin as it finds any: on the path.
PATH=$CARGO_TARGET_DIR/release:$PATH

say "the operator, installed by its chart"
install=(helm install finetune-operator charts/finetune-operator --namespace finetune-system --create-namespace
  --values "$RUN/values.yaml" --wait --timeout 3m)
typed "${install[@]}"
inside "${install[@]}" > "$RUN/log/helm-install.log"
sed '/^NOTES/,$d' "$RUN/log/helm-install.log"
type_in kubectl -n finetune-system get deployment,pods

# A model and rows, as a team would have them on its volumes.
mkdir -p "$RUN/team/models" "$RUN/team/datasets"
cp -rL models/SmolLM2-135M-Instruct "$RUN/team/models/"
cp crds/examples/demo/*.jsonl "$RUN/team/datasets/"
inside kubectl create namespace team > /dev/null
inside kubectl label namespace team pod-security.kubernetes.io/enforce=restricted > /dev/null
for claim in models datasets; do
  cat <<CLAIM
apiVersion: v1
kind: PersistentVolume
metadata: {name: $claim}
spec: {capacity: {storage: 5Gi}, accessModes: [ReadOnlyMany], storageClassName: "", claimRef: {namespace: team, name: $claim}, hostPath: {path: $RUN/team/$claim}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: $claim, namespace: team}
spec: {accessModes: [ReadOnlyMany], storageClassName: "", volumeName: $claim, resources: {requests: {storage: 5Gi}}}
---
CLAIM
done > "$RUN/team/claims.yaml"
inside kubectl apply -f "$RUN/team/claims.yaml" > /dev/null

say "Prometheus, which finds the pods through Kubernetes, with the chart's alerts"
mkdir -p "$RUN/prometheus"
sed "s/scrape_interval: .*/scrape_interval: 2s/; s#rule_files: .*#rule_files: [$PWD/charts/finetune-operator/alerts/alerts.yaml]#; \
  s#{role: pod}#{role: pod, kubeconfig_file: $RUN/pki/admin.kubeconfig}#" \
  charts/finetune-operator/prometheus.yml > "$RUN/prometheus/prometheus.yml"
"$cluster" enter "$RUN" prometheus --config.file="$RUN/prometheus/prometheus.yml" --storage.tsdb.path="$RUN/prometheus/data" \
  --web.listen-address="${PROMETHEUS#http://}" > "$RUN/log/prometheus.log" 2>&1 &
disown $! # bash would report that it was killed
scraped() { [ -n "$(inside promtool query instant "$PROMETHEUS" "$1" 2> "$RUN/log/promtool.log")" ]; }
wait_for "Prometheus has the operator's series" scraped 'finetune_operator_leader == 1'
inside promtool query instant "$PROMETHEUS" finetune_operator_leader

say "a job"
sed -n '/^apiVersion/,$p' "$JOB"
type_in kubectl apply -n team -f "$JOB"
name=$(inside kubectl get -n team -f "$JOB" -o 'jsonpath={.metadata.name}')
result=0
type_in kubectl finetune watch "$name" -n team || result=$?
type_in kubectl finetune status "$name" -n team
type_in kubectl get events -n team --field-selector involvedObject.kind=FineTuneJob \
  -o 'custom-columns=TYPE:.type,REASON:.reason,COUNT:.series.count,MESSAGE:.message'
[ $result = 0 ] || exit $result

say "the loss curve, from Prometheus"
type_in kubectl finetune plot "$name" -n team --prometheus "$PROMETHEUS"

say "what the dashboard of a run shows, at the end"
wait_for "Prometheus has the job's end" scraped "finetunejob_status_phase{finetunejob=\"$name\",phase=\"Succeeded\"} == 1"
created=$(inside kubectl get finetunejob "$name" -n team -o 'jsonpath={.metadata.creationTimestamp}')
inside tools/ask-dashboard.py "$PROMETHEUS" team "$name" "$created" charts/finetune-operator/dashboards/run.json
