//! A scenario: an API server, a cluster with lives for its pods, and the operator; and what a user sees of them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::cluster::{Cluster, key_of};
use super::invariant::{is_true, uid_of};
use super::life::{About, Life};
use super::operator::Operator;
use super::{ApiServer, Author, Clock, Key, Kind, Noted, Verb};

/// Where jobs are.
pub const NAMESPACE: &str = "team";
/// The file of profiles where a scenario does not bring one.
const PROFILES: &str =
    "default: {image: 'registry.example/trainer@sha256:1', resources: {limits: {nvidia.com/gpu: '1'}}}";

/// A running scenario. What must always hold is looked at when it ends.
pub struct Simulation {
    /// The API server.
    pub server: ApiServer,
    /// Job controller, scheduler, kubelet.
    pub cluster: Cluster,
    /// What is tested.
    pub operator: Operator,
    profiles: String,
    task: tokio::task::JoinHandle<()>,
}

impl Simulation {
    /// Starts everything; pods do what `lives` says.
    pub fn start(lives: impl Fn(&About) -> Life + Send + Sync + 'static) -> Self {
        Self::with_profiles(PROFILES, lives)
    }

    /// Starts everything with a file of profiles.
    pub fn with_profiles(profiles: &str, lives: impl Fn(&About) -> Life + Send + Sync + 'static) -> Self {
        let server = ApiServer::new(Clock::new());
        let cluster = Cluster::new(server.clone(), Arc::new(lives));
        let operator = Operator::start(&server, profiles);
        let task = tokio::spawn(cluster.clone().run());
        Self { server, cluster, operator, profiles: profiles.to_owned(), task }
    }

    /// One more, on the same API server.
    pub fn another_operator(&self) -> Operator {
        Operator::start(&self.server, &self.profiles)
    }

    /// `kubectl create` of a FineTuneJob with these fields beside the three that all have; its UID.
    pub fn submit(&self, name: &str, fields: &Value) -> String {
        let mut spec = json!({"model": {"uri": "hf://acme/model"}, "dataset": {"train": {"uri": "pvc://rows/train.jsonl"}},
                              "method": {"type": "LoRA"}});
        spec.as_object_mut().expect("a map").extend(fields.as_object().expect("fields are a map").clone());
        let job = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
                         "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec});
        let made = self.server.create(Kind::FineTuneJob, job, Author::User);
        uid_of(&made.unwrap_or_else(|refusal| panic!("{}", refusal.message)))
    }

    /// `kubectl delete` of a FineTuneJob.
    pub fn delete(&self, name: &str) {
        self.server.delete(&Key::new(Kind::FineTuneJob, NAMESPACE, name), Author::User).expect("it is there");
    }

