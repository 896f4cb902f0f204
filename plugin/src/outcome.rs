//! How a job ended, and the exit code that says so.

use crds::FineTuneJob;
use crds::condition::{self, ConditionStatus, reason};
use crds::finetunejob::Phase;
use crds::status::{found, holds};

/// Anything else: arguments, rights, no cluster, no job.
pub const ERROR_EXIT: u8 = 5;

/// The table of `--help`.
pub const EXIT_CODES: &str = "Exit codes:
    0  the job succeeded, and no gate failed (or the phase of --for was reached)
    1  the job failed
    2  validation failed: a gate does not hold
    3  --timeout went by
    4  the job was deleted meanwhile
    5  another error: wrong arguments, no cluster, no rights, no such job
  130  interrupted; the job goes on";

/// How following a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a result that no gate refused, or in the phase that was waited for.
    Succeeded,
    /// Without a result.
    Failed,
    /// With a result that a gate refused.
    ValidationFailed,
    /// It goes on, and the wait was long enough.
    TimedOut,
    /// The job is no more.
    Deleted,
    /// By Ctrl-C.
    Interrupted,
}

impl Outcome {
    /// Given to the shell.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Succeeded => 0,
            Self::Failed => 1,
            Self::ValidationFailed => 2,
            Self::TimedOut => 3,
            Self::Deleted => 4,
            Self::Interrupted => 130,
        }
    }
}

/// How a job ended, if it has.
pub fn outcome(job: &FineTuneJob) -> Option<Outcome> {
    let status = job.status.as_ref()?;
    if let Some(failed) = found(status, condition::FAILED, ConditionStatus::True) {
        let by_gate = failed.reason == reason::VALIDATION_FAILED;
        return Some(if by_gate { Outcome::ValidationFailed } else { Outcome::Failed });
    }
    if !holds(status, condition::COMPLETE) {
        return None;
    }
    // `validation.onFailure: Complete` completes a job whose result no one should use unseen.
    let refused = status.validation.as_ref().and_then(|judged| judged.verdict.as_deref()) == Some("GateFailed");
    Some(if refused { Outcome::ValidationFailed } else { Outcome::Succeeded })
}

/// Whether a job is in a phase, or, as it moves on while nobody looks, beyond it.
pub fn has_reached(job: &FineTuneJob, wanted: Phase) -> bool {
    let Some(phase) = job.status.as_ref().and_then(|status| status.phase) else { return false };
    let places = (place(phase), place(wanted));
    phase == wanted || matches!(places, (Some(phase), Some(wanted)) if phase > wanted)
}

/// Place in the life of a job that goes well; the others are beside it.
const fn place(phase: Phase) -> Option<u8> {
    match phase {
        Phase::Pending => Some(0),
        Phase::Queued => Some(1),
        Phase::Preparing => Some(2),
        Phase::Training => Some(3),
        Phase::Evaluating => Some(4),
        Phase::Publishing => Some(5),
        Phase::Succeeded => Some(6),
        Phase::Suspended | Phase::Failed => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::job;

    #[test]
    fn every_end_has_its_exit_code() {
        for (status, expected) in [
            ("{}", None),
            ("{phase: Training}", None),
            (
                "{conditions: [{type: Complete, status: 'Unknown', reason: Pending, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}]}",
                None,
            ),
            (
                "{conditions: [{type: Complete, status: 'True', reason: Completed, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}]}",
                Some(0),
            ),
            (
                "{conditions: [{type: Complete, status: 'True', reason: Completed, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}], validation: {verdict: NotWorthIt}}",
                Some(0),
            ),
            (
                "{conditions: [{type: Complete, status: 'True', reason: Completed, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}], validation: {verdict: GateFailed}}",
                Some(2),
            ),
            (
                "{conditions: [{type: Failed, status: 'True', reason: BadData, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}]}",
                Some(1),
            ),
            (
                "{conditions: [{type: Failed, status: 'True', reason: ValidationFailed, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}]}",
                Some(2),
            ),
        ] {
            assert_eq!(outcome(&job("{}", status)).map(Outcome::exit_code), expected, "{status}");
        }
        for (outcome, code) in [(Outcome::TimedOut, 3), (Outcome::Deleted, 4), (Outcome::Interrupted, 130)] {
            assert_eq!(outcome.exit_code(), code);
        }
    }

    #[test]
    fn a_phase_that_was_passed_is_reached() {
        for (phase, wanted, expected) in [
            ("Training", Phase::Training, true),
            ("Publishing", Phase::Training, true),
            ("Preparing", Phase::Training, false),
            ("Failed", Phase::Training, false),
            ("Failed", Phase::Failed, true),
            ("Succeeded", Phase::Suspended, false),
        ] {
            let job = job("{}", &format!("{{phase: {phase}}}"));
            assert_eq!(has_reached(&job, wanted), expected, "{phase} {wanted:?}");
        }
    }
}
