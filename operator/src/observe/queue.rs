//! What Kueue says of Jobs: a watch on its Workloads where their kind is served. What is kept of a Workload is what a status
//! tells of it, and a job is looked at again only when that means something else: Kueue's messages count down.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crds::FineTuneJob;
use futures::StreamExt;
use k8s_openapi::api::batch::v1::Job;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, DeserializeGuard, GroupVersionKind};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{sleep, timeout};

use crate::build::JOB_NAME_LABEL;
use crate::facts::QueueSeen;
use crate::status::convert::{have_same_meaning, message};

/// Versions of Kueue's API, the newest first: what is read is the same in both.
const VERSIONS: [&str; 2] = ["v1beta2", "v1beta1"];
/// Kueue's own label of a Workload: `metadata.uid` of its Job.
const JOB_UID_LABEL: &str = "kueue.x-k8s.io/job-uid";
/// Between two looks for a kind that is not there, while nobody waits for it.
const LOOK_INTERVAL: Duration = Duration::from_mins(3);
/// The same while a job waits in a queue.
const ASKED_LOOK_INTERVAL: Duration = Duration::from_secs(15);
/// As of the other watches.
const WATCH_TIMEOUT_SECONDS: u32 = 200;
/// Workloads carry whole pod templates.
const PAGE: u32 = 100;

type JobRef = ObjectRef<DeserializeGuard<FineTuneJob>>;

/// What Kueue says, by `metadata.uid` of the Job.
#[derive(Debug, Default)]
pub struct Queues {
    known: Mutex<Known>,
    /// Somebody waits for a kind that is not there.
    asked: Notify,
}

#[derive(Debug, Default)]
struct Known {
    kueue: Kueue,
    by_job: HashMap<String, Entry>,
    /// What a list has named that is not complete yet.
    listed: HashSet<String>,
}

/// Whether there is somebody to listen to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kueue {
    /// Not asked yet, or its first list is not complete.
    #[default]
    Unknown,
    /// Its kinds are not served.
    Absent,
    /// We have no right to hear it.
    Forbidden,
    /// Its Workloads are watched.
    Heard,
}

/// What is kept of a Workload.
#[derive(Debug)]
struct Entry {
    workload: String,
    seen: QueueSeen,
}

