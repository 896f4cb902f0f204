//! Keys and values of every layer for many sequences, each in a slot of its own.
//!
//! Shapes: r rows of one pass, each with its new tokens, t new tokens of all rows, s slots, c columns of a slot, n heads, k
//! key-value heads, g heads of a group, d head size.

use tch::{Kind, Tensor};

use crate::linear::Adapters;
use crate::model::{KeyValues, Llama, Outputs};
use crate::shim::{cpu, decode};
use crate::signal::Stop;

/// Keys and values of sequences that grow.
pub struct Cache<'a> {
    /// What all sequences begin with: a cache of one sequence.
    prefix: Option<&'a Cache<'a>>,
    layers: Vec<(Tensor, Tensor)>,
    layout: Layout,
    /// Tokens in each slot, the prefix not counted.
    lengths: Vec<i64>,
}

/// How a layer's keys and values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `[s, c, k, d]`, the prefix in the first columns.
    Plain,
    /// As `shim::decode` wants them, the prefix where it is.
    Kernel,
}

/// A slot and the tokens that are appended to it.
pub type NewTokens<'a> = (usize, &'a [u32]);

impl<'a> Cache<'a> {
    /// `slots` empty sequences of at most `columns` tokens after the prefix.
    pub fn new(model: &Llama, slots: usize, columns: i64, prefix: Option<&'a Cache<'a>>) -> Self {
        let (slots_s, kv_heads, head_size) = (slots as i64, model.config.kv_heads(), model.config.head_size());
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (model.kind(), model.device()));
        let fits = model.kind() == Kind::BFloat16 && cpu::fits(&[&zeros(&[head_size])], cpu::HEAD_WIDTH);
        let layout = if fits { Layout::Kernel } else { Layout::Plain };
        let prefix_length = prefix.map_or(0, |prefix| prefix.lengths[0]);
        let layer = |index: usize| match layout {
            Layout::Kernel => {
                let columns = (columns + decode::COLUMNS - 1) / decode::COLUMNS * decode::COLUMNS;
                let keys = zeros(&[slots_s, kv_heads, head_size / 2, columns, 2]);
                (keys, zeros(&[slots_s, kv_heads, columns / 2, head_size, 2]))
            }
            Layout::Plain => {
                let shape = [slots_s, prefix_length + columns, kv_heads, head_size];
                let (keys, values) = (zeros(&shape), zeros(&shape));
                if let Some(prefix) = prefix {
                    let (prefix_keys, prefix_values) = &prefix.layers[index];
                    keys.narrow(1, 0, prefix_length).copy_(&prefix_keys.narrow(1, 0, prefix_length));
                    values.narrow(1, 0, prefix_length).copy_(&prefix_values.narrow(1, 0, prefix_length));
                }
                (keys, values)
            }
        };
        let layers = (0..model.config.num_hidden_layers as usize).map(layer).collect();
        Self { prefix, layers, layout, lengths: vec![0; slots] }
    }

    fn prefix_length(&self) -> i64 {
        self.prefix.map_or(0, |prefix| prefix.lengths[0])
    }

    /// Sequences that it holds at most.
    pub fn slots(&self) -> usize {
        self.lengths.len()
    }

    /// Forgets the sequence in a slot.
    pub fn clear(&mut self, slot: usize) {
        self.lengths[slot] = 0;
    }

    /// Appends at least one token to each of these sequences and returns the final hidden state after the last of each,
    /// `[r, h]`; `None` if a stop was asked for meanwhile.
    pub fn extend(&mut self, model: &Llama, new: &[NewTokens], adapters: Adapters, stop: &Stop) -> Option<Tensor> {
        let upload = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
        let (mut tokens, mut positions, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for &(slot, appended) in new {
            let start = self.prefix_length() + self.lengths[slot];
            tokens.extend(appended.iter().map(|&token| i64::from(token)));
            positions.extend((start..).take(appended.len()));
            last.push(tokens.len() as i64 - 1);
        }
        let (tokens_t, positions_t, last_r) = (upload(&tokens), upload(&positions), upload(&last));
        let outputs = Outputs::Rows(&last_r);
        let hidden_rh = match self.layout {
            Layout::Kernel => {
                let rows = self.kernel_rows(new);
                let mut attend = |layer: usize, q: &Tensor, KeyValues { keys, values }: KeyValues| {
                    let prefix = self.prefix.map(|prefix| (&prefix.layers[layer], prefix.lengths[0]));
                    let scale = model.attention_scale();
                    decode::cached_attention([q, &keys, &values], &rows, &self.layers[layer], prefix, scale)
                };
                model.infer(&tokens_t, &positions_t, outputs, adapters, stop, &mut attend)?
            }
            Layout::Plain => {
                let plain = PlainRows::new(self, model, new);
                let mut attend = |layer: usize, q: &Tensor, new: KeyValues| {
                    plain.attend(&self.layers[layer], q, &new, model.attention_scale())
                };
                model.infer(&tokens_t, &positions_t, outputs, adapters, stop, &mut attend)?
            }
        };
        for &(slot, appended) in new {
            self.lengths[slot] += appended.len() as i64;
        }
        Some(hidden_rh)
    }

    /// First and end of each row's new tokens, its slot, its tokens so far: `[r, 4]`.
    fn kernel_rows(&self, new: &[NewTokens]) -> Tensor {
        let mut end = 0;
        let mut rows = Vec::with_capacity(4 * new.len());
        for &(slot, appended) in new {
            let first = end;
            end += appended.len();
            rows.extend([first as i32, end as i32, slot as i32, self.lengths[slot] as i32]);
        }
        Tensor::from_slice(&rows).view([-1, 4])
    }
}

