//! What the trainer tells, in the words of the status. Decimals become strings.

use crds::FineTuneJobStatus;
use crds::finetunejob::{
    ArtifactStatus, AttemptsStatus, BestStatus, CheckpointStatus, DataStatus, ForgettingStatus, GateOperator,
    GateStatus, MetricStatus, PlanStatus, ProgressStatus, ResolvedStatus, ScoresStatus, ValidationStatus,
};
use crds::report::{GateResult, MetricValue, Progress, Report, Scores, ValidationReport};
use crds::run::{Gate, PodStage};
use crds::status::duration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// Metrics that a status holds.
const MAX_METRICS: usize = 32;
/// Checkpoints that a status holds.
const MAX_CHECKPOINTS: usize = 16;
/// Bytes of a message: conditions may have 32 KiB, a person reads less.
const MAX_MESSAGE: usize = 1024;

/// A number with six significant digits, as short as it can be written.
pub fn decimal(value: f64) -> String {
    let rounded: f64 = format!("{value:.5e}").parse().expect("a formatted number");
    crds::resolve::decimal_text(rounded)
}

/// Cuts a message between two characters.
pub fn shorten(message: &mut String) {
    if message.len() > MAX_MESSAGE {
        let mut end = MAX_MESSAGE - '…'.len_utf8();
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push('…');
    }
}

/// A sentence as a condition takes it: on one line, without control characters, and bounded.
pub fn message(text: &str) -> String {
    let mut message: String = text
        .chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(2 * MAX_MESSAGE)
        .collect();
    shorten(&mut message);
    message
}

/// Whole seconds: the API server keeps no more, and a difference that it drops would be written again and again.
fn time(text: &str) -> Option<Time> {
    let time: Timestamp = text.parse().ok()?;
    Timestamp::from_second(time.as_second()).ok().map(Time)
}

fn metrics(values: &[MetricValue]) -> Vec<MetricStatus> {
    let finite = values.iter().filter(|metric| metric.value.is_finite()).take(MAX_METRICS);
    finite.map(|metric| MetricStatus { name: metric.name.clone(), value: decimal(metric.value) }).collect()
}

/// What a running trainer tells; it decides nothing.
pub fn note_progress(status: &mut FineTuneJobStatus, told: &Progress) {
    // A trainer that has only begun knows nothing yet: what an earlier attempt told stays.
    if told.pod_stage != Some(PodStage::Train) || told.total_steps == 0 {
        return;
    }
    let remaining = told.estimated_remaining_seconds.filter(|_| told.step < told.total_steps);
    status.progress = Some(ProgressStatus {
        step: told.step,
        total_steps: told.total_steps,
        summary: format!("{}/{}", told.step, told.total_steps),
        percent: percent(told.step, told.total_steps),
        epoch: told.epoch.is_finite().then(|| decimal(told.epoch)),
        trained_tokens: Some(told.trained_tokens),
        tokens_per_second: told.tokens_per_second.map(|tokens| tokens as i64),
        estimated_remaining_seconds: remaining,
        eta: remaining.map(duration),
        last_report_time: time(&told.last_report_time),
    });
    if !told.metrics.is_empty() {
        status.metrics = metrics(&told.metrics);
    }
    let listed = told.checkpoints.len().saturating_sub(MAX_CHECKPOINTS);
    let checkpoints: Vec<CheckpointStatus> = told.checkpoints[listed..]
        .iter()
        .map(|checkpoint| CheckpointStatus {
            step: checkpoint.step,
            time: time(&checkpoint.time),
            eval_loss: checkpoint.eval_loss.filter(|loss| loss.is_finite()).map(decimal),
            best: checkpoint.best,
        })
        .collect();
    if !checkpoints.is_empty() {
        status.checkpoints = checkpoints;
    }
    if told.resumed_from_step.is_some() {
        status.attempts.get_or_insert_with(AttemptsStatus::default).resumed_from_step = told.resumed_from_step;
    }
}

fn percent(step: i64, total: i64) -> Option<i32> {
    (total > 0).then(|| i32::try_from(step.clamp(0, total) * 100 / total).unwrap_or(100))
}

