//! What becomes of every field of the resource in a local run.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::check::{Scope, check};
use crate::run::StorageConfig;

/// What becomes of a field.
enum Fate {
    /// The run has this value at this JSON pointer, and would not have it without the field.
    Honoured(&'static str, Value),
    /// The job is refused, and this field is named.
    Refused(&'static str),
    /// The run begins, and this field is named.
    Warned(&'static str),
}
use Fate::{Honoured, Refused, Warned};

fn base() -> Value {
    json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "bot"},
        "spec": {
            "model": {"uri": "hf://owner/name"},
            "dataset": {"train": {"uri": "file://train.jsonl"}, "splitPercent": 5},
            "method": {"type": "LoRA"},
        },
    })
}

/// RFC 7396: null removes.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let fields = target.as_object_mut().expect("just made one");
    for (name, change) in changes {
        if change.is_null() {
            fields.remove(name);
        } else {
            merge(fields.entry(name).or_insert(Value::Null), change);
        }
    }
}

fn resolved(patch: &Value) -> Result<Resolved, Vec<Finding>> {
    let mut job = base();
    merge(&mut job["spec"], patch);
    let checked = check(&job.to_string(), Scope::Local).unwrap_or_else(|problems| panic!("{patch}: {problems:?}"));
    let mut profiles = profile::built_in();
    profiles.insert("a100".into(), Profile { price_per_hour: Some(2.5), ..Profile::default() });
    let claims = BTreeMap::from([("models".to_owned(), PathBuf::from("volumes/models"))]);
    resolve(&checked.job, &profiles, Target::Local { folder: Path::new("/here"), claims: &claims })
}

/// Paths of the schema's leaves: `gates[].by`, `columnMap{}`. With a value, only of those that it sets.
fn leaves(schema: &Value, value: Option<&Value>, path: &str, found: &mut BTreeSet<String>) {
    if let Some(properties) = schema["properties"].as_object() {
        for (name, below) in properties {
            let dot = if path.is_empty() { "" } else { "." };
            match value {
                Some(value) if value.get(name).is_none() => {}
                _ => leaves(below, value.map(|value| &value[name]), &format!("{path}{dot}{name}"), found),
            }
        }
    } else if schema["items"].is_object() {
        let path = format!("{path}[]");
        match value {
            Some(value) => {
                value
                    .as_array()
                    .into_iter()
                    .flatten()
                    .for_each(|item| leaves(&schema["items"], Some(item), &path, found));
            }
            None => leaves(&schema["items"], None, &path, found),
        }
    } else {
        let map = schema["additionalProperties"].is_object();
        found.insert(format!("{path}{}", if map { "{}" } else { "" }));
    }
}

