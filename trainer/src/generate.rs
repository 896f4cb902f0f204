//! Greedy generation for many prompts at once, with a key-value cache.
//!
//! What all prompts begin with (a few-shot prompt's examples) is computed once. Shapes: b prompts, s new tokens a row, l
//! cached tokens, n heads, k key-value heads, g heads of a group, d head size.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::linear::Adapters;
use crate::model::{KeyValues, Llama};
use crate::signal::Stop;
use crate::tokenizer::Tokenizer;
use crate::train::guard_memory;

/// How far to generate.
#[derive(Clone, Debug)]
pub struct Limits<'a> {
    /// New tokens per prompt, the end token included.
    pub max_new_tokens: i64,
    /// Tokens that end an answer.
    pub end_tokens: Vec<u32>,
    /// Text that ends an answer as well.
    pub stop_text: Option<StopText<'a>>,
    /// Tokens that the caches of the prompts computed at once may hold, padding included; a longer prompt gets a cache of
    /// its own.
    pub cache_tokens: i64,
}

/// Text that ends an answer, wherever token boundaries lie. White space before the answer does not count.
#[derive(Clone, Copy, Debug)]
pub struct StopText<'a> {
    /// The text.
    pub text: &'a str,
    /// What turns an answer into text.
    pub tokenizer: &'a Tokenizer,
}

impl StopText<'_> {
    fn ends(&self, tokens: &[u32]) -> bool {
        let holds =
            |tokens: &[u32]| self.tokenizer.decode(tokens).is_ok_and(|answer| answer.trim_start().contains(self.text));
        // A token is at least a byte of text: where the newest one completes the stop text, these hold all of it.
        let newest = &tokens[tokens.len().saturating_sub(self.text.len() + 1)..];
        self.tokenizer.decode(newest).is_ok_and(|text| text.contains(self.text)) && holds(tokens)
    }
}

/// Most prompts computed at once: beyond it matrix products no longer gain.
const MAX_ROWS: usize = 32;
/// Prompts leave the batch once one in so many of it is answered: dropping them copies the others' caches.
const DROP_SHARE: usize = 4;

/// Why an answer ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// New tokens, without the end token, with the stop text.
    pub tokens: Vec<u32>,
    /// Whether the model ended the answer itself.
    pub ended: bool,
    /// New tokens that it took, the end token included.
    pub generated: usize,
}

/// The greedy continuation of each prompt; `None` if a stop was asked for meanwhile. `progress` is told how many are
/// answered. Prompts are shorter than the model's positions. Where memory runs out, fewer prompts are computed at once.
pub fn generate(
    model: &Llama,
    prompts: &[&[u32]],
    adapters: Adapters,
    limits: &Limits,
    stop: &Stop,
    progress: &mut dyn FnMut(usize),
) -> Option<Vec<Answer>> {
    let shared = shared_prefix(prompts);
    // Prompts of similar length share a batch, so that little of it is padding.
    let mut by_length: Vec<usize> = (0..prompts.len()).collect();
    by_length.sort_by_key(|&index| (prompts[index].len(), index));
    let mut answers = vec![Answer::default(); prompts.len()];
    let prefix = prompts.first().map_or(&[][..], |prompt| &prompt[..shared]);
    let mut prefix_cache = None;
    if shared > 0 {
        let mut cache = Cache::new(model, 1, shared as i64);
        let _ = cache.extend(model, &[prefix], adapters, stop)?;
        prefix_cache = Some(cache);
    }
    let widths: Vec<i64> = by_length.iter().map(|&index| prompts[index].len() as i64 + limits.max_new_tokens).collect();
    in_batches(&widths, limits.cache_tokens, &mut |rows| {
        let batch = &by_length[rows.clone()];
        let suffixes: Vec<&[u32]> = batch.iter().map(|&index| &prompts[index][shared..]).collect();
        let batch_answers = generate_batch(model, prefix_cache.as_ref(), &suffixes, adapters, limits, stop)?;
        for (&index, answer) in batch.iter().zip(batch_answers) {
            answers[index] = answer;
        }
        progress(rows.end);
        Some(())
    })?;
    Some(answers)
}

/// Does `work` for all rows, as many at once as `cache_tokens` allow at these ascending widths, at least one. Where memory
/// runs out, the same rows go on in batches of half the size; where it does not suffice for one, libtorch's panic goes on.
fn in_batches(widths: &[i64], mut cache_tokens: i64, work: &mut dyn FnMut(Range<usize>) -> Option<()>) -> Option<()> {
    let mut done = 0;
    while done < widths.len() {
        let tokens = |rows: usize| rows as i64 * widths[done + rows - 1];
        let most = MAX_ROWS.min(widths.len() - done);
        let rows = (1..=most).take_while(|&rows| rows == 1 || tokens(rows) <= cache_tokens).count();
        match guard_memory(|| work(done..done + rows)) {
            Ok(finished) => {
                finished?;
                done += rows;
            }
            Err(_) if rows > 1 => cache_tokens = tokens(rows) / 2,
            Err(message) => panic!("{message}"),
        }
    }
    Some(())
}

