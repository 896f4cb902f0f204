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

fn placed(nodes: &[Value], more: &Value) -> Placement {
    place(&all_seen(nodes), &pods(more))
}

fn on(names: &[&str]) -> Placement {
    labelled(HOSTNAME_LABEL, names)
}

fn labelled(label: &str, values: &[&str]) -> Placement {
    Placement { among: Some((label.to_owned(), values.iter().map(|&value| value.to_owned()).collect())) }
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
    assert_eq!(placed(&nodes, &free), on(&["gpu-b", "gpu-c"]));
    let two = json!({"resources": {"limits": {"nvidia.com/gpu": "2"}}});
    assert_eq!(placed(&nodes, &two), on(&["gpu-c"]));
    let in_b = json!({"nodeSelector": {ZONE_LABEL: "b"}});
    assert_eq!(placed(&nodes, &in_b), on(&["gpu-b"]));
    let large = json!({"resources": {"limits": {"nvidia.com/gpu": "1", "memory": "128Gi"}}});
    assert_eq!(placed(&nodes, &large), Placement::default(), "nobody has it: the profile alone places");
    assert_eq!(placed(&nodes[..1], &free), Placement::default(), "no accelerator is there yet");
}

/// A spot node that goes is followed by one of its kind, which has another name.
#[test]
fn nodes_are_told_by_their_kind_where_that_tells_them_apart() {
    let of_kind = |name: &str, gpus: i64, label: &str, kind: &str| {
        let mut node = node(name, "a", gpus, &json!([]));
        node["metadata"]["labels"][label] = json!(kind);
        node
    };
    let instance = "node.kubernetes.io/instance-type";
    let cpu = of_kind("cpu", 0, instance, "m7i");
    let nodes = [cpu.clone(), of_kind("one", 1, instance, "g6"), of_kind("two", 8, instance, "p5")];
    assert_eq!(placed(&nodes, &json!({})), labelled(instance, &["g6", "p5"]));
    // Machines of one type, some of which have lost their device plugin.
    let nodes = [of_kind("broken", 0, instance, "g6"), of_kind("whole", 1, instance, "g6")];
    assert_eq!(placed(&nodes, &json!({})), on(&["whole"]));
    // Bare metal has no type.
    let pool = "cloud.google.com/gke-nodepool";
    let nodes = [node("cpu", "a", 0, &json!([])), of_kind("one", 1, pool, "gpus")];
    assert_eq!(placed(&nodes, &json!({})), labelled(pool, &["gpus"]));
}

/// A class that gives a volume at once needs no pod in the right place: the pods go where the volume is.
#[tokio::test]
async fn a_volume_that_comes_before_any_pod_needs_no_place() {
    let class = |name: &str, mode: &str, default: &str| {
        json!({
            "metadata": {"name": name, "annotations": {DEFAULT_CLASS_ANNOTATION: default}}, "provisioner": "x",
            "volumeBindingMode": mode,
        })
    };
    let list =
        json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": [node("gpu-b", "b", 1, &gpu_taint())]});
    let (job, mut plan) = job_and_plan();
    for (own, default, expected) in [
        (None, "Immediate", Placement::default()),
        (None, "WaitForFirstConsumer", on(&["gpu-b"])),
        (Some("shared"), "WaitForFirstConsumer", Placement::default()),
        (Some("unknown"), "Immediate", on(&["gpu-b"])),
    ] {
        plan.claim = VolumeClaim::New {
            name: "bot".into(),
            size: "1Gi".into(),
            storage_class_name: own.map(str::to_owned),
            deleted_with_job: false,
        };
        let items = [class("standard", default, "true"), class("shared", "Immediate", "false")];
        let classes =
            json!({"kind": "StorageClassList", "apiVersion": "storage.k8s.io/v1", "metadata": {}, "items": items});
        let (client, _) = client(vec![
            ("persistentvolumeclaims/", 404, failure(404, "NotFound")),
            ("storageclasses", 200, classes),
            ("/api/v1/nodes", 200, list.clone()),
        ]);
        let found = placement(&client, &Nodes::default(), &job, &plan).await.expect("answered");
        assert_eq!(found, expected, "{own:?} {default}");
    }
}

