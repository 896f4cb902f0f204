//! Makes what was decided, and takes away what must not run. Objects are made once, under names that follow from the job, and
//! never written again; one that is there already is ours or in the way.

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
    is_labelled_for, is_owned_by, job_digest, makes_one_pod, report_job_name,
};
use crate::call;
use crate::decide::{Decision, Step};
use crate::facts::Facts;
use crate::status::{Applied, Created};

/// A change of the cluster. Each may be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Make `run.yaml` and `plan.yaml`.
    ConfigMap(Box<ConfigMap>),
    /// Tell the trainer to stop.
    Control(Box<ConfigMap>),
    /// Make the volume's claim.
    Claim(Box<PersistentVolumeClaim>),
    /// Make the Job of the newest attempt.
    StageJob(Box<Job>),
    /// Make the Job that reads what the newest attempt left.
    ReportJob(Box<Job>),
    /// Take a Job away, and its pods with it.
    DeleteJob {
        /// `metadata.name`
        name: String,
        /// `metadata.uid`: no other Job of the name.
        uid: String,
    },
}

/// The changes that a decision asks for, in the order in which they are made. Pure. `placement` is for the first pod of a job.
pub fn changes(decision: &Decision, facts: &Facts, placement: &Placement) -> Vec<Change> {
    let job = facts.job;
    let mut changes: Vec<Change> = removal(decision, facts).into_iter().chain(removal_of_reader(facts)).collect();
    let (Some(newest), Ok(plan)) = (facts.newest(), facts.plan) else { return changes };
    let is_open = facts.current().is_some() && !matches!(decision.step, Step::Rest { .. } | Step::Hold { .. });
    if job.spec.stop_requested && is_open {
        changes.push(Change::Control(Box::new(build_control(job))));
    }
    match decision.step {
        Step::Make => {
            changes.push(Change::ConfigMap(Box::new(build_config_map(job, plan))));
            changes.extend(build_claim(job, plan).map(|claim| Change::Claim(Box::new(claim))));
            changes.push(Change::StageJob(Box::new(build_stage_job(job, plan, newest, placement))));
        }
        Step::ReadVolume => changes.push(Change::ReportJob(Box::new(build_report_job(job, plan, newest)))),
        _ => {}
    }
    changes
}

fn removal(decision: &Decision, facts: &Facts) -> Option<Change> {
    let uid = match &decision.step {
        Step::Rest { remove } | Step::Hold { remove } => remove.clone()?,
        Step::Stop { remove, .. } => remove.clone(),
        _ => return None,
    };
    Some(Change::DeleteJob { name: facts.newest()?.name.clone(), uid })
}

/// A Job that has read the volume, or that nobody waits for, may be kept by containers beside the trainer.
fn removal_of_reader(facts: &Facts) -> Option<Change> {
    let reader = facts.observed.report_job.as_ref()?;
    let is_done = facts.current().is_none() || reader.has_ended();
    let uid = reader.unfinished_job().filter(|_| is_done)?.to_owned();
    Some(Change::DeleteJob { name: report_job_name(facts.job, facts.newest()?), uid })
}

/// Makes them. What the API server says when it does not take an object is told, whatever it says.
pub async fn apply(client: &Client, job: &FineTuneJob, changes: Vec<Change>) -> Result<Applied, call::Error> {
    let namespace = job.namespace().unwrap_or_default();
    let mut applied = Applied::default();
    for change in changes {
        let obstacle = match change {
            Change::ConfigMap(map) => {
                let made = create(client, &namespace, &*map, same_map(job, &map)).await?;
                applied.plan_was_recorded = made.is_ok();
                made.err()
            }
            // An attempt is not disturbed by what is in the way of a word to it.
            Change::Control(map) => {
                match create(client, &namespace, &*map, same_map(job, &map)).await? {
                    Ok(_) => applied.stop_was_told = true,
                    Err(Obstacle::Taken(what)) => applied.name_taken = Some(what),
                    Err(Obstacle::Leftover(why) | Obstacle::Refused(why)) => applied.stop_refused = Some(why),
                }
                None
            }
            Change::Claim(claim) => {
                let is_ours = |found: &PersistentVolumeClaim| is_labelled_for(&found.metadata, job);
                create(client, &namespace, &*claim, is_ours).await?.err()
            }
            Change::ReportJob(child) => create(client, &namespace, &*child, same_job(job, &child)).await?.err(),
            Change::StageJob(child) => {
                let made = create(client, &namespace, &*child, same_job(job, &child)).await?;
                // As admission left it: its pods are like that.
                let found = made.as_ref().ok().and_then(|found| found.uid().zip(job_digest(found)));
                applied.created = found.map(|(uid, pod_digest)| Created { uid, pod_digest });
                made.err()
            }
            Change::DeleteJob { name, uid } => {
                delete_job(client, &namespace, &name, &uid).await?;
                None
            }
        };
        let Some(obstacle) = obstacle else { continue };
        match obstacle {
            Obstacle::Leftover(what) => applied.leftover = Some(what),
            Obstacle::Taken(what) => applied.name_taken = Some(what),
            Obstacle::Refused(message) => applied.refused = Some(message),
        }
        break;
    }
    Ok(applied)
}

/// Why an object is not there as it was asked for.
enum Obstacle {
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

/// So it is with a Job: what it runs must be what was asked for.
fn same_job(job: &FineTuneJob, child: &Job) -> impl Fn(&Job) -> bool {
    let expected = job_digest(child);
    move |found| is_owned_by(&found.metadata, job) && makes_one_pod(found) && job_digest(found) == expected
}

async fn create<K>(
    client: &Client,
    namespace: &str,
    object: &K,
    is_ours: impl Fn(&K) -> bool,
) -> Result<Result<K, Obstacle>, call::Error>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let what = format!("{} {}", K::kind(&()), object.name_any());
    let failed = |verb, source| call::Error::one::<K>(verb, namespace, &object.name_any(), source);
    match api.create(&PostParams::default(), object).await {
        Ok(created) => Ok(Ok(created)),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            Ok(match api.get_opt(&object.name_any()).await.map_err(|source| failed("get", source))? {
                Some(found) if is_ours(&found) => Ok(found),
                Some(found) if is_leftover(found.meta(), object.meta()) => Err(Obstacle::Leftover(what)),
                Some(_) => Err(Obstacle::Taken(what)),
                None => Err(Obstacle::Refused(format!("{what} was deleted while it was made"))),
            })
        }
        // Quota, admission and Pod Security answer 403, a field that is out of bounds 422, a webhook that is down 500: whatever it
        // is, its user can do more about it than a log.
        Err(kube::Error::Api(status)) => {
            Ok(Err(Obstacle::Refused(format!("cannot create {what}: {}", status.message))))
        }
        Err(source) => Err(failed("create", source)),
    }
}

async fn delete_job(client: &Client, namespace: &str, name: &str, uid: &str) -> Result<(), call::Error> {
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
        Err(source) => Err(call::Error::one::<Job>("delete", namespace, name, source)),
    }
}

/// Deletes a job whose time to live is over: this very object, as it was last seen.
pub async fn delete_finetunejob(client: &Client, job: &FineTuneJob) -> Result<(), call::Error> {
    let namespace = job.namespace().unwrap_or_default();
    let api: Api<FineTuneJob> = Api::namespaced(client.clone(), &namespace);
    let parameters = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: Some(Preconditions { uid: job.uid(), resource_version: job.resource_version() }),
        ..DeleteParams::default()
    };
    match api.delete(&job.name_any(), &parameters).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(call::Error::one::<FineTuneJob>("delete", &namespace, &job.name_any(), source)),
    }
}
