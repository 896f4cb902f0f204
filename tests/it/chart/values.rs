//! Values: documented, typed, and refused with their place when they are wrong.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use super::{alerts, chart, compare_generated, parse, read, template};

/// A value of values.yaml with its comment.
struct Documented {
    path: String,
    default: String,
    description: String,
}

/// Reads the `# -- ` comments. A line that is neither a comment nor `key: value` belongs to the value above it.
fn documented_values(values: &str) -> Vec<Documented> {
    let mut rows = Vec::new();
    let mut parents: Vec<(usize, String)> = Vec::new();
    let mut comment: Option<String> = None;
    for line in values.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(first) = trimmed.strip_prefix("# -- ") {
            comment = Some(first.to_owned());
        } else if let (Some(comment), Some(more)) = (&mut comment, trimmed.strip_prefix("# ")) {
            comment.push(' ');
            comment.push_str(more);
        } else if let Some((key, default)) = trimmed.split_once(':').filter(|(key, _)| !key.contains([' ', '#', '{'])) {
            parents.retain(|(above, _)| *above < indent);
            parents.push((indent, key.to_owned()));
            if let Some(description) = comment.take() {
                let path: Vec<_> = parents.iter().map(|(_, key)| key.as_str()).collect();
                rows.push(Documented { path: path.join("."), default: default.trim().to_owned(), description });
            }
        }
    }
    rows
}

#[test]
fn the_values_table_is_current() {
    let mut table = "| value | default | meaning |\n|---|---|---|\n".to_owned();
    for Documented { path, default, description } in documented_values(&read(&chart().join("values.yaml"))) {
        let default = if default.is_empty() { "see values.yaml".to_owned() } else { format!("`{default}`") };
        table += &format!("| `{path}` | {default} | {description} |\n");
    }
    let path = chart().join("README.md");
    let readme = read(&path);
    let (before, rest) = readme.split_once("<!-- values -->\n").expect("README.md marks where the table begins");
    let (_, after) = rest.split_once("<!-- /values -->").expect("README.md marks where the table ends");
    let generated = format!("{before}<!-- values -->\n{table}<!-- /values -->{after}");
    compare_generated(&path, &generated, "values::the_values_table_is_current");
}

/// Paths of what is set in `value`, down to lists, scalars and empty maps.
fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
    match value.as_object().filter(|fields| !fields.is_empty()) {
        Some(fields) => fields.iter().for_each(|(key, below)| {
            leaves(below, &format!("{path}{}{key}", if path.is_empty() { "" } else { "." }), found);
        }),
        None => found.push(path.to_owned()),
    }
}

#[test]
fn every_value_is_documented() {
    let values = read(&chart().join("values.yaml"));
    let rows = documented_values(&values);
    let mut found = Vec::new();
    leaves(&parse(&values), "", &mut found);
    let below = |leaf: &str, row: &str| leaf == row || leaf.strip_prefix(row).is_some_and(|rest| rest.starts_with('.'));
    for leaf in &found {
        assert!(rows.iter().any(|row| below(leaf, &row.path)), "{leaf} has no `# -- ` comment in values.yaml");
    }
    for row in &rows {
        assert!(found.iter().any(|leaf| below(leaf, &row.path)), "the comment of {} was read wrongly", row.path);
    }
}

/// An object of the schema is closed, a map of one type, or listed here with a reason.
#[test]
fn the_values_schema_is_closed() {
    fn walk(schema: &Value, path: &str, open: &mut Vec<String>) {
        let object = schema["type"] == "object" || schema["properties"].is_object();
        let closed = schema["additionalProperties"] == false || schema["additionalProperties"].is_object();
        if object && !closed {
            open.push(path.to_owned());
        }
        for group in ["properties", "definitions", "$defs"] {
            for (name, below) in schema[group].as_object().into_iter().flatten() {
                walk(below, &format!("{path}.{name}"), open);
            }
        }
        for (name, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
            if schema[name].is_object() {
                walk(&schema[name], &format!("{path}{mark}"), open);
            }
        }
    }
    let mut open = Vec::new();
    walk(&parse(&read(&chart().join("values.schema.json"))), "", &mut open);
    // Kubernetes has their fields, and more with each version; Helm gives `global` to every chart.
    let kubernetes = [
        ".global",
        ".podSecurityContext",
        ".securityContext",
        ".affinity.nodeAffinity",
        ".affinity.podAffinity",
        ".affinity.podAntiAffinity",
        ".topologySpreadConstraints[]",
        ".extraEnv[].valueFrom",
    ];
    assert_eq!(open, kubernetes);
}

