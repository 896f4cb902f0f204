//! What a run is resolved to, locally and on a cluster.

mod cluster;
mod fields;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::check::{Scope, check};

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