/// Length of what all prompts begin with, leaving each at least one token of its own.
fn shared_prefix(prompts: &[&[u32]]) -> usize {
    let Some((first, rest)) = prompts.split_first() else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    rest.iter().fold(first.len().saturating_sub(1), |shared, prompt| {
        let common = first.iter().zip(prompt.iter()).take_while(|(a, b)| a == b).count();
        shared.min(common).min(prompt.len().saturating_sub(1))
    })
}

fn generate_batch(
    model: &Llama,
    prefix: Option<&Cache>,
    suffixes: &[&[u32]],
    adapters: Adapters,
    limits: &Limits,
    stop: &Stop,
) -> Option<Vec<Answer>> {
    let longest = suffixes.iter().map(|suffix| suffix.len()).max().unwrap_or(0) as i64;
    let prefix_length = prefix.map_or(0, |prefix| prefix.filled);
    // Positions are a row's own: a short prompt may be answered at length beside one that nearly fills the context.
    let room = |suffix: &&[u32]| model.max_positions() - prefix_length - suffix.len() as i64;
    let rooms: Vec<usize> =
        suffixes.iter().map(|suffix| limits.max_new_tokens.min(room(suffix)).max(0) as usize).collect();
    let new_tokens = rooms.iter().copied().max().unwrap_or(0);
    let mut cache = Cache::new(model, suffixes.len() as i64, prefix_length + longest + new_tokens as i64);
    if let Some(prefix) = prefix {
        cache.copy_prefix(prefix);
    }
    let mut answers = vec![Answer::default(); suffixes.len()];
    let mut done: Vec<bool> = rooms.iter().map(|&room| room == 0).collect();
    // Which row each row of the cache is.
    let mut in_cache: Vec<usize> = (0..suffixes.len()).collect();
    let mut logits_bv = cache.extend(model, suffixes, adapters, stop)?;
    for _ in 0..new_tokens {
        let next: Vec<i64> = Vec::try_from(logits_bv.argmax(-1, false).to_device(Device::Cpu)).expect("int64 tokens");
        for (&row, &token) in in_cache.iter().zip(&next).filter(|&(&row, _)| !done[row]) {
            let (answer, token) = (&mut answers[row], token as u32);
            answer.generated += 1;
            if limits.end_tokens.contains(&token) {
                answer.ended = true;
            } else {
                answer.tokens.push(token);
                answer.ended = limits.stop_text.is_some_and(|stop_text| stop_text.ends(&answer.tokens));
            }
        }
        for &row in &in_cache {
            done[row] |= answers[row].ended || answers[row].tokens.len() >= rooms[row];
        }
        let mut going: Vec<usize> = (0..in_cache.len()).filter(|&place| !done[in_cache[place]]).collect();
        if going.is_empty() {
            break;
        }
        if (in_cache.len() - going.len()) * DROP_SHARE >= in_cache.len() {
            cache.keep(&going);
        } else {
            going = (0..in_cache.len()).collect();
        }
        in_cache = going.iter().map(|&place| in_cache[place]).collect();
        let feed: Vec<[u32; 1]> = going.iter().map(|&place| [next[place] as u32]).collect();
        let feed: Vec<&[u32]> = feed.iter().map(|token| &token[..]).collect();
        logits_bv = cache.extend(model, &feed, adapters, stop)?;
    }
    Some(answers)
}

/// Keys and values of every layer for a batch of sequences that grow together.
struct Cache {
    /// Per layer: keys and values, `[b, k, l, d]`.
    layers: Vec<(Tensor, Tensor)>,
    /// Columns in use, padding included.
    filled: i64,
    /// Tokens of each sequence, padding excluded.
    lengths: Vec<i64>,
    /// Which columns hold a token of the sequence, `[b, l]`.
    valid: Tensor,
}

impl Cache {
    fn new(model: &Llama, rows: i64, capacity: i64) -> Self {
        let shape = [rows, model.config.kv_heads(), capacity, model.config.head_size()];
        let zeros = || Tensor::zeros(shape, (model.kind(), model.device()));
        Self {
            layers: (0..model.config.num_hidden_layers).map(|_| (zeros(), zeros())).collect(),
            filled: 0,
            lengths: vec![0; rows as usize],
            valid: Tensor::zeros([rows, capacity], (Kind::Bool, model.device())),
        }
    }

    /// Begins every sequence with the one sequence of `prefix`.
    fn copy_prefix(&mut self, prefix: &Self) {
        let length = prefix.filled;
        for ((keys, values), (prefix_keys, prefix_values)) in self.layers.iter().zip(&prefix.layers) {
            keys.narrow(2, 0, length).copy_(prefix_keys);
            values.narrow(2, 0, length).copy_(prefix_values);
        }
        let _ = self.valid.narrow(1, 0, length).fill_(1);
        self.filled = length;
        self.lengths.fill(length);
    }

