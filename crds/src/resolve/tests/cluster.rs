//! What becomes of a job on a cluster: volumes, resources, and the reasons of refusals.

use super::*;
use crate::run::StorageConfig;

/// Resolves for a cluster, by a profile as an administrator would write it.
fn in_cluster(patch: &Value) -> Result<RunConfig, Vec<(&'static str, String)>> {
    let mut job = base();
    job["metadata"] = json!({"name": "bot", "namespace": "team", "uid": "0b8e1c9e-0d5c-4f7e-9a53-3a2b7b1f0a11"});
    merge(&mut job["spec"], &json!({"dataset": {"train": {"uri": "pvc://rows/train.jsonl"}}}));
    merge(&mut job["spec"], patch);
    let checked = check(&job.to_string(), Scope::Cluster).unwrap_or_else(|problems| panic!("{patch}: {problems:?}"));
    let profiles = profile::parse(
        "default:
  resources: {limits: {memory: 64Gi, nvidia.com/gpu: '1'}, requests: {cpu: '4', memory: 32Gi}}
  maxResources: {memory: 128Gi, nvidia.com/gpu: '8'}
  storage: {storageClassName: standard, maxSize: 500Gi}
  otherDevices: ['rdma/*']
  allowed:
    sourcePrefixes: ['hf://', 'pvc://', 's3://acme/']
    claims: [rows, models, 'run-*', c]
    storageClasses: [fast]
cpu: {fallBackToCpu: true, resources: {limits: {nvidia.com/gpu: '1'}}, allowed: {namespaces: ['te*']}}
dear: {allowed: {namespaces: [rich]}}
unlisted: {}
",
    )
    .expect("valid");
    let resolved = resolve(&checked.job, &profiles, Target::Cluster);
    resolved
        .map(|resolved| resolved.config)
        .map_err(|findings| findings.into_iter().map(|finding| (finding.reason, finding.field)).collect())
}

#[test]
fn a_cluster_run_knows_its_volumes_and_the_resources_of_its_profile() {
    let config = in_cluster(&json!({})).expect("supported");
    assert_eq!(config.job.uid, "0b8e1c9e-0d5c-4f7e-9a53-3a2b7b1f0a11");
    assert_eq!(config.resources.memory_bytes, Some(64 << 30));
    assert!(config.resources.accelerator, "the profile gives one");
    let expected = StorageConfig {
        directory: "/data".into(),
        uri: "pvc://bot-0b8e1c9e".into(),
        claims: [("rows".to_owned(), "/sources/rows".to_owned())].into(),
    };
    assert_eq!(config.storage, Some(expected));

    let shared = json!({"checkpoint": {"storage": {"claim": "rows"}}, "output": {"uri": "pvc://models/bot"}});
    let config = in_cluster(&shared).expect("supported");
    let expected = StorageConfig {
        directory: "/data/bot-0b8e1c9e".into(),
        uri: "pvc://rows/bot-0b8e1c9e".into(),
        claims: [("models", "/sources/models"), ("rows", "/data")]
            .map(|(name, folder)| (name.to_owned(), folder.to_owned()))
            .into(),
    };
    assert_eq!((config.storage, config.output.uri.as_deref()), (Some(expected), Some("pvc://models/bot")));
    let cpu = in_cluster(&json!({"profile": "cpu"})).expect("supported");
    assert!(!cpu.resources.accelerator, "the administrator lets such a pod train on the CPU");
}

