//! `stop`, `suspend` and `resume`: one field of the spec each, and what that does. Asking twice changes nothing.

use crds::FineTuneJob;
use crds::finetunejob::Phase;
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::outcome::outcome;

/// What is asked of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To end early, with what was learned.
    Stop,
    /// To hold.
    Suspend,
    /// To go on.
    Resume,
}

/// What becomes of a wish.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Fields of the spec to set; `None`: nothing is to be done.
    pub patch: Option<Value>,
    /// What happens next.
    pub told: String,
}

/// What to change, and what to say.
pub fn answer(job: &FineTuneJob, wish: Wish) -> Answer {
    let name = job.name_any();
    let place = format!("-n {}", job.namespace().unwrap_or_default());
    let phase = job.status.as_ref().and_then(|status| status.phase);
    let nothing = |told: String| Answer { patch: None, told };
    if outcome(job).is_some() {
        let phase = phase.map_or("ended".to_owned(), |phase| format!("{phase:?}"));
        return nothing(format!("{name} has ended ({phase}); there is nothing to {}", word(wish)));
    }
    let runs = matches!(phase, Some(Phase::Preparing | Phase::Training | Phase::Evaluating | Phase::Publishing));
    match wish {
        Wish::Stop if job.spec.stop_requested => nothing(format!("{name} was asked to stop before")),
        Wish::Stop => {
            let told = match phase {
                Some(Phase::Training) => "training ends at its next step; evaluation and publishing follow",
                Some(Phase::Evaluating | Phase::Publishing) => {
                    "training is over; the result is being judged and written"
                }
                _ => "training will end at its first step; kubectl delete finetunejob ends it at once",
            };
            let held = if job.spec.suspend {
                format!("; held until kubectl finetune resume {name} {place}")
            } else {
                String::new()
            };
            Answer { patch: Some(json!({"stopRequested": true})), told: format!("{name}: {told}{held}") }
        }
        Wish::Suspend if job.spec.suspend => nothing(format!("{name} is held already")),
        Wish::Suspend => {
            let told = if runs { "its pod writes a checkpoint and leaves" } else { "no pod is started" };
            Answer {
                patch: Some(json!({"suspend": true})),
                told: format!("{name}: {told}; to go on: kubectl finetune resume {name} {place}"),
            }
        }
        Wish::Resume if !job.spec.suspend => nothing(format!("{name} is not held")),
        Wish::Resume => {
            let told = match job.status.as_ref().and_then(|status| status.attempts.as_ref()?.checkpoint_step) {
                Some(step) => format!("{name} goes on from step {step}"),
                None => format!("{name} goes on from its newest checkpoint, or from the start if it has none"),
            };
            Answer { patch: Some(json!({"suspend": false})), told }
        }
    }
}

const fn word(wish: Wish) -> &'static str {
    match wish {
        Wish::Stop => "stop",
        Wish::Suspend => "suspend",
        Wish::Resume => "resume",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{finished, job, training};

    #[test]
    fn wishes_change_one_field_or_nothing() {
        let held = job(
            "{suspend: true}",
            "{phase: Suspended, attempts: {total: 1, failed: 0, preempted: 0, checkpointStep: 10}}",
        );
        let asked = job("{stopRequested: true}", "{phase: Training}");
        let (training, finished) = (training(), finished());
        for (job, wish, patch, told) in [
            (
                &training,
                Wish::Stop,
                Some(json!({"stopRequested": true})),
                "support-bot: training ends at its next step; evaluation and publishing follow",
            ),
            (&asked, Wish::Stop, None, "support-bot was asked to stop before"),
            (
                &held,
                Wish::Stop,
                Some(json!({"stopRequested": true})),
                "support-bot: training will end at its first step; kubectl delete finetunejob ends it at once; \
                 held until kubectl finetune resume support-bot -n team-a",
            ),
            (
                &training,
                Wish::Suspend,
                Some(json!({"suspend": true})),
                "support-bot: its pod writes a checkpoint and leaves; to go on: kubectl finetune resume support-bot -n team-a",
            ),
            (&held, Wish::Suspend, None, "support-bot is held already"),
            (&held, Wish::Resume, Some(json!({"suspend": false})), "support-bot goes on from step 10"),
            (&training, Wish::Resume, None, "support-bot is not held"),
            (&finished, Wish::Stop, None, "support-bot has ended (Succeeded); there is nothing to stop"),
        ] {
            assert_eq!(answer(job, wish), Answer { patch, told: told.into() });
        }
    }
}
