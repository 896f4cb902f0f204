//! How the result is judged, and when to stop for lack of improvement.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DataSource;

/// A metric that validation measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Metric {
    /// Mean negative log-likelihood in nats per trained token; lower is better.
    EvalLoss,
    /// `exp(evalLoss)`; lower is better.
    Perplexity,
    /// Share of trained tokens whose most likely prediction is the label.
    TokenAccuracy,
    /// Share of rows whose greedy answer equals the reference.
    ExactMatch,
}

impl Metric {
    /// The name used in YAML, reports and series.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EvalLoss => "evalLoss",
            Self::Perplexity => "perplexity",
            Self::TokenAccuracy => "tokenAccuracy",
            Self::ExactMatch => "exactMatch",
        }
    }

    /// Whether a smaller value is the better one.
    pub const fn lower_is_better(self) -> bool {
        matches!(self, Self::EvalLoss | Self::Perplexity)
    }
}

/// Which checkpoint is judged and exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Evaluate {
    /// The best by the metric.
    Best,
    /// The last.
    Last,
}

/// What a gate compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Baseline {
    /// The base model without examples in the prompt.
    Base,
    /// The base model with a few examples in the prompt.
    FewShot,
}

/// A condition that the result must meet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "operator", deny_unknown_fields)]
pub enum Gate {
    /// The metric is at most the value.
    AtMost {
        /// What is measured.
        metric: Metric,
        /// The bound.
        value: f64,
    },
    /// The metric is at least the value.
    AtLeast {
        /// What is measured.
        metric: Metric,
        /// The bound.
        value: f64,
    },
    /// The metric is better than the baseline's by at least this much.
    ImprovesOn {
        /// What is measured.
        metric: Metric,
        /// Whose value is to be beaten.
        baseline: Baseline,
        /// By how much, in the metric's own unit.
        by: f64,
    },
}

/// A check that general ability was not lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Forgetting {
    /// General text that has nothing to do with the task.
    pub dataset: DataSource,
    /// Largest tolerated increase of the mean loss over the base model's.
    pub max_loss_increase: f64,
}

/// How the result is judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ValidationConfig {
    /// Evaluate every so many steps; `None`: about ten times over the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<i64>,
    /// Decides which checkpoint is best.
    pub metric: Metric,
    /// Which checkpoint is judged and exported.
    pub evaluate: Evaluate,
    /// Measure the base model.
    pub zero_shot: bool,
    /// Measure the base model with this many examples in the prompt; 0: not at all.
    pub few_shot_examples: i64,
    /// What the result must meet.
    pub gates: Vec<Gate>,
    /// What must not be lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<Forgetting>,
    /// Whether a failed gate fails the job.
    pub fail_on_gate: bool,
}

/// Stop when the metric no longer improves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EarlyStopping {
    /// Evaluations without improvement.
    pub patience: i64,
    /// Smallest change that counts as one.
    pub min_delta: f64,
}
