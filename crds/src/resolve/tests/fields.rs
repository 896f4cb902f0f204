//! What becomes of every field of the resource in a local run.

mod table;

use table::table;

use super::*;

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
    let table = table();
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
