//! Asks running trainers how far they are. A task of its own: reconciling never waits for a pod. A trainer that does not answer
//! has not failed: its `lastReportTime` ages, and since when and why it is silent is told.

mod question;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crds::FineTuneJob;
use crds::report::Progress;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use self::turns::Turns;
use super::controller_uid;
use crate::build::{CONTAINER, JOB_NAME_LABEL, JOB_UID_LABEL, TRAINER_PORT};
use crate::caches::Caches;
use crate::facts::Silence;

/// The Job controller's own label.
const CHILD_NAME_LABEL: &str = "batch.kubernetes.io/job-name";
/// Status writes for the sake of progress, over all jobs.
const WRITES_PER_SECOND: f64 = 20.0;
/// Between two looks at which pods run, at most.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// A silence that lasts for so long is news of the job: what starts, or is busy for a moment, is not.
const SILENCE_IS_NEWS: Duration = Duration::from_mins(1);

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

#[derive(Debug, Default)]
struct Noted {
    progress: Option<Progress>,
    told: Option<Instant>,
    quiet: Option<Quiet>,
}

/// A silence that lasts.
#[derive(Debug)]
struct Quiet {
    silence: Silence,
    since: Instant,
    /// Another cause that was met once: two that take turns are not told in turns.
    other: Option<String>,
    /// The cause that was told.
    told: Option<String>,
}

impl ProgressBoard {
    /// What a pod told last of the job that it works for.
    pub fn get(&self, pod_uid: &str, job_uid: &str) -> Option<Progress> {
        let notes = self.notes();
        let progress = notes.get(pod_uid)?.progress.as_ref();
        progress.filter(|progress| progress.job_uid == job_uid).cloned()
    }

    /// Since when a pod that runs does not answer, and why; nothing of one that answered the last question.
    pub fn silence(&self, pod_uid: &str) -> Option<Silence> {
        self.notes().get(pod_uid)?.quiet.as_ref().map(|quiet| quiet.silence.clone())
    }

    fn notes(&self) -> MutexGuard<'_, HashMap<String, Noted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an answer that does not go back, and tells whether a status write is due.
    fn note(&self, progress: Progress, interval: Duration, now: Instant) -> bool {
        let mut notes = self.notes();
        let noted = notes.entry(progress.pod_uid.clone()).or_default();
        let ends_a_silence = noted.quiet.take().is_some_and(|quiet| quiet.told.is_some());
        let before = noted.progress.as_ref();
        if before.is_some_and(|before| progress.step < before.step) {
            return ends_a_silence;
        }
        let stage_moved = before.is_some_and(|before| before.stage != progress.stage);
        let due = ends_a_silence || stage_moved || noted.told.is_none_or(|told| now.duration_since(told) >= interval);
        noted.progress = Some(progress);
        if due {
            noted.told = Some(now);
        }
        due
    }

    /// Takes a question that was not answered, and why.
    fn note_silence(&self, pod_uid: &str, why: String, now: Instant) {
        let mut notes = self.notes();
        let noted = notes.entry(pod_uid.to_owned()).or_default();
        let Some(quiet) = &mut noted.quiet else {
            let silence = Silence { since: Timestamp::now(), why };
            noted.quiet = Some(Quiet { silence, since: now, other: None, told: None });
            return;
        };
        if quiet.silence.why == why {
            quiet.other = None;
        } else if quiet.other.as_ref() == Some(&why) {
            quiet.silence.why = why;
            quiet.other = None;
        } else {
            quiet.other = Some(why);
        }
    }

    /// Pods whose silence, or its cause, has become news, each once.
    fn newly_silent(&self, now: Instant) -> Vec<String> {
        let mut silent = Vec::new();
        for (uid, noted) in self.notes().iter_mut() {
            let Some(quiet) = &mut noted.quiet else { continue };
            let lasts = now.duration_since(quiet.since) >= SILENCE_IS_NEWS;
            if lasts && quiet.told.as_ref() != Some(&quiet.silence.why) {
                quiet.told = Some(quiet.silence.why.clone());
                silent.push(uid.clone());
            }
        }
        silent
    }

    fn retain(&self, is_known: impl Fn(&str) -> bool) {
        self.notes().retain(|uid, _| is_known(uid));
    }
}

type JobRef = ObjectRef<DeserializeGuard<FineTuneJob>>;

/// A pod to ask.
#[derive(Clone, Debug)]
struct Asked {
    job: JobRef,
    job_uid: String,
    pod_uid: String,
    address: SocketAddr,
}

/// Asks until the task is dropped. `count` hears of each question whether it was answered.
pub async fn poll(
    caches: Caches,
    board: Arc<ProgressBoard>,
    intervals: Intervals,
    tell: UnboundedSender<JobRef>,
    count: impl Fn(bool),
) {
    let running = || caches.pods.store.state().iter().filter_map(|pod| asked(pod, &caches)).collect();
    ask_in_turn(running, &board, intervals, &tell, count).await;
}

async fn ask_in_turn(
    running: impl Fn() -> Vec<Asked>,
    board: &ProgressBoard,
    intervals: Intervals,
    tell: &UnboundedSender<JobRef>,
    count: impl Fn(bool),
) {
    let mut turns = Turns::new(intervals.poll);
    let mut answers = FuturesUnordered::new();
    let mut look = interval(LOOK_INTERVAL.min(intervals.poll / 3).max(Duration::from_millis(10)));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while let Some(turn) = turns.next(Instant::now()) {
            answers.push(async move { (question::ask(&turn.asked).await, turn) });
        }
        let wake = turns.wake();
        let next_turn = async {
            match wake {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let mut news = Vec::new();
        tokio::select! {
            _ = look.tick() => {
                let running = running();
                let jobs: HashMap<&str, &JobRef> =
                    running.iter().map(|asked| (asked.pod_uid.as_str(), &asked.job)).collect();
                board.retain(|pod_uid| jobs.contains_key(pod_uid));
                let silent = board.newly_silent(Instant::now());
                news.extend(silent.iter().filter_map(|uid| jobs.get(uid.as_str()).copied().cloned()));
                turns.follow(running, Instant::now());
            }
            Some((answer, turn)) = answers.next() => {
                let now = Instant::now();
                count(answer.is_ok());
                turns.ended(&turn, answer.is_ok(), now);
                match answer {
                    Ok(progress) => {
                        let write = Duration::from_secs_f64(turns.len() as f64 / WRITES_PER_SECOND);
                        if board.note(progress, intervals.write.max(write), now) {
                            news.push(turn.asked.job);
                        }
                    }
                    Err(why) => {
                        tracing::debug!("{}: the trainer at {}: {why}", turn.asked.job, turn.asked.address);
                        board.note_silence(&turn.asked.pod_uid, why, now);
                    }
                }
            }
            () = next_turn => {}
        }
        // Once each, though several pods of it may have become silent.
        let mut told = HashSet::new();
        for job in news {
            if told.insert(job.clone()) && tell.send(job).is_err() {
                return;
            }
        }
    }
}

fn asked(pod: &Pod, caches: &Caches) -> Option<Asked> {
    let status = pod.status.as_ref()?;
    let mut containers = status.container_statuses.iter().flatten();
    let trainer = containers.find(|container| container.name == CONTAINER)?;
    trainer.state.as_ref()?.running.as_ref()?;
    let address: IpAddr = status.pod_ip.as_ref()?.parse().ok()?;
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
        pod_uid: pod.uid()?,
        address: SocketAddr::new(address, u16::try_from(TRAINER_PORT).expect("a port")),
    })
}
