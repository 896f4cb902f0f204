//! Asks running trainers how far they are. A task of its own: reconciling never waits for a pod. What it hears decides nothing;
//! a trainer that does not answer has not failed, its `lastReportTime` ages.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crds::FineTuneJob;
use crds::report::Progress;
use futures::StreamExt;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{sleep, timeout};

use super::{controller_uid, pod_seen};
use crate::build::{JOB_NAME_LABEL, JOB_UID_LABEL, TRAINER_PORT};
use crate::caches::Caches;
use crate::facts::Silence;

/// The Job controller's own label.
const CHILD_NAME_LABEL: &str = "batch.kubernetes.io/job-name";
/// Questions under way at once.
const CONCURRENCY: usize = 64;
/// A trainer answers from memory.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The longest answer that is read.
const MAX_BYTES: usize = 64 * 1024;
/// Status writes for the sake of progress, over all jobs.
const WRITES_PER_SECOND: f64 = 20.0;

/// How often is asked, and how often is written.
#[derive(Clone, Copy, Debug)]
pub struct Intervals {
    /// Between two questions to one trainer.
    pub poll: Duration,
    /// Between two status writes for one job.
    pub write: Duration,
}

/// The newest progress by `metadata.uid` of the pod: what a pod tells is looked up by those who know whose pod it is.
#[derive(Debug, Default)]
pub struct ProgressBoard(Mutex<HashMap<String, Noted>>);

#[derive(Debug)]
struct Noted {
    progress: Progress,
    told: Option<Instant>,
}

impl ProgressBoard {
    /// What a pod told last of the job that it works for.
    pub fn get(&self, pod_uid: &str, job_uid: &str) -> Option<Progress> {
        let notes = self.notes();
        notes.get(pod_uid).map(|noted| &noted.progress).filter(|progress| progress.job_uid == job_uid).cloned()
    }

    /// Since when a pod does not answer, and why.
    pub fn silence(&self, _pod_uid: &str) -> Option<Silence> {
        None
    }

    fn notes(&self) -> std::sync::MutexGuard<'_, HashMap<String, Noted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an answer that does not go back, and tells whether a status write is due.
    fn note(&self, progress: Progress, interval: Duration) -> bool {
        let mut notes = self.notes();
        let now = Instant::now();
        let noted =
            notes.entry(progress.pod_uid.clone()).or_insert_with(|| Noted { progress: progress.clone(), told: None });
        if progress.step < noted.progress.step {
            return false;
        }
        let stage_moved = noted.progress.stage != progress.stage;
        noted.progress = progress;
        let due = stage_moved || noted.told.is_none_or(|told| now.duration_since(told) >= interval);
        if due {
            noted.told = Some(now);
        }
        due
    }

    fn retain(&self, is_known: impl Fn(&str) -> bool) {
        self.notes().retain(|uid, _| is_known(uid));
    }
}

/// A pod to ask.
#[derive(Clone, Debug)]
struct Asked {
    job: ObjectRef<DeserializeGuard<FineTuneJob>>,
    job_uid: String,
    pod_uid: String,
    address: String,
}

/// Asks until the task is dropped.
pub async fn poll(
    caches: Caches,
    board: std::sync::Arc<ProgressBoard>,
    intervals: Intervals,
    tell: UnboundedSender<ObjectRef<DeserializeGuard<FineTuneJob>>>,
) {
    let client: Client<HttpConnector, Empty<axum::body::Bytes>> = {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(TIMEOUT));
        Client::builder(TokioExecutor::new()).build(connector)
    };
    loop {
        let asked: Vec<Asked> = caches.pods.store.state().iter().filter_map(|pod| asked(pod, &caches)).collect();
        let known: HashSet<&str> = asked.iter().map(|asked| asked.pod_uid.as_str()).collect();
        board.retain(|pod_uid| known.contains(pod_uid));
        let write = intervals.write.max(Duration::from_secs_f64(asked.len() as f64 / WRITES_PER_SECOND));
        let answers = futures::stream::iter(asked).map(|asked| {
            let client = client.clone();
            async move { ask(&client, &asked).await.map(|progress| (asked, progress)) }
        });
        let mut answers = answers.buffer_unordered(CONCURRENCY);
        while let Some(answer) = answers.next().await {
            match answer {
                Ok((asked, progress)) => {
                    if board.note(progress, write) && tell.send(asked.job).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::debug!("a trainer did not tell its progress: {error:#}"),
            }
        }
        drop(answers);
        // With jitter: questions and other periodic work do not fall into step.
        let spread = RandomState::new().hash_one(()) % 100;
        sleep(intervals.poll.mul_f64(0.9 + spread as f64 / 500.0)).await;
    }
}

