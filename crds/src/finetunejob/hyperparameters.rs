//! How the model is trained.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::scalar::{Decimal, Epochs, PositiveDecimal, Share};
use crate::run::{Optimizer, Precision, Scheduler};

/// How the model is trained; what is absent is chosen and echoed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.epochs) && has(self.maxSteps))").message("set epochs or maxSteps, not both"))]
pub struct HyperparametersSpec {
    /// Passes over the training rows, at most 10000; absent: "3", unless maxSteps is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<Epochs>,
    /// Optimizer steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_steps: Option<i64>,
    /// Peak learning rate, quoted; absent: "2e-4" for adapters, "2e-5" for full fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<PositiveDecimal>,
    /// Examples of one optimizer step; absent: 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub batch_size: Option<i32>,
    /// Tokens computed at once; absent: by the memory plan. Never changes the result beyond rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub micro_batch_tokens: Option<i64>,
    /// Longest example in tokens; absent: the longest row, at most the model's context.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8))]
    pub max_sequence_length: Option<i64>,
    /// Learning-rate schedule after warm-up; absent: CosineWithMinLr.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<Scheduler>,
    /// Share of the steps spent warming up, at most 1; absent: "0.03".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<Share>,
    /// Decoupled weight decay; absent: "0".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<Decimal>,
    /// Largest global gradient norm; "0": gradients are not clipped; absent: "1".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_grad_norm: Option<Decimal>,
    /// AdamW, or AdamW8Bit, which keeps its moments in a quarter of the memory; absent: AdamW.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
    /// All randomness derives from it; absent: 42.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub seed: Option<i64>,
    /// NEFTune noise; absent: off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neftune_alpha: Option<PositiveDecimal>,
    /// Number format; absent: Auto.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
}
