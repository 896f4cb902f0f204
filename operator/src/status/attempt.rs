//! The newest attempt: what is seen of it, how it ended, and what it is counted as.

use crds::FineTuneJob;
use crds::finetunejob::{AttemptOutcome, AttemptsStatus, JobReference, LastFailure, UsageStatus};
use crds::run::PodStage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::{Applied, Transition, convert};
use crate::observe::{AttemptSeen, JobSeen, Observed};
use crate::policy::deadline::seconds_between;
use crate::policy::failure::{Ended, Reading, read};
use crate::validate::Plan;

/// What is known of how the newest attempt ended.
pub(super) fn reading(job: &FineTuneJob, observed: &Observed, current: &JobReference) -> Option<Reading> {
    let attempt = observed.attempt.as_ref()?;
    let uid = job.uid().unwrap_or_default();
    let own = attempt.report(&uid, current.stage, current.attempt);
    // A pod of ours that reads the volume is gone before the next one writes to it.
    let read_job = observed.report_job.as_ref().filter(|read| !read.is_live());
    let from_volume = read_job.and_then(|read| read.report(&uid, current.stage, current.attempt));
    let volume_was_read = observed.report_job.as_ref().is_some_and(AttemptSeen::has_ended);
    Some(read(attempt, current.stage, own.or(from_volume).as_ref(), volume_was_read))
}

impl Transition<'_> {
    /// What is seen of the attempt that runs: its Job's UID, its start, its progress.
    pub(super) fn note_attempt(&mut self, plan: &Plan, applied: &Applied) {
        let Some(seen) = &self.observed.attempt else { return };
        let Some(current) = self.status.job_refs.last_mut().filter(|current| current.outcome.is_none()) else { return };
        if current.uid.is_none() {
            current.uid = match &seen.job {
                JobSeen::Present { uid, .. } => Some(uid.clone()),
                JobSeen::Missing | JobSeen::Foreign => applied.created_uid.clone(),
            };
        }
        // A Job that a queue closed and opened again has several pods; what ran before it was closed was counted then.
        let queued = plan.pods.queue(current.stage).is_some();
        let pod = seen.newest_pod().filter(|pod| !(queued && pod.terminating));
        let started = pod.and_then(|pod| pod.started.clone());
        let closed = matches!(seen.job, JobSeen::Present { suspended: true, .. });
        if current.start_time.is_none() && !closed {
            current.start_time = started;
        }
        let (stage, attempt, first_start) = (current.stage, current.attempt, current.start_time.clone());
        if self.status.start_time.is_none() {
            self.status.start_time = first_start;
        }
        self.status.stage = Some(stage);
        if let Some(progress) = &self.observed.progress
            && progress.pod_stage == Some(stage)
            && progress.attempt == attempt
        {
            convert::note_progress(&mut self.status, progress);
        }
    }

    /// Records how the newest attempt ended, once it has.
    pub(super) fn note_end(&mut self, plan: &Plan) -> Option<Ended> {
        let current = self.current().filter(|current| current.outcome.is_none())?.clone();
        let attempt = self.observed.attempt.as_ref()?;
        // Before this pass recorded that the Job was made, nothing can have ended.
        let was_made =
            self.job.status.as_ref().and_then(|status| status.job_refs.last()).is_some_and(|last| last.uid.is_some());
        if !was_made || !attempt.has_ended() {
            return None;
        }
        let mut ended = match reading(self.job, self.observed, &current)? {
            Reading::Ended(ended) => ended,
            // A held job makes no pod, not even one that reads a volume. Work that was done is found when it goes on.
            Reading::AskTheVolume if self.job.spec.suspend => Box::new(Ended::held()),
            Reading::AskTheVolume => return None,
        };
        if self.job.spec.suspend && !matches!(ended.outcome, AttemptOutcome::Done | AttemptOutcome::Final) {
            *ended = Ended { report: ended.report.take(), ..Ended::held() };
        }
        let told = attempt.newest_pod().and_then(|pod| pod.terminated.as_ref()?.finished.clone());
        // The node's clock may be ahead of ours.
        let finished = told.filter(|told| told.0 <= self.now).unwrap_or(Time(self.now));
        self.record_end(plan, &current, &ended, finished);
        Some(*ended)
    }

    pub(super) fn record_end(&mut self, plan: &Plan, current: &JobReference, ended: &Ended, finished: Time) {
        self.count(plan, current, ended, &finished);
        let recorded = self.status.job_refs.last_mut().expect("there is a current one");
        recorded.outcome = Some(ended.outcome);
        recorded.reason = Some(ended.reason.clone());
        recorded.completion_time = Some(finished);
    }

    fn count(&mut self, plan: &Plan, current: &JobReference, ended: &Ended, finished: &Time) {
        let attempts = self.status.attempts.get_or_insert_with(AttemptsStatus::default);
        match ended.outcome {
            AttemptOutcome::Failed => attempts.failed += 1,
            AttemptOutcome::Preempted => attempts.preempted += 1,
            AttemptOutcome::Done | AttemptOutcome::Final | AttemptOutcome::Suspended => {}
        }
        if current.stage == PodStage::Train {
            // Of a trainer that was killed the last word is what it told before.
            let known = self.status.checkpoints.last().map(|checkpoint| checkpoint.step);
            count_progress(attempts, known, current.start_time.is_some(), ended);
            self.count_time(plan, current, finished.0);
        }
        if matches!(ended.outcome, AttemptOutcome::Failed | AttemptOutcome::Final) {
            let message = convert::message(&ended.message);
            self.status.last_failure =
                Some(LastFailure { reason: ended.reason.clone(), exit_code: ended.exit_code, message });
        }
        if let Some(report) = &ended.report {
            convert::note_report(&mut self.status, current.stage, report);
        }
    }

    /// Counts the time that the newest attempt trained, up to `until`.
    pub(super) fn count_time(&mut self, plan: &Plan, current: &JobReference, until: Timestamp) {
        let usage = self.status.usage.get_or_insert_with(UsageStatus::default);
        let seconds = current.start_time.as_ref().map_or(0, |start| seconds_between(start.0, until));
        usage.train_seconds += seconds;
        usage.gpu_seconds += seconds * plan.pods.accelerators();
        let price = plan.run.resources.price_per_hour;
        // Where there is no accelerator the price is the machine's.
        let priced = usage.train_seconds * plan.pods.accelerators().max(1);
        usage.cost = price.map(|price| convert::decimal(price * priced as f64 / 3600.0));
    }
}

/// Whether a training attempt left a checkpoint that none before it had left.
fn count_progress(attempts: &mut AttemptsStatus, known: Option<i64>, ran: bool, ended: &Ended) {
    let report = ended.report.as_ref();
    let told = [
        known,
        attempts.resumed_from_step,
        report.and_then(|report| report.last_checkpoint_step),
        report.and_then(|report| report.resumed_from_step),
    ];
    let newest = told.into_iter().flatten().max();
    if newest > attempts.checkpoint_step {
        attempts.checkpoint_step = newest;
        attempts.without_checkpoint = 0;
    } else if ran && !matches!(ended.outcome, AttemptOutcome::Done | AttemptOutcome::Suspended) {
        attempts.without_checkpoint += 1;
    }
}
