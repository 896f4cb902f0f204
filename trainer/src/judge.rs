//! Is the result worth using? Pure: measurements and gates in, gate results, verdict and one plain sentence out.
//!
//! The tuned model and a baseline are compared on the same rows, pair by pair, at 5 %. Exact match: the exact two-sided
//! sign test over the rows that only one of the two answers right (McNemar's test with binomial probabilities). Loss: a
//! 95 % t interval of the difference of the two mean losses per token, a ratio of sums over rows, so that a row counts by
//! its tokens and the tokens of a row are not taken for independent.

pub mod evaluate;
pub mod generate;
#[cfg(test)]
mod tests;

use crds::report::{ForgettingResult, GateResult, Generation, Scores, ValidationReport, Verdict};
use crds::run::{Baseline, Gate, Metric, ValidationConfig};

use crate::judge::evaluate::Measurement;

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
        .map(|gate| crate::tell::display::describe_gate(&gate.gate))
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
