//! Measures a model on rows: loss, perplexity, token accuracy, exact match. Each row is measured on its own, so that two
//! models can be compared row by row; a mean is a sum over all rows, divided once.

use std::time::Instant;

use crds::report::{Generated, Scores};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::compute::linear::Adapters;
use crate::data::example::Examples;
use crate::data::generation::{GenerationRow, max_new_tokens};
use crate::data::pack::pack;
use crate::data::tokenizer::Tokenizer;
use crate::ground::stop::Stop;
use crate::judge::generate::{Limits, Progress, StopText, generate};
use crate::model::{Decoder, DeviceBatch};

/// What is asked, and how much of it at once.
#[derive(Clone, Copy, Debug)]
pub struct Questions<'a> {
    /// The rows.
    pub rows: &'a [GenerationRow],
    /// Which prompt of each.
    pub prompt: Prompt,
    /// As [`Limits::cache_tokens`].
    pub cache_tokens: i64,
}

/// Which prompt of a row is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// The row's own prompt. An answer counts if the model ends it with a stop token: that is what it was trained to do.
    ZeroShot,
    /// With examples before it. An answer also ends where the examples' answers do: a base model that follows them in plain
    /// text has no reason to write a stop token.
    FewShot,
}

/// What the loss on one row is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowScore {
    /// Sum of negative log-likelihoods over the row's trained tokens, nats.
    pub loss_sum: f64,
    /// Trained tokens that were predicted right.
    pub correct: i64,
    /// Trained tokens; 0 where the row was not measured.
    pub tokens: i64,
    /// The last trained token's part of `loss_sum`.
    pub last_loss: f64,
    /// The last trained token's part of `correct`.
    pub last_correct: i64,
}

impl RowScore {
    fn without_last_token(self) -> Self {
        Self {
            loss_sum: self.loss_sum - self.last_loss,
            correct: self.correct - self.last_correct,
            tokens: self.tokens - 1,
            last_loss: 0.0,
            last_correct: 0,
        }
    }
}

/// What was measured, row by row. Two measurements have the same row at the same index.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measurement {
    /// By validation example.
    pub losses: Vec<RowScore>,
    /// By row to be answered: whether the answer is right; `None` where it was not asked for.
    pub hits: Vec<Option<bool>>,
    /// What `hits` were judged by.
    pub answers: Vec<Option<Answered>>,
    /// How many tokens the answers have and how long they took; `None` where no row was answered.
    pub generated: Option<Generated>,
}

/// What was answered to a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answered {
    /// What is compared with the right answer.
    pub text: String,
    /// Whether the model ended it itself; what was cut off does not count as right.
    pub ended: bool,
    /// Whether it is right.
    pub right: bool,
}

impl Measurement {
    /// Rows that the loss was taken on.
    pub fn num_scored(&self) -> usize {
        self.losses.iter().filter(|row| row.tokens > 0).count()
    }

    /// Rows that were answered.
    pub fn num_answered(&self) -> usize {
        self.hits.iter().flatten().count()
    }

    /// Means over all rows; what was measured on no row is absent.
    pub fn scores(&self) -> Scores {
        let tokens: i64 = self.losses.iter().map(|row| row.tokens).sum();
        let mean = |sum: f64| (tokens > 0).then(|| sum / tokens as f64);
        let eval_loss = mean(self.losses.iter().map(|row| row.loss_sum).sum());
        let answered = self.num_answered();
        let right = self.hits.iter().flatten().filter(|&&hit| hit).count();
        Scores {
            eval_loss,
            perplexity: eval_loss.map(f64::exp),
            token_accuracy: mean(self.losses.iter().map(|row| row.correct).sum::<i64>() as f64),
            exact_match: (answered > 0).then(|| right as f64 / answered as f64),
        }
    }

    /// Both measurements on what both have: rows that only one of them has are left out, and so is a last token that only
    /// one of them was asked for.
    pub fn shared(&self, other: &Self) -> (Self, Self) {
        let losses = self.losses.iter().zip(&other.losses).map(|(&a, &b)| match a.tokens - b.tokens {
            _ if a.tokens == 0 || b.tokens == 0 => Default::default(),
            0 => (a, b),
            1 => (a.without_last_token(), b),
            -1 => (a, b.without_last_token()),
            _ => Default::default(),
        });
        let hits = self.hits.iter().zip(&other.hits).map(|(&a, &b)| (a.and(b).and(a), a.and(b)));
        let (own_losses, other_losses) = losses.unzip();
        let (own_hits, other_hits) = hits.unzip();
        let of = |losses, hits| Self { losses, hits, ..Self::default() };
        (of(own_losses, own_hits), of(other_losses, other_hits))
    }
}

/// Loss and hits over the trained tokens of each row; `None` if a stop was asked for meanwhile.
pub fn score(
    model: &Decoder,
    examples: &Examples,
    adapters: Adapters,
    micro_batch_tokens: i64,
    stop: &Stop,
) -> Option<Vec<RowScore>> {
    let mut rows = vec![RowScore::default(); examples.len()];
    let ids: Vec<usize> = (0..examples.len()).filter(|&id| examples.num_trained(id) > 0).collect();
    for batch in pack(examples, &ids, micro_batch_tokens) {
        let scored = model.score(&DeviceBatch::new(&batch, model.device()), adapters, stop)?;
        let on_host = |x: &Tensor, kind| x.to_device(Device::Cpu).to_kind(kind);
        // Sums are taken in fp64: results are compared with each other.
        let losses: Vec<f64> = Vec::try_from(on_host(&scored.losses_n, Kind::Double)).expect("doubles");
        let correct: Vec<i64> = Vec::try_from(on_host(&scored.correct_n, Kind::Int64)).expect("integers");
        let mut start = 0;
        for &id in &batch.examples {
            let end = start + examples.num_trained(id);
            rows[id] = RowScore {
                loss_sum: losses[start..end].iter().sum(),
                correct: correct[start..end].iter().sum(),
                tokens: (end - start) as i64,
                last_loss: losses[end - 1],
                last_correct: correct[end - 1],
            };
            start = end;
        }
    }
    Some(rows)
}

