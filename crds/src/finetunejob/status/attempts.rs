//! The attempts: which there were, how they ended, and how they are counted.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::run::PodStage;

/// One attempt of one stage: a Job that is made once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobReference {
    /// `metadata.name` of the Job.
    pub name: String,
    /// Stage of the job.
    pub stage: PodStage,
    /// Counted from 1 in each stage.
    pub attempt: i32,
    /// `metadata.uid` of the Job, once it was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Digest of the pod that it was made with; a pod that runs anything else is not of this attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub pod_digest: Option<String>,
    /// When its pod began to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// How it ended; absent while it has not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<AttemptOutcome>,
    /// Why: the reason of its exit code, or what became of its pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AttemptOutcome {
    /// Its stage is done.
    Done,
    /// It gave way; counted in `failurePolicy.maxPreemptions`.
    Preempted,
    /// It failed, and another one may not; counted in `failurePolicy.maxRetries`.
    Failed,
    /// It failed, and so would every other.
    Final,
    /// It was held; counted in neither.
    Suspended,
    /// A source was down; counted in neither, and tried again for hours.
    Unavailable,
}

/// How many attempts there were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptsStatus {
    /// Training attempts.
    pub total: i32,
    /// Failed attempts of all stages.
    pub failed: i32,
    /// Preempted attempts of all stages.
    pub preempted: i32,
    /// Step that the last one continued from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<i64>,
    /// Training attempts in a row that left no new checkpoint.
    #[serde(default)]
    pub without_checkpoint: i32,
    /// Since when a source is down; absent while none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unavailable_since: Option<Time>,
    /// Newest step that a checkpoint is known of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_step: Option<i64>,
}

/// Why the last attempt failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastFailure {
    /// The exit code's reason.
    pub reason: String,
    /// The exit code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// One sentence.
    #[schemars(length(max = 1024))]
    pub message: String,
}
