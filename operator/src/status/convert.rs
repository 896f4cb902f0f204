//! What others tell, in the words of the status: trainers, and whoever else has a sentence for a condition. A pod may say what
//! it likes, and one status that the API server refuses is a job that nothing ends: so whatever is not of the expected kind is
//! cut, put in order or left out here, and everything that is taken over passes through one of these functions.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crds::FineTuneJobStatus;
use crds::finetunejob::{
    ArtifactStatus, AttemptsStatus, BestStatus, CheckpointStatus, DataStatus, ForgettingStatus, GateOperator,
    GateStatus, MetricStatus, PlanStatus, ProgressStatus, ResolvedStatus, ScoresStatus, ValidationStatus,
};
use crds::report::{
    CheckpointInfo, ForgettingResult, GateResult, MetricValue, Progress, Report, Scores, ValidationReport,
};
use crds::run::{Gate, PodStage};
use crds::status::duration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// Metrics that a status holds.
const MAX_METRICS: usize = 32;
/// Checkpoints that a status holds.
const MAX_CHECKPOINTS: usize = 16;
/// Gates that a status holds.
const MAX_GATES: usize = 16;
/// Bytes of a metric's name.
const MAX_NAME: usize = 63;
/// Bytes of a digest or a revision.
const MAX_DIGEST: usize = 128;
/// Bytes of a message: conditions may have 32 KiB, a person reads less.
const MAX_MESSAGE: usize = 1024;
/// Steps, rows, tokens, bytes: whole numbers up to here are the same in every reader of JSON.
const MAX_COUNT: i64 = 1 << 53;
/// Ten years: whatever takes longer was not estimated.
const MAX_SECONDS: i64 = 10 * 365 * 24 * 3600;
/// From 2001 to 2286: there was no trainer before, and the API server takes no year of five digits.
const SECONDS_OF_TIMES: std::ops::Range<i64> = 1_000_000_000..10_000_000_000;

/// A number with six significant digits, as short as it can be written.
pub fn decimal(value: f64) -> String {
    let rounded: f64 = format!("{value:.5e}").parse().expect("a formatted number");
    crds::resolve::decimal_text(rounded)
}

/// A number that was measured, if it is one.
fn measured(value: Option<f64>) -> Option<String> {
    value.filter(|value| value.is_finite()).map(decimal)
}

/// A sentence of somebody else (scheduler, kubelet, API server, queue, trainer) as a condition takes it: on one line, without
/// control characters, and of a length that a person reads. What it makes it leaves as it is when it gets it again.
pub fn message(text: &str) -> String {
    let mut message = String::new();
    for word in text.split(is_gap).filter(|word| !word.is_empty()) {
        if !message.is_empty() {
            message.push(' ');
        }
        // The rest of an endless text is not looked at.
        let room = MAX_MESSAGE + 1 - message.len().min(MAX_MESSAGE);
        message.extend(word.char_indices().take_while(|(at, _)| *at < room).map(|(_, character)| character));
        if message.len() > MAX_MESSAGE {
            break;
        }
    }
    cut(&mut message, MAX_MESSAGE);
    message
}

/// White space, control characters, and what turns the direction or the lines of the text around it.
fn is_gap(character: char) -> bool {
    character.is_whitespace()
        || character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Whether two messages say the same but for their counters: `3 more needed` and `2 more needed`. What counts down is no news.
pub fn have_same_meaning(one: &str, other: &str) -> bool {
    fn without_counters(text: &str) -> impl Iterator<Item = &str> {
        text.split_whitespace().map(|word| {
            let word = word.trim_matches(|character: char| !character.is_alphanumeric());
            if word.starts_with(|character: char| character.is_ascii_digit()) { "" } else { word }
        })
    }
    without_counters(one).eq(without_counters(other))
}

/// Cuts a text between two characters.
fn cut(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most - '…'.len_utf8()));
        text.push('…');
    }
}

/// A digest, a revision: one word of ASCII that is whole, or nothing.
fn word(text: &str) -> Option<String> {
    let is_word = !text.is_empty() && text.len() <= MAX_DIGEST && text.bytes().all(|byte| byte.is_ascii_graphic());
    is_word.then(|| text.to_owned())
}

