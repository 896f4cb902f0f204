//! The conditions Admitted and Running, and the phase, from what was seen of the queue and of the pod.

use std::time::Duration;

use crds::condition::{self, ConditionStatus, reason};
use crds::finetunejob::{AttemptOutcome, AttemptsStatus, Phase};
use crds::report::Stage;
use crds::run::PodStage;

use super::{Applied, QUEUE_INTERVAL, Transition, is_terminal};
use crate::observe::{JobSeen, QueueSeen};
use crate::validate::Plan;

/// Garbage is collected within seconds.
const LEFTOVER_INTERVAL: Duration = Duration::from_secs(2);
/// A Job whose pod the API server refuses (quota, admission) shows no more than that it has none.
const POD_PATIENCE: Duration = Duration::from_secs(20);

impl Transition<'_> {
    /// Running, Admitted and the phase.
    pub(super) fn describe(&mut self, plan: &Plan, applied: &Applied) {
        self.describe_queue(plan);
        if is_terminal(&self.status) {
            return;
        }
        let current = self.current().cloned();
        let (status, reason, message) = self.running(applied);
        self.set(condition::RUNNING, status, reason, &message);
        let is_queued = self
            .status
            .conditions
            .iter()
            .any(|condition| condition.type_ == condition::ADMITTED && condition.status == "False");
        let stuck = matches!(reason, reason::UNSCHEDULABLE | reason::IMAGE_PULL_FAILED | reason::CHILD_CREATION_FAILED);
        // A trainer that has ended tells nothing more: it evaluated last.
        let evaluates = self
            .observed
            .progress
            .as_ref()
            .map_or(self.status.phase == Some(Phase::Evaluating), |progress| progress.stage == Stage::Evaluating);
        self.status.phase = Some(if self.job.spec.suspend {
            Phase::Suspended
        } else if is_queued {
            Phase::Queued
        } else if stuck {
            Phase::Pending
        } else {
            match current.map(|current| current.stage) {
                None => Phase::Pending,
                Some(PodStage::Prepare) if self.status.start_time.is_none() => Phase::Pending,
                Some(PodStage::Prepare) => Phase::Preparing,
                Some(PodStage::Train) if evaluates => Phase::Evaluating,
                Some(PodStage::Train) => Phase::Training,
                Some(PodStage::Publish | PodStage::Report) => Phase::Publishing,
            }
        });
    }

    fn describe_queue(&mut self, plan: &Plan) {
        let Some(current) = self.current().cloned() else { return };
        let Some(queue) = plan.pods.queue(current.stage) else {
            return self.set(condition::ADMITTED, ConditionStatus::True, reason::NO_QUEUE, "");
        };
        let was_admitted = self
            .status
            .conditions
            .iter()
            .any(|condition| condition.type_ == condition::ADMITTED && condition.reason == reason::QUOTA_RESERVED);
        let (reason, message) = match &self.observed.queue {
            Some(QueueSeen::ControllerMissing) => {
                let message = format!(
                    "the Job is held for the queue {queue}, and nobody serves queues here; \
                     install Kueue, or remove scheduling.queueName"
                );
                (reason::QUEUE_CONTROLLER_MISSING, message)
            }
            Some(QueueSeen::Waiting(message)) => (reason::WAITING_FOR_QUOTA, message.clone()),
            Some(QueueSeen::Evicted(message)) => (reason::EVICTED, message.clone()),
            None => {
                // An attempt that this pass listed was not observed yet: what was is the one before it.
                let job = self.observed.attempt.as_ref().map(|attempt| &attempt.job).filter(|_| current.uid.is_some());
                if matches!(job, Some(JobSeen::Present { suspended: false, .. })) {
                    self.set(condition::ADMITTED, ConditionStatus::True, reason::QUOTA_RESERVED, "");
                }
                return;
            }
        };
        if was_admitted && current.start_time.is_some() {
            // The same Job comes back when it is admitted again: nothing ended, and yet its pod was taken away.
            self.status.attempts.get_or_insert_with(AttemptsStatus::default).preempted += 1;
            if current.stage == PodStage::Train {
                // Waiting for quota is no training: it neither costs nor uses up activeDeadlineSeconds.
                self.count_time(plan, &current, self.now);
                self.status.job_refs.last_mut().expect("there is a current one").start_time = None;
            }
        }
        self.set(condition::ADMITTED, ConditionStatus::False, reason, &message);
        self.wake_in(QUEUE_INTERVAL);
        let (preempted, most) =
            (self.status.attempts.as_ref().map_or(0, |attempts| attempts.preempted), self.max_preemptions());
        if preempted > most {
            let message = format!("{preempted} preemptions, maxPreemptions is {most}; the last one: {message}");
            self.finish(condition::FAILED, reason::PREEMPTION_LIMIT_EXCEEDED, &message);
        }
    }

    fn running(&mut self, applied: &Applied) -> (ConditionStatus, &'static str, String) {
        use ConditionStatus::{False, True, Unknown};
        if let Some(leftover) = &applied.leftover {
            self.wake_in(LEFTOVER_INTERVAL);
            return (False, reason::PENDING, format!("{leftover} of an earlier job of this name is being taken away"));
        }
        if let Some(refused) = &applied.refused {
            self.wake_in(QUEUE_INTERVAL);
            return (False, reason::CHILD_CREATION_FAILED, refused.clone());
        }
        if self.job.spec.suspend {
            return (False, reason::SUSPENDED_BY_USER, String::new());
        }
        let Some(current) = self.current().cloned() else { return (Unknown, reason::PENDING, String::new()) };
        if let Some(outcome) = current.outcome {
            let reason = if outcome == AttemptOutcome::Preempted { reason::PREEMPTED } else { reason::PENDING };
            return (False, reason, "waiting for the next attempt".into());
        }
        let Some(attempt) = &self.observed.attempt else { return (Unknown, reason::PENDING, String::new()) };
        if attempt.job == JobSeen::Foreign {
            return (False, reason::CHILD_NAME_TAKEN, format!("the Job {} belongs to somebody else", current.name));
        }
        let Some(pod) = attempt.newest_pod() else {
            let JobSeen::Present { created: Some(created), suspended: false, .. } = &attempt.job else {
                return (False, reason::PENDING, String::new());
            };
            let waited = self.now.duration_since(created.0).unsigned_abs();
            if waited < POD_PATIENCE {
                self.wake_in(POD_PATIENCE.saturating_sub(waited));
                return (False, reason::PENDING, String::new());
            }
            let name = &current.name;
            let message =
                format!("the Job {name} has no pod: a quota or a policy may refuse it; kubectl describe job {name}");
            return (False, reason::CHILD_CREATION_FAILED, message);
        };
        if let Some(message) = &pod.unschedulable {
            return (False, reason::UNSCHEDULABLE, message.clone());
        }
        if let Some((why, message)) = &pod.waiting {
            // Other reasons pass, or are told by how the pod ends.
            let is_pull = why.contains("Image");
            let reason = if is_pull { reason::IMAGE_PULL_FAILED } else { reason::CHILD_CREATION_FAILED };
            // The kubelet tells of one failure in turns: that it failed, and that it waits.
            let told =
                self.status.conditions.iter().find(|one| one.type_ == condition::RUNNING && one.reason == reason);
            if let Some(told) = told.filter(|_| why.ends_with("BackOff")) {
                return (False, reason, told.message.clone());
            }
            return (False, reason, format!("{why}: {message}"));
        }
        if pod.terminating && pod.live {
            let message = "the pod is being taken away; the next attempt begins when it is gone for certain";
            return (False, reason::PREEMPTED, message.into());
        }
        if pod.running { (True, reason::POD_RUNNING, String::new()) } else { (False, reason::PENDING, String::new()) }
    }
}
