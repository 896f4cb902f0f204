//! The final validation: the judged weights, the base model without and with examples in the prompt, general text.

use std::path::Path;

use crds::report::{Scores, ValidationReport};
use crds::run::{Method, RunConfig};

use super::{Error, Planned};
use crate::evaluate::{self, Prompt};
use crate::judge::{Measured, judge};
use crate::linear::Adapters;
use crate::model::{self, Llama, read_base_master};
use crate::optim::Parameters;
use crate::record::{Event, Observer};
use crate::signal::Stop;
use crate::tokenizer::Tokenizer;

/// What a validation needs.
pub struct Evaluation<'a> {
    pub config: &'a RunConfig,
    pub planned: &'a Planned,
    pub stop: &'a Stop,
    pub observer: &'a mut dyn Observer,
    pub run: &'a Path,
}

/// Whose answers are measured: the weights, the prompt, and the words for it.
#[derive(Clone, Copy)]
struct Subject {
    adapters: Adapters,
    prompt: Prompt,
    name: &'static str,
}

const TUNED: Subject = Subject { adapters: Adapters::On, prompt: Prompt::ZeroShot, name: "tuned model" };
const BASE: Subject = Subject { adapters: Adapters::Off, prompt: Prompt::ZeroShot, name: "base model" };
const FEW_SHOT: Subject =
    Subject { adapters: Adapters::Off, prompt: Prompt::FewShot, name: "base model with examples in the prompt" };

impl Evaluation<'_> {
    /// Measures and judges; `None` if a stop was asked for meanwhile. The parameters are the judged ones, before and after.
    pub fn validate(
        &mut self,
        model: &Llama,
        parameters: &mut Parameters,
        source: &model::Source,
        step: i64,
    ) -> Result<Option<ValidationReport>, Error> {
        let prepared = &self.planned.prepared;
        let tokenizer = Tokenizer::open(&prepared.model)?;
        let config = &self.config.validation;
        let mut measured = Measured {
            rows: prepared.validation.len() as i64,
            generated_rows: prepared.generation.len() as i64,
            step,
            ..Measured::default()
        };
        let Some(tuned) = self.scores(model, TUNED, &tokenizer)? else { return Ok(None) };
        measured.tuned = tuned;
        let tuned_general = self.general_loss(model, Adapters::On);

        // LoRA switches its adapters off; full fine-tuning puts the base weights in place meanwhile.
        let tuned_master = match self.config.method {
            Method::Full {} => {
                let tuned = parameters.flat_master().copy();
                parameters.set_master(&read_base_master(source, parameters)?);
                Some(tuned)
            }
            Method::LoRA { .. } | Method::QLoRA { .. } => None,
        };
        let base = self.baselines(model, &tokenizer, &mut measured)?;
        let base_general = self.general_loss(model, Adapters::Off);
        if let Some(tuned) = tuned_master {
            parameters.set_master(&tuned);
        }
        if base.is_none() || self.stop.requested() {
            return Ok(None);
        }
        measured.general_loss = base_general.zip(tuned_general);
        let mut report = judge(config, &measured);
        report.few_shot_examples =
            report.few_shot_examples.map(|asked| prepared.report.few_shot_examples.unwrap_or(asked));
        Ok(Some(report))
    }

    fn baselines(
        &mut self,
        model: &Llama,
        tokenizer: &Tokenizer,
        measured: &mut Measured,
    ) -> Result<Option<()>, Error> {
        let config = &self.config.validation;
        if config.zero_shot {
            let Some(scores) = self.scores(model, BASE, tokenizer)? else { return Ok(None) };
            measured.zero_shot = Some(scores);
        }
        if self.planned.prepared.generation.iter().any(|row| row.few_shot_prompt.is_some()) {
            let Some(exact_match) = self.exact_match(model, FEW_SHOT, tokenizer)? else { return Ok(None) };
            measured.few_shot = Some(Scores { exact_match: Some(exact_match), ..Scores::default() });
        }
        Ok(Some(()))
    }

    fn scores(&mut self, model: &Llama, subject: Subject, tokenizer: &Tokenizer) -> Result<Option<Scores>, Error> {
        let prepared = &self.planned.prepared;
        let tokens = self.planned.estimate.micro_batch_tokens;
        let scores = evaluate::score(model, &prepared.validation, subject.adapters, tokens, self.stop);
        let Some(mut scores) = scores else { return Ok(None) };
        if !prepared.generation.is_empty() {
            let Some(exact_match) = self.exact_match(model, subject, tokenizer)? else { return Ok(None) };
            scores.exact_match = Some(exact_match);
        }
        Ok(Some(scores))
    }

    fn exact_match(&mut self, model: &Llama, subject: Subject, tokenizer: &Tokenizer) -> Result<Option<f64>, Error> {
        let rows = &self.planned.prepared.generation;
        let mut told = Ok(());
        let mut progress = |answered| {
            if told.is_ok() {
                told = self.observer.observe(&Event::Answered { who: subject.name, answered, rows: rows.len() });
            }
        };
        progress(0);
        let share =
            evaluate::exact_match(model, rows, subject.prompt, subject.adapters, tokenizer, self.stop, &mut progress);
        told.map_err(|source| Error::Write { path: self.run.into(), source })?;
        Ok(share)
    }

    /// Mean loss on general text, if there is some.
    fn general_loss(&self, model: &Llama, adapters: Adapters) -> Option<f64> {
        let tokens = self.planned.estimate.micro_batch_tokens;
        evaluate::score(model, &self.planned.prepared.forgetting, adapters, tokens, self.stop)?.eval_loss
    }
}
