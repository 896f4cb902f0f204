//! The newest attempt: what is seen of it, and its end.

use crds::finetunejob::{AttemptOutcome, AttemptsStatus, JobReference, LastFailure, UsageStatus};
use crds::run::PodStage;
use crds::status::seconds_between;
use k8s_openapi::jiff::Timestamp;

use super::{Rendering, convert};
use crate::decide::started;
use crate::facts::JobSeen;
use crate::validate::Plan;

impl Rendering<'_> {
    /// What is seen of the attempt that runs: its Job's UID, its start, its progress.
    pub(super) fn note_attempt(&mut self, plan: &Plan) {
        let Some(seen) = &self.facts.observed.attempt else { return };
        let started = started(self.facts, plan);
        let Some(current) = self.status.job_refs.last_mut().filter(|current| current.outcome.is_none()) else { return };
        if current.uid.is_none() {
            if let Some(created) = &self.applied.created {
                current.uid = Some(created.uid.clone());
                current.pod_digest = Some(created.pod_digest.clone());
            } else if let JobSeen::Present { uid, .. } = &seen.job {
                current.uid = Some(uid.clone());
                current.pod_digest.clone_from(&seen.pod_digest);
            }
        }
        current.start_time = started;
        let (stage, attempt, first_start) = (current.stage, current.attempt, current.start_time.clone());
        if self.status.start_time.is_none() {
            self.status.start_time = first_start;
        }
        self.status.stage = Some(stage);
        if let Some(progress) = &self.facts.observed.progress
            && progress.pod_stage == Some(stage)
            && progress.attempt == attempt
        {
            convert::note_progress(&mut self.status, progress);
        }
    }

    /// The end of the newest attempt, or that its quota was taken back.
    pub(super) fn record(&mut self, plan: &Plan) {
        if self.decision.evicted
            && let Some(current) = self.current().cloned()
        {
            self.status.attempts.get_or_insert_with(AttemptsStatus::default).preempted += 1;
            if current.stage == PodStage::Train {
                // Waiting for quota is no training: it neither costs nor uses up activeDeadlineSeconds.
                self.count_time(plan, &current, self.facts.now);
                self.status.job_refs.last_mut().expect("there is a current one").start_time = None;
            }
        }
        let Some(recorded) = &self.decision.ended else { return };
        let (ended, finished) = (&recorded.ended, &recorded.finished);
        let Some(current) = self.current().cloned() else { return };
        self.status.attempts = Some(recorded.attempts.clone());
        if current.stage == PodStage::Train {
            self.count_time(plan, &current, finished.0);
        }
        if matches!(ended.outcome, AttemptOutcome::Failed | AttemptOutcome::Final | AttemptOutcome::Unavailable) {
            self.status.last_failure = Some(LastFailure {
                reason: ended.reason.clone(),
                exit_code: ended.exit_code,
                message: convert::message(&ended.message),
            });
        }
        if let Some(report) = &ended.report {
            convert::note_report(&mut self.status, current.stage, report);
        }
        let last = self.status.job_refs.last_mut().expect("there is a current one");
        last.outcome = Some(ended.outcome);
        last.reason = Some(ended.reason.clone());
        last.completion_time = Some(finished.clone());
        last.pod_digest = None;
    }

    /// Counts the time that the newest attempt trained, up to `until`.
    fn count_time(&mut self, plan: &Plan, current: &JobReference, until: Timestamp) {
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
