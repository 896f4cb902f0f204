//! How the newest attempt ended, and what that means for the job.

use std::time::Duration;

use crds::condition::{self, ConditionStatus, reason};
use crds::exit::ExitCode;
use crds::finetunejob::{AttemptOutcome, JobReference};
use crds::run::PodStage;
use crds::status::{condition, seconds_between};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::deadlines::{ended_by_deadline, nearest_deadline, over};
use super::{Decision, Recorded, Step, between_attempts, max_preemptions, started};
use crate::facts::{AttemptSeen, Facts, JobSeen};
use crate::policy::attempts::{Checkpoints, Counted};
use crate::policy::deadline::Deadline;
use crate::policy::failure::{End, Ended, end_of};
use crate::policy::verdict::judge;
use crate::validate::Plan;

/// How long the volume is waited for when a deadline is over: a queue may hold the Job that reads it.
const READ_PATIENCE: Duration = Duration::from_mins(6);
/// A source that is down for longer is not coming back by itself.
const LONGEST_OUTAGE_SECONDS: i64 = 6 * 3600;
/// Attempts that may run out of memory: the limit does not grow by itself.
const OUT_OF_MEMORY_ATTEMPTS: usize = 2;
/// Training attempts in a row without a new checkpoint that end a job.
const LIVES: i32 = 3;

/// The newest attempt runs no more, and its end is not recorded yet.
pub(super) fn ended(facts: &Facts, plan: &Plan, current: &JobReference, seen: &AttemptSeen) -> Decision {
    let uid = facts.job.uid().unwrap_or_default();
    let own = seen.report(&uid, current.stage, current.attempt);
    // A pod of ours that reads the volume is gone before the next one writes to it.
    let reader = facts.observed.report_job.as_ref();
    let volume = reader.filter(|reader| !reader.is_live());
    let volume = volume.and_then(|reader| reader.report(&uid, current.stage, current.attempt));
    let was_read = reader.is_some_and(AttemptSeen::has_ended);
    let last_word = own.as_ref().or_else(|| volume.as_ref().filter(|report| report.is_last_word()));
    let ask = || {
        let Some(reader) = reader else { return Decision::step(Step::ReadVolume) };
        let asked = match &reader.job {
            JobSeen::Present { released: Some(released), .. } => seconds_between(released.0, facts.now),
            JobSeen::Present { .. } | JobSeen::Missing | JobSeen::Foreign => 0,
        };
        let left = READ_PATIENCE.saturating_sub(Duration::from_secs(asked.unsigned_abs()));
        match nearest_deadline(facts, Some(plan), None) {
            Deadline::Over { .. } if left.is_zero() => over(facts, Some(plan), None).unwrap_or_default(),
            Deadline::Over { .. } => Decision::step(Step::Wait).wake_in(left),
            Deadline::In(_) | Deadline::None => Decision::step(Step::Wait),
        }
    };
    let mut ended = match end_of(seen, current.stage, last_word, was_read) {
        End::Known(ended) => *ended,
        // A held job makes no pod, not even one that reads a volume. Work that was done is found when it goes on.
        End::OnVolume if facts.job.spec.suspend => Ended::held(),
        End::OnVolume => return ask(),
    };
    if facts.job.spec.suspend && !matches!(ended.outcome, AttemptOutcome::Done | AttemptOutcome::Final) {
        ended = Ended { report: ended.report.take(), ..Ended::held() };
    }
    if !matches!(ended.outcome, AttemptOutcome::Done | AttemptOutcome::Final)
        && let Deadline::Over { reason, message, .. } = nearest_deadline(facts, Some(plan), None)
    {
        ended = Ended { report: ended.report.take(), exit_code: ended.exit_code, ..ended_by_deadline(reason, message) };
    }
    let told = seen.newest_pod().and_then(|pod| pod.terminated.as_ref()?.finished.clone());
    // The node's clock may be ahead of ours.
    let finished = told.filter(|told| told.0 <= facts.now).unwrap_or(Time(facts.now));
    let status = facts.status();
    let attempts = status.attempts.clone().unwrap_or_default();
    let counted = Counted {
        stage: current.stage,
        ran: started(facts, plan).is_some(),
        ended: &ended,
        finished: &finished,
        checkpoints: Checkpoints::new(status, last_word, volume.as_ref()),
    };
    if counted.is_in_doubt(&attempts) && !was_read {
        return ask();
    }
    let attempts = counted.add_to(attempts);
    conclude(facts, plan, current, Recorded { ended, finished, attempts })
}

