//! Measuring: the validation rows while training goes on, and at its end the judged weights, the base model without and
//! with examples in the prompt, and general text.

use std::path::Path;

use crds::report::ValidationReport;
use crds::run::{Method, RunConfig};
use serde_json::json;

use super::Error;
use crate::compute::linear::Adapters;
use crate::compute::optim::Parameters;
use crate::data::tokenizer::Tokenizer;
use crate::ground::stop::Stop;
use crate::judge::evaluate::{self, Measurement, Prompt, Questions};
use crate::judge::generate::Progress;
use crate::judge::{Measured, judge};
use crate::model::{self, Decoder, restore_base};
use crate::run::prepare::Prepared;
use crate::store::files::write_atomically;
use crate::tell::record::{Event, Observer};
use crate::train::TrainState;

/// What a validation needs.
pub struct Evaluation<'a> {
    pub config: &'a RunConfig,
    pub prepared: &'a Prepared,
    pub at_once: AtOnce,
    pub stop: &'a Stop,
    pub observer: &'a mut dyn Observer,
    pub run: &'a Path,
}

/// How much is computed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtOnce {
    /// Tokens whose loss is measured.
    pub micro_batch_tokens: i64,
    /// Tokens for which the caches of prompts that are answered have room.
    pub cache_tokens: i64,
}

impl From<&TrainState> for AtOnce {
    fn from(state: &TrainState) -> Self {
        Self { micro_batch_tokens: state.micro_batch_tokens, cache_tokens: state.cache_tokens }
    }
}

/// Who is measured: the weights, the prompt, and the words for it.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    adapters: Adapters,
    prompt: Prompt,
    name: &'static str,
}

pub const TUNED: Subject = Subject { adapters: Adapters::On, prompt: Prompt::ZeroShot, name: "tuned model" };
const BASE: Subject = Subject { adapters: Adapters::Off, prompt: Prompt::ZeroShot, name: "base model" };
const FEW_SHOT: Subject =
    Subject { adapters: Adapters::Off, prompt: Prompt::FewShot, name: "base model with examples in the prompt" };

/// Measures the loss of `subject` on the validation rows; `None` if a stop was asked for meanwhile.
pub fn score(
    model: &Decoder,
    prepared: &Prepared,
    subject: Subject,
    at_once: AtOnce,
    stop: &Stop,
) -> Option<Measurement> {
    let examples = match subject.prompt {
        Prompt::ZeroShot => &prepared.validation,
        Prompt::FewShot => &prepared.few_shot,
    };
    let losses = evaluate::score(model, examples, subject.adapters, at_once.micro_batch_tokens, stop)?;
    Some(Measurement { losses, ..Measurement::default() })
}

/// Adds what `subject` answers to the validation rows, unless `scored` has it; `None` if a stop was asked for meanwhile. `progress` is
/// told how many rows are answered, of how many.
pub fn answer(
    model: &Decoder,
    prepared: &Prepared,
    subject: Subject,
    scored: Measurement,
    at_once: AtOnce,
    stop: &Stop,
    progress: &mut dyn FnMut(Progress, usize),
) -> Result<Option<Measurement>, Error> {
    if prepared.generation.is_empty() || !scored.hits.is_empty() {
        return Ok(Some(scored));
    }
    let tokenizer = Tokenizer::open(&prepared.base.folder)?;
    let questions =
        Questions { rows: &prepared.generation, prompt: subject.prompt, cache_tokens: at_once.cache_tokens };
    let answered = evaluate::answer(model, questions, subject.adapters, &tokenizer, stop, progress);
    Ok(answered.map(|answered| Measurement { losses: scored.losses, ..answered }))
}

