//! What the end of an attempt counts as, from what its pod shows and what it left.

use crds::condition::reason;
use crds::exit::{Disposition, ExitCode, Fault};
use crds::finetunejob::AttemptOutcome;
use crds::report::Report;
use crds::run::PodStage;

use crate::facts::{AttemptSeen, JobSeen, PodSeen, Terminated};

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
        Self::without_code(AttemptOutcome::Suspended, reason::HELD, String::new())
    }

    fn without_code(outcome: AttemptOutcome, reason: &str, message: String) -> Self {
        Self { outcome, reason: reason.to_owned(), message, exit_code: None, report: None }
    }
}

/// What is known of an attempt that runs no more.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// How it ended.
    Known(Box<Ended>),
    /// Its pod is gone, or said that it is done and not what came of it: the volume knows.
    OnVolume,
}

/// Exit codes of processes that a signal ended.
const SIGKILL_EXIT: i32 = 137;
const SIGTERM_EXIT: i32 = 143;

/// How an attempt of `stage` that runs no more ended. `report` is its last word, from the pod or from the volume;
/// `volume_was_read` when there is no use in asking again. The first of these that applies decides: what the kubelet says of
/// the pod as a whole, who took it away, why it never ran, how its
/// container ended, what is on the volume.
pub fn end_of(attempt: &AttemptSeen, stage: PodStage, report: Option<&Report>, volume_was_read: bool) -> End {
    let pod = attempt.newest_pod();
    let terminated = pod.and_then(|pod| pod.terminated.as_ref());
    // A pod that was taken away just after its work was done has done it.
    let has_finished = report.is_some() && terminated.is_some_and(|terminated| terminated.exit_code == 0);
    let taken = (!has_finished).then(|| {
        pod.and_then(of_eviction).or_else(|| of_disruption(attempt)).or_else(|| pod.and_then(of_what_never_ran))
    });
    let ended = match taken.flatten() {
        Some(ended) => ended,
        None => match terminated {
            Some(Terminated { exit_code: 0, .. }) | None if report.is_none() && !volume_was_read => {
                return End::OnVolume;
            }
            Some(terminated) => of_container(terminated, stage, report),
            None => of_volume(attempt, report),
        },
    };
    End::Known(Box::new(Ended { report: report.cloned(), ..ended }))
}

/// What the kubelet says of a pod that it evicted.
fn of_eviction(pod: &PodSeen) -> Option<Ended> {
    let sentence = pod.evicted.as_ref()?;
    let message = format!("the kubelet evicted the pod: {sentence}");
    Some(if is_own_fault(sentence) {
        Ended::without_code(AttemptOutcome::Failed, reason::EVICTED_FOR_USAGE, message)
    } else {
        Ended::without_code(AttemptOutcome::Preempted, reason::PREEMPTED, message)
    })
}

/// What took the pod away.
fn of_disruption(attempt: &AttemptSeen) -> Option<Ended> {
    let by = disruption(attempt)?;
    let message = format!("the pod was taken away ({by}); training continues from the newest checkpoint");
    Some(Ended::without_code(AttemptOutcome::Preempted, reason::PREEMPTED, message))
}

/// What kept the trainer from running, or its end from being seen.
fn of_what_never_ran(pod: &PodSeen) -> Option<Ended> {
    if let Some(init) = &pod.failed_init {
        let last_words = if init.message.is_empty() { String::new() } else { format!(": {}", init.message) };
        let message = format!(
            "the init container {}, which is not the operator's, ended with exit code {}{last_words}",
            init.container, init.exit_code
        );
        return Some(Ended::without_code(AttemptOutcome::Failed, reason::INIT_CONTAINER_FAILED, message));
    }
    if let Some((why, message)) = &pod.rejected {
        let message = format!("the kubelet took the pod and did not run it: {why}: {message}");
        return Some(Ended::without_code(AttemptOutcome::Failed, reason::POD_REJECTED, message));
    }
    if pod.terminated.as_ref().is_some_and(Terminated::is_unknown) {
        let node = pod.node.as_deref().unwrap_or("its node");
        let message =
            format!("{node} came back without the pod's containers; training continues from the newest checkpoint");
        return Some(Ended::without_code(AttemptOutcome::Preempted, reason::PREEMPTED, message));
    }
    None
}

