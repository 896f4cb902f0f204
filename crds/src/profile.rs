//! Profiles: what an administrator decides for the jobs that name them. A job never chooses an image, a runtime class or a
//! price; a local run uses the built-in `default`, or a file of profiles.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The profile of a job that names none.
pub const DEFAULT: &str = "default";

/// Profiles by name.
pub type Profiles = BTreeMap<String, Profile>;

/// Defaults and limits of an administrator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Profile {
    /// Price of an hour of the machine or accelerator, in any one currency; absent: costs are not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    /// Prefixes that sources must have; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_source_prefixes: Vec<String>,
}

/// Why a file of profiles was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not YAML, or other fields than those of a profile.
    #[error(transparent)]
    Yaml(#[from] serde_saphyr::Error),
    /// A price that no cost can be told from.
    #[error("{profile}.pricePerHour: found {price}, expected a number that is not negative")]
    Price {
        /// The profile.
        profile: String,
        /// Its price.
        price: f64,
    },
}

/// The profiles of a run that was given none.
pub fn built_in() -> Profiles {
    Profiles::from([(DEFAULT.to_owned(), Profile::default())])
}

/// Reads a file of profiles.
pub fn parse(text: &str) -> Result<Profiles, Error> {
    let profiles: Profiles = serde_saphyr::from_str(text)?;
    for (name, profile) in &profiles {
        // YAML has NaN and infinity.
        if let Some(price) = profile.price_per_hour.filter(|price| !(price.is_finite() && *price >= 0.0)) {
            return Err(Error::Price { profile: name.clone(), price });
        }
    }
    Ok(profiles)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_profiles_is_read_or_refused() {
        let profiles =
            parse("default: {pricePerHour: 0.10}\na100: {allowedSourcePrefixes: [\"hf://\"]}\n").expect("valid");
        assert_eq!(profiles["default"].price_per_hour, Some(0.10));
        assert_eq!(profiles["a100"].allowed_source_prefixes, ["hf://"]);
        for (text, expected) in [
            ("default: {pricePerHour: .nan}", "default.pricePerHour: found NaN"),
            ("default: {pricePerHour: .inf}", "default.pricePerHour: found inf"),
            ("default: {pricePerHour: -1}", "default.pricePerHour: found -1"),
            ("default: {price: 1}", "price"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
