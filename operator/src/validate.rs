//! From a job and its profile to a complete plan. Pure. Nothing later reads the raw spec, except for what may be edited while
//! the job runs: `suspend`, `stopRequested`, deadlines and the TTL.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use crds::FineTuneJob;
use crds::condition::reason;
use crds::profile::{self, CaBundle, CpuPods, Profile, Profiles, Topology, allows};
use crds::resolve::{Finding, Target, VolumeClaim, accelerators, resolve, training_resources, volume_claim};
use crds::run::{PodStage, RunConfig};
use k8s_openapi::api::core::v1::{EnvVar, LocalObjectReference, ResourceRequirements, Toleration};
use serde::{Deserialize, Serialize};

/// What is done for a job: resolved once, when it is accepted, and kept in its ConfigMap. Later changes of a profile touch
/// no job that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Plan {
    /// What the trainer does.
    pub run: RunConfig,
    /// Where it does it.
    pub pods: PodPlan,
    /// On what volume.
    pub claim: VolumeClaim,
    /// The files that it was read from, where this version would write others.
    #[serde(skip)]
    recorded: Option<Box<(String, String)>>,
}

/// What the pods of a job are made of, besides what is the same for all jobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodPlan {
    /// Image of the trainer.
    pub image: String,
    /// Absent: Kubernetes' default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    /// Secrets that pull the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Of training pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,
    /// Of training pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Of training pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Of the pods that prepare, publish and report; absent: those of training pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_node_selector: Option<BTreeMap<String, String>>,
    /// Of the pods that prepare, publish and report; absent: those of training pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_tolerations: Option<Vec<Toleration>>,
    /// Of training pods.
    pub resources: ResourceRequirements,
    /// Of the pods that prepare, publish and report.
    pub cpu_resources: ResourceRequirements,
    /// Of all pods, or of training pods where the others have their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Of the pods that prepare, publish and report; absent: that of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_priority_class_name: Option<String>,
    /// What training Jobs and their pods, and the volume, are given besides.
    #[serde(default, skip_serializing_if = "Additions::is_empty")]
    pub additions: Additions,
    /// What the other Jobs and their pods are given besides.
    #[serde(default, skip_serializing_if = "Additions::is_empty")]
    pub cpu_additions: Additions,
    /// Certificates that the stages with a network trust.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<CaBundle>,
    /// Queue of the training Jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_name: Option<String>,
    /// Queue of the other Jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_queue_name: Option<String>,
    /// Named claims whose files may be given the pods' group.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fs_group_claims: Vec<String>,
    /// Patterns of extended resources that are no accelerators.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_devices: Vec<String>,
    /// Kueue's priority class of the queued Jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_priority_class_name: Option<String>,
    /// Where Kueue puts training pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// Pods ask for no user and no group of their own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cluster_assigns_user: bool,
    /// The hub that `hf://` means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub_endpoint: Option<String>,
    /// Seconds from SIGTERM to SIGKILL.
    pub termination_grace_period_seconds: i64,
}

/// What an administrator puts on Jobs and pods besides what the operator puts there itself, which wins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Additions {
    /// The profile's, and those of the job's that it passes on.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Environment variables of the trainer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<EnvVar>,
}

impl Additions {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Of training pods.
    fn new(job: &FineTuneJob, profile: &Profile) -> Self {
        let own = job.metadata.labels.iter().flatten().filter(|(key, _)| profile.inherited_labels.contains(key));
        let mut labels: BTreeMap<String, String> = own.map(|(key, value)| (key.clone(), value.clone())).collect();
        labels.extend(profile.labels.clone());
        Self { labels, annotations: profile.annotations.clone(), environment: profile.environment.clone() }
    }

    /// Of the other pods.
    fn with(mut self, pods: &CpuPods) -> Self {
        self.labels.extend(pods.labels.clone());
        self.annotations.extend(pods.annotations.clone());
        self.environment.retain(|general| pods.environment.iter().all(|variable| variable.name != general.name));
        self.environment.extend(pods.environment.clone());
        self
    }
}

