//! Profiles: what an administrator decides for the jobs that name them. A job never chooses an image, a runtime class or a
//! price; a local run uses the built-in `default`, or a file of profiles. The operator and a local run read the same file.
//!
//! What a field may say is in its schema, and [`parse`] goes by that: who makes a schema of these types refuses the same.

mod parse;
mod words;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EnvVar, LocalObjectReference, ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::parse::{Error, parse, schema};
pub use self::words::CERTIFICATES;
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
    #[schemars(schema_with = "words::pull_policy")]
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
    /// The cluster gives pods their user, group and the group of their volumes, as OpenShift does: none is asked for. Off, it is 65532.
    pub cluster_assigns_user: bool,
    /// Priority class of pods whose job names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub priority_class_name: Option<String>,
    /// Labels of the Jobs, pods and volumes of a job. What the operator itself puts on them is not to be named.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "words::labels")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the Jobs and pods of a job. What the operator itself puts on them is not to be named.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "words::annotations")]
    pub annotations: BTreeMap<String, String>,
    /// Keys of labels of a FineTuneJob that its Jobs, pods and volumes get too, such as a cost centre; `labels` win.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "words::inherited")]
    pub inherited_labels: Vec<String>,
    /// Further environment variables of the trainer, such as HTTPS_PROXY. The operator's own are not to be named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "words::environment")]
    pub environment: Vec<EnvVar>,
    /// Certificates of the authorities that the stages with a network trust.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<CaBundle>,
    /// Pods that prepare, publish and report: where they are not to be as training pods are.
    pub cpu_pods: CpuPods,
    /// Resources of the pods that prepare and publish.
    #[serde(deserialize_with = "quantity::strict_requirements")]
    #[schemars(schema_with = "quantity::strict_requirements_schema")]
    pub cpu_resources: ResourceRequirements,
    /// Extended resources that are no accelerators, such as network adapters; `*` stands for anything. Every other one is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_devices: Vec<String>,
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
    /// Kueue's priority class of the queued Jobs of a job that names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub workload_priority_class_name: Option<String>,
    /// Where in the cluster Kueue puts a queued training pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
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

/// Pods that prepare, publish and report: what they have for themselves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CpuPods {
    /// Labels that their nodes must have, in the place of those of training pods; `{}`: none. Absent: those of training pods, what a
    /// job adds included, whose nodes are where its volume can be mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Taints that they tolerate, in the place of those of training pods. Absent: those of training pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerations: Option<Vec<Toleration>>,
    /// Priority class, in the place of that of training pods, which may be a job's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub priority_class_name: Option<String>,
    /// Labels, besides those of all pods.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "words::labels")]
    pub labels: BTreeMap<String, String>,
    /// Annotations, besides those of all pods.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "words::annotations")]
    pub annotations: BTreeMap<String, String>,
    /// Environment variables, besides those of all pods.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "words::environment")]
    pub environment: Vec<EnvVar>,
}

/// Certificates in a ConfigMap of the job's namespace. They take the place of the well-known ones, which it must hold too if they
/// are needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CaBundle {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1))]
    pub config_map_name: String,
    /// Its key with certificates in PEM.
    #[schemars(length(min = 1))]
    pub key: String,
}

/// A level of Kueue's topology that the pods of a training Job share, such as `cloud.provider.com/rack`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Topology {
    /// They wait until they can.
    Required(String),
    /// They do if they can.
    Preferred(String),
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
    /// The largest volume that a job may ask for. Absent: 1Ti, or `size` if that is more.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "quantity::optional")]
    #[schemars(schema_with = "quantity::optional_schema")]
    pub max_size: Option<String>,
    /// Claims that jobs may name and that pods may take over: files on them are given the group of the pods (`fsGroup`), which a new
    /// disk needs to be written to, and which takes files away from others that had them by their group. Absent: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fs_group_claims: Vec<String>,
}

/// The largest volume that a job may ask for where its profile does not say.
pub const DEFAULT_MAX_STORAGE_SIZE: &str = "1Ti";
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

