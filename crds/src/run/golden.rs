//! Run configurations as they were when trainers in use today were built: `golden/*.yaml`, one for each example. They are never
//! written anew: a trainer of that day has to read what is written now, and a trainer of now what was written then.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::*;
use crate::check::{Scope, check};
use crate::resolve::{Target, resolve};

/// Each example, and what it was resolved to then. Not among them is QLoRA, which is refused.
const GOLDEN: [(&str, &str); 6] = [
    ("cluster", include_str!("golden/cluster.yaml")),
    ("demo", include_str!("golden/demo.yaml")),
    ("full", include_str!("golden/full.yaml")),
    ("gates", include_str!("golden/gates.yaml")),
    ("minimal", include_str!("golden/minimal.yaml")),
    ("not-worth-it", include_str!("golden/not-worth-it.yaml")),
];

/// What the example becomes on a cluster, or, where it has files of this machine, here.
fn resolved(example: &str) -> RunConfig {
    let text = std::fs::read_to_string(format!("examples/{example}.yaml")).expect("an example");
    // Other stores are refused yet; their addresses are no part of what is compared.
    let text = text.replace("s3://acme/", "hf://datasets/acme/rows/").replace(", secretRef: {name: acme-s3}", "");
    let is_local = text.contains("file://");
    let scope = if is_local { Scope::Local } else { Scope::Cluster };
    let mut job = check(&text, scope).unwrap_or_else(|problems| panic!("{example}: {problems:?}")).job;
    let none = std::collections::BTreeMap::new();
    let target = if is_local {
        Target::Local { folder: Path::new("/examples"), claims: &none }
    } else {
        job.metadata.namespace = Some("team".into());
        job.metadata.uid = Some("0b8e1c9e-0d5c-4f7e-9a53-3a2b7b1f0a11".into());
        Target::Cluster
    };
    let resolved = resolve(&job, &crate::profile::built_in(), target);
    resolved.unwrap_or_else(|findings| panic!("{example}: {findings:?}")).config
}

/// Paths of all fields of a file. Names of claims and columns are among them: they are the same then and now.
fn fields(text: &str) -> BTreeSet<String> {
    fn walk(value: &Value, path: &str, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                for (name, below) in fields {
                    let path = format!("{path}.{name}");
                    walk(below, &path, found);
                    found.insert(path);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, &format!("{path}[]"), found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    walk(&crate::yaml::Document::parse(text).expect("YAML").value, "", &mut found);
    found
}

#[test]
fn a_job_that_asks_for_nothing_new_is_written_with_the_fields_that_an_older_trainer_knows() {
    for (example, golden) in GOLDEN {
        let written = resolved(example).to_yaml();
        let new: Vec<String> = fields(&written).difference(&fields(golden)).cloned().collect();
        assert!(
            new.is_empty(),
            "{example}: run.yaml has {new:?}, which trainers in use refuse. A field that is added has to be left out where it says \
             what they do anyway: #[serde(default, skip_serializing_if = …)]"
        );
        let gone: Vec<String> = fields(golden).difference(&fields(&written)).cloned().collect();
        assert!(gone.is_empty(), "{example}: run.yaml lacks {gone:?}, without which trainers in use do not start");
    }
}

/// The digest of a configuration is taken of what is written: it decides whether a run that has begun goes on.
#[test]
fn an_older_operators_file_is_read_and_would_be_written_as_it_was() {
    for (example, golden) in GOLDEN {
        let config = RunConfig::from_yaml(golden).unwrap_or_else(|error| panic!("{example}: {error}"));
        assert_eq!(config.to_yaml(), golden, "{example}");
    }
}
