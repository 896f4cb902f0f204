//! When checkpoints are committed, which are kept, and whether to continue.

use serde::{Deserialize, Serialize};

/// When a checkpoint is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum CheckpointInterval {
    /// Every so many optimizer steps.
    EverySteps(i64),
    /// Every so many seconds, at the end of a step.
    EverySeconds(i64),
}

/// Checkpoints: when, which are kept, and whether to continue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckpointConfig {
    /// When one is due.
    pub interval: CheckpointInterval,
    /// Newest ones kept.
    pub keep_latest: i64,
    /// Best ones kept.
    pub keep_best: i64,
    /// Continue the newest checkpoint that verifies.
    pub resume: bool,
}