/// What one pass with libtorch's attention needs in every layer.
struct PlainRows {
    /// Where the new tokens go among all columns of all slots, `[t]`.
    places_t: Tensor,
    /// Rows of one width, so that none is padded to the width of another.
    groups: Vec<Group>,
    /// Brings the groups' tokens into the order of the pass, `[t]`; `None` where there is one group.
    order_t: Option<Tensor>,
}

/// Rows that append equally many tokens.
struct Group {
    rows: i64,
    width: i64,
    /// Slots `[r]`.
    slots_r: Tensor,
    /// The rows' tokens in the pass, `[r * width]`; `None` where they are all.
    tokens: Option<Tensor>,
    /// Columns that are looked at.
    columns: i64,
    /// What each query sees, `[r, 1, g * width, columns]`.
    mask: Tensor,
}

impl PlainRows {
    fn new(cache: &Cache, model: &Llama, new: &[NewTokens]) -> Self {
        let device = model.device();
        let upload = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let prefix = cache.prefix_length();
        let capacity = cache.layers.first().map_or(0, |(keys, _)| keys.size()[1]);
        let query_group = model.config.num_attention_heads / model.config.kv_heads();
        let mut places = Vec::new();
        // By width: slots, their tokens so far, the first of their tokens in this pass.
        let mut by_width = std::collections::BTreeMap::<usize, Vec<(i64, i64, i64)>>::new();
        for &(slot, appended) in new {
            let start = prefix + cache.lengths[slot];
            by_width.entry(appended.len()).or_default().push((slot as i64, start, places.len() as i64));
            places.extend((start..).take(appended.len()).map(|column| slot as i64 * capacity + column));
        }
        let mut order = Vec::new();
        let only = by_width.len() == 1;
        let groups = by_width.into_iter().map(|(width, rows)| {
            let width = width as i64;
            let tokens: Vec<i64> = rows.iter().flat_map(|&(_, _, first)| first..first + width).collect();
            let starts: Vec<i64> = rows.iter().map(|&(_, start, _)| start).collect();
            let slots: Vec<i64> = rows.iter().map(|&(slot, _, _)| slot).collect();
            let columns = starts.iter().max().copied().unwrap_or(0) + width;
            let column = Tensor::arange(columns, (Kind::Int64, device));
            let own_rw = upload(&starts).unsqueeze(1) + Tensor::arange(width, (Kind::Int64, device));
            let seen_rwc = column.le_tensor(&own_rw.unsqueeze(2));
            let group = Group {
                rows: rows.len() as i64,
                width,
                slots_r: upload(&slots),
                tokens: (!only).then(|| upload(&tokens)),
                columns,
                mask: seen_rwc.repeat([1, query_group, 1]).unsqueeze(1),
            };
            order.extend(tokens);
            group
        });
        let groups = groups.collect();
        // The inverse of the permutation that the groups are.
        let order_t = (!only).then(|| upload(&order).argsort(0, false));
        Self { places_t: upload(&places), groups, order_t }
    }

    fn attend(&self, (keys, values): &(Tensor, Tensor), q_tnd: &Tensor, new: &KeyValues, scale: f64) -> Tensor {
        for (cached, new) in [(keys, &new.keys), (values, &new.values)] {
            let _ = cached.flatten(0, 1).index_copy_(0, &self.places_t, new);
        }
        let attended: Vec<Tensor> = self.groups.iter().map(|group| group.attend(keys, values, q_tnd, scale)).collect();
        match &self.order_t {
            Some(order_t) => Tensor::cat(&attended, 0).index_select(0, order_t),
            None => attended.into_iter().next().expect("a pass has a row"),
        }
    }
}

impl Group {
    fn attend(&self, keys: &Tensor, values: &Tensor, q_tnd: &Tensor, scale: f64) -> Tensor {
        let &Self { rows, width, columns, .. } = self;
        let (kv_heads, head_size) = (keys.size()[2], keys.size()[3]);
        let group = q_tnd.size()[1] / kv_heads;
        let q = self.tokens.as_ref().map_or_else(|| q_tnd.shallow_clone(), |tokens| q_tnd.index_select(0, tokens));
        // The query heads of a group become rows of one query: keys and values are read once, not repeated.
        let q = q.view([rows, width, kv_heads, group, head_size]).permute([0, 2, 3, 1, 4]).reshape([
            rows,
            kv_heads,
            group * width,
            head_size,
        ]);
        let seen = |cached: &Tensor| cached.narrow(1, 0, columns).index_select(0, &self.slots_r).transpose(1, 2);
        let (keys, values) = (seen(keys), seen(values));
        Tensor::scaled_dot_product_attention(&q, &keys, &values, Some(&self.mask), 0.0, false, scale, false)
            .view([rows, kv_heads, group, width, head_size])
            .permute([0, 3, 1, 2, 4])
            .reshape([rows * width, kv_heads * group, head_size])
    }
}
