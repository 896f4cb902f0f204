//! The Helm chart: that its generated parts are current, what it renders, and what its values refuse.

mod admission;
pub mod alerts;
pub mod dashboards;
mod install;
mod objects;
mod profiles;
pub mod series;
mod values;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use harness::repository;
use serde_json::{Value, json};

/// The namespace of every release here.
const NAMESPACE: &str = "finetune-system";

pub fn chart() -> PathBuf {
    repository().join("charts/finetune-operator")
}

pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn parse(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// What a program printed, or all that it said when it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if output.status.success() { Ok(stdout) } else { Err(stdout + &stderr) }
}

/// The path that a script of the checkout prints, after having made what lies there unless it did before.
fn made_by(script: &str) -> PathBuf {
    let printed = run(&mut Command::new(repository().join(script))).unwrap_or_else(|said| panic!("{script}: {said}"));
    PathBuf::from(printed.lines().last().unwrap_or_else(|| panic!("{script} printed no path")))
}

/// Where a program is that is built with the test cluster: helm, kubectl, promtool.
pub fn program(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| made_by("tests/cluster/build.sh")).join("bin").join(name)
}

fn built(name: &str) -> Command {
    Command::new(program(name))
}

/// What `helm template` says.
fn template(arguments: &[&str]) -> Result<String, String> {
    run(built("helm")
        .args(["template", "finetune-operator"])
        .arg(chart())
        .args(["--namespace", NAMESPACE])
        .args(["--api-versions", "monitoring.coreos.com/v1/PodMonitor"])
        .args(arguments))
}

/// The rendered objects.
fn render(arguments: &[&str]) -> Vec<Value> {
    let text = template(arguments).unwrap_or_else(|said| panic!("{arguments:?}: {said}"));
    objects(&text)
}

fn objects(text: &str) -> Vec<Value> {
    let values: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}"));
    values.into_iter().filter(|value| !value.is_null()).collect()
}

/// `Kind namespace/name` of each object; cluster-scoped ones have no namespace.
fn names(objects: &[Value]) -> BTreeSet<String> {
    let name = |object: &Value| {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{} {namespace}{}", text(&object["kind"]), text(&metadata["name"]))
    };
    objects.iter().map(name).collect()
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

fn the<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name} in {:#?}", names(objects)))
}

fn compare_generated(path: &Path, generated: &str, test: &str) {
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, generated).expect("the chart's folder is writable");
    }
    assert!(
        read(path) == generated,
        "{} is not current; run `UPDATE=1 cargo test --release -p finetune-tests chart::{test}`",
        path.display()
    );
}

/// The template of the CRD is the CRD, behind its switches. `UPDATE=1` writes it.
#[test]
fn the_crd_is_current() {
    let crd = read(&repository().join("crds/finetunejobs.yaml"));
    let name = "metadata:\n  name: finetunejobs.finetune.dev\n";
    assert_eq!(crd.matches(name).count(), 1, "the CRD has another name");
    let metadata = format!(
        "{name}  labels:\n    {{{{- include \"finetune-operator.labels\" . | nindent 4 }}}}\n  \
         {{{{- if .Values.crds.keep }}}}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{{{- end }}}}\n"
    );
    // The text is spliced, not parsed and written again: that would make floats of its integers.
    let body = crd.replace("{{", "{{ \"{{\" }}").replace(name, &metadata);
    let generated = format!(
        "{{{{- /* Generated from crds/finetunejobs.yaml: UPDATE=1 cargo test --release -p finetune-tests \
         chart::the_crd_is_current */}}}}\n{{{{- if .Values.crds.enabled }}}}\n{body}{{{{- end }}}}\n"
    );
    compare_generated(&chart().join("templates/crds/finetunejobs.yaml"), &generated, "the_crd_is_current");

    let kind = "CustomResourceDefinition";
    let expected = parse(&crd);
    for (keep, annotation) in [("true", json!("keep")), ("false", Value::Null)] {
        let objects = render(&["--set", &format!("crds.keep={keep}")]);
        let rendered = the(&objects, kind, "finetunejobs.finetune.dev");
        assert_eq!(rendered["spec"], expected["spec"], "Helm renders another CRD than crds/finetunejobs.yaml");
        assert_eq!(rendered["metadata"]["annotations"]["helm.sh/resource-policy"], annotation);
    }
    assert!(!names(&render(&["--set", "crds.enabled=false"])).iter().any(|name| name.starts_with(kind)));
}

#[test]
fn notes_and_readme_show_jobs_that_the_operator_takes() {
    let notes = run(built("helm").args(["install", "finetune-operator"]).arg(chart()).args([
        "--namespace",
        NAMESPACE,
        "--dry-run=client",
    ]))
    .expect("installed for show");
    let (_, notes) = notes.split_once("\nNOTES:\n").expect("notes");
    let readme = read(&chart().join("README.md"));
    for page in [notes, &readme] {
        let job = page.split_once("<<EOF\n").and_then(|(_, rest)| rest.split_once("EOF\n")).expect("an example").0;
        crds::check::check(job, crds::check::Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}\n{job}"));
    }
    let annotations = parse(&read(&chart().join("Chart.yaml")))["annotations"].clone();
    let examples = parse(text(&annotations["artifacthub.io/crdsExamples"]));
    crds::check::check(&examples[0].to_string(), crds::check::Scope::Cluster)
        .unwrap_or_else(|problems| panic!("{problems:?}"));
    for line in notes.lines().filter(|line| line.contains("rollout status")) {
        assert!(line.contains(&format!("-n {NAMESPACE} rollout status deployment/finetune-operator")), "{line}");
    }
}
