//! What is trained: a union told apart by `type`, never inferred.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::scalar::Probability;
use crate::run::QuantizationType;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MethodType {
    /// Low-rank adapters on a frozen base.
    LoRA,
    /// Low-rank adapters on a frozen base in four bits.
    QLoRA,
    /// All weights.
    Full,
}

/// What is trained, and with what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.type != 'Full' || !has(self.lora)").message("lora is not valid for type Full")
        .field_path(".lora").reason(Reason::FieldValueForbidden),
    validation = Rule::new("self.type == 'Full' || !has(self.full)").message("full is only valid for type Full")
        .field_path(".full").reason(Reason::FieldValueForbidden),
    validation = Rule::new("self.type == 'QLoRA' || !has(self.quantization)")
        .message("quantization is only valid for type QLoRA")
        .field_path(".quantization").reason(Reason::FieldValueForbidden),
)]
pub struct MethodSpec {
    /// LoRA, QLoRA or Full.
    #[serde(rename = "type")]
    pub method_type: MethodType,
    /// The adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSpec>,
    /// How QLoRA stores the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QuantizationSpec>,
    /// How all weights are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<FullSpec>,
}

/// Low-rank adapters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoraSpec {
    /// Rank of the adapters; absent: 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 512))]
    pub rank: Option<i32>,
    /// Adapters are scaled by alpha / rank; absent: twice the rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub alpha: Option<i32>,
    /// Probability that an input of an adapter is dropped in training, below 1; absent: "0".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<Probability>,
    /// Linear layers that get an adapter, for example `q_proj`; absent: all of the decoder layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 64)))]
    pub target_modules: Vec<String>,
    /// Scale by alpha / sqrt(rank).
    #[serde(default)]
    pub rank_stabilized: bool,
}

/// Full fine-tuning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FullSpec {
    /// Update each layer as soon as its gradients are there and let go of them: about 4 bytes less per weight. Gradients
    /// cannot be clipped by their common norm then (hyperparameters.maxGradNorm: "0"), and the whole step is computed at
    /// once. A gradient that is not finite leaves its layer and those below as they were; those above have moved.
    #[serde(default)]
    pub optimizer_in_backward: bool,
}

/// How QLoRA stores the base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuantizationSpec {
    /// Storage type; absent: NF4.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub quantization_type: Option<QuantizationType>,
    /// Quantise the block scales too; absent: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub double_quantization: Option<bool>,
}
