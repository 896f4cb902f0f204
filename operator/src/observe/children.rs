//! Jobs and pods of an attempt. Names, labels and owner references prove nothing, since whoever may create a pod may write them:
//! a Job is ours by the UID that was noted when it was made, or by what it would run; a pod is by what it runs.

use std::sync::Arc;

use crds::FineTuneJob;
use crds::finetunejob::JobReference;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, ListParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Client, ResourceExt};

use crate::build::{self, CONTAINER, Placement, build_report_job, build_stage_job, job_digest};
use crate::caches::{Caches, prune_job, pruned_digest};
use crate::call;
use crate::facts::{AttemptSeen, FailedInit, JobSeen, PodSeen, Stranger, Terminated, Waiting};
use crate::validate::Plan;

/// The newest attempt.
pub(super) async fn attempt(
    client: &Client,
    caches: &Caches,
    job: &FineTuneJob,
    plan: Option<&Plan>,
    newest: &JobReference,
) -> Result<AttemptSeen, call::Error> {
    let expected = || job_digest(&build_stage_job(job, plan?, newest, &Placement::default()));
    let mut found = find_job(caches, job, &newest.name);
    // A Job that was seen before and is in no cache: the cache may be behind, or the Job is gone.
    if found.is_none() && newest.uid.is_some() && newest.outcome.is_none() {
        let namespace = job.namespace().unwrap_or_default();
        let jobs: Api<Job> = Api::namespaced(client.clone(), &namespace);
        let asked = jobs.get_opt(&newest.name).await;
        let asked = asked.map_err(|source| call::Error::one::<Job>("get", &namespace, &newest.name, source))?;
        found = asked.map(|mut asked| {
            prune_job(&mut asked);
            Arc::new(asked)
        });
    }
    let seen = match (&found, &newest.uid) {
        (None, _) => JobSeen::Missing,
        // It was made anew since, by somebody else: that of the attempt is gone.
        (Some(found), Some(uid)) if found.uid().as_ref() != Some(uid) => JobSeen::Missing,
        (Some(found), Some(_)) => job_seen(found),
        // Made, and not noted before the operator died, or made by somebody else for the operator to find. What it would read
        // is what was planned: without the recorded plan it is not ours.
        (Some(found), None) => {
            let is_ours = build::is_owned_by(&found.metadata, job)
                && build::makes_one_pod(found)
                && expected().is_some_and(|expected| pruned_digest(&**found) == Some(&expected));
            if is_ours { job_seen(found) } else { JobSeen::Foreign }
        }
    };
    let uid = match &seen {
        JobSeen::Present { uid, .. } => Some(uid.clone()),
        JobSeen::Missing | JobSeen::Foreign => newest.uid.clone(),
    };
    // Of an attempt that another version made without noting what its pod runs, every pod of its Job counts.
    let digest = newest.pod_digest.clone().or_else(|| expected().filter(|_| newest.uid.is_none()));
    let (pods, mut strangers) = pods_of(caches, job, &newest.name, uid.as_deref(), digest.as_deref());
    if let (Some(stranger), JobSeen::Present { .. }) = (strangers.first_mut(), &seen) {
        let differences = differences(client, job, &newest.name, &stranger.pod.name).await;
        stranger.differs_in = differences.unwrap_or_else(|error| {
            tracing::warn!("{}: in what {} differs is not known: {error}", job.name_any(), stranger.pod.name);
            Vec::new()
        });
    }
    let pod_digest = found.as_deref().and_then(pruned_digest).map(str::to_owned);
    Ok(AttemptSeen { job: seen, pod_digest, pods, strangers })
}

/// In what a pod is not the one that a Job would make. Caches do not hold that much of either; strangers are few. It is for people:
/// nothing is decided by it.
async fn differences(client: &Client, job: &FineTuneJob, child: &str, pod: &str) -> Result<Vec<String>, kube::Error> {
    let namespace = job.namespace().unwrap_or_default();
    let (jobs, pods): (Api<Job>, Api<Pod>) =
        (Api::namespaced(client.clone(), &namespace), Api::namespaced(client.clone(), &namespace));
    let template = jobs.get_opt(child).await?.and_then(|found| found.spec?.template.spec);
    // The operator may list pods, and not get one.
    let named = ListParams::default().fields(&format!("metadata.name={pod}"));
    let pod = pods.list(&named).await?.items.into_iter().next().and_then(|found| found.spec);
    Ok(template.zip(pod).map(|(template, pod)| build::differences(&template, &pod)).unwrap_or_default())
}

/// The Job that reads the volume of an attempt, if there is one.
pub(super) fn report_job(
    caches: &Caches,
    job: &FineTuneJob,
    plan: Option<&Plan>,
    newest: &JobReference,
) -> Option<AttemptSeen> {
    let name = build::report_job_name(job, newest);
    let found = find_job(caches, job, &name)?;
    let expected = plan.and_then(|plan| job_digest(&build_report_job(job, plan, newest)));
    let is_another = expected.is_some() && pruned_digest(&*found) != expected.as_deref();
    if !build::is_owned_by(&found.metadata, job) || !build::makes_one_pod(&found) || is_another {
        return Some(AttemptSeen { job: JobSeen::Foreign, ..AttemptSeen::default() });
    }
    let (pods, strangers) = pods_of(caches, job, &name, found.uid().as_deref(), expected.as_deref());
    Some(AttemptSeen { job: job_seen(&found), pod_digest: expected, pods, strangers })
}

fn find_job(caches: &Caches, job: &FineTuneJob, name: &str) -> Option<Arc<Job>> {
    caches.jobs.get(&ObjectRef::new(name).within(&job.namespace().unwrap_or_default()))
}

