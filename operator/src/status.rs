//! The next status of a job, from its last one and what was observed. Pure. Everything that a decision depends on later is
//! recorded here first: an attempt is listed before its Job is made, and how it ended before the next one is listed.

pub mod convert;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crds::condition::{self, ConditionStatus, reason, set_condition};
use crds::exit::ExitCode;
use crds::finetunejob::{
    AttemptOutcome, AttemptsStatus, JobReference, LastFailure, Phase, ResolvedStatus, UsageStatus,
};
use crds::report::{Report, Stage};
use crds::run::PodStage;
use crds::{FineTuneJob, FineTuneJobStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::build;
use crate::observe::{AttemptSeen, JobSeen, Observed, PodSeen, QueueSeen};
use crate::policy::backoff::backoff;
use crate::policy::deadline::{Deadline, deadline, seconds_between, time_to_live};
use crate::policy::failure::{Ended, Reading, read};
use crate::policy::verdict::judge;
use crate::validate::{Invalid, Plan};

/// Attempts that the status lists.
const LISTED_ATTEMPTS: usize = 16;
/// Training attempts in a row without a new checkpoint that end a job.
const LIVES: i32 = 3;
/// Attempts that may run out of memory: the limit does not grow by itself.
const OUT_OF_MEMORY_ATTEMPTS: usize = 2;
/// Between two looks at a queue's Workload.
const QUEUE_INTERVAL: Duration = Duration::from_secs(15);
/// Garbage is collected within seconds.
const LEFTOVER_INTERVAL: Duration = Duration::from_secs(2);
/// A Job whose pod the API server refuses (quota, admission) shows no more than that it has none.
const POD_PATIENCE: Duration = Duration::from_secs(20);

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

/// What is known of how the newest attempt ended.
fn reading(job: &FineTuneJob, observed: &Observed, current: &JobReference) -> Option<Reading> {
    let attempt = observed.attempt.as_ref()?;
    let uid = job.uid().unwrap_or_default();
    let own = attempt.report(&uid, current.stage, current.attempt);
    // A pod of ours that reads the volume is gone before the next one writes to it.
    let read_job = observed.report_job.as_ref().filter(|read| !read.is_live());
    let from_volume = read_job.and_then(|read| read.report(&uid, current.stage, current.attempt));
    let volume_was_read = observed.report_job.as_ref().is_some_and(AttemptSeen::has_ended);
    Some(read(attempt, own.or(from_volume).as_ref(), volume_was_read))
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
        let generation = self.job.metadata.generation;
        set_condition(&mut self.status.conditions, name, status, reason, message, generation, Time(self.now));
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

    /// What is seen of the attempt that runs: its Job's UID, its start, its progress.
    fn note_attempt(&mut self, plan: &Plan, applied: &Applied) {
        let Some(seen) = &self.observed.attempt else { return };
        let Some(current) = self.status.job_refs.last_mut().filter(|current| current.outcome.is_none()) else { return };
        if current.uid.is_none() {
            current.uid = match &seen.job {
                JobSeen::Present { uid, .. } => Some(uid.clone()),
                JobSeen::Missing | JobSeen::Foreign => applied.created_uid.clone(),
            };
        }
        // A Job that a queue closed and opened again has several pods; what ran before it was closed was counted then.
        let queued = plan.pods.queue(current.stage).is_some();
        let pod = seen.newest_pod().filter(|pod| !(queued && pod.terminating));
        let started = pod.and_then(|pod| pod.started.clone());
        let closed = matches!(seen.job, JobSeen::Present { suspended: true, .. });
        if current.start_time.is_none() && !closed {
            current.start_time = started;
        }
        let (stage, attempt, first_start) = (current.stage, current.attempt, current.start_time.clone());
        if self.status.start_time.is_none() {
            self.status.start_time = first_start;
        }
        self.status.stage = Some(stage);
        if let Some(progress) = &self.observed.progress
            && progress.pod_stage == Some(stage)
            && progress.attempt == attempt
        {
            convert::note_progress(&mut self.status, progress);
        }
    }

    fn newest_pod(&self) -> Option<&PodSeen> {
        self.observed.attempt.as_ref().and_then(|attempt| attempt.newest_pod())
    }

    fn current(&self) -> Option<&JobReference> {
        self.status.job_refs.last()
    }

    fn check_deadlines(&mut self, plan: Option<&Plan>) -> bool {
        let trains =
            self.current().is_some_and(|current| current.stage == PodStage::Train && current.outcome.is_none());
        let running_since = self
            .newest_pod()
            .filter(|pod| trains && pod.running)
            .and_then(|pod| pod.started.as_ref())
            .map(|started| started.0);
        let created = self.job.metadata.creation_timestamp.as_ref().map_or(self.now, |created| created.0);
        let suspended = self.status.conditions.iter().find(|condition| condition.type_ == condition::SUSPENDED);
        let waits_since = match suspended {
            Some(held) if held.status == "True" => self.now,
            Some(held) if held.reason == reason::RESUMED => held.last_transition_time.0.max(created),
            _ => created,
        };
        let has_trained = self.status.job_refs.iter().any(|attempt| {
            attempt.stage == PodStage::Publish || (attempt.stage == PodStage::Train && attempt.start_time.is_some())
        }) || self.status.usage.as_ref().is_some_and(|usage| usage.train_seconds > 0);
        let is_trained = self
            .status
            .job_refs
            .iter()
            .any(|attempt| attempt.stage == PodStage::Train && attempt.outcome == Some(AttemptOutcome::Done));
        if is_trained {
            return false;
        }
        // Whoever holds a job does not wait for it.
        let starts = has_trained || self.job.spec.suspend;
        match deadline(&self.job.spec, &self.status, waits_since, starts, running_since, self.now) {
            Deadline::Over { reason, message } => {
                if let Some(plan) = plan {
                    self.end_by_deadline(plan, reason, &message);
                }
                self.finish(condition::FAILED, reason, &message);
                true
            }
            Deadline::In(left) => {
                self.wake_in(left);
                false
            }
            Deadline::None => false,
        }
    }

    /// The attempt that a deadline ends is counted as what it was.
    fn end_by_deadline(&mut self, plan: &Plan, reason: &str, message: &str) {
        let Some(current) = self.current().filter(|current| current.outcome.is_none()).cloned() else { return };
        let ended = Ended {
            outcome: AttemptOutcome::Final,
            reason: reason.to_owned(),
            message: message.to_owned(),
            exit_code: None,
            report: None,
        };
        self.record_end(plan, &current, &ended, Time(self.now));
    }

    fn record_end(&mut self, plan: &Plan, current: &JobReference, ended: &Ended, finished: Time) {
        self.count(plan, current, ended, &finished);
        let recorded = self.status.job_refs.last_mut().expect("there is a current one");
        recorded.outcome = Some(ended.outcome);
        recorded.reason = Some(ended.reason.clone());
        recorded.completion_time = Some(finished);
    }

    /// Records how the newest attempt ended, once it has.
    fn note_end(&mut self, plan: &Plan) -> Option<Ended> {
        let current = self.current().filter(|current| current.outcome.is_none())?.clone();
        let attempt = self.observed.attempt.as_ref()?;
        // Before this pass recorded that the Job was made, nothing can have ended.
        let was_made =
            self.job.status.as_ref().and_then(|status| status.job_refs.last()).is_some_and(|last| last.uid.is_some());
        if !was_made || !attempt.has_ended() {
            return None;
        }
        let mut ended = match reading(self.job, self.observed, &current)? {
            Reading::Ended(ended) => ended,
            // A held job makes no pod, not even one that reads a volume. Work that was done is found when it goes on.
            Reading::AskTheVolume if self.job.spec.suspend => Box::new(Ended::held()),
            Reading::AskTheVolume => return None,
        };
        if self.job.spec.suspend && !matches!(ended.outcome, AttemptOutcome::Done | AttemptOutcome::Final) {
            *ended = Ended { report: ended.report.take(), ..Ended::held() };
        }
        let told = attempt.newest_pod().and_then(|pod| pod.terminated.as_ref()?.finished.clone());
        // The node's clock may be ahead of ours.
        let finished = told.filter(|told| told.0 <= self.now).unwrap_or(Time(self.now));
        self.record_end(plan, &current, &ended, finished);
        Some(*ended)
    }

    fn count(&mut self, plan: &Plan, current: &JobReference, ended: &Ended, finished: &Time) {
        let attempts = self.status.attempts.get_or_insert_with(AttemptsStatus::default);
        match ended.outcome {
            AttemptOutcome::Failed => attempts.failed += 1,
            AttemptOutcome::Preempted => attempts.preempted += 1,
            AttemptOutcome::Done | AttemptOutcome::Final | AttemptOutcome::Suspended => {}
        }
        if current.stage == PodStage::Train {
            // Of a trainer that was killed the last word is what it told before.
            let known = self.status.checkpoints.last().map(|checkpoint| checkpoint.step);
            count_progress(attempts, known, current.start_time.is_some(), ended);
            self.count_time(plan, current, finished.0);
        }
        if matches!(ended.outcome, AttemptOutcome::Failed | AttemptOutcome::Final) {
            let mut message = ended.message.clone();
            convert::shorten(&mut message);
            self.status.last_failure =
                Some(LastFailure { reason: ended.reason.clone(), exit_code: ended.exit_code, message });
        }
        if let Some(report) = &ended.report {
            convert::note_report(&mut self.status, current.stage, report);
        }
    }

    /// Counts the time that the newest attempt trained, up to `until`.
    fn count_time(&mut self, plan: &Plan, current: &JobReference, until: Timestamp) {
        let usage = self.status.usage.get_or_insert_with(UsageStatus::default);
        let seconds = current.start_time.as_ref().map_or(0, |start| seconds_between(start.0, until));
        usage.train_seconds += seconds;
        usage.gpu_seconds += seconds * plan.pods.accelerators();
        let price = plan.run.resources.price_per_hour;
        // Where there is no accelerator the price is the machine's.
        let priced = usage.train_seconds * plan.pods.accelerators().max(1);
        usage.cost = price.map(|price| convert::decimal(price * priced as f64 / 3600.0));
    }

    /// What the end of an attempt means for the job; true when the job has ended.
    fn conclude(&mut self, plan: &Plan, ended: &Ended) -> bool {
        let policy = self.job.spec.failure_policy.as_ref();
        let max_retries = policy.and_then(|policy| policy.max_retries).unwrap_or(3);
        let max_preemptions = self.max_preemptions();
        let attempts = self.status.attempts.clone().unwrap_or_default();
        let stage = self.current().map_or(PodStage::Prepare, |current| current.stage);
        let out_of_memory = ExitCode::OutOfMemory.reason();
        let exhausted =
            self.status.job_refs.iter().filter(|attempt| attempt.reason.as_deref() == Some(out_of_memory)).count();
        let told = |limit: &str| format!("{limit}; the last attempt: {}: {}", ended.reason, ended.message);
        let (reason, message) = match ended.outcome {
            AttemptOutcome::Done => return self.stage_done(plan, stage, ended.report.as_ref()),
            AttemptOutcome::Suspended => return false,
            AttemptOutcome::Final => (ended.reason.clone(), ended.message.clone()),
            AttemptOutcome::Failed if ended.reason == out_of_memory && exhausted >= OUT_OF_MEMORY_ATTEMPTS => {
                (ended.reason.clone(), ended.message.clone())
            }
            _ if stage == PodStage::Train && attempts.without_checkpoint >= LIVES => {
                let message = told(&format!("{LIVES} attempts in a row left no new checkpoint"));
                (reason::NO_PROGRESS.to_owned(), message)
            }
            AttemptOutcome::Failed if attempts.failed > max_retries => {
                let message = told(&format!("{} attempts failed, maxRetries is {max_retries}", attempts.failed));
                (reason::BACKOFF_LIMIT_EXCEEDED.to_owned(), message)
            }
            AttemptOutcome::Preempted if attempts.preempted > max_preemptions => {
                let limit =
                    format!("{} attempts were preempted, maxPreemptions is {max_preemptions}", attempts.preempted);
                (reason::PREEMPTION_LIMIT_EXCEEDED.to_owned(), told(&limit))
            }
            AttemptOutcome::Failed | AttemptOutcome::Preempted => return false,
        };
        if stage == PodStage::Publish {
            self.set(condition::PUBLISHED, ConditionStatus::False, reason::PUBLISH_FAILED, &message);
        }
        self.finish(condition::FAILED, &reason, &message);
        true
    }

    fn max_preemptions(&self) -> i32 {
        self.job.spec.failure_policy.as_ref().and_then(|policy| policy.max_preemptions).unwrap_or(20)
    }

    fn stage_done(&mut self, plan: &Plan, stage: PodStage, report: Option<&Report>) -> bool {
        match stage {
            PodStage::Prepare | PodStage::Report => false,
            PodStage::Train => {
                let validation = &plan.run.validation;
                let has_gates = !validation.gates.is_empty() || validation.forgetting.is_some();
                let judgement = judge(report.and_then(|report| report.validation.as_ref()), has_gates);
                self.set(condition::VALIDATION_PASSED, judgement.status, judgement.reason, &judgement.message);
                if !judgement.gate_failed || plan.run.output.publish_always {
                    return false;
                }
                self.set(condition::PUBLISHED, ConditionStatus::False, reason::GATE_FAILED, &judgement.message);
                self.finish_by_verdict(plan);
                true
            }
            PodStage::Publish => {
                if let Some(artifact) = &self.status.artifact {
                    let message = format!("{} at {}", artifact.digest, artifact.uri);
                    self.set(condition::PUBLISHED, ConditionStatus::True, reason::ARTIFACT_VERIFIED, &message);
                }
                self.finish_by_verdict(plan);
                true
            }
        }
    }

    fn finish_by_verdict(&mut self, plan: &Plan) {
        let fails = plan.run.validation.fail_on_gate;
        let found = self.status.conditions.iter().find(|condition| condition.type_ == condition::VALIDATION_PASSED);
        let (failed, message) =
            found.map_or((false, String::new()), |found| (found.status == "False", found.message.clone()));
        if failed && fails {
            self.finish(condition::FAILED, reason::VALIDATION_FAILED, &message);
        } else {
            self.finish(condition::COMPLETE, ExitCode::Done.reason(), &message);
        }
    }

    fn finish(&mut self, name: &str, reason: &str, message: &str) {
        let mut message = message.to_owned();
        convert::shorten(&mut message);
        let other = if name == condition::COMPLETE { condition::FAILED } else { condition::COMPLETE };
        self.set(other, ConditionStatus::False, reason, "");
        self.set(condition::RUNNING, ConditionStatus::False, reason, "");
        self.set(name, ConditionStatus::True, reason, &message);
        self.status.phase = Some(if name == condition::COMPLETE { Phase::Succeeded } else { Phase::Failed });
        self.status.completion_time = Some(Time(self.now));
        self.status.stage = None;
        if let Some(progress) = &mut self.status.progress {
            progress.eta = None;
            progress.estimated_remaining_seconds = None;
        }
        self.wake = time_to_live(&self.job.spec, &self.status, self.now);
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

    /// Running, Admitted and the phase.
    fn describe(&mut self, plan: &Plan, applied: &Applied) {
        self.describe_queue(plan);
        if is_terminal(&self.status) {
            return;
        }
        let current = self.current().cloned();
        let (status, reason, message) = self.running(applied);
        self.set(condition::RUNNING, status, reason, &message);
        let is_queued = self
            .status
            .conditions
            .iter()
            .any(|condition| condition.type_ == condition::ADMITTED && condition.status == "False");
        let stuck = matches!(reason, reason::UNSCHEDULABLE | reason::IMAGE_PULL_FAILED | reason::CHILD_CREATION_FAILED);
        // A trainer that has ended tells nothing more: it evaluated last.
        let evaluates = self
            .observed
            .progress
            .as_ref()
            .map_or(self.status.phase == Some(Phase::Evaluating), |progress| progress.stage == Stage::Evaluating);
        self.status.phase = Some(if self.job.spec.suspend {
            Phase::Suspended
        } else if is_queued {
            Phase::Queued
        } else if stuck {
            Phase::Pending
        } else {
            match current.map(|current| current.stage) {
                None => Phase::Pending,
                Some(PodStage::Prepare) if self.status.start_time.is_none() => Phase::Pending,
                Some(PodStage::Prepare) => Phase::Preparing,
                Some(PodStage::Train) if evaluates => Phase::Evaluating,
                Some(PodStage::Train) => Phase::Training,
                Some(PodStage::Publish | PodStage::Report) => Phase::Publishing,
            }
        });
    }

    fn describe_queue(&mut self, plan: &Plan) {
        let Some(current) = self.current().cloned() else { return };
        let Some(queue) = plan.pods.queue(current.stage) else {
            return self.set(condition::ADMITTED, ConditionStatus::True, reason::NO_QUEUE, "");
        };
        let was_admitted = self
            .status
            .conditions
            .iter()
            .any(|condition| condition.type_ == condition::ADMITTED && condition.reason == reason::QUOTA_RESERVED);
        let (reason, message) = match &self.observed.queue {
            Some(QueueSeen::ControllerMissing) => {
                let message = format!(
                    "the Job is held for the queue {queue}, and nobody serves queues here; \
                     install Kueue, or remove scheduling.queueName"
                );
                (reason::QUEUE_CONTROLLER_MISSING, message)
            }
            Some(QueueSeen::Waiting(message)) => (reason::WAITING_FOR_QUOTA, message.clone()),
            Some(QueueSeen::Evicted(message)) => (reason::EVICTED, message.clone()),
            None => {
                // An attempt that this pass listed was not observed yet: what was is the one before it.
                let job = self.observed.attempt.as_ref().map(|attempt| &attempt.job).filter(|_| current.uid.is_some());
                if matches!(job, Some(JobSeen::Present { suspended: false, .. })) {
                    self.set(condition::ADMITTED, ConditionStatus::True, reason::QUOTA_RESERVED, "");
                }
                return;
            }
        };
        if was_admitted && current.start_time.is_some() {
            // The same Job comes back when it is admitted again: nothing ended, and yet its pod was taken away.
            self.status.attempts.get_or_insert_with(AttemptsStatus::default).preempted += 1;
            if current.stage == PodStage::Train {
                // Waiting for quota is no training: it neither costs nor uses up activeDeadlineSeconds.
                self.count_time(plan, &current, self.now);
                self.status.job_refs.last_mut().expect("there is a current one").start_time = None;
            }
        }
        self.set(condition::ADMITTED, ConditionStatus::False, reason, &message);
        self.wake_in(QUEUE_INTERVAL);
        let (preempted, most) =
            (self.status.attempts.as_ref().map_or(0, |attempts| attempts.preempted), self.max_preemptions());
        if preempted > most {
            let message = format!("{preempted} preemptions, maxPreemptions is {most}; the last one: {message}");
            self.finish(condition::FAILED, reason::PREEMPTION_LIMIT_EXCEEDED, &message);
        }
    }

    fn running(&mut self, applied: &Applied) -> (ConditionStatus, &'static str, String) {
        use ConditionStatus::{False, True, Unknown};
        if let Some(leftover) = &applied.leftover {
            self.wake_in(LEFTOVER_INTERVAL);
            return (False, reason::PENDING, format!("{leftover} of an earlier job of this name is being taken away"));
        }
        if let Some(refused) = &applied.refused {
            self.wake_in(QUEUE_INTERVAL);
            return (False, reason::CHILD_CREATION_FAILED, refused.clone());
        }
        if self.job.spec.suspend {
            return (False, reason::SUSPENDED_BY_USER, String::new());
        }
        let Some(current) = self.current().cloned() else { return (Unknown, reason::PENDING, String::new()) };
        if let Some(outcome) = current.outcome {
            let reason = if outcome == AttemptOutcome::Preempted { reason::PREEMPTED } else { reason::PENDING };
            return (False, reason, "waiting for the next attempt".into());
        }
        let Some(attempt) = &self.observed.attempt else { return (Unknown, reason::PENDING, String::new()) };
        if attempt.job == JobSeen::Foreign {
            return (False, reason::CHILD_NAME_TAKEN, format!("the Job {} belongs to somebody else", current.name));
        }
        let Some(pod) = attempt.newest_pod() else {
            let JobSeen::Present { created: Some(created), suspended: false, .. } = &attempt.job else {
                return (False, reason::PENDING, String::new());
            };
            let waited = self.now.duration_since(created.0).unsigned_abs();
            if waited < POD_PATIENCE {
                self.wake_in(POD_PATIENCE.saturating_sub(waited));
                return (False, reason::PENDING, String::new());
            }
            let name = &current.name;
            let message =
                format!("the Job {name} has no pod: a quota or a policy may refuse it; kubectl describe job {name}");
            return (False, reason::CHILD_CREATION_FAILED, message);
        };
        if let Some(message) = &pod.unschedulable {
            return (False, reason::UNSCHEDULABLE, message.clone());
        }
        if let Some((why, message)) = &pod.waiting {
            // Other reasons pass, or are told by how the pod ends.
            let is_pull = why.contains("Image");
            let reason = if is_pull { reason::IMAGE_PULL_FAILED } else { reason::CHILD_CREATION_FAILED };
            // The kubelet tells of one failure in turns: that it failed, and that it waits.
            let told =
                self.status.conditions.iter().find(|one| one.type_ == condition::RUNNING && one.reason == reason);
            if let Some(told) = told.filter(|_| why.ends_with("BackOff")) {
                return (False, reason, told.message.clone());
            }
            return (False, reason, format!("{why}: {message}"));
        }
        if pod.terminating && pod.live {
            let message = "the pod is being taken away; the next attempt begins when it is gone for certain";
            return (False, reason::PREEMPTED, message.into());
        }
        if pod.running { (True, reason::POD_RUNNING, String::new()) } else { (False, reason::PENDING, String::new()) }
    }
}

fn is_unknown(status: &FineTuneJobStatus, name: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == name && condition.status == "Unknown")
}

/// Whether a training attempt left a checkpoint that none before it had left.
fn count_progress(attempts: &mut AttemptsStatus, known: Option<i64>, ran: bool, ended: &Ended) {
    let report = ended.report.as_ref();
    let told = [
        known,
        attempts.resumed_from_step,
        report.and_then(|report| report.last_checkpoint_step),
        report.and_then(|report| report.resumed_from_step),
    ];
    let newest = told.into_iter().flatten().max();
    if newest > attempts.checkpoint_step {
        attempts.checkpoint_step = newest;
        attempts.without_checkpoint = 0;
    } else if ran && !matches!(ended.outcome, AttemptOutcome::Done | AttemptOutcome::Suspended) {
        attempts.without_checkpoint += 1;
    }
}
