//! Who may make and change what the operator believes.

use harness::cluster::{MINUTE, wait_for};
use serde_json::{Value, json};

use super::Server;

/// A namespace admin, who may do whatever rights allow.
const TENANT: &str = "tenant";
const OPERATOR: &str = "system:serviceaccount:finetune-system:finetune-operator";
const JOB_CONTROLLER: &str = "system:serviceaccount:kube-system:job-controller";
const KUEUE: &str = "system:serviceaccount:kueue-system:kueue-controller-manager";
const COLLECTOR: &str = "system:serviceaccount:kube-system:generic-garbage-collector";

const NAMESPACE: &str = "children";

/// The namespace, with the policy in force, and accounts that no role holds back.
fn server() -> &'static Server {
    static ONCE: std::sync::Once = std::sync::Once::new();
    let server = Server::shared();
    ONCE.call_once(|| {
        server.kubectl(&["create", "namespace", NAMESPACE], "");
        for (number, user) in [TENANT, OPERATOR, JOB_CONTROLLER, KUEUE, COLLECTOR].into_iter().enumerate() {
            let (name, user) = (format!("all-{number}"), format!("--user={user}"));
            server.kubectl(&["create", "clusterrolebinding", &name, "--clusterrole=cluster-admin", &user], "");
        }
        let values = json!({"watchNamespaces": [NAMESPACE], "serviceAccount.name": "finetune-operator"});
        server.apply("templates/childpolicy.yaml", NAMESPACE, &values);
        let probe = job("probe", &child_labels()).to_string();
        wait_for("the policy of children", MINUTE, || match create(TENANT, &["--dry-run=server"], &probe) {
            Err(said) if said.contains("ValidatingAdmissionPolicy") => Ok(()),
            other => Err(format!("{other:?}")),
        });
    });
    server
}

fn as_user(user: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    Server::shared().try_kubectl(&[&["--as", user, "--namespace", NAMESPACE], arguments].concat(), input)
}

fn create(user: &str, more: &[&str], manifest: &str) -> Result<String, String> {
    as_user(user, &[&["create", "--filename=-"], more].concat(), manifest)
}

/// Asserts what is refused, and by which sentence.
fn refused(said: Result<String, String>, expected: &str) {
    let said = said.expect_err(expected);
    assert!(said.contains("ValidatingAdmissionPolicy") && said.contains(expected), "expected {expected:?} in {said}");
}

fn taken(said: Result<String, String>) {
    said.unwrap_or_else(|said| panic!("{said}"));
}

fn child_labels() -> Value {
    json!({"labels": {"finetune.dev/job-uid": "u1"}})
}

fn owned() -> Value {
    let owner = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "bot", "uid": "u1", "controller": true});
    json!({"ownerReferences": [owner]})
}

fn with_metadata(name: &str, marks: &Value, mut object: Value) -> Value {
    object["metadata"] = marks.clone();
    object["metadata"]["name"] = json!(name);
    object
}

fn containers() -> Value {
    json!([{"name": "trainer", "image": "registry.example/trainer:1"}])
}

fn job(name: &str, marks: &Value) -> Value {
    let template = json!({"spec": {"restartPolicy": "Never", "containers": containers()}});
    with_metadata(
        name,
        marks,
        json!({"apiVersion": "batch/v1", "kind": "Job", "spec": {"suspend": true, "template": template}}),
    )
}

fn pod(name: &str, marks: &Value) -> Value {
    let spec = json!({"restartPolicy": "Never", "containers": containers()});
    with_metadata(name, marks, json!({"apiVersion": "v1", "kind": "Pod", "spec": spec}))
}

const OF_JOBS: &str =
    "only the operator (system:serviceaccount:finetune-system:finetune-operator) makes and changes the Jobs";
const OF_PODS: &str = "only the Job controller makes the pods of FineTuneJobs";

