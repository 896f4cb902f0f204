//! What an administrator puts into profiles shows in the objects, and gets in the way of nothing.

use super::*;
use crate::validate::Additions;

/// Its component, and what the pod of each Job says under a JSON pointer.
fn by_component<'a>(objects: &'a [Value], pointer: &str) -> Vec<(&'a str, Value)> {
    let jobs = objects.iter().filter(|object| object["kind"] == "Job");
    let component =
        |job: &'a Value| job["metadata"]["labels"]["app.kubernetes.io/component"].as_str().expect("a label");
    jobs.map(|job| (component(job), job.pointer(pointer).cloned().unwrap_or(Value::Null))).collect()
}

/// Where all nodes are tainted, every pod of a job tolerates it; a profile may have other nodes for those without an accelerator.
#[test]
fn cpu_stages_go_where_training_goes_or_where_the_profile_sends_them() {
    let job = example(&json!({"scheduling": {"nodeSelector": {"zone": "b"}}}));
    let (labels, taints) = ("/spec/template/spec/nodeSelector", "/spec/template/spec/tolerations");
    let gpu = json!([{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]);
    let made = objects(&job);
    for (component, found) in by_component(&made, labels) {
        assert_eq!(found, json!({"zone": "b"}), "{component}");
    }
    for (component, found) in by_component(&made, taints) {
        assert_eq!(found, gpu, "{component}");
    }
    let own = profiles_with(&json!({"cpuPods": {"nodeSelector": {"pool": "cpu"}, "tolerations": []}}));
    let made = objects_by(&job, &planned_by(&job, &own));
    for (component, found) in by_component(&made, labels) {
        let expected = if component == "train" { json!({"zone": "b"}) } else { json!({"pool": "cpu"}) };
        assert_eq!(found, expected, "{component}");
    }
    for (component, found) in by_component(&made, taints) {
        assert_eq!(found, if component == "train" { gpu.clone() } else { Value::Null }, "{component}");
    }
}

/// The volume is made where the first pod goes.
#[test]
fn the_first_pod_is_sent_to_the_nodes_of_its_placement() {
    let job = example(&json!({}));
    let plan = planned(&job);
    let sent = |stage, among: Option<(&str, &[&str])>| {
        let own = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        let placement = Placement { among: among.map(|(label, values)| (label.to_owned(), own(values))) };
        json(&build_stage_job(&job, &plan, &attempt(&job, stage), &placement))["spec"]["template"]["spec"]["affinity"]
            .take()
    };
    let required = |key: &str, values: &[&str]| {
        let term = json!({"matchExpressions": [{"key": key, "operator": "In", "values": values}]});
        json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}})
    };
    let zones: (&str, &[&str]) = ("topology.kubernetes.io/zone", &["y", "z"]);
    assert_eq!(sent(PodStage::Prepare, Some(zones)), required(zones.0, zones.1));
    assert_eq!(sent(PodStage::Prepare, None), Value::Null);
    // The volume is there: its own topology leads.
    assert_eq!(sent(PodStage::Train, Some(zones)), Value::Null);
}

