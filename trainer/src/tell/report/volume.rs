//! What stands for the last word of a training attempt that left none: what the volume holds.

use std::path::Path;

use crds::report::{CheckpointInfo, Failure, Report, Stage};
use crds::run::PodStage;

use crate::store::checkpoint::{self, committed};

/// Checkpoints that are told: more are seldom kept, and a termination message is short.
const TOLD: usize = 16;

/// What `run` holds of the job and attempt that `known` names. It claims nothing of how the attempt ended. `why` says what was
/// found where its word should be.
pub fn read_volume(run: &Path, known: Report, why: &str) -> Result<Report, checkpoint::Error> {
    let committed = committed(run, &known.job_uid)?;
    let last = committed.last().map(|checkpoint| checkpoint.step);
    let newest = last.map_or("there is no checkpoint of the job".to_owned(), |step| {
        format!("the newest checkpoint is of step {step}")
    });
    let info = |checkpoint: &checkpoint::Committed| CheckpointInfo {
        step: checkpoint.step,
        time: checkpoint
            .time
            .and_then(|time| jiff::Timestamp::try_from(time).ok())
            .map_or_else(String::new, |time| time.to_string()),
        eval_loss: None,
        best: checkpoint.best,
    };
    Ok(Report {
        pod_stage: Some(PodStage::Train),
        stage: Stage::Failed,
        failure: Some(Failure::untold(format!("the attempt left no word on the volume ({why}); {newest}"))),
        step: last.unwrap_or(0),
        last_checkpoint_step: last,
        checkpoints: committed.iter().skip(committed.len().saturating_sub(TOLD)).map(info).collect(),
        from_volume: true,
        ..known
    })
}
