//! Greedy generation for many prompts at once, with a key-value cache.
//!
//! What all prompts begin with (a few-shot prompt's examples) is computed once. Shapes: b prompts, s new tokens a row, l
//! cached tokens, n heads, k key-value heads, g heads of a group, d head size.

use tch::{Device, Kind, Tensor};

use crate::linear::Adapters;
use crate::model::{KeyValues, Llama};
use crate::signal::Stop;

/// How far to generate.
#[derive(Clone, Debug)]
pub struct Limits {
    /// New tokens per prompt, the end token included.
    pub max_new_tokens: i64,
    /// Tokens that end an answer.
    pub end_tokens: Vec<u32>,
    /// Tokens that the caches of the prompts computed at once may hold, padding included; a longer prompt gets a cache of
    /// its own.
    pub cache_tokens: i64,
}

/// Most prompts computed at once: beyond it matrix products no longer gain.
const MAX_ROWS: usize = 32;

/// Why an answer ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// New tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Whether the model ended the answer itself.
    pub ended: bool,
}

/// The greedy continuation of each prompt; `None` if a stop was asked for meanwhile. `progress` is told how many are
/// answered.
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
    let mut answered = 0;
    while answered < by_length.len() {
        let fits = |rows: usize| {
            let longest = prompts[by_length[answered + rows - 1]].len() as i64;
            rows as i64 * (longest + limits.max_new_tokens) <= limits.cache_tokens
        };
        let rows = (1..=MAX_ROWS.min(by_length.len() - answered)).take_while(|&rows| rows == 1 || fits(rows)).count();
        let batch = &by_length[answered..answered + rows];
        let suffixes: Vec<&[u32]> = batch.iter().map(|&index| &prompts[index][shared..]).collect();
        let batch_answers = generate_batch(model, prefix_cache.as_ref(), &suffixes, adapters, limits, stop)?;
        for (&index, answer) in batch.iter().zip(batch_answers) {
            answers[index] = answer;
        }
        answered += rows;
        progress(answered);
    }
    Some(answers)
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
    let rows = suffixes.len();
    let longest = suffixes.iter().map(|suffix| suffix.len()).max().unwrap_or(0) as i64;
    let prefix_length = prefix.map_or(0, |prefix| prefix.filled);
    let longest_total = prefix_length + longest;
    let new_tokens = limits.max_new_tokens.min(model.max_positions() - longest_total).max(0);
    let mut cache = Cache::new(model, rows as i64, longest_total + new_tokens);
    if let Some(prefix) = prefix {
        cache.copy_prefix(prefix);
    }
    let mut answers = vec![Answer::default(); rows];
    let mut logits_bv = cache.extend(model, suffixes, adapters, stop)?;
    for _ in 0..new_tokens {
        let next: Vec<i64> = Vec::try_from(logits_bv.argmax(-1, false).to_device(Device::Cpu)).expect("int64 tokens");
        let mut feed = Vec::with_capacity(rows);
        for (answer, &token) in answers.iter_mut().zip(&next) {
            let token = token as u32;
            if !answer.ended && limits.end_tokens.contains(&token) {
                answer.ended = true;
            }
            if !answer.ended {
                answer.tokens.push(token);
            }
            feed.push([token]);
        }
        if answers.iter().all(|answer| answer.ended) {
            break;
        }
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
                // Padding repeats the last position: it must lie within the rotary tables, and nobody attends to it.
                positions.push(*length + column.min(appended.len().saturating_sub(1)) as i64);
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
