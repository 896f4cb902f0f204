//! Strings with a pattern (decimals, quantities, URIs), and maps with bounds.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The exponent has at most two digits, so that no decimal is infinite. A rule could not say so: a CEL engine may refuse
/// to convert `1e999` at all, and the user would read about the conversion instead of the bound.
pub const DECIMAL_PATTERN: &str = r"^(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$";
/// Kubernetes quantities that are not negative.
pub const QUANTITY_PATTERN: &str = crate::quantity::PATTERN;
/// Sources that a cluster accepts: no user or password, no white space.
pub const CLUSTER_URI_PATTERN: &str = r"^(hf|s3|gs|az|https|pvc)://[^/@\s]+(/\S*)?$";
/// Sources that a local run accepts: files besides. [`crate::check`] puts it in the place of [`CLUSTER_URI_PATTERN`].
pub const LOCAL_URI_PATTERN: &str = r"^((hf|s3|gs|az|https|pvc)://[^/@\s]+(/\S*)?|file://\S+)$";
const MAX_PROPERTIES: i32 = 16;

/// A non-negative decimal as a quoted string: floats do not survive YAML, JSON and Go alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Decimal(pub String);

/// A decimal above zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PositiveDecimal(pub String);

/// A number of passes over the rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epochs(pub String);

/// A decimal from zero to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Share(pub String);

/// A decimal from zero to below one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Probability(pub String);

/// Where something is: `hf://owner/name`, `s3://bucket/key`, `gs://…`, `az://…`, `https://…`, `pvc://claim/path`, and
/// `file://path` in local runs only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Uri(pub String);

/// Gives a string type its value and its schema.
macro_rules! decimal {
    ($name:ident, [$(($rule:literal, $message:literal)),*]) => {
        impl $name {
            /// Its value; the schema has checked the text.
            pub fn value(&self) -> f64 {
                self.0.parse().unwrap_or(f64::NAN)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let mut schema = json_schema!({"type": "string", "maxLength": 32, "pattern": DECIMAL_PATTERN});
                let rules: Vec<serde_json::Value> = vec![$(serde_json::json!({"rule": $rule, "message": $message})),*];
                if !rules.is_empty() {
                    schema.insert("x-kubernetes-validations".into(), rules.into());
                }
                schema
            }
        }
    };
}

decimal!(Decimal, []);
decimal!(PositiveDecimal, [("double(self) > 0.0", "must be greater than 0")]);
decimal!(
    Epochs,
    [("double(self) > 0.0", "must be greater than 0"), ("double(self) <= 10000.0", "must be at most 10000")]
);
decimal!(Share, [("double(self) <= 1.0", "must be at most 1")]);
decimal!(Probability, [("double(self) < 1.0", "must be less than 1")]);

impl JsonSchema for Uri {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Uri".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "maxLength": 1024, "pattern": CLUSTER_URI_PATTERN})
    }
}

/// The schema of a map of strings that a rule may compare. schemars' own `length` bounds strings and lists only.
pub fn bounded_strings(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": MAX_PROPERTIES,
        "additionalProperties": {"type": "string", "maxLength": 253},
    })
}

/// The schema of a map of Kubernetes quantities that a rule may compare.
pub fn bounded_quantities() -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": MAX_PROPERTIES,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "maxLength": 32,
            "pattern": QUANTITY_PATTERN,
        },
    })
}
