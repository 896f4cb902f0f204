//! What is written at the end.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the run writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OutputFormat {
    /// A PEFT adapter.
    Adapter,
    /// A Hugging Face model.
    Merged,
}

/// What is written at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputConfig {
    /// Adapter or merged model; `Full` is always a merged model.
    pub format: OutputFormat,
    /// Write the output even if validation failed.
    pub publish_always: bool,
    /// Where it is copied to: `pvc://claim/path`; `None`: it stays in the run directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
}
