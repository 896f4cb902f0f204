//! What is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is trained: a value that decides which tensors move and what is exported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Method {
    /// Low-rank adapters on a frozen base.
    LoRA {
        /// The adapters.
        lora: Lora,
    },
    /// Low-rank adapters on a frozen base in four bits.
    QLoRA {
        /// The adapters.
        lora: Lora,
        /// How the base is stored.
        quantization: Quantization,
    },
    /// All weights.
    Full {
        /// Each layer is updated as soon as its backward pass is done, so that only one layer's gradients exist at a time.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        optimizer_in_backward: bool,
    },
}

/// Low-rank adapters: `y = W x + scale * B A drop(x)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lora {
    /// Rows of A, columns of B.
    pub rank: i64,
    /// `scale = alpha / rank`, or `alpha / sqrt(rank)` when rank-stabilised.
    pub alpha: f64,
    /// Probability that an input of A is dropped in training.
    pub dropout: f64,
    /// Last path segments of the linears that get an adapter; empty: every linear of the decoder layers.
    #[serde(default)]
    pub target_modules: Vec<String>,
    /// `alpha / sqrt(rank)`.
    pub rank_stabilized: bool,
}

/// How a frozen base is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quantization {
    /// The storage type.
    #[serde(rename = "type")]
    pub quantization_type: QuantizationType,
    /// Quantise the block scales too.
    pub double_quantization: bool,
}

/// Storage type of a quantised base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QuantizationType {
    /// Four-bit NormalFloat.
    NF4,
}
