//! `status`: one page about one job. Pure.

mod next;
#[cfg(test)]
mod tests;

use crds::condition;
use crds::finetunejob::{AttemptOutcome, GateOperator, GateStatus, JobReference, Phase, ScoresStatus};
use crds::run::{Baseline, Metric};
use crds::status::{duration, is_trouble, seconds_between};
use crds::{FineTuneJob, FineTuneJobStatus};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::text::{Align, Paint, WIDTH, bytes, clean, count, decimal, share, table, wrap};

/// Columns of the labels at the left.
const LABEL: usize = 13;
const BAR: usize = 30;
/// Checkpoints that the page shows.
const SHOWN_CHECKPOINTS: usize = 3;

/// Everything that a person may want to know about a job, and what to do next.
pub fn page(job: &FineTuneJob, now: Timestamp, paint: Paint) -> String {
    let status = job.status.clone().unwrap_or_default();
    let mut page = Page { text: String::new(), paint };
    page.head(job, &status, now);
    page.course(&status);
    page.validation(&status);
    page.made_of(&status);
    page.attempts(&status, now);
    page.left(&status);
    page.next(job, &status);
    page.text
}

struct Page {
    text: String,
    paint: Paint,
}

impl Page {
    fn line(&mut self, label: &str, text: &str) {
        self.text += format!("{label:<LABEL$}{text}").trim_end();
        self.text.push('\n');
    }

    /// Wrapped, in one colour.
    fn field(&mut self, label: &str, text: &str, colour: impl Fn(&str) -> String) {
        for (index, line) in wrap(text, WIDTH - LABEL).iter().enumerate() {
            self.line(if index == 0 { label } else { "" }, &colour(line));
        }
    }

    fn plain(&mut self, label: &str, text: &str) {
        self.field(label, text, str::to_owned);
    }

    fn gap(&mut self) {
        if !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
    }

    fn head(&mut self, job: &FineTuneJob, status: &FineTuneJobStatus, now: Timestamp) {
        let paint = self.paint;
        let profile = job.spec.profile.as_deref().unwrap_or(crds::profile::DEFAULT);
        let place = format!("{} in {}", job.name_any(), job.namespace().unwrap_or_default());
        self.line("job", &paint.strong(&place));
        let model = clean(&job.spec.model.uri.0);
        self.plain("", &format!("{:?} of {model}, profile {profile}", job.spec.method.method_type));
        let created = job.metadata.creation_timestamp.as_ref();
        let age = created.map_or(0, |created| {
            seconds_between(created.0, status.completion_time.as_ref().map_or(now, |ended| ended.0))
        });
        let since = if status.completion_time.is_some() { "after" } else { "for" };
        let phase = status.phase.map_or("not seen by an operator".to_owned(), |phase| format!("{phase:?}"));
        let text = format!("{phase} {since} {}", duration(age));
        let text = match status.phase {
            Some(Phase::Succeeded) => paint.good(&text),
            Some(Phase::Failed) => paint.bad(&text),
            Some(Phase::Pending | Phase::Queued | Phase::Suspended) | None => paint.warn(&text),
            Some(_) => paint.strong(&text),
        };
        self.line("phase", &text);
        for found in &status.conditions {
            let bad = is_trouble(found);
            let said = match (found.type_.as_str(), found.status.as_str()) {
                _ if bad => true,
                (condition::SUSPENDED, "True") => true,
                (condition::COMPLETE, "True") => status.validation.is_none() && !found.message.is_empty(),
                // A failed job tells the same sentence as its end.
                (condition::VALIDATION_PASSED | condition::PUBLISHED, "False") => status.phase != Some(Phase::Failed),
                _ => false,
            };
            if said {
                let colon = if found.message.is_empty() { "" } else { ": " };
                let text = format!("{}{colon}{}", found.reason, found.message);
                self.field("why", &text, |line| if bad { paint.bad(line) } else { line.to_owned() });
            }
        }
        self.gap();
    }

