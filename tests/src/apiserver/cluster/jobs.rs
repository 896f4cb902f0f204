//! The Job controller: one pod at a time, as Jobs of the operator ask for; deadlines, failure policies, suspension.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::invariant::{controller, is_live, is_true, uid_of};
use super::super::life::About;
use super::super::store::Author;
use super::super::{Key, Kind};
use super::{Cluster, Living, in_seconds, key_of, shape};

/// From a Job to its pod.
const DELAY: Duration = Duration::from_millis(500);
/// Between two tries to make a pod that the API server refuses.
const RETRY_SECONDS: f64 = 10.0;

impl Cluster {
    pub(super) fn tend_job(&self, job: &Value) -> Option<Instant> {
        if is_true(job, "Complete") || is_true(job, "Failed") {
            return None;
        }
        let uid = uid_of(job);
        let pods: Vec<Value> =
            self.server.list(Kind::Pod).into_iter().filter(|pod| self.is_made_for(pod, &uid)).collect();
        if job["spec"]["suspend"] == true {
            self.suspend(job, &pods);
            return None;
        }
        if job["status"]["startTime"].is_null() {
            let now = self.now();
            self.set_status(Kind::Job, job, |status| *status = json!({"startTime": now}));
            let due = Instant::now() + DELAY;
            self.state().due.insert(uid, due);
            return Some(due);
        }
        let waited = self.seconds_since(&job["status"]["startTime"]);
        let most = job["spec"]["activeDeadlineSeconds"].as_f64();
        if most.is_some_and(|most| waited >= most) {
            self.fail(job, "DeadlineExceeded", "Job was active longer than specified deadline");
            self.ask_to_end(&pods);
            return None;
        }
        let deadline = most.map(|most| Instant::now() + in_seconds(most - waited));
        if pods.iter().any(|pod| pod["status"]["phase"] == "Succeeded") {
            self.complete(job);
            return None;
        }
        let mut failed: Vec<Value> = self.state().gone.get(&uid).cloned().unwrap_or_default();
        failed.extend(pods.iter().filter(|pod| pod["status"]["phase"] == "Failed").cloned());
        if let Some(message) = failed.iter().find_map(|pod| by_policy(job, pod)) {
            self.fail(job, "PodFailurePolicy", &message);
            return None;
        }
        if failed.len() as i64 > job["spec"]["backoffLimit"].as_i64().unwrap_or(6) {
            self.fail(job, "BackoffLimitExceeded", "Job has reached the specified backoff limit");
            return None;
        }
        if pods.iter().any(is_live) {
            return deadline;
        }
        // Times in a status have no fractions.
        let due = self.state().due.get(&uid).copied().filter(|due| *due > Instant::now());
        if due.is_some() {
            return due;
        }
        self.make_pod(job, failed.len()).or(deadline)
    }

    fn is_made_for(&self, pod: &Value, job_uid: &str) -> bool {
        controller(pod) == Some(job_uid) && self.state().pods.contains_key(&uid_of(pod))
    }

    fn make_pod(&self, job: &Value, earlier: usize) -> Option<Instant> {
        let refusal = self.state().refusal.clone();
        if let Some(why) = refusal {
            let uid = uid_of(job);
            let told =
                self.server.list(Kind::Event).into_iter().rfind(|event| event["regarding"]["uid"] == uid.as_str());
            let since = told.map_or(f64::MAX, |event| self.seconds_since(&event["deprecatedLastTimestamp"]));
            if since >= RETRY_SECONDS {
                self.warn(job, Kind::Job, "FailedCreate", &format!("Error creating: {why}"));
            }
            return Some(Instant::now() + in_seconds(RETRY_SECONDS));
        }
        let about = about(job, earlier);
        let life = (self.state().lives.clone())(&about);
        let suffix = {
            let mut state = self.state();
            state.made += 1;
            format!("{:05x}", state.made)
        };
        let pod = shape::pod(job, &suffix, &life.sidecars);
        let made = self.server.create(Kind::Pod, pod, Author::Cluster).expect("a new name");
        let mut due = Instant::now();
        let turns = life.turns.into_iter().map(|(after, turn)| {
            due += after;
            (due, turn)
        });
        let living = Living {
            about,
            turns: turns.collect(),
            leaving: life.leaving,
            sidecars: life.sidecars,
            leaves_at: None,
            resumed: None,
            ended: false,
            seen: made.clone(),
        };
        self.state().pods.insert(uid_of(&made), living);
        None
    }

