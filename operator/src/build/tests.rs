//! What is made of a job: the whole objects of the example, and that a job can choose no more of a pod than it may.

use crds::finetunejob::JobReference;
use crds::profile::{self, Profiles};
use serde_json::{Value, json};

use super::*;
use crate::validate::{Plan, validate};

const EXAMPLE: &str = include_str!("../../../crds/examples/cluster.yaml");

fn profiles() -> Profiles {
    profile::parse(
        "default:
  image: registry.example/finetune-trainer@sha256:1
  resources: {limits: {nvidia.com/gpu: '1', memory: 64Gi}}
  cpuResources: {requests: {cpu: '1', memory: 2Gi}}
  runtimeClassName: nvidia
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  allowed: {nodeSelectorKeys: ['*'], tolerationKeys: ['*'], priorityClasses: ['*']}
",
    )
    .expect("valid")
}

fn example(spec: &Value) -> FineTuneJob {
    let checked = crds::check::check(EXAMPLE, crds::check::Scope::Cluster).unwrap_or_else(|found| panic!("{found:?}"));
    let mut job = serde_json::to_value(&checked.job).expect("JSON");
    job["metadata"]["namespace"] = json!("team");
    job["metadata"]["uid"] = json!("0b8e1c9e-0d5c-4f7e-9a53-3a2b7b1f0a11");
    job["spec"].as_object_mut().expect("a map").extend(spec.as_object().expect("a map").clone());
    serde_json::from_value(job).expect("a job")
}

fn planned(job: &FineTuneJob) -> Plan {
    validate(job, &profiles()).unwrap_or_else(|invalid| panic!("{invalid:?}"))
}

fn attempt(job: &FineTuneJob, stage: PodStage) -> JobReference {
    JobReference {
        name: stage_job_name(job, stage, 1),
        stage,
        attempt: 1,
        uid: None,
        start_time: None,
        completion_time: None,
        outcome: None,
        reason: None,
    }
}

fn objects(job: &FineTuneJob) -> Vec<Value> {
    let plan = planned(job);
    let stages = [PodStage::Prepare, PodStage::Train, PodStage::Publish].map(|stage| attempt(job, stage));
    let mut all = vec![json(&build_config_map(job, &plan)), json(&build_control(job))];
    all.extend(build_claim(job, &plan.claim).map(|claim| json(&claim)));
    all.extend(stages.iter().map(|stage| json(&build_stage_job(job, &plan, stage))));
    all.push(json(&build_report_job(job, &plan, &stages[1])));
    all
}

#[test]
fn an_eviction_is_no_reason_to_fail_a_queued_job() {
    let rules = |spec: &Value| {
        let all = objects(&example(spec));
        let train = all.iter().find(|object| object["metadata"]["labels"]["app.kubernetes.io/component"] == "train");
        train.expect("a training Job")["spec"]["podFailurePolicy"]["rules"].as_array().expect("rules").clone()
    };
    let by_exit_code = |rules: &[Value]| rules.iter().filter(|rule| !rule["onExitCodes"].is_null()).count();
    assert_eq!(by_exit_code(&rules(&json!({}))), 1);
    let queued = rules(&json!({"scheduling": {"queueName": "q"}}));
    assert_eq!((queued.len(), by_exit_code(&queued)), (1, 0));
}

fn json<T: serde::Serialize>(object: &T) -> Value {
    serde_json::to_value(object).expect("objects are JSON")
}

/// The committed objects are the ones that are made. `UPDATE=1` writes them.
#[test]
fn objects_of_the_example_are_current() {
    let path = "src/build/example.yaml";
    let all = objects(&example(&json!({})));
    let text: Vec<String> = all.iter().map(|object| serde_saphyr::to_string(object).expect("YAML")).collect();
    let text = text.join("---\n");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &text).expect("writable");
    }
    assert!(
        std::fs::read_to_string(path).unwrap_or_default() == text,
        "operator/src/build/example.yaml is not what is made; run `UPDATE=1 cargo test --release -p finetune-operator objects_of_the_example_are_current`"
    );
}

#[test]
fn every_pod_is_restricted_and_carries_no_token() {
    for object in objects(&example(&json!({}))) {
        let pod = &object["spec"]["template"]["spec"];
        if pod.is_null() {
            continue;
        }
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for name in ["hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "initContainers"] {
            assert!(pod[name].is_null(), "{name}");
        }
        let container = &pod["containers"][0];
        let expected = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true});
        assert_eq!((&container["securityContext"], &container["command"]), (&expected, &Value::Null));
        for volume in pod["volumes"].as_array().expect("volumes") {
            let kinds: Vec<&String> = volume.as_object().expect("a map").keys().filter(|key| *key != "name").collect();
            assert!(["projected", "persistentVolumeClaim", "emptyDir"].contains(&kinds[0].as_str()), "{volume}");
        }
    }
}

