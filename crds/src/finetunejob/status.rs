//! What the user is told. Decimals are strings; the full loss history is in Prometheus and in `metrics.jsonl`.

mod attempts;
mod validation;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use attempts::{AttemptOutcome, AttemptsStatus, JobReference, LastFailure};
pub use validation::{BestStatus, ForgettingStatus, GateStatus, ScoresStatus, ValidationStatus};

use crate::run::{OutputFormat, PodStage};

/// Where a job is, for people; derived from the conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Accepted or about to be.
    Pending,
    /// Waits for quota.
    Queued,
    /// Fetches, checks and tokenises.
    Preparing,
    /// Trains.
    Training,
    /// Is being judged.
    Evaluating,
    /// Is being written.
    Publishing,
    /// Held.
    Suspended,
    /// Done.
    Succeeded,
    /// Ended without a result, or with one that a gate refused.
    Failed,
}

impl Phase {
    /// Every phase, in the order of a job's life.
    pub const ALL: [Self; 9] = [
        Self::Pending,
        Self::Queued,
        Self::Preparing,
        Self::Training,
        Self::Evaluating,
        Self::Publishing,
        Self::Suspended,
        Self::Succeeded,
        Self::Failed,
    ];
}

/// The state of a FineTuneJob.
// kstatus takes an object without a status for done: until an operator has looked at a job, its status is of no generation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct FineTuneJobStatus {
    /// Generation that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// For people; do not match on it, use the conditions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Accepted, Admitted, Running, ValidationPassed, Published, Suspended, Complete, Failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 16))]
    pub conditions: Vec<Condition>,
    /// When the first pod ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Stage that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<PodStage>,
    /// How far training is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// Newest values by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[schemars(length(max = 32))]
    pub metrics: Vec<MetricStatus>,
    /// Committed checkpoints, newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub checkpoints: Vec<CheckpointStatus>,
    /// What validation found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationStatus>,
    /// What the data check found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<DataStatus>,
    /// What was planned before an accelerator was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// What was chosen where the spec is silent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolved: Option<ResolvedStatus>,
    /// How many attempts there were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<AttemptsStatus>,
    /// Why the last attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<LastFailure>,
    /// What the job left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactStatus>,
    /// What the job used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageStatus>,
    /// The newest attempts, each a Job, newest last. An attempt is listed before its Job is made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub job_refs: Vec<JobReference>,
}

/// How far training is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// Completed optimizer steps.
    pub step: i64,
    /// Planned optimizer steps.
    pub total_steps: i64,
    /// `1200/4875`
    pub summary: String,
    /// Completed percentage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// Completed passes over the rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<String>,
    /// Tokens that the loss was taken on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_tokens: Option<i64>,
    /// Tokens per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<i64>,
    /// Seconds until the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_remaining_seconds: Option<i64>,
    /// `1h30m`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<String>,
    /// When the trainer last answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_report_time: Option<Time>,
}

/// One named number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MetricStatus {
    /// For example `trainLoss`.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// A decimal.
    #[schemars(length(max = 32))]
    pub value: String,
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointStatus {
    /// Completed optimizer steps.
    pub step: i64,
    /// When it was committed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// Validation loss, a decimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<String>,
    /// Whether it is the best so far.
    #[serde(default)]
    pub best: bool,
}

/// What the data check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataStatus {
    /// Training rows.
    pub rows: i64,
    /// Validation rows.
    pub validation_rows: i64,
    /// Tokens of the training rows.
    pub tokens: i64,
    /// Of these, trained ones.
    pub trained_tokens: i64,
    /// Rows that repeat an earlier one.
    pub duplicates: i64,
    /// Training rows that are in the validation rows too.
    pub leaked: i64,
    /// Rows that lost answer tokens.
    pub truncated: i64,
}

/// What was planned before an accelerator was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanStatus {
    /// Predicted peak memory.
    pub memory_bytes: i64,
    /// Tokens computed at once.
    pub micro_batch_tokens: i64,
    /// Trained parameters.
    pub trainable_parameters: i64,
}

/// What was chosen where the spec is silent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResolvedStatus {
    /// All hyperparameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hyperparameters: Option<super::HyperparametersSpec>,
    /// Commit of the model's repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_revision: Option<String>,
    /// SHA-256 of the tokenised rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_digest: Option<String>,
    /// Image of the trainer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The volume of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    /// SHA-256 of the plan in the ConfigMap: no other one is followed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan_digest: Option<String>,
}

/// What the job left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactStatus {
    /// Where it is.
    pub uri: String,
    /// SHA-256 of the weights.
    pub digest: String,
    /// Adapter or merged model.
    pub kind: OutputFormat,
    /// Rank of the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<i64>,
    /// URI of the base model.
    pub base_model: String,
}

/// What the job used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageStatus {
    /// Seconds of training pods over all ended attempts.
    #[serde(default)]
    pub train_seconds: i64,
    /// Of these, seconds times accelerators.
    pub gpu_seconds: i64,
    /// At the profile's price, a decimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<String>,
}
