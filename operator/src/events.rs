//! Events on a job, from what changed in its status. Pure.

use crds::FineTuneJobStatus;
use crds::condition::{self, event, reason};
use crds::finetunejob::AttemptOutcome;
use crds::run::PodStage;
use k8s_openapi::api::core::v1::ObjectReference;

/// Bytes that the API server takes.
const MAX_NOTE: usize = 1000;

/// Something to tell about a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Whether somebody should look at it.
    pub type_: EventType,
    /// One of [`crds::condition::event`].
    pub reason: &'static str,
    /// In a sentence.
    pub note: Option<String>,
    /// The Job that it is about too.
    pub beside: Option<ObjectReference>,
}

/// As the API has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// It goes as it should.
    Normal,
    /// It does not.
    Warning,
}

/// What to tell of the step from one status to the next.
pub fn events(namespace: &str, before: &FineTuneJobStatus, after: &FineTuneJobStatus) -> Vec<Event> {
    let mut events = Vec::new();
    let mut tell_of = |beside, type_, reason: &'static str, note: String| {
        let note: String = note.char_indices().take_while(|(at, _)| *at < MAX_NOTE).map(|(_, c)| c).collect();
        let note = Some(note).filter(|note| !note.is_empty());
        events.push(Event { type_, reason, note, beside });
    };
    for attempt in &after.job_refs {
        let old = before.job_refs.iter().find(|old| old.name == attempt.name);
        // Events about the same two objects are one that is repeated, and keeps its first message: so each Job is named.
        let mut tell = |type_, reason, note| {
            let job = ObjectReference {
                api_version: Some("batch/v1".into()),
                kind: Some("Job".into()),
                name: Some(attempt.name.clone()),
                namespace: Some(namespace.into()),
                uid: attempt.uid.clone(),
                ..ObjectReference::default()
            };
            tell_of(Some(job), type_, reason, note);
        };
        if attempt.uid.is_some() && old.is_none_or(|old| old.uid.is_none()) {
            tell(EventType::Normal, event::JOB_CREATED, format!("Job {}", attempt.name));
        }
        let is_first_train = attempt.stage == PodStage::Train && attempt.attempt == 1;
        if is_first_train && attempt.start_time.is_some() && old.is_none_or(|old| old.start_time.is_none()) {
            tell(EventType::Normal, event::TRAINING_STARTED, format!("Job {}", attempt.name));
        }
        if attempt.outcome.is_some() && old.is_none_or(|old| old.outcome.is_none()) {
            let why = attempt.reason.clone().unwrap_or_default();
            match attempt.outcome {
                Some(AttemptOutcome::Done) if attempt.stage == PodStage::Prepare => {
                    tell(EventType::Normal, event::PREPARE_COMPLETED, format!("Job {}", attempt.name));
                }
                Some(AttemptOutcome::Preempted) => {
                    tell(EventType::Normal, event::PREEMPTED, format!("Job {}: {why}", attempt.name));
                }
                Some(AttemptOutcome::Failed | AttemptOutcome::Final | AttemptOutcome::Unavailable) => {
                    let message = after.last_failure.as_ref().map_or("", |failure| failure.message.as_str());
                    tell(EventType::Warning, event::ATTEMPT_FAILED, format!("Job {}: {why}: {message}", attempt.name));
                }
                Some(AttemptOutcome::Done | AttemptOutcome::Suspended) | None => {}
            }
        }
    }
    let mut tell = |type_, reason, note| tell_of(None, type_, reason, note);
    let newest = |status: &FineTuneJobStatus| status.checkpoints.last().map(|checkpoint| checkpoint.step);
    if newest(after) > newest(before) {
        let step = newest(after).unwrap_or_default();
        tell(EventType::Normal, event::CHECKPOINT_SAVED, format!("step {step}"));
    }
    let resumed = |status: &FineTuneJobStatus| {
        status.attempts.as_ref().and_then(|attempts| Some((attempts.total, attempts.resumed_from_step?)))
    };
    if resumed(after) != resumed(before)
        && let Some((_, step)) = resumed(after)
        && before.attempts.as_ref().and_then(|attempts| attempts.resumed_from_step) != Some(step)
    {
        tell(EventType::Normal, event::RESUMED, format!("from the checkpoint of step {step}"));
    }
    for now in &after.conditions {
        let was = before.conditions.iter().find(|was| was.type_ == now.type_);
        if was.is_some_and(|was| was.status == now.status && was.reason == now.reason) {
            continue;
        }
        let found = match (now.type_.as_str(), now.status.as_str(), now.reason.as_str()) {
            (condition::ADMITTED, "False", reason::WAITING_FOR_QUOTA | reason::QUEUE_CONTROLLER_MISSING) => {
                Some((EventType::Normal, event::QUEUED_WAITING_FOR_QUOTA))
            }
            (condition::VALIDATION_PASSED, "True", _) => Some((EventType::Normal, event::VALIDATION_PASSED)),
            (condition::VALIDATION_PASSED, "False", _) => Some((EventType::Warning, event::VALIDATION_FAILED)),
            (condition::PUBLISHED, "True", _) => Some((EventType::Normal, event::PUBLISHED)),
            (condition::PUBLISHED, "False", reason::PUBLISH_FAILED) => {
                Some((EventType::Warning, event::PUBLISH_FAILED))
            }
            (condition::FAILED, "True", reason::DEADLINE_EXCEEDED | reason::START_DEADLINE_EXCEEDED) => {
                Some((EventType::Warning, event::DEADLINE_EXCEEDED))
            }
            (condition::ACCEPTED, "False", _) => Some((EventType::Warning, event::NOT_ACCEPTED)),
            _ => None,
        };
        if let Some((type_, reason)) = found {
            tell(type_, reason, now.message.clone());
        }
    }
    events
}
