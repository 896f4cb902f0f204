//! The rest of a cluster: Job controller, scheduler and kubelet, as far as an operator can tell them apart from real ones. Pods do
//! what their script says; the kubelet's habits are its own, such as that it goes on serving an immutable ConfigMap from memory
//! while any pod of its node uses one of that name.

mod jobs;
mod pods;
mod shape;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::invariant::{controller, uid_of};
use super::life::{About, Leaving, Life, Turn, Volume};
use super::store::Author;
use super::{ApiServer, Key, Kind};

pub use self::shape::NODE;

/// Gives a pod its life.
pub type Lives = Arc<dyn Fn(&About) -> Life + Send + Sync>;

/// The rest of a cluster. Clones are the same one.
#[derive(Clone)]
pub struct Cluster {
    server: ApiServer,
    state: Arc<Mutex<State>>,
}

struct State {
    lives: Lives,
    /// By `metadata.uid` of the pod.
    pods: HashMap<String, Living>,
    /// Last states of pods that are gone, by `metadata.uid` of their Job.
    gone: HashMap<String, Vec<Value>>,
    /// When the pod of a Job is made, by `metadata.uid` of the Job.
    due: HashMap<String, Instant>,
    /// By `metadata.uid` of the FineTuneJob.
    volumes: HashMap<String, Volume>,
    /// Immutable ConfigMaps that the kubelet has read, and the UIDs of the pods that use them.
    cached: HashMap<Key, (Value, HashSet<String>)>,
    /// Why the API server refuses pods.
    refusal: Option<String>,
    /// Names of pods and events end with a number.
    made: usize,
}

/// A pod that the Job controller made.
struct Living {
    about: About,
    turns: VecDeque<(Instant, Turn)>,
    leaving: Leaving,
    sidecars: Vec<String>,
    leaves_at: Option<Instant>,
    /// Checkpoint that its trainer went on from.
    resumed: Option<i64>,
    /// Its trainer has ended.
    ended: bool,
    /// The pod as it was looked at last.
    seen: Value,
}

impl Cluster {
    /// Of one node.
    pub fn new(server: ApiServer, lives: Lives) -> Self {
        let state = State {
            lives,
            pods: HashMap::new(),
            gone: HashMap::new(),
            due: HashMap::new(),
            volumes: HashMap::new(),
            cached: HashMap::new(),
            refusal: None,
            made: 0,
        };
        let conditions = json!([{"type": "Ready", "status": "True", "reason": "KubeletReady"}]);
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {}}, "spec": {},
                          "status": {"conditions": conditions, "allocatable": {"cpu": "8", "nvidia.com/gpu": "1"}}});
        server.create(Kind::Node, node, Author::Cluster).expect("an empty cluster");
        Self { server, state: Arc::new(Mutex::new(state)) }
    }

    /// Works until it is dropped.
    pub async fn run(self) {
        let mut versions = self.server.versions();
        let mut seen = 0;
        let mut wake = None;
        loop {
            let version = *versions.borrow_and_update();
            let matters = self.server.changed_since(seen, &[Kind::Job, Kind::Pod, Kind::PersistentVolumeClaim]);
            if matters || wake.is_some_and(|wake| wake <= Instant::now()) {
                wake = self.pass();
            }
            seen = version;
            let sleep = async {
                match wake {
                    Some(wake) => tokio::time::sleep_until(wake).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = versions.changed() => if changed.is_err() { return },
                () = sleep => {}
            }
        }
    }

    /// The API server takes no pods from now on, or again: quota, admission, Pod Security.
    pub fn refuse_pods(&self, why: Option<&str>) {
        self.state().refusal = why.map(str::to_owned);
    }

    /// What is on the volume of a FineTuneJob.
    pub fn volume(&self, job_uid: &str) -> Volume {
        self.state().volumes.get(job_uid).cloned().unwrap_or_default()
    }

    /// Says for certain that a pod is gone: a node that was taken out of service, or a forced deletion.
    pub fn confirm_gone(&self, pod: &str) {
        let found = self.server.list(Kind::Pod).into_iter().find(|found| found["metadata"]["name"] == pod);
        self.forget(&found.unwrap_or_else(|| panic!("no pod {pod}")));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is due, and tells when there is more to do without a change.
    fn pass(&self) -> Option<Instant> {
        let claims = self.server.list(Kind::PersistentVolumeClaim);
        for claim in claims.iter().filter(|claim| claim["status"]["phase"].is_null()) {
            self.set_status(Kind::PersistentVolumeClaim, claim, |status| *status = json!({"phase": "Bound"}));
        }
        self.note_deleted();
        let jobs = self.server.list(Kind::Job);
        let mut wakes: Vec<Option<Instant>> = jobs.iter().map(|job| self.tend_job(job)).collect();
        wakes.extend(self.server.list(Kind::Pod).iter().map(|pod| self.tend_pod(pod)));
        wakes.into_iter().flatten().min()
    }

    /// Pods that were on no node are gone at once when somebody deletes them.
    fn note_deleted(&self) {
        let known: HashSet<String> = self.server.list(Kind::Pod).iter().map(uid_of).collect();
        let mut state = self.state();
        let deleted: Vec<String> = state.pods.keys().filter(|uid| !known.contains(*uid)).cloned().collect();
        for uid in deleted {
            let living = state.pods.remove(&uid).expect("it was listed");
            let job = controller(&living.seen).unwrap_or_default().to_owned();
            state.gone.entry(job).or_default().push(living.seen);
        }
    }

    fn set_status(&self, kind: Kind, object: &Value, edit: impl FnOnce(&mut Value)) {
        let key = key_of(kind, object);
        // Somebody may have deleted it in the meantime.
        let _ = self.server.edit_status(&key, Author::Cluster, edit);
    }

    fn now(&self) -> String {
        super::store::seconds(self.server.clock().now())
    }

    /// A warning about an object, as the kubelet and the Job controller write them: one that is repeated is counted.
    fn warn(&self, about: &Value, kind: Kind, reason: &str, message: &str) {
        let metadata = &about["metadata"];
        let text = |name: &str| metadata[name].as_str().unwrap_or_default().to_owned();
        let now = self.now();
        let events = self.server.list(Kind::Event);
        let same = events.iter().find(|event| {
            event["regarding"]["uid"] == metadata["uid"] && event["reason"] == reason && event["note"] == message
        });
        if let Some(same) = same {
            let again = self.server.edit(&key_of(Kind::Event, same), Author::Cluster, |event| {
                event["deprecatedCount"] = json!(event["deprecatedCount"].as_i64().unwrap_or(1) + 1);
                event["deprecatedLastTimestamp"] = json!(now);
            });
            again.expect("it was listed");
            return;
        }
        self.state().made += 1;
        let name = format!("{}.{:08x}", text("name"), self.state().made);
        let involved =
            json!({"kind": kind.name(), "namespace": text("namespace"), "name": text("name"), "uid": text("uid")});
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": name, "namespace": text("namespace")},
            "regarding": involved, "reason": reason, "note": message, "type": "Warning", "eventTime": null,
            "deprecatedCount": 1, "deprecatedFirstTimestamp": now, "deprecatedLastTimestamp": now,
        });
        self.server.create(Kind::Event, event, Author::Cluster).expect("events are taken");
    }
}

/// Where an object is.
pub fn key_of(kind: Kind, object: &Value) -> Key {
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    Key::new(kind, text("namespace"), text("name"))
}

fn in_seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.max(0.0))
}
