//! Keys and values of every layer for many sequences, each in a slot of its own.
//!
//! Shapes: r rows of one pass, each with its new tokens, t new tokens of all rows, s slots, c columns of a slot, p tokens of the
//! prefix, n heads, k key-value heads, g heads of a group, d head size.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::attention;
use crate::linear::Adapters;
use crate::model::{KeyValues, Llama, Outputs};
use crate::shim::decode::KeysAndValues;
use crate::shim::{cpu, decode};
use crate::signal::Stop;

/// Keys and values of sequences that grow, in the model's dtype.
pub struct Cache<'a> {
    /// What all sequences begin with: a cache of one sequence.
    prefix: Option<&'a Cache<'a>>,
    layers: Vec<KeysAndValues>,
    layout: Layout,
    /// Tokens that a slot has room for, the prefix not counted.
    columns: i64,
    /// Tokens in each slot, the prefix not counted.
    lengths: Vec<i64>,
}

/// How a layer's keys and values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `[s, c, k, d]`
    Plain,
    /// As `shim::decode` wants them.
    Kernel,
}

/// A slot and the tokens that are appended to it.
pub type NewTokens<'a> = (usize, &'a [u32]);

/// A slot and the number of tokens that are appended to it.
type NewLength = (usize, i64);

impl<'a> Cache<'a> {
    /// `slots` empty sequences of at most `columns` tokens after the prefix.
    pub fn new(model: &Llama, slots: usize, columns: i64, prefix: Option<&'a Cache<'a>>) -> Self {
        let config = &model.config;
        let sizes = [config.num_hidden_layers, config.kv_heads(), config.head_size()];
        Self::empty(sizes, (model.kind(), model.device()), slots, columns, prefix)
    }

    fn empty(
        [layers, kv_heads, head_size]: [i64; 3],
        options: (Kind, Device),
        slots: usize,
        columns: i64,
        prefix: Option<&'a Cache<'a>>,
    ) -> Self {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, options);
        let fits = cpu::fits(&[&zeros(&[head_size])], cpu::HEAD_WIDTH);
        let layout = if fits { Layout::Kernel } else { Layout::Plain };
        let layer = |_| match layout {
            Layout::Kernel => decode::empty_cache([slots as i64, kv_heads, columns, head_size], options),
            Layout::Plain => {
                let shape = [slots as i64, columns, kv_heads, head_size];
                (zeros(&shape), zeros(&shape))
            }
        };
        Self { prefix, layers: (0..layers).map(layer).collect(), layout, columns, lengths: vec![0; slots] }
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

    /// Appends at least one token to each of these sequences, none of which is there twice, and returns the final hidden state
    /// after the last of each, `[r, h]`; `None` if a stop was asked for meanwhile. Panics where a slot has no room for its
    /// tokens.
    pub fn extend(&mut self, model: &Llama, new: &[NewTokens], adapters: Adapters, stop: &Stop) -> Option<Tensor> {
        let (mut tokens, mut positions, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for &(slot, appended) in new {
            let start = self.prefix_length() + self.lengths[slot];
            tokens.extend(appended.iter().map(|&token| i64::from(token)));
            positions.extend((start..).take(appended.len()));
            last.push(tokens.len() as i64 - 1);
        }
        let lengths: Vec<NewLength> = new.iter().map(|&(slot, appended)| (slot, appended.len() as i64)).collect();
        let upload = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
        let (tokens_t, positions_t, last_r) = (upload(&tokens), upload(&positions), upload(&last));
        let rows = self.rows(&lengths, model.device());
        let scale = attention::scale(model.config.head_size());
        let mut attend = |layer: usize, q_tnd: &Tensor, new: KeyValues| self.attend(layer, &rows, q_tnd, &new, scale);
        let hidden_rh = model.infer(&tokens_t, &positions_t, Outputs::Rows(&last_r), adapters, stop, &mut attend)?;
        self.grow(&lengths);
        Some(hidden_rh)
    }

    /// What one pass needs in every layer.
    fn rows(&self, new: &[NewLength], device: Device) -> Rows {
        for &(slot, appended) in new {
            let length = self.lengths[slot];
            let has_room = length + appended <= self.columns;
            assert!(has_room, "slot {slot} holds {length} of {} tokens, {appended} more do not fit", self.columns);
        }
        match self.layout {
            Layout::Kernel => Rows::Kernel(self.kernel_rows(new)),
            Layout::Plain => Rows::Plain(PlainRows::new(self, new, device)),
        }
    }

    /// First and end of each row's new tokens, its slot, its tokens so far: int32 `[r, 4]`.
    fn kernel_rows(&self, new: &[NewLength]) -> Tensor {
        let mut end = 0;
        let mut rows = Vec::with_capacity(4 * new.len());
        for &(slot, appended) in new {
            let first = end;
            end += appended;
            rows.extend([first, end, slot as i64, self.lengths[slot]].map(|value| value as i32));
        }
        Tensor::from_slice(&rows).view([-1, 4])
    }

    /// Writes a layer's new keys and values into the cache and gives the attention's output, `[t, n, d]`.
    fn attend(&self, layer: usize, rows: &Rows, q_tnd: &Tensor, new: &KeyValues, scale: f64) -> Tensor {
        let own = &self.layers[layer];
        let prefix = self.prefix.map(|prefix| (&prefix.layers[layer], prefix.lengths[0]));
        match rows {
            Rows::Kernel(rows) => decode::cached_attention([q_tnd, &new.keys, &new.values], rows, own, prefix, scale),
            Rows::Plain(rows) => rows.attend(own, prefix, q_tnd, new, scale),
        }
    }

    /// Counts what was appended.
    fn grow(&mut self, new: &[NewLength]) {
        for &(slot, appended) in new {
            self.lengths[slot] += appended;
        }
    }
}

/// The rows of one pass, as the layout needs to know them.
enum Rows {
    Kernel(Tensor),
    Plain(PlainRows),
}

/// What one pass with libtorch's attention needs in every layer.
struct PlainRows {
    /// Where the new tokens go among all columns of all slots, int64 `[t]`.
    places_t: Tensor,
    /// Rows of one width, so that none is padded to the width of another.
    groups: Vec<Group>,
    /// Brings the groups' tokens into the order of the pass, int64 `[t]`; `None` where there is one group.
    order_t: Option<Tensor>,
}

/// Rows that append equally many tokens.
struct Group {
    rows: i64,
    width: i64,
    /// Slots, int64 `[r]`.
    slots_r: Tensor,
    /// The rows' tokens in the pass, int64 `[r * width]`; `None` where they are all.
    tokens: Option<Tensor>,
    /// Columns of a slot that are looked at.
    columns: i64,
    /// What each query sees of prefix and columns, bool `[r, 1, 1, width, p + columns]`.
    mask: Tensor,
}

impl PlainRows {
    fn new(cache: &Cache, new: &[NewLength], device: Device) -> Self {
        let upload = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let prefix = cache.prefix_length();
        let mut places = Vec::new();
        // By width: slots, their tokens so far, the first of their tokens in this pass.
        let mut by_width = BTreeMap::<i64, Vec<(i64, i64, i64)>>::new();
        for &(slot, appended) in new {
            let (slot, start) = (slot as i64, cache.lengths[slot]);
            by_width.entry(appended).or_default().push((slot, start, places.len() as i64));
            places.extend((start..start + appended).map(|column| slot * cache.columns + column));
        }
        let mut order = Vec::new();
        let only = by_width.len() == 1;
        let groups = by_width.into_iter().map(|(width, rows)| {
            let tokens: Vec<i64> = rows.iter().flat_map(|&(_, _, first)| first..first + width).collect();
            let starts: Vec<i64> = rows.iter().map(|&(_, start, _)| start).collect();
            let slots: Vec<i64> = rows.iter().map(|&(slot, _, _)| slot).collect();
            let columns = starts.iter().max().copied().unwrap_or(0) + width;
            // The prefix is in columns below 0, which all see.
            let column = Tensor::arange_start(-prefix, columns, (Kind::Int64, device));
            let own_rw = upload(&starts).unsqueeze(1) + Tensor::arange(width, (Kind::Int64, device));
            let seen_rwc = column.le_tensor(&own_rw.unsqueeze(2));
            let group = Group {
                rows: rows.len() as i64,
                width,
                slots_r: upload(&slots),
                tokens: (!only).then(|| upload(&tokens)),
                columns,
                mask: seen_rwc.unsqueeze(1).unsqueeze(1),
            };
            order.extend(tokens);
            group
        });
        let groups = groups.collect();
        // The inverse of the permutation that the groups are.
        let order_t = (!only).then(|| upload(&order).argsort(0, false));
        Self { places_t: upload(&places), groups, order_t }
    }

