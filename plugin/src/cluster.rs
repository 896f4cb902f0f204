//! The way to the cluster: the configuration that kubectl uses, and requests whose errors are in words.

use std::path::PathBuf;
use std::time::Duration;

use crds::FineTuneJob;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{DeserializeGuard, Resource as _};
use kube::{Client, Config, ResourceExt};

use crate::error::{Asked, Error, causes, explain, near};
use crate::text::tell;

/// Who we are to the API server when we write.
pub const FIELD_MANAGER: &str = "kubectl-finetune";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Which cluster and namespace, as kubectl's own arguments have it.
#[derive(Clone, Debug, clap::Args)]
pub struct Target {
    /// Namespace of the job; without it that of the context
    #[arg(short, long, global = true)]
    pub namespace: Option<String>,
    /// Context of the kubeconfig
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// Path of the kubeconfig; without it $KUBECONFIG or ~/.kube/config
    #[arg(long, global = true)]
    pub kubeconfig: Option<PathBuf>,
}

/// A cluster and the namespace that commands are about.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    url: String,
    /// Where the jobs are.
    pub namespace: String,
}

impl Cluster {
    /// Reads the configuration; nothing is asked yet.
    pub async fn connect(target: &Target) -> Result<Self, Error> {
        let mut config = configuration(target).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        let url = config.cluster_url.to_string();
        let namespace = target.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| Error::Configuration(causes(&error)))?;
        Ok(Self { client, url, namespace })
    }

    /// A cluster whose API server is a function.
    #[cfg(test)]
    pub fn fake(client: Client) -> Self {
        Self { client, url: "https://fake/".into(), namespace: "team-a".into() }
    }

    /// The jobs of the namespace.
    pub fn jobs(&self) -> Api<FineTuneJob> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The pods of the namespace.
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// What an error of a request in the namespace is called.
    pub fn asked(&self, verb: &'static str, resource: &'static str) -> Asked {
        Asked { verb, resource, namespace: Some(self.namespace.clone()), url: self.url.clone() }
    }

    /// One job; if there is none, names that may have been meant.
    pub async fn job(&self, name: &str) -> Result<FineTuneJob, Error> {
        let error = match self.jobs().get(name).await {
            Ok(job) => return Ok(without_managers(job)),
            Err(error) => explain(&error, &self.asked("get", "finetunejobs")),
        };
        let Error::NotFound { name, namespace, .. } = error else { return Err(error) };
        // Who may get one job may not list them: then the first error is the one to tell.
        let names: Vec<String> =
            self.list(Scope::Namespace).await.unwrap_or_default().iter().map(ResourceExt::name_any).collect();
        let near = near(&name, &names);
        Err(Error::NotFound { name, namespace, near })
    }

    /// All jobs, by namespace and name. One that this version cannot read is told about and left out.
    pub async fn list(&self, scope: Scope) -> Result<Vec<FineTuneJob>, Error> {
        let (api, asked) = match scope {
            Scope::Namespace => {
                let api = Api::<DeserializeGuard<FineTuneJob>>::namespaced(self.client.clone(), &self.namespace);
                (api, self.asked("list", "finetunejobs"))
            }
            Scope::All => {
                (Api::all(self.client.clone()), Asked { namespace: None, ..self.asked("list", "finetunejobs") })
            }
        };
        let found = api.list(&ListParams::default()).await.map_err(|error| explain(&error, &asked))?;
        let mut jobs = Vec::new();
        for guarded in found {
            match guarded.0 {
                Ok(job) => jobs.push(without_managers(job)),
                Err(invalid) => {
                    let name = invalid.metadata.name.as_deref().unwrap_or_default();
                    tell(&format!("warning: {name} is left out: {}", invalid.error));
                }
            }
        }
        jobs.sort_by_key(|job| (job.namespace(), job.name_any()));
        Ok(jobs)
    }

    /// Changes fields of the spec.
    pub async fn merge(&self, name: &str, spec: serde_json::Value) -> Result<FineTuneJob, Error> {
        let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        let patched = self.jobs().patch(name, &parameters, &patch).await;
        patched.map_err(|error| explain(&error, &self.asked("patch", "finetunejobs")))
    }

    /// A new job, which the API server names.
    pub async fn create(&self, document: serde_json::Value) -> Result<FineTuneJob, Error> {
        // As it was written: a FineTuneJob would bring defaults along, and we would own them.
        let object: DynamicObject = serde_json::from_value(document)
            .map_err(|error| Error::Broken(format!("the file is no object: {error}")))?;
        let resource = ApiResource::erase::<FineTuneJob>(&());
        let jobs = Api::<DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let parameters = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        let created = jobs.create(&parameters, &object).await;
        let created = created.map_err(|error| explain(&error, &self.asked("create", "finetunejobs")))?;
        created.try_parse().map_err(|error| Error::Broken(format!("the API server's answer is no job: {error}")))
    }

    /// The newest state of the file's job, applied.
    pub async fn apply(
        &self,
        name: &str,
        document: &serde_json::Value,
        conflicts: Conflicts,
    ) -> Result<FineTuneJob, Error> {
        let parameters = PatchParams::apply(FIELD_MANAGER);
        let parameters = if conflicts == Conflicts::Win { parameters.force() } else { parameters };
        let applied = self.jobs().patch(name, &parameters, &Patch::Apply(document)).await;
        applied.map_err(|error| match explain(&error, &self.asked("patch", "finetunejobs")) {
            Error::Refused { said, .. } if said.contains("conflict") => Error::Usage(format!(
                "{said}\nfields of the file were set by others; --force-conflicts sets them as the file says"
            )),
            other => other,
        })
    }
}

