//! What is known of jobs besides what the API server holds; losing it costs requests.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crds::FineTuneJob;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use tokio::time::Instant;

use crate::caches::{Guarded, JobStore};
use crate::validate::Plan;

/// A watch delivers within moments, and a list that a busy API server takes from its own cache within seconds.
const CACHE_MAY_LAG: Duration = Duration::from_secs(30);

/// By `metadata.uid` of the job.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<HashMap<String, Remembered>>>);

#[derive(Debug, Default)]
struct Remembered {
    /// The plan never changes.
    plan: Option<Plan>,
    /// `resourceVersion` of our own last write, and when it was.
    written: Option<(u64, Instant)>,
    /// The trainer's control file says so.
    told_to_stop: bool,
}

impl Memory {
    /// The plan that the job's ConfigMap holds.
    pub fn known_plan(&self, job: &FineTuneJob) -> Option<Plan> {
        self.jobs().get(&job.uid()?)?.plan.clone()
    }

    /// For a plan that the job's ConfigMap holds.
    pub fn remember_plan(&self, job: &FineTuneJob, plan: &Plan) {
        if let Some(uid) = job.uid() {
            self.jobs().entry(uid).or_default().plan.get_or_insert_with(|| plan.clone());
        }
    }

    /// What our last write made of the job.
    pub fn remember_write(&self, written: &FineTuneJob) {
        let version = written.resource_version().and_then(|version| version.parse().ok());
        let version = version.map(|version| (version, Instant::now()));
        if let Some(uid) = written.uid() {
            self.jobs().entry(uid).or_default().written = version;
        }
    }

    /// Whether the cache has not seen our own last write. Versions of one kind of object are ordered, unless the API server's
    /// own store went back to an older state: so a cache that stays behind is believed in the end. What it is behind of by
    /// then would be refused, as each write names the version that it was computed from.
    pub fn is_behind(&self, job: &FineTuneJob) -> bool {
        let Some(uid) = job.uid() else { return false };
        let written = self.jobs().get(&uid).and_then(|remembered| remembered.written);
        let seen = job.resource_version().and_then(|version| version.parse::<u64>().ok());
        written.zip(seen).is_some_and(|((written, at), seen)| seen < written && at.elapsed() < CACHE_MAY_LAG)
    }

    /// For a job that has ended.
    pub fn forget_plan(&self, job: &FineTuneJob) {
        if let Some(uid) = job.uid()
            && let Some(remembered) = self.jobs().get_mut(&uid)
        {
            remembered.plan = None;
        }
    }

    /// Whether the control file was made.
    pub fn was_told_to_stop(&self, job: &FineTuneJob) -> bool {
        let uid = job.uid().unwrap_or_default();
        self.jobs().get(&uid).is_some_and(|remembered| remembered.told_to_stop)
    }

    /// For a job whose control file was made.
    pub fn remember_stop(&self, job: &FineTuneJob) {
        if let Some(uid) = job.uid() {
            self.jobs().entry(uid).or_default().told_to_stop = true;
        }
    }

    /// Forgets jobs that are gone: no pass is made for them. To be called after the store took the event.
    pub fn follow(&self, event: &Event<Guarded>, store: &JobStore) {
        match event {
            Event::Delete(gone) => {
                gone.uid().and_then(|uid| self.jobs().remove(&uid));
            }
            // Whatever went while nobody watched.
            Event::InitDone => {
                let known: HashSet<String> = store.state().iter().filter_map(|job| job.uid()).collect();
                self.jobs().retain(|uid, _| known.contains(uid));
            }
            Event::Init | Event::InitApply(_) | Event::Apply(_) => {}
        }
    }

    fn jobs(&self) -> MutexGuard<'_, HashMap<String, Remembered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use kube::core::DeserializeGuard;
    use kube::runtime::reflector;
    use serde_json::json;

    use super::*;

    fn job(uid: &str, version: &str) -> FineTuneJob {
        serde_json::from_value(json!({
            "metadata": {"namespace": "team", "name": uid, "uid": uid, "resourceVersion": version},
            "spec": {"model": {"uri": "hf://a/b"}, "dataset": {"train": {"uri": "hf://datasets/a/b/c"}}, "method": {"type": "LoRA"}},
        }))
        .expect("a job")
    }

    fn check(events: &[fn(Guarded) -> Event<Guarded>], expected: &[&str]) {
        let (store, mut writer) = reflector::store::<Guarded>();
        let memory = Memory::default();
        for uid in ["stays", "goes"] {
            memory.remember_write(&job(uid, "7"));
        }
        writer.apply_watcher_event(&Event::Init);
        writer.apply_watcher_event(&Event::InitApply(DeserializeGuard(Ok(job("stays", "7")))));
        for event in events {
            let event = event(DeserializeGuard(Ok(job("goes", "8"))));
            writer.apply_watcher_event(&event);
            memory.follow(&event, &store);
        }
        // Only of a job that it remembers can it tell that the cache is old.
        let known: Vec<&str> = ["stays", "goes"].into_iter().filter(|uid| memory.is_behind(&job(uid, "6"))).collect();
        assert_eq!(known, expected);
    }

    #[test]
    fn forgets_what_is_gone() {
        check(&[|_| Event::InitDone], &["stays"]);
        check(&[Event::InitApply, |_| Event::InitDone], &["stays", "goes"]);
        check(&[Event::InitApply, |_| Event::InitDone, Event::Delete], &["stays"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cache_that_stays_behind_is_believed_in_the_end() {
        let memory = Memory::default();
        memory.remember_write(&job("u", "700"));
        let restored = job("u", "12");
        assert!(memory.is_behind(&restored) && !memory.is_behind(&job("u", "700")));
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(memory.is_behind(&restored), "a slow watch");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!memory.is_behind(&restored), "a store that went back: nothing higher will ever come");
        memory.remember_write(&job("u", "13"));
        assert!(memory.is_behind(&restored) && !memory.is_behind(&job("u", "14")), "and what is written there counts");
    }
}
