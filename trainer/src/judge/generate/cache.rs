//! Keys and values of every layer for many sequences, each in a slot of its own.
//!
//! Shapes: r rows of one pass, each with its new tokens, t new tokens of all rows, s slots, c columns of a slot, p tokens of the
//! prefix, n heads, k key-value heads, g heads of a group, d head size.

mod plain;

use tch::{Device, Kind, Tensor};

pub use self::plain::{copied_bytes, pass_bytes};
use crate::compute::linear::Adapters;
use crate::compute::shim::decode::KeysAndValues;
use crate::compute::shim::{cpu, decode};
use crate::ground::stop::Stop;
use crate::model::spec::AttentionSpec;
use crate::model::{Decoder, KeyValues, Outputs};

/// Keys and values of sequences that grow, in the model's dtype.
pub struct Cache<'a> {
    /// What all sequences begin with: a cache of one sequence.
    prefix: Option<&'a Cache<'a>>,
    /// Layers, heads, key-value heads, head size.
    sizes: [i64; 4],
    layers: Vec<KeysAndValues>,
    layout: Layout,
    /// Elements that a matrix of scores has at most in the plain layout, unless those of one token are more.
    most_scores: i64,
    /// Tokens that a slot has room for, the prefix not counted.
    columns: i64,
    /// Tokens in each slot, the prefix not counted.
    lengths: Vec<i64>,
}

/// How a layer's keys and values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `[s, k, c, d]`
    Plain,
    /// As `shim::decode` wants them.
    Kernel,
}

impl Layout {
    fn of(kind: Kind, head_size: i64, device: Device) -> Self {
        if is_plain(kind, head_size, device) { Self::Plain } else { Self::Kernel }
    }
}

/// Whether attention to a cache is made of libtorch's products, and takes what [`pass_bytes`] and [`copied_bytes`] tell.
pub fn is_plain(kind: Kind, head_size: i64, device: Device) -> bool {
    device != Device::Cpu || !cpu::fits(&[&Tensor::zeros([head_size], (kind, device))], cpu::HEAD_WIDTH)
}

/// A slot and the tokens that are appended to it.
pub type NewTokens<'a> = (usize, &'a [u32]);

/// A slot and the number of tokens that are appended to it.
type NewLength = (usize, i64);

impl<'a> Cache<'a> {
    /// `slots` empty sequences of at most `columns` tokens after the prefix.
    pub fn new(model: &Decoder, slots: usize, columns: i64, prefix: Option<&'a Cache<'a>>) -> Self {
        let AttentionSpec { heads, kv_heads, head_size, .. } = model.spec.first().attention;
        let sizes = [model.spec.layers.len() as i64, heads, kv_heads, head_size];
        let options = (model.kind(), model.device());
        let layout = Layout::of(options.0, head_size, options.1);
        Self::empty(sizes, options, layout, slots, columns, prefix)
    }

    fn empty(
        sizes: [i64; 4],
        options: (Kind, Device),
        layout: Layout,
        slots: usize,
        columns: i64,
        prefix: Option<&'a Cache<'a>>,
    ) -> Self {
        let [layers, _, kv_heads, head_size] = sizes;
        let shape = [slots as i64, kv_heads, columns, head_size];
        let layer = |_| match layout {
            Layout::Kernel => decode::empty_cache(shape, options),
            Layout::Plain => plain::empty_cache(shape, options),
        };
        let (layers, lengths) = ((0..layers).map(layer).collect(), vec![0; slots]);
        Self { prefix, sizes, layers, layout, most_scores: plain::MOST_SCORES, columns, lengths }
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
    pub fn extend(&mut self, model: &Decoder, new: &[NewTokens], adapters: Adapters, stop: &Stop) -> Option<Tensor> {
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
        let mut attend =
            |layer: usize, q_tnd: &Tensor, new: KeyValues| self.attend(layer, &rows, q_tnd, &new, model.scale(layer));
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
            Layout::Plain => Rows::Plain(plain::Rows::new(self, new, device)),
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
    Plain(plain::Rows),
}

#[cfg(test)]
mod tests;
