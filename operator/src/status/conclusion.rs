//! What ends a job: the end of an attempt after which there is no other, the verdict, a deadline.

use crds::condition::{self, ConditionStatus, reason};
use crds::exit::ExitCode;
use crds::finetunejob::{AttemptOutcome, Phase};
use crds::report::Report;
use crds::run::PodStage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Transition;
use crate::observe::PodSeen;
use crate::policy::deadline::{Deadline, deadline, time_to_live};
use crate::policy::failure::Ended;
use crate::policy::verdict::judge;
use crate::validate::Plan;

/// Training attempts in a row without a new checkpoint that end a job.
const LIVES: i32 = 3;
/// Attempts that may run out of memory: the limit does not grow by itself.
const OUT_OF_MEMORY_ATTEMPTS: usize = 2;

impl Transition<'_> {
    /// What the end of an attempt means for the job; true when the job has ended.
    pub(super) fn conclude(&mut self, plan: &Plan, ended: &Ended) -> bool {
        let policy = self.job.spec.failure_policy.as_ref();
        let max_retries = policy.and_then(|policy| policy.max_retries).unwrap_or(3);
        let max_preemptions = self.max_preemptions();
        let attempts = self.status.attempts.clone().unwrap_or_default();
        let stage = self.current().map_or(PodStage::Prepare, |current| current.stage);
        let out_of_memory = ExitCode::OutOfMemory.reason();
        let exhausted =
            self.status.job_refs.iter().filter(|attempt| attempt.reason.as_deref() == Some(out_of_memory)).count();
        let told = |limit: &str| format!("{limit}; the last attempt: {}: {}", ended.reason, ended.message);
        let (reason, message) = match ended.outcome {
            AttemptOutcome::Done => return self.stage_done(plan, stage, ended.report.as_ref()),
            AttemptOutcome::Suspended => return false,
            AttemptOutcome::Final => (ended.reason.clone(), ended.message.clone()),
            AttemptOutcome::Failed if ended.reason == out_of_memory && exhausted >= OUT_OF_MEMORY_ATTEMPTS => {
                (ended.reason.clone(), ended.message.clone())
            }
            _ if stage == PodStage::Train && attempts.without_checkpoint >= LIVES => {
                let message = told(&format!("{LIVES} attempts in a row left no new checkpoint"));
                (reason::NO_PROGRESS.to_owned(), message)
            }
            AttemptOutcome::Failed if attempts.failed > max_retries => {
                let message = told(&format!("{} attempts failed, maxRetries is {max_retries}", attempts.failed));
                (reason::BACKOFF_LIMIT_EXCEEDED.to_owned(), message)
            }
            AttemptOutcome::Preempted if attempts.preempted > max_preemptions => {
                let limit =
                    format!("{} attempts were preempted, maxPreemptions is {max_preemptions}", attempts.preempted);
                (reason::PREEMPTION_LIMIT_EXCEEDED.to_owned(), told(&limit))
            }
            AttemptOutcome::Failed | AttemptOutcome::Preempted => return false,
        };
        if stage == PodStage::Publish {
            self.set(condition::PUBLISHED, ConditionStatus::False, reason::PUBLISH_FAILED, &message);
        }
        self.finish(condition::FAILED, &reason, &message);
        true
    }

    fn stage_done(&mut self, plan: &Plan, stage: PodStage, report: Option<&Report>) -> bool {
        match stage {
            PodStage::Prepare | PodStage::Report => false,
            PodStage::Train => {
                let validation = &plan.run.validation;
                let has_gates = !validation.gates.is_empty() || validation.forgetting.is_some();
                let judgement = judge(report.and_then(|report| report.validation.as_ref()), has_gates);
                self.set(condition::VALIDATION_PASSED, judgement.status, judgement.reason, &judgement.message);
                if !judgement.gate_failed || plan.run.output.publish_always {
                    return false;
                }
                self.set(condition::PUBLISHED, ConditionStatus::False, reason::GATE_FAILED, &judgement.message);
                self.finish_by_verdict(plan);
                true
            }
            PodStage::Publish => {
                if let Some(artifact) = &self.status.artifact {
                    let message = format!("{} at {}", artifact.digest, artifact.uri);
                    self.set(condition::PUBLISHED, ConditionStatus::True, reason::ARTIFACT_VERIFIED, &message);
                }
                self.finish_by_verdict(plan);
                true
            }
        }
    }

    fn finish_by_verdict(&mut self, plan: &Plan) {
        let fails = plan.run.validation.fail_on_gate;
        let found = self.status.conditions.iter().find(|condition| condition.type_ == condition::VALIDATION_PASSED);
        let (failed, message) =
            found.map_or((false, String::new()), |found| (found.status == "False", found.message.clone()));
        if failed && fails {
            self.finish(condition::FAILED, reason::VALIDATION_FAILED, &message);
        } else {
            self.finish(condition::COMPLETE, ExitCode::Done.reason(), &message);
        }
    }

    pub(super) fn finish(&mut self, name: &str, reason: &str, message: &str) {
        let other = if name == condition::COMPLETE { condition::FAILED } else { condition::COMPLETE };
        self.set(other, ConditionStatus::False, reason, "");
        self.set(condition::RUNNING, ConditionStatus::False, reason, "");
        self.set(name, ConditionStatus::True, reason, message);
        self.status.phase = Some(if name == condition::COMPLETE { Phase::Succeeded } else { Phase::Failed });
        self.status.completion_time = Some(Time(self.now));
        self.status.stage = None;
        if let Some(progress) = &mut self.status.progress {
            progress.eta = None;
            progress.estimated_remaining_seconds = None;
        }
        self.wake = time_to_live(&self.job.spec, &self.status, self.now);
    }

    pub(super) fn max_preemptions(&self) -> i32 {
        self.job.spec.failure_policy.as_ref().and_then(|policy| policy.max_preemptions).unwrap_or(20)
    }

    pub(super) fn check_deadlines(&mut self, plan: Option<&Plan>) -> bool {
        let trains =
            self.current().is_some_and(|current| current.stage == PodStage::Train && current.outcome.is_none());
        let running_since = self
            .newest_pod()
            .filter(|pod| trains && pod.running)
            .and_then(|pod| pod.started.as_ref())
            .map(|started| started.0);
        let created = self.job.metadata.creation_timestamp.as_ref().map_or(self.now, |created| created.0);
        let suspended = self.status.conditions.iter().find(|condition| condition.type_ == condition::SUSPENDED);
        let waits_since = match suspended {
            Some(held) if held.status == "True" => self.now,
            Some(held) if held.reason == reason::RESUMED => held.last_transition_time.0.max(created),
            _ => created,
        };
        let has_trained = self.status.job_refs.iter().any(|attempt| {
            attempt.stage == PodStage::Publish || (attempt.stage == PodStage::Train && attempt.start_time.is_some())
        }) || self.status.usage.as_ref().is_some_and(|usage| usage.train_seconds > 0);
        let is_trained = self
            .status
            .job_refs
            .iter()
            .any(|attempt| attempt.stage == PodStage::Train && attempt.outcome == Some(AttemptOutcome::Done));
        if is_trained {
            return false;
        }
        // Whoever holds a job does not wait for it.
        let starts = has_trained || self.job.spec.suspend;
        match deadline(&self.job.spec, &self.status, waits_since, starts, running_since, self.now) {
            Deadline::Over { reason, message } => {
                if let Some(plan) = plan {
                    self.end_by_deadline(plan, reason, &message);
                }
                self.finish(condition::FAILED, reason, &message);
                true
            }
            Deadline::In(left) => {
                self.wake_in(left);
                false
            }
            Deadline::None => false,
        }
    }

    /// The attempt that a deadline ends is counted as what it was.
    fn end_by_deadline(&mut self, plan: &Plan, reason: &str, message: &str) {
        let Some(current) = self.current().filter(|current| current.outcome.is_none()).cloned() else { return };
        let ended = Ended {
            outcome: AttemptOutcome::Final,
            reason: reason.to_owned(),
            message: message.to_owned(),
            exit_code: None,
            report: None,
        };
        self.record_end(plan, &current, &ended, Time(self.now));
    }

    fn newest_pod(&self) -> Option<&PodSeen> {
        self.observed.attempt.as_ref().and_then(|attempt| attempt.newest_pod())
    }
}
