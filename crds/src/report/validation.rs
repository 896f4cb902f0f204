//! What validation found.

use serde::{Deserialize, Serialize};

use crate::run::{Gate, Metric};

/// What the metrics of one set of weights are on the validation rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Scores {
    /// Mean negative log-likelihood, nats per trained token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// `exp(evalLoss)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Share of trained tokens predicted right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_accuracy: Option<f64>,
    /// Share of rows answered exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<f64>,
}

impl Scores {
    /// The value of one metric, if it was measured.
    pub const fn get(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::EvalLoss => self.eval_loss,
            Metric::Perplexity => self.perplexity,
            Metric::TokenAccuracy => self.token_accuracy,
            Metric::ExactMatch => self.exact_match,
        }
    }
}

/// The loss on general text, before and after.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForgettingResult {
    /// The base model's mean loss.
    pub base_loss: f64,
    /// The tuned model's mean loss.
    pub tuned_loss: f64,
    /// Largest tolerated increase.
    pub max_loss_increase: f64,
    /// Whether the increase is tolerated.
    pub passed: bool,
}

/// A gate and what was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GateResult {
    /// The gate as written.
    pub gate: Gate,
    /// The tuned model's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed: Option<f64>,
    /// The baseline's value, for `ImprovesOn`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// Whether it holds.
    pub passed: bool,
}

/// Whether the result is worth using.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// All gates hold, and it is better than each baseline that was measured, by more than chance.
    Better,
    /// No gate failed, but a baseline is better, or not worse by more than chance: fine-tuning did not pay.
    NotWorthIt,
    /// A gate failed.
    GateFailed,
    /// Nothing was measured to decide by.
    NotValidated,
}

/// Answers that were generated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Generated {
    /// New tokens of all answers, tokens that end one included, padding not.
    pub tokens: i64,
    /// Seconds that they took, prompts included.
    pub seconds: f64,
}

/// The answers of everyone who was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Generation {
    /// The tuned model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuned: Option<Generated>,
    /// The base model's without examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<Generated>,
    /// The base model's with examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<Generated>,
}

/// What validation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ValidationReport {
    /// Rows that the loss was measured on.
    pub rows: i64,
    /// Rows that were answered for `exactMatch`; fewer than `rows` where there are many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated_rows: Option<i64>,
    /// How many tokens these answers have and how long they took; absent where no row was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Step of the judged checkpoint.
    pub step: i64,
    /// The tuned model.
    pub tuned: Scores,
    /// The base model without examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<Scores>,
    /// The base model with examples in the prompt. Its loss is taken on `few_shot_rows`; after prompt and completion rows
    /// without their stop token, which the examples do not show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<Scores>,
    /// Rows that the loss with examples in the prompt was measured on: the first ones, those that the context holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub few_shot_rows: Option<i64>,
    /// Examples in the few-shot prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_examples: Option<i64>,
    /// General ability.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<ForgettingResult>,
    /// The gates.
    pub gates: Vec<GateResult>,
    /// Whether the result is worth using.
    pub verdict: Verdict,
    /// The verdict in one plain sentence.
    pub summary: String,
}