/// Whether the greedy answer to each row's prompt equals the reference after trimming white space, beside the answer; `None`
/// for a row that has no such prompt or that does not fit into the model's context, and as a whole if a stop was asked for
/// meanwhile. `progress` is told how far it is, and of how many prompts.
pub fn answer(
    model: &Decoder,
    Questions { rows, prompt, cache_tokens }: Questions,
    adapters: Adapters,
    tokenizer: &Tokenizer,
    stop: &Stop,
    progress: &mut dyn FnMut(Progress, usize),
) -> Option<Measurement> {
    let asked: Vec<(usize, &[u32])> = rows
        .iter()
        .enumerate()
        .filter_map(|(index, row)| match prompt {
            Prompt::ZeroShot => Some((index, row.prompt.as_slice())),
            Prompt::FewShot => Some((index, row.few_shot_prompt.as_deref()?)),
        })
        .filter(|&(index, tokens)| (tokens.len() + rows[index].reference_tokens) as i64 <= model.max_positions())
        .collect();
    if asked.is_empty() {
        return Some(Measurement { hits: vec![None; rows.len()], ..Measurement::default() });
    }
    let prompts: Vec<&[u32]> = asked.iter().map(|&(_, tokens)| tokens).collect();
    let stop_text = match prompt {
        Prompt::ZeroShot => None,
        Prompt::FewShot => rows.iter().find_map(|row| row.few_shot_stop.as_deref()),
    };
    let limits = Limits {
        max_new_tokens: max_new_tokens(rows),
        end_tokens: tokenizer.end_tokens().to_vec(),
        stop_text: stop_text.map(|text| StopText { text, tokenizer }),
        cache_tokens,
    };
    let total = prompts.len();
    progress(Progress::default(), total);
    let started = Instant::now();
    let answers = generate(model, &prompts, adapters, &limits, stop, &mut |so_far| progress(so_far, total))?;
    let tokens = answers.iter().map(|answer| answer.generated as i64).sum();
    let generated = Generated { tokens, seconds: started.elapsed().as_secs_f64() };
    let mut answered = vec![None; rows.len()];
    for (&(index, _), answer) in asked.iter().zip(&answers) {
        let text = tokenizer.decode(&answer.tokens);
        let right = |text: &String| before(text, stop_text).trim() == rows[index].reference.trim();
        answered[index] = Some(Answered {
            right: answer.ended && text.as_ref().is_ok_and(right),
            ended: answer.ended,
            text: before(&text.unwrap_or_default(), stop_text).trim().to_owned(),
        });
    }
    Some(Measurement {
        losses: Vec::new(),
        hits: answered.iter().map(|answered| answered.as_ref().map(|answered| answered.right)).collect(),
        answers: answered,
        generated: Some(generated),
    })
}

/// The part of an answer before its stop text.
fn before<'a>(answer: &'a str, stop_text: Option<&str>) -> &'a str {
    let answer = answer.trim_start();
    stop_text.and_then(|stop| answer.split_once(stop)).map_or(answer, |(before, _)| before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(loss_sum: f64, tokens: i64) -> RowScore {
        RowScore { loss_sum, tokens, correct: 1, last_loss: 0.25, last_correct: 1 }
    }

    #[test]
    fn two_measurements_share_the_rows_and_tokens_that_both_have() {
        let tuned = Measurement {
            losses: vec![row(1.0, 4), row(2.0, 4), row(3.0, 4), row(9.0, 4)],
            hits: vec![Some(true), Some(false), Some(true)],
            ..Measurement::default()
        };
        let few_shot = Measurement {
            losses: vec![row(2.0, 4), RowScore::default(), row(6.0, 3)],
            hits: vec![Some(false), None, Some(true)],
            ..Measurement::default()
        };
        assert_eq!((tuned.num_scored(), few_shot.num_scored(), few_shot.num_answered()), (4, 2, 2));
        let (ours, theirs) = tuned.shared(&few_shot);
        assert_eq!((ours.num_scored(), theirs.num_scored()), (2, 2));
        assert_eq!((ours.scores().eval_loss, theirs.scores().eval_loss), (Some(3.75 / 7.0), Some(8.0 / 7.0)));
        assert_eq!((ours.scores().exact_match, theirs.scores().exact_match), (Some(1.0), Some(0.5)));
        assert_eq!(tuned.shared(&tuned).0, tuned);
        assert_eq!(Measurement::default().scores(), Scores::default());
    }

    #[test]
    fn an_answer_ends_at_the_stop_text() {
        assert_eq!(before("\n\n yes \n\nQ: no", Some("\n\n")), "yes ");
        assert_eq!(before(" yes \n\nQ: no", None), "yes \n\nQ: no");
    }
}