#[test]
fn wrong_values_are_refused_with_their_place() {
    let digest = format!("image.digest=sha256:{}", "0".repeat(64));
    template(&["--set", &digest]).expect("a whole digest is taken");
    for (set, expected) in [
        ("replicaCoutn=2", "'replicaCoutn' not allowed"),
        ("image.tagg=x", "at '/image': additional properties 'tagg' not allowed"),
        ("image.digest=sha256:1", "at '/image/digest'"),
        ("log.level=loud", "at '/log/level'"),
        ("metrics.port=80", "at '/metrics/port'"),
        ("watchNamespaces={Team}", "at '/watchNamespaces/0'"),
        ("profiles.default.imgae=x", "at '/profiles/default': additional properties 'imgae' not allowed"),
        (
            "profiles.default.resources.limits.cpu=four",
            "at '/profiles/default/resources/limits/cpu': 'four' does not match pattern",
        ),
        ("profiles.default.storage.size=many", "at '/profiles/default/storage/size'"),
        ("profiles.default.allowed.images={x}", "at '/profiles/default/allowed'"),
        ("profiles.default.pricePerHour=-1", "at '/profiles/default/pricePerHour'"),
        ("profiles.Not_A_Name.image=x", "Not_A_Name"),
        ("replicaCount=2,leaderElection.enabled=false", "set leaderElection.enabled"),
        ("leaderElection.renewDeadlineSeconds=15", "must be less than leaderElection.leaseDurationSeconds"),
        ("serviceAccount.create=false", "name the account to use in serviceAccount.name"),
        ("metrics.serviceMonitor.enabled=true,metrics.service.enabled=false", "needs metrics.service.enabled"),
        ("admissionPolicy.enabled=true,admissionPolicy.maxAcceleratorsPerJob=null", "without a rule"),
        ("admissionPolicy.enabled=true,admissionPolicy.maxStorageSize=big", "at '/admissionPolicy/maxStorageSize'"),
        (
            "admissionPolicy.enabled=true,admissionPolicy.tenants[0].name=a,admissionPolicy.tenants[0].namespaceSelector.matchLabels.team=a",
            "admissionPolicy.tenants: a has no rule",
        ),
        ("childPolicy.editors={it's}", "at '/childPolicy/editors/0'"),
    ] {
        let said = template(&["--set", set]).expect_err(set);
        assert!(said.contains(expected), "{set}: expected {expected:?} in {said}");
    }
    let said = template(&["--kube-version", "1.32.0"]).expect_err("too old a cluster");
    assert!(said.contains("requires kubeVersion: >=1.33.0-0"), "{said}");
}

/// Values that readers of the chart's page are told to set exist.
#[test]
fn values_named_in_texts_exist() {
    let mut values = Vec::new();
    leaves(&parse(&read(&chart().join("values.yaml"))), "", &mut values);
    let roots: BTreeSet<&str> = values.iter().filter_map(|path| path.split('.').next()).collect();
    let mut pages: Vec<PathBuf> = alerts::runbooks();
    pages.extend([chart().join("README.md"), chart().join("templates/NOTES.txt")]);
    let mut checked = 0;
    for page in pages {
        let content = read(&page);
        for word in content.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.')) {
            let named = word.trim_end_matches('.');
            let Some((root, rest)) = named.split_once('.') else { continue };
            // `.status.…` and file names are no values.
            if rest.is_empty()
                || !roots.contains(root)
                || ["yaml", "yml", "json", "md"].iter().any(|end| rest.ends_with(end))
            {
                continue;
            }
            let below = |path: &String| path == named || path.starts_with(&format!("{named}."));
            assert!(
                root == "resources" || values.iter().any(below),
                "{} names the value {named}, which does not exist",
                page.display()
            );
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} values were found");
}
