#!/usr/bin/env bash
# The whole way on a real Kubernetes: images, helm install, kubectl apply, watch, dashboards' queries, verdict.
#   tools/demo-cluster.sh RUN_DIR JOB.yaml
# Environment: CARGO_TARGET_DIR and LIBTORCH, as for images/build.sh. Ends the cluster when it ends, however it ends. Its exit
# code is that of `kubectl finetune watch`: 0 for a job that succeeded, 1 for one that failed, 2 for one that a gate refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUN=$(realpath -m "$1")
JOB=$2
PROMETHEUS=http://127.0.0.1:9090
cluster=tests/cluster/cluster
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
inside() { "$cluster" enter "$RUN" "$@"; }
# What a user would type, and then it.
type_in() { printf '\n$ %s\n' "$*"; inside "$@"; }
# wait_for WHAT COMMAND…: polls a condition.
wait_for() {
  local what=$1 deadline=$((SECONDS + 60))
  shift
  until "$@"; do
    [ $SECONDS -lt $deadline ] || { echo "error: $what: not within 60 s; logs in $RUN/log" >&2; exit 1; }
    sleep 0.2
  done
}

say "images of the trainer and the operator"
end() {
  say "after $SECONDS s the cluster is taken away"
  rm -rf "$RUN.images"
  "$cluster" down "$RUN"
}
trap end EXIT
trap 'exit 130' INT TERM HUP
images/build.sh "$RUN.images" trainer operator > /dev/null

say "a Kubernetes on this machine"
"$cluster" up "$RUN"
push() { "$cluster" push "$RUN" "$RUN.images/finetune-$1.tar" "finetune-$1:demo"; }
trainer=$(push trainer)
operator=$(push operator)
rm -rf "$RUN.images"
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
type_in helm install finetune-operator charts/finetune-operator --namespace finetune-system --create-namespace \
  --values "$RUN/values.yaml" --wait --timeout 3m | sed '/^NOTES/,$d'
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
inside prometheus --config.file="$RUN/prometheus/prometheus.yml" --storage.tsdb.path="$RUN/prometheus/data" \
  --web.listen-address="${PROMETHEUS#http://}" > "$RUN/log/prometheus.log" 2>&1 &
scraped() { [ -n "$(inside promtool query instant "$PROMETHEUS" "$1" 2> "$RUN/log/promtool.log")" ]; }
wait_for "Prometheus has the operator's series" scraped 'finetune_operator_leader == 1'
inside promtool query instant "$PROMETHEUS" finetune_operator_leader

say "a job"
sed -n '/^apiVersion/,$p' "$JOB"
type_in kubectl apply -n team -f "$JOB"
name=$(inside kubectl get -n team -f "$JOB" -o 'jsonpath={.metadata.name}')
result=0
type_in kubectl finetune watch "$name" -n team || result=$?
[ $result != 130 ] || exit 130
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
