//! The status vocabulary: condition types, reasons and event reasons, each in this one place, and the one way to change a
//! condition. The reasons of ended attempts are in [`crate::exit`], beside their codes.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The spec and its profile could be resolved.
pub const ACCEPTED: &str = "Accepted";
/// Quota is held, or no queue asks for any.
pub const ADMITTED: &str = "Admitted";
/// A pod of a stage runs.
pub const RUNNING: &str = "Running";
/// All gates hold.
pub const VALIDATION_PASSED: &str = "ValidationPassed";
/// The result was verified at its destination.
pub const PUBLISHED: &str = "Published";
/// The user or the queue holds the job.
pub const SUSPENDED: &str = "Suspended";
/// The job ended with a result. Terminal, and never beside [`FAILED`].
pub const COMPLETE: &str = "Complete";
/// The job ended without one. Terminal, and never beside [`COMPLETE`].
pub const FAILED: &str = "Failed";

/// The job is done, and well: what kstatus (Flux, Argo CD, `helm --wait`) waits for.
pub const READY: &str = "Ready";
/// The job is on its way, as kstatus reads it.
pub const RECONCILING: &str = "Reconciling";
/// The job stands still until somebody changes something, as kstatus reads it.
pub const STALLED: &str = "Stalled";

/// Every condition type, in the order of a job's life; those of kstatus, which follow from the others, last.
pub const TYPES: [&str; 11] = [
    ACCEPTED,
    ADMITTED,
    RUNNING,
    VALIDATION_PASSED,
    PUBLISHED,
    SUSPENDED,
    COMPLETE,
    FAILED,
    READY,
    RECONCILING,
    STALLED,
];

