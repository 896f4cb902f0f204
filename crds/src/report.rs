//! What the trainer tells: `Progress` while it runs, `Report` as its last word.
//!
//! The trainer writes both; the operator copies them into the status. Decimals are `f64` here and strings in the status.
//! A value that was not measured is absent. A value that is NaN or infinite is never serialised: whoever builds a report
//! turns it into a failure or leaves it out.

mod data;
mod plan;
mod termination;
mod validation;

use serde::{Deserialize, Serialize};

pub use data::{DataReport, SourceDigest};
pub use plan::{MemoryEstimate, PlanReport};
pub use termination::TERMINATION_MESSAGE_BYTES;
pub use validation::{ForgettingResult, GateResult, Generated, Generation, Scores, ValidationReport, Verdict};

use crate::exit::ExitCode;
use crate::run::PodStage;

/// What the trainer is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// Fetches, checks and tokenises.
    #[default]
    Preparing,
    /// Optimizer steps.
    Training,
    /// Baselines, forgetting and the final evaluation.
    Evaluating,
    /// Writes the output.
    Publishing,
    /// Finished.
    Succeeded,
    /// Ended without a result.
    Failed,
}

/// The answer to `GET /status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// `metadata.uid` of the job.
    pub job_uid: String,
    /// `metadata.uid` of the pod; empty in local runs.
    pub pod_uid: String,
    /// What the pod does; absent in local runs, which do everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_stage: Option<PodStage>,
    /// Attempt number, counted in each stage.
    pub attempt: i32,
    /// Step of the checkpoint that this attempt continued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<i64>,
    /// What the trainer is doing.
    pub stage: Stage,
    /// Completed optimizer steps.
    pub step: i64,
    /// Planned optimizer steps.
    pub total_steps: i64,
    /// Completed share of the training rows' passes.
    pub epoch: f64,
    /// Tokens that the loss was taken on.
    pub trained_tokens: i64,
    /// All tokens that went through the model.
    pub input_tokens: i64,
    /// Input tokens per second of step time, over the last steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Seconds until the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_remaining_seconds: Option<i64>,
    /// RFC 3339 time of this report.
    pub last_report_time: String,
    /// Newest values by name: `trainLoss`, `evalLoss`, `learningRate`, `gradientNorm`.
    pub metrics: Vec<MetricValue>,
    /// Committed checkpoints, newest last.
    pub checkpoints: Vec<CheckpointInfo>,
}

/// One named number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MetricValue {
    /// For example `evalLoss`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointInfo {
    /// Completed optimizer steps.
    pub step: i64,
    /// RFC 3339 time of the commit.
    pub time: String,
    /// Validation loss at this step, if it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Whether it is the best so far.
    pub best: bool,
}

/// What the run used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Usage {
    /// Wall time over all attempts, seconds.
    pub wall_seconds: f64,
    /// Of these, seconds in optimizer steps.
    pub train_seconds: f64,
    /// Tokens that went through the model in training.
    pub input_tokens: i64,
    /// Tokens that the loss was taken on.
    pub trained_tokens: i64,
    /// Energy in joules where the machine tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy_joules: Option<f64>,
    /// Cost at the profile's price.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// Estimated cost of the same steps as full fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_fine_tuning_cost: Option<f64>,
}

/// What the run left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Where it is.
    pub uri: String,
    /// SHA-256 of the weights file.
    pub digest: String,
    /// `Adapter` or `Merged`.
    pub kind: crate::run::OutputFormat,
    /// Rank of the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<i64>,
    /// URI of the base model.
    pub base_model: String,
}

/// Why an attempt ended without a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The exit code's reason.
    pub reason: String,
    /// The exit code.
    pub exit_code: i32,
    /// One sentence: what was found where, what was expected, what to do.
    pub message: String,
}

impl Failure {
    /// What stands in the report of an attempt that left no word: an operator that does not know [`Report::from_volume`] takes
    /// it for an attempt that failed and may be tried again, never for one that is done.
    pub fn untold(message: impl Into<String>) -> Self {
        Self {
            reason: crate::condition::reason::REPORT_MISSING.to_owned(),
            exit_code: i32::from(ExitCode::InternalError.code()),
            message: message.into(),
        }
    }

