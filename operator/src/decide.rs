//! What happens next with a job: [`decide`] alone says it, from [`Facts`], and touches nothing. The order of the questions is the
//! policy; [`crate::policy`] has the answers to each.
//!
//! 1. A job that has ended stays ended.
//! 2. A job that cannot be carried out waits for an edit; one whose plan is lost ends.
//! 3. An attempt that has ended is recorded before anything else is asked: work that was done is never lost to a deadline.
//!    Where nobody says how it ended, or whether it left a checkpoint, the volume is asked first.
//! 4. A job that its user holds makes nothing. A deadline ends what runs, then the job.
//! 5. The next attempt begins when no pod of the last one is left.

mod deadlines;
mod ending;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crds::condition::{self, reason};
use crds::finetunejob::{AttemptOutcome, AttemptsStatus, FineTuneJobStatus, JobReference};
use crds::run::PodStage;
use crds::status::{condition, is_terminal};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use self::deadlines::{over, within_deadlines};
use self::ending::ended;
use crate::facts::{AttemptSeen, Facts, JobSeen, Observed, QueueSeen};
use crate::policy::backoff::backoff;
use crate::policy::deadline::time_to_live;
use crate::policy::failure::Ended;
use crate::policy::verdict::Judgement;
use crate::validate::Plan;

/// What happens next with a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// The end of the newest attempt, which is to be recorded.
    pub ended: Option<Recorded>,
    /// The queue took back the quota of the newest attempt, which comes back as the same Job.
    pub evicted: bool,
    /// What validation found, once training is done.
    pub judgement: Option<Judgement>,
    /// What is done.
    pub step: Step,
    /// When to look again without a change; `None`: only a change matters.
    pub wake: Option<Duration>,
}

/// The end of an attempt, with the counts after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// How it ended.
    pub ended: Ended,
    /// When.
    pub finished: Time,
    /// The counts after it.
    pub attempts: AttemptsStatus,
}

/// One thing to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Step {
    /// The job has ended. A Job of it that runs is taken away.
    Rest {
        /// UID of that Job.
        remove: Option<String>,
    },
    /// The job is not accepted; nothing is made.
    Refuse,
    /// The user holds the job. A Job of it that runs is taken away.
    Hold {
        /// UID of that Job.
        remove: Option<String>,
    },
    /// Nothing, until something changes.
    #[default]
    Wait,
    /// The next attempt is listed, to be made by the next pass.
    List {
        /// Its stage.
        stage: PodStage,
        /// Counted from 1 in each stage.
        attempt: i32,
    },
    /// The objects of the newest attempt are made.
    Make,
    /// The Job is made that reads what the newest attempt left on the volume.
    ReadVolume,
    /// The newest attempt is made to end: its Job is taken away.
    Stop {
        /// UID of that Job.
        remove: String,
        /// Why, for people.
        why: String,
    },
    /// The job ends.
    Finish {
        /// `Complete` or `Failed`.
        condition: &'static str,
        /// Of that condition.
        reason: String,
        /// Of that condition.
        message: String,
    },
}

impl Decision {
    fn step(step: Step) -> Self {
        Self { step, ..Self::default() }
    }

    fn fail(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::step(Step::Finish { condition: condition::FAILED, reason: reason.into(), message: message.into() })
    }

    fn wake_in(mut self, after: Duration) -> Self {
        self.wake = Some(self.wake.map_or(after, |wake| wake.min(after)));
        self
    }
}

/// Whether no object was made for a job yet: what its profile says today is what it gets.
pub fn nothing_was_made(status: &FineTuneJobStatus, observed: &Observed) -> bool {
    match &status.job_refs[..] {
        [] => true,
        [only] => {
            let job = observed.attempt.as_ref().map(|attempt| &attempt.job);
            only.uid.is_none()
                && only.outcome.is_none()
                && observed.plan.is_none()
                && job.is_none_or(|job| *job == JobSeen::Missing)
        }
        _ => false,
    }
}

/// When the trainer of the newest attempt began to run. A Job that a queue closed and opened again has several pods; what ran
/// before it was closed was counted then.
pub fn started(facts: &Facts, plan: &Plan) -> Option<Time> {
    let current = facts.current()?;
    let queued = plan.pods.queue(current.stage).is_some();
    let closed = facts
        .observed
        .attempt
        .as_ref()
        .is_some_and(|seen| matches!(seen.job, JobSeen::Present { suspended: true, .. }));
    let pod = facts.newest_pod().filter(|pod| !(closed || queued && pod.ends_by.is_some()));
    current.start_time.clone().or_else(|| pod.and_then(|pod| pod.started.clone()))
}

/// What happens next with a job.
pub fn decide(facts: &Facts) -> Decision {
    if is_terminal(facts.status()) {
        // Whoever watches the job is told that nothing runs: so nothing may.
        let wake = time_to_live(&facts.job.spec, facts.status(), facts.now);
        return Decision { wake, ..Decision::step(Step::Rest { remove: unfinished_job(facts) }) };
    }
    let plan = match facts.plan {
        Ok(plan) => plan,
        // Accepted once, and now nothing says any more what was accepted.
        Err(invalid)
            if !nothing_was_made(facts.status(), facts.observed) && invalid.reason != reason::PLAN_UNREADABLE =>
        {
            return Decision::fail(invalid.reason, &invalid.message);
        }
        Err(_) => return within_deadlines(facts, None, None, Decision::step(Step::Refuse)),
    };
    let (Some(current), Some(seen)) = (facts.current(), &facts.observed.attempt) else {
        return between_attempts(facts, plan, None);
    };
    // Before it is recorded that the Job was made, nothing can have ended.
    if current.uid.is_some() && seen.has_ended() {
        return ended(facts, plan, current, seen);
    }
    under_way(facts, plan, current, seen)
}

