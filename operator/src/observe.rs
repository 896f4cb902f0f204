//! What there is of a job: its plan, the newest attempt's Job and pods, and what was heard from them. From caches, with one
//! exception: an object that the caches lack is asked for before it is called missing.

pub mod pods;
pub mod progress;
pub mod queue;

use crds::finetunejob::{FineTuneJob, JobReference};
use crds::report::{Progress, Report};
use crds::run::PodStage;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, ResourceExt};

use self::pods::Pods;
use self::progress::ProgressBoard;
use self::queue::Queues;
use crate::build::{self, CONTAINER};
use crate::status::is_terminal;
use crate::validate::{Plan, digest_of_files};

/// Everything that a decision about a job may depend on, besides the job itself and the time.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The plan that was made when the job was accepted.
    pub plan: Option<Plan>,
    /// Why there is one that this version does not understand.
    pub unreadable_plan: Option<String>,
    /// The newest attempt of `status.jobRefs`.
    pub attempt: Option<AttemptSeen>,
    /// The Job that reads an attempt's report from the volume, if it was made.
    pub report_job: Option<AttemptSeen>,
    /// What a running trainer told last.
    pub progress: Option<Progress>,
    /// What the queue says of a Job that it holds.
    pub queue: Option<QueueSeen>,
}

/// A Job and its pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttemptSeen {
    /// The Job.
    pub job: JobSeen,
    /// Its pods, newest last.
    pub pods: Vec<PodSeen>,
}

/// What became of a Job.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum JobSeen {
    /// There is none.
    #[default]
    Missing,
    /// Somebody else's object has its name.
    Foreign,
    /// It is there.
    Present {
        /// `metadata.uid`.
        uid: String,
        /// `metadata.creationTimestamp`
        created: Option<Time>,
        /// Held by its `spec.suspend`.
        suspended: bool,
        /// It is complete or failed, or being deleted.
        finished: bool,
        /// Reason and message of its condition `Failed`.
        failure: Option<(String, String)>,
    },
}

