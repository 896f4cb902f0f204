//! What a run leaves to be looked at later: `metrics.jsonl`, `trainer_state.json` in Hugging Face's shape, TensorBoard
//! events and `loss.svg`. On resume everything after the checkpoint's step is dropped, so the record is continuous.

mod events;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crds::report::MetricValue;
use serde_json::{Map, Value, json};

use self::events::EventFile;
use crate::store::files::write_atomically;
use crate::tell::plot::loss_svg;
use crate::tell::record::{EvaluationRecord, Event, Observer, StepRecord};

/// Writes the record of one run.
#[derive(Debug)]
pub struct History {
    run: PathBuf,
    metrics: BufWriter<File>,
    events: EventFile,
    /// Entries as `metrics.jsonl` has them, or should have them.
    entries: Vec<Value>,
    /// Whether the file lacks some of them: the disk was full.
    behind: bool,
}

/// Writes `metrics.jsonl` anew, and opens it for more.
fn write_entries(path: &Path, entries: &[Value]) -> io::Result<BufWriter<File>> {
    let text: String = entries.iter().map(|entry| format!("{entry}\n")).collect();
    write_atomically(path, text.as_bytes())?;
    Ok(BufWriter::new(OpenOptions::new().append(true).open(path)?))
}

/// A number as JSON; one that is not finite is null, JSON has no other word for it.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number)
}

impl History {
    /// Continues the record of `run` after `resumed_step`, whose newest evaluation was at `evaluated_step`, or begins it
    /// anew. A later evaluation is dropped even if its step stays: it will be made again.
    pub fn open(run: &Path, resumed_step: i64, evaluated_step: i64) -> io::Result<Self> {
        let path = run.join("metrics.jsonl");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        // A line that a crash cut short is not JSON and is dropped with what came after the checkpoint.
        let entries: Vec<Value> = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|entry| {
                let last = if entry.get("loss").is_some() { resumed_step } else { evaluated_step };
                entry["step"].as_i64().is_some_and(|step| step <= last)
            })
            .collect();
        let metrics = write_entries(&path, &entries)?;
        let events = EventFile::create(run, resumed_step)?;
        Ok(Self { run: run.into(), metrics, events, entries, behind: false })
    }

    /// After an error nothing is lost: what the file lacks is written with the next entry that it takes.
    fn add(&mut self, entry: Value) -> io::Result<()> {
        let written =
            if self.behind { Ok(()) } else { writeln!(self.metrics, "{entry}").and_then(|()| self.metrics.flush()) };
        self.entries.push(entry);
        if self.behind {
            self.metrics = write_entries(&self.run.join("metrics.jsonl"), &self.entries)?;
        }
        self.behind = written.is_err();
        written
    }

    fn step(&mut self, record: &StepRecord) -> io::Result<()> {
        let tokens_per_second = record.input_tokens as f64 / record.seconds.max(1e-9);
        self.events.scalars(
            record.step,
            &[
                ("train/loss", record.loss),
                ("train/grad_norm", record.gradient_norm),
                ("train/learning_rate", record.learning_rate),
                ("train/tokens_per_second", tokens_per_second),
            ],
        )?;
        self.add(json!({
            "step": record.step,
            "epoch": number(record.epoch),
            "loss": number(record.loss),
            "grad_norm": number(record.gradient_norm),
            "learning_rate": number(record.learning_rate),
            "num_tokens": record.total_trained_tokens,
            "input_tokens": record.total_input_tokens,
            "seconds": number(record.seconds),
            "finite": record.finite,
        }))
    }

    fn evaluation(&mut self, record: &EvaluationRecord) -> io::Result<()> {
        let scores = &record.scores;
        let named = [
            ("eval_loss", scores.eval_loss),
            ("eval_perplexity", scores.perplexity),
            ("eval_mean_token_accuracy", scores.token_accuracy),
            ("eval_exact_match", scores.exact_match),
        ];
        let mut entry = Map::new();
        entry.insert("step".into(), record.step.into());
        entry.insert("epoch".into(), number(record.epoch));
        for (name, value) in named.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            entry.insert(name.into(), number(value));
            self.events.scalars(record.step, &[(&name.replacen('_', "/", 1), value)])?;
        }
        entry.insert("best".into(), record.best.into());
        self.add(Value::Object(entry))
    }

    /// Newest training and validation values by the names that reports use.
    pub fn newest(&self) -> Vec<MetricValue> {
        [
            ("loss", "trainLoss"),
            ("learning_rate", "learningRate"),
            ("grad_norm", "gradientNorm"),
            ("eval_loss", "evalLoss"),
            ("eval_perplexity", "perplexity"),
            ("eval_mean_token_accuracy", "tokenAccuracy"),
            ("eval_exact_match", "exactMatch"),
        ]
        .into_iter()
        .filter_map(|(key, name)| {
            let value = self.entries.iter().rev().find_map(|entry| entry[key].as_f64())?;
            Some(MetricValue { name: name.into(), value })
        })
        .collect()
    }

    /// Writes `trainer_state.json` and `loss.svg` as of now. `best`: step and value of the best evaluation.
    pub fn write_summaries(&self, max_steps: i64, best: Option<(i64, f64)>, title: &str) -> io::Result<()> {
        let last = self.entries.last();
        let state = json!({
            "best_metric": best.map(|(_, value)| value),
            "best_global_step": best.map(|(step, _)| step),
            "epoch": last.map_or(Value::Null, |entry| entry["epoch"].clone()),
            "global_step": last.map_or(Value::Null, |entry| entry["step"].clone()),
            "max_steps": max_steps,
            "log_history": self.entries,
        });
        write_atomically(&self.run.join("trainer_state.json"), &serde_json::to_vec_pretty(&state)?)?;
        write_atomically(&self.run.join("loss.svg"), self.plot(title).as_bytes())
    }

    fn plot(&self, title: &str) -> String {
        let series = |name: &str| -> Vec<(f64, f64)> {
            self.entries.iter().filter_map(|entry| Some((entry["step"].as_f64()?, entry[name].as_f64()?))).collect()
        };
        loss_svg(&series("loss"), &series("eval_loss"), title)
    }
}

