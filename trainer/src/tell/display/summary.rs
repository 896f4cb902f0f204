//! The result of a run in plain words.

use crds::report::{Report, Scores, ValidationReport};

use crate::ground::units::display_bytes;

/// `1 h 5 min`, `3 min 20 s`, `12 s`.
pub fn display_duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as i64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// The result of a run in plain words.
pub fn summary(report: &Report) -> String {
    let mut lines = Vec::new();
    if let Some(validation) = &report.validation {
        lines.extend(scores_table(validation));
        if let Some(forgetting) = &validation.forgetting {
            lines.push(format!(
                "forgetting     loss on general text {:.3} before, {:.3} after (at most +{:.2} tolerated): {}",
                forgetting.base_loss,
                forgetting.tuned_loss,
                forgetting.max_loss_increase,
                if forgetting.passed { "passed" } else { "too much was forgotten" }
            ));
        }
        for gate in &validation.gates {
            let observed = gate.observed.map_or("not measured".to_owned(), |value| format!("{value:.3}"));
            let against = gate.baseline.map_or(String::new(), |value| format!(" against {value:.3}"));
            let verdict = if gate.passed { "passed" } else { "FAILED" };
            lines.push(format!("gate           {}: {observed}{against}: {verdict}", describe_gate(&gate.gate)));
        }
    }
    if let Some(plan) = &report.plan {
        lines.push(format!(
            "memory         {} predicted, {} measured at the peak",
            display_bytes(plan.memory.total),
            display_bytes(plan.measured_peak)
        ));
        lines.push(format!(
            "training time  {} predicted, {} measured for {} steps",
            display_duration(plan.estimated_seconds),
            display_duration(plan.measured_seconds),
            report.step
        ));
    }
    let usage = &report.usage;
    let energy = usage.energy_joules.map_or(String::new(), |joules| format!(", {:.1} Wh", joules / 3600.0));
    let cost = match (usage.cost, usage.full_fine_tuning_cost) {
        (Some(cost), Some(full)) => format!(", cost {cost:.4} (full fine-tuning: about {full:.4})"),
        (Some(cost), None) => format!(", cost {cost:.4}"),
        _ => String::new(),
    };
    lines.push(format!(
        "used           {} in all, {} tokens trained of {} read{energy}{cost}",
        display_duration(usage.wall_seconds),
        usage.trained_tokens,
        usage.input_tokens
    ));
    if let Some(artifact) = &report.artifact {
        lines.push(format!("output         {}", artifact.uri.trim_start_matches("file://")));
    }
    if let Some(validation) = &report.validation {
        lines.push(String::new());
        lines.push(validation.summary.clone());
    }
    lines.join("\n")
}

fn scores_table(validation: &ValidationReport) -> Vec<String> {
    let few_shot = format!("base+{}", validation.few_shot_examples.unwrap_or(0));
    let columns = [
        ("base", validation.zero_shot.as_ref()),
        (few_shot.as_str(), validation.few_shot.as_ref()),
        ("tuned", Some(&validation.tuned)),
    ];
    let mut lines = vec![format!(
        "{:<15}{}",
        format!("{} rows", validation.rows),
        columns.iter().map(|(name, _)| format!("{name:>10}")).collect::<String>()
    )];
    let rows: [(&str, fn(&Scores) -> Option<String>); 4] = [
        ("exact match", |scores| scores.exact_match.map(|value| format!("{:.1} %", 100.0 * value))),
        ("loss", |scores| scores.eval_loss.map(|value| format!("{value:.3}"))),
        ("perplexity", |scores| scores.perplexity.map(|value| format!("{value:.2}"))),
        ("token accuracy", |scores| scores.token_accuracy.map(|value| format!("{:.1} %", 100.0 * value))),
    ];
    for (name, value) in rows {
        let cells: Vec<Option<String>> = columns.iter().map(|(_, scores)| scores.and_then(value)).collect();
        if cells.iter().any(Option::is_some) {
            let cells: String =
                cells.into_iter().map(|cell| format!("{:>10}", cell.unwrap_or_else(|| "–".into()))).collect();
            lines.push(format!("{name:<15}{cells}"));
        }
    }
    lines.extend(fewer_rows(validation, &few_shot).map(|text| format!("               {text}")));
    lines
}

/// Says which numbers were measured on fewer rows than the others, if some were.
pub fn fewer_rows(validation: &ValidationReport, few_shot: &str) -> Option<String> {
    let fewer = |what: String, rows: Option<i64>| {
        rows.filter(|&rows| rows != validation.rows).map(|rows| format!("{what} on {rows}"))
    };
    let parts: Vec<String> = [
        fewer("exact match".to_owned(), validation.generated_rows),
        fewer(format!("the loss of {few_shot}"), validation.few_shot_rows),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!parts.is_empty()).then(|| format!("measured {} of the {} rows", parts.join(" and "), validation.rows))
}

/// A gate in words.
pub fn describe_gate(gate: &crds::run::Gate) -> String {
    use crds::run::{Baseline, Gate};
    match gate {
        Gate::AtMost { metric, value } => format!("{} at most {value}", metric.name()),
        Gate::AtLeast { metric, value } => format!("{} at least {value}", metric.name()),
        Gate::ImprovesOn { metric, baseline, by } => {
            let baseline = match baseline {
                Baseline::Base => "the base model",
                Baseline::FewShot => "examples in the prompt",
            };
            format!("{} better than {baseline} by {by}", metric.name())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validation(rows: i64, generated_rows: i64, few_shot_rows: i64) -> ValidationReport {
        let scores =
            Scores { eval_loss: Some(0.5), perplexity: Some(1.65), exact_match: Some(0.25), token_accuracy: None };
        ValidationReport {
            rows,
            generated_rows: Some(generated_rows),
            generation: None,
            step: 9,
            tuned: scores,
            zero_shot: None,
            few_shot: Some(scores),
            few_shot_rows: Some(few_shot_rows),
            few_shot_examples: Some(4),
            forgetting: None,
            gates: Vec::new(),
            verdict: crds::report::Verdict::Better,
            summary: String::new(),
        }
    }

    #[test]
    fn the_table_says_which_numbers_are_of_fewer_rows() {
        assert_eq!(
            scores_table(&validation(1000, 256, 250)),
            [
                "1000 rows            base    base+4     tuned",
                "exact match             –    25.0 %    25.0 %",
                "loss                    –     0.500     0.500",
                "perplexity              –      1.65      1.65",
                "               measured exact match on 256 and the loss of base+4 on 250 of the 1000 rows",
            ]
        );
        assert_eq!(fewer_rows(&validation(150, 150, 150), "base+4"), None);
        let text = fewer_rows(&validation(150, 150, 149), "base+4");
        assert_eq!(text.as_deref(), Some("measured the loss of base+4 on 149 of the 150 rows"));
    }

    #[test]
    fn durations_are_short() {
        let shown = [12.4, 200.0, 3900.0].map(display_duration);
        assert_eq!(shown, ["12 s", "3 min 20 s", "1 h 5 min"]);
    }
}
