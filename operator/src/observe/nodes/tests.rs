//! Nodes as an API server lists them, and where the first pod of a job goes among them.

use serde_json::{Value, json};

use super::*;

/// A node of a zone, with accelerators and a taint.
fn node(name: &str, zone: &str, gpus: i64, taints: &Value) -> Value {
    json!({
        "metadata": {"name": name, "labels": {HOSTNAME_LABEL: name, ZONE_LABEL: zone}},
        "spec": {"taints": taints},
        "status": {"allocatable": {"cpu": "7910m", "memory": "64Gi", "nvidia.com/gpu": gpus.to_string()}},
    })
}

fn gpu_taint() -> Value {
    json!([{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}])
}

fn all_seen(nodes: &[Value]) -> Vec<NodeSeen> {
    let nodes = nodes.iter().map(|node| serde_json::from_value::<Node>(node.clone()).expect("a node"));
    nodes.filter_map(seen).collect()
}

/// The plan of pods, by the chart's default profile with some more.
fn pods(more: &Value) -> PodPlan {
    let mut plan = json!({
        "image": "i",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "cpuResources": {"requests": {"cpu": "1", "memory": "2Gi"}},
        "terminationGracePeriodSeconds": 120,
    });
    plan.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
    serde_json::from_value(plan).expect("a plan of pods")
}

fn placed(nodes: &[Value], more: &Value) -> (Vec<String>, Vec<String>) {
    let Placement { nodes, zones } = place(&all_seen(nodes), &pods(more));
    (nodes, zones)
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|&name| name.to_owned()).collect()
}

/// The chart's default profile names no node: what leads to the accelerators is that only their nodes have them.
#[test]
fn the_first_pod_goes_where_the_training_pod_can_follow() {
    let cordoned = json!({
        "metadata": {"name": "cordoned", "labels": {HOSTNAME_LABEL: "cordoned"}},
        "spec": {"unschedulable": true},
        "status": {"allocatable": {"nvidia.com/gpu": "8", "cpu": "8", "memory": "64Gi"}},
    });
    let nodes = [
        node("cpu-a", "a", 0, &json!([])),
        node("gpu-b", "b", 1, &gpu_taint()),
        node("other-b", "b", 1, &json!([{"key": "team", "value": "other", "effect": "NoSchedule"}])),
        node("gpu-c", "c", 4, &json!([{"key": "full", "effect": "PreferNoSchedule"}])),
        node("lost-c", "c", 4, &json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}])),
        cordoned,
    ];
    let free = json!({});
    assert_eq!(placed(&nodes, &free), (names(&["gpu-b", "gpu-c"]), names(&[])));
    let two = json!({"resources": {"limits": {"nvidia.com/gpu": "2"}}});
    assert_eq!(placed(&nodes, &two), (names(&["gpu-c"]), names(&[])));
    let in_b = json!({"nodeSelector": {ZONE_LABEL: "b"}});
    assert_eq!(placed(&nodes, &in_b), (names(&["gpu-b"]), names(&[])));
    let large = json!({"resources": {"limits": {"nvidia.com/gpu": "1", "memory": "128Gi"}}});
    assert_eq!(placed(&nodes, &large), (names(&[]), names(&[])), "nobody has it: the profile alone places");
    assert_eq!(placed(&nodes[..1], &free), (names(&[]), names(&[])), "no accelerator is there yet");
}

/// A profile may have a pool for CPU stages: the volume must still be made in a zone of the accelerators.
#[test]
fn a_first_pod_with_nodes_of_its_own_goes_to_the_zones_of_the_training_pod() {
    let mut pool = node("cpu-b", "b", 0, &json!([]));
    pool["metadata"]["labels"]["pool"] = json!("cpu");
    let nodes = [pool, node("gpu-b", "b", 1, &gpu_taint()), node("gpu-c", "c", 1, &gpu_taint())];
    let own = json!({"cpuNodeSelector": {"pool": "cpu"}});
    assert_eq!(placed(&nodes, &own), (names(&[]), names(&["b", "c"])));
    let no_taints = json!({"cpuTolerations": []});
    assert_eq!(placed(&nodes, &no_taints), (names(&[]), names(&["b", "c"])), "it could not stand the taint there");
}

#[test]
fn many_nodes_are_not_named_one_by_one() {
    let many = |count: usize| -> Vec<Value> {
        (0..count).map(|number| node(&format!("gpu-{number:03}"), "ab", 1, &gpu_taint())).collect()
    };
    assert_eq!(placed(&many(MAX_NODES), &json!({})).0.len(), MAX_NODES);
    assert_eq!(placed(&many(MAX_NODES + 1), &json!({})), (names(&[]), names(&["ab"])));
}

