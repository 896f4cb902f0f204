//! What can go wrong between a person and his jobs, each with what to do about it.

use std::io;
use std::path::PathBuf;

use kube::core::Status;

/// How the operator gets onto a cluster.
const INSTALL: &str =
    "helm install finetune-operator charts/finetune-operator --namespace finetune-system --create-namespace";

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no cluster to talk to.
    #[error("no cluster is configured: {0}; set KUBECONFIG, pass --kubeconfig FILE, or write ~/.kube/config")]
    Configuration(String),
    /// Nobody answers.
    #[error(
        "{url}: the API server cannot be reached: {cause}; check the network and the context (kubectl config current-context)"
    )]
    Unreachable {
        /// Of the API server.
        url: String,
        /// The innermost causes.
        cause: String,
    },
    /// It does not know who asks.
    #[error("{url}: the API server does not accept your credentials; log in again, or choose another --context")]
    Unauthorized {
        /// Of the API server.
        url: String,
    },
    /// It does not know the kind.
    #[error("the cluster has no FineTuneJobs; install the chart:\n  {INSTALL}")]
    NotInstalled,
    /// There is no such namespace.
    #[error("there is no namespace {0}; kubectl create namespace {0}")]
    NoNamespace(String),
    /// The person may not.
    #[error(
        "you may not {verb} {resource} in {place}; the cluster role {role} allows it:\n  \
         kubectl create rolebinding NAME -n NAMESPACE --clusterrole={role} --user=YOU\nthe API server says: {said}"
    )]
    Forbidden {
        /// What was tried.
        verb: &'static str,
        /// On what.
        resource: &'static str,
        /// In a namespace, or in all.
        place: String,
        /// Who may.
        role: &'static str,
        /// The API server's sentence.
        said: String,
    },
    /// There is no such job.
    #[error("there is no FineTuneJob {name} in namespace {namespace}{}", suggestion(.near))]
    NotFound {
        /// Asked for.
        name: String,
        /// Where it was looked for.
        namespace: String,
        /// Names that may have been meant.
        near: Vec<String>,
    },
    /// The API server refused, for a reason that it tells.
    #[error("the API server refused to {verb} {resource}: {said}")]
    Refused {
        /// What was tried.
        verb: &'static str,
        /// On what.
        resource: &'static str,
        /// Its sentence.
        said: String,
    },
    /// A watch or a stream broke in a way that trying again does not mend.
    #[error("{0}")]
    Broken(String),
    /// A file of the user.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file for the user.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a job that a cluster takes.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
    /// An argument that does not fit.
    #[error("{0}")]
    Usage(String),
    /// There is nothing to show.
    #[error("{0}")]
    Nothing(String),
    /// Standard output.
    #[error("standard output: {0}")]
    Output(io::Error),
}

impl Error {
    /// Whether the reader of standard output went away, which is his right.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn suggestion(near: &[String]) -> String {
    match near {
        [] => "; kubectl finetune list -A shows all".to_owned(),
        near => format!("; did you mean {}?", near.join(" or ")),
    }
}

/// What was asked of the API server.
#[derive(Clone, Debug)]
pub struct Asked {
    /// As roles have it.
    pub verb: &'static str,
    /// As roles have it.
    pub resource: &'static str,
    /// `None`: all.
    pub namespace: Option<String>,
    /// Of the API server.
    pub url: String,
}

/// Whether trying again cannot help until a person does something.
pub fn is_final(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404))
}

/// A failed request, in words.
pub fn explain(error: &kube::Error, asked: &Asked) -> Error {
    match error {
        kube::Error::Api(status) => explain_status(status, asked),
        kube::Error::HyperError(cause) => Error::Unreachable { url: asked.url.clone(), cause: causes(cause) },
        kube::Error::Service(cause) => Error::Unreachable { url: asked.url.clone(), cause: causes(cause.as_ref()) },
        // Credentials that could not be had, an answer that is no object, …
        other => Error::Broken(format!("{}: {}", asked.url, causes(other))),
    }
}

