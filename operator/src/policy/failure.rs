//! What an ended attempt means for its job.

use crds::condition::reason;
use crds::exit::{Disposition, ExitCode, Fault};
use crds::finetunejob::AttemptOutcome;
use crds::report::Report;
use crds::run::PodStage;

use crate::observe::{AttemptSeen, JobSeen, PodSeen};

/// An attempt's end, as far as it can be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// What it counts as.
    pub outcome: AttemptOutcome,
    /// Why, in one word.
    pub reason: String,
    /// Why, in one sentence.
    pub message: String,
    /// The exit code, where there was one.
    pub exit_code: Option<i32>,
    /// The last word, if it is one of this attempt.
    pub report: Option<Report>,
}

impl Ended {
    /// An attempt that `spec.suspend` ended.
    pub fn held() -> Self {
        Self {
            outcome: AttemptOutcome::Suspended,
            reason: reason::HELD.to_owned(),
            message: String::new(),
            exit_code: None,
            report: None,
        }
    }
}

/// What is known of an attempt that runs no more.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    /// It is told.
    Ended(Box<Ended>),
    /// Its pod is gone, or said that it is done and not what came of it: the volume knows.
    AskTheVolume,
}

/// Exit codes of processes that a signal ended.
const SIGKILL_EXIT: i32 = 137;
const SIGTERM_EXIT: i32 = 143;

/// Reads an attempt of `stage` that runs no more. `report` is its last word, from the pod or from the volume; `volume_was_read`
/// when there is no use in asking again.
pub fn read(attempt: &AttemptSeen, stage: PodStage, report: Option<&Report>, volume_was_read: bool) -> Reading {
    let ended = |outcome, reason: &str, message: String, exit_code| {
        Reading::Ended(Box::new(Ended {
            outcome,
            reason: reason.to_owned(),
            message,
            exit_code,
            report: report.cloned(),
        }))
    };
    let told = |fallback: String| {
        let failure = report.and_then(|report| report.failure.as_ref());
        failure.map_or(fallback, |failure| failure.message.clone())
    };
    let pod = attempt.newest_pod();
    let has_finished = pod.and_then(|pod| pod.terminated.as_ref()).is_some_and(|terminated| terminated.exit_code == 0);
    // A pod that was taken away just after its work was done has done it.
    if let (Some(by), false) = (disruption(attempt, pod), has_finished && report.is_some()) {
        let message = format!("the pod was taken away ({by}); training continues from the newest checkpoint");
        return ended(AttemptOutcome::Preempted, reason::PREEMPTED, message, None);
    }
    if let Some((why, message)) = pod.and_then(|pod| pod.rejected.as_ref()) {
        let message = format!("the kubelet took the pod and did not run it: {why}: {message}");
        return ended(AttemptOutcome::Failed, reason::POD_REJECTED, message, None);
    }
    let Some(terminated) = pod.and_then(|pod| pod.terminated.as_ref()) else {
        // No container ever said how it ended. What the attempt left on the volume decides.
        return match report {
            Some(found) => {
                let code = found.failure.as_ref().map_or(0, |failure| failure.exit_code);
                by_code(code, told(String::new()), &ended)
            }
            None if !volume_was_read => Reading::AskTheVolume,
            None => {
                let (reason, message) = match &attempt.job {
                    JobSeen::Missing => (reason::JOB_DELETED, "the Job was deleted while it ran"),
                    _ => (reason::REPORT_MISSING, "the pod is gone and left no report"),
                };
                ended(AttemptOutcome::Failed, reason, message.to_owned(), None)
            }
        };
    };
    let code = terminated.exit_code;
    match code {
        0 if report.is_some() => ended(AttemptOutcome::Done, ExitCode::Done.reason(), String::new(), Some(0)),
        0 if !volume_was_read => Reading::AskTheVolume,
        0 => {
            let message = "the trainer ended without an error and left no report that belongs to this attempt";
            ended(AttemptOutcome::Failed, reason::REPORT_MISSING, message.to_owned(), Some(0))
        }
        _ if terminated.oom_killed => {
            let message = "the container exceeded its memory limit, or its node ran out of memory; \
                           raise resources.limits.memory or lower hyperparameters.maxSequenceLength";
            ended(AttemptOutcome::Failed, ExitCode::OutOfMemory.reason(), message.to_owned(), Some(code))
        }
        SIGKILL_EXIT | SIGTERM_EXIT => {
            let message = format!("the container was killed (exit code {code}) and no condition says by whom");
            ended(AttemptOutcome::Failed, reason::KILLED, message, Some(code))
        }
        code => {
            // Where the trainer could not say itself what ended it.
            let untold = Fault::from_exit_code(code).map_or_else(
                || format!("the trainer ended with exit code {code}"),
                |fault| fault.message(&format!("the {} stage ran", stage.name())),
            );
            by_code(code, told(untold), &ended)
        }
    }
}

