//! Profiles: what an administrator decides for the jobs that name them. A job never chooses an image, a runtime class or a
//! price; a local run uses the built-in `default`, or a file of profiles. The operator and a local run read the same file.
//!
//! What a field may say is in its schema, and [`parse`] goes by that: who makes a schema of these types refuses the same.

mod parse;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::parse::{Error, parse, schema};
use crate::quantity;

/// The profile of a job that names none.
pub const DEFAULT: &str = "default";
/// In a list of [`Allowed`]: anything.
pub const ANY: &str = "*";

/// Profiles by name.
pub type Profiles = BTreeMap<String, Profile>;

/// Defaults and limits of an administrator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Profile {
    /// Image of the trainer, by digest; a cluster needs one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub image: Option<String>,
    /// `Always`, `IfNotPresent` or `Never`; absent: Kubernetes' own default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "parse::pull_policy")]
    pub image_pull_policy: Option<String>,
    /// Secrets of the job's namespace that pull the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Runtime class of training pods, for example `nvidia`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub runtime_class_name: Option<String>,
    /// Labels that a node of a training pod must have; a job may add some.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that training pods tolerate; a job may add some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Resources of training pods; a job may replace each.
    #[serde(deserialize_with = "quantity::strict_requirements")]
    #[schemars(schema_with = "quantity::strict_requirements_schema")]
    pub resources: ResourceRequirements,
    /// Resources of the pods that prepare and publish.
    #[serde(deserialize_with = "quantity::strict_requirements")]
    #[schemars(schema_with = "quantity::strict_requirements_schema")]
    pub cpu_resources: ResourceRequirements,
    /// The most that a job may ask for, by resource; a resource that is not named is not limited.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "quantity::by_name")]
    #[schemars(schema_with = "quantity::by_name_schema")]
    pub max_resources: BTreeMap<String, Quantity>,
    /// Memory of one accelerator that these pods get, such as `80Gi`: what does not fit is refused before one is taken. Absent: it is
    /// found when the accelerator is there.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "quantity::optional")]
    #[schemars(schema_with = "quantity::optional_schema")]
    pub accelerator_memory: Option<String>,
    /// Volumes that the operator makes.
    pub storage: ProfileStorage,
    /// Price of an hour of one accelerator, or of the machine where there is none, in any one currency; absent: costs are
    /// not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub price_per_hour: Option<f64>,
    /// The Hugging Face hub that `hf://` means.
    pub hub: ProfileHub,
    /// Queue of the pods that prepare and publish, where a queue is asked of every Job.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub cpu_queue_name: Option<String>,
    /// Seconds from SIGTERM to SIGKILL; absent: 120.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub termination_grace_period_seconds: Option<i64>,
    /// Train on the CPU where a pod holds an accelerator that cannot be used. Off, such a run is refused: it would idle the
    /// accelerator.
    pub fall_back_to_cpu: bool,
    /// What a job may choose for itself.
    pub allowed: Allowed,
}

/// Volumes that the operator makes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProfileStorage {
    /// Absent: the cluster's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub storage_class_name: Option<String>,
    /// Absent: 50Gi.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "quantity::optional")]
    #[schemars(schema_with = "quantity::optional_schema")]
    pub size: Option<String>,
}

/// Size of a volume where neither job nor profile names one.
pub const DEFAULT_STORAGE_SIZE: &str = "50Gi";

/// The Hugging Face hub that `hf://` means.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProfileHub {
    /// A mirror; absent: the public hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^https?://"))]
    pub endpoint: Option<String>,
}

/// What a job may choose for itself. `*` allows anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Allowed {
    /// Prefixes that sources and destinations must have.
    pub source_prefixes: Vec<String>,
    /// Keys of node labels that a job may ask for.
    pub node_selector_keys: Vec<String>,
    /// Keys of taints that a job may tolerate.
    pub toleration_keys: Vec<String>,
    /// Priority classes.
    pub priority_classes: Vec<String>,
    /// Queues.
    pub queues: Vec<String>,
}

impl Default for Allowed {
    /// Sources and queues are a matter of the namespace; what lets a pod go where others may not is the administrator's.
    fn default() -> Self {
        Self {
            source_prefixes: vec![ANY.into()],
            node_selector_keys: Vec::new(),
            toleration_keys: Vec::new(),
            priority_classes: Vec::new(),
            queues: vec![ANY.into()],
        }
    }
}

/// Whether `list` has `name`, or anything.
pub fn allows(list: &[String], name: &str) -> bool {
    list.iter().any(|allowed| allowed == ANY || allowed == name)
}

/// Whether `list` has a prefix of `uri`, or anything.
pub fn allows_prefix(list: &[String], uri: &str) -> bool {
    list.iter().any(|prefix| prefix == ANY || uri.starts_with(prefix.as_str()))
}

/// The profiles of a run that was given none.
pub fn built_in() -> Profiles {
    Profiles::from([(DEFAULT.to_owned(), Profile::default())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_lets_a_pod_go_elsewhere_is_allowed_by_default() {
        let allowed = Allowed::default();
        assert!(allows_prefix(&allowed.source_prefixes, "hf://a/b") && allows(&allowed.queues, "team"));
        for list in [&allowed.node_selector_keys, &allowed.toleration_keys, &allowed.priority_classes] {
            assert!(!allows(list, "nvidia.com/gpu"));
        }
    }
}
