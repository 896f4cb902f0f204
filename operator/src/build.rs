//! The objects of a job, from its plan. Pure and infallible; names and labels are here. What a job writes appears in the
//! `RunConfig` and in resources, queue, priority class, node selector and tolerations of the training pod, and nowhere else.

mod claim;
mod config_map;
mod digest;
mod job;
mod placement;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crds::FineTuneJob;
use crds::finetunejob::JobReference;
use crds::run::PodStage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};

pub use claim::build_claim;
pub use config_map::{PLAN_FILE, RUN_FILE, build_config_map, build_control};
pub use crds::labels::{
    ATTEMPT_LABEL, CONTAINER, JOB_NAME_LABEL, JOB_UID_LABEL, MANAGED_BY_LABEL, MANAGER, STAGE_LABEL,
};
pub use digest::{differences, job_digest, makes_one_pod, pod_digest};
pub use job::{TRAINER_PORT, build_report_job, build_stage_job};
pub use placement::{HOSTNAME_LABEL, Placement, ZONE_LABEL, nodes_of};

/// Names of Jobs become labels of pods.
const MAX_NAME: usize = 63;

/// Name of a child. A suffix that would make it too long pushes the end of the job's name out, for its UID.
fn child_name(job: &FineTuneJob, suffix: &str) -> String {
    let (name, uid) = (job.name_any(), job.uid().unwrap_or_default());
    if name.len() + 1 + suffix.len() <= MAX_NAME {
        return format!("{name}-{suffix}");
    }
    name_with_uid(&name, &uid, suffix)
}

fn name_with_uid(name: &str, uid: &str, suffix: &str) -> String {
    let uid = &uid[..uid.len().min(8)];
    let kept = name.len().min(MAX_NAME - suffix.len() - uid.len() - 2);
    format!("{}-{uid}-{suffix}", name[..kept].trim_end_matches(['-', '.']))
}

/// Name of what a pod mounts. A kubelet keeps what it mounts under its name, what is immutable even after it was deleted and made
/// again: a job that is made anew under its name must not be given the old one's. (Jobs and pods are kept by their UID.)
fn mounted_name(job: &FineTuneJob, suffix: &str) -> String {
    name_with_uid(&job.name_any(), &job.uid().unwrap_or_default(), suffix)
}

/// Name of the ConfigMap with `run.yaml` and `plan.yaml`.
pub fn config_map_name(job: &FineTuneJob) -> String {
    mounted_name(job, "run")
}

/// What version 0.1 called it: a job that was accepted by that version has its plan there.
pub fn earlier_config_map_name(job: &FineTuneJob) -> String {
    child_name(job, "run")
}

/// Name of the ConfigMap with `control.yaml`.
pub fn control_name(job: &FineTuneJob) -> String {
    mounted_name(job, "control")
}

/// Name of the Job of an attempt.
pub fn stage_job_name(job: &FineTuneJob, stage: PodStage, attempt: i32) -> String {
    child_name(job, &format!("{}-{attempt}", stage.name()))
}

/// Name of the Job that reads the report of an attempt from the volume.
pub fn report_job_name(job: &FineTuneJob, of: &JobReference) -> String {
    child_name(job, &format!("{}-{}-report", of.stage.name(), of.attempt))
}

/// Whether an object is controlled by this very job.
pub fn is_owned_by(metadata: &ObjectMeta, job: &FineTuneJob) -> bool {
    let is_job = |owner: &OwnerReference| {
        let group = owner.api_version.split_once('/').map_or("", |(group, _)| group);
        owner.kind == FineTuneJob::kind(&()) && group == FineTuneJob::group(&())
    };
    controller(metadata).is_some_and(|owner| is_job(owner) && Some(&owner.uid) == job.metadata.uid.as_ref())
}

/// The owner that controls an object: there is one at most.
pub fn controller(metadata: &ObjectMeta) -> Option<&OwnerReference> {
    metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// Whether an object was made for this very job, owned or not.
pub fn is_labelled_for(metadata: &ObjectMeta, job: &FineTuneJob) -> bool {
    let label = metadata.labels.as_ref().and_then(|labels| labels.get(JOB_UID_LABEL));
    label.is_some() && label == job.metadata.uid.as_ref()
}

fn owner(job: &FineTuneJob) -> OwnerReference {
    OwnerReference {
        api_version: FineTuneJob::api_version(&()).into_owned(),
        kind: FineTuneJob::kind(&()).into_owned(),
        name: job.name_any(),
        uid: job.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

fn labels(job: &FineTuneJob) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "finetune-trainer".to_owned()),
        (MANAGED_BY_LABEL, MANAGER.to_owned()),
        (JOB_NAME_LABEL, job.name_any()),
        (JOB_UID_LABEL, job.uid().unwrap_or_default()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// With the administrator's labels besides ours, which win.
fn labelled(job: &FineTuneJob, name: String, additions: &BTreeMap<String, String>) -> ObjectMeta {
    let mut labels = additions.clone();
    labels.extend(self::labels(job));
    ObjectMeta { labels: Some(labels), ..metadata(job, name) }
}

fn metadata(job: &FineTuneJob, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: job.namespace(),
        labels: Some(labels(job)),
        owner_references: Some(vec![owner(job)]),
        ..ObjectMeta::default()
    }
}
