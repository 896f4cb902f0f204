//! When a job has taken too long, and when it is to be forgotten. Timers come from times in the status, so that a restart of
//! the operator changes none.

use std::time::Duration;

use crds::condition::reason;
use crds::status::seconds_between;
use crds::{FineTuneJobSpec, FineTuneJobStatus};
use k8s_openapi::jiff::Timestamp;

/// A moment that is over, or the time until it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// The job is to end, for this reason.
    Over {
        /// Of the condition `Failed`.
        reason: &'static str,
        /// One sentence.
        message: String,
        /// For so long.
        by: Duration,
    },
    /// It comes in so long.
    In(Duration),
    /// There is none.
    None,
}

/// What the deadlines of a job count.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed {
    /// Since when the job waits for its first training pod: its creation, or when it was last resumed; `None` when it waits no
    /// more, or is held.
    pub waits_since: Option<Timestamp>,
    /// Seconds that training pods have run, over all attempts.
    pub trained_seconds: i64,
    /// Whether one runs now.
    pub trains: bool,
}

/// The nearer of the two deadlines of a job.
pub fn deadline(spec: &FineTuneJobSpec, elapsed: Elapsed, now: Timestamp) -> Deadline {
    let seconds_of = |seconds: i64| Duration::from_secs(seconds.unsigned_abs());
    let mut nearest: Option<i64> = None;
    let mut near = |left: i64| nearest = Some(nearest.map_or(left, |nearest| nearest.min(left)));
    if let (Some(seconds), Some(since)) = (spec.start_deadline_seconds, elapsed.waits_since) {
        let left = seconds - seconds_between(since, now);
        if left <= 0 {
            let message = format!("no training pod ran within {seconds} s since the job was created or resumed");
            return Deadline::Over { reason: reason::START_DEADLINE_EXCEEDED, message, by: seconds_of(left) };
        }
        near(left);
    }
    if let Some(seconds) = spec.active_deadline_seconds {
        let left = seconds - elapsed.trained_seconds;
        if left <= 0 {
            let message = format!("training pods ran for {seconds} s over all attempts");
            return Deadline::Over { reason: reason::DEADLINE_EXCEEDED, message, by: seconds_of(left) };
        }
        if elapsed.trains {
            near(left);
        }
    }
    nearest.map_or(Deadline::None, |left| Deadline::In(Duration::from_secs(left.unsigned_abs().max(1))))
}

/// The time until a finished job is deleted; zero when it is due.
pub fn time_to_live(spec: &FineTuneJobSpec, status: &FineTuneJobStatus, now: Timestamp) -> Option<Duration> {
    let seconds = spec.ttl_seconds_after_finished?;
    let ended = status.completion_time.as_ref()?.0;
    let left = seconds - seconds_between(ended, now);
    Some(Duration::from_secs(u64::try_from(left).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn spec(fields: &serde_json::Value) -> FineTuneJobSpec {
        let mut spec = serde_json::json!({
            "model": {"uri": "hf://a/b"}, "dataset": {"train": {"uri": "hf://a/b"}}, "method": {"type": "LoRA"}
        });
        spec.as_object_mut().expect("a map").extend(fields.as_object().expect("a map").clone());
        serde_json::from_value(spec).expect("valid")
    }

    #[test]
    fn a_start_deadline_counts_from_creation_until_the_first_training_pod() {
        let spec = spec(&serde_json::json!({"startDeadlineSeconds": 60}));
        let ask = |trained: bool, now| {
            let waits_since = (!trained).then(|| at(100));
            deadline(&spec, Elapsed { waits_since, trained_seconds: 0, trains: false }, at(now))
        };
        assert_eq!(ask(false, 110), Deadline::In(Duration::from_secs(50)));
        assert!(matches!(ask(false, 160), Deadline::Over { reason: reason::START_DEADLINE_EXCEEDED, .. }));
        assert_eq!(ask(true, 160), Deadline::None);
        assert_eq!(ask(false, 90), Deadline::In(Duration::from_mins(1)), "a clock that went back");
    }

    #[test]
    fn an_active_deadline_counts_training_seconds_of_all_attempts() {
        let spec = spec(&serde_json::json!({"activeDeadlineSeconds": 100}));
        let ask = |trained_seconds, trains| {
            deadline(&spec, Elapsed { waits_since: None, trained_seconds, trains }, at(100_000))
        };
        assert_eq!(ask(70, false), Deadline::None, "waiting costs nothing");
        assert_eq!(ask(80, true), Deadline::In(Duration::from_secs(20)));
        let Deadline::Over { reason: reason::DEADLINE_EXCEEDED, by, .. } = ask(103, true) else { panic!("it is over") };
        assert_eq!(by, Duration::from_secs(3));
    }

    #[test]
    fn a_finished_job_lives_for_its_ttl() {
        let spec = spec(&serde_json::json!({"ttlSecondsAfterFinished": 30}));
        let ended = FineTuneJobStatus { completion_time: Some(Time(at(100))), ..FineTuneJobStatus::default() };
        assert_eq!(time_to_live(&spec, &FineTuneJobStatus::default(), at(500)), None, "it has not ended");
        assert_eq!(time_to_live(&spec, &ended, at(110)), Some(Duration::from_secs(20)));
        assert_eq!(time_to_live(&spec, &ended, at(500)), Some(Duration::ZERO));
    }
}
