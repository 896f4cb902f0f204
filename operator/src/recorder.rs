//! Writes events (`events.k8s.io/v1`) on jobs. The same thing told again within minutes is a series of one event. What is known
//! of earlier ones is bounded, and to tell one costs the same however many there were.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event as Written, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::time::Instant;

use crate::build::MANAGER;
use crate::events::Event;

/// A repetition within this time continues a series, as the API's own documentation has it.
const SERIES_LASTS: Duration = Duration::from_mins(6);
/// Series that are known at a time: a job tells a handful of things.
const MOST_SERIES: usize = 4096;

/// Tells events as this process.
#[derive(Clone)]
pub struct Recorder {
    client: Client,
    instance: String,
    told: Arc<Mutex<Told>>,
}

/// Of what and about whom: `metadata.uid` of the job, reason, name of the object beside it.
type Key = (String, String, String);

#[derive(Debug, Default)]
struct Told {
    series: HashMap<Key, Series>,
    /// In the order of their last repetitions; one that was repeated since is there twice.
    by_age: VecDeque<(Instant, Key)>,
}

#[derive(Clone, Debug)]
struct Series {
    event: String,
    count: i32,
    last: Instant,
}

impl Recorder {
    /// `instance` is the name of the pod.
    pub fn new(client: Client, instance: String) -> Self {
        Self { client, instance, told: Arc::default() }
    }

    /// Tells an event about a job.
    pub async fn publish(&self, event: &Event, about: &ObjectReference) -> Result<(), kube::Error> {
        let events: Api<Written> =
            Api::namespaced(self.client.clone(), about.namespace.as_deref().unwrap_or("default"));
        let beside = event.beside.as_ref().and_then(|beside| beside.name.clone());
        let key = (about.uid.clone().unwrap_or_default(), event.reason.to_owned(), beside.unwrap_or_default());
        let now = MicroTime(Timestamp::now());
        let series = self.told().repeat(&key, Instant::now());
        if let Some(series) = series {
            let series_now = EventSeries { count: series.count, last_observed_time: now.clone() };
            let repeated = events
                .patch(&series.event, &PatchParams::default(), &Patch::Merge(json!({"series": series_now})))
                .await;
            match repeated {
                // The API server forgets events sooner than it is asked to where there are many.
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                repeated => return repeated.map(|_| ()),
            }
        }
        let name = format!("{}.{:x}", about.name.as_deref().unwrap_or(MANAGER), now.0.as_nanosecond());
        let written = Written {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: about.namespace.clone(),
                ..ObjectMeta::default()
            },
            action: Some("Reconcile".into()),
            event_time: Some(now),
            note: event.note.clone(),
            reason: Some(event.reason.to_owned()),
            regarding: Some(about.clone()),
            related: event.beside.clone(),
            reporting_controller: Some(MANAGER.into()),
            reporting_instance: Some(self.instance.clone()),
            type_: Some(format!("{:?}", event.type_)),
            ..Written::default()
        };
        match events.create(&PostParams::default(), &written).await {
            // The client asks again where an answer did not come: the name says that it is this one.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            created => {
                created?;
            }
        }
        self.told().begin(key, name, Instant::now());
        Ok(())
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    /// The series that this continues.
    fn repeat(&mut self, key: &Key, now: Instant) -> Option<Series> {
        self.forget_old(now);
        let series = self.series.get_mut(key)?;
        series.count = series.count.saturating_add(1);
        series.last = now;
        let series = series.clone();
        self.by_age.push_back((now, key.clone()));
        self.forget_old(now);
        Some(series)
    }

    fn begin(&mut self, key: Key, event: String, now: Instant) {
        self.series.insert(key.clone(), Series { event, count: 1, last: now });
        self.by_age.push_back((now, key));
        self.forget_old(now);
    }

    /// Each entry is looked at once in its life.
    fn forget_old(&mut self, now: Instant) {
        while let Some((last, _)) = self.by_age.front()
            && (now.duration_since(*last) > SERIES_LASTS || self.by_age.len() > MOST_SERIES)
        {
            let Some((last, key)) = self.by_age.pop_front() else { return };
            if self.series.get(&key).is_some_and(|series| series.last == last) {
                self.series.remove(&key);
            }
        }
    }
}
