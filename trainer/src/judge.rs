//! Is the result worth using? Pure: scores and gates in, gate results, verdict and one plain sentence out.

use crds::report::{ForgettingResult, GateResult, Scores, ValidationReport, Verdict};
use crds::run::{Baseline, Gate, ValidationConfig};

/// Standard errors by which two shares must differ before the difference is taken for real (95 %).
const SIGNIFICANT: f64 = 1.96;

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Validation rows.
    pub rows: i64,
    /// Rows that were answered.
    pub generated_rows: i64,
    /// Step of the judged weights.
    pub step: i64,
    /// The tuned model.
    pub tuned: Scores,
    /// The base model.
    pub zero_shot: Option<Scores>,
    /// The base model with examples in the prompt.
    pub few_shot: Option<Scores>,
    /// Loss on general text, base and tuned.
    pub general_loss: Option<(f64, f64)>,
}

/// Judges what was measured.
pub fn judge(config: &ValidationConfig, measured: &Measured) -> ValidationReport {
    let gates: Vec<GateResult> = config.gates.iter().map(|gate| check_gate(gate, measured)).collect();
    let forgetting = config.forgetting.as_ref().zip(measured.general_loss).map(|(limit, (base_loss, tuned_loss))| {
        ForgettingResult {
            base_loss,
            tuned_loss,
            max_loss_increase: limit.max_loss_increase,
            passed: tuned_loss - base_loss <= limit.max_loss_increase,
        }
    });
    let failed: Vec<String> = gates
        .iter()
        .filter(|gate| !gate.passed)
        .map(|gate| crate::display::describe_gate(&gate.gate))
        .chain(forgetting.filter(|forgetting| !forgetting.passed).map(|_| "forgetting".to_owned()))
        .collect();
    let (verdict, summary) = if failed.is_empty() {
        compare(measured)
    } else {
        (Verdict::GateFailed, format!("Do not use it: {} did not hold.", failed.join("; ")))
    };
    ValidationReport {
        rows: measured.rows,
        generated_rows: (measured.generated_rows > 0).then_some(measured.generated_rows),
        step: measured.step,
        tuned: measured.tuned,
        zero_shot: measured.zero_shot,
        few_shot: measured.few_shot,
        few_shot_examples: measured.few_shot.map(|_| config.few_shot_examples),
        forgetting,
        gates,
        verdict,
        summary,
    }
}

fn check_gate(gate: &Gate, measured: &Measured) -> GateResult {
    let (metric, baseline) = match *gate {
        Gate::AtMost { metric, .. } | Gate::AtLeast { metric, .. } => (metric, None),
        Gate::ImprovesOn { metric, baseline, .. } => (metric, Some(baseline)),
    };
    // A value that is not finite never passes.
    let value = |scores: &Scores| scores.get(metric).filter(|value| value.is_finite());
    let observed = value(&measured.tuned);
    let baseline = baseline
        .and_then(|baseline| match baseline {
            Baseline::Base => measured.zero_shot.as_ref(),
            Baseline::FewShot => measured.few_shot.as_ref(),
        })
        .and_then(value);
    let passed = match (*gate, observed, baseline) {
        (Gate::AtMost { value, .. }, Some(observed), _) => observed <= value,
        (Gate::AtLeast { value, .. }, Some(observed), _) => observed >= value,
        (Gate::ImprovesOn { by, .. }, Some(observed), Some(baseline)) => {
            (if metric.lower_is_better() { baseline - observed } else { observed - baseline }) >= by
        }
        _ => false,
    };
    GateResult { gate: *gate, observed, baseline, passed }
}