    fn attend(
        &self,
        own: &KeysAndValues,
        prefix: Option<(&KeysAndValues, i64)>,
        q_tnd: &Tensor,
        new: &KeyValues,
        scale: f64,
    ) -> Tensor {
        for (cached, new) in [(&own.0, &new.keys), (&own.1, &new.values)] {
            let _ = cached.flatten(0, 1).index_copy_(0, &self.places_t, new);
        }
        let attended = self.groups.iter().map(|group| group.attend(own, prefix, q_tnd, scale));
        let mut attended: Vec<Tensor> = attended.collect();
        match &self.order_t {
            Some(order_t) => Tensor::cat(&attended, 0).index_select(0, order_t),
            None => attended.pop().expect("a pass has a row"),
        }
    }
}

impl Group {
    fn attend(&self, own: &KeysAndValues, prefix: Option<(&KeysAndValues, i64)>, q_tnd: &Tensor, scale: f64) -> Tensor {
        let &Self { rows, width, columns, .. } = self;
        let (kv_heads, head_size) = (own.0.size()[2], own.0.size()[3]);
        let group = q_tnd.size()[1] / kv_heads;
        let q = self.tokens.as_ref().map_or_else(|| q_tnd.shallow_clone(), |tokens| q_tnd.index_select(0, tokens));
        // The query heads of a group become rows of one query: keys and values are read once, not repeated.
        let as_rows = [rows, kv_heads, group * width, head_size];
        let q = q.view([rows, width, kv_heads, group, head_size]).permute([0, 2, 3, 1, 4]).reshape(as_rows);
        let seen = |own: &Tensor, prefix: Option<&Tensor>, prefix_length: i64| {
            let own = own.narrow(1, 0, columns).index_select(0, &self.slots_r);
            let Some(prefix) = prefix else { return own.transpose(1, 2) };
            let prefix = prefix.narrow(1, 0, prefix_length).expand([rows, -1, -1, -1], false);
            Tensor::cat(&[prefix, own], 1).transpose(1, 2)
        };
        let length = prefix.map_or(0, |(_, length)| length);
        let keys = seen(&own.0, prefix.map(|((keys, _), _)| keys), length);
        let values = seen(&own.1, prefix.map(|((_, values), _)| values), length);
        let mask = self.mask.expand([-1, -1, group, -1, -1], false).flatten(2, 3);
        Tensor::scaled_dot_product_attention(&q, &keys, &values, Some(&mask), 0.0, false, scale, false)
            .view([rows, kv_heads, group, width, head_size])
            .permute([0, 3, 1, 2, 4])
            .reshape([rows * width, kv_heads * group, head_size])
    }
}

#[cfg(test)]
mod tests;
