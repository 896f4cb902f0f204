//! How the result is judged.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::RowSource;
use super::scalar::Decimal;
use crate::run::{Baseline, Evaluate, Metric};

/// How a gate compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GateOperator {
    /// The metric is at most the value.
    AtMost,
    /// The metric is at least the value.
    AtLeast,
    /// The metric is better than a baseline's.
    ImprovesOn,
}

/// What a failed gate does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnFailure {
    /// The job fails.
    Fail,
    /// The job completes, and `ValidationPassed` is False.
    Complete,
}

/// A condition that the result must meet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "self.operator == 'ImprovesOn' ? has(self.baseline) && has(self.by) && !has(self.value) : \
     has(self.value) && !has(self.baseline) && !has(self.by)"
).message("AtMost and AtLeast take value; ImprovesOn takes baseline and by"))]
pub struct GateSpec {
    /// What is measured.
    pub metric: Metric,
    /// How it compares.
    pub operator: GateOperator,
    /// The bound, quoted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Decimal>,
    /// Whose value is to be beaten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
    /// By how much, quoted, in the metric's own unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<Decimal>,
}

/// Examples in the prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FewShot {
    /// How many; 0 turns this baseline off.
    #[schemars(range(min = 0, max = 64))]
    pub examples: i32,
}

/// What the tuned model is compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Baselines {
    /// The base model; absent: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<bool>,
    /// The base model with examples in the prompt; absent: 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<FewShot>,
}

/// A check that general ability was not lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForgettingSpec {
    /// General text that has nothing to do with the task.
    pub dataset: RowSource,
    /// Largest tolerated increase of the mean loss, quoted; absent: "0.10".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_loss_increase: Option<Decimal>,
}

/// How the result is judged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ValidationSpec {
    /// Evaluate every so many steps; absent: about ten times over the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub every_steps: Option<i64>,
    /// Decides which checkpoint is best; absent: evalLoss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Which checkpoint is judged and written; absent: Best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<Evaluate>,
    /// What the tuned model is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baselines: Option<Baselines>,
    /// What the result must meet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub gates: Vec<GateSpec>,
    /// What must not be lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<ForgettingSpec>,
    /// What a failed gate does; absent: Fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_failure: Option<OnFailure>,
}

/// Stop when the validation metric no longer improves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EarlyStoppingSpec {
    /// Evaluations without improvement.
    #[schemars(range(min = 1, max = 1000))]
    pub patience: i32,
    /// Smallest change that counts as one, quoted; absent: "0".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_delta: Option<Decimal>,
}
