//! The condition Running: what a job does, or what keeps it from that, in the words of whoever sees it.

use std::time::Duration;

use crds::condition::{self, ConditionStatus, reason};
use crds::finetunejob::{AttemptOutcome, JobReference};
use crds::run::PodStage;
use crds::status::condition;

use super::{LOOK_AGAIN, Rendering};
use crate::build;
use crate::decide::Step;
use crate::facts::{AttemptSeen, JobSeen, PodSeen, Stranger, Warning};

/// Garbage is collected within seconds.
const LEFTOVER_INTERVAL: Duration = Duration::from_secs(2);
/// The Job controller makes a pod at once, and a node begins with it soon: what takes longer is asked for.
const PATIENCE: Duration = Duration::from_secs(5);
/// A pod that was asked to end and is there for so long after its grace period has a node that does not answer.
const LOST_AFTER: Duration = Duration::from_secs(30);
/// A trainer that does not answer for so long is told of.
const SILENT_AFTER: Duration = Duration::from_mins(1);

/// The condition Running.
pub(super) struct Running {
    pub status: ConditionStatus,
    pub reason: &'static str,
    pub message: String,
    /// When no change tells that it is another.
    pub look_again: Option<Duration>,
}

impl Running {
    fn not(reason: &'static str, message: impl Into<String>) -> Self {
        Self { status: ConditionStatus::False, reason, message: message.into(), look_again: None }
    }

    fn look_again(self, after: Duration) -> Self {
        Self { look_again: Some(after), ..self }
    }
}