/// Whatever a job says, its pods differ in these places only: the confused deputy has nothing to be confused about.
#[test]
fn a_job_chooses_nothing_else_of_a_pod() {
    let plain: Vec<Value> = objects(&example(&json!({})));
    let loud = example(&json!({
        "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "1Gi", "cpu": "3"}, "requests": {"cpu": "1"}},
        "scheduling": {"queueName": "q", "priorityClassName": "p", "nodeSelector": {"a": "b"}, "tolerations": [{"key": "k"}]},
        "hyperparameters": {"seed": 7}, "failurePolicy": {"maxRetries": 9}, "suspend": true, "activeDeadlineSeconds": 5,
        "method": {"type": "Full"}, "output": {"publishWhen": "Always"},
    }));
    let allowed = |train: bool, path: &str| {
        let pod = "/spec/template/spec";
        [
            format!("{pod}/priorityClassName"),
            "/spec/suspend".into(),
            "/spec/podFailurePolicy/rules".into(),
            "/metadata/labels/kueue.x-k8s.io~1queue-name".into(),
        ]
        .contains(&path.to_owned())
            || train
                && ["containers/0/resources", "nodeSelector", "tolerations"]
                    .iter()
                    .any(|field| path.starts_with(&format!("{pod}/{field}")))
    };
    for (before, after) in plain.iter().zip(&objects(&loud)) {
        if before["kind"] == "ConfigMap" {
            continue;
        }
        let train = before["metadata"]["labels"]["app.kubernetes.io/component"] == "train";
        let mut changed = Vec::new();
        differences(before, after, String::new(), &mut changed);
        changed.retain(|path| !allowed(train, path));
        assert!(changed.is_empty(), "{}: {changed:?}", before["metadata"]["name"]);
    }
}

fn differences(a: &Value, b: &Value, path: String, found: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let keys: std::collections::BTreeSet<&String> = x.keys().chain(y.keys()).collect();
            for key in keys {
                let below = format!("{path}/{}", key.replace('/', "~1"));
                differences(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), below, found);
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            for (index, (a, b)) in x.iter().zip(y).enumerate() {
                differences(a, b, format!("{path}/{index}"), found);
            }
        }
        _ if a == b => {}
        _ => found.push(path),
    }
}

#[test]
fn names_fit_whatever_the_job_is_called() {
    let mut job = example(&json!({}));
    job.metadata.name = Some("n".repeat(52));
    for (stage, number) in [(PodStage::Prepare, 1), (PodStage::Publish, 100), (PodStage::Train, 10_101)] {
        let name = stage_job_name(&job, stage, number);
        let report =
            report_job_name(&job, &JobReference { name: name.clone(), attempt: number, ..attempt(&job, stage) });
        for name in [&name, &report] {
            assert!(name.len() <= 63, "{name}");
            assert!(name.ends_with(|c: char| c.is_ascii_alphanumeric()), "{name}");
        }
        assert_ne!(name, stage_job_name(&job, stage, number + 1));
    }
}

/// Names of what a pod mounts, by kind.
fn mounted(objects: &[Value]) -> std::collections::BTreeSet<(String, String)> {
    let mut names = std::collections::BTreeSet::new();
    let mut note = |kind: &str, name: &Value| {
        if let Some(name) = name.as_str() {
            names.insert((kind.to_owned(), name.to_owned()));
        }
    };
    for volume in objects.iter().filter_map(|object| object["spec"]["template"]["spec"]["volumes"].as_array()).flatten()
    {
        note("claim", &volume["persistentVolumeClaim"]["claimName"]);
        note("map", &volume["configMap"]["name"]);
        note("secret", &volume["secret"]["secretName"]);
        for source in volume["projected"]["sources"].as_array().into_iter().flatten() {
            note("map", &source["configMap"]["name"]);
            note("secret", &source["secret"]["name"]);
        }
    }
    names
}

/// A kubelet goes on serving what it mounted under a name: a job that is made anew must not get the old one's.
#[test]
fn a_job_made_anew_under_its_name_mounts_nothing_of_the_old_one() {
    for name in ["support-bot", &"n".repeat(52)] {
        let mut old = example(&json!({}));
        old.metadata.name = Some(name.to_owned());
        let mut new = old.clone();
        new.metadata.uid = Some("7c1f0a3e-0d5c-4f7e-9a53-3a2b7b1f0a11".into());
        let (old, new) = (mounted(&objects(&old)), mounted(&objects(&new)));
        // The user's own claim has the name that the user gave it.
        let shared: Vec<_> =
            old.intersection(&new).filter(|(_, name)| !["datasets", "models"].contains(&name.as_str())).collect();
        assert_eq!(shared, Vec::<&(String, String)>::new());
        assert_eq!(old.iter().filter(|(kind, _)| kind == "map").count(), 2, "{old:?}");
        assert!(old.iter().all(|(_, name)| name.len() <= MAX_NAME), "{old:?}");
    }
}
