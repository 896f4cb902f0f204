//! Is the result worth using? Pure: measurements and gates in, gate results, verdict and one plain sentence out.
//!
//! The tuned model and a baseline are compared on the same rows, pair by pair, at 5 %. Exact match: the exact two-sided
//! sign test over the rows that only one of the two answers right (McNemar's test with binomial probabilities). Loss: a
//! 95 % t interval of the difference of the two mean losses per token, a ratio of sums over rows, so that a row counts by
//! its tokens and the tokens of a row are not taken for independent.

use crds::report::{ForgettingResult, GateResult, Generation, Scores, ValidationReport, Verdict};
use crds::run::{Baseline, Gate, Metric, ValidationConfig};

use crate::evaluate::Measurement;

/// A difference that chance makes more often than this is not taken for real.
const SIGNIFICANCE: f64 = 0.05;
/// Fewer pairs than this decide nothing: with five, the sign test cannot reach 5 % either.
const FEWEST_PAIRS: usize = 6;
/// Where no model answers this share of the rows exactly, the answers are free text and the loss decides.
const FEWEST_EXACT: f64 = 0.05;

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Step of the judged weights.
    pub step: i64,
    /// The tuned model.
    pub tuned: Measurement,
    /// The base model.
    pub zero_shot: Option<Measurement>,
    /// The base model with examples in the prompt.
    pub few_shot: Option<Measurement>,
    /// Loss on general text, base and tuned.
    pub general_loss: Option<(f64, f64)>,
}