    /// `kubectl edit` of a FineTuneJob's spec.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let key = Key::new(Kind::FineTuneJob, NAMESPACE, name);
        self.server.edit(&key, Author::User, |job| edit(&mut job["spec"])).expect("it is there");
    }

    /// A FineTuneJob as it is now; null if there is none.
    pub fn job(&self, name: &str) -> Value {
        self.server.get(Kind::FineTuneJob, NAMESPACE, name).unwrap_or_default()
    }

    /// A condition of a FineTuneJob: status, reason, message.
    pub fn condition(&self, name: &str, kind: &str) -> (String, String, String) {
        let job = self.job(name);
        let conditions = job["status"]["conditions"].as_array();
        let found = conditions.into_iter().flatten().find(|condition| condition["type"] == kind);
        let text = |field: &str| found.map_or("", |found| found[field].as_str().unwrap_or_default()).to_owned();
        (text("status"), text("reason"), text("message"))
    }

    /// `reason` of a condition.
    pub fn reason(&self, name: &str, kind: &str) -> String {
        self.condition(name, kind).1
    }

    /// Every reason and message that a condition has had, in their order.
    pub fn told(&self, name: &str, kind: &str) -> Vec<(String, String)> {
        let mut told = Vec::new();
        for job in self.server.history(&Key::new(Kind::FineTuneJob, NAMESPACE, name)) {
            let conditions = job["status"]["conditions"].as_array();
            let found = conditions.into_iter().flatten().find(|condition| condition["type"] == kind);
            let text = |field: &str| found.map_or("", |found| found[field].as_str().unwrap_or_default()).to_owned();
            told.push((text("reason"), text("message")));
        }
        told.dedup();
        told
    }

    /// Whether a FineTuneJob has ended.
    pub fn has_ended(&self, name: &str) -> bool {
        let job = self.job(name);
        is_true(&job, "Complete") || is_true(&job, "Failed")
    }

    /// Outcomes of the attempts that a status lists, by the names of their Jobs.
    pub fn outcomes(&self, name: &str) -> Vec<(String, String)> {
        let job = self.job(name);
        let listed = job["status"]["jobRefs"].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        listed.iter().map(|attempt| (text(&attempt["name"]), text(&attempt["outcome"]))).collect()
    }

    /// Pods of a FineTuneJob whose Jobs have `part` in their names, oldest first.
    pub fn pods(&self, part: &str) -> Vec<Value> {
        let of = |pod: &Value| pod["metadata"]["name"].as_str().is_some_and(|name| name.contains(part));
        let mut pods: Vec<Value> = self.server.list(Kind::Pod).into_iter().filter(of).collect();
        pods.sort_by_key(uid_of);
        pods
    }

    /// `kubectl delete job`: with its pods, which take the time that they take.
    pub fn delete_child(&self, name: &str) {
        self.server.delete(&Key::new(Kind::Job, NAMESPACE, name), Author::User).expect("it is there");
    }

    /// Waits until something is so; fails after `seconds` of this world.
    pub async fn until(&self, what: &str, seconds: u64, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let mut versions = self.server.versions();
        loop {
            versions.borrow_and_update();
            if is_so(self) {
                return;
            }
            tokio::select! {
                changed = versions.changed() => changed.expect("the server is here"),
                () = tokio::time::sleep_until(deadline) => panic!("not within {seconds} s: {what}\n{}", self.account()),
            }
        }
    }

    /// Waits until a FineTuneJob has ended, and tells how: the condition's type and reason.
    pub async fn end(&self, name: &str, seconds: u64) -> (String, String) {
        self.until(&format!("{name} ends"), seconds, |simulation| simulation.has_ended(name)).await;
        let kind = if is_true(&self.job(name), "Complete") { "Complete" } else { "Failed" };
        (kind.to_owned(), self.reason(name, kind))
    }

    /// Lets time go by.
    pub async fn pass(&self, seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    /// What the operator wrote, in its order: `create jobs bot-prepare-1`; without events.
    pub fn writes(&self) -> Vec<String> {
        let noted = self.server.noted();
        let written = noted.iter().filter(|noted| noted.changed && noted.call.place.kind != Kind::Event);
        written.map(|noted| noted.call.to_string()).collect()
    }

    /// Everything that the operator asked for since the `from`th request.
    pub fn requests(&self, from: usize) -> Vec<Noted> {
        self.server.noted().split_off(from)
    }

    /// What a person would look at when it does not go on.
    pub fn account(&self) -> String {
        let mut lines = Vec::new();
        for job in self.server.list(Kind::FineTuneJob) {
            lines.push(format!("{} {:#}", key_of(Kind::FineTuneJob, &job), job["status"]));
        }
        for kind in [Kind::Job, Kind::Pod] {
            for object in self.server.list(kind) {
                let deleted = &object["metadata"]["deletionTimestamp"];
                lines.push(format!("{} deleted: {deleted} {}", key_of(kind, &object), object["status"]));
            }
        }
        let noted = self.server.noted();
        let told = noted.iter().filter(|noted| noted.call.verb != Verb::Watch || noted.code != Some(200));
        let told: Vec<String> = told.map(ToString::to_string).collect();
        lines.extend(told.iter().rev().take(60).rev().cloned());
        lines.join("\n")
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        self.task.abort();
        let broken = self.server.broken();
        if !std::thread::panicking() {
            assert!(broken.is_empty(), "{}\n{}", broken.join("\n"), self.account());
        }
    }
}
