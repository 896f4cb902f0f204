//! How attempts are counted: which are failures, which gave way, which left no checkpoint that none before it had left.

use crds::FineTuneJobStatus;
use crds::finetunejob::{AttemptOutcome, AttemptsStatus};
use crds::report::Report;
use crds::run::PodStage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::failure::Ended;

/// No run has more steps.
const MAX_STEP: i64 = 1 << 40;

/// What is known of the checkpoints of a training attempt that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpoints {
    /// The newest one that anybody told of, and nobody who must know says that it is the last.
    Heard(Option<i64>),
    /// The newest one: the attempt's last word or the volume says so.
    Known(Option<i64>),
}

impl Checkpoints {
    /// From the last word of an attempt, from what the volume says where it was asked, and from what was heard before.
    pub fn new(status: &FineTuneJobStatus, last_word: Option<&Report>, volume: Option<&Report>) -> Self {
        let steps = |report: Option<&Report>| {
            report.map_or([None; 2], |report| [report.last_checkpoint_step, report.resumed_from_step])
        };
        let heard = [
            status.checkpoints.last().map(|checkpoint| checkpoint.step),
            status.attempts.as_ref().and_then(|attempts| attempts.resumed_from_step),
        ];
        let told = heard.into_iter().chain(steps(last_word)).chain(steps(volume)).flatten();
        // A number that no run reaches would make all later ones look like standing still.
        let newest = told.filter(|step| (0..=MAX_STEP).contains(step)).max();
        if last_word.or(volume).is_some() { Self::Known(newest) } else { Self::Heard(newest) }
    }

    /// The newest one.
    pub fn newest(self) -> Option<i64> {
        match self {
            Self::Heard(step) | Self::Known(step) => step,
        }
    }
}

/// An attempt that ended, for counting.
#[derive(Clone, Copy, Debug)]
pub struct Counted<'a> {
    /// Its stage.
    pub stage: PodStage,
    /// Whether its trainer ran.
    pub ran: bool,
    /// How it ended.
    pub ended: &'a Ended,
    /// When.
    pub finished: &'a Time,
    /// What it left.
    pub checkpoints: Checkpoints,
}

impl Counted<'_> {
    /// Whether it may have lived in vain, and only the volume can tell.
    pub fn is_in_doubt(&self, attempts: &AttemptsStatus) -> bool {
        let newest = self.checkpoints.newest();
        self.is_a_life() && matches!(self.checkpoints, Checkpoints::Heard(_)) && newest <= attempts.checkpoint_step
    }

    fn is_a_life(&self) -> bool {
        let lived = matches!(self.ended.outcome, AttemptOutcome::Failed | AttemptOutcome::Preempted);
        self.stage == PodStage::Train && self.ran && lived
    }

    /// The counts after it. Of an attempt that nobody could tell of no life is taken: it is bounded as what it was.
    pub fn add_to(&self, mut attempts: AttemptsStatus) -> AttemptsStatus {
        match self.ended.outcome {
            AttemptOutcome::Failed => attempts.failed += 1,
            AttemptOutcome::Preempted => attempts.preempted += 1,
            AttemptOutcome::Done | AttemptOutcome::Final | AttemptOutcome::Suspended | AttemptOutcome::Unavailable => {}
        }
        attempts.unavailable_since = match self.ended.outcome {
            AttemptOutcome::Unavailable => attempts.unavailable_since.or_else(|| Some(self.finished.clone())),
            _ => None,
        };
        if self.stage == PodStage::Train {
            let newest = self.checkpoints.newest();
            if newest > attempts.checkpoint_step {
                attempts.checkpoint_step = newest;
                attempts.without_checkpoint = 0;
            } else if self.is_a_life() && matches!(self.checkpoints, Checkpoints::Known(_)) {
                attempts.without_checkpoint += 1;
            }
        }
        attempts
    }
}
