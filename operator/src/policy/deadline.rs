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
    },
    /// It comes in so long.
    In(Duration),
    /// There is none.
    None,
}

/// The nearer of the two deadlines of a job. `waits_since`: its creation, or when it was last resumed. `running_since`: when the training pod that runs now began to.
pub fn deadline(
    spec: &FineTuneJobSpec,
    status: &FineTuneJobStatus,
    waits_since: Timestamp,
    has_trained: bool,
    running_since: Option<Timestamp>,
    now: Timestamp,
) -> Deadline {
    let mut nearest: Option<i64> = None;
    let mut near = |left: i64| nearest = Some(nearest.map_or(left, |nearest| nearest.min(left)));
    if let Some(seconds) = spec.start_deadline_seconds.filter(|_| !has_trained) {
        let left = seconds - seconds_between(waits_since, now);
        if left <= 0 {
            let message = format!("no training pod ran within {seconds} s since the job was created or resumed");
            return Deadline::Over { reason: reason::START_DEADLINE_EXCEEDED, message };
        }
        near(left);
    }
    if let Some(seconds) = spec.active_deadline_seconds {
        let earlier = status.usage.as_ref().map_or(0, |usage| usage.train_seconds);
        let left = seconds - earlier - running_since.map_or(0, |since| seconds_between(since, now));
        if left <= 0 {
            let message = format!("training pods ran for {seconds} s over all attempts");
            return Deadline::Over { reason: reason::DEADLINE_EXCEEDED, message };
        }
        if running_since.is_some() {
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
    use crds::finetunejob::UsageStatus;
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
        let ask = |trained, now| deadline(&spec, &FineTuneJobStatus::default(), at(100), trained, None, at(now));
        assert_eq!(ask(false, 110), Deadline::In(Duration::from_secs(50)));
        assert!(matches!(ask(false, 160), Deadline::Over { reason: reason::START_DEADLINE_EXCEEDED, .. }));
        assert_eq!(ask(true, 160), Deadline::None);
        assert_eq!(ask(false, 90), Deadline::In(Duration::from_mins(1)), "a clock that went back");
    }

    #[test]
    fn an_active_deadline_counts_training_seconds_of_all_attempts() {
        let spec = spec(&serde_json::json!({"activeDeadlineSeconds": 100}));
        let usage = Some(UsageStatus { train_seconds: 70, ..UsageStatus::default() });
        let status = FineTuneJobStatus { usage, ..FineTuneJobStatus::default() };
        let ask = |since: Option<i64>, now| deadline(&spec, &status, at(0), true, since.map(at), at(now));
        assert_eq!(ask(None, 100_000), Deadline::None, "waiting costs nothing");
        assert_eq!(ask(Some(1000), 1010), Deadline::In(Duration::from_secs(20)));
        assert!(matches!(ask(Some(1000), 1030), Deadline::Over { reason: reason::DEADLINE_EXCEEDED, .. }));
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