/// A number of things.
fn count(number: i64) -> i64 {
    number.clamp(0, MAX_COUNT)
}

/// Whole seconds: the API server keeps no more, and a difference that it drops would be written again and again.
fn time(text: &str) -> Option<Time> {
    let time: Timestamp = text.parse().ok()?;
    let seconds = Some(time.as_second()).filter(|seconds| SECONDS_OF_TIMES.contains(seconds))?;
    Timestamp::from_second(seconds).ok().map(Time)
}

/// Each name once, which the status is keyed by: the newest value of it.
fn metrics(values: &[MetricValue]) -> Vec<MetricStatus> {
    let mut metrics: Vec<MetricStatus> = Vec::new();
    for metric in values.iter().filter(|metric| metric.value.is_finite() && is_name(&metric.name)) {
        let value = decimal(metric.value);
        if let Some(known) = metrics.iter_mut().find(|known| known.name == metric.name) {
            known.value = value;
        } else if metrics.len() < MAX_METRICS {
            metrics.push(MetricStatus { name: metric.name.clone(), value });
        }
    }
    metrics
}

fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME
        && text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-./".contains(&byte))
}

/// Each step once, in their order: the newest ones.
fn checkpoints(told: &[CheckpointInfo]) -> Vec<CheckpointStatus> {
    let mut by_step: BTreeMap<i64, &CheckpointInfo> = BTreeMap::new();
    for checkpoint in told.iter().filter(|checkpoint| (0..=MAX_COUNT).contains(&checkpoint.step)) {
        by_step.insert(checkpoint.step, checkpoint);
        if by_step.len() > MAX_CHECKPOINTS {
            by_step.pop_first();
        }
    }
    let checkpoints = by_step.into_iter().map(|(step, checkpoint)| CheckpointStatus {
        step,
        time: time(&checkpoint.time),
        eval_loss: measured(checkpoint.eval_loss),
        best: checkpoint.best,
    });
    checkpoints.collect()
}

/// `1200/4875`
fn note_steps(progress: &mut ProgressStatus, step: i64, total: i64) {
    let (step, total) = (count(step), count(total));
    progress.step = step;
    progress.total_steps = total;
    progress.summary = format!("{step}/{total}");
    progress.percent = (total > 0).then(|| (step.min(total) * 100 / total) as i32);
}

/// What a running trainer tells; it decides nothing.
pub fn note_progress(status: &mut FineTuneJobStatus, told: &Progress) {
    // A trainer that has only begun knows nothing yet: what an earlier attempt told stays.
    if told.pod_stage != Some(PodStage::Train) || told.total_steps <= 0 {
        return;
    }
    let remaining = told.estimated_remaining_seconds.filter(|_| told.step < told.total_steps);
    let remaining = remaining.map(|seconds| seconds.clamp(0, MAX_SECONDS));
    let mut progress = ProgressStatus {
        epoch: measured(Some(told.epoch)),
        trained_tokens: Some(count(told.trained_tokens)),
        // A float beyond the range of whole numbers becomes their last one.
        tokens_per_second: told
            .tokens_per_second
            .filter(|tokens| tokens.is_finite())
            .map(|tokens| count(tokens as i64)),
        estimated_remaining_seconds: remaining,
        eta: remaining.map(duration),
        last_report_time: time(&told.last_report_time),
        ..ProgressStatus::default()
    };
    note_steps(&mut progress, told.step, told.total_steps);
    status.progress = Some(progress);
    let metrics = metrics(&told.metrics);
    if !metrics.is_empty() {
        status.metrics = metrics;
    }
    let checkpoints = checkpoints(&told.checkpoints);
    if !checkpoints.is_empty() {
        status.checkpoints = checkpoints;
    }
    note_resumption(status, told.resumed_from_step);
}

fn note_resumption(status: &mut FineTuneJobStatus, step: Option<i64>) {
    if let Some(step) = step {
        status.attempts.get_or_insert_with(AttemptsStatus::default).resumed_from_step = Some(count(step));
    }
}

