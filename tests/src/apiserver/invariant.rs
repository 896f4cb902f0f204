//! What must hold at every version, whatever the scenario is.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::kind::Kind;
use super::store::{Author, Change, Key, Store};

/// Looks at every change.
#[derive(Debug, Default)]
pub struct Invariants {
    /// UID of the FineTuneJob by UID of a Job that the operator made for it.
    jobs: HashMap<String, String>,
    /// UIDs of pods that the Job controller made: what somebody else writes into a pod is no proof that it is of a job.
    pods: HashSet<String>,
    /// UIDs of FineTuneJobs that have ended, and how.
    ended: HashMap<String, &'static str>,
    broken: Vec<String>,
}

impl Invariants {
    /// To be called after every change.
    pub fn look_at(&mut self, change: &Change, store: &Store) {
        match (change.key.kind, &change.after) {
            (Kind::FineTuneJob, Some(job)) => self.look_at_finetunejob(change, job),
            (kind, Some(object)) if change.before.is_none() && change.author == Author::Operator => {
                self.look_at_child(kind, &change.key, object);
            }
            (Kind::Pod, Some(pod)) => {
                if change.before.is_none() && change.author == Author::Cluster {
                    self.pods.insert(uid_of(pod));
                }
                self.look_at_pods(store);
            }
            _ => {}
        }
    }

    /// The operator did what it never may.
    pub fn breach(&mut self, what: String) {
        if !self.broken.contains(&what) {
            self.broken.push(what);
        }
    }

    /// What did not hold.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    fn look_at_finetunejob(&mut self, change: &Change, job: &Value) {
        let uid = uid_of(job);
        let ends: Vec<&'static str> = ["Complete", "Failed"].into_iter().filter(|name| is_true(job, name)).collect();
        if ends.len() > 1 {
            self.breach(format!("{} is Complete and Failed", change.key));
        }
        let end = ends.first().copied();
        match (self.ended.get(&uid), end) {
            (Some(before), now) if now != Some(before) => {
                self.breach(format!("{} was {before} and is {}", change.key, now.unwrap_or("neither")));
            }
            (None, Some(end)) => {
                self.ended.insert(uid, end);
            }
            _ => {}
        }
        let spec = |object: &Value| object["spec"].clone();
        if change.author == Author::Operator && change.before.as_ref().map(spec) != Some(spec(job)) {
            self.breach(format!("the operator wrote the spec of {}", change.key));
        }
    }

    fn look_at_child(&mut self, kind: Kind, key: &Key, object: &Value) {
        let label = object["metadata"]["labels"]["finetune.dev/job-uid"].as_str().map(str::to_owned);
        let Some(job) = controller(object).map(str::to_owned).or(label) else { return };
        if matches!(kind, Kind::Job | Kind::Pod | Kind::ConfigMap | Kind::PersistentVolumeClaim)
            && let Some(end) = self.ended.get(&job)
        {
            let message = format!("the operator made {key} for a FineTuneJob that is {end}");
            self.breach(message);
        }
        if kind == Kind::Job {
            self.jobs.insert(uid_of(object), job);
        }
    }

    fn look_at_pods(&mut self, store: &Store) {
        let mut live: HashMap<&str, Vec<&str>> = HashMap::new();
        let counts = |pod: &Value| is_live(pod) && self.pods.contains(&uid_of(pod));
        for (key, pod) in store.list(Kind::Pod, None).filter(|(_, pod)| counts(pod)) {
            if let Some(job) = controller(pod).and_then(|uid| self.jobs.get(uid)) {
                live.entry(job.as_str()).or_default().push(&key.name);
            }
        }
        let several: Vec<String> = live.values().filter(|pods| pods.len() > 1).map(|pods| pods.join(", ")).collect();
        for pods in several {
            self.breach(format!("several pods of one FineTuneJob live at once: {pods}"));
        }
    }
}

/// Whether a pod's containers may still write.
pub fn is_live(pod: &Value) -> bool {
    !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

/// `metadata.uid` of an object.
pub fn uid_of(object: &Value) -> String {
    object["metadata"]["uid"].as_str().unwrap_or_default().to_owned()
}

/// UID of the owner that controls an object.
pub fn controller(object: &Value) -> Option<&str> {
    let owners = object["metadata"]["ownerReferences"].as_array()?;
    owners.iter().find(|owner| owner["controller"] == true)?["uid"].as_str()
}

/// Whether a condition of an object holds.
pub fn is_true(object: &Value, name: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|condition| condition["type"] == name && condition["status"] == "True")
}
