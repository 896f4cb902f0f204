//! What is written at the end, and how often an attempt may fail.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::SecretReference;
use super::scalar::Uri;
use crate::run::OutputFormat;

/// When the result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PublishWhen {
    /// Only if no gate failed.
    ValidationPassed,
    /// In any case.
    Always,
}

/// What is written at the end, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// Where it goes; absent: it stays on the run's volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri: Option<Uri>,
    /// Secret with the credentials of the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
    /// Adapter or merged model; absent: Adapter for LoRA and QLoRA, Merged for Full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<OutputFormat>,
    /// When it is written; absent: ValidationPassed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publish_when: Option<PublishWhen>,
}

/// How often an attempt may fail or be preempted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// Failed attempts; absent: 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub max_retries: Option<i32>,
    /// Preempted attempts; absent: 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10000))]
    pub max_preemptions: Option<i32>,
}