/// Judges what was measured.
pub fn judge(config: &ValidationConfig, measured: &Measured) -> ValidationReport {
    let gates: Vec<GateResult> = config.gates.iter().map(|gate| check_gate(gate, measured)).collect();
    let general_loss = measured.general_loss.filter(|(base, tuned)| base.is_finite() && tuned.is_finite());
    let forgetting =
        config.forgetting.as_ref().zip(general_loss).map(|(limit, (base_loss, tuned_loss))| ForgettingResult {
            base_loss,
            tuned_loss,
            max_loss_increase: limit.max_loss_increase,
            passed: tuned_loss - base_loss <= limit.max_loss_increase,
        });
    let forgot = match (&config.forgetting, forgetting) {
        (Some(_), None) => Some("forgetting, which could not be measured,"),
        (_, Some(forgetting)) if !forgetting.passed => Some("forgetting"),
        _ => None,
    };
    let failed: Vec<String> = gates
        .iter()
        .filter(|gate| !gate.passed)
        .map(|gate| crate::display::describe_gate(&gate.gate))
        .chain(forgot.map(str::to_owned))
        .collect();
    let (verdict, summary) = if failed.is_empty() {
        compare(config.metric, measured)
    } else {
        (Verdict::GateFailed, format!("Do not use it: {} did not hold.", failed.join("; ")))
    };
    let generation = Generation {
        tuned: measured.tuned.generated,
        zero_shot: measured.zero_shot.as_ref().and_then(|base| base.generated),
        few_shot: measured.few_shot.as_ref().and_then(|few_shot| few_shot.generated),
    };
    let some = |count: usize| (count > 0).then_some(count as i64);
    ValidationReport {
        rows: measured.tuned.num_scored() as i64,
        generated_rows: some(measured.tuned.num_answered()),
        generation: (generation != Generation::default()).then_some(generation),
        step: measured.step,
        tuned: measured.tuned.scores(),
        zero_shot: measured.zero_shot.as_ref().map(Measurement::scores),
        few_shot: measured.few_shot.as_ref().map(Measurement::scores),
        few_shot_rows: measured.few_shot.as_ref().and_then(|few_shot| some(few_shot.num_scored())),
        few_shot_examples: measured.few_shot.as_ref().map(|_| config.few_shot_examples),
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
    let value = |measurement: &Measurement| measurement.scores().get(metric).filter(|value| value.is_finite());
    let other = baseline.and_then(|baseline| match baseline {
        Baseline::Base => measured.zero_shot.as_ref(),
        Baseline::FewShot => measured.few_shot.as_ref(),
    });
    let (observed, baseline) = match other {
        Some(other) => {
            let (tuned, other) = measured.tuned.shared(other);
            (value(&tuned), value(&other))
        }
        None => (value(&measured.tuned), None),
    };
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

/// The tuned model beside one baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Worse,
    /// No difference that is more than chance.
    Chance,
    Better,
}

/// One comparison on the rows that both have.
#[derive(Clone, Copy, Debug)]
struct Comparison {
    name: &'static str,
    outcome: Outcome,
    tuned: f64,
    baseline: f64,
    rows: usize,
}

/// Compares with each baseline that was measured and tells of the one that is hardest to beat: by exact match where it can
/// tell models apart or was asked for, else by loss.
fn compare(metric: Metric, measured: &Measured) -> (Verdict, String) {
    let not_validated = |text: &str| (Verdict::NotValidated, text.to_owned());
    if measured.tuned.scores() == Scores::default() {
        return not_validated("Not validated: set dataset.validation or dataset.splitPercent to have it judged.");
    }
    let baselines: Vec<(&str, &Measurement)> = [
        ("the base model", measured.zero_shot.as_ref()),
        ("the base model with examples in its prompt", measured.few_shot.as_ref()),
    ]
    .into_iter()
    .filter_map(|(name, measurement)| Some((name, measurement?)))
    .collect();
    let exact: Vec<Comparison> =
        baselines.iter().filter_map(|&(name, other)| compare_exact(name, &measured.tuned, other)).collect();
    let some_are_exact = exact.iter().any(|comparison| comparison.tuned.max(comparison.baseline) >= FEWEST_EXACT);
    if let Some(hardest) = hardest(&exact, Metric::ExactMatch)
        && (metric == Metric::ExactMatch || some_are_exact)
    {
        return describe_exact(&hardest);
    }
    let losses: Vec<Comparison> =
        baselines.iter().filter_map(|&(name, other)| compare_loss(name, &measured.tuned, other)).collect();
    match hardest(&losses, Metric::EvalLoss) {
        Some(hardest) => describe_loss(&hardest),
        None => not_validated("Not judged: no baseline was measured that it could be compared with."),
    }
}

/// The comparison that speaks most against the tuned model; of equal ones the first.
fn hardest(comparisons: &[Comparison], metric: Metric) -> Option<Comparison> {
    let advantage = |comparison: &Comparison| {
        let difference = comparison.tuned - comparison.baseline;
        if metric.lower_is_better() { -difference } else { difference }
    };
    let order =
        |a: &&Comparison, b: &&Comparison| a.outcome.cmp(&b.outcome).then(advantage(a).total_cmp(&advantage(b)));
    comparisons.iter().min_by(order).copied()
}

fn compare_exact(name: &'static str, tuned: &Measurement, other: &Measurement) -> Option<Comparison> {
    let (tuned, other) = tuned.shared(other);
    let pairs = tuned.hits.iter().flatten().zip(other.hits.iter().flatten());
    let only = |ours: bool| pairs.clone().filter(|&(&a, &b)| a == ours && b != ours).count();
    let (wins, losses) = (only(true), only(false));
    let outcome = match sign_test(wins, losses) {
        p if p >= SIGNIFICANCE => Outcome::Chance,
        _ if wins > losses => Outcome::Better,
        _ => Outcome::Worse,
    };
    let (tuned_share, share) = tuned.scores().exact_match.zip(other.scores().exact_match)?;
    Some(Comparison { name, outcome, tuned: tuned_share, baseline: share, rows: tuned.num_answered() })
}

/// Probability that fair coins fall at least as unevenly as `wins` against `losses`, to either side.
fn sign_test(wins: usize, losses: usize) -> f64 {
    let pairs = wins + losses;
    let mut log_probability = -(pairs as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for heads in 0..=wins.min(losses) {
        tail += log_probability.exp();
        log_probability += ((pairs - heads) as f64 / (heads + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

fn compare_loss(name: &'static str, tuned: &Measurement, other: &Measurement) -> Option<Comparison> {
    let (tuned, other) = tuned.shared(other);
    let (tuned_loss, loss) = tuned.scores().eval_loss.zip(other.scores().eval_loss)?;
    let rows = tuned.num_scored();
    let tokens: f64 = tuned.losses.iter().map(|row| row.tokens as f64).sum();
    let difference = loss - tuned_loss;
    // What each row adds to the difference of the sums, beyond its tokens' share of it.
    let squares: f64 = tuned
        .losses
        .iter()
        .zip(&other.losses)
        .map(|(ours, theirs)| (theirs.loss_sum - ours.loss_sum - difference * ours.tokens as f64).powi(2))
        .sum();
    let degrees = rows.saturating_sub(1) as f64;
    let error = (rows as f64 / degrees * squares).sqrt() / tokens;
    let outcome = if !tuned_loss.is_finite() {
        Outcome::Worse
    } else if rows >= FEWEST_PAIRS && difference > t_quantile(degrees) * error {
        Outcome::Better
    } else if rows >= FEWEST_PAIRS && -difference > t_quantile(degrees) * error {
        Outcome::Worse
    } else {
        Outcome::Chance
    };
    Some(Comparison { name, outcome, tuned: tuned_loss, baseline: loss, rows })
}

/// What a t-distributed value exceeds in size with a probability of 5 %; within 0.2 % from five degrees of freedom up
/// (Cornish and Fisher's expansion).
fn t_quantile(degrees: f64) -> f64 {
    let z: f64 = 1.959_963_985;
    z + (z.powi(3) + z) / (4.0 * degrees)
        + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * degrees.powi(2))
        + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * degrees.powi(3))
}

fn describe_exact(comparison: &Comparison) -> (Verdict, String) {
    let Comparison { name, outcome, tuned, baseline, rows } = *comparison;
    let (tuned, percent) = (100.0 * tuned, 100.0 * baseline);
    let answers = format!("it answers {tuned:.1} % of unseen rows exactly");
    match outcome {
        Outcome::Better => (Verdict::Better, format!("Worth it: {answers}, {name} {percent:.1} %.")),
        Outcome::Worse => (
            Verdict::NotWorthIt,
            format!("Not worth it: {answers}, and {name} does better with {percent:.1} %. Use {name} instead."),
        ),
        Outcome::Chance => {
            let advice = if baseline > 0.0 { format!(" Use {name} instead.") } else { String::new() };
            let text = format!(
                "Not worth it: {answers} and {name} {percent:.1} %, no difference that is more than chance on {rows} rows.{advice}"
            );
            (Verdict::NotWorthIt, text)
        }
    }
}

fn describe_loss(comparison: &Comparison) -> (Verdict, String) {
    let Comparison { name, outcome, tuned, baseline, rows } = *comparison;
    let losses = format!("its loss on unseen rows is {tuned:.3}");
    match outcome {
        Outcome::Better => (Verdict::Better, format!("Worth it: {losses}, that of {name} {baseline:.3}.")),
        Outcome::Worse => (
            Verdict::NotWorthIt,
            format!("Not worth it: {losses}, and {name} does better with {baseline:.3}. Use {name} instead."),
        ),
        Outcome::Chance => {
            let text = format!(
                "Not worth it: {losses} and that of {name} {baseline:.3}, no difference that is more than chance on {rows} \
                 rows. Use {name} instead."
            );
            (Verdict::NotWorthIt, text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::RowScore;
    use crds::run::{DataFormat, DataSource, Evaluate, Forgetting};

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

    /// A measurement of rows of ten tokens with these mean losses.
    fn losses(means: &[f64]) -> Measurement {
        let row = |mean: &f64| RowScore { loss_sum: 10.0 * mean, tokens: 10, ..RowScore::default() };
        Measurement { losses: means.iter().map(row).collect(), ..Measurement::default() }
    }

    /// A measurement of answers, of which the rows in `right` are right.
    fn answers(rows: usize, right: std::ops::Range<usize>) -> Measurement {
        Measurement { hits: (0..rows).map(|row| Some(right.contains(&row))).collect(), ..losses(&vec![1.0; rows]) }
    }

    fn measured(tuned: Measurement, zero_shot: Measurement) -> Measured {
        Measured { tuned, zero_shot: Some(zero_shot), ..Measured::default() }
    }

    fn check(measured: &Measured, verdict: Verdict, summary: &str) {
        let report = judge(&config(vec![]), measured);
        assert_eq!((report.verdict, report.summary.as_str()), (verdict, summary));
    }

    #[test]
    fn the_sign_test_is_exact() {
        for (wins, losses, expected) in [
            (0, 0, 1.0),
            (1, 0, 1.0),
            (5, 0, 0.0625),
            (6, 0, 0.03125),
            (0, 6, 0.03125),
            (7, 7, 1.0),
            (9, 1, 0.021_484_375),
        ] {
            let p = sign_test(wins, losses);
            assert!((p - expected).abs() < 1e-12, "{wins} {losses}: {p}");
        }
        assert!((0.0..1e-300).contains(&sign_test(5000, 0)));
        for (degrees, expected) in [(5.0, 2.5706), (10.0, 2.2281), (149.0, 1.9760)] {
            assert!((t_quantile(degrees) / expected - 1.0).abs() < 2e-3, "{degrees}");
        }
    }

    #[test]
    fn one_row_more_is_chance_however_sure_the_shares_look() {
        check(
            &measured(answers(150, 0..150), answers(150, 0..149)),
            Verdict::NotWorthIt,
            "Not worth it: it answers 100.0 % of unseen rows exactly and the base model 99.3 %, no difference that is more \
             than chance on 150 rows. Use the base model instead.",
        );
        check(
            &measured(answers(150, 0..30), answers(150, 0..0)),
            Verdict::Better,
            "Worth it: it answers 20.0 % of unseen rows exactly, the base model 0.0 %.",
        );
        // The same shares: what counts is on how many rows only one of the two is right.
        let shares = |tuned, base| judge(&config(vec![]), &measured(answers(100, tuned), answers(100, base))).verdict;
        assert_eq!(shares(0..60, 0..54), Verdict::Better);
        assert_eq!(shares(0..60, 46..100), Verdict::NotWorthIt);
    }

    #[test]
    fn a_worse_result_is_called_worse() {
        let mut measured = measured(answers(100, 0..10), answers(100, 0..50));
        measured.few_shot = Some(answers(100, 0..60));
        check(
            &measured,
            Verdict::NotWorthIt,
            "Not worth it: it answers 10.0 % of unseen rows exactly, and the base model with examples in its prompt does \
             better with 60.0 %. Use the base model with examples in its prompt instead.",
        );
        check(
            &self::measured(losses(&[1.5, 1.6, 1.7, 1.8, 1.9, 2.0]), losses(&[1.0, 1.2, 1.2, 1.4, 1.4, 1.5])),
            Verdict::NotWorthIt,
            "Not worth it: its loss on unseen rows is 1.750, and the base model does better with 1.283. Use the base model \
             instead.",
        );
    }

    #[test]
    fn a_loss_needs_more_than_chance_too() {
        check(
            &measured(losses(&[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]), losses(&[2.0, 1.0, 2.0, 1.1, 2.0, 1.0, 1.0])),
            Verdict::NotWorthIt,
            "Not worth it: its loss on unseen rows is 1.429 and that of the base model 1.443, no difference that is more than \
             chance on 7 rows. Use the base model instead.",
        );
        let few = judge(&config(vec![]), &measured(losses(&[1.0; 5]), losses(&[2.0; 5])));
        assert_eq!(few.verdict, Verdict::NotWorthIt);
        let broken = judge(&config(vec![]), &measured(losses(&[f64::NAN; 9]), losses(&[2.0; 9])));
        assert_eq!(broken.verdict, Verdict::NotWorthIt);
    }

    #[test]
    fn free_text_is_judged_by_loss_against_the_better_baseline() {
        let free = |mean: f64, rows: usize| {
            let means: Vec<f64> = (0..rows).map(|row| mean + 0.01 * (row % 3) as f64).collect();
            Measurement { hits: vec![Some(false); rows], ..losses(&means) }
        };
        let mut measured = measured(free(1.0, 50), free(2.0, 50));
        // Fewer rows than the others: they fill the context.
        measured.few_shot = Some(free(1.5, 20));
        check(
            &measured,
            Verdict::Better,
            "Worth it: its loss on unseen rows is 1.009, that of the base model with examples in its prompt 1.509.",
        );
        measured.few_shot = Some(free(0.5, 20));
        assert_eq!(judge(&config(vec![]), &measured).verdict, Verdict::NotWorthIt);
        // Whoever asked for exact match gets it.
        let config = ValidationConfig { metric: Metric::ExactMatch, ..config(vec![]) };
        assert_eq!(judge(&config, &measured).verdict, Verdict::NotWorthIt);
    }

    #[test]
    fn nothing_to_compare_with_is_not_validated() {
        let alone = Measured { tuned: answers(9, 0..9), ..Measured::default() };
        assert_eq!(judge(&config(vec![]), &alone).verdict, Verdict::NotValidated);
        let summary = judge(&config(vec![]), &Measured::default()).summary;
        assert!(summary.starts_with("Not validated: set dataset.validation"), "{summary}");
    }

    #[test]
    fn gates_look_at_the_right_side_and_nan_never_passes() {
        let metric = Metric::ExactMatch;
        let mut measured = measured(answers(100, 0..80), answers(100, 0..0));
        measured.few_shot = Some(answers(100, 0..30));
        let gate = |gate| judge(&config(vec![gate]), &measured).gates[0].passed;
        assert!(gate(Gate::AtLeast { metric, value: 0.8 }));
        assert!(!gate(Gate::AtMost { metric, value: 0.7 }));
        assert!(gate(Gate::ImprovesOn { metric, baseline: Baseline::FewShot, by: 0.4 }));
        assert!(!gate(Gate::ImprovesOn { metric, baseline: Baseline::FewShot, by: 0.6 }));
        let broken = self::measured(losses(&[f64::NAN; 9]), losses(&[2.0; 9]));
        let report = judge(&config(vec![Gate::AtMost { metric: Metric::EvalLoss, value: 9.0 }]), &broken);
        assert_eq!((report.gates[0].passed, report.verdict), (false, Verdict::GateFailed));
    }

    #[test]
    fn a_few_shot_gate_on_loss_compares_the_rows_that_both_have() {
        let gate = Gate::ImprovesOn { metric: Metric::EvalLoss, baseline: Baseline::FewShot, by: 0.5 };
        // The first two rows are what the few-shot prompt fits into; on the others the tuned model is bad.
        let mut measured = measured(losses(&[1.0, 1.0, 9.0, 9.0]), losses(&[9.0; 4]));
        measured.few_shot = Some(losses(&[2.0, 2.0]));
        let report = judge(&config(vec![gate]), &measured);
        let result = &report.gates[0];
        assert_eq!((result.observed, result.baseline, result.passed), (Some(1.0), Some(2.0), true));
        assert_eq!((report.rows, report.few_shot_rows), (4, Some(2)));
    }

    #[test]
    fn forgetting_that_could_not_be_measured_does_not_pass() {
        let dataset = DataSource {
            uri: "file:///general.jsonl".into(),
            format: DataFormat::Auto,
            column_map: std::collections::BTreeMap::new(),
            secret_path: None,
        };
        let forgetting = Some(Forgetting { dataset, max_loss_increase: 0.1 });
        let config = ValidationConfig { forgetting, ..config(vec![]) };
        for (general_loss, expected) in [
            (None, Verdict::GateFailed),
            (Some((1.0, f64::NAN)), Verdict::GateFailed),
            (Some((1.0, 1.05)), Verdict::Better),
        ] {
            let measured = Measured { general_loss, ..measured(answers(100, 0..80), answers(100, 0..0)) };
            let report = judge(&config, &measured);
            assert_eq!(report.verdict, expected, "{}", report.summary);
        }
    }
}
