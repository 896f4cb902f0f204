//! `run FILE`: a file that the API server will take, and what it made of it.

use std::io::Read;
use std::path::Path;

use crds::FineTuneJob;
use crds::check::check;
use kube::ResourceExt;
use serde_json::Value;

use crate::cluster::{Cluster, Conflicts, Target, object_name};
use crate::error::{Error, explain};
use crate::outcome::outcome;
use crate::text::{print, tell};

/// Who names a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// The file: the job is made or changed.
    Given(String),
    /// The API server, from `metadata.generateName`: another job is made each time.
    Generated,
}

/// A checked job as its file has it: without defaults, so that we own no field that the user did not write.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// `metadata.name`
    pub name: Name,
    /// `metadata.namespace`
    pub namespace: Option<String>,
    value: Value,
}

/// Reads and checks a file; `-` is standard input.
pub fn read(path: &Path) -> Result<Document, Error> {
    let problem = |source| Error::Read { path: path.into(), source };
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(problem)?;
        text
    } else {
        std::fs::read_to_string(path).map_err(problem)?
    };
    parse(&text).map_err(|problems| {
        Error::Invalid(problems.iter().map(|problem| format!("{}:{problem}", path.display())).collect())
    })
}

fn parse(text: &str) -> Result<Document, Vec<String>> {
    let checked = check(text, crds::check::Scope::Cluster)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let value: Value = serde_saphyr::from_str(text).map_err(|error| vec![format!("1:1: {error}")])?;
    let named = value["metadata"]["name"].as_str().is_some_and(|name| !name.is_empty());
    let name = if named { Name::Given(checked.job.name_any()) } else { Name::Generated };
    Ok(Document { name, namespace: checked.job.namespace(), value })
}

/// The namespace is the file's or the command's; if both have one, it is the same.
pub fn target(document: &Document, target: &Target) -> Result<Target, Error> {
    let mut target = target.clone();
    match (&document.namespace, &target.namespace) {
        (Some(file), Some(argument)) if file != argument => {
            return Err(Error::Usage(format!(
                "metadata.namespace is {file} and --namespace is {argument}: leave one of them out"
            )));
        }
        (Some(file), _) => target.namespace = Some(file.clone()),
        _ => {}
    }
    Ok(target)
}

/// Applies the file and tells what that changed. What the API server names is created, as `kubectl create` does it: apply has
/// no name to find it by.
pub async fn submit(cluster: &Cluster, mut document: Document, conflicts: Conflicts) -> Result<FineTuneJob, Error> {
    document.value["metadata"]["namespace"] = cluster.namespace.clone().into();
    let Name::Given(name) = document.name else {
        let job = cluster.create(document.value).await?;
        print(format!("{} created\n", object_name(&job.name_any())))?;
        return Ok(job);
    };
    let before = cluster.jobs().get_opt(&name).await;
    let before = before.map_err(|error| explain(&error, &cluster.asked("get", "finetunejobs")))?;
    let job = cluster.apply(&name, &document.value, conflicts).await?;
    print(format!("{} {}\n", object_name(&name), change(before.as_ref(), &job)))?;
    if outcome(&job).is_some() {
        tell(&format!(
            "{name} had ended before; to run it again: kubectl delete finetunejob {name} -n {}, and the same command",
            cluster.namespace
        ));
    }
    Ok(job)
}

/// kubectl's words.
fn change(before: Option<&FineTuneJob>, after: &FineTuneJob) -> &'static str {
    match before {
        None => "created",
        Some(before) if before.resource_version() == after.resource_version() => "unchanged",
        Some(_) => "configured",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{client, training};

    const MINIMAL: &str = include_str!("../../crds/examples/minimal.yaml");

    #[test]
    fn a_file_is_applied_as_it_was_written() {
        let document = parse(MINIMAL).expect("a job");
        assert_eq!(document.name, Name::Given("support-bot".into()));
        let fields: Vec<&String> = document.value["spec"].as_object().expect("a map").keys().collect();
        assert_eq!(fields, ["model", "dataset", "method"], "defaults are the API server's");
    }

    #[tokio::test]
    async fn what_the_api_server_names_is_created_each_time() {
        let cluster = Cluster::fake(client(|request| {
            assert_eq!(request.method(), "POST", "apply needs a name");
            let query = request.uri().query().unwrap_or_default();
            assert!(request.uri().path().ends_with("/namespaces/team-a/finetunejobs"), "{}", request.uri());
            assert!(query.contains("fieldManager=kubectl-finetune"), "{query}");
            let mut made = serde_json::to_value(training()).expect("JSON");
            made["metadata"]["name"] = "support-bot-x7k2p".into();
            (201, made.to_string())
        }));
        let document = parse(&MINIMAL.replace("name: support-bot", "generateName: support-bot-")).expect("a job");
        assert_eq!(document.name, Name::Generated);
        assert_eq!(document.value["metadata"], serde_json::json!({"generateName": "support-bot-"}), "ours is not sent");
        let job = submit(&cluster, document, Conflicts::Refuse).await.expect("made");
        assert_eq!(job.name_any(), "support-bot-x7k2p", "what is followed is what the server made");
    }

    #[test]
    fn problems_stand_at_their_line() {
        let error = parse(&MINIMAL.replace("LoRA", "Lora")).expect_err("no such method");
        assert!(error.len() == 1 && error[0].starts_with("7:19: spec.method.type: found \"Lora\""), "{error:?}");
        let error = parse(&MINIMAL.replace("s3://acme", "file://acme")).expect_err("a local file");
        assert!(error[0].starts_with("6:26: spec.dataset.train.uri: found a source with file"), "{error:?}");
    }

    #[test]
    fn two_namespaces_are_one_too_many() {
        let document = |namespace: Option<&str>| Document {
            name: Name::Given("bot".into()),
            namespace: namespace.map(str::to_owned),
            value: Value::Null,
        };
        let argument = |namespace: Option<&str>| Target {
            namespace: namespace.map(str::to_owned),
            context: None,
            kubeconfig: None,
        };
        for (file, given, expected) in [
            (None, None, None),
            (Some("a"), None, Some("a")),
            (None, Some("b"), Some("b")),
            (Some("a"), Some("a"), Some("a")),
        ] {
            let target = target(&document(file), &argument(given)).expect("one namespace");
            assert_eq!(target.namespace.as_deref(), expected);
        }
        let error = target(&document(Some("a")), &argument(Some("b"))).expect_err("two namespaces");
        assert_eq!(error.to_string(), "metadata.namespace is a and --namespace is b: leave one of them out");
    }
}