/// What a pod shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodSeen {
    /// `metadata.name`
    pub name: String,
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.creationTimestamp`
    pub created: Option<Time>,
    /// It has not ended: its containers may still write.
    pub live: bool,
    /// It ended before a container ran: the kubelet's reason and sentence.
    pub rejected: Option<(String, String)>,
    /// It was asked to end.
    pub terminating: bool,
    /// No node can take it: the scheduler's sentence.
    pub unschedulable: Option<String>,
    /// Its container cannot start: the kubelet's reason and sentence.
    pub waiting: Option<(String, String)>,
    /// When its container began to run.
    pub started: Option<Time>,
    /// Its container runs.
    pub running: bool,
    /// How its container ended.
    pub terminated: Option<Terminated>,
    /// Something took it away (`DisruptionTarget`): the condition's reason.
    pub disrupted: Option<String>,
}

/// How a container ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terminated {
    /// 128 and more: by a signal.
    pub exit_code: i32,
    /// It exceeded its memory limit, or its node ran out.
    pub oom_killed: bool,
    /// Its termination message, unread.
    pub message: Option<String>,
    /// When it ended.
    pub finished: Option<Time>,
}

impl AttemptSeen {
    /// The pod that was made last.
    pub fn newest_pod(&self) -> Option<&PodSeen> {
        self.pods.last()
    }

    /// Whether a container of it may still write.
    pub fn is_live(&self) -> bool {
        self.pods.iter().any(|pod| pod.live)
    }

    /// Whether nothing of it will run any more.
    pub fn has_ended(&self) -> bool {
        let job_is_done = match &self.job {
            JobSeen::Missing => true,
            JobSeen::Foreign => false,
            JobSeen::Present { finished, .. } => *finished,
        };
        job_is_done && !self.is_live()
    }

    /// The last word of its newest pod, if it is one of this attempt.
    pub fn report(&self, job_uid: &str, stage: PodStage, attempt: i32) -> Option<Report> {
        let message = self.newest_pod()?.terminated.as_ref()?.message.as_deref()?;
        // Whatever does not parse may be a piece of log, and is never copied anywhere.
        let report: Report = serde_json::from_str(message).ok()?;
        report.is_of(job_uid, stage, attempt).then_some(report)
    }
}

/// A running trainer that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    /// When it was first asked in vain.
    pub since: Timestamp,
    /// Why, without numbers that change.
    pub why: String,
}

/// What Kueue says of a Job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueSeen {
    /// Nobody serves queues here.
    ControllerMissing,
    /// The Job waits: the Workload's reason and message.
    Waiting(String),
    /// Its quota was taken back.
    Evicted(String),
}

/// An object could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("cannot read {kind} {name}")]
    Get {
        /// For example `Job`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// What observing reads from.
#[derive(Clone, Debug)]
pub struct Caches {
    /// Jobs that this operator made.
    pub jobs: Store<Job>,
    /// Their pods, metadata and status only.
    pub pods: Pods,
}

impl Caches {
    /// Returns when both hold what the API server held when it was first asked.
    pub async fn wait_until_ready(&self) {
        // A writer that was dropped ends the controller, and this pass with it.
        let _ = self.jobs.wait_until_ready().await;
        let _ = self.pods.store.wait_until_ready().await;
    }
}

/// Looks at the newest attempt of a job.
pub async fn observe(
    client: &Client,
    caches: &Caches,
    job: &FineTuneJob,
    known_plan: Option<Plan>,
    board: &ProgressBoard,
    queues: &Queues,
) -> Result<Observed, Error> {
    let status = job.status.clone().unwrap_or_default();
    let Some(current) = status.job_refs.last() else { return Ok(Observed::default()) };
    let digest = status.resolved.as_ref().and_then(|resolved| resolved.plan_digest.as_deref());
    let recorded = match known_plan {
        Some(plan) => Ok(Some(plan)),
        // Nothing is made any more.
        None if is_terminal(&status) => Ok(None),
        None => recorded_plan(client, job, digest).await?,
    };
    let (plan, unreadable_plan) = recorded.map_or_else(|why| (None, Some(why)), |plan| (plan, None));
    let attempt = attempt(client, caches, job, current).await?;
    let report_name = build::report_job_name(job, current);
    let report_job = find_job(caches, job, &report_name)
        .map(|found| AttemptSeen { pods: pods_of(caches, job, found.uid().as_deref()), job: job_seen(&found, job) });
    let queued = matches!(attempt.job, JobSeen::Present { suspended: true, finished: false, .. });
    let queue = match (&attempt.job, queued) {
        (JobSeen::Present { uid, .. }, true) => queues.seen(uid),
        _ => None,
    };
    let uid = job.uid().unwrap_or_default();
    let progress = attempt.pods.iter().rev().find_map(|pod| board.get(&pod.uid, &uid));
    Ok(Observed { plan, unreadable_plan, attempt: Some(attempt), report_job, progress, queue })
}

/// The plan in the ConfigMap, if it is the one that the job was accepted with; or what this version does not understand in it.
async fn recorded_plan(
    client: &Client,
    job: &FineTuneJob,
    digest: Option<&str>,
) -> Result<Result<Option<Plan>, String>, Error> {
    let name = build::config_map_name(job);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let failed = |source| Error::Get { kind: "ConfigMap", name: name.clone(), source: Box::new(source) };
    let Some(map) = maps.get_opt(&name).await.map_err(failed)? else { return Ok(Ok(None)) };
    let file = |name: &str| map.data.as_ref().and_then(|data| data.get(name)).map_or("", String::as_str);
    // Whoever may make a ConfigMap can make one that names the job as its owner; the status is the operator's alone.
    if digest != Some(digest_of_files(file(build::RUN_FILE), file(build::PLAN_FILE)).as_str()) {
        return Ok(Ok(None));
    }
    let plan = serde_saphyr::from_str(file(build::PLAN_FILE));
    Ok(plan.map(Some).map_err(|error| error.without_snippet().to_string()))
}

async fn attempt(
    client: &Client,
    caches: &Caches,
    job: &FineTuneJob,
    current: &JobReference,
) -> Result<AttemptSeen, Error> {
    if let Some(found) = find_job(caches, job, &current.name) {
        return Ok(AttemptSeen { job: job_seen(&found, job), pods: pods_of(caches, job, found.uid().as_deref()) });
    }
    let pods = pods_of(caches, job, current.uid.as_deref());
    // A Job that was seen before and is in no cache: the cache may be behind, or the Job is gone.
    if current.uid.is_none() || current.outcome.is_some() {
        return Ok(AttemptSeen { job: JobSeen::Missing, pods });
    }
    let jobs: Api<Job> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let failed = |source| Error::Get { kind: "Job", name: current.name.clone(), source: Box::new(source) };
    let found = jobs.get_opt(&current.name).await.map_err(failed)?;
    Ok(AttemptSeen { job: found.map_or(JobSeen::Missing, |found| job_seen(&found, job)), pods })
}

fn find_job(caches: &Caches, job: &FineTuneJob, name: &str) -> Option<std::sync::Arc<Job>> {
    caches.jobs.get(&ObjectRef::new(name).within(&job.namespace().unwrap_or_default()))
}

fn job_seen(found: &Job, job: &FineTuneJob) -> JobSeen {
    if !build::is_owned_by(&found.metadata, job) {
        return JobSeen::Foreign;
    }
    let conditions = found.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let is_true =
        |name: &str| conditions.iter().find(|condition| condition.type_ == name && condition.status == "True");
    let failed = is_true("Failed");
    JobSeen::Present {
        uid: found.uid().unwrap_or_default(),
        created: found.metadata.creation_timestamp.clone(),
        suspended: found.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or(false),
        finished: failed.is_some() || is_true("Complete").is_some() || found.metadata.deletion_timestamp.is_some(),
        failure: failed.map(|condition| {
            (condition.reason.clone().unwrap_or_default(), condition.message.clone().unwrap_or_default())
        }),
    }
}

/// Pods of the Job with this UID, oldest first. Labels prove nothing: anybody may set them.
fn pods_of(caches: &Caches, job: &FineTuneJob, child_uid: Option<&str>) -> Vec<PodSeen> {
    let Some(child_uid) = child_uid else { return Vec::new() };
    let of_job = caches.pods.of_job(&job.uid().unwrap_or_default());
    let is_of = |pod: &Pod| pod.metadata.namespace == job.namespace() && controller_uid(pod) == Some(child_uid);
    let mut pods: Vec<PodSeen> = of_job.iter().filter(|pod| is_of(pod)).map(|pod| pod_seen(pod)).collect();
    pods.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    pods
}

/// `metadata.uid` of the Job that a pod belongs to.
pub fn controller_uid(pod: &Pod) -> Option<&str> {
    build::controller(&pod.metadata).map(|owner| owner.uid.as_str())
}

/// What a pod shows, of its trainer container.
pub fn pod_seen(pod: &Pod) -> PodSeen {
    let status = pod.status.clone().unwrap_or_default();
    let condition = |name: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == name);
    let container: Option<&ContainerStatus> =
        status.container_statuses.iter().flatten().find(|container| container.name == CONTAINER);
    let state = container.and_then(|container| container.state.clone()).unwrap_or_default();
    let phase = status.phase.as_deref().unwrap_or_default();
    PodSeen {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        created: pod.metadata.creation_timestamp.clone(),
        live: !matches!(phase, "Succeeded" | "Failed"),
        rejected: (phase == "Failed" && container.is_none())
            .then(|| (status.reason.clone().unwrap_or_default(), status.message.clone().unwrap_or_default())),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        unschedulable: condition("PodScheduled")
            .filter(|condition| condition.status == "False" && condition.reason.as_deref() == Some("Unschedulable"))
            .and_then(|condition| condition.message.clone()),
        // What goes by itself has no message.
        waiting: state.waiting.and_then(|waiting| Some((waiting.reason?, waiting.message?))),
        started: state
            .running
            .as_ref()
            .and_then(|running| running.started_at.clone())
            .or_else(|| state.terminated.as_ref().and_then(|terminated| terminated.started_at.clone())),
        running: state.running.is_some(),
        terminated: state.terminated.map(|terminated| Terminated {
            exit_code: terminated.exit_code,
            oom_killed: terminated.reason.as_deref() == Some("OOMKilled"),
            message: terminated.message,
            finished: terminated.finished_at,
        }),
        disrupted: condition("DisruptionTarget")
            .filter(|condition| condition.status == "True")
            .map(|condition| condition.reason.clone().unwrap_or_default()),
    }
}
