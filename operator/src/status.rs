//! Tells in the status what was decided, and what is seen. Pure: [`render`] decides nothing. Everything that a decision depends
//! on later is recorded here first: an attempt is listed before its Job is made, and how it ended before the next one is listed.

mod attempt;
mod conditions;
pub mod convert;
mod running;

use std::time::Duration;

use crds::FineTuneJobStatus;
use crds::condition::{self, ConditionStatus, reason, set_condition};
use crds::finetunejob::{AttemptOutcome, AttemptsStatus, JobReference, Phase, ResolvedStatus};
use crds::run::PodStage;
use crds::status::{condition, found, holds};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::build;
use crate::decide::{Decision, Step, nothing_was_made};
use crate::facts::Facts;
use crate::policy::deadline::time_to_live;
use crate::validate::Plan;

/// Attempts that the status lists.
pub(crate) const LISTED_ATTEMPTS: usize = 16;
/// Between two looks at what no watch tells of.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// What became of the objects that this pass tried to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Kind and name of an object of somebody else that is in the way.
    pub name_taken: Option<String>,
    /// Kind and name of an object that is left from a job of the same name.
    pub leftover: Option<String>,
    /// What the API server said when it refused an object.
    pub refused: Option<String>,
    /// The same of the word to stop.
    pub stop_refused: Option<String>,
    /// This pass made the ConfigMap that holds the plan: it holds the plan of this pass.
    pub plan_was_recorded: bool,
    /// The word to stop is in its ConfigMap.
    pub stop_was_told: bool,
    /// The Job that was made for the newest attempt.
    pub created: Option<Created>,
}

/// A Job that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// `metadata.uid`
    pub uid: String,
    /// Digest of its pod.
    pub pod_digest: String,
}

/// The next status, and when to look again without a change.
#[derive(Clone, Debug, PartialEq)]
pub struct Next {
    /// Equal to the last one if nothing is new.
    pub status: FineTuneJobStatus,
    /// `None`: only a change can matter.
    pub wake: Option<Duration>,
}

/// The next status of a job.
pub fn render(decision: &Decision, facts: &Facts, applied: &Applied) -> Next {
    let mut status = facts.status().clone();
    status.observed_generation = facts.job.metadata.generation;
    let mut rendering = Rendering { facts, decision, applied, status, wake: decision.wake };
    if matches!(decision.step, Step::Rest { .. }) {
        // Also where an operator ended the job that knew nothing of these conditions.
        rendering.follow_kstatus();
        return Next { status: rendering.status, wake: decision.wake };
    }
    rendering.run();
    Next { status: rendering.status, wake: rendering.wake.map(|wake| wake.max(Duration::from_secs(1))) }
}

struct Rendering<'a> {
    facts: &'a Facts<'a>,
    decision: &'a Decision,
    applied: &'a Applied,
    status: FineTuneJobStatus,
    wake: Option<Duration>,
}

