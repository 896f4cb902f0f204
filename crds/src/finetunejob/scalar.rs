//! Strings with a pattern: decimals and URIs.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

const DECIMAL_PATTERN: &str = r"^(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$";
/// Sources that a cluster accepts: no user or password, no white space.
pub const CLUSTER_URI_PATTERN: &str = r"^(hf|s3|gs|az|https|pvc)://[^/@\s]+(/\S*)?$";
/// Sources that a local run accepts: files besides. [`crate::check`] puts it in the place of [`CLUSTER_URI_PATTERN`].
pub const LOCAL_URI_PATTERN: &str = r"^((hf|s3|gs|az|https|pvc)://[^/@\s]+(/\S*)?|file://\S+)$";

/// A non-negative decimal as a quoted string: floats do not survive YAML, JSON and Go alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Decimal(pub String);

/// A decimal above zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PositiveDecimal(pub String);

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