/// OpenShift refuses a pod that asks for a user outside of its namespace's range, and gives one from it to a pod that asks for none.
#[test]
fn where_the_cluster_assigns_users_no_pod_asks_for_one() {
    let job = example(&json!({}));
    let made = objects_by(&job, &planned_by(&job, &profiles_with(&json!({"clusterAssignsUser": true}))));
    for (component, found) in by_component(&made, "/spec/template/spec/securityContext") {
        let expected = json!({
            "runAsNonRoot": true, "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        });
        assert_eq!(found, expected, "{component}");
    }
    let container = "/spec/template/spec/containers/0/securityContext";
    for (component, found) in by_component(&made, container) {
        assert!(found["runAsUser"].is_null() && found["allowPrivilegeEscalation"] == false, "{component}: {found}");
    }
    for (component, found) in by_component(&objects(&job), "/spec/template/spec/securityContext") {
        let ids = ["runAsUser", "runAsGroup", "fsGroup"].map(|id| found[id].as_i64());
        assert_eq!(ids, [Some(65532); 3], "{component}");
    }
}

/// The profile of a cluster with accounting, a proxy and authorities of its own.
fn at_home() -> Profiles {
    profiles_with(&json!({
        "priorityClassName": "batch",
        "labels": {"team": "ml", "app.kubernetes.io/part-of": "training"},
        "annotations": {"sidecar.istio.io/inject": "false"},
        "inheritedLabels": ["cost-center", "team"],
        "environment": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "A", "value": "1"}],
        "caBundle": {"configMapName": "authorities", "key": "bundle.pem"},
        "cpuPods": {
            "priorityClassName": "cpu", "labels": {"tier": "cpu"}, "annotations": {"backup": "no"},
            "environment": [{"name": "A", "value": "2"}],
        },
    }))
}

