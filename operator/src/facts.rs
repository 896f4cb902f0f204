//! What is known of a job when it is decided about: plain values, each from one source. They are gathered by [`crate::observe`],
//! judged by [`crate::policy`] and [`crate::decide`], and told by [`crate::status`]; nothing here reads or decides.

use std::sync::LazyLock;
use std::time::Duration;

use crds::FineTuneJob;
use crds::finetunejob::{FineTuneJobStatus, JobReference};
use crds::report::{Progress, Report};
use crds::run::PodStage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::validate::{Invalid, Plan};

/// Everything that a decision about a job depends on.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The job as the cache has it: its spec, and the status that the last pass wrote.
    pub job: &'a FineTuneJob,
    /// What is done for it, or why nothing can be.
    pub plan: Result<&'a Plan, &'a Invalid>,
    /// What is seen of its children.
    pub observed: &'a Observed,
    /// Waiting times of this operator.
    pub timing: Timing,
    /// The time of the pass.
    pub now: Timestamp,
}

/// Waiting times of an operator.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// After the first failed attempt; each further failure doubles it.
    pub first_backoff: Duration,
}

/// What is seen of a job's children.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The plan that was made when the job was accepted: from its ConfigMap.
    pub plan: Option<Plan>,
    /// Why there is one that this version does not understand.
    pub unreadable_plan: Option<String>,
    /// The newest attempt of `status.jobRefs`: from the caches of Jobs and pods.
    pub attempt: Option<AttemptSeen>,
    /// The Job that reads what an attempt left on the volume, if it was made: from the same caches.
    pub report_job: Option<AttemptSeen>,
    /// What a running trainer told last: from the poller.
    pub progress: Option<Progress>,
    /// Since when a running trainer does not answer, and why: from the poller.
    pub silence: Option<Silence>,
    /// What the queue says of a Job that it holds: from the cache of Workloads.
    pub queue: Option<QueueSeen>,
    /// The newest warning about a child that does not get on: from its events.
    pub warning: Option<Warning>,
}

impl Observed {
    /// The Job that reads what the newest attempt left, once that has ended.
    pub fn reader(&self) -> Option<&AttemptSeen> {
        self.report_job.as_ref().filter(|_| self.attempt.as_ref().is_some_and(AttemptSeen::has_ended))
    }

    /// The Job that may not get on: the newest attempt's, or the one that reads what it left.
    pub fn in_question(&self) -> Option<&AttemptSeen> {
        self.reader().or(self.attempt.as_ref())
    }
}

/// What somebody else's controller, or the kubelet, says of an object in an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// For example `FailedMount`.
    pub reason: String,
    /// Its sentence.
    pub message: String,
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

/// A Job and its pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttemptSeen {
    /// The Job.
    pub job: JobSeen,
    /// Digest of the pod that it makes.
    pub pod_digest: Option<String>,
    /// Its pods, newest last.
    pub pods: Vec<PodSeen>,
    /// Live pods that must be gone before another trainer may begin, and whose word counts for nothing.
    pub strangers: Vec<Stranger>,
}

/// A pod of a Job of this name that is gone, or one that claims to be of this Job and does not run the trainer that it asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stranger {
    /// What it shows.
    pub pod: PodSeen,
    /// In what it is not that trainer, where it claims to be of this Job.
    pub differs_in: Vec<String>,
}

/// What became of a Job.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum JobSeen {
    /// There is none.
    #[default]
    Missing,
    /// Somebody else's object has its name, or one that is not what we would make.
    Foreign,
    /// It is there.
    Present {
        /// `metadata.uid`.
        uid: String,
        /// Since when the Job controller is to run it: `status.startTime`, or its creation.
        released: Option<Time>,
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
    /// `spec.nodeName`, once it has one.
    pub node: Option<String>,
    /// Its phase is not a last one: its node may still run containers of it.
    pub live: bool,
    /// It ended before a container ran: the kubelet's reason and sentence.
    pub rejected: Option<(String, String)>,
    /// The kubelet evicted it: its sentence.
    pub evicted: Option<String>,
    /// It was asked to end; its node has until then.
    pub ends_by: Option<Time>,
    /// No node can take it: the scheduler's sentence.
    pub unschedulable: Option<String>,
    /// A node was found for it.
    pub scheduled: bool,
    /// A container of it cannot start: which, the kubelet's reason and sentence.
    pub waiting: Option<Waiting>,
    /// An init container that ended badly: its name, exit code and last words.
    pub failed_init: Option<FailedInit>,
    /// An init container that runs, and must end before the trainer begins.
    pub running_init: Option<String>,
    /// Other containers that still run, by name.
    pub sidecars: Vec<String>,
    /// When the trainer's container began to run.
    pub started: Option<Time>,
    /// The trainer's container runs.
    pub running: bool,
    /// How the trainer's container ended.
    pub terminated: Option<Terminated>,
    /// Something took the pod away (`DisruptionTarget`): the condition's reason.
    pub disrupted: Option<String>,
}