#[test]
fn only_the_operator_makes_jobs_of_a_finetunejob() {
    server();
    for marks in [child_labels(), owned()] {
        let forged = job("forged", &marks).to_string();
        refused(create(TENANT, &[], &forged), OF_JOBS);
        refused(create(JOB_CONTROLLER, &[], &forged), OF_JOBS);
        refused(create(KUEUE, &[], &forged), OF_JOBS);
    }
    taken(create(OPERATOR, &[], &job("made-1", &child_labels()).to_string()));
    taken(create(OPERATOR, &[], &job("made-2", &owned()).to_string()));

    // A Job of his own becomes none of ours.
    taken(create(TENANT, &[], &job("other", &json!({})).to_string()));
    refused(as_user(TENANT, &["label", "job", "other", "finetune.dev/job-uid=u1"], ""), OF_JOBS);
    taken(as_user(TENANT, &["label", "job", "other", "team=a"], ""));
    let other_kind = json!({"ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "u2"}]});
    taken(create(TENANT, &[], &job("of-a-config-map", &other_kind).to_string()));
}

#[test]
fn a_job_is_changed_by_the_operator_and_by_queues_alone() {
    server();
    taken(create(OPERATOR, &[], &job("held", &child_labels()).to_string()));
    let resume = ["patch", "job", "held", "--type=merge", "--patch", "{\"spec\": {\"suspend\": false}}"];
    refused(as_user(TENANT, &resume, ""), OF_JOBS);
    refused(as_user(TENANT, &["label", "job", "held", "finetune.dev/job-uid-"], ""), OF_JOBS);
    refused(as_user(TENANT, &["label", "job", "held", "kueue.x-k8s.io/queue-name=mine"], ""), OF_JOBS);
    taken(as_user(TENANT, &["annotate", "job", "held", "note=mine"], ""));
    taken(as_user(KUEUE, &resume, ""));

    let status = |user: &str| {
        let patch = "{\"status\": {\"active\": 1}}";
        as_user(user, &["patch", "job", "held", "--subresource=status", "--type=merge", "--patch", patch], "")
    };
    refused(status(TENANT), "only the Job controller writes the status");
    taken(status(JOB_CONTROLLER));
    taken(as_user(TENANT, &["delete", "job", "held", "--cascade=orphan", "--wait=false"], ""));
}

#[test]
fn only_the_job_controller_makes_pods_of_a_finetunejob() {
    server();
    for marks in [child_labels(), owned()] {
        let forged = pod("forged", &marks).to_string();
        refused(create(TENANT, &[], &forged), OF_PODS);
        refused(create(KUEUE, &[], &forged), OF_PODS);
        refused(create(OPERATOR, &[], &forged), OF_PODS);
    }
    taken(create(JOB_CONTROLLER, &[], &pod("made", &child_labels()).to_string()));
    taken(create(TENANT, &[], &pod("other", &json!({})).to_string()));
    refused(as_user(TENANT, &["label", "pod", "other", "finetune.dev/job-uid=u1"], ""), OF_PODS);
    taken(as_user(TENANT, &["label", "pod", "other", "team=a"], ""));

    taken(as_user(TENANT, &["annotate", "pod", "made", "note=mine"], ""));
    refused(as_user(TENANT, &["label", "pod", "made", "finetune.dev/job-uid=u2", "--overwrite"], ""), OF_PODS);
    refused(as_user(TENANT, &["set", "image", "pod/made", "trainer=evil.example/x"], ""), OF_PODS);
    let mine = "{\"metadata\": {\"ownerReferences\": [{\"apiVersion\": \"batch/v1\", \"kind\": \"Job\", \"name\": \"x\", \"uid\": \"u2\"}]}}";
    let take = ["patch", "pod", "made", "--type=merge", "--patch", mine];
    refused(as_user(TENANT, &take, ""), OF_PODS);
    taken(as_user(COLLECTOR, &take, ""));
    // Whoever could remove the policy is not asked.
    Server::shared().kubectl(&["label", "pod", "made", "team=a", "--namespace", NAMESPACE], "");
}

#[test]
fn only_the_operator_writes_a_status_unless_the_job_is_managed_by_another() {
    let server = server();
    let make = |name: &str, managed_by: &str| {
        let spec = super::spec(managed_by);
        let job = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec});
        server.kubectl(&["create", "--namespace", NAMESPACE, "--filename=-"], &job.to_string());
    };
    let status = |user: &str, name: &str| {
        let patch = "{\"status\": {\"phase\": \"Succeeded\"}}";
        as_user(user, &["patch", "finetunejob", name, "--subresource=status", "--type=merge", "--patch", patch], "")
    };
    make("bot", "{}");
    make("elsewhere", "{managedBy: kueue.x-k8s.io/multikueue}");
    let sentence = "writes the status of a FineTuneJob";
    refused(status(TENANT, "bot"), sentence);
    refused(status(KUEUE, "bot"), sentence);
    taken(status(OPERATOR, "bot"));
    refused(status(TENANT, "elsewhere"), sentence);
    taken(status(KUEUE, "elsewhere"));
    taken(as_user(
        TENANT,
        &["patch", "finetunejob", "bot", "--type=merge", "--patch", "{\"spec\": {\"suspend\": true}}"],
        "",
    ));
}