#[test]
fn labels_annotations_and_variables_of_the_profile_reach_every_pod() {
    let mut job = example(&json!({}));
    let own = [("cost-center", "42"), ("team", "other"), ("secret", "x")];
    job.metadata.labels = Some(own.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    let made = objects_by(&job, &planned_by(&job, &at_home()));
    for object in
        made.iter().filter(|object| object["metadata"]["name"].as_str().is_some_and(|name| !name.ends_with("-control")))
    {
        let labels = &object["metadata"]["labels"];
        let found = ["cost-center", "team", "secret", "app.kubernetes.io/part-of"].map(|key| labels[key].as_str());
        assert_eq!(found, [Some("42"), Some("ml"), None, Some("training")], "{}", object["kind"]);
    }
    for (component, pod) in by_component(&made, "/spec/template") {
        let cpu = component != "train";
        let (metadata, spec) = (&pod["metadata"], &pod["spec"]);
        assert_eq!(metadata["labels"]["cost-center"], "42", "{component}");
        assert_eq!(metadata["labels"]["tier"], if cpu { json!("cpu") } else { Value::Null }, "{component}");
        assert_eq!(metadata["annotations"]["sidecar.istio.io/inject"], "false", "{component}");
        assert_eq!(metadata["annotations"]["backup"], if cpu { json!("no") } else { Value::Null }, "{component}");
        let variables = spec["containers"][0]["env"].as_array().expect("variables");
        let value = |name: &str| {
            let named: Vec<_> = variables.iter().filter(|variable| variable["name"] == name).collect();
            assert!(named.len() <= 1, "{component}: {named:?}");
            named.first().and_then(|variable| variable["value"].as_str()).map(str::to_owned)
        };
        assert_eq!(value("HTTPS_PROXY").as_deref(), Some("http://proxy:3128"), "{component}");
        assert_eq!(value("A").as_deref(), Some(if cpu { "2" } else { "1" }), "{component}");
        let class = if cpu { "cpu" } else { "batch" };
        assert_eq!(spec["priorityClassName"], class, "{component}");
        // The other stages have no network.
        let reaches_out = ["prepare", "publish"].contains(&component);
        let file = reaches_out.then_some("/etc/finetune-certificates/ca.crt");
        assert_eq!(value("SSL_CERT_FILE").as_deref(), file, "{component}");
        let volumes = spec["volumes"].as_array().expect("volumes");
        let mounted = volumes.iter().find(|volume| volume["name"] == "certificates").cloned().unwrap_or(Value::Null);
        let items = json!([{"key": "bundle.pem", "path": "ca.crt"}]);
        let source = json!({"configMap": {"name": "authorities", "items": items}});
        let expected = json!({"name": "certificates", "projected": {"sources": [source]}});
        assert_eq!(mounted, if reaches_out { expected } else { Value::Null }, "{component}");
    }
}

/// Whatever a plan says, by a profile that was read before it was checked so: the operator finds its objects by its labels, and the
/// trainer its files by its variables.
#[test]
fn what_is_the_operators_own_wins() {
    let job = example(&json!({}));
    let plain = planned(&job);
    let ours = objects_by(&job, &plain);
    let stolen = |keys: Vec<String>| keys.into_iter().map(|key| (key, "stolen".to_owned())).collect();
    let keys =
        |object: &Value| object.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect::<Vec<_>>();
    let train = ours.iter().find(|object| object["metadata"]["labels"]["app.kubernetes.io/component"] == "train");
    let template = &train.expect("a training Job")["spec"]["template"];
    let variables = template["spec"]["containers"][0]["env"].as_array().expect("variables").iter();
    let environment = variables.map(|variable| json!({"name": variable["name"], "value": "stolen"}));
    let additions = Additions {
        labels: stolen(keys(&template["metadata"]["labels"])),
        annotations: stolen(keys(&template["metadata"]["annotations"])),
        environment: serde_json::from_value(environment.collect()).expect("variables"),
    };
    let mut plan = plain;
    plan.pods.additions = additions.clone();
    plan.pods.cpu_additions = additions;
    for object in objects_by(&job, &plan).iter().filter(|object| object["kind"] == "Job") {
        for part in [&object["metadata"]["labels"], &object["spec"]["template"]] {
            assert!(!part.to_string().contains("stolen"), "{part:#}");
        }
    }
}

/// A job names none of these itself: what is not in its scheduling is the profile's.
#[test]
fn a_job_may_name_the_priority_class_of_its_profile_and_no_other_that_is_not_allowed() {
    let named = |class: &str| example(&json!({"scheduling": {"priorityClassName": class}}));
    let allowed = json!({"sourcePrefixes": ["*"], "queues": ["*"]});
    let profiles = profiles_with(&json!({"priorityClassName": "batch", "allowed": allowed}));
    assert!(validate(&named("batch"), &profiles).is_ok());
    let refused = validate(&named("urgent"), &profiles).expect_err("not allowed").message;
    assert!(refused.contains("spec.scheduling.priorityClassName: found urgent"), "{refused}");
}

/// A claim that a job only names holds other people's files: mounting it must not take them over.
#[test]
fn no_pod_takes_over_the_files_of_a_claim_that_is_not_the_jobs_own() {
    let group = "/spec/template/spec/securityContext/fsGroup";
    let with_group = |spec: &Value, profiles: &Profiles| -> Vec<String> {
        let job = example(spec);
        let made = objects_by(&job, &planned_by(&job, profiles));
        let found = by_component(&made, group).into_iter().filter(|(_, group)| !group.is_null());
        found.map(|(component, _)| component.to_owned()).collect()
    };
    let all = ["prepare", "train", "publish", "report"];
    let shared = json!({"checkpoint": {"storage": {"claim": "shared"}}});
    let copied = json!({"output": {"uri": "pvc://registry/bot"}});
    assert_eq!(with_group(&json!({}), &profiles()), all);
    assert_eq!(with_group(&shared, &profiles()), [] as [&str; 0]);
    assert_eq!(with_group(&copied, &profiles()), ["prepare", "train", "report"]);
    let disks = profiles_with(&json!({"storage": {"fsGroupClaims": ["shared", "reg*"]}}));
    assert_eq!(with_group(&shared, &disks), all);
    assert_eq!(with_group(&copied, &disks), all);
}

/// Who shares a claim with other runs would believe what they put into its downloads.
#[test]
fn downloads_lie_in_the_folder_of_the_run() {
    let homes = |spec: &Value| {
        let made = objects(&example(spec));
        let homes = by_component(&made, "/spec/template/spec/containers/0/env").into_iter().map(|(_, variables)| {
            let home = variables.as_array().expect("variables").iter().find(|one| one["name"] == "HF_HOME").cloned();
            home.expect("it is set")["value"].as_str().expect("text").to_owned()
        });
        homes.collect::<std::collections::BTreeSet<_>>()
    };
    let storage = |storage: Value| json!({"checkpoint": {"storage": storage}});
    assert_eq!(homes(&json!({})), ["/data/.huggingface".to_owned()].into());
    let expected = "/data/kubectl-writer-0b8e1c9e/.huggingface".to_owned();
    assert_eq!(homes(&storage(json!({"claim": "shared"}))), [expected].into());
    let expected = "/data/team/bot/.huggingface".to_owned();
    assert_eq!(homes(&storage(json!({"claim": "shared", "path": "team/bot"}))), [expected].into());
}

#[test]
fn kueue_is_told_priority_and_topology_of_queued_jobs() {
    let words = |spec: &Value, profile: &Value| {
        let job = example(spec);
        let made = objects_by(&job, &planned_by(&job, &profiles_with(profile)));
        let jobs = by_component(&made, "").into_iter().map(|(component, job)| {
            let priority = job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"].as_str().map(str::to_owned);
            let annotations = &job["spec"]["template"]["metadata"]["annotations"];
            let topology = ["required", "preferred"]
                .map(|how| annotations[format!("kueue.x-k8s.io/podset-{how}-topology")].as_str().map(str::to_owned));
            (component.to_owned(), priority, topology)
        });
        jobs.filter(|(_, priority, topology)| priority.is_some() || *topology != [None, None]).collect::<Vec<_>>()
    };
    let text = |text: &str| Some(text.to_owned());
    let profile = json!({
        "workloadPriorityClassName": "low", "topology": {"required": "rack"},
        "allowed": {"workloadPriorityClasses": ["high"]},
    });
    assert_eq!(words(&json!({}), &profile), [], "without a queue there is nobody to tell");
    let queued = json!({"scheduling": {"queueName": "q"}});
    assert_eq!(words(&queued, &profile), [("train".to_owned(), text("low"), [text("rack"), None])]);
    let chosen = json!({"scheduling": {"queueName": "q", "workloadPriorityClassName": "high"}});
    let mut preferred = profile.clone();
    preferred["topology"] = json!({"preferred": "zone"});
    preferred["cpuQueueName"] = json!("cpus");
    let train = ("train".to_owned(), text("high"), [None, text("zone")]);
    let cpu = |stage: &str| (stage.to_owned(), text("high"), [None, None]);
    assert_eq!(words(&chosen, &preferred), [cpu("prepare"), train, cpu("publish"), cpu("report")]);
    let other = example(&json!({"scheduling": {"queueName": "q", "workloadPriorityClassName": "urgent"}}));
    let refused = validate(&other, &profiles_with(&profile)).expect_err("not allowed").message;
    assert!(refused.contains("spec.scheduling.workloadPriorityClassName: found urgent"), "{refused}");
}

/// What version 0.1 does not know comes back as it was planned.
#[test]
fn a_plan_with_every_field_is_read_as_it_was_written() {
    let profile = json!({
        "labels": {"a": "b"}, "annotations": {"c": "d"}, "environment": [{"name": "E", "value": "f"}],
        "caBundle": {"configMapName": "c", "key": "k"}, "clusterAssignsUser": true, "priorityClassName": "p",
        "cpuPods": {"nodeSelector": {}, "tolerations": [], "priorityClassName": "q", "labels": {"g": "h"}},
        "otherDevices": ["rdma/*"], "storage": {"fsGroupClaims": ["*"]}, "workloadPriorityClassName": "w",
        "topology": {"preferred": "zone"},
    });
    let plan = planned_by(&example(&json!({"scheduling": {"queueName": "q"}})), &profiles_with(&profile));
    let (run, text) = plan.files();
    assert_eq!(Plan::read(&run, &text).expect("ours"), plan);
}