/// A container that cannot start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Its name.
    pub container: String,
    /// The kubelet's reason.
    pub reason: String,
    /// The kubelet's sentence.
    pub message: String,
}

/// An init container that ended badly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailedInit {
    /// Its name.
    pub container: String,
    /// Its exit code.
    pub exit_code: i32,
    /// Its termination message, or the end of its log.
    pub message: String,
}

/// How a container ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terminated {
    /// 128 and more: by a signal.
    pub exit_code: i32,
    /// The kubelet's reason: `OOMKilled`, `ContainerStatusUnknown`, `Error`.
    pub reason: String,
    /// Its termination message, unread.
    pub message: Option<String>,
    /// When it ended.
    pub finished: Option<Time>,
}

impl Terminated {
    /// It exceeded its memory limit, or its node ran out.
    pub fn ran_out_of_memory(&self) -> bool {
        self.reason == "OOMKilled"
    }

    /// Its node came back and knew nothing of it any more: the code is made up.
    pub fn is_unknown(&self) -> bool {
        self.reason == "ContainerStatusUnknown"
    }
}

impl PodSeen {
    /// Whether its trainer may still write to the volume.
    pub fn may_write(&self) -> bool {
        self.live && self.terminated.is_none()
    }

    /// Whether it stays only because containers beside the trainer do not end.
    pub fn is_held_by_sidecars(&self) -> bool {
        self.live && self.terminated.is_some() && !self.sidecars.is_empty()
    }
}

impl AttemptSeen {
    /// The pod that was made last.
    pub fn newest_pod(&self) -> Option<&PodSeen> {
        self.pods.last()
    }

    /// Whether any pod is not gone for certain.
    pub fn is_live(&self) -> bool {
        !self.strangers.is_empty() || self.pods.iter().any(|pod| pod.live)
    }

    /// Whether its trainer runs no more, and will not again.
    pub fn has_ended(&self) -> bool {
        let may_write = self.pods.iter().any(PodSeen::may_write);
        match &self.job {
            JobSeen::Foreign => false,
            JobSeen::Missing => !may_write,
            JobSeen::Present { finished: true, .. } => {
                !self.pods.iter().any(|pod| pod.live && !pod.is_held_by_sidecars())
            }
            // The Job waits for a pod that containers of others keep alive.
            JobSeen::Present { .. } => !may_write && self.newest_pod().is_some_and(PodSeen::is_held_by_sidecars),
        }
    }

    /// UID of its Job, while that may still make or keep a pod.
    pub fn unfinished_job(&self) -> Option<&str> {
        match &self.job {
            JobSeen::Present { uid, finished: false, .. } => Some(uid),
            JobSeen::Present { .. } | JobSeen::Missing | JobSeen::Foreign => None,
        }
    }

    /// The last word of its newest pod, if it is one of this attempt.
    pub fn report(&self, job_uid: &str, stage: PodStage, attempt: i32) -> Option<Report> {
        let message = self.newest_pod()?.terminated.as_ref()?.message.as_deref()?;
        // Whatever does not parse may be a piece of log, and is never copied anywhere.
        let report: Report = serde_json::from_str(message).ok()?;
        report.is_of(job_uid, stage, attempt).then_some(report)
    }
}

impl<'a> Facts<'a> {
    /// The status that the last pass wrote; an empty one before the first.
    pub fn status(&self) -> &'a FineTuneJobStatus {
        static NONE: LazyLock<FineTuneJobStatus> = LazyLock::new(FineTuneJobStatus::default);
        self.job.status.as_ref().unwrap_or(&NONE)
    }

    /// The newest attempt, listed or made.
    pub fn newest(&self) -> Option<&'a JobReference> {
        self.status().job_refs.last()
    }

    /// The newest attempt, while its end is not recorded.
    pub fn current(&self) -> Option<&'a JobReference> {
        self.newest().filter(|newest| newest.outcome.is_none())
    }

    /// The newest pod of the newest attempt.
    pub fn newest_pod(&self) -> Option<&'a PodSeen> {
        self.observed.attempt.as_ref()?.newest_pod()
    }
}
