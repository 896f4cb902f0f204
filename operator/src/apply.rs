//! Makes what the status lists and the cluster lacks, and takes away what must not run. Objects are made once, under names
//! that follow from the job, and never written again; one that is there already is ours or in the way.

use crds::FineTuneJob;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, PostParams, Preconditions, PropagationPolicy};
use kube::core::NamespaceResourceScope;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::build::{
    Placement, build_claim, build_config_map, build_control, build_report_job, build_stage_job, controller,
    is_labelled_for, is_owned_by,
};
use crate::observe::{AttemptSeen, JobSeen, Observed};
use crate::status::{Applied, is_terminal, needs_report_job};
use crate::validate::Plan;

/// Something to do. Each may be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Make `run.yaml` and `plan.yaml`.
    ConfigMap(Box<ConfigMap>),
    /// Tell the trainer to stop.
    Control(Box<ConfigMap>),
    /// Make the volume's claim.
    Claim(Box<PersistentVolumeClaim>),
    /// Make the Job of the newest attempt.
    StageJob(Box<Job>),
    /// Make the Job that reads the last word of the newest attempt.
    ReportJob(Box<Job>),
    /// Take a Job away, and its pods with it.
    DeleteJob {
        /// `metadata.name`
        name: String,
        /// `metadata.uid`: no other Job of the name.
        uid: String,
    },
}

/// What a job needs now, in the order in which it is done. Pure.
pub fn acts(job: &FineTuneJob, plan: Option<&Plan>, observed: &Observed) -> Vec<Act> {
    let status = job.status.clone().unwrap_or_default();
    let Some(current) = status.job_refs.last() else { return Vec::new() };
    let mut acts = Vec::new();
    let running = |seen: &AttemptSeen| match &seen.job {
        JobSeen::Present { uid, finished: false, .. } => Some(uid.clone()),
        _ => None,
    };
    let attempt = observed.attempt.clone().unwrap_or_default();
    if is_terminal(&status) || job.spec.suspend {
        // Whoever watches the job is told that nothing runs: so nothing may.
        acts.extend(running(&attempt).map(|uid| Act::DeleteJob { name: current.name.clone(), uid }));
        return acts;
    }
    let Some(plan) = plan.filter(|_| current.outcome.is_none()) else { return acts };
    if job.spec.stop_requested {
        acts.push(Act::Control(Box::new(build_control(job))));
    }
    if current.uid.is_none() && attempt.job == JobSeen::Missing {
        // Today's profile makes another plan than the one that is recorded, which nothing was made from: this pass records it.
        let recorded = status.resolved.as_ref().and_then(|resolved| resolved.plan_digest.as_deref());
        if observed.plan.is_none() && recorded != Some(plan.digest().as_str()) {
            return acts;
        }
        acts.push(Act::ConfigMap(Box::new(build_config_map(job, plan))));
        acts.extend(build_claim(job, plan).map(|claim| Act::Claim(Box::new(claim))));
        acts.push(Act::StageJob(Box::new(build_stage_job(job, plan, current, &Placement::default()))));
    } else if observed.report_job.is_none() && needs_report_job(job, observed) {
        acts.push(Act::ReportJob(Box::new(build_report_job(job, plan, current))));
    }
    acts
}

