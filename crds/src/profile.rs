//! Profiles: what an administrator decides for the jobs that name them. A job never chooses an image, a runtime class or a
//! price; a local run uses the built-in `default`, or a file of profiles. The operator and a local run read the same file.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use crate::quantity;

/// The profile of a job that names none.
pub const DEFAULT: &str = "default";
/// In a list of [`Allowed`]: anything.
pub const ANY: &str = "*";

/// Profiles by name.
pub type Profiles = BTreeMap<String, Profile>;

/// Defaults and limits of an administrator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Profile {
    /// Image of the trainer, by digest; a cluster needs one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// `Always`, `IfNotPresent` or `Never`; absent: Kubernetes' own default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    /// Secrets of the job's namespace that pull the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Runtime class of training pods, for example `nvidia`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,
    /// Labels that a node of a training pod must have; a job may add some.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that training pods tolerate; a job may add some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Resources of training pods; a job may replace each.
    pub resources: ResourceRequirements,
    /// Resources of the pods that prepare and publish.
    pub cpu_resources: ResourceRequirements,
    /// The most that a job may ask for, by resource; a resource that is not named is not limited.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub max_resources: BTreeMap<String, Quantity>,
    /// Memory of one accelerator that these pods get, such as `80Gi`: what does not fit is refused before one is taken. Absent: it is
    /// found when the accelerator is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator_memory: Option<String>,
    /// Volumes that the operator makes.
    pub storage: ProfileStorage,
    /// Price of an hour of one accelerator, or of the machine where there is none, in any one currency; absent: costs are
    /// not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    /// The Hugging Face hub that `hf://` means.
    pub hub: ProfileHub,
    /// Queue of the pods that prepare and publish, where a queue is asked of every Job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_queue_name: Option<String>,
    /// Seconds from SIGTERM to SIGKILL; absent: 120.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub termination_grace_period_seconds: Option<i64>,
    /// Train on the CPU where a pod holds an accelerator that cannot be used. Off, such a run is refused: it would idle the
    /// accelerator.
    pub fall_back_to_cpu: bool,
    /// What a job may choose for itself.
    pub allowed: Allowed,
}

/// Volumes that the operator makes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProfileStorage {
    /// Absent: the cluster's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class_name: Option<String>,
    /// Absent: [`DEFAULT_STORAGE_SIZE`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
}

/// Size of a volume where neither job nor profile names one.
pub const DEFAULT_STORAGE_SIZE: &str = "50Gi";

/// The Hugging Face hub that `hf://` means.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProfileHub {
    /// A mirror; absent: the public hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// What a job may choose for itself. `*` allows anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A quantity that Kubernetes would not take.
    #[error("{field}: found {found:?}, expected a quantity such as \"16Gi\" or \"500m\"")]
    Quantity {
        /// The profile and its field.
        field: String,
        /// What it says.
        found: String,
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
        let size = profile.storage.size.as_ref().map(|size| ("storage.size".to_owned(), size));
        let maxima = profile.max_resources.iter().map(|(key, max)| (format!("maxResources.{key}"), &max.0));
        let card = profile.accelerator_memory.as_ref().map(|memory| ("acceleratorMemory".to_owned(), memory));
        for (field, text) in size.into_iter().chain(maxima).chain(card) {
            if quantity::value(text).is_none() {
                return Err(Error::Quantity { field: format!("{name}.{field}"), found: text.clone() });
            }
        }
    }
    Ok(profiles)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_profiles_is_read_or_refused() {
        let text = "default: {pricePerHour: 0.10}\na100: {allowed: {sourcePrefixes: [\"hf://\"]}}\n";
        let profiles = parse(text).expect("valid");
        assert_eq!(profiles["default"].price_per_hour, Some(0.10));
        assert_eq!(profiles["a100"].allowed.source_prefixes, ["hf://"]);
        assert_eq!(profiles["a100"].allowed.queues, [ANY], "what a profile does not name keeps its default");
        for (text, expected) in [
            ("default: {pricePerHour: .nan}", "default.pricePerHour: found NaN"),
            ("default: {pricePerHour: .inf}", "default.pricePerHour: found inf"),
            ("default: {pricePerHour: -1}", "default.pricePerHour: found -1"),
            ("default: {price: 1}", "price"),
            ("default: {maxResources: {memory: lots}}", "default.maxResources.memory: found \"lots\""),
            ("default: {storage: {size: big}}", "default.storage.size: found \"big\""),
            ("default: {acceleratorMemory: 80 GB}", "default.acceleratorMemory: found \"80 GB\""),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn nothing_that_lets_a_pod_go_elsewhere_is_allowed_by_default() {
        let allowed = Allowed::default();
        assert!(allows_prefix(&allowed.source_prefixes, "hf://a/b") && allows(&allowed.queues, "team"));
        for list in [&allowed.node_selector_keys, &allowed.toleration_keys, &allowed.priority_classes] {
            assert!(!allows(list, "nvidia.com/gpu"));
        }
    }
}