/// Whether an eviction follows from what the pod itself used up. The kubelet has a sentence for each limit, and another one for
/// a node that runs out, which begins with the node.
fn is_own_fault(message: &str) -> bool {
    !message.starts_with("The node was low on resource") && message.to_lowercase().contains("exceed")
}

/// How the trainer's container ended.
fn of_container(terminated: &Terminated, stage: PodStage, report: Option<&Report>) -> Ended {
    let failed = |reason: &str, message: String| Ended {
        exit_code: Some(terminated.exit_code),
        ..Ended::without_code(AttemptOutcome::Failed, reason, message)
    };
    match terminated.exit_code {
        0 if report.is_some() => Ended {
            exit_code: Some(0),
            ..Ended::without_code(AttemptOutcome::Done, ExitCode::Done.reason(), String::new())
        },
        0 => {
            let message = "the trainer ended without an error and left no report that belongs to this attempt";
            failed(reason::REPORT_MISSING, message.to_owned())
        }
        _ if terminated.ran_out_of_memory() => {
            let message = "the container exceeded its memory limit, or its node ran out of memory; \
                           raise resources.limits.memory or lower hyperparameters.maxSequenceLength";
            failed(ExitCode::OutOfMemory.reason(), message.to_owned())
        }
        code @ (SIGKILL_EXIT | SIGTERM_EXIT) => {
            let message = format!("the container was killed (exit code {code}) and no condition says by whom");
            failed(reason::KILLED, message)
        }
        code => {
            // Where the trainer could not say itself what ended it.
            let untold = Fault::from_exit_code(code).map_or_else(
                || format!("the trainer ended with exit code {code}"),
                |fault| fault.message(&format!("the {} stage ran", stage.name())),
            );
            of_code(code, last_message(report).unwrap_or(untold))
        }
    }
}

/// No container ever said how it ended: what the attempt left on the volume decides.
fn of_volume(attempt: &AttemptSeen, report: Option<&Report>) -> Ended {
    if let Some(report) = report {
        let code = report.failure.as_ref().map_or(0, |failure| failure.exit_code);
        return of_code(code, last_message(Some(report)).unwrap_or_default());
    }
    let (reason, message) = match &attempt.job {
        JobSeen::Missing => (reason::JOB_DELETED, "the Job was deleted while it ran"),
        JobSeen::Foreign | JobSeen::Present { .. } => (reason::REPORT_MISSING, "the pod is gone and left no report"),
    };
    Ended::without_code(AttemptOutcome::Failed, reason, message.to_owned())
}

fn last_message(report: Option<&Report>) -> Option<String> {
    report.and_then(|report| report.failure.as_ref()).map(|failure| failure.message.clone())
}

fn of_code(code: i32, message: String) -> Ended {
    let Some(exit) = ExitCode::from_code(code) else {
        let (reason, message) = (ExitCode::InternalError.reason(), format!("{message} (exit code {code})"));
        return Ended { exit_code: Some(code), ..Ended::without_code(AttemptOutcome::Failed, reason, message) };
    };
    let outcome = match exit.disposition() {
        Disposition::Done => AttemptOutcome::Done,
        Disposition::Preempted => AttemptOutcome::Preempted,
        Disposition::Wait => AttemptOutcome::Unavailable,
        Disposition::Retry => AttemptOutcome::Failed,
        Disposition::Final => AttemptOutcome::Final,
    };
    Ended { exit_code: Some(code), ..Ended::without_code(outcome, exit.reason(), message) }
}

