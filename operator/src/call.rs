//! A call of the API server that failed: what was to be done with which object, and why it was not.

use kube::Resource;

/// What could not be done.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {object}")]
pub struct Error {
    /// For example `get`.
    verb: &'static str,
    /// Kind, namespace and name.
    object: String,
    /// Why.
    #[source]
    source: Box<kube::Error>,
}

impl Error {
    /// For one object of a namespace.
    pub fn one<K: Resource<DynamicType = ()>>(
        verb: &'static str,
        namespace: &str,
        name: &str,
        source: kube::Error,
    ) -> Self {
        Self { verb, object: format!("{} {namespace}/{name}", K::kind(&())), source: Box::new(source) }
    }

    /// For what is asked for by no name, such as `Nodes`.
    pub fn many(verb: &'static str, objects: impl Into<String>, source: kube::Error) -> Self {
        Self { verb, object: objects.into(), source: Box::new(source) }
    }

    /// What the API server said, where it said something; its own text is shorter than kube's.
    pub fn cause(&self) -> String {
        match &*self.source {
            kube::Error::Api(status) => status.message.clone(),
            other => other.to_string(),
        }
    }

    /// Whether somebody wrote in between.
    pub fn is_conflict(&self) -> bool {
        matches!(&*self.source, kube::Error::Api(status) if status.is_conflict())
    }
}
