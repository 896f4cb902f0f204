//! How it is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Duration {
    /// Passes over the training rows.
    Epochs(f64),
    /// Optimizer steps.
    MaxSteps(i64),
}

/// Learning-rate schedule after warm-up, by Hugging Face's names; absent in a job: CosineWithMinLr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Scheduler {
    /// No change after warm-up.
    Constant,
    /// Down to zero in a straight line.
    Linear,
    /// Half a cosine down to zero.
    Cosine,
    /// Half a cosine down to a tenth.
    CosineWithMinLr,
    /// Falls with the square root of the step.
    InverseSqrt,
}

/// Number format of weights and activations; absent in a job: Auto.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// bf16 where the device computes in it, fp32 elsewhere.
    #[default]
    Auto,
    /// bfloat16 weights and activations; masters, moments and sums in fp32.
    BF16,
    /// fp32 throughout.
    FP32,
}

/// AdamW, or AdamW8Bit, which keeps its moments in a quarter of the memory; absent in a job: AdamW.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optimizer {
    /// Moments in fp32: 8 bytes per trained weight.
    #[default]
    AdamW,
    /// Moments in 8 bits with a scale for every 256: 2 bytes per trained weight.
    AdamW8Bit,
}

impl Optimizer {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How the model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hyperparameters {
    /// How long.
    pub duration: Duration,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Examples of one optimizer step.
    pub batch_size: i64,
    /// Tokens computed at once; `None`: chosen by the memory plan. Never changes the result beyond rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<i64>,
    /// Longest example in tokens; `None`: the model's context or the longest row, whichever is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<i64>,
    /// Schedule after warm-up.
    pub scheduler: Scheduler,
    /// Share of the steps spent warming up.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: gradients are not clipped.
    pub max_grad_norm: f64,
    /// The optimizer. The default is not written: runs that began before there was a choice go on.
    #[serde(default, skip_serializing_if = "Optimizer::is_default")]
    pub optimizer: Optimizer,
    /// All randomness derives from it.
    pub seed: i64,
    /// NEFTune noise; `None`: off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neftune_alpha: Option<f64>,
    /// Number format.
    pub precision: Precision,
}