fn by_code(
    code: i32,
    message: String,
    ended: &dyn Fn(AttemptOutcome, &str, String, Option<i32>) -> Reading,
) -> Reading {
    let Some(exit) = ExitCode::from_code(code) else {
        let reason = ExitCode::InternalError.reason();
        return ended(AttemptOutcome::Failed, reason, format!("{message} (exit code {code})"), Some(code));
    };
    let outcome = match exit.disposition() {
        Disposition::Done => AttemptOutcome::Done,
        Disposition::Preempted => AttemptOutcome::Preempted,
        Disposition::Retry => AttemptOutcome::Failed,
        Disposition::Final => AttemptOutcome::Final,
    };
    ended(outcome, exit.reason(), message, Some(code))
}

/// What took the pod away, by the pod's own condition or, when the pod is gone, by what the Job controller noted of it.
fn disruption(attempt: &AttemptSeen, pod: Option<&PodSeen>) -> Option<String> {
    match pod {
        Some(pod) => pod.disrupted.clone(),
        None => match &attempt.job {
            JobSeen::Present { failure: Some((reason, message)), .. }
                if reason == "PodFailurePolicy" && message.contains("DisruptionTarget") =>
            {
                Some("DisruptionTarget".into())
            }
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use crds::report::{Failure, Report};

    use super::*;
    use crate::observe::Terminated;

    fn attempt(exit_code: i32, oom_killed: bool, disrupted: Option<&str>) -> AttemptSeen {
        let terminated = Some(Terminated { exit_code, oom_killed, ..Terminated::default() });
        let pod = PodSeen { terminated, disrupted: disrupted.map(str::to_owned), ..PodSeen::default() };
        AttemptSeen { pods: vec![pod], job: job(None) }
    }

    fn job(failure: Option<(&str, &str)>) -> JobSeen {
        let failure = failure.map(|(reason, message)| (reason.to_owned(), message.to_owned()));
        JobSeen::Present { uid: "j".into(), created: None, suspended: false, finished: true, failure }
    }

    fn gone(failure: Option<(&str, &str)>) -> AttemptSeen {
        AttemptSeen { pods: Vec::new(), job: job(failure) }
    }

    fn rejected() -> AttemptSeen {
        let rejected = Some(("UnexpectedAdmissionError".to_owned(), "no device".to_owned()));
        AttemptSeen { pods: vec![PodSeen { rejected, ..PodSeen::default() }], job: job(None) }
    }

    fn failed(exit: ExitCode) -> Report {
        Report { failure: Some(Failure::new(exit, "told")), ..Report::default() }
    }

    /// The table of failures: what the pod shows, what was read, what it counts as.
    #[test]
    fn every_end_counts_as_the_table_says() {
        use AttemptOutcome::{Done, Failed, Final, Preempted};
        let by_policy = |message: &str| gone(Some(("PodFailurePolicy", message)));
        let disrupted = Some("EvictionByEvictionAPI");
        for (name, attempt, report, expected) in vec![
            ("drained with 75", attempt(75, false, disrupted), None, Some((Preempted, "Preempted"))),
            ("drained with 137", attempt(137, false, disrupted), None, Some((Preempted, "Preempted"))),
            ("drained with 0", attempt(0, false, disrupted), None, Some((Preempted, "Preempted"))),
            ("drained when done", attempt(0, false, disrupted), Some(Report::default()), Some((Done, "Completed"))),
            ("rejected", rejected(), None, Some((Failed, "PodRejected"))),
            ("deleted with 75", attempt(75, false, None), None, Some((Preempted, "Preempted"))),
            ("done", attempt(0, false, None), Some(Report::default()), Some((Done, "Completed"))),
            ("done, no report", attempt(0, false, None), None, None),
            ("64", attempt(64, false, None), None, Some((Final, "BadConfiguration"))),
            ("65", attempt(65, false, None), None, Some((Final, "BadData"))),
            ("66", attempt(66, false, None), None, Some((Final, "InputNotFound"))),
            ("69", attempt(69, false, None), None, Some((Failed, "SourceUnavailable"))),
            ("70", attempt(70, false, None), None, Some((Failed, "InternalError"))),
            ("71", attempt(71, false, None), None, Some((Final, "OutOfMemory"))),
            ("73", attempt(73, false, None), None, Some((Failed, "CannotWriteOutput"))),
            ("77", attempt(77, false, None), None, Some((Final, "AccessDenied"))),
            ("78", attempt(78, false, None), None, Some((Final, "ForeignCheckpoint"))),
            ("79", attempt(79, false, None), None, Some((Final, "NonFinite"))),
            ("80", attempt(80, false, None), None, Some((Failed, "Stalled"))),
            ("134", attempt(134, false, None), None, Some((Failed, "InternalError"))),
            ("139", attempt(139, false, None), None, Some((Failed, "InternalError"))),
            ("132", attempt(132, false, None), None, Some((Failed, "InternalError"))),
            ("1", attempt(1, false, None), None, Some((Failed, "InternalError"))),
            ("out of memory", attempt(137, true, None), None, Some((Failed, "OutOfMemory"))),
            ("killed", attempt(137, false, None), None, Some((Failed, "Killed"))),
            ("terminated", attempt(143, false, None), None, Some((Failed, "Killed"))),
            ("gone", gone(None), None, None),
            (
                "gone, disrupted",
                by_policy("Pod x has condition DisruptionTarget"),
                None,
                Some((Preempted, "Preempted")),
            ),
            ("gone, failed", by_policy("Container trainer failed with exit code 65"), None, None),
            ("gone, done on the volume", gone(None), Some(Report::default()), Some((Done, "Completed"))),
            ("gone, 65 on the volume", gone(None), Some(failed(ExitCode::BadData)), Some((Final, "BadData"))),
            ("gone, 75 on the volume", gone(None), Some(failed(ExitCode::Preempted)), Some((Preempted, "Preempted"))),
        ] {
            let found = match read(&attempt, PodStage::Train, report.as_ref(), false) {
                Reading::Ended(ended) => Some((ended.outcome, ended.reason)),
                Reading::AskTheVolume => None,
            };
            let expected = expected.map(|(outcome, reason)| (outcome, reason.to_owned()));
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn a_signal_in_native_code_is_named_where_the_trainer_could_not() {
        let message = |report: Option<&Report>| match read(&attempt(132, false, None), PodStage::Train, report, true) {
            Reading::Ended(ended) => ended.message,
            Reading::AskTheVolume => panic!("the pod tells"),
        };
        let named = message(None);
        for words in [
            "SIGILL (an instruction that",
            "while the train stage ran",
            "a bug",
            "newest checkpoint",
            "(exit code 132)",
        ] {
            assert!(named.contains(words), "no {words:?} in {named:?}");
        }
        assert_eq!(message(Some(&failed(ExitCode::InternalError))), "told (exit code 132)");
    }

    #[test]
    fn a_volume_that_knows_nothing_is_asked_once() {
        for (attempt, expected) in [
            (gone(None), "ReportMissing"),
            (attempt(0, false, None), "ReportMissing"),
            (AttemptSeen::default(), "JobDeleted"),
        ] {
            let Reading::Ended(ended) = read(&attempt, PodStage::Train, None, true) else { panic!("{attempt:?}") };
            assert_eq!((ended.outcome, ended.reason.as_str()), (AttemptOutcome::Failed, expected));
        }
    }
}
