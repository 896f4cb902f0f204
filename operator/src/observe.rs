//! Gathers the facts of a job: its plan, the newest attempt's Job and pods, and what was heard of them. From caches, with these
//! exceptions: an object that the caches lack is asked for before it is called missing, and of a child that does not get on the
//! events are asked for.

mod children;
pub mod nodes;
pub mod progress;
pub mod queue;
mod warning;

use crds::FineTuneJob;
use crds::status::is_terminal;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use kube::{Client, ResourceExt};

use self::progress::ProgressBoard;
use self::queue::Queues;
use crate::build;
use crate::caches::Caches;
use crate::call;
use crate::facts::{JobSeen, Observed};
use crate::validate::{Plan, digest_of_files};

pub use self::children::{controller_uid, pod_seen};

/// Where facts come from.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The API server, for what no cache holds.
    pub client: &'a Client,
    /// Jobs and pods.
    pub caches: &'a Caches,
    /// What running trainers tell.
    pub board: &'a ProgressBoard,
    /// What Kueue says.
    pub queues: &'a Queues,
}

/// Looks at the newest attempt of a job.
pub async fn observe(
    sources: Sources<'_>,
    job: &FineTuneJob,
    known_plan: Option<Plan>,
    now: Timestamp,
) -> Result<Observed, call::Error> {
    let Sources { client, caches, board, queues } = sources;
    let Some(status) = &job.status else { return Ok(Observed::default()) };
    let Some(newest) = status.job_refs.last() else { return Ok(Observed::default()) };
    let digest = status.resolved.as_ref().and_then(|resolved| resolved.plan_digest.as_deref());
    let recorded = match known_plan {
        Some(plan) => Ok(Some(plan)),
        // Nothing is made any more.
        None if is_terminal(status) => Ok(None),
        None => recorded_plan(client, job, digest).await?,
    };
    let (plan, unreadable_plan) = recorded.map_or_else(|why| (None, Some(why)), |plan| (plan, None));
    let attempt = children::attempt(client, caches, job, plan.as_ref(), newest).await?;
    let report_job = children::report_job(caches, job, plan.as_ref(), newest);
    let uid = job.uid().unwrap_or_default();
    let progress = attempt.pods.iter().rev().find_map(|pod| board.get(&pod.uid, &uid));
    let silence = attempt.newest_pod().and_then(|pod| board.silence(&pod.uid));
    let attempt = Some(attempt);
    let mut observed =
        Observed { plan, unreadable_plan, attempt, report_job, progress, silence, ..Observed::default() };
    if let Some(in_question) = observed.in_question().cloned() {
        if let JobSeen::Present { uid, suspended: true, finished: false, .. } = &in_question.job {
            observed.queue = queues.seen(uid);
        }
        observed.warning = warning::warning(client, job, &in_question, now).await;
    }
    Ok(observed)
}

/// The plan in the ConfigMap, if it is the one that the job was accepted with; or what this version does not understand in it.
async fn recorded_plan(
    client: &Client,
    job: &FineTuneJob,
    digest: Option<&str>,
) -> Result<Result<Option<Plan>, String>, call::Error> {
    let namespace = job.namespace().unwrap_or_default();
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
    let get = async |name: String| {
        let found = maps.get_opt(&name).await;
        found.map_err(|source| call::Error::one::<ConfigMap>("get", &namespace, &name, source))
    };
    let map = match get(build::config_map_name(job)).await? {
        Some(map) => map,
        None => match get(build::earlier_config_map_name(job)).await? {
            Some(map) => map,
            None => return Ok(Ok(None)),
        },
    };
    let file = |name: &str| map.data.as_ref().and_then(|data| data.get(name)).map_or("", String::as_str);
    // Whoever may make a ConfigMap can make one that names the job as its owner; the status is the operator's alone.
    if digest != Some(digest_of_files(file(build::RUN_FILE), file(build::PLAN_FILE)).as_str()) {
        return Ok(Ok(None));
    }
    let plan = Plan::read(file(build::RUN_FILE), file(build::PLAN_FILE));
    Ok(plan.map(Some).map_err(|error| error.without_snippet().to_string()))
}
