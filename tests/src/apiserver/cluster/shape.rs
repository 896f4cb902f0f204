//! What pods and their states look like.

use serde_json::{Value, json};

use super::super::defaults::admit_pod;

/// The only node.
pub const NODE: &str = "node-1";
/// The container that the operator reads.
pub(super) const TRAINER: &str = "trainer";

/// The pod of a Job, as the Job controller makes it and admission lets it in.
pub(super) fn pod(job: &Value, suffix: &str, sidecars: &[String]) -> Value {
    let (metadata, template) = (&job["metadata"], &job["spec"]["template"]);
    let (name, uid) = (metadata["name"].as_str().unwrap_or_default(), metadata["uid"].as_str().unwrap_or_default());
    let mut labels = template["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    for prefix in ["", "batch.kubernetes.io/"] {
        labels.insert(format!("{prefix}job-name"), json!(name));
        labels.insert(format!("{prefix}controller-uid"), json!(uid));
    }
    let mut spec = template["spec"].clone();
    admit_pod(&mut spec);
    let containers = spec["containers"].as_array_mut().expect("a pod has containers");
    for sidecar in sidecars {
        containers.push(json!({"name": sidecar, "image": "registry.example/mesh:1"}));
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{name}-{suffix}"), "namespace": metadata["namespace"], "labels": labels,
            "annotations": template["metadata"]["annotations"],
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": true,
                                 "blockOwnerDeletion": true}],
        },
        "spec": spec,
        "status": {"phase": "Pending", "qosClass": "Burstable"},
    })
}

/// Sets a condition of a pod or a node.
pub(super) fn set_condition(status: &mut Value, name: &str, value: &str, reason: &str, message: &str, now: &str) {
    let condition =
        json!({"type": name, "status": value, "reason": reason, "message": message, "lastTransitionTime": now});
    let mut conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    conditions.retain(|condition| condition["type"] != name);
    conditions.push(condition);
    status["conditions"] = json!(conditions);
}

/// Sets the state of a container in `list` of a pod's status.
pub(super) fn set_container(status: &mut Value, list: &str, name: &str, state: &Value) {
    let started = state["running"].is_object();
    let container =
        json!({"name": name, "image": "", "imageID": "", "ready": started, "restartCount": 0, "state": state});
    let mut containers = status[list].as_array().cloned().unwrap_or_default();
    containers.retain(|container| container["name"] != name);
    containers.push(container);
    status[list] = json!(containers);
}

/// A container that runs.
pub(super) fn running(now: &str) -> Value {
    json!({"running": {"startedAt": now}})
}

/// A container that ended, having run since `started`.
pub(super) fn terminated(code: i32, reason: Option<&str>, message: &str, started: &Value, now: &str) -> Value {
    let reason = reason.unwrap_or(if code == 0 { "Completed" } else { "Error" });
    json!({"terminated": {"exitCode": code, "reason": reason, "message": message, "startedAt": started, "finishedAt": now}})
}

/// Since when a container of a pod's status runs.
pub(super) fn started_at(status: &Value, name: &str) -> Value {
    let containers = status["containerStatuses"].as_array();
    let found = containers.into_iter().flatten().find(|container| container["name"] == name);
    found.map_or(Value::Null, |container| container["state"]["running"]["startedAt"].clone())
}
