//! What the watches hold: jobs, their Jobs and pods, each with no more than is read of it.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use crds::FineTuneJob;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};

use crate::build::{JOB_UID_LABEL, job_digest, pod_digest};

/// What the watches of one namespace, or of all, deliver; a job that does not parse stalls no other.
pub type Guarded = DeserializeGuard<FineTuneJob>;
/// The jobs that a controller knows.
pub type JobStore = Store<Guarded>;

/// In the cache, the place of the digest of what was pruned: no annotation of that name is taken from outside.
const POD_DIGEST: &str = "finetune.dev/pod-digest";

/// What observing reads from.
#[derive(Clone, Debug)]
pub struct Caches {
    /// Jobs that this operator made.
    pub jobs: Store<Job>,
    /// Their pods.
    pub pods: Pods,
}

impl Caches {
    /// Returns when both hold what the API server held when it was first asked.
    pub async fn wait_until_ready(&self) {
        // A writer that was dropped ends the controller, and this pass with it.
        let _ = self.jobs.wait_until_ready().await;
        let _ = self.pods.store.wait_until_ready().await;
    }
}

/// The cache holds what is read of a FineTuneJob. Who owns which field takes more room than all the rest of it.
pub fn prune_finetunejob(guarded: &mut Guarded) {
    let metadata = guarded.meta_mut();
    metadata.managed_fields = None;
    metadata.annotations = None;
}

/// The cache holds what is read of a Job, for thousands of them.
pub fn prune_job(job: &mut Job) {
    let digest = job_digest(job);
    keep_digest(&mut job.metadata, digest);
    if let Some(spec) = &mut job.spec {
        spec.template = PodTemplateSpec::default();
        spec.pod_failure_policy = None;
    }
}

/// The cache holds what is read of a pod.
pub fn prune_pod(pod: &mut Pod) {
    keep_digest(&mut pod.metadata, pod.spec.as_ref().map(pod_digest));
    if let Some(spec) = &mut pod.spec {
        *spec = PodSpec { node_name: spec.node_name.take(), ..PodSpec::default() };
    }
}

/// In place of what nobody reads.
fn keep_digest(metadata: &mut ObjectMeta, digest: Option<String>) {
    metadata.managed_fields = None;
    metadata.annotations = digest.map(|digest| [(POD_DIGEST.to_owned(), digest)].into());
}

/// Digest of the pod, or of the template of the Job, that was in the cache before it was pruned.
pub fn pruned_digest(object: &impl ResourceExt) -> Option<&str> {
    object.annotations().get(POD_DIGEST).map(String::as_str)
}

/// The cache of pods, and which of them are of which job.
#[derive(Clone, Debug)]
pub struct Pods {
    /// Every pod of this operator.
    pub store: Store<Pod>,
    /// Namespaces and names by `metadata.uid` of the job. A pod that it names may be gone; none that is there lacks.
    by_job: Arc<Mutex<HashMap<String, BTreeSet<(String, String)>>>>,
}

impl Pods {
    /// Of a store whose events are noted from the first on.
    pub fn new(store: Store<Pod>) -> Self {
        Self { store, by_job: Arc::default() }
    }

    /// To be called with every event after the store took it.
    pub fn note(&self, event: &Event<Pod>) {
        let mut by_job = self.by_job.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Apply(pod) | Event::InitApply(pod) => {
                if let Some((uid, place)) = entry(pod) {
                    by_job.entry(uid).or_default().insert(place);
                }
            }
            Event::Delete(pod) => {
                if let Some((uid, place)) = entry(pod)
                    && let Some(places) = by_job.get_mut(&uid)
                {
                    places.remove(&place);
                    if places.is_empty() {
                        by_job.remove(&uid);
                    }
                }
            }
            Event::Init => {}
            // Whatever went while nobody watched.
            Event::InitDone => by_job.retain(|_, places| {
                places.retain(|place| self.get(place).is_some());
                !places.is_empty()
            }),
        }
    }

    /// Pods with the label of a job, wherever they are.
    pub fn of_job(&self, job_uid: &str) -> Vec<Arc<Pod>> {
        let places =
            self.by_job.lock().unwrap_or_else(PoisonError::into_inner).get(job_uid).cloned().unwrap_or_default();
        places.iter().filter_map(|place| self.get(place)).collect()
    }

    fn get(&self, (namespace, name): &(String, String)) -> Option<Arc<Pod>> {
        self.store.get(&ObjectRef::new(name).within(namespace))
    }
}

fn entry(pod: &Pod) -> Option<(String, (String, String))> {
    let uid = pod.meta().labels.as_ref()?.get(JOB_UID_LABEL)?;
    Some((uid.clone(), (pod.namespace()?, pod.name_any())))
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;

    fn pod(name: &str, job_uid: &str) -> Pod {
        let metadata = json!({"namespace": "team", "name": name, "labels": {JOB_UID_LABEL: job_uid}});
        serde_json::from_value(json!({"metadata": metadata})).expect("a pod")
    }

    fn check(steps: Vec<(Event<Pod>, &[&str])>) {
        let (store, mut writer) = reflector::store();
        let pods = Pods::new(store);
        for (event, expected) in steps {
            writer.apply_watcher_event(&event);
            pods.note(&event);
            let found: Vec<String> = pods.of_job("u1").iter().map(|pod| pod.name_any()).collect();
            assert_eq!(found, expected, "after {event:?}");
        }
    }

    #[test]
    fn follows_the_store() {
        check(vec![
            (Event::Init, &[]),
            // The store shows a list when it is complete.
            (Event::InitApply(pod("a", "u1")), &[]),
            (Event::InitDone, &["a"]),
            (Event::Apply(pod("b", "u1")), &["a", "b"]),
            (Event::Apply(pod("c", "u2")), &["a", "b"]),
            (Event::Delete(pod("a", "u1")), &["b"]),
            (Event::Apply(pod("a", "u1")), &["a", "b"]),
            // `a` went while the watch was down.
            (Event::Init, &["a", "b"]),
            (Event::InitApply(pod("b", "u1")), &["a", "b"]),
            (Event::InitDone, &["b"]),
            (Event::Delete(pod("b", "u1")), &[]),
        ]);
    }
}
