//! Kubernetes quantities: as numbers, and as an administrator or a user may write them.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};

/// Kubernetes quantities that are not negative, as far as a pattern can tell. Exponents have at most two digits, as those of
/// decimals have: no quantity is infinite.
pub const PATTERN: &str = r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$";
/// What is written where none can be read.
pub const EXPECTED: &str = "a quantity such as \"16Gi\", \"500m\" or 2";

/// The number that a quantity stands for; `None` if the text is none, or negative.
pub fn value(text: &str) -> Option<f64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    // Rust takes no lone point either, but `inf` and `nan`, which have no digit in front.
    let number: f64 = number.parse().ok()?;
    let factor = match suffix {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 2f64.powi(10),
        "Mi" => 2f64.powi(20),
        "Gi" => 2f64.powi(30),
        "Ti" => 2f64.powi(40),
        "Pi" => 2f64.powi(50),
        "Ei" => 2f64.powi(60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || digits.len() > 2 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
                return None;
            }
            // By way of text: a power of ten that is multiplied would round `64e-1` differently from `6.4`.
            return format!("{number}e{exponent}").parse().ok();
        }
    };
    Some(number * factor)
}

/// A quantity that may be written as a number, as in every manifest of a pod.
struct Written(Quantity);

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsWritten;
        impl Visitor<'_> for AsWritten {
            type Value = Written;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(EXPECTED)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Written, E> {
                Ok(Written(Quantity(text.to_owned())))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Written, E> {
                Ok(Written(Quantity(number.to_string())))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Written, E> {
                Ok(Written(Quantity(number.to_string())))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Written, E> {
                Ok(Written(Quantity(number.to_string())))
            }
        }
        deserializer.deserialize_any(AsWritten)
    }
}

impl JsonSchema for Written {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["string", "number"], "pattern": PATTERN, "minimum": 0})
    }
}

/// Reads a quantity in text or as a number; what it says is for [`value`] to find out.
pub fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<Written>::deserialize(deserializer)?.map(|written| written.0.0))
}

/// Reads quantities by name.
pub fn by_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Quantity>, D::Error> {
    Ok(plain(BTreeMap::deserialize(deserializer)?))
}

/// The schema of a quantity of [`optional`].
pub fn optional_schema(generator: &mut SchemaGenerator) -> Schema {
    Option::<Written>::json_schema(generator)
}

/// The schema of [`by_name`].
pub fn by_name_schema(generator: &mut SchemaGenerator) -> Schema {
    BTreeMap::<String, Written>::json_schema(generator)
}

/// Kubernetes' resource requirements as they are written; `claims` are not taken.
#[derive(Default, serde::Deserialize, JsonSchema)]
#[serde(default)]
struct Requirements {
    /// The most that a pod gets.
    limits: Option<BTreeMap<String, Written>>,
    /// What is reserved for it.
    requests: Option<BTreeMap<String, Written>>,
}

/// The same, in a file that nobody but this version reads: a word that is none of its own is a mistake.
#[derive(Default, serde::Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct StrictRequirements {
    /// The most that a pod gets.
    limits: Option<BTreeMap<String, Written>>,
    /// What is reserved for it.
    requests: Option<BTreeMap<String, Written>>,
}

/// Reads resource requirements whose quantities are text or numbers.
pub fn requirements<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ResourceRequirements, D::Error> {
    let Requirements { limits, requests } = Option::deserialize(deserializer)?.unwrap_or_default();
    Ok(ResourceRequirements { limits: limits.map(plain), requests: requests.map(plain), claims: None })
}

/// The same, with nothing beside limits and requests.
pub fn strict_requirements<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ResourceRequirements, D::Error> {
    let StrictRequirements { limits, requests } = Option::deserialize(deserializer)?.unwrap_or_default();
    Ok(ResourceRequirements { limits: limits.map(plain), requests: requests.map(plain), claims: None })
}

fn plain(written: BTreeMap<String, Written>) -> BTreeMap<String, Quantity> {
    written.into_iter().map(|(name, quantity)| (name, quantity.0)).collect()
}

/// The schema of [`strict_requirements`].
pub fn strict_requirements_schema(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = StrictRequirements::json_schema(generator);
    // Not `anyOf`, which could not say which field is wrong.
    schema.insert("type".into(), serde_json::json!(["object", "null"]));
    schema
}

#[cfg(test)]
mod tests {
    use super::{PATTERN, value};

    #[test]
    fn quantities_are_numbers_as_kubernetes_reads_them() {
        let pattern = jsonschema::validator_for(&serde_json::json!({"pattern": PATTERN})).expect("a schema");
        for (text, expected) in [
            ("16Gi", Some(17_179_869_184.0)),
            ("1.5G", Some(1_500_000_000.0)),
            ("1Pi", Some(1_125_899_906_842_624.0)),
            ("12", Some(12.0)),
            ("+12", Some(12.0)),
            ("500m", Some(0.5)),
            ("1k", Some(1000.0)),
            ("2000u", Some(0.002)),
            ("64e9", Some(64_000_000_000.0)),
            ("64E9", Some(64_000_000_000.0)),
            ("1.5e+3", Some(1500.0)),
            ("15e-1", Some(1.5)),
            ("1E", Some(1e18)),
            (".5", Some(0.5)),
            ("5.", Some(5.0)),
            ("x", None),
            ("-1", None),
            ("1.5.2", None),
            (".", None),
            ("", None),
            ("+", None),
            ("1e", None),
            ("1e1.5", None),
            ("1e999", None),
            ("1 Gi", None),
            ("1K", None),
            ("inf", None),
            ("Ki", None),
        ] {
            assert_eq!(value(text), expected, "{text}");
            assert_eq!(pattern.is_valid(&text.into()), expected.is_some(), "{text}: the pattern");
        }
    }
}