impl Rendering<'_> {
    pub(super) fn running(&self) -> Running {
        if let Some(leftover) = &self.applied.leftover {
            let message = format!("{leftover} of an earlier job of this name is being taken away");
            return Running::not(reason::PENDING, message).look_again(LEFTOVER_INTERVAL);
        }
        if let Some(refused) = &self.applied.refused {
            return Running::not(reason::CHILD_CREATION_FAILED, refused).look_again(LOOK_AGAIN);
        }
        match &self.decision.step {
            Step::Hold { .. } => return Running::not(reason::SUSPENDED_BY_USER, ""),
            Step::Stop { why, .. } => {
                return Running::not(reason::STOPPING, format!("the pod is being taken away: {why}"));
            }
            _ => {}
        }
        let Some(current) = self.current() else { return pending() };
        let Some(seen) = &self.facts.observed.attempt else { return pending() };
        if current.outcome.is_some() {
            return self.between(current, seen);
        }
        // What was observed is of the attempt before.
        if self.facts.current().is_none() {
            return Running::not(reason::PENDING, "");
        }
        if let Some(stranger) = seen.strangers.first() {
            return self.of_stranger(current, stranger);
        }
        if let Some(reader) = self.facts.observed.reader() {
            return self.of_reader(&build::report_job_name(self.facts.job, current), reader);
        }
        if matches!(self.decision.step, Step::ReadVolume) {
            return reading();
        }
        self.of_child(&current.name, seen)
    }

    fn of_child(&self, name: &str, seen: &AttemptSeen) -> Running {
        match &seen.job {
            JobSeen::Foreign => {
                let message = format!("the Job {name} is not one that this operator made; kubectl delete job {name}");
                Running::not(reason::CHILD_NAME_TAKEN, message).look_again(LOOK_AGAIN)
            }
            JobSeen::Missing => Running::not(reason::PENDING, ""),
            JobSeen::Present { .. } => match seen.newest_pod() {
                Some(pod) => self.of_pod(pod),
                None => self.of_job_without_pod(name, &seen.job),
            },
        }
    }

    /// What keeps the pod that reads the volume from it; nothing, where it reads or only begins.
    fn of_reader(&self, name: &str, reader: &AttemptSeen) -> Running {
        let told = self.of_child(name, reader);
        if told.status == ConditionStatus::True || told.message.is_empty() {
            return reading();
        }
        let message = format!("what the last attempt left on the volume cannot be read yet: {}", told.message);
        Running { message, ..told }.look_again(LOOK_AGAIN)
    }

    fn of_stranger(&self, current: &JobReference, Stranger { pod, differs_in }: &Stranger) -> Running {
        if let Some(leaving) = self.leaving(pod) {
            return leaving;
        }
        let (name, of) = (&pod.name, &current.name);
        let message = if differs_in.is_empty() {
            format!(
                "the pod {name} claims to be of the Job {of} and is not the trainer that runs there, or is of a Job of this name that \
                 is gone; nothing is made until it is gone: kubectl delete pod {name}"
            )
        } else {
            format!(
                "the pod {name} is not the trainer that the Job {of} asks for: {} differ. If an admission webhook changed it, exclude \
                 pods with the label app.kubernetes.io/name=finetune-trainer there; what the pod says counts for nothing, and nothing \
                 is made until it is gone: kubectl delete pod {name}",
                differs_in.join(", ")
            )
        };
        Running::not(reason::CHILD_NAME_TAKEN, message)
    }

    /// A pod that was asked to end and is still there.
    fn leaving(&self, pod: &PodSeen) -> Option<Running> {
        let ends_by = pod.ends_by.as_ref().filter(|_| pod.live)?;
        let overdue = self.facts.now.duration_since(ends_by.0);
        let left = LOST_AFTER.saturating_sub(overdue.unsigned_abs());
        if overdue.is_positive() && left.is_zero() {
            return Some(lost(pod));
        }
        let message = "the pod is being taken away; the next attempt begins when it is gone for certain";
        let after = if overdue.is_positive() { left } else { overdue.unsigned_abs() + LOST_AFTER };
        Some(Running::not(reason::PREEMPTED, message).look_again(after))
    }

    /// The API server may refuse the pod of a Job: quota, admission, Pod Security. The Job controller tells it in an event.
    fn of_job_without_pod(&self, name: &str, job: &JobSeen) -> Running {
        let JobSeen::Present { released: Some(released), suspended: false, .. } = job else {
            return Running::not(reason::PENDING, "");
        };
        if let Some(Warning { reason: why, message }) = &self.facts.observed.warning {
            let message = format!("the Job {name} has no pod: {why}: {message}");
            return Running::not(reason::CHILD_CREATION_FAILED, message).look_again(LOOK_AGAIN);
        }
        let waited = self.facts.now.duration_since(released.0).unsigned_abs();
        if waited < PATIENCE {
            return Running::not(reason::PENDING, "").look_again(PATIENCE.saturating_sub(waited));
        }
        let message = format!("the Job {name} has no pod, and no event says why; kubectl describe job {name}");
        Running::not(reason::CHILD_CREATION_FAILED, message).look_again(LOOK_AGAIN)
    }

    fn between(&self, last: &JobReference, seen: &AttemptSeen) -> Running {
        if let Some(pod) = seen.pods.iter().find(|pod| pod.live) {
            if let Some(lost) = self.leaving(pod).filter(|leaving| leaving.reason == reason::NODE_LOST) {
                return lost;
            }
            let sidecars = if pod.sidecars.is_empty() {
                String::new()
            } else {
                format!(", its container {}", pod.sidecars.join(", "))
            };
            let message = format!("the next attempt begins when the pod {} is gone for certain{sidecars}", pod.name);
            let look_again = self.leaving(pod).and_then(|leaving| leaving.look_again);
            return Running { look_again, ..Running::not(reason::PREEMPTED, message) };
        }
        match last.outcome {
            Some(AttemptOutcome::Unavailable) => {
                let what = if last.stage == PodStage::Publish { "destination" } else { "source" };
                let message = format!("a {what} is down; it is tried again by itself, for hours");
                Running::not(crds::exit::ExitCode::SourceUnavailable.reason(), message)
            }
            Some(AttemptOutcome::Preempted) => Running::not(reason::PREEMPTED, "waiting for the next attempt"),
            _ => Running::not(reason::PENDING, "waiting for the next attempt"),
        }
    }

    fn of_pod(&self, pod: &PodSeen) -> Running {
        if let Some(leaving) = self.leaving(pod) {
            return leaving;
        }
        if let Some(message) = &pod.unschedulable {
            return Running::not(reason::UNSCHEDULABLE, message);
        }
        if let Some(waiting) = &pod.waiting {
            return self.of_waiting(waiting);
        }
        if let Some(Warning { reason: why, message }) = self.facts.observed.warning.as_ref().filter(|_| !pod.running) {
            let is_mount = ["FailedMount", "FailedAttachVolume", "FailedMapVolume"].contains(&why.as_str());
            let reason = if is_mount { reason::MOUNT_FAILED } else { reason::CHILD_CREATION_FAILED };
            return Running::not(reason, format!("{why}: {message}")).look_again(LOOK_AGAIN);
        }
        if let Some(init) = &pod.running_init {
            let message =
                format!("the trainer begins when the init container {init}, which is not the operator's, has ended");
            return Running::not(reason::PENDING, message);
        }
        if !pod.running {
            // A node that begins with it tells by a change; one that cannot tells by an event.
            return Running::not(reason::PENDING, "").look_again(LOOK_AGAIN);
        }
        let silence = self
            .facts
            .observed
            .silence
            .as_ref()
            .filter(|silence| self.facts.now.duration_since(silence.since).unsigned_abs() >= SILENT_AFTER);
        let message = silence.map_or_else(String::new, |silence| {
            format!(
                "its progress is not known: the trainer's port does not answer the operator ({}); a NetworkPolicy or a mesh may be \
                 in between. Training goes on, and its checkpoints count",
                silence.why
            )
        });
        let refused = self.applied.stop_refused.as_ref();
        let message = refused.map_or(message, |why| format!("it was not told to stop yet: {why}"));
        let look_again = refused.map(|_| LOOK_AGAIN);
        Running { status: ConditionStatus::True, reason: reason::POD_RUNNING, message, look_again }
    }

    /// Other reasons pass, or are told by how the pod ends.
    fn of_waiting(&self, waiting: &crate::facts::Waiting) -> Running {
        let is_trainer = waiting.container == build::CONTAINER;
        let reason = match waiting.reason.as_str() {
            why if why.contains("Image") => reason::IMAGE_PULL_FAILED,
            _ if is_trainer => reason::CHILD_CREATION_FAILED,
            _ => reason::INIT_CONTAINER_FAILED,
        };
        // The kubelet tells of one failure in turns: that it failed, and that it waits.
        let told = condition(&self.status, condition::RUNNING).filter(|told| told.reason == reason);
        if let Some(told) = told.filter(|_| waiting.reason.ends_with("BackOff")) {
            return Running::not(reason, told.message.clone());
        }
        let of = if is_trainer { String::new() } else { format!("container {}: ", waiting.container) };
        Running::not(reason, format!("{of}{}: {}", waiting.reason, waiting.message))
    }
}

fn pending() -> Running {
    Running { status: ConditionStatus::Unknown, reason: reason::PENDING, message: String::new(), look_again: None }
}

fn reading() -> Running {
    let message = "the pod is gone and its last word was not heard; what it left on the volume is read";
    Running::not(reason::READING_VOLUME, message).look_again(LOOK_AGAIN)
}

fn lost(pod: &PodSeen) -> Running {
    let node = pod.node.as_deref().unwrap_or("its node");
    let message = format!(
        "the pod {} was to be gone and {node} does not confirm it: it may still write, so nothing else is started. When the machine \
         is off for certain: kubectl taint nodes {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute, or kubectl delete \
         node {node}",
        pod.name
    );
    Running::not(reason::NODE_LOST, message)
}
