//! Profiles: what an administrator decides for the jobs that name them. A job never chooses an image, a runtime class or a
//! price; a local run uses the built-in `default`, or a file of profiles.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Profiles by name.
pub type Profiles = BTreeMap<String, Profile>;

/// Defaults and limits of an administrator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Profile {
    /// Price of an hour of the machine or accelerator; absent: costs are not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    /// Prefixes that sources must have; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_source_prefixes: Vec<String>,
}

/// Reads a file of profiles.
pub fn parse(text: &str) -> Result<Profiles, serde_saphyr::Error> {
    serde_saphyr::from_str(text)
}
