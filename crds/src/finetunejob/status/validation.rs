//! What validation found; numbers are decimals as strings.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::finetunejob::GateOperator;
use crate::run::{Baseline, Metric};

/// Scores of one model, decimals.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScoresStatus {
    /// Mean negative log-likelihood per trained token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<String>,
    /// `exp(evalLoss)`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<String>,
    /// Share of tokens predicted right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_accuracy: Option<String>,
    /// Share of rows answered exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<String>,
}

/// The judged checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BestStatus {
    /// Its step.
    pub step: i64,
    /// Its scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<ScoresStatus>,
}

/// General ability before and after, decimals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForgettingStatus {
    /// The base model's mean loss.
    pub base_loss: String,
    /// The tuned model's mean loss.
    pub tuned_loss: String,
    /// Whether the increase is tolerated.
    pub passed: bool,
}

/// A gate and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GateStatus {
    /// What was measured.
    pub metric: Metric,
    /// How it compares.
    pub operator: GateOperator,
    /// The bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Whose value is to be beaten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
    /// By how much.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// What was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed: Option<String>,
    /// Whether it holds.
    pub passed: bool,
}

/// What validation found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ValidationStatus {
    /// The base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<ScoresStatus>,
    /// The base model with examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<ScoresStatus>,
    /// The tuned model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestStatus>,
    /// General ability.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<ForgettingStatus>,
    /// The gates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub gates: Vec<GateStatus>,
    /// Better, NotWorthIt, GateFailed or NotValidated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// The verdict in one sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
}