    /// Leaves these sequences, in this order, and forgets the others.
    fn keep(&mut self, rows: &[usize]) {
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let index = Tensor::from_slice(&index).to_device(self.valid.device());
        for (keys, values) in &mut self.layers {
            *keys = keys.index_select(0, &index);
            *values = values.index_select(0, &index);
        }
        self.valid = self.valid.index_select(0, &index);
        self.lengths = rows.iter().map(|&row| self.lengths[row]).collect();
    }

    /// Appends tokens to each sequence and returns the logits `[b, v]` after the last one of each; `None` if a stop was
    /// asked for meanwhile.
    fn extend(&mut self, model: &Llama, new: &[&[u32]], adapters: Adapters, stop: &Stop) -> Option<Tensor> {
        let device = model.device();
        let rows = new.len() as i64;
        let width = new.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
        let (mut tokens, mut positions, mut valid, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (row, (appended, length)) in new.iter().zip(&mut self.lengths).enumerate() {
            for column in 0..width {
                tokens.push(appended.get(column).map_or(0, |&token| i64::from(token)));
                // Padding repeats the last position, and what follows an answer that is done ends with the tables: nobody
                // attends to either.
                let position = *length + column.min(appended.len().saturating_sub(1)) as i64;
                positions.push(position.min(model.max_positions() - 1));
                valid.push(column < appended.len());
            }
            last.push((row * width + appended.len().saturating_sub(1)) as i64);
            *length += appended.len() as i64;
        }
        let upload = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let (start, width) = (self.filled, width as i64);
        self.filled += width;
        let valid = Tensor::from_slice(&valid).to_device(device).view([rows, width]);
        self.valid.narrow(1, start, width).copy_(&valid);
        let mask = self.attention_mask(start, width, model);
        let (head_size, kv_heads) = (model.config.head_size(), model.config.kv_heads());
        let group = model.config.num_attention_heads / kv_heads;
        let (filled, layers) = (self.filled, &self.layers);
        let mut attend = |layer: usize, q: &Tensor, new: KeyValues| {
            let (cached_keys, cached_values) = &layers[layer];
            let as_columns = |x: &Tensor| x.view([rows, width, kv_heads, head_size]).transpose(1, 2);
            cached_keys.narrow(2, start, width).copy_(&as_columns(&new.keys));
            cached_values.narrow(2, start, width).copy_(&as_columns(&new.values));
            // The query heads of a group become rows of one query: keys and values are read once, not repeated.
            let q = q.view([rows, width, kv_heads, group, head_size]).permute([0, 2, 3, 1, 4]).reshape([
                rows,
                kv_heads,
                group * width,
                head_size,
            ]);
            let (keys, values) = (cached_keys.narrow(2, 0, filled), cached_values.narrow(2, 0, filled));
            let scale = model.attention_scale();
            Tensor::scaled_dot_product_attention(&q, &keys, &values, Some(&mask), 0.0, false, scale, false)
                .view([rows, kv_heads, group, width, head_size])
                .permute([0, 3, 1, 2, 4])
                .reshape([rows * width, kv_heads * group, head_size])
        };
        let hidden = model.infer(&upload(&tokens), &upload(&positions), adapters, stop, &mut attend)?;
        Some(model.logits(&hidden.index_select(0, &upload(&last))))
    }

    /// What each new token may see, `[b, 1, g * s, l]`: valid columns up to its own.
    fn attention_mask(&self, start: i64, width: i64, model: &Llama) -> Tensor {
        let device = self.valid.device();
        let group = model.config.num_attention_heads / model.config.kv_heads();
        let column = Tensor::arange(self.filled, (Kind::Int64, device));
        let own = Tensor::arange(width, (Kind::Int64, device)) + start;
        let causal_sl = column.unsqueeze(0).le_tensor(&own.unsqueeze(1));
        let visible_bsl = self.valid.narrow(1, 0, self.filled).unsqueeze(1).logical_and(&causal_sl.unsqueeze(0));
        visible_bsl.repeat([1, group, 1]).unsqueeze(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_memory_runs_out_the_same_rows_go_on_in_smaller_batches() {
        // Rows that are done after each batch.
        let rows_done = |at_once: usize, cache_tokens: i64| {
            let mut done = Vec::new();
            let mut work = |rows: Range<usize>| {
                assert!(rows.len() <= at_once, "CUDA out of memory. Tried to allocate 2.00 GiB");
                done.push(rows.end);
                Some(())
            };
            in_batches(&[10, 10, 10, 11, 11, 12, 12], cache_tokens, &mut work).map(|()| done)
        };
        assert_eq!(rows_done(9, 1000), Some(vec![7]));
        assert_eq!(rows_done(9, 33), Some(vec![3, 5, 7]));
        assert_eq!(rows_done(3, 1000), Some(vec![3, 6, 7]));
        assert_eq!(rows_done(1, 1000), Some((1..=7).collect()));
        assert!(std::panic::catch_unwind(|| rows_done(0, 1000)).is_err());
    }
}