/// Names words and lists them, so that no word can be left out of the list.
macro_rules! words {
    ($($(#[$doc:meta])* $name:ident = $word:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $word;)*
        /// Every one of them.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

/// Reasons of conditions. Besides these, `Complete` and `Failed` carry those of [`crate::exit::ExitCode::reason`].
pub mod reason {
    words! {
        /// Any condition: nothing is known yet.
        PENDING = "Pending";

        /// Accepted: the spec and its profile make a run.
        RESOLVED = "Resolved";
        /// Accepted: no profile has this name.
        PROFILE_NOT_FOUND = "ProfileNotFound";
        /// Accepted: more is asked for than the profile allows.
        RESOURCE_LIMIT_EXCEEDED = "ResourceLimitExceeded";
        /// Accepted: a source lies outside of what the profile allows.
        SOURCE_NOT_ALLOWED = "SourceNotAllowed";
        /// Accepted: the profile does not allow a toleration, node selector, priority class or queue.
        SCHEDULING_NOT_ALLOWED = "SchedulingNotAllowed";
        /// Accepted: something is asked for that this version does not do.
        NOT_SUPPORTED = "NotSupported";
        /// Accepted: an object of another owner has the name that a child would get.
        CHILD_NAME_TAKEN = "ChildNameTaken";

        /// Admitted: the queue has reserved quota.
        QUOTA_RESERVED = "QuotaReserved";
        /// Admitted: no queue is named, so nothing is waited for.
        NO_QUEUE = "NoQueue";
        /// Admitted: the queue has not reserved quota yet.
        WAITING_FOR_QUOTA = "WaitingForQuota";
        /// Admitted: the queue took its quota back.
        EVICTED = "Evicted";
        /// Admitted: a queue is named, but nobody serves queues.
        QUEUE_CONTROLLER_MISSING = "QueueControllerMissing";

        /// Running: a pod of the stage runs.
        POD_RUNNING = "PodRunning";
        /// Running: no node can take the pod; the message is the scheduler's.
        UNSCHEDULABLE = "Unschedulable";
        /// Running: the image cannot be pulled.
        IMAGE_PULL_FAILED = "ImagePullFailed";
        /// Running: the API server refused a child.
        CHILD_CREATION_FAILED = "ChildCreationFailed";
        /// Running: the pod gave way; the next attempt continues.
        PREEMPTED = "Preempted";
        /// Running: the node of the pod does not answer, and its pod is not gone for certain.
        NODE_LOST = "NodeLost";
        /// Running: a volume cannot be attached or mounted; the message is the kubelet's.
        MOUNT_FAILED = "MountFailed";
        /// Running: an init container that somebody put before the trainer runs, cannot start or has failed.
        INIT_CONTAINER_FAILED = "InitContainerFailed";
        /// Running: an attempt is asked to end.
        STOPPING = "Stopping";
        /// Running: the pod is gone, and what it left on the volume is read.
        READING_VOLUME = "ReadingVolume";

        /// ValidationPassed: every gate holds.
        GATES_PASSED = "GatesPassed";
        /// ValidationPassed, Published: a gate does not hold.
        GATE_FAILED = "GateFailed";
        /// ValidationPassed: a metric is NaN or infinite, which never passes.
        NON_FINITE_METRIC = "NonFiniteMetric";
        /// ValidationPassed: the job has no gates.
        NO_GATES = "NoGates";

        /// Published: the result was verified at its destination.
        ARTIFACT_VERIFIED = "ArtifactVerified";
        /// Published: it could not be written.
        PUBLISH_FAILED = "PublishFailed";
        /// Published: the job names no destination.
        NOT_REQUESTED = "NotRequested";

        /// Suspended: `spec.suspend` is true.
        SUSPENDED_BY_USER = "SuspendedByUser";
        /// Suspended: no longer.
        RESUMED = "Resumed";

        /// Failed: a gate does not hold, and `validation.onFailure` is Fail.
        VALIDATION_FAILED = "ValidationFailed";
        /// Failed: more attempts failed than `failurePolicy.maxRetries` allows.
        BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded";
        /// Failed: more attempts were preempted than `failurePolicy.maxPreemptions` allows.
        PREEMPTION_LIMIT_EXCEEDED = "PreemptionLimitExceeded";
        /// Failed: `activeDeadlineSeconds` are over.
        DEADLINE_EXCEEDED = "DeadlineExceeded";
        /// Failed: `startDeadlineSeconds` went by before a training pod ran.
        START_DEADLINE_EXCEEDED = "StartDeadlineExceeded";
        /// The kubelet evicted an attempt for what it used up itself.
        EVICTED_FOR_USAGE = "EvictedForUsage";
        /// An attempt ended and left neither a pod nor a report.
        REPORT_MISSING = "ReportMissing";
        /// The kubelet took the pod of an attempt and did not run it.
        POD_REJECTED = "PodRejected";
        /// An attempt was killed: no condition says by whom.
        KILLED = "Killed";
        /// The Job of an attempt was deleted by someone else.
        JOB_DELETED = "JobDeleted";
        /// An attempt was held by `spec.suspend`.
        HELD = "Held";
        /// Failed: the plan that the job was accepted with is gone or was changed.
        PLAN_LOST = "PlanLost";
        /// Accepted: the plan that the job was accepted with was written by another version of the operator.
        PLAN_UNREADABLE = "PlanUnreadable";
        /// Failed: several attempts in a row left no new checkpoint.
        NO_PROGRESS = "NoProgress";
    }
}

/// Reasons of events on the job.
pub mod event {
    words! {
        /// The Job of a stage was created.
        JOB_CREATED = "JobCreated";
        /// The queue has no quota yet.
        QUEUED_WAITING_FOR_QUOTA = "QueuedWaitingForQuota";
        /// Model and rows are fetched, checked and tokenised.
        PREPARE_COMPLETED = "PrepareCompleted";
        /// The first optimizer step is under way.
        TRAINING_STARTED = "TrainingStarted";
        /// A checkpoint was committed.
        CHECKPOINT_SAVED = "CheckpointSaved";
        /// The job cannot run as it is written.
        NOT_ACCEPTED = "NotAccepted";
        /// An attempt failed.
        ATTEMPT_FAILED = "AttemptFailed";
        /// An attempt gave way.
        PREEMPTED = "Preempted";
        /// An attempt continues a checkpoint.
        RESUMED = "Resumed";
        /// All gates hold.
        VALIDATION_PASSED = "ValidationPassed";
        /// A gate does not hold.
        VALIDATION_FAILED = "ValidationFailed";
        /// The result is at its destination.
        PUBLISHED = "Published";
        /// The result could not be written.
        PUBLISH_FAILED = "PublishFailed";
        /// A deadline of the job is over.
        DEADLINE_EXCEEDED = "DeadlineExceeded";
    }
}

/// What is known about a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// It cannot be told yet.
    Unknown,
}

impl ConditionStatus {
    /// The word that meta/v1 has for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Sets one condition, in its place or at the end. `lastTransitionTime` moves with the status only, so that an unchanged
/// condition compares equal and nothing is written.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    condition_type: &str,
    status: ConditionStatus,
    reason: &str,
    message: &str,
    observed_generation: Option<i64>,
    now: Time,
) {
    let place = conditions.iter().position(|condition| condition.type_ == condition_type);
    let unchanged = place.map(|place| &conditions[place]).filter(|condition| condition.status == status.name());
    let condition = Condition {
        type_: condition_type.into(),
        status: status.name().into(),
        reason: reason.into(),
        message: message.into(),
        observed_generation,
        last_transition_time: unchanged.map_or(now, |condition| condition.last_transition_time.clone()),
    };
    match place {
        Some(place) => conditions[place] = condition,
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).expect("in range"))
    }

    #[test]
    fn the_transition_time_moves_with_the_status_only() {
        let mut conditions = Vec::new();
        let mut set = |status, reason, message, generation, now| {
            set_condition(&mut conditions, RUNNING, status, reason, message, Some(generation), at(now));
            let [condition] = conditions.as_slice() else { panic!("{conditions:?}") };
            (condition.last_transition_time.0.as_second(), condition.clone())
        };
        assert_eq!(set(ConditionStatus::Unknown, reason::PENDING, "", 1, 10).0, 10, "a new one begins now");
        assert_eq!(set(ConditionStatus::False, reason::UNSCHEDULABLE, "0/3 nodes", 1, 20).0, 20);
        let (time, other_text) = set(ConditionStatus::False, reason::IMAGE_PULL_FAILED, "no such image", 2, 30);
        assert_eq!(time, 20, "reason, message and generation do not move it");
        assert_eq!(
            (other_text.reason.as_str(), other_text.message.as_str(), other_text.observed_generation),
            ("ImagePullFailed", "no such image", Some(2))
        );
        let (_, again) = set(ConditionStatus::False, reason::IMAGE_PULL_FAILED, "no such image", 2, 40);
        assert_eq!(again, other_text, "nothing new, nothing to write");
        let (time, condition) = set(ConditionStatus::True, reason::POD_RUNNING, "", 2, 50);
        assert_eq!((time, condition.status.as_str()), (50, "True"));
    }

    #[test]
    fn other_conditions_keep_their_place_and_value() {
        let mut conditions = Vec::new();
        for (second, condition_type) in (1..).zip(TYPES) {
            let status = ConditionStatus::Unknown;
            set_condition(&mut conditions, condition_type, status, reason::PENDING, "", None, at(second));
        }
        let before = conditions.clone();
        set_condition(&mut conditions, PUBLISHED, ConditionStatus::False, reason::NOT_REQUESTED, "", None, at(99));
        let changed: Vec<&str> = (0..TYPES.len()).filter(|i| before[*i] != conditions[*i]).map(|i| TYPES[i]).collect();
        assert_eq!((conditions.len(), changed), (TYPES.len(), vec![PUBLISHED]));
    }

    /// The API server refuses a condition whose reason is not of this form; an event's may have 128 characters.
    #[test]
    fn reasons_are_what_the_api_server_takes_and_named_once() {
        let exit = crate::exit::ExitCode::ALL.map(crate::exit::ExitCode::reason);
        for reason in TYPES.iter().chain(reason::ALL).chain(event::ALL).chain(&exit) {
            let fits = reason.len() <= 128
                && reason.starts_with(|c: char| c.is_ascii_uppercase())
                && reason.chars().all(|c| c.is_ascii_alphanumeric());
            assert!(fits, "{reason:?}");
        }
        for names in [&TYPES[..], reason::ALL, event::ALL, &exit] {
            let distinct: std::collections::BTreeSet<_> = names.iter().collect();
            assert_eq!(distinct.len(), names.len(), "{names:?}");
        }
    }
}