/// A field that is new in the resource and missing here fails this test.
#[test]
fn every_field_is_honoured_or_refused_or_warned_about() {
    let secret = json!({"name": "s"});
    let forgetting = |more: Value| {
        let mut patch = json!({"validation": {"forgetting": {"dataset": {"uri": "file://general.jsonl"}}}});
        merge(&mut patch["validation"]["forgetting"], &more);
        patch
    };
    let rows = |more: Value| {
        let mut patch = json!({"dataset": {"splitPercent": null, "validation": {"uri": "file://test.jsonl"}}});
        merge(&mut patch["dataset"]["validation"], &more);
        patch
    };
    let parameter = |name: &str, value: Value| {
        let mut patch = json!({"hyperparameters": {}});
        patch["hyperparameters"][name] = value;
        patch
    };
    let lora = |name: &str, value: Value| {
        let mut patch = json!({"method": {"lora": {}}});
        patch["method"]["lora"][name] = value;
        patch
    };
    let limit = |name: &str, value: Value| {
        let mut patch = json!({"resources": {"limits": {}}});
        patch["resources"]["limits"][name] = value;
        patch
    };
    let at_most = json!({"validation": {"gates": [{"metric": "perplexity", "operator": "AtMost", "value": "1.5"}]}});
    let improves = json!({"validation": {"gates": [
        {"metric": "exactMatch", "operator": "ImprovesOn", "baseline": "FewShot", "by": "0.25"}
    ]}});
    let toleration = json!({"scheduling": {"tolerations": [
        {"key": "k", "operator": "Equal", "value": "v", "effect": "NoExecute", "tolerationSeconds": 5}
    ]}});
    let storage =
        json!({"checkpoint": {"storage": {"size": "5Gi", "storageClassName": "fast", "whenDeleted": "Delete"}}});
    let quantized = json!({"method": {"type": "QLoRA", "quantization": {"type": "NF4", "doubleQuantization": false}}});
    let table = vec![
        ("profile", json!({"profile": "a100"}), Honoured("/resources/pricePerHour", json!(2.5))),
        ("profile", json!({"profile": "h100"}), Refused("spec.profile")),
        ("model.uri", json!({"model": {"uri": "hf://other/model"}}), Honoured("/model/uri", json!("hf://other/model"))),
        ("model.uri", json!({"model": {"uri": "s3://bucket/model"}}), Refused("spec.model.uri")),
        (
            "model.uri",
            json!({"model": {"uri": "pvc://models/tiny"}}),
            Honoured("/model/uri", json!("file:///here/volumes/models/tiny")),
        ),
        ("model.uri", json!({"model": {"uri": "pvc://others/tiny"}}), Refused("spec.model.uri")),
        ("model.revision", json!({"model": {"revision": "v2"}}), Honoured("/model/revision", json!("v2"))),
        ("model.revision", json!({"model": {"uri": "file://model", "revision": "v2"}}), Refused("spec.model.revision")),
        ("model.secretRef.name", json!({"model": {"secretRef": secret}}), Refused("spec.model.secretRef")),
        (
            "dataset.train.uri",
            json!({"dataset": {"train": {"uri": "file://other.jsonl"}}}),
            Honoured("/dataset/train/uri", json!("file:///here/other.jsonl")),
        ),
        (
            "dataset.train.uri",
            json!({"dataset": {"train": {"uri": "https://host/rows"}}}),
            Refused("spec.dataset.train.uri"),
        ),
        (
            "dataset.train.format",
            json!({"dataset": {"train": {"format": "Text"}}}),
            Honoured("/dataset/train/format", json!("Text")),
        ),
        (
            "dataset.train.format",
            json!({"dataset": {"train": {"format": "Alpaca"}}}),
            Refused("spec.dataset.train.format"),
        ),
        (
            "dataset.train.secretRef.name",
            json!({"dataset": {"train": {"secretRef": secret}}}),
            Refused("spec.dataset.train.secretRef"),
        ),
        (
            "dataset.train.columnMap{}",
            json!({"dataset": {"train": {"columnMap": {"prompt": "question"}}}}),
            Refused("spec.dataset.train.columnMap"),
        ),
        (
            "dataset.validation.uri",
            rows(json!({})),
            Honoured("/dataset/validation/source/uri", json!("file:///here/test.jsonl")),
        ),
        (
            "dataset.validation.format",
            rows(json!({"format": "Text"})),
            Honoured("/dataset/validation/source/format", json!("Text")),
        ),
        (
            "dataset.validation.secretRef.name",
            rows(json!({"secretRef": secret})),
            Refused("spec.dataset.validation.secretRef"),
        ),
        (
            "dataset.validation.columnMap{}",
            rows(json!({"columnMap": {"prompt": "question"}})),
            Refused("spec.dataset.validation.columnMap"),
        ),
        (
            "dataset.splitPercent",
            json!({"dataset": {"splitPercent": 7}}),
            Honoured("/dataset/validation/splitPercent", json!(7)),
        ),
        (
            "dataset.onProblem.leakage",
            json!({"dataset": {"onProblem": {"leakage": "Warn"}}}),
            Honoured("/dataset/onProblem/leakage", json!("Warn")),
        ),
        (
            "dataset.onProblem.duplicates",
            json!({"dataset": {"onProblem": {"duplicates": "Fail"}}}),
            Honoured("/dataset/onProblem/duplicates", json!("Fail")),
        ),
        (
            "dataset.onProblem.truncatedAnswers",
            json!({"dataset": {"onProblem": {"truncatedAnswers": "Warn"}}}),
            Honoured("/dataset/onProblem/truncatedAnswers", json!("Warn")),
        ),
        ("method.type", json!({"method": {"type": "Full"}}), Honoured("/method/full", json!({}))),
        ("method.type", json!({"method": {"type": "QLoRA"}}), Refused("spec.method.type")),
        ("method.lora.rank", lora("rank", json!(3)), Honoured("/method/loRA/lora/rank", json!(3))),
        ("method.lora.alpha", lora("alpha", json!(5)), Honoured("/method/loRA/lora/alpha", json!(5.0))),
        ("method.lora.dropout", lora("dropout", json!("0.1")), Honoured("/method/loRA/lora/dropout", json!(0.1))),
        (
            "method.lora.targetModules[]",
            lora("targetModules", json!(["q_proj"])),
            Honoured("/method/loRA/lora/targetModules", json!(["q_proj"])),
        ),
        (
            "method.lora.rankStabilized",
            lora("rankStabilized", json!(true)),
            Honoured("/method/loRA/lora/rankStabilized", json!(true)),
        ),
        (
            "method.full.optimizerInBackward",
            json!({
                "method": {"type": "Full", "full": {"optimizerInBackward": true}}, "hyperparameters": {"maxGradNorm": "0"}
            }),
            Honoured("/method/full/optimizerInBackward", json!(true)),
        ),
        ("method.quantization.type", quantized.clone(), Refused("spec.method.type")),
        ("method.quantization.doubleQuantization", quantized, Refused("spec.method.type")),
        (
            "hyperparameters.epochs",
            parameter("epochs", json!("1.5")),
            Honoured("/hyperparameters/duration/epochs", json!(1.5)),
        ),
        (
            "hyperparameters.maxSteps",
            parameter("maxSteps", json!(9)),
            Honoured("/hyperparameters/duration/maxSteps", json!(9)),
        ),
        (
            "hyperparameters.learningRate",
            parameter("learningRate", json!("1e-3")),
            Honoured("/hyperparameters/learningRate", json!(1e-3)),
        ),
        (
            "hyperparameters.batchSize",
            parameter("batchSize", json!(3)),
            Honoured("/hyperparameters/batchSize", json!(3)),
        ),
        (
            "hyperparameters.microBatchTokens",
            parameter("microBatchTokens", json!(512)),
            Honoured("/hyperparameters/microBatchTokens", json!(512)),
        ),
        (
            "hyperparameters.maxSequenceLength",
            parameter("maxSequenceLength", json!(99)),
            Honoured("/hyperparameters/maxSequenceLength", json!(99)),
        ),
        (
            "hyperparameters.scheduler",
            parameter("scheduler", json!("Linear")),
            Honoured("/hyperparameters/scheduler", json!("Linear")),
        ),
        (
            "hyperparameters.warmupRatio",
            parameter("warmupRatio", json!("0.1")),
            Honoured("/hyperparameters/warmupRatio", json!(0.1)),
        ),
        (
            "hyperparameters.weightDecay",
            parameter("weightDecay", json!("0.01")),
            Honoured("/hyperparameters/weightDecay", json!(0.01)),
        ),
        (
            "hyperparameters.maxGradNorm",
            parameter("maxGradNorm", json!("0.5")),
            Honoured("/hyperparameters/maxGradNorm", json!(0.5)),
        ),
        (
            "hyperparameters.optimizer",
            parameter("optimizer", json!("AdamW8Bit")),
            Honoured("/hyperparameters/optimizer", json!("AdamW8Bit")),
        ),
        ("hyperparameters.seed", parameter("seed", json!(1)), Honoured("/hyperparameters/seed", json!(1))),
        (
            "hyperparameters.neftuneAlpha",
            parameter("neftuneAlpha", json!("5")),
            Honoured("/hyperparameters/neftuneAlpha", json!(5.0)),
        ),
        (
            "hyperparameters.precision",
            parameter("precision", json!("FP32")),
            Honoured("/hyperparameters/precision", json!("FP32")),
        ),
        (
            "resources.limits{}",
            limit("memory", json!("1Gi")),
            Honoured("/resources/memoryBytes", json!(1_073_741_824_i64)),
        ),
        ("resources.limits{}", limit("memory", json!(4096)), Honoured("/resources/memoryBytes", json!(4096))),
        ("resources.limits{}", limit("memory", json!("0")), Refused("spec.resources.limits.memory")),
        ("resources.limits{}", limit("cpu", json!("1500m")), Honoured("/resources/cpus", json!(1.5))),
        ("resources.limits{}", limit("cpu", json!("0")), Refused("spec.resources.limits.cpu")),
        ("resources.limits{}", limit("nvidia.com/gpu", json!("1")), Honoured("/resources/accelerator", json!(true))),
        ("resources.limits{}", limit("amd.com/gpu", json!(1)), Honoured("/resources/accelerator", json!(true))),
        ("resources.limits{}", limit("nvidia.com/gpu", json!("2")), Refused("spec.resources.limits[nvidia.com/gpu]")),
        (
            "resources.limits{}",
            limit("ephemeral-storage", json!("5Gi")),
            Warned("spec.resources.limits.ephemeral-storage"),
        ),
        (
            "resources.requests{}",
            json!({"resources": {"requests": {"cpu": "1"}}}),
            Warned("spec.resources.requests.cpu"),
        ),
        ("nodes", json!({"nodes": 2}), Refused("spec.nodes")),
        ("scheduling.queueName", json!({"scheduling": {"queueName": "q"}}), Warned("spec.scheduling")),
        ("scheduling.priorityClassName", json!({"scheduling": {"priorityClassName": "p"}}), Warned("spec.scheduling")),
        ("scheduling.nodeSelector{}", json!({"scheduling": {"nodeSelector": {"a": "b"}}}), Warned("spec.scheduling")),
        ("scheduling.tolerations[].key", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].operator", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].value", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].effect", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].tolerationSeconds", toleration, Warned("spec.scheduling")),
        (
            "checkpoint.everySteps",
            json!({"checkpoint": {"everySteps": 5}}),
            Honoured("/checkpoint/interval/everySteps", json!(5)),
        ),
        (
            "checkpoint.everySeconds",
            json!({"checkpoint": {"everySeconds": 5}}),
            Honoured("/checkpoint/interval/everySeconds", json!(5)),
        ),
        (
            "checkpoint.keep.latest",
            json!({"checkpoint": {"keep": {"latest": 5}}}),
            Honoured("/checkpoint/keepLatest", json!(5)),
        ),
        (
            "checkpoint.keep.best",
            json!({"checkpoint": {"keep": {"best": 5}}}),
            Honoured("/checkpoint/keepBest", json!(5)),
        ),
        (
            "checkpoint.keep.best",
            json!({"dataset": {"splitPercent": null}, "checkpoint": {"keep": {"best": 5}}}),
            Warned("spec.checkpoint.keep.best"),
        ),
        ("checkpoint.resume", json!({"checkpoint": {"resume": "Never"}}), Honoured("/checkpoint/resume", json!(false))),
        (
            "checkpoint.resumeFrom.uri",
            json!({"checkpoint": {"resumeFrom": {"uri": "s3://b/k"}}}),
            Refused("spec.checkpoint.resumeFrom"),
        ),
        (
            "checkpoint.resumeFrom.secretRef.name",
            json!({"checkpoint": {"resumeFrom": {"uri": "s3://b/k", "secretRef": secret}}}),
            Refused("spec.checkpoint.resumeFrom"),
        ),
        (
            "checkpoint.storage.claim",
            json!({"checkpoint": {"storage": {"claim": "c"}}}),
            Warned("spec.checkpoint.storage"),
        ),
        (
            "checkpoint.storage.path",
            json!({"checkpoint": {"storage": {"claim": "c", "path": "p"}}}),
            Warned("spec.checkpoint.storage"),
        ),
        ("checkpoint.storage.size", storage.clone(), Warned("spec.checkpoint.storage")),
        ("checkpoint.storage.storageClassName", storage.clone(), Warned("spec.checkpoint.storage")),
        ("checkpoint.storage.whenDeleted", storage, Warned("spec.checkpoint.storage")),
        (
            "validation.everySteps",
            json!({"validation": {"everySteps": 5}}),
            Honoured("/validation/everySteps", json!(5)),
        ),
        (
            "validation.metric",
            json!({"validation": {"metric": "exactMatch"}}),
            Honoured("/validation/metric", json!("exactMatch")),
        ),
        (
            "validation.evaluate",
            json!({"validation": {"evaluate": "Last"}}),
            Honoured("/validation/evaluate", json!("Last")),
        ),
        (
            "validation.baselines.zeroShot",
            json!({"validation": {"baselines": {"zeroShot": false}}}),
            Honoured("/validation/zeroShot", json!(false)),
        ),
        (
            "validation.baselines.fewShot.examples",
            json!({"validation": {"baselines": {"fewShot": {"examples": 2}}}}),
            Honoured("/validation/fewShotExamples", json!(2)),
        ),
        ("validation.gates[].metric", at_most.clone(), Honoured("/validation/gates/0/metric", json!("perplexity"))),
        ("validation.gates[].operator", at_most.clone(), Honoured("/validation/gates/0/operator", json!("atMost"))),
        ("validation.gates[].value", at_most, Honoured("/validation/gates/0/value", json!(1.5))),
        ("validation.gates[].baseline", improves.clone(), Honoured("/validation/gates/0/baseline", json!("FewShot"))),
        ("validation.gates[].by", improves, Honoured("/validation/gates/0/by", json!(0.25))),
        (
            "validation.forgetting.dataset.uri",
            forgetting(json!({})),
            Honoured("/validation/forgetting/dataset/uri", json!("file:///here/general.jsonl")),
        ),
        (
            "validation.forgetting.dataset.format",
            forgetting(json!({"dataset": {"format": "Text"}})),
            Honoured("/validation/forgetting/dataset/format", json!("Text")),
        ),
        (
            "validation.forgetting.dataset.secretRef.name",
            forgetting(json!({"dataset": {"secretRef": secret}})),
            Refused("spec.validation.forgetting.dataset.secretRef"),
        ),
        (
            "validation.forgetting.dataset.columnMap{}",
            forgetting(json!({"dataset": {"columnMap": {"text": "body"}}})),
            Refused("spec.validation.forgetting.dataset.columnMap"),
        ),
        (
            "validation.forgetting.maxLossIncrease",
            forgetting(json!({"maxLossIncrease": "0.2"})),
            Honoured("/validation/forgetting/maxLossIncrease", json!(0.2)),
        ),
        (
            "validation.onFailure",
            json!({"validation": {"onFailure": "Complete"}}),
            Honoured("/validation/failOnGate", json!(false)),
        ),
        (
            "earlyStopping.patience",
            json!({"earlyStopping": {"patience": 2}}),
            Honoured("/earlyStopping/patience", json!(2)),
        ),
        (
            "earlyStopping.minDelta",
            json!({"earlyStopping": {"patience": 2, "minDelta": "0.1"}}),
            Honoured("/earlyStopping/minDelta", json!(0.1)),
        ),
        ("output.uri", json!({"output": {"uri": "s3://b/k"}}), Warned("spec.output.uri")),
        ("output.secretRef.name", json!({"output": {"secretRef": secret}}), Refused("spec.output.secretRef")),
        ("output.format", json!({"output": {"format": "Merged"}}), Honoured("/output/format", json!("Merged"))),
        (
            "output.publishWhen",
            json!({"output": {"publishWhen": "Always"}}),
            Honoured("/output/publishAlways", json!(true)),
        ),
        ("failurePolicy.maxRetries", json!({"failurePolicy": {"maxRetries": 1}}), Warned("spec.failurePolicy")),
        ("failurePolicy.maxPreemptions", json!({"failurePolicy": {"maxPreemptions": 1}}), Warned("spec.failurePolicy")),
        ("suspend", json!({"suspend": true}), Refused("spec.suspend")),
        ("stopRequested", json!({"stopRequested": true}), Refused("spec.stopRequested")),
        ("startDeadlineSeconds", json!({"startDeadlineSeconds": 5}), Warned("spec.startDeadlineSeconds")),
        ("activeDeadlineSeconds", json!({"activeDeadlineSeconds": 5}), Warned("spec.activeDeadlineSeconds")),
        ("ttlSecondsAfterFinished", json!({"ttlSecondsAfterFinished": 5}), Warned("spec.ttlSecondsAfterFinished")),
        ("managedBy", json!({"managedBy": "other"}), Warned("spec.managedBy")),
    ];

    let crd = serde_json::to_value(<FineTuneJob as kube::CustomResourceExt>::crd()).expect("the CRD is JSON");
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let plain = serde_json::to_value(resolved(&json!({})).expect("supported").config).expect("JSON");
    let mut covered = BTreeSet::new();
    for (leaf, patch, fate) in &table {
        let mut job = base();
        merge(&mut job["spec"], patch);
        let mut set = BTreeSet::new();
        leaves(schema, Some(&job["spec"]), "", &mut set);
        assert!(set.contains(*leaf), "{patch} does not set {leaf}, but {set:?}");
        covered.insert((*leaf).to_owned());
        match (fate, resolved(patch)) {
            (Honoured(pointer, expected), Ok(found)) => {
                assert_eq!(found.warnings, [], "{leaf}");
                let config = serde_json::to_value(&found.config).expect("JSON");
                assert_eq!(config.pointer(pointer), Some(expected), "{leaf}: {config:#}");
                assert_ne!(plain.pointer(pointer), Some(expected), "{leaf}: it is so without the field too");
            }
            (Warned(field), Ok(found)) => {
                let fields: Vec<&str> = found.warnings.iter().map(|warning| warning.field.as_str()).collect();
                assert_eq!(fields, [*field], "{leaf}");
            }
            (Refused(field), Err(problems)) => {
                assert!(problems.iter().any(|problem| problem.field == *field), "{leaf}: {problems:?}");
            }
            (_, found) => panic!("{leaf}: {patch}: {found:#?}"),
        }
    }
    let mut all = BTreeSet::new();
    leaves(schema, None, "", &mut all);
    let forgotten: Vec<&String> = all.difference(&covered).collect();
    assert!(forgotten.is_empty(), "these fields have no row in the table: {forgotten:#?}");
}

