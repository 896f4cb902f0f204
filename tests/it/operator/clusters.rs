//! Clusters as people have them: tainted nodes with disks of their own, sidecars, webhooks that are down, volumes that do not
//! mount, names that come back.

use harness::cluster::{Cluster, wait_for};
use harness::operator::{FEW_MINUTES, GPU, Operator, Workspace, condition};

use super::{LONG, SHORT, artifact, local_adapter};

fn running_message(status: &serde_json::Value) -> String {
    condition(status, "Running")["message"].as_str().unwrap_or_default().to_owned()
}

/// Lets whatever is injected run there.
fn privileged(space: &Workspace) {
    let name = space.namespace.name();
    let label = "pod-security.kubernetes.io/enforce=privileged";
    Operator::shared().expect("it has a workspace").cluster.kubectl(&[
        "label",
        "--overwrite",
        "namespace",
        name,
        label,
    ]);
}

/// What a sidecar injector does in the workspace's namespace, by a policy that is gone with the guard.
struct Injection<'a> {
    operator: &'a Operator,
    name: String,
}

impl<'a> Injection<'a> {
    fn new(operator: &'a Operator, space: &Workspace, expression: &str) -> Self {
        privileged(space);
        let name = format!("inject-{}", space.namespace.name());
        let policy = format!(
            r#"apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {{name: {name}}}
spec:
  matchConstraints:
    namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {namespace}}}}}
    resourceRules: [{{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}}]
  failurePolicy: Fail
  reinvocationPolicy: Never
  mutations: [{{patchType: JSONPatch, jsonPatch: {{expression: '{expression}'}}}}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {{name: {name}}}
spec: {{policyName: {name}}}
"#,
            namespace = space.namespace.name()
        );
        operator.cluster.apply("default", &policy);
        let injection = Self { operator, name };
        // A policy is in force some time after it was made.
        wait_for("the policy to be in force", FEW_MINUTES, || {
            let pod = harness::cluster::restricted_pod("probe", operator.cluster.busybox(), &["true"], "");
            space.namespace.apply(&pod);
            let found = space.namespace.get(&["pod", "probe"])?.to_string();
            space.namespace.kubectl(&["delete", "pod", "probe", "--grace-period=0", "--force", "--wait=true"]);
            if found.contains("istio") { Ok(()) } else { Err("a pod without it".into()) }
        });
        injection
    }
}

impl Drop for Injection<'_> {
    fn drop(&mut self) {
        for kind in ["mutatingadmissionpolicybinding", "mutatingadmissionpolicy"] {
            let _ = self.operator.cluster.try_kubectl(&["delete", kind, &self.name]);
        }
    }
}

#[test]
fn a_job_trains_where_its_volume_can_follow() {
    let Some(operator) = Operator::shared() else { return };
    // The only node with a GPU is this one, for as long as the test lasts.
    let alone = operator.disturb();
    operator.cluster.set_capacity("node1", GPU, 0);
    let node = operator.cluster.tainted_node(&format!("{GPU}=present:NoSchedule"));
    operator.cluster.set_capacity(&node.name(), GPU, 1);
    let space = alone.workspace("zone");
    let trains_there = |name: &str, profile: &str| {
        space.job(name, &format!("profile: {profile}\n{SHORT}"));
        let status = space.succeeded(name);
        assert_eq!(status["attempts"]["total"], 1, "{status:#}");
        for stage in ["prepare", "train", "publish"] {
            let selector = format!("--selector=app.kubernetes.io/component={stage},finetune.dev/job-name={name}");
            let pods = space.namespace.get(&["pods", &selector]).expect("finished pods stay");
            assert_eq!(pods["items"][0]["spec"]["nodeName"], node.name().as_str(), "{name}: {stage}");
        }
    };
    trains_there("bot", "zonal");
    let _taint = Tainted::new(operator.cluster, "team=ml:NoSchedule");
    trains_there("bat", "tainted");
}

/// The first node, while it keeps pods away.
struct Tainted<'a> {
    cluster: &'a Cluster,
    taint: String,
}

impl<'a> Tainted<'a> {
    fn new(cluster: &'a Cluster, taint: &str) -> Self {
        cluster.kubectl(&["taint", "nodes", "node1", taint]);
        Self { cluster, taint: taint.to_owned() }
    }
}

impl Drop for Tainted<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.try_kubectl(&["taint", "nodes", "node1", &format!("{}-", self.taint)]);
    }
}