/// What a job may choose for itself. `*` stands for anything, but in prefixes only by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Allowed {
    /// Namespaces whose jobs may name the profile. Absent: all for the profile `default`, none for any other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
    /// Prefixes that sources and destinations must have.
    pub source_prefixes: Vec<String>,
    /// Claims of its namespace that a job may name: for its run, as a source or as a destination.
    pub claims: Vec<String>,
    /// Storage classes of new volumes, besides the profile's own.
    pub storage_classes: Vec<String>,
    /// Keys of node labels that a job may ask for.
    pub node_selector_keys: Vec<String>,
    /// Keys of taints that a job may tolerate.
    pub toleration_keys: Vec<String>,
    /// Priority classes, besides the profile's own.
    pub priority_classes: Vec<String>,
    /// Queues.
    pub queues: Vec<String>,
    /// Kueue's workload priority classes, besides the profile's own.
    pub workload_priority_classes: Vec<String>,
}

impl Default for Allowed {
    /// Sources, claims and queues are a matter of the namespace; what lets a pod go where others may not is the administrator's.
    fn default() -> Self {
        Self {
            namespaces: None,
            source_prefixes: vec![ANY.into()],
            claims: vec![ANY.into()],
            storage_classes: Vec::new(),
            node_selector_keys: Vec::new(),
            toleration_keys: Vec::new(),
            priority_classes: Vec::new(),
            queues: vec![ANY.into()],
            workload_priority_classes: Vec::new(),
        }
    }
}

impl Profile {
    /// Whether jobs of a namespace may name it. The profile that a job gets without naming one is everybody's, unless it says
    /// otherwise; any other is nobody's until it does: it may hold what is dear.
    pub fn serves(&self, name: &str, namespace: &str) -> bool {
        self.allowed.namespaces.as_ref().map_or(name == DEFAULT, |list| allows(list, namespace))
    }

    /// The largest volume that a job may ask for.
    pub fn max_storage_size(&self) -> &str {
        let own = self.storage.size.as_deref().unwrap_or(DEFAULT_STORAGE_SIZE);
        let is_larger = |size: &str| quantity::value(size) > quantity::value(DEFAULT_MAX_STORAGE_SIZE);
        let default = if is_larger(own) { own } else { DEFAULT_MAX_STORAGE_SIZE };
        self.storage.max_size.as_deref().unwrap_or(default)
    }
}

/// Whether `list` has `name`. In a word of the list a `*` stands for anything, or nothing.
pub fn allows(list: &[String], name: &str) -> bool {
    list.iter().any(|pattern| matches(pattern, name))
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once(ANY) {
        None => pattern == name,
        Some((before, rest)) => name.strip_prefix(before).is_some_and(|name| {
            // Whatever the star may stand for. Names are short, and administrators write the patterns.
            let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
            ends.into_iter().any(|at| matches(rest, &name[at..]))
        }),
    }
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
        let lists = [
            &allowed.node_selector_keys,
            &allowed.toleration_keys,
            &allowed.priority_classes,
            &allowed.workload_priority_classes,
            &allowed.storage_classes,
        ];
        for list in lists {
            assert!(!allows(list, "nvidia.com/gpu"));
        }
    }

    #[test]
    fn a_star_stands_for_anything_or_nothing() {
        for (pattern, name, expected) in [
            ("*", "team-a", true),
            ("*", "", true),
            ("team-a", "team-a", true),
            ("team-a", "team-ab", false),
            ("team-*", "team-a", true),
            ("team-*", "team-", true),
            ("team-*", "a-team-a", false),
            ("*-prod", "team-a-prod", true),
            ("*-prod", "team-a-prod-x", false),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("*é*", "xéy", true),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    /// The most permissive profile is not everybody's because it is there.
    #[test]
    fn a_profile_serves_the_namespaces_that_it_names() {
        let profile = |namespaces: Option<&[&str]>| {
            let namespaces = namespaces.map(|list| list.iter().map(|&name| name.to_owned()).collect());
            Profile { allowed: Allowed { namespaces, ..Allowed::default() }, ..Profile::default() }
        };
        for (namespaces, name, expected) in [
            (None, "default", true),
            (None, "h100", false),
            (Some(&["*"][..]), "h100", true),
            (Some(&["team-*"]), "h100", true),
            (Some(&["other"]), "h100", false),
            (Some(&["other"]), "default", false),
            (Some(&[]), "default", false),
        ] {
            assert_eq!(profile(namespaces).serves(name, "team-a"), expected, "{name}: {namespaces:?}");
        }
    }
}