impl Plan {
    /// Reads `run.yaml` and `plan.yaml`. What another version wrote stays as that version wrote it: the objects that are made of it
    /// are compared with what is there, and the status has its digest.
    pub fn read(run: &str, plan: &str) -> Result<Self, serde_saphyr::Error> {
        let mut read: Self = serde_saphyr::from_str(plan)?;
        let files = (run.to_owned(), plan.to_owned());
        if read.files() != files {
            read.recorded = Some(Box::new(files));
        }
        Ok(read)
    }

    /// `run.yaml` and `plan.yaml` as they are kept.
    pub fn files(&self) -> (String, String) {
        if let Some(files) = &self.recorded {
            return (**files).clone();
        }
        // By way of JSON: YAML's own tags for enums are nothing that other readers know.
        let value = serde_json::to_value(self).expect("a plan is JSON");
        (self.run.to_yaml(), serde_saphyr::to_string(&value).expect("JSON is YAML"))
    }

    /// SHA-256 of both files.
    pub fn digest(&self) -> String {
        let (run, plan) = self.files();
        digest_of_files(&run, &plan)
    }
}

/// SHA-256 of `run.yaml` and `plan.yaml`.
pub fn digest_of_files(run: &str, plan: &str) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::new().chain_update(run).chain_update([0]).chain_update(plan).finalize();
    digest_text(&digest)
}

/// `sha256:…` of a digest's bytes.
pub fn digest_text(digest: &[u8]) -> String {
    let hexadecimal: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hexadecimal}")
}

impl PodPlan {
    /// The queue that holds the Jobs of a stage.
    pub fn queue(&self, stage: PodStage) -> Option<&String> {
        if stage == PodStage::Train { self.queue_name.as_ref() } else { self.cpu_queue_name.as_ref() }
    }

    /// What the Jobs and pods of a stage are given besides.
    pub fn additions(&self, stage: PodStage) -> &Additions {
        if stage == PodStage::Train { &self.additions } else { &self.cpu_additions }
    }

    /// The priority class of the pods of a stage.
    pub fn priority_class(&self, stage: PodStage) -> Option<&String> {
        let own = self.cpu_priority_class_name.as_ref().filter(|_| stage != PodStage::Train);
        own.or(self.priority_class_name.as_ref())
    }

    /// Accelerators of a training pod.
    pub fn accelerators(&self) -> i64 {
        accelerators(&self.resources, &self.other_devices)
    }
}

/// Why a job is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Of the condition `Accepted`.
    pub reason: &'static str,
    /// Field by field.
    pub message: String,
}

/// Seconds from SIGTERM to SIGKILL where the profile is silent: a checkpoint takes at most ten.
const GRACE_PERIOD_SECONDS: i64 = 120;

