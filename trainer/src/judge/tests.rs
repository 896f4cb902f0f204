//! Comparisons that chance can make and those that it cannot, gates, forgetting.

use crds::run::{DataFormat, DataSource, Evaluate, Forgetting};

use super::*;
use crate::judge::evaluate::RowScore;

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
    for (wins, losses, expected) in
        [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (0, 6, 0.03125), (7, 7, 1.0), (9, 1, 0.021_484_375)]
    {
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
