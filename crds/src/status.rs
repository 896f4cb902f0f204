//! How a status is read: what holds, whether the job has ended, what stands in its way. The operator and the kubectl plugin
//! mean the same by it. Nothing here changes a status; [`crate::condition`] has its words.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use crate::FineTuneJobStatus;
use crate::condition::{self, ConditionStatus, reason};
use crate::exit::ExitCode;

/// A condition, if it was told yet.
pub fn condition<'a>(status: &'a FineTuneJobStatus, name: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.type_ == name)
}

/// A condition, if it is known to have this value.
pub fn found<'a>(status: &'a FineTuneJobStatus, name: &str, value: ConditionStatus) -> Option<&'a Condition> {
    condition(status, name).filter(|condition| condition.status == value.name())
}

/// Whether a condition is `True`.
pub fn holds(status: &FineTuneJobStatus, name: &str) -> bool {
    found(status, name, ConditionStatus::True).is_some()
}

/// Whether a job has ended: after this nothing is ever made for it.
pub fn is_terminal(status: &FineTuneJobStatus) -> bool {
    [condition::COMPLETE, condition::FAILED].into_iter().any(|name| holds(status, name))
}

/// Whether a condition keeps a job from going on, or ended it badly.
pub fn is_trouble(condition: &Condition) -> bool {
    match (condition.type_.as_str(), condition.status.as_str()) {
        (condition::FAILED, "True") | (condition::ACCEPTED | condition::ADMITTED, "False") => true,
        (condition::RUNNING, "False") => [
            reason::UNSCHEDULABLE,
            reason::IMAGE_PULL_FAILED,
            reason::CHILD_CREATION_FAILED,
            reason::CHILD_NAME_TAKEN,
            reason::PREEMPTED,
            reason::NODE_LOST,
            reason::MOUNT_FAILED,
            reason::INIT_CONTAINER_FAILED,
            ExitCode::SourceUnavailable.reason(),
        ]
        .contains(&condition.reason.as_str()),
        _ => false,
    }
}

/// Whole seconds from one moment to another, not below zero: clocks differ.
pub fn seconds_between(from: Timestamp, to: Timestamp) -> i64 {
    (to.as_second() - from.as_second()).max(0)
}

/// `45s`, `3m20s`, `1h5m`, `2d3h`: the two largest units.
pub fn duration(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    let pair = |large: i64, large_unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{large}{large_unit}"),
        small => format!("{large}{large_unit}{small}{small_unit}"),
    };
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => pair(minutes, "m", seconds % 60, "s"),
        (0, _, _) => pair(hours, "h", minutes, "m"),
        _ => pair(days, "d", hours, "h"),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn with(name: &str, value: ConditionStatus, reason: &str) -> FineTuneJobStatus {
        let mut status = FineTuneJobStatus::default();
        let now = Time(Timestamp::from_second(0).expect("in range"));
        condition::set_condition(&mut status.conditions, name, value, reason, "", None, now);
        status
    }

    #[test]
    fn a_job_has_ended_when_one_of_two_conditions_is_true() {
        use ConditionStatus::{False, True, Unknown};
        assert!(!is_terminal(&FineTuneJobStatus::default()));
        for (name, value, expected) in [
            (condition::COMPLETE, True, true),
            (condition::FAILED, True, true),
            (condition::COMPLETE, Unknown, false),
            (condition::FAILED, False, false),
            (condition::PUBLISHED, True, false),
        ] {
            assert_eq!(is_terminal(&with(name, value, reason::PENDING)), expected, "{name} {value:?}");
        }
    }

    #[test]
    fn trouble_is_what_keeps_a_job_from_going_on() {
        use ConditionStatus::{False, True};
        for (name, value, why, expected) in [
            (condition::FAILED, True, "BadData", true),
            (condition::FAILED, False, "Completed", false),
            (condition::ACCEPTED, False, reason::PROFILE_NOT_FOUND, true),
            (condition::ADMITTED, False, reason::WAITING_FOR_QUOTA, true),
            (condition::RUNNING, False, reason::UNSCHEDULABLE, true),
            (condition::RUNNING, False, reason::NODE_LOST, true),
            (condition::RUNNING, False, "SourceUnavailable", true),
            (condition::RUNNING, False, "Completed", false),
            (condition::STALLED, False, "Training", false),
            (condition::RUNNING, True, reason::POD_RUNNING, false),
            (condition::PUBLISHED, False, reason::GATE_FAILED, false),
        ] {
            assert_eq!(is_trouble(&with(name, value, why).conditions[0]), expected, "{name} {why}");
        }
    }

    #[test]
    fn times_are_for_people() {
        let durations = [-1, 45, 200, 3900, 7200, 183_600].map(duration);
        assert_eq!(durations, ["0s", "45s", "3m20s", "1h5m", "2h", "2d3h"]);
        let at = |second| Timestamp::from_second(second).expect("in range");
        assert_eq!((seconds_between(at(5), at(65)), seconds_between(at(65), at(5))), (60, 0));
    }
}