fn explain_status(status: &Status, asked: &Asked) -> Error {
    let (name, kind) =
        status.details.as_ref().map_or(("", ""), |details| (details.name.as_str(), details.kind.as_str()));
    let namespace = asked.namespace.clone().unwrap_or_default();
    match status.code {
        401 => Error::Unauthorized { url: asked.url.clone() },
        403 if !status.message.contains("exceeded quota") => Error::Forbidden {
            verb: asked.verb,
            resource: asked.resource,
            place: asked.namespace.as_ref().map_or("all namespaces".into(), |name| format!("namespace {name}")),
            role: role(asked),
            said: status.message.clone(),
        },
        404 if kind == "namespaces" => Error::NoNamespace(name.to_owned()),
        404 if name.is_empty() && asked.resource == "finetunejobs" => Error::NotInstalled,
        404 if asked.resource == "finetunejobs" => {
            Error::NotFound { name: name.to_owned(), namespace, near: Vec::new() }
        }
        _ => Error::Refused { verb: asked.verb, resource: asked.resource, said: status.message.clone() },
    }
}

/// Kubernetes' own roles, which take up those of the chart, whatever its release is called; pods are theirs anyway.
fn role(asked: &Asked) -> &'static str {
    match asked.verb {
        "get" | "list" | "watch" => "view",
        _ => "edit",
    }
}

/// An error and its causes, each said once.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text += &format!(": {said}");
        }
        next = cause.source();
    }
    text
}

/// Names that may have been meant, nearest first.
pub fn near(name: &str, names: &[String]) -> Vec<String> {
    let most = (name.chars().count() / 3).max(2);
    let mut found: Vec<(usize, &String)> = names
        .iter()
        .map(|other| (strsim::osa_distance(name, other), other))
        .filter(|(distance, other)| *distance <= most || (name.len() >= 3 && other.contains(name)))
        .collect();
    found.sort();
    found.into_iter().take(3).map(|(_, other)| other.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(verb: &'static str) -> Asked {
        Asked { verb, resource: "finetunejobs", namespace: Some("team".into()), url: "https://host:6443/".into() }
    }

    fn said(verb: &'static str, status: serde_json::Value) -> String {
        let status: Status = serde_json::from_value(status).expect("a Status");
        explain(&kube::Error::Api(status.boxed()), &asked(verb)).to_string()
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        for (verb, status, expected) in [
            (
                "list",
                serde_json::json!({"code": 404, "message": "404 page not found"}),
                "install the chart:\n  helm install",
            ),
            (
                "get",
                serde_json::json!({"code": 404, "message": "the server could not find the requested resource", "details": {}}),
                "install the chart",
            ),
            (
                "get",
                serde_json::json!({"code": 404, "message": "x", "details": {"name": "bot", "kind": "finetunejobs"}}),
                "there is no FineTuneJob bot in namespace team; kubectl finetune list -A shows all",
            ),
            (
                "patch",
                serde_json::json!({"code": 404, "message": "x", "details": {"name": "team", "kind": "namespaces"}}),
                "there is no namespace team; kubectl create namespace team",
            ),
            (
                "patch",
                serde_json::json!({"code": 403, "message": "User \"u\" cannot patch"}),
                "you may not patch finetunejobs in namespace team; the cluster role edit allows it",
            ),
            ("watch", serde_json::json!({"code": 403, "message": "no"}), "the cluster role view allows it"),
            ("get", serde_json::json!({"code": 401, "message": "Unauthorized"}), "log in again"),
            (
                "patch",
                serde_json::json!({"code": 422, "message": "spec: training inputs are immutable"}),
                "the API server refused to patch finetunejobs: spec: training inputs are immutable",
            ),
        ] {
            let text = said(verb, status);
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn names_that_were_meant_are_found() {
        let names = ["support-bot", "support-bot-full", "translate", "x"].map(str::to_owned);
        assert_eq!(near("suport-bot", &names), ["support-bot"]);
        assert_eq!(near("support-bto", &names), ["support-bot"]);
        assert_eq!(near("support", &names), ["support-bot", "support-bot-full"]);
        assert_eq!(near("quite-another", &names), Vec::<String>::new());
    }

    #[test]
    fn a_closed_pipe_is_told_from_a_full_disk() {
        assert!(Error::Output(io::Error::from(io::ErrorKind::BrokenPipe)).is_closed_pipe());
        assert!(!Error::Output(io::Error::from(io::ErrorKind::StorageFull)).is_closed_pipe());
    }
}