/// The plan of a job by the profile that it names.
pub fn validate(job: &FineTuneJob, profiles: &Profiles) -> Result<Plan, Invalid> {
    let run = resolve(job, profiles, Target::Cluster).map_err(|findings| invalid(&findings))?.config;
    let name = job.spec.profile.as_deref().unwrap_or(profile::DEFAULT);
    let profile = &profiles[name];
    let findings = scheduling_findings(job, profile);
    if !findings.is_empty() {
        return Err(invalid(&findings));
    }
    let Some(image) = profile.image.clone() else {
        let message = format!("the profile {name} names no image; its administrator must set one");
        return Err(Invalid { reason: reason::PROFILE_NOT_FOUND, message });
    };
    let scheduling = job.spec.scheduling.clone().unwrap_or_default();
    let mut node_selector = profile.node_selector.clone();
    node_selector.extend(scheduling.node_selector);
    let mut tolerations = profile.tolerations.clone();
    tolerations.extend(scheduling.tolerations.into_iter().map(|toleration| toleration.0));
    let additions = Additions::new(job, profile);
    let claim = volume_claim(job, profile);
    let named = run.storage.iter().flat_map(|storage| storage.claims.keys().map(String::as_str)).chain([claim.name()]);
    let taken_over: BTreeSet<&str> = named.filter(|name| allows(&profile.storage.fs_group_claims, name)).collect();
    let pods = PodPlan {
        image,
        image_pull_policy: profile.image_pull_policy.clone(),
        image_pull_secrets: profile.image_pull_secrets.clone(),
        runtime_class_name: profile.runtime_class_name.clone(),
        node_selector,
        tolerations,
        cpu_node_selector: profile.cpu_pods.node_selector.clone(),
        cpu_tolerations: profile.cpu_pods.tolerations.clone(),
        resources: training_resources(job, &profile.resources),
        cpu_resources: profile.cpu_resources.clone(),
        priority_class_name: scheduling.priority_class_name.or_else(|| profile.priority_class_name.clone()),
        cpu_priority_class_name: profile.cpu_pods.priority_class_name.clone(),
        cpu_additions: additions.clone().with(&profile.cpu_pods),
        additions,
        ca_bundle: profile.ca_bundle.clone(),
        fs_group_claims: taken_over.into_iter().map(str::to_owned).collect(),
        other_devices: profile.other_devices.clone(),
        workload_priority_class_name: scheduling
            .workload_priority_class_name
            .or_else(|| profile.workload_priority_class_name.clone()),
        topology: profile.topology.clone(),
        queue_name: scheduling.queue_name,
        cpu_queue_name: profile.cpu_queue_name.clone(),
        cluster_assigns_user: profile.cluster_assigns_user,
        hub_endpoint: profile.hub.endpoint.clone(),
        termination_grace_period_seconds: profile.termination_grace_period_seconds.unwrap_or(GRACE_PERIOD_SECONDS),
    };
    Ok(Plan { run, pods, claim, recorded: None })
}

/// Every finding in one message, under the reason of the first.
fn invalid(findings: &[Finding]) -> Invalid {
    let sentences: Vec<String> =
        findings.iter().map(|finding| format!("{}: {}", finding.field, finding.message)).collect();
    Invalid {
        reason: findings.first().map_or(reason::NOT_SUPPORTED, |finding| finding.reason),
        message: sentences.join("; "),
    }
}

/// What the job asks of the scheduler and the profile does not allow.
fn scheduling_findings(job: &FineTuneJob, profile: &Profile) -> Vec<Finding> {
    let scheduling = job.spec.scheduling.clone().unwrap_or_default();
    let mut findings = Vec::new();
    let mut ask = |field: String, found: &str, allowed: &[String]| {
        if !allows(allowed, found) {
            let expected =
                if allowed.is_empty() { "none".to_owned() } else { format!("one of {}", allowed.join(", ")) };
            let message = format!("found {found}, the profile allows {expected}");
            findings.push(Finding { reason: reason::SCHEDULING_NOT_ALLOWED, field, message });
        }
    };
    let field = |name: &str| format!("spec.scheduling.{name}");
    if let Some(queue) = &scheduling.queue_name {
        ask(field("queueName"), queue, &profile.allowed.queues);
    }
    let own_class = profile.priority_class_name.as_ref();
    if let Some(class) = scheduling.priority_class_name.as_ref().filter(|class| Some(*class) != own_class) {
        ask(field("priorityClassName"), class, &profile.allowed.priority_classes);
    }
    let own_class = profile.workload_priority_class_name.as_ref();
    if let Some(class) = scheduling.workload_priority_class_name.as_ref().filter(|class| Some(*class) != own_class) {
        ask(field("workloadPriorityClassName"), class, &profile.allowed.workload_priority_classes);
    }
    for key in scheduling.node_selector.keys() {
        ask(field("nodeSelector"), key, &profile.allowed.node_selector_keys);
    }
    for (index, toleration) in scheduling.tolerations.iter().enumerate() {
        let key = toleration.0.key.as_deref().unwrap_or_default();
        ask(field(&format!("tolerations[{index}].key")), key, &profile.allowed.toleration_keys);
    }
    for (key, value) in &scheduling.node_selector {
        if let Some(own) = profile.node_selector.get(key).filter(|own| *own != value) {
            let message = format!("found {key}: {value}, the profile sets {own}");
            let field = field("nodeSelector");
            findings.push(Finding { reason: reason::SCHEDULING_NOT_ALLOWED, field, message });
        }
    }
    findings
}
