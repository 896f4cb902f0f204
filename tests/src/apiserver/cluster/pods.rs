//! Scheduler and kubelet: what happens to a pod, by its script, and how it leaves when it is asked to.

use crds::run::RunConfig;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::invariant::{is_live, uid_of};
use super::super::life::{Leaving, Turn, Word};
use super::super::store::Author;
use super::super::{Key, Kind};
use super::shape::{NODE, TRAINER, running, set_condition, set_container, started_at, terminated};
use super::{Cluster, key_of};

/// Exit code of a trainer whose configuration is of another job.
const BAD_CONFIGURATION: i32 = 64;
/// Between two events of one trouble.
const WARN_AGAIN_SECONDS: u64 = 60;

impl Cluster {
    pub(super) fn tend_pod(&self, pod: &Value) -> Option<Instant> {
        let uid = uid_of(pod);
        let asked = pod["metadata"]["deletionTimestamp"].is_string();
        let now = Instant::now();
        let due = {
            let mut state = self.state();
            let living = state.pods.get_mut(&uid)?;
            living.seen = pod.clone();
            if asked && !is_live(pod) {
                drop(state);
                self.forget(pod);
                return None;
            }
            if asked && living.leaves_at.is_none() {
                let Leaving::After(after, _) = &living.leaving else { return None };
                living.leaves_at = Some(now + *after);
            }
            match living.leaves_at {
                Some(leaves_at) if leaves_at <= now => None,
                Some(leaves_at) => return Some(leaves_at),
                None => match living.turns.front() {
                    Some((due, _)) if *due <= now => living.turns.pop_front().map(|(_, turn)| turn),
                    Some((due, _)) => return Some(*due),
                    None => return None,
                },
            }
        };
        match due {
            Some(turn) => self.turn(pod, &uid, turn),
            None => self.leave(pod, &uid),
        }
        // More may be due by now.
        Some(now)
    }

    fn turn(&self, pod: &Value, uid: &str, turn: Turn) {
        let now = self.now();
        match turn {
            Turn::Unschedulable(message) => self.set_status(Kind::Pod, pod, |status| {
                set_condition(status, "PodScheduled", "False", "Unschedulable", &message, &now);
            }),
            Turn::Schedule => {
                let edited = self
                    .server
                    .edit(&key_of(Kind::Pod, pod), Author::Cluster, |pod| pod["spec"]["nodeName"] = json!(NODE));
                edited.expect("it was listed");
                self.set_status(Kind::Pod, pod, |status| set_condition(status, "PodScheduled", "True", "", "", &now));
            }
            Turn::Wait(container, reason, message) => {
                self.keep_waiting(pod, "containerStatuses", &container, &reason, &message);
            }
            Turn::WaitInit(container, reason, message) => {
                self.keep_waiting(pod, "initContainerStatuses", &container, &reason, &message);
            }
            Turn::Warn(reason, message) => {
                self.warn(pod, Kind::Pod, &reason, &message);
                let again =
                    (Instant::now() + std::time::Duration::from_secs(WARN_AGAIN_SECONDS), Turn::Warn(reason, message));
                let mut state = self.state();
                let turns = &mut state.pods.get_mut(uid).expect("it lives").turns;
                if turns.is_empty() {
                    turns.push_back(again);
                }
            }
            Turn::RunInit(name) => {
                self.set_status(Kind::Pod, pod, |status| {
                    set_container(status, "initContainerStatuses", &name, &running(&now));
                });
            }
            Turn::EndInit(name, code, message) => self.set_status(Kind::Pod, pod, |status| {
                let state = terminated(code, None, &message, &json!(now), &now);
                set_container(status, "initContainerStatuses", &name, &state);
                if code != 0 {
                    let waiting = json!({"waiting": {"reason": "PodInitializing"}});
                    set_container(status, "containerStatuses", TRAINER, &waiting);
                    status["phase"] = json!("Failed");
                }
            }),
            Turn::Run => self.run_pod(pod, uid),
            Turn::Checkpoint(step) => {
                let mut state = self.state();
                let job = state.pods[uid].about.job_uid.clone();
                state.volumes.entry(job).or_default().checkpoint = Some(step);
            }
            Turn::End(word) => self.end_trainer(pod, uid, &word),
            Turn::Disrupt(reason) => {
                self.set_status(Kind::Pod, pod, |status| {
                    set_condition(status, "DisruptionTarget", "True", &reason, "the pod is taken away", &now);
                });
                let _ = self.server.delete(&key_of(Kind::Pod, pod), Author::Cluster);
            }
            Turn::Evict(message) => self.set_status(Kind::Pod, pod, |status| {
                set_condition(status, "DisruptionTarget", "True", "TerminationByKubelet", &message, &now);
                let started = started_at(status, TRAINER);
                set_container(status, "containerStatuses", TRAINER, &terminated(137, None, "", &started, &now));
                status["phase"] = json!("Failed");
                status["reason"] = json!("Evicted");
                status["message"] = json!(message);
            }),
            Turn::LoseNode => {
                self.set_node_ready("Unknown");
                self.state().pods.get_mut(uid).expect("it lives").leaving = Leaving::Never;
                self.set_status(Kind::Pod, pod, |status| {
                    set_condition(
                        status,
                        "DisruptionTarget",
                        "True",
                        "DeletionByTaintManager",
                        "Taint manager: deleting",
                        &now,
                    );
                });
                let _ = self.server.delete(&key_of(Kind::Pod, pod), Author::Cluster);
            }
            Turn::ForgetContainer => self.set_status(Kind::Pod, pod, |status| {
                let state = terminated(
                    137,
                    Some("ContainerStatusUnknown"),
                    "The container could not be located when the pod was terminated",
                    &Value::Null,
                    &now,
                );
                set_container(status, "containerStatuses", TRAINER, &state);
                status["phase"] = json!("Failed");
            }),
            Turn::Vanish => self.forget(pod),
        }
    }

