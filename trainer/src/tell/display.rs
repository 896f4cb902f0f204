//! What people see: a progress bar on a terminal, a line every few seconds elsewhere; what was derived before the first
//! step; the result in plain words. Progress goes to standard error, the result to standard output.

mod summary;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use crds::report::{DataReport, Stage};
use indicatif::{ProgressBar, ProgressStyle};

use crate::ground::units::display_bytes;
use crate::tell::record::{Event, Observer, RecentSteps, StepRecord};

pub use summary::{describe_gate, display_duration, fewer_rows, summary};

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// As much of the sample is shown; the file has all of it.
const SAMPLE_CHARACTERS: usize = 400;

/// Prints events to standard error.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    terminal: bool,
    eval_loss: Option<f64>,
    last_line: Option<Instant>,
    recent: RecentSteps,
}

impl Display {
    /// `terminal`: whether standard error is one.
    pub fn new(terminal: bool) -> Self {
        Self { bar: None, terminal, eval_loss: None, last_line: None, recent: RecentSteps::default() }
    }

    fn print(&self, text: &str) {
        // A reader that has gone away (`| head`) ends nothing.
        let write = || {
            let _ = writeln!(io::stderr(), "{text}");
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn step(&mut self, record: &StepRecord) {
        let (tokens_per_second, remaining) = self.recent.add(record);
        let evaluation = self.eval_loss.map_or(String::new(), |loss| format!("  eval {loss:.4}"));
        let text = format!(
            "loss {:.4}{evaluation}  {tokens_per_second:.0} tokens/s  {} left",
            record.loss,
            display_duration(remaining)
        );
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| {
                let style =
                    ProgressStyle::with_template("step {pos}/{len} [{bar:30}] {msg}").expect("a valid template");
                ProgressBar::new(record.total_steps.unsigned_abs()).with_style(style.progress_chars("=> "))
            });
            bar.set_position(record.step.unsigned_abs());
            bar.set_message(text);
        } else if self.line_is_due() || record.step == record.total_steps {
            self.print(&format!("step {}/{}  {text}", record.step, record.total_steps));
            self.last_line = Some(Instant::now());
        }
    }

    fn answered(&mut self, who: &str, answered: usize, rows: usize, tokens: usize) {
        if self.terminal {
            if tokens == 0 {
                let style = ProgressStyle::with_template("{prefix}: {pos}/{len} rows answered [{bar:30}] {msg}");
                let style = style.expect("a valid template").progress_chars("=> ");
                self.bar = Some(ProgressBar::new(rows as u64).with_style(style).with_prefix(who.to_owned()));
            }
            if let Some(bar) = &self.bar {
                bar.set_position(answered as u64);
                bar.set_message(format!("{tokens} tokens"));
                if answered == rows {
                    bar.finish();
                }
            }
        } else if answered == rows || self.line_is_due() {
            self.print(&format!("{who}: {answered}/{rows} rows answered, {tokens} tokens"));
            self.last_line = Some(Instant::now());
        }
    }

    /// Whether the last line of progress is old enough for another.
    fn line_is_due(&self) -> bool {
        self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL)
    }

    fn data(&self, report: &DataReport) {
        let share = 100.0 * report.trained_tokens as f64 / report.tokens.max(1) as f64;
        self.print(&format!(
            "data: {} training rows, {} validation rows; {} tokens, {share:.0} % of them trained; longest {} (limit {})",
            report.rows, report.validation_rows, report.tokens, report.longest, report.max_sequence_length
        ));
        self.print(&format!(
            "      {} exact and {} near duplicates, {} leaked, {} truncated, {} without trained tokens; held out: {} truncated, \
             {} without trained tokens, {} too long to answer; {} with special tokens in their text",
            report.duplicates,
            report.near_duplicates,
            report.leaked,
            report.truncated,
            report.untrained,
            report.held_out_truncated,
            report.held_out_untrained,
            report.unanswerable,
            report.special_texts
        ));
        let histogram: Vec<String> =
            report.length_histogram.iter().map(|(upper, count)| format!("≤{upper}: {count}")).collect();
        self.print(&format!("      rows by tokens: {}", histogram.join("  ")));
        for warning in &report.warnings {
            self.print(&format!("warning: {warning}"));
        }
    }
}

impl Observer for Display {
    fn observe(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Stage(stage) => {
                if *stage != Stage::Training
                    && let Some(bar) = self.bar.take()
                {
                    bar.finish();
                }
                self.print(&format!("== {}", format!("{stage:?}").to_lowercase()));
            }
            Event::Derived { name, value, reason } => self.print(&format!("{name}: {value} ({reason})")),
            Event::Data(report) => self.data(report),
            Event::Sample { text, path } => {
                let short: String = text.chars().take(SAMPLE_CHARACTERS).collect();
                let more = if short.len() < text.len() { " …" } else { "" };
                let lines: Vec<String> = short.lines().map(|line| format!("      {line}")).collect();
                self.print(&format!("sample, trained tokens in «» ({}):\n{}{more}", path.display(), lines.join("\n")));
            }
            Event::Plan(plan) => self.print(&format!(
                "memory: {} predicted{} (weights {}, trained {}, optimizer {}, activations {}, workspace {})",
                display_bytes(plan.memory.total),
                if plan.memory_available > 0 {
                    format!(" of {}", display_bytes(plan.memory_available))
                } else {
                    String::new()
                },
                display_bytes(plan.memory.weights),
                display_bytes(plan.memory.parameters),
                display_bytes(plan.memory.optimizer),
                display_bytes(plan.memory.activations),
                display_bytes(plan.memory.workspace),
            )),
            Event::Resumed { step, inexact_because } => {
                let exact = inexact_because.as_ref().map_or_else(
                    || "the result will be the same bytes as without the interruption".to_owned(),
                    |why| format!("not bit-exact: {why}"),
                );
                self.print(&format!("resumed at step {step}; {exact}"));
            }
            Event::Step(record) => self.step(record),
            Event::Answered { who, answered, rows, tokens } => self.answered(who, *answered, *rows, *tokens),
            Event::Evaluation(record) => {
                self.eval_loss = record.scores.eval_loss;
                let value =
                    |name: &str, value: Option<f64>| value.map_or(String::new(), |v| format!("  {name} {v:.4}"));
                self.print(&format!(
                    "evaluation at step {}:{}{}{}{}",
                    record.step,
                    value("loss", record.scores.eval_loss),
                    value("token accuracy", record.scores.token_accuracy),
                    value("exact match", record.scores.exact_match),
                    if record.best { "  (best so far)" } else { "" }
                ));
            }
            Event::Checkpoint(record) => self.print(&format!(
                "checkpoint at step {}: {} in {:.2} s, for which training waited {:.2} s",
                record.step,
                display_bytes(record.bytes),
                record.seconds,
                record.waited_seconds
            )),
            Event::Warning(text) => self.print(&format!("warning: {text}")),
            Event::CheckpointFailed { step, message } => {
                self.print(&format!("warning: no checkpoint at step {step}: {message}"));
            }
            Event::Note(text) => self.print(text),
            Event::Attempt { .. } | Event::Committing { .. } | Event::Validated(_) | Event::Trained(_) => {}
        }
        Ok(())
    }
}