/// The last word of an attempt.
pub fn note_report(status: &mut FineTuneJobStatus, stage: PodStage, report: &Report) {
    let resolved = status.resolved.get_or_insert_with(ResolvedStatus::default);
    if let Some(revision) = report.model_revision.as_deref().and_then(word) {
        resolved.model_revision = Some(revision);
    }
    if let Some(digest) = report.dataset_digest.as_deref().and_then(word) {
        resolved.dataset_digest = Some(digest);
    }
    if let Some(data) = &report.data {
        status.data = Some(DataStatus {
            rows: count(data.rows),
            validation_rows: count(data.validation_rows),
            tokens: count(data.tokens),
            trained_tokens: count(data.trained_tokens),
            duplicates: count(data.duplicates),
            leaked: count(data.leaked),
            truncated: count(data.truncated),
        });
    }
    if let Some(plan) = &report.plan {
        status.plan = Some(PlanStatus {
            memory_bytes: count(plan.memory.total),
            micro_batch_tokens: count(plan.micro_batch_tokens),
            trainable_parameters: count(plan.trainable_parameters),
        });
        // Of what is chosen none is 0, and the API server says so too.
        if let Some(parameters) = &mut resolved_hyperparameters(status)
            && plan.micro_batch_tokens > 0
        {
            parameters.micro_batch_tokens.get_or_insert(count(plan.micro_batch_tokens));
        }
    }
    if stage == PodStage::Train {
        let metrics = metrics(&report.metrics);
        if !metrics.is_empty() {
            status.metrics = metrics;
        }
        if report.total_steps > 0 {
            let progress = status.progress.get_or_insert_with(ProgressStatus::default);
            note_steps(progress, report.step, report.total_steps);
            progress.eta = None;
            progress.estimated_remaining_seconds = None;
        }
        note_resumption(status, report.resumed_from_step);
        if let Some(found) = &report.validation {
            status.validation = Some(validation(found));
        }
    }
    if let Some(artifact) = &report.artifact {
        status.artifact = Some(ArtifactStatus {
            uri: message(&artifact.uri),
            digest: word(&artifact.digest).unwrap_or_default(),
            kind: artifact.kind,
            lora_rank: artifact.lora_rank.map(count),
            base_model: message(&artifact.base_model),
        });
    }
}

fn resolved_hyperparameters(status: &mut FineTuneJobStatus) -> Option<&mut crds::finetunejob::HyperparametersSpec> {
    status.resolved.as_mut()?.hyperparameters.as_mut()
}

fn scores(found: &Scores) -> ScoresStatus {
    ScoresStatus {
        eval_loss: measured(found.eval_loss),
        perplexity: measured(found.perplexity),
        token_accuracy: measured(found.token_accuracy),
        exact_match: measured(found.exact_match),
    }
}

fn validation(found: &ValidationReport) -> ValidationStatus {
    ValidationStatus {
        zero_shot: found.zero_shot.as_ref().map(scores),
        few_shot: found.few_shot.as_ref().map(scores),
        best: Some(BestStatus { step: count(found.step), scores: Some(scores(&found.tuned)) }),
        forgetting: found.forgetting.as_ref().and_then(forgetting),
        gates: found.gates.iter().take(MAX_GATES).map(gate).collect(),
        verdict: Some(format!("{:?}", found.verdict)),
        summary: Some(message(&found.summary)),
    }
}

fn forgetting(found: &ForgettingResult) -> Option<ForgettingStatus> {
    Some(ForgettingStatus {
        base_loss: measured(Some(found.base_loss))?,
        tuned_loss: measured(Some(found.tuned_loss))?,
        passed: found.passed,
    })
}

fn gate(found: &GateResult) -> GateStatus {
    let status = |metric, operator| GateStatus {
        metric,
        operator,
        value: None,
        baseline: None,
        by: None,
        observed: measured(found.observed),
        passed: found.passed,
    };
    match found.gate {
        Gate::AtMost { metric, value } => {
            GateStatus { value: measured(Some(value)), ..status(metric, GateOperator::AtMost) }
        }
        Gate::AtLeast { metric, value } => {
            GateStatus { value: measured(Some(value)), ..status(metric, GateOperator::AtLeast) }
        }
        Gate::ImprovesOn { metric, baseline, by } => GateStatus {
            value: measured(found.baseline),
            baseline: Some(baseline),
            by: measured(Some(by)),
            ..status(metric, GateOperator::ImprovesOn)
        },
    }
}