impl Rendering<'_> {
    /// Every sentence passes here: whoever it is from, it is bounded.
    fn set(&mut self, name: &str, status: ConditionStatus, reason: &str, message: &str) {
        let (generation, message) = (self.facts.job.metadata.generation, convert::message(message));
        set_condition(&mut self.status.conditions, name, status, reason, &message, generation, Time(self.facts.now));
    }

    fn wake_in(&mut self, after: Duration) {
        self.wake = Some(self.wake.map_or(after, |wake| wake.min(after)));
    }

    fn run(&mut self) {
        for name in condition::TYPES {
            if condition(&self.status, name).is_none() {
                self.set(name, ConditionStatus::Unknown, reason::PENDING, "");
            }
        }
        // Every condition is about the newest generation, also where nothing else about it is new.
        for condition in &mut self.status.conditions {
            condition.observed_generation = self.facts.job.metadata.generation;
        }
        match self.facts.plan {
            Ok(plan) => self.accepted(plan),
            Err(invalid) if self.decision.step == Step::Refuse => {
                self.set(condition::ACCEPTED, ConditionStatus::False, invalid.reason, &invalid.message);
                self.status.phase = Some(Phase::Pending);
            }
            Err(_) => {}
        }
        self.finish();
        self.follow_kstatus();
    }

    fn accepted(&mut self, plan: &Plan) {
        if let Some(taken) = &self.applied.name_taken {
            // An attempt is not disturbed by what is in the way of something else.
            let message = format!("{taken} belongs to somebody else; delete it, or give the job another name");
            self.set(condition::ACCEPTED, ConditionStatus::False, reason::CHILD_NAME_TAKEN, &message);
            self.wake_in(LOOK_AGAIN);
        } else {
            self.accept(plan);
        }
        self.note_attempt(plan);
        self.record(plan);
        if let Some(judgement) = &self.decision.judgement {
            self.set(condition::VALIDATION_PASSED, judgement.status, judgement.reason, &judgement.message);
        }
        match &self.decision.step {
            Step::Hold { .. } => {
                let message = "spec.suspend is true";
                self.set(condition::SUSPENDED, ConditionStatus::True, reason::SUSPENDED_BY_USER, message);
            }
            _ if holds(&self.status, condition::SUSPENDED) => {
                self.set(condition::SUSPENDED, ConditionStatus::False, reason::RESUMED, "");
            }
            _ => {}
        }
        if let Step::List { stage, attempt } = self.decision.step {
            self.list(stage, attempt);
        }
        if !matches!(self.decision.step, Step::Finish { .. }) {
            self.describe(plan);
        }
    }

    fn accept(&mut self, plan: &Plan) {
        if nothing_was_made(self.facts.status(), self.facts.observed) {
            let resolved = self.status.resolved.get_or_insert_with(ResolvedStatus::default);
            resolved.hyperparameters = Some(crds::resolve::hyperparameters_spec(&plan.run.hyperparameters));
            resolved.image = Some(plan.pods.image.clone());
            resolved.claim = Some(plan.claim.name().to_owned());
            resolved.plan_digest = Some(plan.digest());
        }
        self.set(condition::ACCEPTED, ConditionStatus::True, reason::RESOLVED, "");
        let is_unknown = found(&self.status, condition::PUBLISHED, ConditionStatus::Unknown).is_some();
        if plan.run.output.uri.is_none() && is_unknown {
            let message = "the output stays on the volume of the run";
            self.set(condition::PUBLISHED, ConditionStatus::Unknown, reason::NOT_REQUESTED, message);
        }
    }

    fn current(&self) -> Option<&JobReference> {
        self.status.job_refs.last()
    }

    fn list(&mut self, stage: PodStage, attempt: i32) {
        if stage == PodStage::Train {
            self.status.attempts.get_or_insert_with(AttemptsStatus::default).total += 1;
        }
        self.status.stage = Some(stage);
        self.status.job_refs.push(JobReference {
            name: build::stage_job_name(self.facts.job, stage, attempt),
            stage,
            attempt,
            uid: None,
            pod_digest: None,
            start_time: None,
            completion_time: None,
            outcome: None,
            reason: None,
        });
        let excess = self.status.job_refs.len().saturating_sub(LISTED_ATTEMPTS);
        self.status.job_refs.drain(..excess);
    }

    fn finish(&mut self) {
        let Step::Finish { condition: name, reason, message } = &self.decision.step else { return };
        self.tell_published(message);
        let other = if *name == condition::COMPLETE { condition::FAILED } else { condition::COMPLETE };
        self.set(other, ConditionStatus::False, reason, "");
        self.set(condition::RUNNING, ConditionStatus::False, reason, "");
        self.set(name, ConditionStatus::True, reason, message);
        self.status.phase = Some(if *name == condition::COMPLETE { Phase::Succeeded } else { Phase::Failed });
        self.status.completion_time = Some(Time(self.facts.now));
        self.status.stage = None;
        if let Some(progress) = &mut self.status.progress {
            progress.eta = None;
            progress.estimated_remaining_seconds = None;
        }
        self.wake = time_to_live(&self.facts.job.spec, &self.status, self.facts.now);
    }

    /// What the end of the job means for its result's way to its destination.
    fn tell_published(&mut self, message: &str) {
        if let Some(judgement) = self.decision.judgement.as_ref().filter(|judgement| judgement.gate_failed) {
            self.set(condition::PUBLISHED, ConditionStatus::False, reason::GATE_FAILED, &judgement.message);
        }
        let Some(recorded) = &self.decision.ended else { return };
        if self.current().is_none_or(|current| current.stage != PodStage::Publish) {
            return;
        }
        if recorded.ended.outcome != AttemptOutcome::Done {
            self.set(condition::PUBLISHED, ConditionStatus::False, reason::PUBLISH_FAILED, message);
        } else if let Some(artifact) = &self.status.artifact {
            let message = format!("{} at {}", artifact.digest, artifact.uri);
            self.set(condition::PUBLISHED, ConditionStatus::True, reason::ARTIFACT_VERIFIED, &message);
        }
    }
}