    /// A closed Job has no pods; what ran is asked to end, which is no failure of the Job.
    fn suspend(&self, job: &Value, pods: &[Value]) {
        self.ask_to_end(pods);
        self.state().gone.remove(&uid_of(job));
        if !is_true(job, "Suspended") {
            let condition = json!({"type": "Suspended", "status": "True", "reason": "JobSuspended", "message": "Job suspended",
                                   "lastTransitionTime": self.now()});
            self.set_status(Kind::Job, job, |status| *status = json!({"conditions": [condition]}));
        }
    }

    fn ask_to_end(&self, pods: &[Value]) {
        for pod in pods.iter().filter(|pod| is_live(pod) && pod["metadata"]["deletionTimestamp"].is_null()) {
            let _ = self.server.delete(&key_of(Kind::Pod, pod), Author::Cluster);
        }
    }

    fn complete(&self, job: &Value) {
        let now = self.now();
        self.set_status(Kind::Job, job, |status| {
            status["succeeded"] = json!(1);
            status["completionTime"] = json!(now);
            status["conditions"] = json!([
                {"type": "SuccessCriteriaMet", "status": "True", "reason": "CompletionsReached", "lastTransitionTime": now},
                {"type": "Complete", "status": "True", "reason": "CompletionsReached", "lastTransitionTime": now,
                 "message": "Reached expected number of succeeded pods"},
            ]);
        });
    }

    fn fail(&self, job: &Value, reason: &str, message: &str) {
        let now = self.now();
        self.set_status(Kind::Job, job, |status| {
            status["failed"] = json!(1);
            let condition = |name: &str| {
                json!({"type": name, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now})
            };
            status["conditions"] = json!([condition("FailureTarget"), condition("Failed")]);
        });
    }

    pub(super) fn seconds_since(&self, time: &Value) -> f64 {
        let began: Option<Timestamp> = time.as_str().and_then(|time| time.parse().ok());
        began.map_or(0.0, |began| self.server.clock().now().duration_since(began).as_secs_f64())
    }

    /// A pod's object goes, whether or not it was heard of its end.
    pub(super) fn forget(&self, pod: &Value) {
        let (key, uid): (Key, String) = (key_of(Kind::Pod, pod), uid_of(pod));
        let mut state = self.state();
        let job = controller(pod).unwrap_or_default().to_owned();
        state.gone.entry(job).or_default().push(pod.clone());
        state.pods.remove(&uid);
        for (_, users) in state.cached.values_mut() {
            users.remove(&uid);
        }
        state.cached.retain(|_, (_, users)| !users.is_empty());
        drop(state);
        self.server.write(|store, _| store.remove(&key, Author::Cluster));
    }
}

/// Why a Job fails at once because of a pod, by its own rules.
fn by_policy(job: &Value, pod: &Value) -> Option<String> {
    let rules = job["spec"]["podFailurePolicy"]["rules"].as_array()?;
    let place = format!("{}/{}", pod["metadata"]["namespace"].as_str()?, pod["metadata"]["name"].as_str()?);
    let code = pod["status"]["containerStatuses"].as_array().into_iter().flatten().find_map(|container| {
        let is_trainer = container["name"] == shape::TRAINER;
        is_trainer.then(|| container["state"]["terminated"]["exitCode"].as_i64()).flatten()
    });
    rules.iter().enumerate().find_map(|(index, rule)| {
        let pattern = &rule["onPodConditions"][0]["type"];
        if let Some(name) = pattern.as_str().filter(|name| is_true(pod, name)) {
            return Some(format!("Pod {place} has condition {name} matching FailJob rule at index {index}"));
        }
        let code = code.filter(|code| *code != 0 && rule["onExitCodes"].is_object())?;
        let trainer = shape::TRAINER;
        Some(format!(
            "Container {trainer} for pod {place} failed with exit code {code} matching FailJob rule at index {index}"
        ))
    })
}

fn about(job: &Value, earlier: usize) -> About {
    let template = &job["spec"]["template"];
    let arguments: Vec<&str> =
        template["spec"]["containers"][0]["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let after = |name: &str| {
        let place = arguments.iter().position(|argument| *argument == name)?;
        arguments.get(place + 1).copied()
    };
    let stage = |name: &str| serde_json::from_value(json!(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let label = |name: &str| template["metadata"]["labels"][name].as_str().unwrap_or_default().to_owned();
    About {
        job: label("finetune.dev/job-name"),
        job_uid: label("finetune.dev/job-uid"),
        stage: after("--stage").map(stage).expect("a pod is told its stage"),
        of: after("--of").map(stage),
        attempt: after("--attempt").and_then(|attempt| attempt.parse().ok()).expect("a pod is told its attempt"),
        earlier,
    }
}