#[test]
fn a_job_that_is_applied_again_runs_with_its_own_configuration() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("again");
    space.job("bot", LONG);
    let old = space.trains("bot");
    // It takes its time to leave: the kubelet goes on serving what it was made with.
    space.namespace.freeze(&old, || {
        space.namespace.kubectl(&["delete", "finetunejobs.finetune.dev", "bot"]);
        space.job("bot", "");
        let status = space.succeeded("bot");
        assert_eq!(artifact(&status), local_adapter("maxSteps: 60", "maxSteps: 60"));
        assert_eq!((&status["attempts"]["total"], &status["attempts"]["failed"]), (&1.into(), &0.into()), "{status:#}");
        assert!(space.namespace.get(&["pod", &old]).is_ok(), "the old pod was there all the time");
    });
}

#[test]
fn sidecars_that_do_not_end_hold_no_job() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("sidecar");
    let image = operator.cluster.busybox();
    let container = format!(
        r#"[JSONPatch{{op: "add", path: "/spec/containers/-", value: Object.spec.containers{{name: "istio-proxy", image: "{image}", command: ["sleep", "36000"]}}}}]"#
    );
    let _injection = Injection::new(operator, &space, &container);
    space.job("bot", SHORT);
    let status = space.succeeded("bot");
    assert_eq!(status["attempts"]["total"], 1, "{status:#}");
    wait_for("its pods to be gone", FEW_MINUTES, || match space.live_pods("bot") {
        pods if pods.is_empty() => Ok(()),
        pods => Err(format!("{pods:?}")),
    });
}

#[test]
fn an_init_container_that_fails_is_told_by_name() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("init");
    let image = operator.cluster.busybox();
    let container = format!(
        r#"[JSONPatch{{op: "add", path: "/spec/initContainers", value: dyn([])}}, JSONPatch{{op: "add", path: "/spec/initContainers/-", value: Object.spec.initContainers{{name: "istio-init", image: "{image}", command: ["sh", "-c", "exit 1"]}}}}]"#
    );
    let _injection = Injection::new(operator, &space, &container);
    space.job("bot", &format!("{SHORT}failurePolicy: {{maxRetries: 1}}\n"));
    let status = space.ended("bot");
    assert_eq!(condition(&status, "Failed")["reason"], "BackoffLimitExceeded", "{status:#}");
    assert_eq!(status["lastFailure"]["reason"], "InitContainerFailed", "{status:#}");
    assert!(status["lastFailure"]["message"].as_str().is_some_and(|text| text.contains("istio-init")), "{status:#}");
}

#[test]
fn a_webhook_that_is_down_is_told_in_the_api_servers_words_and_waited_for() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("webhook");
    let namespace = space.namespace.name();
    let webhook = |name: &str, kind: &str, group: &str| {
        format!(
            r#"apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {{name: {name}-{namespace}}}
webhooks:
  - name: {name}.kb.io
    clientConfig: {{service: {{namespace: default, name: nobody, path: /validate}}}}
    rules: [{{apiGroups: ["{group}"], apiVersions: [v1], operations: [CREATE], resources: [{kind}]}}]
    failurePolicy: Fail
    sideEffects: None
    admissionReviewVersions: [v1]
    namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {namespace}}}}}
"#
        )
    };
    for (name, kind, group) in [("mjob", "jobs", "batch"), ("mpod", "pods", "")] {
        operator.cluster.apply("default", &webhook(name, kind, group));
        space.job(name, SHORT);
        let status = space.until(name, "the API server's sentence", |status| {
            running_message(status).contains(&format!("failed calling webhook \"{name}.kb.io\""))
        });
        assert_eq!(condition(&status, "Running")["reason"], "ChildCreationFailed", "{status:#}");
        let object = format!("{name}-{namespace}");
        operator.cluster.kubectl(&["delete", "validatingwebhookconfiguration", &object]);
        space.succeeded(name);
    }
}

#[test]
fn a_volume_that_does_not_mount_is_told_in_the_kubelets_words() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("mount");
    let volume = format!(
        r#"apiVersion: v1
kind: PersistentVolume
metadata: {{name: gone-{namespace}}}
spec: {{capacity: {{storage: 1Gi}}, accessModes: [ReadWriteMany], storageClassName: "", claimRef: {{namespace: {namespace}, name: gone}}, hostPath: {{path: /no-such-export, type: Directory}}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: gone}}
spec: {{accessModes: [ReadWriteMany], storageClassName: "", volumeName: gone-{namespace}, resources: {{requests: {{storage: 1Gi}}}}}}
"#,
        namespace = space.namespace.name()
    );
    space.namespace.apply(&volume);
    space.job("bot", "checkpoint: {storage: {claim: gone}}");
    let status = space.until_reason("bot", "MountFailed");
    assert!(running_message(&status).contains("/no-such-export"), "{status:#}");
}
