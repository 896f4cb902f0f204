//! The conditions Admitted and Running, those of kstatus, and the phase.

use crds::condition::{self, ConditionStatus, reason};
use crds::finetunejob::Phase;
use crds::report::Stage;
use crds::run::PodStage;
use crds::status::{condition, found};

use super::{LOOK_AGAIN, Rendering, convert};
use crate::decide::Step;
use crate::facts::{JobSeen, QueueSeen};
use crate::validate::Plan;

impl Rendering<'_> {
    /// Running, Admitted and the phase.
    pub(super) fn describe(&mut self, plan: &Plan) {
        self.describe_queue(plan);
        let running = self.running();
        let message = self.steady(condition::RUNNING, running.reason, running.message);
        self.set(condition::RUNNING, running.status, running.reason, &message);
        if let Some(after) = running.look_again {
            self.wake_in(after);
        }
        self.status.phase = Some(self.phase(running.reason));
    }

    fn phase(&self, reason: &str) -> Phase {
        let is_queued = found(&self.status, condition::ADMITTED, ConditionStatus::False).is_some();
        let stuck = matches!(
            reason,
            reason::UNSCHEDULABLE | reason::IMAGE_PULL_FAILED | reason::CHILD_CREATION_FAILED | reason::MOUNT_FAILED
        );
        // A trainer that has ended tells nothing more: it evaluated last.
        let told = self.facts.observed.progress.as_ref();
        let evaluates =
            told.map_or(self.status.phase == Some(Phase::Evaluating), |told| told.stage == Stage::Evaluating);
        if matches!(self.decision.step, Step::Hold { .. }) {
            return Phase::Suspended;
        }
        if is_queued {
            return Phase::Queued;
        }
        match self.current().map(|current| current.stage) {
            _ if stuck => Phase::Pending,
            None => Phase::Pending,
            Some(PodStage::Prepare) if self.status.start_time.is_none() => Phase::Pending,
            Some(PodStage::Prepare) => Phase::Preparing,
            Some(PodStage::Train) if evaluates => Phase::Evaluating,
            Some(PodStage::Train) => Phase::Training,
            Some(PodStage::Publish | PodStage::Report) => Phase::Publishing,
        }
    }

    fn describe_queue(&mut self, plan: &Plan) {
        let Some(current) = self.current().cloned() else { return };
        let reader = self.facts.observed.reader().filter(|_| current.outcome.is_none());
        let stage = reader.map_or(current.stage, |_| PodStage::Report);
        let Some(queue) = plan.pods.queue(stage) else {
            if reader.is_some() {
                return;
            }
            return self.set(condition::ADMITTED, ConditionStatus::True, reason::NO_QUEUE, "");
        };
        let (reason, message) = match &self.facts.observed.queue {
            Some(QueueSeen::ControllerMissing) => {
                let message = format!(
                    "the Job is held for the queue {queue}, and nobody serves queues here; \
                     install Kueue, or remove scheduling.queueName"
                );
                // No watch tells of a kind that is not served.
                self.wake_in(LOOK_AGAIN);
                (reason::QUEUE_CONTROLLER_MISSING, message)
            }
            Some(QueueSeen::Waiting(message)) => (reason::WAITING_FOR_QUOTA, message.clone()),
            Some(QueueSeen::Evicted(message)) => (reason::EVICTED, message.clone()),
            None => {
                // An attempt that this pass listed was not observed yet: what was is the one before it.
                let seen = self.facts.observed.in_question().filter(|_| current.uid.is_some());
                if seen.is_some_and(|seen| matches!(seen.job, JobSeen::Present { suspended: false, .. })) {
                    self.set(condition::ADMITTED, ConditionStatus::True, reason::QUOTA_RESERVED, "");
                }
                return;
            }
        };
        let message = self.steady(condition::ADMITTED, reason, message);
        self.set(condition::ADMITTED, ConditionStatus::False, reason, &message);
    }

    /// The sentence that was told, where the new one has the same meaning: the counters of schedulers and queues move all the time.
    fn steady(&self, name: &str, reason: &str, message: String) -> String {
        let told = condition(&self.status, name).filter(|told| told.reason == reason);
        let told = told.filter(|told| convert::have_same_meaning(&told.message, &message));
        told.map_or(message, |told| told.message.clone())
    }

    /// The conditions that Flux, Argo CD and Helm read of any resource: they follow from the phase.
    pub(super) fn follow_kstatus(&mut self) {
        use ConditionStatus::{False, True};
        let phase = self.status.phase.unwrap_or(Phase::Pending);
        let refused = self.decision.step == Step::Refuse;
        let (ready, reconciling, stalled) = match phase {
            Phase::Succeeded => (True, False, False),
            Phase::Failed => (False, False, True),
            // Only an edit helps.
            _ if refused => (False, False, True),
            Phase::Suspended => (False, False, False),
            Phase::Pending
            | Phase::Queued
            | Phase::Preparing
            | Phase::Training
            | Phase::Evaluating
            | Phase::Publishing => (False, True, False),
        };
        let sources = [
            (condition::COMPLETE, True),
            (condition::FAILED, True),
            (condition::ACCEPTED, False),
            (condition::SUSPENDED, True),
            (condition::ADMITTED, False),
        ];
        let source = sources.into_iter().find_map(|(name, status)| found(&self.status, name, status));
        let source = source.or(condition(&self.status, condition::RUNNING)).cloned();
        let message = source.as_ref().map_or("", |source| &source.message);
        let reason = match &source {
            Some(source) if stalled == True => source.reason.clone(),
            _ => format!("{phase:?}"),
        };
        for (name, status) in
            [(condition::READY, ready), (condition::RECONCILING, reconciling), (condition::STALLED, stalled)]
        {
            self.set(name, status, &reason, message);
        }
    }
}