/// Does it. What the API server refuses for good is told, what it could not do now is an error.
pub async fn apply(client: &Client, job: &FineTuneJob, acts: Vec<Act>) -> Result<Applied, kube::Error> {
    let namespace = job.namespace().unwrap_or_default();
    let mut applied = Applied::default();
    for act in acts {
        let made = match act {
            Act::ConfigMap(map) => {
                let made = create(client, &namespace, &*map, same_map(job, &map)).await?;
                applied.plan_was_recorded = matches!(made, Made::Ours(_));
                made
            }
            Act::Control(map) => {
                let made = create(client, &namespace, &*map, same_map(job, &map)).await?;
                applied.stop_was_told = matches!(made, Made::Ours(_));
                made
            }
            Act::Claim(claim) => {
                let is_ours = |found: &PersistentVolumeClaim| is_labelled_for(&found.metadata, job);
                create(client, &namespace, &*claim, is_ours).await?
            }
            Act::ReportJob(child) => create(client, &namespace, &*child, owned_by(job)).await?,
            Act::StageJob(child) => {
                let made = create(client, &namespace, &*child, owned_by(job)).await?;
                if let Made::Ours(uid) = &made {
                    applied.created_uid.clone_from(uid);
                }
                made
            }
            Act::DeleteJob { name, uid } => {
                delete_job(client, &namespace, &name, &uid).await?;
                continue;
            }
        };
        match made {
            Made::Ours(_) => {}
            Made::Leftover(what) => {
                applied.leftover = Some(what);
                break;
            }
            Made::Taken(what) => {
                applied.name_taken = Some(what);
                break;
            }
            Made::Refused(message) => {
                applied.refused = Some(message);
                break;
            }
        }
    }
    Ok(applied)
}

enum Made {
    /// It is there, and ours.
    Ours(Option<String>),
    /// The object of a job of the same name that was deleted has its name.
    Leftover(String),
    /// Somebody else's object has its name.
    Taken(String),
    /// The API server does not take it.
    Refused(String),
}

/// An owner reference proves nothing: what the pod reads must be what was planned.
fn same_map(job: &FineTuneJob, map: &ConfigMap) -> impl Fn(&ConfigMap) -> bool {
    |found| is_owned_by(&found.metadata, job) && found.data == map.data
}

/// Whether what has an object's name belongs to an owner of the same name that is gone: its garbage is not collected yet.
fn is_leftover(found: &ObjectMeta, object: &ObjectMeta) -> bool {
    controller(found)
        .zip(controller(object))
        .is_some_and(|(found, ours)| (&found.kind, &found.name) == (&ours.kind, &ours.name) && found.uid != ours.uid)
}

fn owned_by(job: &FineTuneJob) -> impl Fn(&Job) -> bool {
    |found| is_owned_by(&found.metadata, job)
}

async fn create<K>(
    client: &Client,
    namespace: &str,
    object: &K,
    is_ours: impl Fn(&K) -> bool,
) -> Result<Made, kube::Error>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let what = format!("{} {}", K::kind(&()), object.name_any());
    match api.create(&PostParams::default(), object).await {
        Ok(created) => Ok(Made::Ours(created.meta().uid.clone())),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            Ok(match api.get_opt(&object.name_any()).await? {
                Some(found) if is_ours(&found) => Made::Ours(found.meta().uid.clone()),
                Some(found) if is_leftover(found.meta(), object.meta()) => Made::Leftover(what),
                Some(_) => Made::Taken(what),
                None => Made::Refused(format!("{what} was deleted while it was made")),
            })
        }
        // Quota, admission and Pod Security answer 403, a field that is out of bounds 422.
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 404 | 422) => {
            Ok(Made::Refused(format!("{what}: {}", status.message)))
        }
        Err(error) => Err(error),
    }
}

async fn delete_job(client: &Client, namespace: &str, name: &str, uid: &str) -> Result<(), kube::Error> {
    let api: Api<Job> = Api::namespaced(client.clone(), namespace);
    let parameters = DeleteParams {
        // Without it the pods of a Job are orphaned, and go on.
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: Some(Preconditions { uid: Some(uid.to_owned()), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(name, &parameters).await {
        Ok(_) => Ok(()),
        // It is gone already, or a Job made anew has its name.
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Deletes a job whose time to live is over: this very object, as it was last seen.
pub async fn delete_finetunejob(client: &Client, job: &FineTuneJob) -> Result<(), kube::Error> {
    let api: Api<FineTuneJob> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let parameters = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: Some(Preconditions { uid: job.uid(), resource_version: job.resource_version() }),
        ..DeleteParams::default()
    };
    match api.delete(&job.name_any(), &parameters).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}