impl Observer for History {
    fn observe(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Step(record) => self.step(record),
            Event::Evaluation(record) => self.evaluation(record),
            Event::Checkpoint(_) => {
                self.metrics.get_ref().sync_data()?;
                self.events.flush()
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: i64, loss: f64) -> Event {
        Event::Step(StepRecord {
            step,
            total_steps: 4,
            loss,
            seconds: 1.0,
            finite: loss.is_finite(),
            ..StepRecord::default()
        })
    }

    #[test]
    fn a_resumed_record_is_continuous_and_nan_is_null() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut history = History::open(run.path(), 0, -1).expect("writable");
        for event in [step(1, 2.0), step(2, f64::NAN), step(3, 1.0)] {
            history.observe(&event).expect("writable");
        }
        drop(history);
        let mut history = History::open(run.path(), 2, -1).expect("writable");
        history.observe(&step(3, 1.5)).expect("writable");
        history.write_summaries(4, Some((3, 1.5)), "a < b").expect("writable");
        let text = fs::read_to_string(run.path().join("metrics.jsonl")).expect("readable");
        let losses: Vec<Value> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["loss"].clone()).collect();
        assert_eq!(losses, [json!(2.0), Value::Null, json!(1.5)]);
        let state: Value =
            serde_json::from_slice(&fs::read(run.path().join("trainer_state.json")).expect("readable")).expect("JSON");
        assert_eq!((&state["global_step"], state["log_history"].as_array().map(Vec::len)), (&json!(3), Some(3)));
        let svg = fs::read_to_string(run.path().join("loss.svg")).expect("readable");
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN"), "{svg}");
    }
}
