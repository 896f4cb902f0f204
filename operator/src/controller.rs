//! The watches and the pass over one job: observe → validate → build → apply → status. See [`crate`] for what must hold.

use std::sync::Arc;
use std::time::Duration;

use crds::condition::reason;
use crds::profile::Profiles;
use crds::run::PodStage;
use crds::status::is_terminal;
use crds::{FineTuneJob, FineTuneJobStatus};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::reflector::{self, ObjectRef};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;

use crate::apply::{self, Change, apply, changes};
use crate::build::{JOB_NAME_LABEL, MANAGED_BY_LABEL, MANAGER, Placement, config_map_name};
use crate::caches::{Caches, Guarded, Pods, prune_finetunejob, prune_job, prune_pod};
use crate::call;
use crate::decide::{Step, decide, nothing_was_made};
use crate::events::events;
use crate::facts::{Facts, Observed, Timing};
use crate::memory::Memory;
use crate::observe::nodes::{Nodes, placement};
use crate::observe::progress::{Intervals, ProgressBoard, poll};
use crate::observe::queue::{self, Queues};
use crate::observe::{Sources, observe};
use crate::recorder::Recorder;
use crate::status::render;
use crate::telemetry::Telemetry;
use crate::validate::{Invalid, Plan, validate};

/// Jobs that are looked at at once.
const CONCURRENCY: u16 = 16;
/// Changes of one job within this time are one.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// A watch that hears nothing asks anew: balancers drop connections that idle for four minutes.
const WATCH_TIMEOUT_SECONDS: u32 = 200;
/// Objects of one page of a list.
const PAGE: u32 = 500;
/// A running job is looked at again so often, whatever the watches say.
const RESYNC: Duration = Duration::from_mins(8);
/// The longest pass: a few calls, each of which may begin its answer late.
const PASS_DEADLINE: Duration = Duration::from_mins(1);
/// After an error that time can mend.
const RETRY: Duration = Duration::from_secs(10);
/// What the cache of jobs lacks of our own last write arrives within.
const CACHE_DELAY: Duration = Duration::from_secs(1);
/// Owner of `status` in server-side apply.
const STATUS_MANAGER: &str = "finetune-operator/status";

/// What a pass needs.
struct Context {
    shared: Shared,
    caches: Caches,
    board: Arc<ProgressBoard>,
    nodes: Nodes,
    queues: Arc<Queues>,
    memory: Memory,
}

/// A pass failed for reasons outside of the job.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something could not be looked at.
    #[error(transparent)]
    Observe(call::Error),
    /// Something could not be made or taken away.
    #[error(transparent)]
    Apply(call::Error),
    /// The status could not be written.
    #[error(transparent)]
    Status(call::Error),
    /// The API server began to answer and did not end.
    #[error("the API server did not end its answer within {} s", PASS_DEADLINE.as_secs())]
    Deadline,
}

impl Error {
    /// For a metric.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Observe(_) => "observe",
            Self::Apply(_) => "apply",
            Self::Status(_) => "status",
            Self::Deadline => "deadline",
        }
    }

    /// Why the call failed, where one did.
    fn cause(&self) -> Option<String> {
        match self {
            Self::Observe(call) | Self::Apply(call) | Self::Status(call) => Some(call.cause()),
            Self::Deadline => None,
        }
    }

    /// Somebody wrote in between: the next pass sees it.
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Status(call) if call.is_conflict())
    }
}

