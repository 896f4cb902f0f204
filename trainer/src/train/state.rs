//! What a checkpoint holds of the loop.

use serde::{Deserialize, Serialize};

/// Everything about a run that changes from step to step, beside parameters and moments. Saved with each checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainState {
    /// Completed optimizer steps; the position in the data and the learning rate follow from it.
    pub step: i64,
    /// Tokens that went through the model.
    pub input_tokens: i64,
    /// Tokens that the loss was taken on.
    pub trained_tokens: i64,
    /// Steps that moved nothing because loss or gradient was not finite.
    pub non_finite_steps: i64,
    /// Of these, the ones since the last finite step.
    pub consecutive_non_finite: i64,
    /// Step of the last evaluation; -1 before the first.
    pub evaluated_step: i64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The metric's value that an evaluation must beat by `minDelta` to be worth waiting for more.
    pub patience_reference: Option<f64>,
    /// Evaluations since the metric last did.
    pub evaluations_without_improvement: i64,
    /// Newest validation loss.
    pub eval_loss: Option<f64>,
    /// Seconds spent in steps, over all attempts.
    pub train_seconds: f64,
    /// Wall seconds of earlier attempts and of this one up to the commit.
    pub wall_seconds: f64,
    /// Joules of earlier attempts and of this one up to the commit, where the machine tells.
    pub energy_joules: Option<f64>,
    /// Tokens computed at once; lowered when memory runs out.
    pub micro_batch_tokens: i64,
    /// Tokens for which the caches of prompts that are answered at once have room; 0 in checkpoints that do not tell.
    #[serde(default)]
    pub cache_tokens: i64,
    /// Whether training is over.
    pub finished: bool,
    /// Whether it is over because no more steps were asked for.
    #[serde(default)]
    pub stopped_by_request: bool,
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Best {
    /// Completed steps.
    pub step: i64,
    /// The metric's value.
    pub value: f64,
}
