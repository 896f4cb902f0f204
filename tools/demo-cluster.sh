#!/usr/bin/env bash
# The whole way on a real Kubernetes: images, helm install, kubectl apply, watch, dashboards' queries, verdict.
#   tools/demo-cluster.sh RUN_DIR JOB.yaml
# Environment: CARGO_TARGET_DIR and LIBTORCH, as for images/build.sh. Ends the cluster when it ends, however it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUN=$(realpath -m "$1")
JOB=$2
cluster=tests/cluster/cluster
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
inside() { "$cluster" enter "$RUN" "$@"; }
# What a user would type, and then it.
type_in() { printf '$ %s\n' "$*"; inside "$@"; }

say "== images"
images/build.sh "$RUN.images" trainer operator
say "== a Kubernetes on this machine"
trap 'rm -rf "$RUN.images"; "$cluster" down "$RUN"' EXIT
trap 'exit 130' INT TERM
"$cluster" up "$RUN"
push() { "$cluster" push "$RUN" "$RUN.images/finetune-$1.tar" "finetune-$1:demo"; }
trainer=$(push trainer)
operator=$(push operator)
rm -rf "$RUN.images"
repository() { local name=${1%@*}; echo "${name#*/}"; }
cat > "$RUN/values.yaml" <<VALUES
image: {registry: "${operator%%/*}", repository: $(repository "$operator"), digest: "${operator#*@}"}
trainer: {image: {registry: "${trainer%%/*}", repository: $(repository "$trainer"), digest: "${trainer#*@}"}}
pollIntervalSeconds: 2
extraArgs: [--progress-interval-seconds=5]
profiles:
  default:
    resources: {limits: {memory: 4Gi}}
    storage: {size: 5Gi}
    pricePerHour: 0.10
VALUES

say "== install"
type_in helm install finetune "$PWD/charts/finetune-operator" --namespace finetune-system --create-namespace \
  --values "$RUN/values.yaml" --wait --timeout 3m | sed -n '1,8p'
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

say "== Prometheus, which finds the pods through Kubernetes"
mkdir -p "$RUN/prometheus"
sed "s/scrape_interval: .*/scrape_interval: 2s/; s#rule_files: .*#rule_files: [$PWD/charts/finetune-operator/alerts/alerts.yaml]#; \
  s#kubernetes_sd_configs: \[{role: pod}\]#kubernetes_sd_configs: [{role: pod, kubeconfig_file: $RUN/pki/admin.kubeconfig}]#" \
  charts/finetune-operator/prometheus.yml > "$RUN/prometheus/prometheus.yml"
inside prometheus --config.file="$RUN/prometheus/prometheus.yml" --storage.tsdb.path="$RUN/prometheus/data" \
  --web.listen-address=127.0.0.1:9090 > "$RUN/log/prometheus.log" 2>&1 &

say "== a job"
sed -n '/^apiVersion/,$p' "$JOB"
type_in kubectl -n team apply -f "$PWD/$JOB"
name=$(inside kubectl -n team get finetunejobs -o 'jsonpath={.items[0].metadata.name}')
PATH=$CARGO_TARGET_DIR/release:$PATH
printf '$ kubectl finetune -n team watch %s\n' "$name"
inside "$CARGO_TARGET_DIR/release/kubectl-finetune" -n team watch "$name"
printf '$ kubectl finetune -n team status %s\n' "$name"
inside "$CARGO_TARGET_DIR/release/kubectl-finetune" -n team status "$name"
printf '$ kubectl finetune -n team plot %s --prometheus http://127.0.0.1:9090\n' "$name"
inside "$CARGO_TARGET_DIR/release/kubectl-finetune" -n team plot "$name" --prometheus http://127.0.0.1:9090

say "== what the dashboards ask"
ask() { # TITLE QUERY
  printf '%-34s' "$1"
  inside curl -sS --get http://127.0.0.1:9090/api/v1/query --data-urlencode "query=$2" |
    python3 -c 'import json,sys; found=json.load(sys.stdin)["data"]["result"]; print(found[0]["value"][1] if found else "no data")'
}
job="namespace=\"team\",finetunejob=\"$name\""
ask "steps" "max_over_time(finetune_step{$job}[1h])"
ask "loss, first" "max_over_time(finetune_train_loss{$job}[1h])"
ask "loss, least" "min_over_time(finetune_train_loss{$job}[1h])"
ask "tokens" "max_over_time(finetune_tokens_total{$job,kind=\"input\"}[1h])"
ask "checkpoints" "max_over_time(finetune_checkpoints_total{$job,result=\"success\"}[1h])"
ask "succeeded" "finetunejob_status_phase{$job,phase=\"Succeeded\"}"

say "== events"
type_in kubectl -n team get events --field-selector "involvedObject.kind=FineTuneJob" -o custom-columns=REASON:.reason,MESSAGE:.message
say "== done in $SECONDS s"
[ "$(inside kubectl -n team get finetunejob "$name" -o 'jsonpath={.status.phase}')" = Succeeded ]
