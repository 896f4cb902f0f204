//! What was derived before the first step.

use serde::{Deserialize, Serialize};

/// Memory in bytes, by what holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryEstimate {
    /// Base weights as they are held.
    pub weights: i64,
    /// Trained parameters: masters and working copies.
    pub parameters: i64,
    /// Gradients and moments.
    pub optimizer: i64,
    /// Activations of the largest micro-batch.
    pub activations: i64,
    /// What allocators hold beyond that, and the runtime.
    pub workspace: i64,
    /// The sum.
    pub total: i64,
}

/// What was derived before the first step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PlanReport {
    /// Device that computes.
    pub device: String,
    /// Dtype of weights and activations.
    pub precision: String,
    /// Predicted peak memory.
    pub memory: MemoryEstimate,
    /// What there is.
    pub memory_available: i64,
    /// Peak resident (or device) memory as measured; 0 before the end.
    pub measured_peak: i64,
    /// Tokens computed at once.
    pub micro_batch_tokens: i64,
    /// Optimizer steps.
    pub total_steps: i64,
    /// Trained parameters.
    pub trainable_parameters: i64,
    /// All parameters.
    pub total_parameters: i64,
    /// Estimated seconds of training.
    pub estimated_seconds: f64,
    /// Measured seconds of training; 0 before the end.
    pub measured_seconds: f64,
}
