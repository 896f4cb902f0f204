//! Measures a model on rows: loss, perplexity, token accuracy, exact match. Sums are taken over all rows and divided once.

use crds::report::Scores;
use tch::Kind;

use crate::data::example::Examples;
use crate::data::generation::GenerationRow;
use crate::data::pack::pack;
use crate::generate::{Limits, generate};
use crate::linear::Adapters;
use crate::model::{DeviceBatch, Llama};
use crate::signal::Stop;
use crate::tokenizer::Tokenizer;

/// Tokens that the key-value caches of the prompts answered at once may hold.
pub const GENERATION_CACHE_TOKENS: i64 = 8192;

/// Which prompt of a row is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// The row's own prompt.
    ZeroShot,
    /// With examples before it.
    FewShot,
}

/// Loss, perplexity and token accuracy over the trained tokens of all rows; `None` if a stop was asked for meanwhile.
pub fn score(
    model: &Llama,
    examples: &Examples,
    adapters: Adapters,
    micro_batch_tokens: i64,
    stop: &Stop,
) -> Option<Scores> {
    let ids: Vec<usize> = (0..examples.len()).collect();
    let (mut loss_sum, mut correct, mut tokens) = (0.0, 0.0, 0usize);
    for batch in pack(examples, &ids, micro_batch_tokens) {
        if batch.labels.is_empty() {
            continue;
        }
        let scored = model.score(&DeviceBatch::new(&batch, model.device()), adapters, stop)?;
        loss_sum += scored.loss_sum.double_value(&[]);
        correct += scored.correct.to_kind(Kind::Double).double_value(&[]);
        tokens += batch.labels.len();
    }
    if tokens == 0 {
        return Some(Scores::default());
    }
    let eval_loss = loss_sum / tokens as f64;
    Some(Scores {
        eval_loss: Some(eval_loss),
        perplexity: Some(eval_loss.exp()),
        token_accuracy: Some(correct / tokens as f64),
        exact_match: None,
    })
}

/// Share of rows whose greedy answer equals the reference after trimming white space; `None` if a stop was asked for
/// meanwhile. Answers may be half as long again as the longest reference. `progress` is told how many are answered.
pub fn exact_match(
    model: &Llama,
    rows: &[GenerationRow],
    prompt: Prompt,
    adapters: Adapters,
    tokenizer: &Tokenizer,
    stop: &Stop,
    progress: &mut dyn FnMut(usize),
) -> Option<f64> {
    let prompts: Vec<&[u32]> = rows
        .iter()
        .map(|row| match prompt {
            Prompt::ZeroShot => row.prompt.as_slice(),
            Prompt::FewShot => row.few_shot_prompt.as_deref().unwrap_or(&row.prompt),
        })
        .collect();
    let longest = rows.iter().map(|row| tokenizer.encode(&row.reference).map_or(0, |encoded| encoded.ids.len())).max();
    let longest = longest.unwrap_or(0) as i64;
    let limits = Limits {
        max_new_tokens: longest + longest / 2 + 2,
        end_tokens: tokenizer.end_tokens().to_vec(),
        cache_tokens: GENERATION_CACHE_TOKENS,
    };
    let answers = generate(model, &prompts, adapters, &limits, stop, progress)?;
    let hits = rows
        .iter()
        .zip(&answers)
        .filter(|(row, answer)| {
            answer.ended && tokenizer.decode(&answer.tokens).is_ok_and(|text| text.trim() == row.reference.trim())
        })
        .count();
    Some(hits as f64 / rows.len().max(1) as f64)
}
