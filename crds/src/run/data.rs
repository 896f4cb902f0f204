//! The base model and the rows: where they are, and what the data check does about its findings.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// Where it is: `hf://owner/name`, or `file:///absolute/path` in local runs.
    pub uri: String,
    /// Branch, tag or commit of a hub repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Folder where the Secret of `secretRef` is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_path: Option<String>,
}

/// Rows from one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataSource {
    /// Where the rows are.
    pub uri: String,
    /// How a row is to be read.
    pub format: DataFormat,
    /// From the field name that the format expects to the column that holds it.
    #[serde(default)]
    pub column_map: BTreeMap<String, String>,
    /// Folder where the Secret of `secretRef` is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_path: Option<String>,
}

/// How a dataset row is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// Decided by the keys of the rows.
    #[default]
    Auto,
    /// OpenAI chat: `messages`, `tools`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGPT,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `text`.
    Text,
}

/// Where validation rows come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ValidationRows {
    /// There are none.
    None,
    /// A source of their own.
    Source(DataSource),
    /// This percentage of the training rows, chosen by seed and row hash.
    SplitPercent(i32),
}

/// Training and validation rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetConfig {
    /// Training rows.
    pub train: DataSource,
    /// Validation rows.
    pub validation: ValidationRows,
    /// What each finding of the data check does.
    pub on_problem: OnProblem,
}

/// What a finding does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProblemAction {
    /// Ends the run before training.
    Fail,
    /// Is reported.
    Warn,
}

/// What each finding of the data check does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OnProblem {
    /// Training rows that are in the validation or forgetting rows too.
    pub leakage: ProblemAction,
    /// Rows that are in the training rows more than once.
    pub duplicates: ProblemAction,
    /// Rows whose answer does not fit into the sequence length.
    pub truncated_answers: ProblemAction,
}