/// A profile may have a pool for CPU stages: the volume must still be made in a zone of the accelerators.
#[test]
fn a_first_pod_with_nodes_of_its_own_goes_to_the_zones_of_the_training_pod() {
    let mut pool = node("cpu-b", "b", 0, &json!([]));
    pool["metadata"]["labels"]["pool"] = json!("cpu");
    let nodes = [pool, node("gpu-b", "b", 1, &gpu_taint()), node("gpu-c", "c", 1, &gpu_taint())];
    let own = json!({"cpuNodeSelector": {"pool": "cpu"}});
    assert_eq!(placed(&nodes, &own), labelled(ZONE_LABEL, &["b", "c"]));
    let no_taints = json!({"cpuTolerations": []});
    assert_eq!(placed(&nodes, &no_taints), labelled(ZONE_LABEL, &["b", "c"]), "it could not stand the taint there");
}

#[test]
fn many_nodes_are_not_named_one_by_one() {
    let many = |count: usize| -> Vec<Value> {
        (0..count).map(|number| node(&format!("gpu-{number:03}"), "ab", 1, &gpu_taint())).collect()
    };
    let named = placed(&many(MAX_NODES), &json!({})).among.expect("a place");
    assert_eq!((named.0.as_str(), named.1.len()), (HOSTNAME_LABEL, MAX_NODES));
    assert_eq!(placed(&many(MAX_NODES + 1), &json!({})), labelled(ZONE_LABEL, &["ab"]));
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

/// Classes may not be read.
fn no_classes() -> (&'static str, u16, Value) {
    ("storageclasses", 403, failure(403, "Forbidden"))
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
        no_classes(),
        ("continue=next", 200, page(&[node("gpu-b", "b", 1, &gpu_taint())], "")),
        ("/api/v1/nodes", 200, page(&[node("cpu-a", "a", 0, &json!([]))], "next")),
    ]);
    let (job, plan) = job_and_plan();
    let nodes = Nodes::default();
    for _ in 0..3 {
        let placed = placement(&client, &nodes, &job, &plan).await.expect("answered");
        assert_eq!(placed, on(&["gpu-b"]));
    }
    let lists = asked.lock().expect("unpoisoned").iter().filter(|path| path.contains("/nodes")).count();
    assert_eq!(lists, 2, "two pages, once");
}

#[tokio::test]
async fn a_volume_that_is_there_needs_no_place_and_one_that_is_not_bound_does() {
    let list =
        json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": [node("gpu-b", "b", 1, &gpu_taint())]});
    let (job, plan) = job_and_plan();
    for (claim, expected) in [(claim(Some("pv-1")), Placement::default()), (claim(None), on(&["gpu-b"]))] {
        let (client, asked) =
            client(vec![("persistentvolumeclaims/", 200, claim), no_classes(), ("/api/v1/nodes", 200, list.clone())]);
        assert_eq!(placement(&client, &Nodes::default(), &job, &plan).await.expect("answered"), expected);
        let listed = asked.lock().expect("unpoisoned").iter().any(|path| path.contains("/nodes"));
        assert_eq!(listed, expected != Placement::default());
    }
}

#[tokio::test]
async fn without_the_right_to_list_nodes_the_profile_places_and_without_an_answer_nothing_is_decided() {
    let (job, plan) = job_and_plan();
    let answered = async |code: u16, reason: &str| {
        let (client, _) = client(vec![
            ("persistentvolumeclaims/", 404, failure(404, "NotFound")),
            no_classes(),
            ("/api/v1/nodes", code, failure(code, reason)),
        ]);
        placement(&client, &Nodes::default(), &job, &plan).await
    };
    assert_eq!(answered(403, "Forbidden").await.expect("it goes on"), Placement::default());
    // A volume that was made in the wrong place stays there: an API server that is busy is asked again.
    assert!(answered(500, "InternalError").await.is_err());
}
