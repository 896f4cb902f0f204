//! What a training report means for the job.

use crds::condition::{ConditionStatus, reason};
use crds::report::{ValidationReport, Verdict};

/// The condition `ValidationPassed`, and whether a gate failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// Of the condition.
    pub status: ConditionStatus,
    /// Of the condition.
    pub reason: &'static str,
    /// Of the condition.
    pub message: String,
    /// A gate, or the tolerance for forgetting, does not hold.
    pub gate_failed: bool,
}

impl Judgement {
    /// Whether it speaks against the result.
    pub fn is_against(&self) -> bool {
        self.status == ConditionStatus::False
    }
}

/// Judges what validation found. A report that had to be short may not list the gates that hold: the plan knows of them.
pub fn judge(validation: Option<&ValidationReport>, has_gates: bool) -> Judgement {
    let Some(validation) = validation else {
        if has_gates {
            let message = "the report does not say what the gates found".to_owned();
            return Judgement {
                status: ConditionStatus::False,
                reason: reason::GATE_FAILED,
                message,
                gate_failed: true,
            };
        }
        let message = "nothing was validated".to_owned();
        return Judgement { status: ConditionStatus::Unknown, reason: reason::NO_GATES, message, gate_failed: false };
    };
    let message = validation.summary.clone();
    if validation.verdict == Verdict::GateFailed {
        // A metric that is NaN or infinite is never reported: its gate has nothing to show.
        let unseen = validation.gates.iter().any(|gate| !gate.passed && gate.observed.is_none());
        let reason = if unseen { reason::NON_FINITE_METRIC } else { reason::GATE_FAILED };
        return Judgement { status: ConditionStatus::False, reason, message, gate_failed: true };
    }
    if has_gates {
        return Judgement { status: ConditionStatus::True, reason: reason::GATES_PASSED, message, gate_failed: false };
    }
    Judgement { status: ConditionStatus::Unknown, reason: reason::NO_GATES, message, gate_failed: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_nobody_saw_does_not_hold() {
        let unseen = judge(None, true);
        assert!(unseen.gate_failed && unseen.status == ConditionStatus::False, "{unseen:?}");
        let none = judge(None, false);
        assert!(!none.gate_failed && none.status == ConditionStatus::Unknown, "{none:?}");
    }
}
