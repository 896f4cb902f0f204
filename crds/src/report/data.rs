//! What the data check found, and what it was made from.

use serde::{Deserialize, Serialize};

/// What the data check found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DataReport {
    /// Training rows after the split.
    pub rows: i64,
    /// Validation rows after the split.
    pub validation_rows: i64,
    /// Tokens of the training rows.
    pub tokens: i64,
    /// Of these, tokens that the loss is taken on.
    pub trained_tokens: i64,
    /// Training rows that repeat an earlier one exactly (after normalising white space).
    pub duplicates: i64,
    /// Training rows that nearly repeat an earlier one.
    pub near_duplicates: i64,
    /// Training rows that are in the validation rows too.
    pub leaked: i64,
    /// Training rows that lost answer tokens to the sequence length.
    pub truncated: i64,
    /// Rows left out because none of their tokens is trained.
    pub untrained: i64,
    /// Validation and general rows that lost answer tokens to the sequence length.
    pub held_out_truncated: i64,
    /// Validation and general rows left out because none of their tokens is trained.
    pub held_out_untrained: i64,
    /// Conversations whose text holds a special token of the model, in all files.
    pub special_texts: i64,
    /// Validation rows that are not answered: prompt and answer exceed the model's context, or the prompt is empty.
    pub unanswerable: i64,
    /// Examples in the few-shot prompt, where that is not what was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_examples: Option<i64>,
    /// Number of examples by length in tokens: (upper bound, examples).
    pub length_histogram: Vec<(i64, i64)>,
    /// Longest training row in tokens.
    pub longest: i64,
    /// Sequence length that was used.
    pub max_sequence_length: i64,
    /// SHA-256 of the training examples as tokenised, and their order key.
    pub dataset_digest: String,
    /// SHA-256 of each source file.
    pub sources: Vec<SourceDigest>,
    /// Findings that did not end the run, in sentences.
    pub warnings: Vec<String>,
}

/// A source file and its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceDigest {
    /// URI without any query.
    pub uri: String,
    /// Commit of a hub repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `sha256:…`
    pub digest: String,
    /// Size in bytes.
    pub bytes: i64,
}