#[test]
fn a_cluster_refuses_with_the_reason_of_the_condition() {
    let limit = |name: &str, value: &str| json!({"resources": {"limits": {name: value}}});
    let storage = |storage: Value| json!({"checkpoint": {"storage": storage}});
    for (patch, expected_reason, field) in [
        (json!({"profile": "h100"}), reason::PROFILE_NOT_FOUND, "spec.profile"),
        (limit("memory", "200Gi"), reason::RESOURCE_LIMIT_EXCEEDED, "spec.resources.limits.memory"),
        (limit("nvidia.com/gpu", "9"), reason::RESOURCE_LIMIT_EXCEEDED, "spec.resources.limits[nvidia.com/gpu]"),
        (json!({"model": {"uri": "https://a/b"}}), reason::SOURCE_NOT_ALLOWED, "spec.model.uri"),
        (json!({"output": {"uri": "gs://b/k"}}), reason::SOURCE_NOT_ALLOWED, "spec.output.uri"),
        (json!({"output": {"uri": "s3://acme/k"}}), reason::NOT_SUPPORTED, "spec.output.uri"),
        (json!({"model": {"secretRef": {"name": "s"}}}), reason::NOT_SUPPORTED, "spec.model.secretRef"),
        (
            json!({"checkpoint": {"storage": {"claim": "c", "path": "a/../../b"}}}),
            reason::NOT_SUPPORTED,
            "spec.checkpoint.storage.path",
        ),
        (
            json!({"checkpoint": {"storage": {"claim": "c", "path": "bot/.huggingface/hub"}}}),
            reason::NOT_SUPPORTED,
            "spec.checkpoint.storage.path",
        ),
        (
            json!({"checkpoint": {"storage": {"claim": "c", "path": "/"}}}),
            reason::NOT_SUPPORTED,
            "spec.checkpoint.storage.path",
        ),
        (storage(json!({"size": "900Ti"})), reason::RESOURCE_LIMIT_EXCEEDED, "spec.checkpoint.storage.size"),
        (storage(json!({"size": "501Gi"})), reason::RESOURCE_LIMIT_EXCEEDED, "spec.checkpoint.storage.size"),
        (
            storage(json!({"storageClassName": "gold"})),
            reason::RESOURCE_LIMIT_EXCEEDED,
            "spec.checkpoint.storage.storageClassName",
        ),
        (storage(json!({"claim": "theirs"})), reason::SOURCE_NOT_ALLOWED, "spec.checkpoint.storage.claim"),
        (json!({"model": {"uri": "pvc://theirs/m"}}), reason::SOURCE_NOT_ALLOWED, "spec.model.uri"),
        (json!({"output": {"uri": "pvc://theirs/m"}}), reason::SOURCE_NOT_ALLOWED, "spec.output.uri"),
        (json!({"model": {"uri": "hf://acme/../theirs"}}), reason::SOURCE_NOT_ALLOWED, "spec.model.uri"),
        (json!({"output": {"uri": "pvc://models/bot/%2E./other"}}), reason::SOURCE_NOT_ALLOWED, "spec.output.uri"),
        (
            json!({"output": {"uri": "pvc://models/bot/.huggingface/hub"}}),
            reason::SOURCE_NOT_ALLOWED,
            "spec.output.uri",
        ),
        (
            json!({"checkpoint": {"storage": {"claim": "run-a", "path": "team/bot"}}, "output": {"uri": "pvc://run-a/team"}}),
            reason::SOURCE_NOT_ALLOWED,
            "spec.output.uri",
        ),
        (json!({"profile": "dear"}), reason::PROFILE_NOT_FOUND, "spec.profile"),
        (json!({"profile": "unlisted"}), reason::PROFILE_NOT_FOUND, "spec.profile"),
    ] {
        let findings = in_cluster(&patch).expect_err("refused");
        assert!(findings.contains(&(expected_reason, field.to_owned())), "{patch}: {findings:?}");
    }
}