impl Evaluation<'_> {
    /// Judges the parameters as they are, by what was measured of them already where it is `known`; `None` if a stop was asked
    /// for meanwhile. Full fine-tuning has no adapter to switch off: where the base is measured too, its weights are left in the
    /// place of the judged ones.
    pub fn validate(
        &mut self,
        model: &Decoder,
        parameters: &mut Parameters,
        source: &model::Source,
        step: i64,
        known: Option<Measurement>,
    ) -> Result<Option<ValidationReport>, Error> {
        let Some(tuned) = self.measure(model, TUNED, known)? else { return Ok(None) };
        let mut measured = Measured { step, tuned, ..Measured::default() };
        let tuned_general = self.general_loss(model, Adapters::On);
        let config = &self.config.validation;
        let has_shots = self.prepared.generation.iter().any(|row| row.few_shot_prompt.is_some());
        let has_shots = has_shots || !self.prepared.few_shot.is_empty();
        let measures_base = config.zero_shot || has_shots || !self.prepared.forgetting.is_empty();
        if measures_base && matches!(self.config.method, Method::Full { .. }) {
            restore_base(source, parameters, self.stop)?;
        }
        if config.zero_shot {
            let Some(zero_shot) = self.measure(model, BASE, None)? else { return Ok(None) };
            measured.zero_shot = Some(zero_shot);
        }
        if has_shots {
            let Some(few_shot) = self.measure(model, FEW_SHOT, None)? else { return Ok(None) };
            measured.few_shot = (few_shot.num_scored() + few_shot.num_answered() > 0).then_some(few_shot);
        }
        let base_general = self.general_loss(model, Adapters::Off);
        if self.stop.requested() {
            return Ok(None);
        }
        measured.general_loss = base_general.zip(tuned_general);
        self.write_answers(&measured)?;
        let mut report = judge(config, &measured);
        report.few_shot_examples =
            report.few_shot_examples.map(|asked| self.prepared.report.few_shot_examples.unwrap_or(asked));
        Ok(Some(report))
    }

    fn measure(
        &mut self,
        model: &Decoder,
        subject: Subject,
        known: Option<Measurement>,
    ) -> Result<Option<Measurement>, Error> {
        if self.stop.requested() {
            return Ok(None);
        }
        let scored = known.or_else(|| score(model, self.prepared, subject, self.at_once, self.stop));
        let Some(scored) = scored else { return Ok(None) };
        let mut told = Ok(());
        let mut progress = |Progress { answered, tokens }, rows| {
            if told.is_ok() {
                told = self.observer.observe(&Event::Answered { who: subject.name, answered, rows, tokens });
            }
        };
        let measurement = answer(model, self.prepared, subject, scored, self.at_once, self.stop, &mut progress)?;
        told.map_err(|source| Error::Write { path: self.run.into(), source })?;
        Ok(measurement)
    }

    /// Writes what was answered, a line for each row, for whoever wants to know more than how many answers are right.
    fn write_answers(&self, measured: &Measured) -> Result<(), Error> {
        if measured.tuned.answers.is_empty() {
            return Ok(());
        }
        let of = |measurement: Option<&Measurement>, row: usize| measurement?.answers.get(row)?.clone();
        let lines = self.prepared.generation.iter().enumerate().map(|(index, row)| {
            let mut line = json!({ "line": row.line, "reference": row.reference });
            let subjects = [
                ("tuned", Some(&measured.tuned)),
                ("zeroShot", measured.zero_shot.as_ref()),
                ("fewShot", measured.few_shot.as_ref()),
            ];
            for (name, measurement) in subjects {
                if let Some(answer) = of(measurement, index) {
                    line[name] = json!(answer);
                }
            }
            line.to_string() + "\n"
        });
        let path = self.run.join("answers.jsonl");
        write_atomically(&path, lines.collect::<String>().as_bytes()).map_err(|source| Error::Write { path, source })
    }

    /// Mean loss on general text, if there is some.
    fn general_loss(&self, model: &Decoder, adapters: Adapters) -> Option<f64> {
        let general = &self.prepared.forgetting;
        let losses = evaluate::score(model, general, adapters, self.at_once.micro_batch_tokens, self.stop)?;
        Measurement { losses, ..Measurement::default() }.scores().eval_loss
    }
}
