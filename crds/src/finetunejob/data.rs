//! Model and rows.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::scalar::{Uri, bounded_strings};
use crate::run::{DataFormat, ProblemAction};

/// A Secret of the job's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// Where it is, for example `hf://HuggingFaceTB/SmolLM2-135M-Instruct`.
    pub uri: Uri,
    /// Branch, tag or commit of a hub repository; pinned to a commit when the job is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub revision: Option<String>,
    /// Secret with the credentials of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
}

/// Rows from one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RowSource {
    /// Where they are: a file of JSON lines.
    pub uri: Uri,
    /// Secret with the credentials of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
    /// How a row is to be read; absent: decided by its keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DataFormat>,
    /// From the field that the format expects to the column that holds it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "bounded_strings")]
    pub column_map: BTreeMap<String, String>,
}

/// What each finding of the data check does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OnProblemSpec {
    /// Training rows that are in the validation rows too; absent: Fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leakage: Option<ProblemAction>,
    /// Training rows that repeat an earlier one; absent: Warn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duplicates: Option<ProblemAction>,
    /// Rows whose answer does not fit into the sequence length; absent: Fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncated_answers: Option<ProblemAction>,
}

/// Training and validation rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.validation) && has(self.splitPercent))")
    .message("set validation or splitPercent, not both"))]
pub struct Dataset {
    /// Training rows.
    pub train: RowSource,
    /// Validation rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<RowSource>,
    /// Hold back this percentage of the training rows for validation, chosen by seed and row.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 50))]
    pub split_percent: Option<i32>,
    /// What each finding of the data check does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_problem: Option<OnProblemSpec>,
}