/// What took the pod away, by the pod's own condition or, when the pod is gone, by what the Job controller noted of it.
fn disruption(attempt: &AttemptSeen) -> Option<String> {
    match attempt.newest_pod() {
        Some(pod) => pod.disrupted.clone(),
        None => match &attempt.job {
            JobSeen::Present { failure: Some((reason, message)), .. }
                if reason == "PodFailurePolicy" && message.contains("DisruptionTarget") =>
            {
                Some("DisruptionTarget".into())
            }
            JobSeen::Present { .. } | JobSeen::Missing | JobSeen::Foreign => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use crds::report::{Failure, Report};

    use super::*;
    use crate::facts::FailedInit;

    fn attempt(exit_code: i32, oom_killed: bool, disrupted: Option<&str>) -> AttemptSeen {
        let reason = if oom_killed { "OOMKilled" } else { "Error" }.to_owned();
        let terminated = Some(Terminated { exit_code, reason, ..Terminated::default() });
        of(PodSeen { terminated, disrupted: disrupted.map(str::to_owned), ..PodSeen::default() })
    }

    fn of(pod: PodSeen) -> AttemptSeen {
        AttemptSeen { pods: vec![pod], job: job(None), ..AttemptSeen::default() }
    }

    fn job(failure: Option<(&str, &str)>) -> JobSeen {
        let failure = failure.map(|(reason, message)| (reason.to_owned(), message.to_owned()));
        JobSeen::Present { uid: "j".into(), released: None, suspended: false, finished: true, failure }
    }

    fn gone(failure: Option<(&str, &str)>) -> AttemptSeen {
        AttemptSeen { job: job(failure), ..AttemptSeen::default() }
    }

    fn rejected() -> AttemptSeen {
        let rejected = Some(("UnexpectedAdmissionError".to_owned(), "no device".to_owned()));
        of(PodSeen { rejected, ..PodSeen::default() })
    }

    fn evicted(sentence: &str, exit_code: i32) -> AttemptSeen {
        let mut seen = attempt(exit_code, false, None);
        seen.pods[0].evicted = Some(sentence.into());
        seen
    }

    fn unknown() -> AttemptSeen {
        let terminated =
            Terminated { exit_code: 137, reason: "ContainerStatusUnknown".into(), ..Terminated::default() };
        of(PodSeen { terminated: Some(terminated), ..PodSeen::default() })
    }

    fn broken_init(disrupted: Option<&str>) -> AttemptSeen {
        let failed_init = Some(FailedInit { container: "istio-init".into(), exit_code: 1, message: String::new() });
        of(PodSeen { failed_init, disrupted: disrupted.map(str::to_owned), ..PodSeen::default() })
    }

    fn failed(exit: ExitCode) -> Report {
        Report { failure: Some(Failure::new(exit, "told")), ..Report::default() }
    }

    /// The table of failures: what the pod shows, what was read, what it counts as.
    #[test]
    fn every_end_counts_as_the_table_says() {
        use AttemptOutcome::{Done, Failed, Final, Preempted, Unavailable};
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
            ("69", attempt(69, false, None), None, Some((Unavailable, "SourceUnavailable"))),
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
            (
                "full /tmp",
                evicted("Usage of EmptyDir volume \"tmp\" exceeds the limit \"1Gi\". ", 75),
                None,
                Some((Failed, "EvictedForUsage")),
            ),
            (
                "full container",
                evicted("Container trainer exceeded its local ephemeral storage limit \"1Gi\". ", 137),
                None,
                Some((Failed, "EvictedForUsage")),
            ),
            (
                "full pod",
                evicted("Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ", 137),
                None,
                Some((Failed, "EvictedForUsage")),
            ),
            (
                "full node",
                evicted(
                    "The node was low on resource: memory. Container trainer was using 9Gi, request is 1Gi, has larger consumption of memory. ",
                    137,
                ),
                None,
                Some((Preempted, "Preempted")),
            ),
            ("a node that came back empty", unknown(), None, Some((Preempted, "Preempted"))),
            ("an init container of others", broken_init(None), None, Some((Failed, "InitContainerFailed"))),
            ("an init container that was drained", broken_init(disrupted), None, Some((Preempted, "Preempted"))),
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
            let found = match end_of(&attempt, PodStage::Train, report.as_ref(), false) {
                End::Known(ended) => Some((ended.outcome, ended.reason)),
                End::OnVolume => None,
            };
            let expected = expected.map(|(outcome, reason)| (outcome, reason.to_owned()));
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn a_signal_in_native_code_is_named_where_the_trainer_could_not() {
        let message = |report: Option<&Report>| match end_of(&attempt(132, false, None), PodStage::Train, report, true)
        {
            End::Known(ended) => ended.message,
            End::OnVolume => panic!("the pod tells"),
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
            let End::Known(ended) = end_of(&attempt, PodStage::Train, None, true) else { panic!("{attempt:?}") };
            assert_eq!((ended.outcome, ended.reason.as_str()), (AttemptOutcome::Failed, expected));
        }
    }
}