/// Compares with the baselines: by exact match where rows were answered, else by loss.
fn compare(measured: &Measured) -> (Verdict, String) {
    let baselines = [("the base model", measured.zero_shot), ("a few examples in the prompt", measured.few_shot)];
    let baselines: Vec<(&str, Scores)> =
        baselines.into_iter().filter_map(|(name, scores)| Some((name, scores?))).collect();
    if let Some(tuned) = measured.tuned.exact_match {
        let rows = measured.generated_rows.max(1) as f64;
        let matches: Vec<(&str, f64)> =
            baselines.iter().filter_map(|(name, scores)| Some((*name, scores.exact_match?))).collect();
        let best = matches.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
        return match best {
            None => (Verdict::NotValidated, "Nothing to compare with: no baseline was measured.".into()),
            Some((name, value)) => {
                let error = ((tuned * (1.0 - tuned) + value * (1.0 - value)) / rows).sqrt();
                let (tuned_percent, percent) = (100.0 * tuned, 100.0 * value);
                if tuned - value > SIGNIFICANT * error {
                    let text = format!(
                        "Worth it: it answers {tuned_percent:.1} % of unseen rows exactly, {name} {percent:.1} %."
                    );
                    (Verdict::Better, text)
                } else {
                    let text = format!(
                        "Not worth it: it answers {tuned_percent:.1} % of unseen rows exactly, and {name} already {percent:.1} %; \
                         the difference is within chance. Use {name} instead."
                    );
                    (Verdict::NotWorthIt, text)
                }
            }
        };
    }
    match (measured.tuned.eval_loss, baselines.first().and_then(|(_, scores)| scores.eval_loss)) {
        (Some(tuned), Some(base)) if tuned < base => {
            (Verdict::Better, format!("Better than the base model: validation loss {tuned:.3} against {base:.3}."))
        }
        (Some(tuned), Some(base)) => (
            Verdict::NotWorthIt,
            format!("Not worth it: validation loss {tuned:.3}, and the base model has {base:.3}."),
        ),
        _ => (
            Verdict::NotValidated,
            "Not validated: set dataset.validation or dataset.splitPercent to have it judged.".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::run::{Evaluate, Metric};

    fn config(gates: Vec<Gate>) -> ValidationConfig {
        ValidationConfig {
            every_steps: None,
            metric: Metric::EvalLoss,
            evaluate: Evaluate::Best,
            zero_shot: true,
            few_shot_examples: 4,
            gates,
            forgetting: None,
            fail_on_gate: true,
        }
    }

    fn scores(exact_match: f64) -> Scores {
        Scores { exact_match: Some(exact_match), eval_loss: Some(1.0), ..Scores::default() }
    }

    fn measured(tuned: f64, zero_shot: f64, few_shot: f64) -> Measured {
        Measured {
            rows: 150,
            generated_rows: 150,
            tuned: scores(tuned),
            zero_shot: Some(scores(zero_shot)),
            few_shot: Some(scores(few_shot)),
            ..Measured::default()
        }
    }

    #[test]
    fn the_verdict_needs_more_than_chance() {
        for (tuned, zero_shot, few_shot, expected) in [
            (0.8, 0.0, 0.1, Verdict::Better),
            (0.8, 0.0, 0.78, Verdict::NotWorthIt),
            (0.1, 0.5, 0.2, Verdict::NotWorthIt),
        ] {
            assert_eq!(judge(&config(vec![]), &measured(tuned, zero_shot, few_shot)).verdict, expected);
        }
    }

    #[test]
    fn gates_look_at_the_right_side_and_nan_never_passes() {
        let metric = Metric::ExactMatch;
        let gate = |gate| judge(&config(vec![gate]), &measured(0.8, 0.0, 0.3)).gates[0].passed;
        assert!(gate(Gate::AtLeast { metric, value: 0.8 }));
        assert!(!gate(Gate::AtMost { metric, value: 0.7 }));
        assert!(gate(Gate::ImprovesOn { metric, baseline: Baseline::FewShot, by: 0.4 }));
        assert!(!gate(Gate::ImprovesOn { metric, baseline: Baseline::FewShot, by: 0.6 }));
        let mut broken = measured(0.8, 0.0, 0.3);
        broken.tuned.eval_loss = Some(f64::NAN);
        let report = judge(&config(vec![Gate::AtMost { metric: Metric::EvalLoss, value: 9.0 }]), &broken);
        assert_eq!((report.gates[0].passed, report.verdict), (false, Verdict::GateFailed));
    }
}
