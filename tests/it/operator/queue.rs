//! A job that waits in a queue. The queue is played by the test: it does to Workloads and Jobs what Kueue does.

use harness::operator::{Operator, Workspace, attempts, condition};
use serde_json::{Value, json};

use super::{LONG, artifact, long_adapter};

const WORKLOADS: &str = "workloads.kueue.x-k8s.io";

/// The kind Workload, gone with the guard.
struct Kueue<'a> {
    operator: &'a Operator,
    space: &'a Workspace,
    job: Value,
}

impl<'a> Kueue<'a> {
    fn install(operator: &'a Operator, space: &'a Workspace, job: &str) -> Self {
        let job = space.namespace.get(&["job", job]).expect("it was made");
        let kueue = Self { operator, space, job };
        space.namespace.apply(
            r"apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: workloads.kueue.x-k8s.io, annotations: {api-approved.kubernetes.io: unapproved}}
spec:
  group: kueue.x-k8s.io
  scope: Namespaced
  names: {kind: Workload, plural: workloads}
  versions:
    - name: v1beta1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
",
        );
        operator.cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=2m", "crd", WORKLOADS]);
        kueue
    }

    /// Writes a condition of the Workload.
    fn says(&self, name: &str, status: &str, reason: &str, message: &str) {
        let workload = json!({
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "Workload",
            "metadata": {
                "name": "job-bot-train-1",
                "labels": {"kueue.x-k8s.io/job-uid": self.job["metadata"]["uid"]},
            },
            "status": {"conditions": [{"type": name, "status": status, "reason": reason, "message": message}]},
        });
        self.space.namespace.apply(&workload.to_string());
    }

    /// Opens or closes the Job.
    fn suspend(&self, suspend: bool) {
        let name = self.job["metadata"]["name"].as_str().expect("a name");
        let patch = format!("{{\"spec\": {{\"suspend\": {suspend}}}}}");
        self.space.namespace.kubectl(&["patch", "job", name, "--type=merge", "--patch", &patch]);
    }
}

impl Drop for Kueue<'_> {
    fn drop(&mut self) {
        let deleted = self.operator.cluster.try_kubectl(&["delete", "crd", WORKLOADS]);
        assert!(deleted.is_ok() || std::thread::panicking(), "{deleted:?}");
    }
}

#[test]
fn a_queued_job_waits_is_admitted_evicted_and_goes_on_as_the_same_attempt() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("queue");
    let pods = space.watch("bot");
    space.job("bot", &format!("{LONG}scheduling: {{queueName: team}}"));
    let admitted = |what: &str| {
        space.until("bot", what, |status| {
            let conditions = status["conditions"].as_array();
            conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Admitted" && one["reason"] == what))
        })
    };
    let status = admitted("QueueControllerMissing");
    let message = condition(&status, "Admitted")["message"].as_str().unwrap_or_default();
    assert!(status["phase"] == "Queued" && message.contains("the queue team"), "{status:#}");
    let kueue = Kueue::install(operator, &space, "bot-train-1");
    assert_eq!(kueue.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "team");
    kueue.says("QuotaReserved", "False", "Pending", "no quota for nvidia.com/gpu in team-queue");
    let status = admitted("WaitingForQuota");
    let message = condition(&status, "Admitted")["message"].as_str().unwrap_or_default();
    assert_eq!(message, "Pending: no quota for nvidia.com/gpu in team-queue");
    assert_eq!((status["phase"].as_str(), space.live_pods("bot").len()), (Some("Queued"), 0));

    kueue.says("QuotaReserved", "True", "QuotaReserved", "");
    kueue.suspend(false);
    space.trains("bot");
    let status = admitted("QuotaReserved");
    assert_eq!(condition(&status, "Admitted")["status"], "True", "{status:#}");

    kueue.says("Evicted", "True", "Preempted", "to accommodate a workload of higher priority");
    kueue.suspend(true);
    let status = admitted("Evicted");
    let message = condition(&status, "Admitted")["message"].as_str().unwrap_or_default();
    assert_eq!(message, "Preempted: to accommodate a workload of higher priority");
    assert_eq!((&status["phase"], &status["attempts"]["preempted"]), (&"Queued".into(), &1.into()), "{status:#}");

    kueue.says("QuotaReserved", "True", "QuotaReserved", "");
    kueue.suspend(false);
    let status = space.succeeded("bot");
    assert_eq!(attempts(&status), (Some(1), Some(1), Some(0)), "{status:#}");
    assert!(status["attempts"]["resumedFromStep"].as_i64().is_some_and(|step| step > 0), "{status:#}");
    assert_eq!(artifact(&status), long_adapter());
    assert_eq!(space.jobs("bot"), ["bot-prepare-1", "bot-publish-1", "bot-train-1"]);
    assert_eq!(pods.one_after_another().len(), 4);
}
