//! Rows that are answered to measure exact match.

use serde::{Deserialize, Serialize};

/// A prompt and the answer that counts as right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GenerationRow {
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Tokens of the prompt with examples before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_prompt: Option<Vec<u32>>,
    /// The right answer.
    pub reference: String,
}