    fn keep_waiting(&self, pod: &Value, list: &str, container: &str, reason: &str, message: &str) {
        let waiting = json!({"waiting": {"reason": reason, "message": message}});
        self.set_status(Kind::Pod, pod, |status| set_container(status, list, container, &waiting));
    }

    fn set_node_ready(&self, ready: &str) {
        let now = self.now();
        let key = Key::new(Kind::Node, "", NODE);
        let edited = self.server.edit_status(&key, Author::Cluster, |status| {
            set_condition(status, "Ready", ready, "NodeStatusUnknown", "Kubelet stopped posting node status.", &now);
        });
        edited.expect("there is a node");
    }

    /// The trainer begins, unless what it reads is of another job: then it says so, and ends.
    fn run_pod(&self, pod: &Value, uid: &str) {
        let now = self.now();
        let found = match self.configuration(pod, uid) {
            Ok(found) => found,
            // The kubelet tries again by itself.
            Err(missing) => {
                self.warn(
                    pod,
                    Kind::Pod,
                    "FailedMount",
                    &format!("MountVolume.SetUp failed for volume \"config\" : {missing}"),
                );
                let again = Instant::now() + std::time::Duration::from_secs(2);
                self.state().pods.get_mut(uid).expect("it lives").turns.push_front((again, Turn::Run));
                return;
            }
        };
        let (sidecars, job) = {
            let mut state = self.state();
            let job = state.pods[uid].about.job_uid.clone();
            let checkpoint = state.volumes.get(&job).and_then(|volume| volume.checkpoint);
            let living = state.pods.get_mut(uid).expect("it lives");
            living.resumed = checkpoint;
            (living.sidecars.clone(), job)
        };
        self.set_status(Kind::Pod, pod, |status| {
            status["phase"] = json!("Running");
            status["startTime"] = json!(now);
            for name in sidecars.iter().map(String::as_str).chain([TRAINER]) {
                set_container(status, "containerStatuses", name, &running(&now));
            }
        });
        if found != job {
            let message = format!("run.yaml is of the job {found}, and this pod is of {job}");
            self.state().pods.get_mut(uid).expect("it lives").turns.clear();
            self.end_trainer(pod, uid, &Word::Message(BAD_CONFIGURATION, message));
        }
    }

    /// UID of the job in the `run.yaml` that the kubelet gives a pod: that which it has in memory, if it has one of that name.
    fn configuration(&self, pod: &Value, uid: &str) -> Result<String, String> {
        let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
        let sources = volumes.flat_map(|volume| volume["projected"]["sources"].as_array().into_iter().flatten());
        let mut maps = sources.filter(|source| source["configMap"]["items"][0]["key"] == "run.yaml");
        let name = maps.find_map(|source| source["configMap"]["name"].as_str()).ok_or("no run.yaml is mounted")?;
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
        let key = Key::new(Kind::ConfigMap, namespace, name);
        let mut state = self.state();
        let map = if let Some((cached, _)) = state.cached.get(&key) {
            cached.clone()
        } else {
            let found = self.server.get(Kind::ConfigMap, namespace, name);
            found.ok_or_else(|| format!("configmap \"{name}\" not found"))?
        };
        if map["immutable"] == true {
            state
                .cached
                .entry(key)
                .or_insert_with(|| (map.clone(), std::collections::HashSet::new()))
                .1
                .insert(uid.to_owned());
        }
        let text = map["data"]["run.yaml"].as_str().unwrap_or_default();
        RunConfig::job_uid_of(text).ok_or_else(|| "run.yaml names no job".to_owned())
    }

    /// The trainer ends; the pod does when nothing beside it runs.
    fn end_trainer(&self, pod: &Value, uid: &str, word: &Word) {
        let now = self.now();
        let (code, message, alone) = {
            let mut state = self.state();
            let living = state.pods.get_mut(uid).expect("it lives");
            living.ended = true;
            let (about, resumed, alone) = (living.about.clone(), living.resumed, living.sidecars.is_empty());
            let (code, message) =
                state.volumes.entry(about.job_uid.clone()).or_default().end(&about, uid, resumed, word);
            (code, message, alone)
        };
        self.set_status(Kind::Pod, pod, |status| {
            let started = started_at(status, TRAINER);
            set_container(status, "containerStatuses", TRAINER, &terminated(code, None, &message, &started, &now));
            if alone {
                status["phase"] = json!(if code == 0 { "Succeeded" } else { "Failed" });
            }
        });
    }

    /// Everything in the pod ends because it was asked to. What does not end by itself is killed, and its pod has failed.
    fn leave(&self, pod: &Value, uid: &str) {
        let now = self.now();
        let (word, sidecars, ended) = {
            let mut state = self.state();
            let living = state.pods.get_mut(uid).expect("it lives");
            let Leaving::After(_, word) = living.leaving.clone() else { unreachable!("it has a time to leave") };
            (word, std::mem::take(&mut living.sidecars), living.ended)
        };
        let runs = started_at(&pod["status"], TRAINER).is_string();
        if runs && !ended {
            self.end_trainer(pod, uid, &word);
        }
        self.set_status(Kind::Pod, pod, |status| {
            for sidecar in &sidecars {
                let started = started_at(status, sidecar);
                set_container(status, "containerStatuses", sidecar, &terminated(143, None, "", &started, &now));
            }
            if is_live(&json!({"status": status})) || !sidecars.is_empty() {
                status["phase"] = json!("Failed");
            }
        });
    }
}