impl Queues {
    /// What the queue says of a Job that is held; `None` while that is not known.
    pub fn seen(&self, child_uid: &str) -> Option<QueueSeen> {
        let known = self.known();
        match known.kueue {
            Kueue::Unknown => None,
            Kueue::Absent => {
                self.asked.notify_one();
                Some(QueueSeen::ControllerMissing)
            }
            Kueue::Forbidden => Some(QueueSeen::Waiting(
                "the operator may not watch workloads of kueue.x-k8s.io: what the queue says is not known".into(),
            )),
            Kueue::Heard => Some(known.by_job.get(child_uid).map_or_else(
                || QueueSeen::Waiting("the queue's controller has not looked at the Job yet".into()),
                |entry| entry.seen.clone(),
            )),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes who is there. Tells whether that is news.
    fn find(&self, kueue: Kueue) -> bool {
        let mut known = self.known();
        let is_news = known.kueue != kueue;
        *known = Known { kueue, ..Known::default() };
        is_news
    }

    /// Notes a Workload. Tells whether it means something else than before.
    fn note(&self, workload: &DynamicObject) -> bool {
        let Some(uid) = workload.labels().get(JOB_UID_LABEL) else { return false };
        let (name, now) = (workload.name_any(), seen(workload));
        let mut known = self.known();
        known.listed.insert(uid.clone());
        if let Some(entry) = known.by_job.get_mut(uid) {
            entry.workload = name;
            if mean_the_same(&entry.seen, &now) {
                return false;
            }
            entry.seen = now;
        } else {
            known.by_job.insert(uid.clone(), Entry { workload: name, seen: now });
        }
        true
    }

    /// A Workload is gone. One that was made anew under another name is not.
    fn forget(&self, workload: &DynamicObject) -> bool {
        let Some(uid) = workload.labels().get(JOB_UID_LABEL) else { return false };
        let mut known = self.known();
        let is_known = known.by_job.get(uid).is_some_and(|entry| entry.workload == workload.name_any());
        is_known && known.by_job.remove(uid).is_some()
    }

    /// A list begins.
    fn begin_list(&self) {
        self.known().listed.clear();
    }

    /// A list is complete: whatever it did not name went while nobody watched. Tells whether it was the first one.
    fn end_list(&self) -> bool {
        let mut known = self.known();
        let listed = std::mem::take(&mut known.listed);
        known.by_job.retain(|uid, _| listed.contains(uid));
        std::mem::replace(&mut known.kueue, Kueue::Heard) != Kueue::Heard
    }
}

/// Watches Kueue's Workloads of a namespace, or of all, until the task is dropped; `tell` hears of jobs to be looked at.
pub async fn watch(
    client: Client,
    namespace: Option<String>,
    jobs: Store<Job>,
    queues: Arc<Queues>,
    tell: UnboundedSender<JobRef>,
) {
    let held = || jobs.state().into_iter().filter(|job| is_held(job)).filter_map(|job| job_of(&job)).collect();
    loop {
        let found = match served(&client, namespace.as_deref()).await {
            Ok(Some(workloads)) => follow(workloads, &jobs, &queues, &tell, held).await,
            Ok(None) => Some(Kueue::Absent),
            Err(error) if code(&error) == Some(403) => Some(Kueue::Forbidden),
            Err(error) => {
                tracing::warn!("cannot list workloads of kueue.x-k8s.io: {error}");
                None
            }
        };
        if let Some(found) = found
            && queues.find(found)
        {
            if found == Kueue::Forbidden {
                tracing::warn!(
                    "this operator may not list and watch workloads of kueue.x-k8s.io: its role lacks that right"
                );
            }
            send(&tell, held());
        }
        sleep(ASKED_LOOK_INTERVAL).await;
        if found == Some(Kueue::Absent) {
            // A right, or a server, comes back without anybody asking.
            let _ = timeout(LOOK_INTERVAL.saturating_sub(ASKED_LOOK_INTERVAL), queues.asked.notified()).await;
        }
    }
}

/// The kind Workload in the newest version that is served, if it is.
async fn served(client: &Client, namespace: Option<&str>) -> Result<Option<Api<DynamicObject>>, kube::Error> {
    for version in VERSIONS {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("kueue.x-k8s.io", version, "Workload"));
        let workloads: Api<DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
            None => Api::all_with(client.clone(), &kind),
        };
        match workloads.list(&ListParams::default().limit(1)).await {
            Ok(_) => return Ok(Some(workloads)),
            Err(error) if code(&error) == Some(404) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Of an API group that is not served the answer is plain text, which `is_not_found` does not know.
fn code(error: &kube::Error) -> Option<u16> {
    if let kube::Error::Api(status) = error { Some(status.code) } else { None }
}

/// Follows a kind until it is not served any more, or may not be watched: which of them.
async fn follow(
    workloads: Api<DynamicObject>,
    jobs: &Store<Job>,
    queues: &Queues,
    tell: &UnboundedSender<JobRef>,
    held: impl Fn() -> Vec<JobRef>,
) -> Option<Kueue> {
    let config = watcher::Config::default().timeout(WATCH_TIMEOUT_SECONDS).page_size(PAGE);
    let mut events = std::pin::pin!(watcher(workloads, config).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => queues.begin_list(),
            Ok(Event::InitDone) => {
                if queues.end_list() {
                    send(tell, held());
                }
            }
            Ok(Event::Apply(workload) | Event::InitApply(workload)) => {
                if queues.note(&workload) {
                    send(tell, concerned(&workload, jobs));
                }
            }
            Ok(Event::Delete(workload)) => {
                if queues.forget(&workload) {
                    send(tell, concerned(&workload, jobs));
                }
            }
            Err(watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) => {
                match code(&error) {
                    // Another version may be.
                    Some(404) => return None,
                    Some(403) => return Some(Kueue::Forbidden),
                    _ => tracing::warn!("the watch of workloads of kueue.x-k8s.io failed: {error}"),
                }
            }
            Err(error) => tracing::debug!("the watch of workloads of kueue.x-k8s.io failed: {error}"),
        }
    }
    None
}

/// The job whose Job a Workload is of.
fn concerned(workload: &DynamicObject, jobs: &Store<Job>) -> Option<JobRef> {
    let uid = workload.labels().get(JOB_UID_LABEL)?;
    let namespace = workload.namespace()?;
    let owner = workload.owner_references().iter().find(|owner| owner.uid == *uid)?;
    let child = jobs.get(&ObjectRef::new(&owner.name).within(&namespace))?;
    (child.uid().as_ref() == Some(uid)).then(|| job_of(&child))?
}

fn job_of(child: &Job) -> Option<JobRef> {
    Some(ObjectRef::new(child.labels().get(JOB_NAME_LABEL)?).within(&child.namespace()?))
}

fn is_held(child: &Job) -> bool {
    child.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true))
}

/// Who does not listen any more needs no news.
fn send(tell: &UnboundedSender<JobRef>, jobs: impl IntoIterator<Item = JobRef>) {
    for job in jobs {
        let _ = tell.send(job);
    }
}

/// What a Workload says of its Job.
fn seen(workload: &DynamicObject) -> QueueSeen {
    let conditions = workload.data["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let said = |name: &str, status: &str| {
        let is_it = |condition: &&Value| condition["type"] == name && condition["status"] == status;
        let condition = conditions.iter().find(is_it)?;
        let text = |field: &str| condition[field].as_str().unwrap_or_default();
        Some(message(&format!("{}: {}", text("reason"), text("message"))))
    };
    // With quota it may still wait for an admission check, which has a sentence of its own.
    let check = workload.data["status"]["admissionChecks"].as_array().into_iter().flatten().find_map(|check| {
        let told = check["message"].as_str().filter(|told| !told.is_empty() && check["state"] != "Ready")?;
        Some(message(&format!("{}: {told}", check["name"].as_str().unwrap_or_default())))
    });
    let waiting = said("QuotaReserved", "False").or(check).or_else(|| said("Admitted", "False"));
    // It stays true while the Workload waits anew.
    if let Some(evicted) = said("Evicted", "True") {
        let now = waiting.filter(|waiting| !waiting.ends_with(": ")).map(|waiting| format!("; now {waiting}"));
        return QueueSeen::Evicted(message(&format!("{evicted}{}", now.unwrap_or_default())));
    }
    QueueSeen::Waiting(waiting.unwrap_or_default())
}

fn mean_the_same(one: &QueueSeen, other: &QueueSeen) -> bool {
    match (one, other) {
        (QueueSeen::Waiting(one), QueueSeen::Waiting(other)) | (QueueSeen::Evicted(one), QueueSeen::Evicted(other)) => {
            have_same_meaning(one, other)
        }
        (one, other) => one == other,
    }
}