/// What the end of an attempt means for the job.
fn conclude(facts: &Facts, plan: &Plan, current: &JobReference, recorded: Recorded) -> Decision {
    let (ended, attempts) = (&recorded.ended, &recorded.attempts);
    let policy = facts.job.spec.failure_policy.as_ref();
    let max_retries = policy.and_then(|policy| policy.max_retries).unwrap_or(3);
    let max_preemptions = max_preemptions(facts);
    let told = |limit: &str| format!("{limit}; the last attempt: {}: {}", ended.reason, ended.message);
    let out_of_memory = ExitCode::OutOfMemory.reason();
    let exhausted =
        facts.status().job_refs.iter().filter(|attempt| attempt.reason.as_deref() == Some(out_of_memory)).count() + 1;
    let outage = attempts.unavailable_since.as_ref().map_or(0, |since| seconds_between(since.0, facts.now));
    let decision = match ended.outcome {
        AttemptOutcome::Done => stage_done(facts, plan, current.stage, &recorded),
        AttemptOutcome::Final => Decision::fail(&ended.reason, &ended.message),
        AttemptOutcome::Failed if ended.reason == out_of_memory && exhausted >= OUT_OF_MEMORY_ATTEMPTS => {
            Decision::fail(&ended.reason, &ended.message)
        }
        AttemptOutcome::Failed | AttemptOutcome::Preempted
            if current.stage == PodStage::Train && attempts.without_checkpoint >= LIVES =>
        {
            Decision::fail(reason::NO_PROGRESS, told(&format!("{LIVES} attempts in a row left no new checkpoint")))
        }
        AttemptOutcome::Failed if attempts.failed > max_retries => {
            let limit = format!("{} attempts failed, maxRetries is {max_retries}", attempts.failed);
            Decision::fail(reason::BACKOFF_LIMIT_EXCEEDED, told(&limit))
        }
        AttemptOutcome::Preempted if attempts.preempted > max_preemptions => {
            let limit = format!("{} attempts were preempted, maxPreemptions is {max_preemptions}", attempts.preempted);
            Decision::fail(reason::PREEMPTION_LIMIT_EXCEEDED, told(&limit))
        }
        AttemptOutcome::Unavailable if outage > LONGEST_OUTAGE_SECONDS => {
            let limit = format!("the source is down for {} h", LONGEST_OUTAGE_SECONDS / 3600);
            Decision::fail(&ended.reason, told(&limit))
        }
        AttemptOutcome::Failed
        | AttemptOutcome::Preempted
        | AttemptOutcome::Unavailable
        | AttemptOutcome::Suspended => between_attempts(facts, plan, Some(&recorded)),
    };
    Decision { ended: Some(recorded), ..decision }
}

fn stage_done(facts: &Facts, plan: &Plan, stage: PodStage, recorded: &Recorded) -> Decision {
    match stage {
        PodStage::Prepare | PodStage::Report => between_attempts(facts, plan, Some(recorded)),
        PodStage::Train => {
            let validation = &plan.run.validation;
            let has_gates = !validation.gates.is_empty() || validation.forgetting.is_some();
            let found = recorded.ended.report.as_ref().and_then(|report| report.validation.as_ref());
            let judgement = judge(found, has_gates);
            let decision = if !judgement.gate_failed || plan.run.output.publish_always {
                between_attempts(facts, plan, Some(recorded))
            } else {
                by_verdict(plan, judgement.is_against(), &judgement.message)
            };
            Decision { judgement: Some(judgement), ..decision }
        }
        PodStage::Publish => {
            let found = condition(facts.status(), condition::VALIDATION_PASSED);
            by_verdict(
                plan,
                found.is_some_and(|found| found.status == ConditionStatus::False.name()),
                found.map_or("", |found| found.message.as_str()),
            )
        }
    }
}

fn by_verdict(plan: &Plan, is_against: bool, message: &str) -> Decision {
    if is_against && plan.run.validation.fail_on_gate {
        return Decision::fail(reason::VALIDATION_FAILED, message);
    }
    let (reason, message) = (ExitCode::Done.reason().to_owned(), message.to_owned());
    Decision::step(Step::Finish { condition: condition::COMPLETE, reason, message })
}
