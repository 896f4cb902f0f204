//! Where and when pods may run.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::scalar::{bounded_quantities, bounded_strings};
use crate::quantity;

/// A toleration that names a key: a blanket one would let a job run anywhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobToleration(pub Toleration);

impl JsonSchema for JobToleration {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "JobToleration".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Toleration::json_schema(generator);
        if let Some(properties) = schema.get_mut("properties").and_then(serde_json::Value::as_object_mut) {
            for name in ["key", "value", "effect", "operator"] {
                properties[name]["maxLength"] = 253.into();
            }
        }
        schema.insert(
            "x-kubernetes-validations".into(),
            serde_json::json!([{"rule": "has(self.key) && size(self.key) > 0", "message": "a toleration must name a key"}]),
        );
        schema
    }
}

/// Kubernetes' resource requirements, with a bound on what rules look at; `claims` are not taken. A local run holds itself
/// to `limits.memory` and `limits.cpu`, and needs an accelerator if one is named; of the rest it warns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Resources(#[serde(deserialize_with = "quantity::requirements")] pub ResourceRequirements);

impl JsonSchema for Resources {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Resources".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = ResourceRequirements::json_schema(generator);
        if let Some(properties) = schema.get_mut("properties").and_then(serde_json::Value::as_object_mut) {
            properties.remove("claims");
            for name in ["limits", "requests"] {
                let description = properties[name]["description"].take();
                let mut map = bounded_quantities();
                map.insert("description".into(), description);
                properties[name] = map.into();
            }
        }
        schema
    }
}

/// Where and when pods may run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.workloadPriorityClassName) || has(self.queueName)")
    .message("workloadPriorityClassName needs queueName"))]
pub struct Scheduling {
    /// Name of a Kueue queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub queue_name: Option<String>,
    /// Kueue's priority class of the queued Jobs, a WorkloadPriorityClass.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub workload_priority_class_name: Option<String>,
    /// Priority class of the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("!self.startsWith('system-')").message("system priority classes are not for jobs"))]
    pub priority_class_name: Option<String>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "bounded_strings")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<JobToleration>,
}