/// The last word of an attempt.
pub fn note_report(status: &mut FineTuneJobStatus, stage: PodStage, report: &Report) {
    let resolved = status.resolved.get_or_insert_with(ResolvedStatus::default);
    if report.model_revision.is_some() {
        resolved.model_revision.clone_from(&report.model_revision);
    }
    if report.dataset_digest.is_some() {
        resolved.dataset_digest.clone_from(&report.dataset_digest);
    }
    if let Some(data) = &report.data {
        status.data = Some(DataStatus {
            rows: data.rows,
            validation_rows: data.validation_rows,
            tokens: data.tokens,
            trained_tokens: data.trained_tokens,
            duplicates: data.duplicates,
            leaked: data.leaked,
            truncated: data.truncated,
        });
    }
    if let Some(plan) = &report.plan {
        status.plan = Some(PlanStatus {
            memory_bytes: plan.memory.total,
            micro_batch_tokens: plan.micro_batch_tokens,
            trainable_parameters: plan.trainable_parameters,
        });
        if let Some(parameters) = &mut resolved_hyperparameters(status) {
            parameters.micro_batch_tokens.get_or_insert(plan.micro_batch_tokens);
        }
    }
    if stage == PodStage::Train {
        if !report.metrics.is_empty() {
            status.metrics = metrics(&report.metrics);
        }
        if report.total_steps > 0 {
            let progress = status.progress.get_or_insert_with(ProgressStatus::default);
            progress.step = report.step;
            progress.total_steps = report.total_steps;
            progress.summary = format!("{}/{}", report.step, report.total_steps);
            progress.percent = percent(report.step, report.total_steps);
            progress.eta = None;
            progress.estimated_remaining_seconds = None;
        }
        if report.resumed_from_step.is_some() {
            status.attempts.get_or_insert_with(AttemptsStatus::default).resumed_from_step = report.resumed_from_step;
        }
        if let Some(found) = &report.validation {
            status.validation = Some(validation(found));
        }
    }
    if let Some(artifact) = &report.artifact {
        status.artifact = Some(ArtifactStatus {
            uri: artifact.uri.clone(),
            digest: artifact.digest.clone(),
            kind: artifact.kind,
            lora_rank: artifact.lora_rank,
            base_model: artifact.base_model.clone(),
        });
    }
}

fn resolved_hyperparameters(status: &mut FineTuneJobStatus) -> Option<&mut crds::finetunejob::HyperparametersSpec> {
    status.resolved.as_mut()?.hyperparameters.as_mut()
}

fn scores(found: &Scores) -> ScoresStatus {
    let text = |value: Option<f64>| value.filter(|value| value.is_finite()).map(decimal);
    ScoresStatus {
        eval_loss: text(found.eval_loss),
        perplexity: text(found.perplexity),
        token_accuracy: text(found.token_accuracy),
        exact_match: text(found.exact_match),
    }
}

fn validation(found: &ValidationReport) -> ValidationStatus {
    let mut summary = found.summary.clone();
    shorten(&mut summary);
    ValidationStatus {
        zero_shot: found.zero_shot.as_ref().map(scores),
        few_shot: found.few_shot.as_ref().map(scores),
        best: Some(BestStatus { step: found.step, scores: Some(scores(&found.tuned)) }),
        forgetting: found.forgetting.map(|forgetting| ForgettingStatus {
            base_loss: decimal(forgetting.base_loss),
            tuned_loss: decimal(forgetting.tuned_loss),
            passed: forgetting.passed,
        }),
        gates: found.gates.iter().take(16).map(gate).collect(),
        verdict: Some(format!("{:?}", found.verdict)),
        summary: Some(summary),
    }
}

fn gate(found: &GateResult) -> GateStatus {
    let status = |metric, operator| GateStatus {
        metric,
        operator,
        value: None,
        baseline: None,
        by: None,
        observed: found.observed.filter(|value| value.is_finite()).map(decimal),
        passed: found.passed,
    };
    match found.gate {
        Gate::AtMost { metric, value } => {
            GateStatus { value: Some(decimal(value)), ..status(metric, GateOperator::AtMost) }
        }
        Gate::AtLeast { metric, value } => {
            GateStatus { value: Some(decimal(value)), ..status(metric, GateOperator::AtLeast) }
        }
        Gate::ImprovesOn { metric, baseline, by } => GateStatus {
            value: found.baseline.filter(|value| value.is_finite()).map(decimal),
            baseline: Some(baseline),
            by: Some(decimal(by)),
            ..status(metric, GateOperator::ImprovesOn)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_short() {
        for (value, expected) in [
            (1.913_427_9, "1.91343"),
            (2e-4, "0.0002"),
            (0.0, "0"),
            (123_456_789.0, "123457000"),
            (1e40, "1e40"),
            (1e-40, "1e-40"),
        ] {
            assert_eq!(decimal(value), expected);
        }
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let mut message = "é".repeat(1000);
        shorten(&mut message);
        assert!(message.len() <= MAX_MESSAGE && message.ends_with("é…"), "{}", message.len());
        let mut short = "as it is".to_owned();
        shorten(&mut short);
        assert_eq!(short, "as it is");
    }

    #[test]
    fn what_is_not_finite_is_left_out() {
        let values =
            [("trainLoss", f64::NAN), ("evalLoss", 1.5)].map(|(name, value)| MetricValue { name: name.into(), value });
        assert_eq!(metrics(&values), [MetricStatus { name: "evalLoss".into(), value: "1.5".into() }]);
    }
}