    fn course(&mut self, status: &FineTuneJobStatus) {
        if let Some(progress) = &status.progress {
            let percent = progress.percent.unwrap_or(0).clamp(0, 100).unsigned_abs() as usize;
            let full = percent * BAR / 100;
            let bar = format!("[{}{}]", "=".repeat(full), " ".repeat(BAR - full));
            let mut text = format!("{bar} {percent} %  step {}", clean(&progress.summary));
            if let Some(epoch) = &progress.epoch {
                text += &format!("  epoch {}", decimal(epoch));
            }
            if let Some(left) = progress.estimated_remaining_seconds {
                text += &format!("  {} left", duration(left));
            }
            self.line("progress", &text);
        }
        let shown = [
            ("trainLoss", "loss"),
            ("evalLoss", "eval loss"),
            ("learningRate", "learning rate"),
            ("gradientNorm", "gradient norm"),
        ];
        let mut metrics: Vec<String> = shown
            .iter()
            .filter_map(|(name, label)| {
                let found = status.metrics.iter().find(|metric| metric.name == *name)?;
                Some(format!("{label} {}", decimal(&found.value)))
            })
            .collect();
        let speed = status.progress.as_ref().and_then(|progress| progress.tokens_per_second);
        metrics.extend(speed.map(|tokens| format!("{} tokens/s", count(tokens))));
        if !metrics.is_empty() {
            self.plain("metrics", &metrics.join(", "));
        }
        let hidden = status.checkpoints.len().saturating_sub(SHOWN_CHECKPOINTS);
        let checkpoints: Vec<String> = status.checkpoints[hidden..]
            .iter()
            .map(|checkpoint| {
                let loss = checkpoint.eval_loss.as_ref().map(|loss| format!("eval {}", decimal(loss)));
                let notes: Vec<String> = loss.into_iter().chain(checkpoint.best.then(|| "best".to_owned())).collect();
                let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join(", ")) };
                format!("step {}{notes}", checkpoint.step)
            })
            .collect();
        if !checkpoints.is_empty() {
            self.plain("checkpoints", &checkpoints.join(", "));
        }
        self.gap();
    }

    fn validation(&mut self, status: &FineTuneJobStatus) {
        let Some(validation) = &status.validation else { return };
        let paint = self.paint;
        let tuned = validation.best.as_ref().and_then(|best| best.scores.as_ref());
        let columns = [validation.zero_shot.as_ref(), validation.few_shot.as_ref(), tuned];
        let metrics: [(&str, fn(&ScoresStatus) -> Option<String>); 4] = [
            ("exact match", |scores| scores.exact_match.as_deref().map(share)),
            ("loss", |scores| scores.eval_loss.as_deref().map(decimal)),
            ("perplexity", |scores| scores.perplexity.as_deref().map(decimal)),
            ("token accuracy", |scores| scores.token_accuracy.as_deref().map(share)),
        ];
        let rows: Vec<Vec<String>> = metrics
            .into_iter()
            .filter_map(|(name, value)| {
                let cells = columns.map(|scores| scores.and_then(value));
                let measured = cells.iter().any(Option::is_some);
                let cells = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".into()));
                measured.then(|| std::iter::once(name.to_owned()).chain(cells).collect())
            })
            .collect();
        let header = [("", Align::Left), ("base", Align::Right), ("few-shot", Align::Right), ("tuned", Align::Right)];
        if !rows.is_empty() {
            for (index, line) in table(&header, &rows).iter().enumerate() {
                self.line(if index == 0 { "validation" } else { "" }, line);
            }
        }
        let mark = |passed: bool| if passed { paint.good("passed") } else { paint.bad("FAILED") };
        if let Some(forgetting) = &validation.forgetting {
            let text = format!(
                "loss on general text {} before, {} after: {}",
                decimal(&forgetting.base_loss),
                decimal(&forgetting.tuned_loss),
                mark(forgetting.passed)
            );
            self.line("forgetting", &text);
        }
        for (index, gate) in validation.gates.iter().enumerate() {
            let text = format!("{}: {}", describe_gate(gate), mark(gate.passed));
            self.line(if index == 0 { "gates" } else { "" }, &text);
        }
        if let Some(verdict) = &validation.verdict {
            // A job that a gate failed has told the same sentence as its reason.
            let told = |text: &&str| {
                status.conditions.iter().any(|found| found.type_ == condition::FAILED && found.message == **text)
            };
            let summary = validation.summary.as_deref().filter(|text| !told(text));
            let summary = summary.map_or(String::new(), |summary| format!(": {summary}"));
            self.field("verdict", &format!("{verdict}{summary}"), |line| match verdict.as_str() {
                "Better" => paint.good(line),
                "GateFailed" => paint.bad(line),
                _ => paint.warn(line),
            });
        }
        self.gap();
    }

    /// Plan and data.
    fn made_of(&mut self, status: &FineTuneJobStatus) {
        if let Some(plan) = &status.plan {
            let text = format!(
                "{} of memory predicted, {} trained parameters, {} tokens at once",
                bytes(plan.memory_bytes),
                count(plan.trainable_parameters),
                count(plan.micro_batch_tokens)
            );
            self.plain("plan", &text);
        }
        if let Some(data) = &status.data {
            let text = format!(
                "{} training rows, {} validation rows, {} tokens, {} of them trained; {} duplicates, {} leaked, {} truncated",
                count(data.rows),
                count(data.validation_rows),
                count(data.tokens),
                count(data.trained_tokens),
                count(data.duplicates),
                count(data.leaked),
                count(data.truncated)
            );
            self.plain("data", &text);
        }
        self.gap();
    }

    fn attempts(&mut self, status: &FineTuneJobStatus, now: Timestamp) {
        let columns = [
            ("stage", Align::Left),
            ("attempt", Align::Right),
            ("outcome", Align::Left),
            ("reason", Align::Left),
            ("took", Align::Right),
        ];
        let rows: Vec<Vec<String>> = status.job_refs.iter().map(|attempt| attempt_row(attempt, now)).collect();
        if !rows.is_empty() {
            for (index, line) in table(&columns, &rows).iter().enumerate() {
                self.line(if index == 0 { "attempts" } else { "" }, line);
            }
        }
        if let Some(attempts) = status.attempts.as_ref().filter(|attempts| attempts.failed + attempts.preempted > 0) {
            let resumed =
                attempts.resumed_from_step.map_or(String::new(), |step| format!("; the last went on from step {step}"));
            self.plain("", &format!("{} failed, {} preempted{resumed}", attempts.failed, attempts.preempted));
        }
        // The condition that ended the job tells the same.
        if let Some(failure) = status.last_failure.as_ref().filter(|_| status.phase != Some(Phase::Failed)) {
            let paint = self.paint;
            self.field("last failure", &format!("{}: {}", failure.reason, failure.message), |line| paint.warn(line));
        }
        self.gap();
    }

    /// Volume, artifact, usage.
    fn left(&mut self, status: &FineTuneJobStatus) {
        if let Some(claim) = status.resolved.as_ref().and_then(|resolved| resolved.claim.as_ref()) {
            self.plain("volume", &format!("claim {claim}"));
        }
        if let Some(artifact) = &status.artifact {
            let rank = artifact.lora_rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
            self.plain("artifact", &format!("{:?}{rank} at {}", artifact.kind, artifact.uri));
            self.line("", &self.paint.faint(&clean(&artifact.digest)));
        }
        if let Some(usage) = status.usage.as_ref().filter(|usage| usage.train_seconds > 0) {
            let gpus = match usage.gpu_seconds {
                0 => String::new(),
                seconds => format!(", {:.2} GPU hours", seconds as f64 / 3600.0),
            };
            let cost = usage.cost.as_ref().map_or(String::new(), |cost| format!(", cost {}", decimal(cost)));
            self.plain("used", &format!("{} of training in ended attempts{gpus}{cost}", duration(usage.train_seconds)));
        }
        self.gap();
    }

    fn next(&mut self, job: &FineTuneJob, status: &FineTuneJobStatus) {
        for (index, advice) in next::next(job, status).iter().enumerate() {
            self.plain(if index == 0 { "next" } else { "" }, &advice.what);
            for command in advice.command.lines() {
                self.line("", &format!("  {}", self.paint.strong(command)));
            }
        }
    }
}