/// What is the same for all watched namespaces.
#[derive(Clone)]
pub struct Shared {
    /// The API server.
    pub client: Client,
    /// What administrators decided.
    pub profiles: Profiles,
    /// Waiting times.
    pub timing: Timing,
    /// Between questions to trainers, and between writes of their answers.
    pub intervals: Intervals,
    /// Writes events.
    pub recorder: Recorder,
    /// Counts.
    pub telemetry: Arc<Telemetry>,
    /// What time it is. A simulation has one of its own.
    pub clock: Clock,
}

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Reconciles the jobs of a namespace, or of all, until it is dropped. Nothing of it is left then.
pub async fn run(shared: Shared, namespace: Option<String>) {
    let client = &shared.client;
    let config = || watcher::Config::default().timeout(WATCH_TIMEOUT_SECONDS).page_size(PAGE);
    let ours = || config().labels(&format!("{MANAGED_BY_LABEL}={MANAGER}"));
    let (job_store, job_writer) = reflector::store::<Job>();
    let (pod_store, pod_writer) = reflector::store::<Pod>();
    let children = watcher(api::<Job>(client, namespace.as_deref()), ours())
        .default_backoff()
        .modify(prune_job)
        .reflect(job_writer)
        .touched_objects();
    let pods = Pods::new(pod_store);
    let noting = pods.clone();
    let pod_events = watcher(api::<Pod>(client, namespace.as_deref()), ours())
        .default_backoff()
        .modify(prune_pod)
        .reflect(pod_writer)
        .inspect_ok(move |event| noting.note(event))
        .touched_objects();
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    let told = futures::stream::unfold(told, async |mut told| told.recv().await.map(|job| (job, told)));
    let board = Arc::new(ProgressBoard::default());
    let caches = Caches { jobs: job_store, pods };
    let counting = Arc::clone(&shared.telemetry);
    let count = move |was_answered| counting.count_poll(was_answered);
    let polling = poll(caches.clone(), Arc::clone(&board), shared.intervals, tell.clone(), count);
    let queues = Arc::new(Queues::default());
    let queueing = queue::watch(client.clone(), namespace.clone(), caches.jobs.clone(), Arc::clone(&queues), tell);

    let (store, writer) = reflector::store::<Guarded>();
    let memory = Memory::default();
    let (forgetting, known) = (memory.clone(), store.clone());
    let jobs = watcher(api::<Guarded>(client, namespace.as_deref()), config())
        .default_backoff()
        .modify(prune_finetunejob)
        .reflect(writer)
        .inspect_ok(move |event| forgetting.follow(event, &known))
        .applied_objects();
    let controller = Controller::for_stream(jobs, store)
        .with_config(Config::default().concurrency(CONCURRENCY).debounce(DEBOUNCE))
        .owns_stream(children)
        .watches_stream(pod_events, |pod| job_of(&pod))
        .reconcile_on(told);
    shared.telemetry.add_store(namespace.clone(), controller.store());
    let context = Arc::new(Context { shared, caches, board, nodes: Nodes::default(), queues, memory });
    let passes = controller.run(reconcile, error_policy, Arc::clone(&context)).for_each(async |pass| match pass {
        Ok(_) => {}
        // It is asked again by itself; a right that is missing shows here.
        Err(kube::runtime::controller::Error::QueueError(error)) => tracing::warn!("a watch failed: {error}"),
        // Told by the error policy.
        Err(error) => tracing::debug!("{error}"),
    });
    tokio::select! {
        () = passes => {}
        () = polling => {}
        () = queueing => {}
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
}

fn job_of(pod: &Pod) -> Option<ObjectRef<Guarded>> {
    let name = pod.labels().get(JOB_NAME_LABEL)?;
    Some(ObjectRef::new(name).within(pod.metadata.namespace.as_deref()?))
}

// By value: kube hands both over so.
#[expect(clippy::needless_pass_by_value)]
fn error_policy(guarded: Arc<Guarded>, error: &Error, context: Arc<Context>) -> Action {
    let name = ObjectRef::from_obj(&*guarded);
    if error.is_conflict() {
        tracing::debug!("{name}: somebody wrote in between, looking again");
        return Action::requeue(CACHE_DELAY);
    }
    context.shared.telemetry.count_error(error.reason());
    tracing::warn!("{name}: {error}{}", error.cause().map_or_else(String::new, |cause| format!(": {cause}")));
    Action::requeue(RETRY)
}

/// One pass: look, decide, act, report. Only what reaches the API server can fail, and for reasons outside of the job.
async fn reconcile(guarded: Arc<Guarded>, context: Arc<Context>) -> Result<Action, Error> {
    if let Ok(job) = &guarded.0
        && context.memory.is_behind(job)
    {
        context.shared.telemetry.count_skipped_pass();
        return Ok(Action::requeue(CACHE_DELAY));
    }
    let started = std::time::Instant::now();
    let result = match &guarded.0 {
        // The client's own deadline ends with the headers of an answer.
        Ok(job) => {
            tokio::time::timeout(PASS_DEADLINE, Box::pin(pass(job, &context))).await.unwrap_or(Err(Error::Deadline))
        }
        Err(invalid) => {
            let name = ObjectRef::from_obj(&*guarded);
            tracing::warn!("{name} is not a FineTuneJob of this version, and is left alone: {invalid}");
            Ok(Action::await_change())
        }
    };
    context.shared.telemetry.count_pass(result.is_ok(), started.elapsed());
    result
}

async fn pass(job: &FineTuneJob, context: &Context) -> Result<Action, Error> {
    if job.spec.managed_by.as_deref().is_some_and(|manager| manager != MANAGER) {
        return Ok(Action::await_change());
    }
    if job.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    // What is in no cache is not therefore missing, least of all before they are filled.
    context.caches.wait_until_ready().await;
    let before = job.status.clone().unwrap_or_default();
    let known_plan = context.memory.known_plan(job);
    let now = (context.shared.clock)();
    let Context { shared: Shared { client, .. }, caches, board, queues, .. } = context;
    let observed = observe(Sources { client, caches, board, queues }, job, known_plan, now).await; // I/O
    let observed = observed.map_err(Error::Observe)?;
    let plan = plan(job, context, &observed);
    let facts = Facts { job, plan: plan.as_ref(), observed: &observed, timing: context.shared.timing, now };
    let decision = decide(&facts);
    let placement = match (&plan, facts.newest()) {
        (Ok(plan), Some(newest)) if decision.step == Step::Make && newest.stage == PodStage::Prepare => {
            placement(client, &context.nodes, job, plan).await.map_err(Error::Observe)? // I/O
        }
        _ => Placement::default(),
    };
    let mut wanted = changes(&decision, &facts, &placement);
    wanted.retain(|change| !(matches!(change, Change::Control(_)) && context.memory.was_told_to_stop(job)));
    let applied = apply(client, job, wanted).await.map_err(Error::Apply)?; // I/O
    if let Ok(plan) = &plan
        && (observed.plan.is_some() || applied.plan_was_recorded)
    {
        context.memory.remember_plan(job, plan);
    }
    if applied.stop_was_told {
        context.memory.remember_stop(job);
    }
    let next = render(&decision, &facts, &applied);
    if next.status != before {
        publish(job, &before, &next.status, context).await?; // I/O
    }
    if is_terminal(&next.status) {
        context.memory.forget_plan(job);
        return match next.wake {
            // The version that the deletion would name is not in the cache yet.
            Some(Duration::ZERO) if next.status != before => Ok(Action::requeue(CACHE_DELAY)),
            Some(Duration::ZERO) => {
                apply::delete_finetunejob(client, job).await.map_err(Error::Apply)?; // I/O
                Ok(Action::await_change())
            }
            Some(wake) => Ok(Action::requeue(wake)),
            None => Ok(Action::await_change()),
        };
    }
    // What was created in this pass is seen by its watch.
    Ok(match next.wake {
        Some(wake) => Action::requeue(wake),
        None if plan.is_err() || job.spec.suspend => Action::await_change(),
        None => Action::requeue(RESYNC.mul_f64(jitter(job))),
    })
}

/// The plan that the job was accepted with; before that, and where its ConfigMap is gone and they still say the same, one by
/// today's profiles.
fn plan(job: &FineTuneJob, context: &Context, observed: &Observed) -> Result<Plan, Invalid> {
    if let Some(plan) = &observed.plan {
        return Ok(plan.clone());
    }
    if let Some(why) = &observed.unreadable_plan {
        let name = config_map_name(job);
        let message = format!(
            "the ConfigMap {name} was written by another version of the operator, and this one does not understand its plan.yaml: \
             {why}; run that version until the job has ended, or create a new FineTuneJob"
        );
        return Err(Invalid { reason: reason::PLAN_UNREADABLE, message });
    }
    let plan = validate(job, &context.shared.profiles);
    let status = job.status.as_ref().filter(|status| !nothing_was_made(status, observed) && !is_terminal(status));
    let Some(accepted) =
        status.map(|status| status.resolved.as_ref().and_then(|resolved| resolved.plan_digest.clone()))
    else {
        return plan;
    };
    plan.ok().filter(|plan| Some(plan.digest()) == accepted).ok_or_else(|| {
        let name = config_map_name(job);
        let message = format!(
            "the ConfigMap {name} is gone or was changed, and today's profile makes another run; checkpoints and results are \
             still on the volume: create a new FineTuneJob"
        );
        Invalid { reason: reason::PLAN_LOST, message }
    })
}

/// From 0.75 to 1.25, the same for the same job: a restart does not bring all jobs back at once for ever.
fn jitter(job: &FineTuneJob) -> f64 {
    let sum: u32 = job.uid().unwrap_or_default().bytes().map(u32::from).sum();
    0.75 + f64::from(sum % 100) / 200.0
}

/// Writes the status, then tells what changed. The version goes along: a status that was computed from an old one is refused.
async fn publish(
    job: &FineTuneJob,
    before: &FineTuneJobStatus,
    after: &FineTuneJobStatus,
    context: &Context,
) -> Result<(), Error> {
    let namespace = job.namespace().unwrap_or_default();
    let jobs: Api<FineTuneJob> = Api::namespaced(context.shared.client.clone(), &namespace);
    let patch = json!({
        "apiVersion": FineTuneJob::api_version(&()),
        "kind": FineTuneJob::kind(&()),
        "metadata": {"name": job.name_any(), "namespace": namespace, "resourceVersion": job.resource_version()},
        "status": after,
    });
    let parameters = PatchParams::apply(STATUS_MANAGER).force();
    let written = jobs.patch_status(&job.name_any(), &parameters, &Patch::Apply(&patch)).await;
    let written = match written {
        // It was deleted meanwhile.
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        written => written.map_err(|source| {
            Error::Status(call::Error::one::<FineTuneJob>("patch the status of", &namespace, &job.name_any(), source))
        })?,
    };
    context.memory.remember_write(&written);
    let about = job.object_ref(&());
    for event in events(&namespace, before, after) {
        if let Err(error) = context.shared.recorder.publish(&event, &about).await {
            // The status says it too; an event is for people who watch.
            tracing::warn!("{namespace}/{}: the event {} was not written: {error}", job.name_any(), event.reason);
        }
    }
    Ok(())
}
