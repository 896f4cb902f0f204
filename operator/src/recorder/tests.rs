use std::sync::Mutex;

use serde_json::Value;

use super::*;
use crate::events::EventType;
use crate::fake::{self, Request, refusal};

fn about(uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("finetune.dev/v1alpha1".into()),
        kind: Some("FineTuneJob".into()),
        name: Some("bot".into()),
        namespace: Some("team".into()),
        uid: Some(uid.into()),
        ..ObjectReference::default()
    }
}

fn event(reason: &'static str, beside: Option<&str>) -> Event {
    let beside = beside.map(|name| ObjectReference { name: Some(name.into()), ..ObjectReference::default() });
    let type_ = if reason == "AttemptFailed" { EventType::Warning } else { EventType::Normal };
    Event { type_, reason, note: Some(format!("{reason} it is")), beside }
}

/// A recorder and what it asks of an API server that holds events as long as `keeps` them.
fn recorder(keeps: bool) -> (Recorder, Arc<Mutex<Vec<Request>>>) {
    let asked: Arc<Mutex<Vec<Request>>> = Arc::default();
    let log = Arc::clone(&asked);
    let client = fake::client(move |request: Request| {
        log.lock().expect("a log").push(request.clone());
        async move {
            match request.method.as_str() {
                "POST" => (201, request.body.to_string()),
                "PATCH" if keeps => (200, serde_json::json!({"metadata": {}, "eventTime": null}).to_string()),
                _ => refusal(404, "NotFound"),
            }
        }
    });
    (Recorder::new(client, "operator-0".into()), asked)
}

async fn asked_for(keeps: bool, events: &[(&'static str, Option<&str>, &str, u64)]) -> Vec<Request> {
    let (recorder, asked) = recorder(keeps);
    for (reason, beside, uid, after) in events {
        tokio::time::advance(Duration::from_secs(*after)).await;
        recorder.publish(&event(reason, *beside), &about(uid)).await.expect("it is written");
    }
    asked.lock().expect("a log").clone()
}

#[tokio::test(start_paused = true)]
async fn an_event_is_created_once_and_counted_while_it_repeats() {
    let asked = asked_for(
        true,
        &[
            ("CheckpointSaved", None, "u-1", 0),
            ("CheckpointSaved", None, "u-1", 300),
            ("CheckpointSaved", None, "u-1", 300),
            // Of another job, another reason, another Job.
            ("CheckpointSaved", None, "u-2", 0),
            ("AttemptFailed", Some("bot-train-1"), "u-1", 0),
            ("AttemptFailed", Some("bot-train-2"), "u-1", 0),
            // Too late for the series.
            ("CheckpointSaved", None, "u-1", 361),
        ],
    )
    .await;
    let told: Vec<(&str, Value)> =
        asked.iter().map(|request| (request.method.as_str(), request.body["series"]["count"].clone())).collect();
    let (created, repeated) = (("POST", Value::Null), |count: i32| ("PATCH", Value::from(count)));
    assert_eq!(
        told,
        [created.clone(), repeated(2), repeated(3), created.clone(), created.clone(), created.clone(), created]
    );
    let first = &asked[0].body;
    let name = first["metadata"]["name"].as_str().expect("a name");
    assert!(name.starts_with("bot.") && asked[1].path.ends_with(name), "{name}: {}", asked[1].path);
    assert_eq!(asked[0].path, "/apis/events.k8s.io/v1/namespaces/team/events");
    // What the API server asks for of an event.
    for (field, expected) in [
        ("action", "Reconcile"),
        ("reason", "CheckpointSaved"),
        ("note", "CheckpointSaved it is"),
        ("type", "Normal"),
        ("reportingController", "finetune-operator"),
        ("reportingInstance", "operator-0"),
    ] {
        assert_eq!(first[field], expected, "{field}");
    }
    assert!(first["eventTime"].is_string() && first["regarding"]["uid"] == "u-1", "{first:#}");
    assert_eq!((&asked[4].body["type"], &asked[4].body["related"]["name"]), (&"Warning".into(), &"bot-train-1".into()));
}

#[tokio::test(start_paused = true)]
async fn one_that_the_api_server_has_forgotten_is_told_anew() {
    let asked = asked_for(false, &[("Preempted", None, "u-1", 0), ("Preempted", None, "u-1", 1)]).await;
    let methods: Vec<&str> = asked.iter().map(|request| request.method.as_str()).collect();
    assert_eq!(methods, ["POST", "PATCH", "POST"]);
}

/// A cost that grows with what was told before would show here: a hundred thousand events are told, and what is known of them
/// is bounded at each.
#[test]
fn what_is_known_of_earlier_events_is_bounded() {
    let mut told = Told::default();
    let start = Instant::now();
    let mut entries = 0;
    for number in 0..100_000_u64 {
        let now = start + Duration::from_millis(number * 20);
        let key = (format!("u-{}", number / 3), "JobCreated".to_owned(), String::new());
        match told.repeat(&key, now) {
            Some(series) => assert_eq!(u64::try_from(series.count), Ok(number % 3 + 1)),
            None => told.begin(key, "bot.1".into(), now),
        }
        assert!(told.series.len() <= MOST_SERIES && told.by_age.len() <= MOST_SERIES, "after {number}");
        entries = entries.max(told.by_age.len());
    }
    assert_eq!(entries, MOST_SERIES, "the test has reached the bound");
    assert!(told.repeat(&("u-0".into(), "JobCreated".into(), String::new()), start).is_none());
    told.forget_old(start + Duration::from_hours(1));
    assert!(told.series.is_empty() && told.by_age.is_empty());
}