fn asked(pod: &Pod, caches: &Caches) -> Option<Asked> {
    let seen = pod_seen(pod);
    let address = pod.status.as_ref()?.pod_ip.clone().filter(|_| seen.running)?;
    let labels = pod.labels();
    let namespace = pod.metadata.namespace.as_deref()?;
    // Labels prove nothing, and a Job has some too: whose pod it is, observing knows.
    let child = caches.jobs.get(&ObjectRef::new(labels.get(CHILD_NAME_LABEL)?).within(namespace))?;
    if child.uid().as_deref() != controller_uid(pod) || child.labels().get(JOB_UID_LABEL) != labels.get(JOB_UID_LABEL) {
        return None;
    }
    Some(Asked {
        job: ObjectRef::new(labels.get(JOB_NAME_LABEL)?).within(namespace),
        job_uid: labels.get(JOB_UID_LABEL)?.clone(),
        pod_uid: seen.uid,
        address,
    })
}

async fn ask(
    client: &Client<HttpConnector, Empty<axum::body::Bytes>>,
    asked: &Asked,
) -> Result<Progress, anyhow::Error> {
    // An IPv6 address stands in brackets.
    let host = if asked.address.contains(':') { format!("[{}]", asked.address) } else { asked.address.clone() };
    let uri: http::Uri = format!("http://{host}:{TRAINER_PORT}/status").parse()?;
    let answer = async {
        let response = client.get(uri).await?;
        anyhow::ensure!(response.status().is_success(), "{} answers {}", asked.address, response.status());
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("{}: {error}", asked.address))?;
        Ok(serde_json::from_slice::<Progress>(&body.to_bytes())?)
    };
    let progress = timeout(TIMEOUT, answer).await??;
    let known = progress.job_uid == asked.job_uid && progress.pod_uid == asked.pod_uid;
    anyhow::ensure!(known, "{} is the trainer of another pod", asked.address);
    Ok(progress)
}

#[cfg(test)]
mod tests {
    use crds::report::Stage;
    use crds::run::PodStage;

    use super::*;

    fn progress(attempt: i32, step: i64) -> Progress {
        Progress {
            job_uid: "u".into(),
            pod_uid: format!("pod-{attempt}"),
            pod_stage: Some(PodStage::Train),
            attempt,
            step,
            stage: Stage::Training,
            ..Progress::default()
        }
    }

    #[test]
    fn progress_does_not_go_back_and_is_written_seldom() {
        let board = ProgressBoard::default();
        let hour = Duration::from_hours(1);
        assert!(board.note(progress(1, 5), hour), "the first one is news");
        assert!(!board.note(progress(1, 6), hour), "the next one can wait");
        assert_eq!(board.get("pod-1", "u").map(|progress| progress.step), Some(6));
        assert_eq!(board.get("pod-1", "v"), None, "the pod of one job tells nothing of another");
        assert!(!board.note(progress(1, 4), Duration::ZERO), "an answer that was under way for long");
        assert_eq!(board.get("pod-1", "u").map(|progress| progress.step), Some(6));
        assert!(board.note(progress(2, 4), Duration::ZERO), "the next attempt begins before where this one ended");
        let evaluating = Progress { stage: Stage::Evaluating, ..progress(2, 4) };
        assert!(board.note(evaluating, hour), "another stage is news");
        board.retain(|_| false);
        assert_eq!(board.get("pod-2", "u"), None);
    }
}