fn job_seen(found: &Job) -> JobSeen {
    let status = found.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let is_true =
        |name: &str| conditions.iter().find(|condition| condition.type_ == name && condition.status == "True");
    let failed = is_true("Failed");
    JobSeen::Present {
        uid: found.uid().unwrap_or_default(),
        released: status
            .and_then(|status| status.start_time.clone())
            .or_else(|| found.metadata.creation_timestamp.clone()),
        suspended: found.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or(false),
        finished: failed.is_some() || is_true("Complete").is_some() || found.metadata.deletion_timestamp.is_some(),
        failure: failed.map(|condition| {
            (condition.reason.clone().unwrap_or_default(), condition.message.clone().unwrap_or_default())
        }),
    }
}

/// Pods of the Job with this name and UID, oldest first, and those that live and are not what they say.
fn pods_of(
    caches: &Caches,
    job: &FineTuneJob,
    name: &str,
    uid: Option<&str>,
    digest: Option<&str>,
) -> (Vec<PodSeen>, Vec<Stranger>) {
    let mut pods = Vec::new();
    let mut strangers = Vec::new();
    for pod in caches.pods.of_job(&job.uid().unwrap_or_default()) {
        let owner = build::controller(&pod.metadata).filter(|owner| owner.name == name);
        let Some(owner) = owner.filter(|_| pod.metadata.namespace == job.namespace()) else { continue };
        let seen = pod_seen(&pod);
        let runs_what_it_must = digest.is_none_or(|digest| pruned_digest(&*pod) == Some(digest));
        if Some(owner.uid.as_str()) == uid && runs_what_it_must {
            pods.push(seen);
        } else if seen.live {
            strangers.push(Stranger { pod: seen, differs_in: Vec::new() });
        }
    }
    pods.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    strangers.sort_by(|a: &Stranger, b| a.pod.name.cmp(&b.pod.name));
    (pods, strangers)
}

/// `metadata.uid` of the Job that a pod belongs to.
pub fn controller_uid(pod: &Pod) -> Option<&str> {
    build::controller(&pod.metadata).map(|owner| owner.uid.as_str())
}

/// What a pod shows.
pub fn pod_seen(pod: &Pod) -> PodSeen {
    let status = pod.status.clone().unwrap_or_default();
    let condition = |name: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == name);
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let inits = status.init_container_statuses.as_deref().unwrap_or_default();
    let trainer = containers.iter().find(|container| container.name == CONTAINER);
    let state = trainer.map(state_of).unwrap_or_default();
    let has_failed = status.phase.as_deref() == Some("Failed");
    let why = || (status.reason.clone().unwrap_or_default(), status.message.clone().unwrap_or_default());
    let never_ran = state.running.is_none() && state.terminated.is_none();
    let ended_badly = |init: &&ContainerStatus| state_of(init).terminated.is_some_and(|ended| ended.exit_code != 0);
    PodSeen {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        created: pod.metadata.creation_timestamp.clone(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        live: !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        rejected: (has_failed && trainer.is_none()).then(why),
        evicted: status.message.clone().filter(|_| has_failed && status.reason.as_deref() == Some("Evicted")),
        ends_by: pod.metadata.deletion_timestamp.clone(),
        unschedulable: condition("PodScheduled")
            .filter(|condition| condition.status == "False" && condition.reason.as_deref() == Some("Unschedulable"))
            .and_then(|condition| condition.message.clone()),
        scheduled: condition("PodScheduled").is_some_and(|condition| condition.status == "True"),
        waiting: inits.iter().chain(containers).filter(|one| never_ran || one.name == CONTAINER).find_map(waiting),
        failed_init: inits.iter().filter(|_| has_failed && never_ran).find(ended_badly).map(failed_init),
        running_init: inits
            .iter()
            .filter(|_| never_ran)
            .find(|init| holds_the_trainer(init))
            .map(|init| init.name.clone()),
        sidecars: containers
            .iter()
            .filter(|other| other.name != CONTAINER && state_of(other).running.is_some())
            .map(|other| other.name.clone())
            .collect(),
        started: started(&state),
        running: state.running.is_some(),
        terminated: state.terminated.map(|terminated| Terminated {
            exit_code: terminated.exit_code,
            reason: terminated.reason.unwrap_or_default(),
            message: terminated.message,
            finished: terminated.finished_at,
        }),
        disrupted: condition("DisruptionTarget")
            .filter(|condition| condition.status == "True")
            .map(|condition| condition.reason.clone().unwrap_or_default()),
    }
}

fn state_of(container: &ContainerStatus) -> ContainerState {
    container.state.clone().unwrap_or_default()
}

fn started(state: &ContainerState) -> Option<Time> {
    let running = state.running.as_ref().and_then(|running| running.started_at.clone());
    running.or_else(|| state.terminated.as_ref().and_then(|terminated| terminated.started_at.clone()))
}

/// What goes by itself has no message.
fn waiting(container: &ContainerStatus) -> Option<Waiting> {
    let waiting = state_of(container).waiting?;
    Some(Waiting { container: container.name.clone(), reason: waiting.reason?, message: waiting.message? })
}

fn failed_init(init: &ContainerStatus) -> FailedInit {
    let ended = state_of(init).terminated;
    FailedInit {
        container: init.name.clone(),
        exit_code: ended.as_ref().map_or(0, |ended| ended.exit_code),
        message: ended.and_then(|ended| ended.message).unwrap_or_default(),
    }
}

/// Whether an init container runs that must end first. One that is a sidecar has started once it is told so.
fn holds_the_trainer(init: &ContainerStatus) -> bool {
    state_of(init).running.is_some() && init.started != Some(true)
}