#[test]
fn a_taint_is_tolerated_as_the_scheduler_has_it() {
    let taint: Taint =
        serde_json::from_value(json!({"key": "k", "value": "v", "effect": "NoSchedule"})).expect("a taint");
    for (toleration, expected) in [
        (json!({"key": "k", "operator": "Exists"}), true),
        (json!({"operator": "Exists"}), true),
        (json!({"key": "k", "value": "v"}), true),
        (json!({"key": "k", "operator": "Equal", "value": "w"}), false),
        (json!({"key": "k"}), false),
        (json!({"key": "l", "operator": "Exists"}), false),
        (json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}), false),
        (json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"}), true),
    ] {
        let read: Toleration = serde_json::from_value(toleration.clone()).expect("a toleration");
        assert_eq!(tolerates(&read, &taint), expected, "{toleration}");
    }
}

/// A client that answers from a table of paths, and the requests that it was asked.
fn client(answers: Vec<(&'static str, u16, Value)>) -> (Client, Arc<std::sync::Mutex<Vec<String>>>) {
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let noting = Arc::clone(&asked);
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let path = request.uri().path_and_query().expect("a path").to_string();
        let found = answers.iter().find(|(part, ..)| path.contains(part));
        let (_, code, body) = found.unwrap_or_else(|| panic!("unexpected: {path}"));
        noting.lock().expect("no test panics with it").push(path.clone());
        let answer =
            http::Response::builder().status(*code).body(kube::client::Body::from(body.to_string().into_bytes()));
        async move { Ok::<_, std::convert::Infallible>(answer.expect("a response")) }
    });
    (Client::new(service, "default"), asked)
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason, "metadata": {}})
}

fn claim(volume: Option<&str>) -> Value {
    json!({"kind": "PersistentVolumeClaim", "apiVersion": "v1", "metadata": {"name": "bot"}, "spec": {"volumeName": volume}})
}

fn job_and_plan() -> (FineTuneJob, Plan) {
    let mut plan: Plan = serde_saphyr::from_str(include_str!("../../validate/plan-0.1.0.yaml")).expect("a plan");
    let job = json!({
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot", "namespace": "team"},
        "spec": {"model": {"uri": "hf://a/b"}, "dataset": {"train": {"uri": "pvc://rows/x"}}, "method": {"type": "LoRA"}},
    });
    plan.pods = pods(&json!({}));
    (serde_json::from_value(job).expect("a job"), plan)
}

#[tokio::test]
async fn nodes_are_listed_page_by_page_and_once_for_jobs_that_come_together() {
    let page = |nodes: &[Value], more: &str| json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {"continue": more}, "items": nodes});
    let (client, asked) = client(vec![
        ("persistentvolumeclaims/", 404, failure(404, "NotFound")),
        ("continue=next", 200, page(&[node("gpu-b", "b", 1, &gpu_taint())], "")),
        ("/api/v1/nodes", 200, page(&[node("cpu-a", "a", 0, &json!([]))], "next")),
    ]);
    let (job, plan) = job_and_plan();
    let nodes = Nodes::default();
    for _ in 0..3 {
        let placed = placement(&client, &nodes, &job, &plan).await.expect("answered");
        assert_eq!(placed.nodes, ["gpu-b"]);
    }
    let lists = asked.lock().expect("unpoisoned").iter().filter(|path| path.contains("/nodes")).count();
    assert_eq!(lists, 2, "two pages, once");
}

#[tokio::test]
async fn a_volume_that_is_there_needs_no_place_and_one_that_is_not_bound_does() {
    let list =
        json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": [node("gpu-b", "b", 1, &gpu_taint())]});
    let (job, plan) = job_and_plan();
    for (claim, expected) in [(claim(Some("pv-1")), names(&[])), (claim(None), names(&["gpu-b"]))] {
        let (client, asked) =
            client(vec![("persistentvolumeclaims/", 200, claim), ("/api/v1/nodes", 200, list.clone())]);
        assert_eq!(placement(&client, &Nodes::default(), &job, &plan).await.expect("answered").nodes, expected);
        let listed = asked.lock().expect("unpoisoned").iter().any(|path| path.contains("/nodes"));
        assert_eq!(listed, !expected.is_empty());
    }
}

#[tokio::test]
async fn without_the_right_to_list_nodes_the_profile_places_and_without_an_answer_nothing_is_decided() {
    let (job, plan) = job_and_plan();
    let answered = async |code: u16, reason: &str| {
        let (client, _) = client(vec![
            ("persistentvolumeclaims/", 404, failure(404, "NotFound")),
            ("/api/v1/nodes", code, failure(code, reason)),
        ]);
        placement(&client, &Nodes::default(), &job, &plan).await
    };
    assert_eq!(answered(403, "Forbidden").await.expect("it goes on"), Placement::default());
    // A volume that was made in the wrong place stays there: an API server that is busy is asked again.
    assert!(answered(500, "InternalError").await.is_err());
}