    /// A failure with the reason and number of `exit`.
    pub fn new(exit: ExitCode, message: impl Into<String>) -> Self {
        Self { reason: exit.reason().to_owned(), exit_code: i32::from(exit.code()), message: message.into() }
    }
}

/// The last word of an attempt: `reports/<stage>.json` and `report.json` on the volume, and the termination message on a
/// cluster, see [`Report::termination_message`]. Where an attempt left none, the report stage tells what the volume holds
/// instead, see [`Report::from_volume`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// `metadata.uid` of the job.
    pub job_uid: String,
    /// What the pod did; absent in local runs, which do everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_stage: Option<PodStage>,
    /// Attempt number, counted in each stage.
    pub attempt: i32,
    /// `metadata.uid` of the pod; empty in local runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_uid: String,
    /// What ended: `Succeeded`, `Failed`, or what an attempt that gave way was doing.
    pub stage: Stage,
    /// Absent when the stage is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What should be known beside, in sentences: `stopped early by request …`, `not published: …`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Completed optimizer steps.
    pub step: i64,
    /// Planned optimizer steps.
    pub total_steps: i64,
    /// Step of the checkpoint that this attempt continued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<i64>,
    /// Step of the newest committed checkpoint that this attempt knows of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint_step: Option<i64>,
    /// SHA-256 of the judged checkpoint's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_digest: Option<String>,
    /// SHA-256 of the effective run configuration.
    pub config_digest: String,
    /// SHA-256 of the tokenised dataset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_digest: Option<String>,
    /// Commit of the base model's repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_revision: Option<String>,
    /// What the data check found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<DataReport>,
    /// Predicted beside measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanReport>,
    /// Newest values by name.
    #[serde(default)]
    pub metrics: Vec<MetricValue>,
    /// What validation found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationReport>,
    /// What the run used.
    #[serde(default)]
    pub usage: Usage,
    /// What the run left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
    /// The attempt itself left no word: this is what the volume holds of the job, and how the attempt ended it does not say.
    /// `lastCheckpointStep` and `checkpoints` are facts; `failure` only says that there was no word.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub from_volume: bool,
    /// The newest committed checkpoints on the volume, newest last; only with `fromVolume`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<CheckpointInfo>,
}

impl Report {
    /// Whether the attempt said it itself; otherwise it is what its volume holds, and tells nothing of how it ended.
    pub fn is_last_word(&self) -> bool {
        !self.from_volume
    }

    /// Whether this is the last word of `attempt` at `stage` of the job, or, with [`Report::from_volume`], what stands for it.
    pub fn is_of(&self, job_uid: &str, stage: PodStage, attempt: i32) -> bool {
        self.job_uid == job_uid && self.pod_stage == Some(stage) && self.attempt == attempt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a trainer wrote it before there was anything to tell of the volume.
    const EARLIER: &str = r#"{"jobUid":"0b8e","podStage":"train","attempt":2,"podUid":"p","stage":"Failed",
        "failure":{"reason":"Stalled","exitCode":80,"message":"it hung"},"step":7,"totalSteps":9,"lastCheckpointStep":4,
        "configDigest":"sha256:1","metrics":[],"usage":{"wallSeconds":1.5}}"#;

    #[test]
    fn an_earlier_report_is_a_word_of_its_attempt_and_is_written_as_it_was() {
        let report: Report = serde_json::from_str(EARLIER).expect("it parses");
        assert!(report.is_of("0b8e", PodStage::Train, 2) && !report.from_volume && report.checkpoints.is_empty());
        let again = serde_json::to_string(&report).expect("JSON");
        assert!(!again.contains("fromVolume") && !again.contains("checkpoints"), "{again}");
    }

    #[test]
    fn what_the_volume_knows_is_no_success() {
        let failure = Failure::untold("no word");
        let report = Report { from_volume: true, failure: Some(failure), ..Report::default() };
        let again: Report = serde_json::from_str(&report.termination_message()).expect("it parses");
        assert_eq!(again, report);
        let exit = again.failure.and_then(|failure| ExitCode::from_code(failure.exit_code)).expect("one of the table");
        assert_eq!(exit.disposition(), crate::exit::Disposition::Retry);
    }
}