/// No attempt is open, or the last one's end is `recorded` by this pass.
fn between_attempts(facts: &Facts, plan: &Plan, recorded: Option<&Recorded>) -> Decision {
    let remove = unfinished_job(facts);
    if facts.job.spec.suspend {
        return Decision::step(Step::Hold { remove });
    }
    if let Some(over) = over(facts, Some(plan), recorded) {
        return over;
    }
    let Some(last) = facts.newest() else {
        return within_deadlines(
            facts,
            Some(plan),
            None,
            Decision::step(Step::List { stage: PodStage::Prepare, attempt: 1 }),
        );
    };
    // What a sidecar keeps alive is taken away; what is on its way out is waited for.
    if let Some(remove) = remove {
        let why = "containers beside the trainer do not end by themselves".to_owned();
        return Decision::step(Step::Stop { remove, why });
    }
    if facts.observed.attempt.as_ref().is_some_and(AttemptSeen::is_live) {
        return within_deadlines(facts, Some(plan), recorded, Decision::step(Step::Wait));
    }
    let outcome = recorded.map(|recorded| recorded.ended.outcome).or(last.outcome);
    let outcome = outcome.unwrap_or(AttemptOutcome::Done);
    let (stage, attempt) = match (outcome, last.stage) {
        (AttemptOutcome::Done, PodStage::Prepare) => (PodStage::Train, 1),
        (AttemptOutcome::Done, _) => (PodStage::Publish, 1),
        _ => (last.stage, last.attempt + 1),
    };
    let attempts = recorded.map(|recorded| &recorded.attempts);
    let attempts = attempts.or(facts.status().attempts.as_ref());
    let repeated = match outcome {
        AttemptOutcome::Unavailable => unavailable_in_a_row(facts, recorded),
        _ => attempts.map_or(0, |attempts| attempts.failed),
    };
    let seed = format!("{:?}", (facts.job.uid(), &last.name));
    let wait = backoff(outcome, repeated, facts.timing.first_backoff, &seed);
    let ended = recorded.map(|recorded| &recorded.finished).or(last.completion_time.as_ref());
    let waited = ended.map_or(wait, |ended| facts.now.duration_since(ended.0).unsigned_abs());
    let decision = if waited < wait {
        Decision::step(Step::Wait).wake_in(wait.saturating_sub(waited))
    } else {
        Decision::step(Step::List { stage, attempt })
    };
    within_deadlines(facts, Some(plan), recorded, decision)
}

fn unavailable_in_a_row(facts: &Facts, recorded: Option<&Recorded>) -> i32 {
    let closed = facts.status().job_refs.iter().rev().filter_map(|attempt| attempt.outcome);
    let earlier = closed.take_while(|outcome| *outcome == AttemptOutcome::Unavailable).count();
    i32::try_from(earlier).unwrap_or(i32::MAX) + i32::from(recorded.is_some())
}

/// The newest attempt is listed, or runs.
fn under_way(facts: &Facts, plan: &Plan, current: &JobReference, seen: &AttemptSeen) -> Decision {
    if facts.job.spec.suspend {
        return Decision::step(Step::Hold { remove: unfinished_job(facts) });
    }
    if let Some(over) = over(facts, Some(plan), None) {
        return over;
    }
    let admitted = condition(facts.status(), condition::ADMITTED);
    let was_admitted = admitted.is_some_and(|admitted| admitted.reason == reason::QUOTA_RESERVED);
    // The same Job comes back when it is admitted again: nothing ended, and yet its pod was taken away.
    let evicted = facts.observed.queue.is_some() && was_admitted && current.start_time.is_some();
    if evicted {
        let preempted = preemptions(facts) + 1;
        let most = max_preemptions(facts);
        let decision = if preempted > most {
            let said = match &facts.observed.queue {
                Some(QueueSeen::Evicted(message) | QueueSeen::Waiting(message)) => message.as_str(),
                Some(QueueSeen::ControllerMissing) | None => "nobody serves queues any more",
            };
            let message = format!("{preempted} preemptions, maxPreemptions is {most}; the last one: {said}");
            Decision::fail(reason::PREEMPTION_LIMIT_EXCEEDED, message)
        } else {
            Decision::step(Step::Wait)
        };
        return Decision { evicted, ..decision };
    }
    let is_to_be_made = current.uid.is_none() && seen.job == JobSeen::Missing;
    // Today's profile may make another plan than the one that is recorded, which nothing was made from: this pass records it.
    let recorded = facts.status().resolved.as_ref().and_then(|resolved| resolved.plan_digest.as_ref());
    let is_recorded = facts.observed.plan.is_some() || recorded == Some(&plan.digest());
    let step = if is_to_be_made && is_recorded && seen.strangers.is_empty() { Step::Make } else { Step::Wait };
    within_deadlines(facts, Some(plan), None, Decision::step(step))
}

fn unfinished_job(facts: &Facts) -> Option<String> {
    facts.observed.attempt.as_ref().and_then(AttemptSeen::unfinished_job).map(str::to_owned)
}

fn preemptions(facts: &Facts) -> i32 {
    facts.status().attempts.as_ref().map_or(0, |attempts| attempts.preempted)
}

fn max_preemptions(facts: &Facts) -> i32 {
    facts.job.spec.failure_policy.as_ref().and_then(|policy| policy.max_preemptions).unwrap_or(20)
}
