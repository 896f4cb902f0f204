//! The next status of a job, from its last one and what was observed. Pure. Everything that a decision depends on later is
//! recorded here first: an attempt is listed before its Job is made, and how it ended before the next one is listed.

mod attempt;
mod conclusion;
mod conditions;
pub mod convert;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crds::condition::{self, ConditionStatus, reason, set_condition};
use crds::finetunejob::{AttemptOutcome, AttemptsStatus, JobReference, Phase, ResolvedStatus};
use crds::run::PodStage;
use crds::{FineTuneJob, FineTuneJobStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use self::attempt::reading;
use crate::build;
use crate::observe::{JobSeen, Observed};
use crate::policy::backoff::backoff;
use crate::policy::deadline::time_to_live;
use crate::policy::failure::Reading;
use crate::validate::{Invalid, Plan};

/// Attempts that the status lists.
const LISTED_ATTEMPTS: usize = 16;
/// Between two looks at a queue's Workload.
const QUEUE_INTERVAL: Duration = Duration::from_secs(15);

/// What became of the objects that this pass tried to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Kind and name of an object of somebody else that is in the way.
    pub name_taken: Option<String>,
    /// Kind and name of an object that is left from a job of the same name.
    pub leftover: Option<String>,
    /// What the API server said when it refused an object.
    pub refused: Option<String>,
    /// This pass made the ConfigMap that holds the plan: it holds the plan of this pass.
    pub plan_was_recorded: bool,
    /// The word to stop is in its ConfigMap.
    pub stop_was_told: bool,
    /// UID of the Job that was made for the newest attempt.
    pub created_uid: Option<String>,
}

/// The next status, and when to look again without a change.
#[derive(Clone, Debug, PartialEq)]
pub struct Next {
    /// Equal to the last one if nothing is new.
    pub status: FineTuneJobStatus,
    /// `None`: only a change can matter.
    pub wake: Option<Duration>,
}

/// Whether a job has ended.
pub fn is_terminal(status: &FineTuneJobStatus) -> bool {
    [condition::COMPLETE, condition::FAILED].into_iter().any(|name| is_true(status, name))
}

fn is_true(status: &FineTuneJobStatus, name: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == name && condition.status == "True")
}

/// Whether no object was made for a job yet: what its profile says today is what it gets.
pub fn nothing_was_made(status: &FineTuneJobStatus, observed: &Observed) -> bool {
    match &status.job_refs[..] {
        [] => true,
        [only] => {
            let job = observed.attempt.as_ref().map(|attempt| &attempt.job);
            only.uid.is_none() && only.outcome.is_none() && observed.plan.is_none() && job == Some(&JobSeen::Missing)
        }
        _ => false,
    }
}

/// Whether the last word of the newest attempt is to be read from the volume.
pub fn needs_report_job(job: &FineTuneJob, observed: &Observed) -> bool {
    let status = job.status.clone().unwrap_or_default();
    let Some(current) = status.job_refs.last().filter(|current| current.outcome.is_none()) else { return false };
    let Some(attempt) = &observed.attempt else { return false };
    !job.spec.suspend
        && current.uid.is_some()
        && attempt.has_ended()
        && reading(job, observed, current).is_some_and(|read| read == Reading::AskTheVolume)
}

/// How long the operator waits after the first failed attempt.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Each further failure doubles it.
    pub first_backoff: Duration,
}

/// The next status of a job.
pub fn next_status(
    job: &FineTuneJob,
    plan: Result<&Plan, &Invalid>,
    observed: &Observed,
    applied: &Applied,
    timing: Timing,
    now: Timestamp,
) -> Next {
    let mut status = job.status.clone().unwrap_or_default();
    status.observed_generation = job.metadata.generation;
    if is_terminal(&status) {
        let wake = time_to_live(&job.spec, &status, now);
        return Next { status, wake };
    }
    let mut transition = Transition { job, observed, timing, now, status, wake: None };
    transition.run(plan, applied);
    Next { status: transition.status, wake: transition.wake.map(|wake| wake.max(Duration::from_secs(1))) }
}

struct Transition<'a> {
    job: &'a FineTuneJob,
    observed: &'a Observed,
    timing: Timing,
    now: Timestamp,
    status: FineTuneJobStatus,
    wake: Option<Duration>,
}

