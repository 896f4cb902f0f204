//! What the API server and admission add to objects that they are sent: an operator that compares what it sent with what it reads
//! has to know of it.

use serde_json::{Value, json};

use super::kind::Kind;

/// Fills in what was left out.
pub fn fill(kind: Kind, object: &mut Value) {
    match kind {
        Kind::Job => job(object),
        Kind::Pod => pod(&mut object["spec"]),
        Kind::PersistentVolumeClaim => default(&mut object["spec"], "volumeMode", json!("Filesystem")),
        _ => {}
    }
}

fn job(job: &mut Value) {
    let spec = &mut job["spec"];
    for (name, value) in [
        ("parallelism", json!(1)),
        ("completions", json!(1)),
        ("completionMode", json!("NonIndexed")),
        ("backoffLimit", json!(6)),
        ("suspend", json!(false)),
        ("manualSelector", json!(false)),
    ] {
        default(spec, name, value);
    }
    for rule in spec["podFailurePolicy"]["rules"].as_array_mut().into_iter().flatten() {
        for pattern in rule["onPodConditions"].as_array_mut().into_iter().flatten() {
            default(pattern, "status", json!("True"));
        }
    }
    pod(&mut spec["template"]["spec"]);
}

fn pod(spec: &mut Value) {
    for (name, value) in [
        ("dnsPolicy", json!("ClusterFirst")),
        ("schedulerName", json!("default-scheduler")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("restartPolicy", json!("Always")),
        ("securityContext", json!({})),
    ] {
        default(spec, name, value);
    }
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            default(container, "terminationMessagePath", json!("/dev/termination-log"));
            default(container, "terminationMessagePolicy", json!("File"));
            default(container, "imagePullPolicy", json!("IfNotPresent"));
            for port in container["ports"].as_array_mut().into_iter().flatten() {
                default(port, "protocol", json!("TCP"));
            }
            for variable in container["env"].as_array_mut().into_iter().flatten() {
                if variable["valueFrom"]["fieldRef"].is_object() {
                    default(&mut variable["valueFrom"]["fieldRef"], "apiVersion", json!("v1"));
                }
            }
        }
    }
    for volume in spec["volumes"].as_array_mut().into_iter().flatten() {
        if volume["projected"].is_object() {
            default(&mut volume["projected"], "defaultMode", json!(420));
        }
    }
}

/// What admission adds to a pod beside: tolerations of a node that is lost for a while, and a priority.
pub fn admit_pod(spec: &mut Value) {
    default(spec, "priority", json!(0));
    default(spec, "preemptionPolicy", json!("PreemptLowerPriority"));
    default(spec, "serviceAccountName", json!("default"));
    let tolerations = spec["tolerations"].as_array().cloned().unwrap_or_default();
    let added = ["not-ready", "unreachable"].map(|taint| {
        json!({"key": format!("node.kubernetes.io/{taint}"), "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
    });
    spec["tolerations"] = tolerations.into_iter().chain(added).collect();
}

fn default(object: &mut Value, name: &str, value: Value) {
    if object.get(name).is_none_or(Value::is_null) {
        object[name] = value;
    }
}