fn attempt_row(attempt: &JobReference, now: Timestamp) -> Vec<String> {
    let outcome = match attempt.outcome {
        None if attempt.start_time.is_some() => "running".to_owned(),
        None => "waiting".to_owned(),
        // For the status it is one that no other attempt can mend.
        Some(AttemptOutcome::Final) => "Failed".to_owned(),
        Some(outcome) => format!("{outcome:?}"),
    };
    let took = attempt
        .start_time
        .as_ref()
        .map(|start| duration(seconds_between(start.0, attempt.completion_time.as_ref().map_or(now, |ended| ended.0))));
    vec![
        attempt.stage.name().to_owned(),
        attempt.attempt.to_string(),
        outcome,
        clean(attempt.reason.as_deref().unwrap_or("-")),
        took.unwrap_or_else(|| "-".into()),
    ]
}

fn describe_gate(gate: &GateStatus) -> String {
    let value = |text: &Option<String>| text.as_deref().map_or("not measured".to_owned(), decimal);
    let name = match gate.metric {
        Metric::EvalLoss => "loss",
        Metric::Perplexity => "perplexity",
        Metric::TokenAccuracy => "token accuracy",
        Metric::ExactMatch => "exact match",
    };
    let observed = value(&gate.observed);
    match gate.operator {
        GateOperator::AtMost => format!("{name} at most {}, found {observed}", value(&gate.value)),
        GateOperator::AtLeast => format!("{name} at least {}, found {observed}", value(&gate.value)),
        GateOperator::ImprovesOn => {
            let baseline = match gate.baseline {
                Some(Baseline::FewShot) => "few-shot",
                Some(Baseline::Base) | None => "base",
            };
            format!("{name} better than {baseline} ({}) by {}, found {observed}", value(&gate.value), value(&gate.by))
        }
    }
}