impl Transition<'_> {
    fn set(&mut self, name: &str, status: ConditionStatus, reason: &str, message: &str) {
        let (generation, message) = (self.job.metadata.generation, convert::message(message));
        set_condition(&mut self.status.conditions, name, status, reason, &message, generation, Time(self.now));
    }

    fn wake_in(&mut self, after: Duration) {
        self.wake = Some(self.wake.map_or(after, |wake| wake.min(after)));
    }

    fn run(&mut self, plan: Result<&Plan, &Invalid>, applied: &Applied) {
        for name in condition::TYPES {
            if !self.status.conditions.iter().any(|condition| condition.type_ == name) {
                self.set(name, ConditionStatus::Unknown, reason::PENDING, "");
            }
        }
        self.refresh_generations();
        let plan = match plan {
            Ok(plan) => plan,
            // Accepted once, and now nothing says any more what was accepted.
            Err(invalid) if !self.status.job_refs.is_empty() && invalid.reason != reason::PLAN_UNREADABLE => {
                return self.finish(condition::FAILED, invalid.reason, &invalid.message);
            }
            Err(invalid) => {
                self.status.phase = Some(Phase::Pending);
                self.set(condition::ACCEPTED, ConditionStatus::False, invalid.reason, &invalid.message);
                self.check_deadlines(None);
                return;
            }
        };
        if let Some(taken) = &applied.name_taken {
            let message = format!("{taken} belongs to somebody else; delete it, or give the job another name");
            self.set(condition::ACCEPTED, ConditionStatus::False, reason::CHILD_NAME_TAKEN, &message);
            self.wake_in(QUEUE_INTERVAL);
            if self.current().is_none_or(|current| current.uid.is_none()) {
                self.status.phase = Some(Phase::Pending);
                self.check_deadlines(Some(plan));
                return;
            }
            // An attempt is not disturbed by what is in the way of something else.
        } else {
            self.accept(plan);
        }
        self.note_attempt(plan, applied);
        if self.check_deadlines(Some(plan)) {
            return;
        }
        let ended = self.note_end(plan);
        if let Some(ended) = ended
            && self.conclude(plan, &ended)
        {
            return;
        }
        self.hold_or_go_on();
        self.describe(plan, applied);
    }

    /// Every condition is about the newest generation, also where nothing else about it is new.
    fn refresh_generations(&mut self) {
        for condition in &mut self.status.conditions {
            condition.observed_generation = self.job.metadata.generation;
        }
    }

    fn accept(&mut self, plan: &Plan) {
        if nothing_was_made(&self.status, self.observed) {
            let resolved = self.status.resolved.get_or_insert_with(ResolvedStatus::default);
            resolved.hyperparameters = Some(crds::resolve::hyperparameters_spec(&plan.run.hyperparameters));
            resolved.image = Some(plan.pods.image.clone());
            resolved.claim = Some(plan.claim.name().to_owned());
            resolved.plan_digest = Some(plan.digest());
        }
        self.set(condition::ACCEPTED, ConditionStatus::True, reason::RESOLVED, "");
        if plan.run.output.uri.is_none() && is_unknown(&self.status, condition::PUBLISHED) {
            self.set(
                condition::PUBLISHED,
                ConditionStatus::Unknown,
                reason::NOT_REQUESTED,
                "the output stays on the volume of the run",
            );
        }
    }

    fn current(&self) -> Option<&JobReference> {
        self.status.job_refs.last()
    }

    /// Lists the next attempt when it is due.
    fn hold_or_go_on(&mut self) {
        if self.job.spec.suspend {
            self.set(condition::SUSPENDED, ConditionStatus::True, reason::SUSPENDED_BY_USER, "spec.suspend is true");
            return;
        }
        if is_true(&self.status, condition::SUSPENDED) {
            self.set(condition::SUSPENDED, ConditionStatus::False, reason::RESUMED, "");
        }
        let Some(last) = self.current().cloned() else {
            return self.list(PodStage::Prepare, 1);
        };
        let Some(outcome) = last.outcome else { return };
        let (stage, attempt) = match (outcome, last.stage) {
            (AttemptOutcome::Done, PodStage::Prepare) => (PodStage::Train, 1),
            (AttemptOutcome::Done, _) => (PodStage::Publish, 1),
            _ => (last.stage, last.attempt + 1),
        };
        let failed = self.status.attempts.as_ref().map_or(0, |attempts| attempts.failed);
        let wait = backoff(outcome, failed, self.timing.first_backoff, &format!("{:?}", (self.job.uid(), &last.name)));
        let ended = last.completion_time.as_ref().map_or(self.now, |ended| ended.0);
        let waited = self.now.duration_since(ended).unsigned_abs();
        if waited < wait {
            self.wake_in(wait.saturating_sub(waited));
        } else {
            self.list(stage, attempt);
        }
    }

    fn list(&mut self, stage: PodStage, attempt: i32) {
        if stage == PodStage::Train {
            self.status.attempts.get_or_insert_with(AttemptsStatus::default).total += 1;
        }
        self.status.stage = Some(stage);
        self.status.job_refs.push(JobReference {
            name: build::stage_job_name(self.job, stage, attempt),
            stage,
            attempt,
            uid: None,
            start_time: None,
            completion_time: None,
            outcome: None,
            reason: None,
        });
        let excess = self.status.job_refs.len().saturating_sub(LISTED_ATTEMPTS);
        self.status.job_refs.drain(..excess);
    }
}

fn is_unknown(status: &FineTuneJobStatus, name: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == name && condition.status == "Unknown")
}