/// The API server takes `nvidia.com/gpu: 1`; a job that it takes must be one to the operator.
#[test]
fn a_quantity_of_a_job_may_be_a_number() {
    let config = in_cluster(&json!({"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "64e9", "cpu": "1k"}}}));
    let resources = config.expect("supported").resources;
    assert_eq!(resources.memory_bytes, Some(64_000_000_000));
    assert!(resources.accelerator);
    assert_eq!(resources.cpus, Some(1000.0));
}

#[test]
fn what_the_profile_allows_of_volumes_and_claims_is_taken() {
    let asked = |storage: Value| json!({"checkpoint": {"storage": storage}});
    for patch in [
        asked(json!({"size": "500Gi", "storageClassName": "fast"})),
        asked(json!({"storageClassName": "standard"})),
        asked(json!({"claim": "run-a"})),
        json!({"checkpoint": {"storage": {"claim": "run-a", "path": "bot"}}, "output": {"uri": "pvc://run-a/bots"}}),
        json!({"output": {"uri": "pvc://models/bot"}}),
        json!({"profile": "cpu"}),
    ] {
        assert!(in_cluster(&patch).is_ok(), "{patch}: {:?}", in_cluster(&patch));
    }
}

/// A profile that says nothing of it lets nobody have a volume without end.
#[test]
fn volumes_have_a_bound_without_a_word_of_the_profile() {
    let most = |storage: &str| {
        let profiles = profile::parse(&format!("default: {{storage: {storage}}}")).expect("valid");
        profiles["default"].max_storage_size().to_owned()
    };
    assert_eq!([most("{}"), most("{size: 5Ti}"), most("{size: 5Gi, maxSize: 10Gi}")], ["1Ti", "5Ti", "10Gi"]);
}

/// Who may not name a profile is not told of it.
#[test]
fn profiles_of_other_namespaces_are_not_listed() {
    let job = json!({"metadata": {"namespace": "team"}});
    let mut whole = base();
    merge(&mut whole, &job);
    merge(&mut whole["spec"], &json!({"profile": "dear", "dataset": {"train": {"uri": "hf://datasets/a/b/c"}}}));
    let checked = check(&whole.to_string(), Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}"));
    let text = "default: {}\ndear: {allowed: {namespaces: [rich]}}\nours: {allowed: {namespaces: ['te*']}}\n";
    let profiles = profile::parse(text).expect("valid");
    let findings = resolve(&checked.job, &profiles, Target::Cluster).expect_err("not ours");
    let expected = "no profile dear for the namespace team, expected one of default, ours; the administrator of the operator defines them";
    assert_eq!(findings[0].message, expected);
}

/// Whoever's device it is: an FPGA and a card of a vendor that nobody has heard of count, what is Kubernetes' own does not.
#[test]
fn every_extended_resource_is_an_accelerator_unless_the_profile_says_otherwise() {
    let others = ["rdma/*".to_owned(), "vpc.amazonaws.com/efa".to_owned()];
    for (name, expected) in [
        ("nvidia.com/gpu", true),
        ("nvidia.com/mig-1g.10gb", true),
        ("amd.com/gpu", true),
        ("xilinx.com/fpga-xilinx_u250", true),
        ("example.com/brain", true),
        ("vpc.amazonaws.com/efa", false),
        ("rdma/hca_shared_devices_a", false),
        ("cpu", false),
        ("memory", false),
        ("ephemeral-storage", false),
        ("hugepages-2Mi", false),
        ("requests.nvidia.com/gpu", false),
        ("attachable-volumes-csi.kubernetes.io/x", false),
    ] {
        let limits = serde_json::from_value(json!({"limits": {name: "3"}})).expect("valid");
        assert_eq!(accelerators(&limits, &others), if expected { 3 } else { 0 }, "{name}");
    }
    let fpga = json!({"resources": {"limits": {"nvidia.com/gpu": "0", "xilinx.com/fpga": 1, "rdma/hca": 1}}});
    assert!(in_cluster(&fpga).expect("one accelerator").resources.accelerator);
    let two = json!({"resources": {"limits": {"xilinx.com/fpga": 1}}});
    let findings = in_cluster(&two).expect_err("the profile has a GPU besides");
    assert_eq!(findings, [(reason::NOT_SUPPORTED, "spec.resources.limits[xilinx.com/fpga]".to_owned())]);
}

#[test]
fn a_limit_of_the_job_does_away_with_the_request_of_the_profile() {
    let mut job = base();
    job["spec"]["resources"] = json!({"limits": {"memory": "16Gi"}});
    let job: FineTuneJob = serde_json::from_value(job).expect("valid");
    let profile = serde_json::from_value(json!({
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"}, "requests": {"cpu": "4", "memory": "32Gi"}
    }));
    let resources = training_resources(&job, &profile.expect("valid"));
    let expected = json!({"limits": {"memory": "16Gi", "nvidia.com/gpu": "2"}, "requests": {"cpu": "4"}});
    assert_eq!(serde_json::to_value(&resources).expect("JSON"), expected);
    assert_eq!(accelerators(&resources, &[]), 2);
}

/// What a status echoes may be copied into the next job.
#[test]
fn echoed_hyperparameters_resolve_to_themselves() {
    let parameters = json!({"hyperparameters": {"maxSteps": 7, "learningRate": "3e-5", "neftuneAlpha": "5"}});
    let extreme = json!({"hyperparameters": {"learningRate": "1e-40", "maxGradNorm": "1.2345678901e40"}});
    for patch in [json!({}), parameters, extreme] {
        let config = in_cluster(&patch).expect("supported");
        let echoed = serde_json::to_value(hyperparameters_spec(&config.hyperparameters)).expect("JSON");
        let again = in_cluster(&json!({"hyperparameters": echoed})).expect("valid");
        assert_eq!(again.hyperparameters, config.hyperparameters);
    }
}
