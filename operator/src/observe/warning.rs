//! What others say of a child that does not get on. The kubelet and the Job controller tell in events, and nowhere else, that a
//! volume does not mount or that the API server refuses a pod.

use std::time::Duration;

use crds::FineTuneJob;
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::facts::{AttemptSeen, JobSeen, Warning};

/// Events of one object: they are aggregated, and live for an hour.
const MOST: u32 = 100;
/// A trouble that was not told again for so long is over.
const FRESH: Duration = Duration::from_mins(10);
/// A pass has other things to do.
const PATIENCE: Duration = Duration::from_secs(10);

/// The newest warning about a Job that has no pod, or about a pod that has a node and does not begin. It decides nothing: where
/// events cannot be listed a job goes its way, and what is in it is told less well.
pub(super) async fn warning(client: &Client, job: &FineTuneJob, of: &AttemptSeen, now: Timestamp) -> Option<Warning> {
    let about = match (of.newest_pod(), &of.job) {
        (Some(pod), _)
            if pod.live && pod.scheduled && !pod.running && pod.terminated.is_none() && pod.ends_by.is_none() =>
        {
            pod.uid.as_str()
        }
        (None, JobSeen::Present { uid, suspended: false, finished: false, .. }) => uid,
        _ => return None,
    };
    let events: Api<Event> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let selected = ListParams::default().fields(&format!("involvedObject.uid={about},type=Warning")).limit(MOST);
    match tokio::time::timeout(PATIENCE, events.list(&selected)).await {
        Ok(Ok(found)) => newest(found.items, now),
        Ok(Err(error)) => {
            tracing::warn!("{}: the events of its child cannot be listed: {error}", job.name_any());
            None
        }
        Err(_) => {
            tracing::warn!("{}: the events of its child were not listed within {PATIENCE:?}", job.name_any());
            None
        }
    }
}

fn newest(events: Vec<Event>, now: Timestamp) -> Option<Warning> {
    let time = |event: &Event| {
        let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()).map(|time| time.0);
        let last = event.last_timestamp.as_ref().map(|time| time.0);
        let first = event.event_time.as_ref().map(|time| time.0);
        [series, last, first].into_iter().flatten().max()
    };
    let fresh = events.into_iter().filter_map(|event| Some((time(&event)?, event)));
    let fresh = fresh.filter(|(time, _)| now.duration_since(*time).unsigned_abs() < FRESH);
    let (_, event) = fresh.max_by_key(|(time, _)| *time)?;
    Some(Warning { reason: event.reason?, message: event.message? })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_sentence_counts_and_an_old_one_does_not() {
        let event = |reason: &str, minute: u32| {
            serde_json::from_value(json!({
                "metadata": {"name": reason}, "involvedObject": {}, "reason": reason, "message": "why",
                "lastTimestamp": format!("2026-01-01T00:{minute:02}:00Z"),
            }))
            .expect("an event")
        };
        let now = "2026-01-01T00:20:00Z".parse().expect("a time");
        let found = newest(vec![event("FailedMount", 19), event("FailedAttachVolume", 15), event("Old", 1)], now);
        assert_eq!(found.map(|found| found.reason).as_deref(), Some("FailedMount"));
        assert_eq!(newest(vec![event("Old", 1)], now), None);
    }
}
