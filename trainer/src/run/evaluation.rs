//! The final validation: the judged weights, the base model without and with examples in the prompt, general text.

use crds::report::{Scores, ValidationReport};
use crds::run::{Method, RunConfig};

use super::{Error, Planned};
use crate::evaluate::{self, Prompt};
use crate::judge::{Measured, judge};
use crate::linear::Adapters;
use crate::model::{self, Llama, read_base_master};
use crate::optim::Parameters;
use crate::signal::Stop;
use crate::tokenizer::Tokenizer;

/// What a validation needs.
pub struct Evaluation<'a> {
    pub config: &'a RunConfig,
    pub planned: &'a Planned,
    pub stop: &'a Stop,
}

impl Evaluation<'_> {
    /// Measures and judges; `None` if a stop was asked for meanwhile. The parameters are the judged ones, before and after.
    pub fn validate(
        &self,
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
        let Some(tuned) = self.scores(model, Adapters::On, Prompt::ZeroShot, &tokenizer) else { return Ok(None) };
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
        let base = self.baselines(model, &tokenizer, &mut measured);
        let base_general = self.general_loss(model, Adapters::Off);
        if let Some(tuned) = tuned_master {
            parameters.set_master(&tuned);
        }
        if base.is_none() || self.stop.requested() {
            return Ok(None);
        }
        measured.general_loss = base_general.zip(tuned_general);
        Ok(Some(judge(config, &measured)))
    }

    fn baselines(&self, model: &Llama, tokenizer: &Tokenizer, measured: &mut Measured) -> Option<()> {
        let config = &self.config.validation;
        if config.zero_shot {
            measured.zero_shot = Some(self.scores(model, Adapters::Off, Prompt::ZeroShot, tokenizer)?);
        }
        if config.few_shot_examples > 0 && !self.planned.prepared.generation.is_empty() {
            let exact_match = self.exact_match(model, Adapters::Off, Prompt::FewShot, tokenizer)?;
            measured.few_shot = Some(Scores { exact_match: Some(exact_match), ..Scores::default() });
        }
        Some(())
    }

    fn scores(&self, model: &Llama, adapters: Adapters, prompt: Prompt, tokenizer: &Tokenizer) -> Option<Scores> {
        let prepared = &self.planned.prepared;
        let tokens = self.planned.estimate.micro_batch_tokens;
        let mut scores = evaluate::score(model, &prepared.validation, adapters, tokens, self.stop)?;
        if !prepared.generation.is_empty() {
            scores.exact_match = Some(self.exact_match(model, adapters, prompt, tokenizer)?);
        }
        Some(scores)
    }

    fn exact_match(&self, model: &Llama, adapters: Adapters, prompt: Prompt, tokenizer: &Tokenizer) -> Option<f64> {
        let rows = &self.planned.prepared.generation;
        evaluate::exact_match(model, rows, prompt, adapters, tokenizer, self.stop, &mut |_| ())
    }

    /// Mean loss on general text, if there is some.
    fn general_loss(&self, model: &Llama, adapters: Adapters) -> Option<f64> {
        let tokens = self.planned.estimate.micro_batch_tokens;
        evaluate::score(model, &self.planned.prepared.forgetting, adapters, tokens, self.stop)?.eval_loss
    }
}