#[test]
fn nothing_is_implicit_and_the_contract_round_trips() {
    let config = resolved(&json!({})).expect("supported").config;
    assert_eq!(config.dataset.train.uri, "file:///here/train.jsonl");
    let Method::LoRA { lora } = &config.method else { panic!("LoRA") };
    assert_eq!((lora.rank, lora.alpha, config.hyperparameters.learning_rate), (16, 32.0, 2e-4));
    assert_eq!((config.validation.zero_shot, config.validation.few_shot_examples), (true, 4));
    let text = serde_json::to_string(&config).expect("JSON");
    assert_eq!(serde_json::from_str::<RunConfig>(&text).expect("round trip"), config);
    let with_more = text.replacen('{', "{\"surprise\":1,", 1);
    assert!(serde_json::from_str::<RunConfig>(&with_more).is_err(), "unknown fields are refused");
}

#[test]
fn all_problems_are_told_at_once() {
    let patch = json!({
        "model": {"uri": "s3://bucket/model", "secretRef": {"name": "s"}},
        "dataset": {"train": {"uri": "https://x/y", "format": "Alpaca"}},
        "method": {"type": "QLoRA"},
    });
    let problems = resolved(&patch).expect_err("unsupported");
    let fields: BTreeSet<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
    let expected = [
        "spec.dataset.train.format",
        "spec.dataset.train.uri",
        "spec.method.type",
        "spec.model.secretRef",
        "spec.model.uri",
    ];
    assert_eq!(fields, expected.into());
    assert!(problems.iter().all(|problem| problem.message.starts_with("not supported yet")), "{problems:?}");
}

#[test]
fn a_profile_limits_the_sources() {
    let checked = check(&base().to_string(), Scope::Local).unwrap_or_else(|problems| panic!("{problems:?}"));
    let allowed = profile::Allowed { source_prefixes: vec!["file://".into()], ..profile::Allowed::default() };
    let profiles = Profiles::from([(profile::DEFAULT.to_owned(), Profile { allowed, ..Profile::default() })]);
    let target = Target::Local { folder: Path::new("/here"), claims: &BTreeMap::new() };
    let problems = resolve(&checked.job, &profiles, target).expect_err("limited");
    let expected = Finding {
        reason: reason::SOURCE_NOT_ALLOWED,
        field: "spec.model.uri".into(),
        message: "the profile allows sources that begin with file://".into(),
    };
    assert_eq!(problems, [expected]);
}

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
  allowed: {sourcePrefixes: ['hf://', 'pvc://', 's3://acme/']}
cpu: {fallBackToCpu: true, resources: {limits: {nvidia.com/gpu: '1'}}}
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
    ] {
        let findings = in_cluster(&patch).expect_err("refused");
        assert!(findings.contains(&(expected_reason, field.to_owned())), "{patch}: {findings:?}");
    }
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
    assert_eq!(accelerators(&resources), 2);
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
