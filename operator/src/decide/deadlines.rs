//! What the deadlines of a job mean for it.

use std::time::Duration;

use crds::condition::{self, reason};
use crds::finetunejob::{AttemptOutcome, JobReference};
use crds::run::PodStage;
use crds::status::{condition, holds, seconds_between};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Decision, Recorded, Step, started, unfinished_job};
use crate::facts::Facts;
use crate::policy::attempts::{Checkpoints, Counted};
use crate::policy::deadline::{Deadline, Elapsed, deadline};
use crate::policy::failure::Ended;
use crate::validate::Plan;

/// Beyond its grace period, how long a pod that was asked to end is waited for when a deadline is over.
const STOP_PATIENCE: Duration = Duration::from_mins(1);

/// What a deadline that is over means: an attempt that may run is stopped and read, then the job ends.
pub(super) fn over(facts: &Facts, plan: Option<&Plan>, recorded: Option<&Recorded>) -> Option<Decision> {
    let Deadline::Over { reason, message, by } = nearest_deadline(facts, plan, recorded) else { return None };
    let open = facts.current().filter(|_| recorded.is_none());
    // What never began left nothing to read.
    let has_begun = plan.is_some_and(|plan| started(facts, plan).is_some());
    let running = open.filter(|current| current.stage == PodStage::Train && current.uid.is_some() && has_begun);
    let Some(current) = open else { return Some(Decision::fail(reason, message)) };
    if running.is_some() {
        if let Some(remove) = unfinished_job(facts) {
            return Some(Decision::step(Step::Stop { remove, why: message }));
        }
        // It was asked to end: by then its node is to have done so.
        let grace = plan.map_or(0, |plan| plan.pods.termination_grace_period_seconds).unsigned_abs();
        let late = match facts.newest_pod().filter(|pod| pod.live).map(|pod| pod.ends_by.as_ref()) {
            Some(Some(ends_by)) => Duration::from_secs(seconds_between(ends_by.0, facts.now).unsigned_abs()),
            Some(None) => by.saturating_sub(Duration::from_secs(grace)),
            None => STOP_PATIENCE,
        };
        if late < STOP_PATIENCE {
            return Some(Decision::step(Step::Wait).wake_in(STOP_PATIENCE.saturating_sub(late)));
        }
    }
    let ended = ended_by_deadline(reason, message.clone());
    let status = facts.status();
    let counted = Counted {
        stage: current.stage,
        ran: false,
        ended: &ended,
        finished: &Time(facts.now),
        checkpoints: Checkpoints::new(status, None, None),
    };
    let attempts = counted.add_to(status.attempts.clone().unwrap_or_default());
    let recorded = plan.map(|_| Recorded { ended, finished: Time(facts.now), attempts });
    Some(Decision { ended: recorded, ..Decision::fail(reason, message) })
}

/// The end of an attempt that a deadline ends: it is counted in no budget.
pub(super) fn ended_by_deadline(reason: &str, message: String) -> Ended {
    Ended { outcome: AttemptOutcome::Final, reason: reason.to_owned(), message, exit_code: None, report: None }
}

/// Wakes a decision when the nearest deadline is over, and ends a job that is not accepted by it.
pub(super) fn within_deadlines(
    facts: &Facts,
    plan: Option<&Plan>,
    recorded: Option<&Recorded>,
    decision: Decision,
) -> Decision {
    match nearest_deadline(facts, plan, recorded) {
        Deadline::Over { reason, message, .. } if plan.is_none() => Decision::fail(reason, message),
        Deadline::In(left) => decision.wake_in(left),
        Deadline::Over { .. } | Deadline::None => decision,
    }
}

pub(super) fn nearest_deadline(facts: &Facts, plan: Option<&Plan>, recorded: Option<&Recorded>) -> Deadline {
    let status = facts.status();
    let trained =
        |attempt: &JobReference| attempt.stage == PodStage::Train && attempt.outcome == Some(AttemptOutcome::Done);
    let is_done = recorded.is_some_and(|recorded| recorded.ended.outcome == AttemptOutcome::Done);
    let trains = facts.current().is_some_and(|current| current.stage == PodStage::Train);
    if status.job_refs.iter().any(trained) || trains && is_done {
        return Deadline::None;
    }
    let open = facts.current().filter(|current| current.stage == PodStage::Train);
    let began = plan.and_then(|plan| started(facts, plan)).filter(|_| open.is_some());
    let counted = status.usage.as_ref().map_or(0, |usage| usage.train_seconds);
    // From when its container ended it trains no more, whoever keeps its pod.
    let ended = recorded.map(|recorded| recorded.finished.clone());
    let ended = ended.or_else(|| facts.newest_pod().and_then(|pod| pod.terminated.as_ref()?.finished.clone()));
    let until = ended.as_ref().map_or(facts.now, |ended| ended.0.min(facts.now));
    let running = began.as_ref().map_or(0, |began| seconds_between(began.0, until));
    let has_trained = began.is_some()
        || counted > 0
        || status.job_refs.iter().any(|attempt| {
            attempt.stage == PodStage::Publish || attempt.stage == PodStage::Train && attempt.start_time.is_some()
        });
    let created = facts.job.metadata.creation_timestamp.as_ref().map_or(facts.now, |created| created.0);
    let waits_since = match condition(status, condition::SUSPENDED) {
        // It was held until this pass.
        Some(_) if holds(status, condition::SUSPENDED) => facts.now,
        Some(held) if held.reason == reason::RESUMED => held.last_transition_time.0.max(created),
        _ => created,
    };
    let elapsed = Elapsed {
        // Whoever holds a job does not wait for it.
        waits_since: Some(waits_since).filter(|_| !has_trained && !facts.job.spec.suspend),
        trained_seconds: counted + running,
        trains: began.is_some() && ended.is_none(),
    };
    deadline(&facts.job.spec, elapsed, facts.now)
}