/// Which namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// That of the command.
    Namespace,
    /// All.
    All,
}

/// What becomes of fields that somebody else set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflicts {
    /// The command ends.
    Refuse,
    /// The file wins.
    Win,
}

/// As kubectl shows objects: who set which field fills pages, and says nothing about a job.
fn without_managers(mut job: FineTuneJob) -> FineTuneJob {
    job.metadata.managed_fields = None;
    job
}

async fn configuration(target: &Target) -> Result<Config, Error> {
    let options = KubeConfigOptions { context: target.context.clone(), ..KubeConfigOptions::default() };
    let configured = match &target.kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path);
            let read = read.map_err(|error| Error::Configuration(causes(&error)))?;
            Config::from_custom_kubeconfig(read, &options).await
        }
        None if target.context.is_some() => Config::from_kubeconfig(&options).await,
        None => {
            return Config::infer().await.map_err(|error| Error::Configuration(causes(&error)));
        }
    };
    configured.map_err(|error| Error::Configuration(causes(&error)))
}

/// `finetunejob.finetune.dev/NAME`, as kubectl names objects.
pub fn object_name(name: &str) -> String {
    format!("{}.{}/{name}", FineTuneJob::kind(&()).to_lowercase(), FineTuneJob::group(&()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixture::{client, training};

    #[tokio::test]
    async fn a_job_that_is_not_there_is_told_with_its_neighbours() {
        let cluster = Cluster::fake(client(|request| {
            if request.uri().path().ends_with("/support-bt") {
                let details = json!({"name": "support-bt", "group": "finetune.dev", "kind": "finetunejobs"});
                let status = json!({"code": 404, "reason": "NotFound", "message": "not found", "details": details});
                return (404, status.to_string());
            }
            let items = vec![serde_json::to_value(training()).expect("JSON"), json!({"metadata": {"name": "broken"}})];
            let list = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJobList", "metadata": {}, "items": items});
            (200, list.to_string())
        }));
        let error = cluster.job("support-bt").await.expect_err("no such job");
        let expected = "there is no FineTuneJob support-bt in namespace team-a; did you mean support-bot?";
        assert_eq!(error.to_string(), expected);
        let jobs = cluster.list(Scope::All).await.expect("a list");
        assert_eq!(jobs.iter().map(ResourceExt::name_any).collect::<Vec<_>>(), ["support-bot"], "one cannot be read");
    }

    #[tokio::test]
    async fn without_a_cluster_the_address_or_the_file_is_told() {
        let target = Target { namespace: None, context: None, kubeconfig: Some("/nowhere/config".into()) };
        let Err(error) = Cluster::connect(&target).await else { panic!("there is no such file") };
        let text = error.to_string();
        assert!(text.starts_with("no cluster is configured: ") && text.contains("/nowhere/config"), "{text}");
        let closed: http::Uri = "http://127.0.0.1:1/".parse().expect("an address");
        let client = Client::try_from(Config::new(closed)).expect("a client");
        let error = Cluster::fake(client).list(Scope::Namespace).await.expect_err("a closed port");
        assert!(error.to_string().starts_with("https://fake/: the API server cannot be reached: "), "{error}");
    }
}
