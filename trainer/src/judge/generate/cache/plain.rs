//! The cache of accelerators, and of dtypes, heads and CPUs that `shim::decode` is not for: attention from matrix products.
//!
//! Queries attend to what all sequences begin with in one product of all of them, and to their slot's own columns in a batch of
//! slots; log-sum-exps tell how much of either the softmax over both is. So the prefix is never copied, and a slot's columns only
//! where the slots of a pass are few and scattered. Scores and what is summed are in the accumulation dtype, probabilities are
//! rounded to the model's where they become factors.
//!
//! Shapes as in [`super`], and w new tokens of each row of a group.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::{Cache, NewLength};
use crate::compute::ops::{accumulate_kind, widened};
use crate::compute::shim;
use crate::compute::shim::decode::KeysAndValues;
use crate::model::KeyValues;

/// Most elements of a matrix of scores, unless those of one token are more: enough to keep an accelerator busy.
pub(super) const MOST_SCORES: i64 = 16 << 20;
/// Times that queries and outputs of all new tokens are there at once at most, in the accumulation dtype: outputs by groups and
/// joined, each with as many again that are dropped, and one group's queries and output on their way from one order of heads and
/// tokens to the other.
const OUTPUTS: i64 = 6;

/// Bytes that attention takes beside the cache where `tokens` go through the model at once, in sequences of at most `longest`.
pub fn pass_bytes(kind: Kind, [heads, head_size]: [i64; 2], tokens: i64, longest: i64) -> i64 {
    let bytes = |kind: Kind| kind.elt_size_in_bytes() as i64;
    let wide = bytes(accumulate_kind(kind));
    let factor = if accumulate_kind(kind) == kind { 0 } else { bytes(kind) };
    let scores = (tokens * heads * longest).min(MOST_SCORES.max(heads * longest));
    // Scores, and the factors made of them; what is not seen of the columns, a byte each; outputs.
    (wide + factor) * scores + tokens * longest + OUTPUTS * wide * tokens * heads * head_size
}

/// Bytes of the largest copies of keys and values, a layer's, by token that the cache has room for: all key-value heads of a
/// token are `kv_size` numbers.
pub fn copied_bytes(kind: Kind, kv_size: i64, accelerator: bool) -> i64 {
    let bytes = |kind: Kind| kind.elt_size_in_bytes() as i64;
    // Keys and values of slots that are scattered, and either of them where it is widened.
    let widened = if widens(kind, accelerator) { bytes(accumulate_kind(kind)) } else { 0 };
    kv_size * (2 * bytes(kind) + widened)
}

/// Keys and values of one layer, `[s, k, c, d]`: what is multiplied by a slot's queries lies together, and so do the slots.
pub(super) fn empty_cache(shape: [i64; 4], options: (Kind, Device)) -> KeysAndValues {
    // What no token has been written to is multiplied by zero, so it has to be a number.
    (Tensor::zeros(shape, options), Tensor::zeros(shape, options))
}

/// What one pass needs in every layer.
pub(super) struct Rows {
    /// Where the new keys and values go among `[s * k * c]`, int64 `[t * k]`.
    places: Tensor,
    groups: Vec<Group>,
    /// Brings the groups' outputs into the order of the pass, int64 `[t]`; `None` where they are in it.
    order_t: Option<Tensor>,
    most_scores: i64,
}

/// A row of one pass.
#[derive(Clone, Copy)]
struct Row {
    slot: i64,
    /// Tokens that the slot holds so far.
    start: i64,
    /// The first of its tokens in the pass; `None`: it has none, and what comes of any others is dropped.
    first: Option<i64>,
}

/// Rows that append equally many tokens, so that none is padded to the width of another.
struct Group {
    rows: i64,
    width: i64,
    slots: Slots,
    /// The rows' tokens in the pass, int64 `[r * w]`; `None` where they are all, in order.
    tokens: Option<Tensor>,
    /// Columns of a slot that are looked at.
    columns: i64,
    /// Columns that a query must not see, bool `[r, 1, 1, w, columns]`.
    unseen: Tensor,
}

/// Where a group's keys and values are.
enum Slots {
    /// From this one on, where they lie.
    From(i64),
    /// In these, int64 `[r]`.
    Scattered(Tensor),
}

impl Rows {
    pub(super) fn new(cache: &Cache, new: &[NewLength], device: Device) -> Self {
        let upload = |values: &[i64]| shim::upload(values, device);
        let [_, heads, kv_heads, _] = cache.sizes;
        let mut by_width = BTreeMap::<i64, Vec<Row>>::new();
        let mut firsts = Vec::new();
        for &(slot, appended) in new {
            let (slot, start) = (slot as i64, cache.lengths[slot]);
            by_width.entry(appended).or_default().push(Row { slot, start, first: Some(firsts.len() as i64) });
            firsts.extend((start..start + appended).map(|column| slot * kv_heads * cache.columns + column));
        }
        let of_head = Tensor::arange(kv_heads, (Kind::Int64, device)) * cache.columns;
        let places = (upload(&firsts).unsqueeze(1) + of_head).flatten(0, 1);
        let (mut groups, mut order, mut outputs) = (Vec::new(), vec![0; firsts.len()], 0);
        for (width, rows) in by_width {
            for (rows, width) in parts(&with_idle(rows, width), width, heads, cache.most_scores) {
                let of_row = |row: &Row| {
                    let first = row.first;
                    (0..width).map(move |offset| first.map(|first| first + offset))
                };
                let tokens: Vec<Option<i64>> = rows.iter().flat_map(of_row).collect();
                for (output, token) in (outputs..).zip(&tokens) {
                    if let Some(token) = token {
                        order[*token as usize] = output;
                    }
                }
                outputs += tokens.len() as i64;
                // Any token does where what comes of it is dropped.
                let tokens: Vec<i64> = tokens.into_iter().map(Option::unwrap_or_default).collect();
                let tokens = (!in_order(&tokens, firsts.len())).then(|| upload(&tokens));
                groups.push(Group::new(&rows, width, tokens, device));
            }
        }
        let order_t = (!in_order(&order, outputs as usize)).then(|| upload(&order));
        Self { places, groups, order_t, most_scores: cache.most_scores }
    }

    /// Rows of each group that are read where they lie; `None` for one whose are copied.
    #[cfg(test)]
    pub(super) fn in_place(&self) -> Vec<Option<i64>> {
        self.groups.iter().map(|group| matches!(group.slots, Slots::From(_)).then_some(group.rows)).collect()
    }

    /// Writes a layer's new keys and values in place and gives the attention's output, `[t, n, d]`.
    pub(super) fn attend(
        &self,
        own: &KeysAndValues,
        prefix: Option<(&KeysAndValues, i64)>,
        q_tnd: &Tensor,
        new: &KeyValues,
        scale: f64,
    ) -> Tensor {
        for (cached, new) in [(&own.0, &new.keys), (&own.1, &new.values)] {
            let _ = cached.flatten(0, 2).index_copy_(0, &self.places, &new.flatten(0, 1));
        }
        let groups = Attended::join(self.groups.iter().map(|group| group.attend(own, q_tnd, scale)).collect(), 0);
        let attended = match &self.order_t {
            Some(order_t) => groups.map(|x| x.index_select(0, order_t)),
            None => groups,
        };
        let out_tnd = match prefix {
            Some(prefix) => attended.merge(&attend_to_prefix(prefix, q_tnd, scale, self.most_scores)),
            None => attended.out,
        };
        out_tnd.to_kind(q_tnd.kind())
    }
}

fn in_order(places: &[i64], all: usize) -> bool {
    places.iter().copied().eq(0..all as i64)
}

/// The rows by slot, and where few are between them that append nothing, those too: their columns are read where they lie, which
/// costs less than a copy of the others'.
fn with_idle(mut rows: Vec<Row>, width: i64) -> Vec<Row> {
    rows.sort_by_key(|row| row.slot);
    let (first, last) = (rows[0].slot, rows[rows.len() - 1].slot);
    let idle = last + 1 - first - rows.len() as i64;
    if idle == 0 || idle * width > rows.len() as i64 {
        return rows;
    }
    let mut rows = rows.into_iter().peekable();
    let filled =
        (first..=last).map(|slot| rows.next_if(|row| row.slot == slot).unwrap_or(Row { slot, start: 0, first: None }));
    filled.collect()
}

/// Rows of one width in parts that make so many scores at most, or those of one token: some of the rows, or some tokens of each.
fn parts(rows: &[Row], width: i64, heads: i64, most_scores: i64) -> Vec<(Vec<Row>, i64)> {
    let columns = rows.iter().map(|row| row.start).max().unwrap_or(0) + width;
    let tokens = (most_scores / (heads * columns)).max(1);
    let (rows_at_once, width_at_once) = ((tokens / width).max(1), tokens.min(width));
    let parts = rows.chunks(rows_at_once as usize).flat_map(|rows| {
        (0..width).step_by(width_at_once as usize).map(move |offset| {
            let moved =
                |row: &Row| Row { start: row.start + offset, first: row.first.map(|first| first + offset), ..*row };
            (rows.iter().map(moved).collect(), width_at_once.min(width - offset))
        })
    });
    parts.collect()
}

impl Group {
    fn new(rows: &[Row], width: i64, tokens: Option<Tensor>, device: Device) -> Self {
        let upload = |values: &[i64]| shim::upload(values, device);
        let starts: Vec<i64> = rows.iter().map(|row| row.start).collect();
        let slots: Vec<i64> = rows.iter().map(|row| row.slot).collect();
        let columns = starts.iter().max().copied().unwrap_or(0) + width;
        let own_rw1 = (upload(&starts).unsqueeze(1) + Tensor::arange(width, (Kind::Int64, device))).unsqueeze(2);
        let unseen_rwc = Tensor::arange(columns, (Kind::Int64, device)).gt_tensor(&own_rw1);
        let are_neighbours = slots.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        Self {
            rows: rows.len() as i64,
            width,
            slots: if are_neighbours { Slots::From(slots[0]) } else { Slots::Scattered(upload(&slots)) },
            tokens,
            columns,
            unseen: unseen_rwc.unsqueeze(1).unsqueeze(1),
        }
    }

    /// Of its tokens' queries, to the slots' own columns: out `[r * w, n, d]`.
    fn attend(&self, own: &KeysAndValues, q_tnd: &Tensor, scale: f64) -> Attended {
        let &Self { rows, width, columns, .. } = self;
        let (kv_heads, head_size) = (own.0.size()[1], own.0.size()[3]);
        let group = q_tnd.size()[1] / kv_heads;
        let q = self.tokens.as_ref().map_or_else(|| q_tnd.shallow_clone(), |tokens| q_tnd.index_select(0, tokens));
        // The query heads of a group become rows of one query: keys and values are read once, not repeated.
        let as_rows = [rows * kv_heads, group * width, head_size];
        let q = q.view([rows, width, kv_heads, group, head_size]).permute([0, 2, 3, 1, 4]).reshape(as_rows);
        let [keys, values] = [&own.0, &own.1].map(|cached| {
            let seen = cached.narrow(2, 0, columns);
            let of_rows = match &self.slots {
                Slots::From(first) => seen.narrow(0, *first, rows),
                Slots::Scattered(slots) => seen.index_select(0, slots),
            };
            of_rows.flatten(0, 1)
        });
        let scores = scores(&q, &keys, scale);
        let _ = scores.view([rows, kv_heads, group, width, columns]).masked_fill_(&self.unseen, f64::NEG_INFINITY);
        Attended::new(scores, &values).map(|x| {
            let size = x.size()[2];
            let by_head = x.view([rows, kv_heads, group, width, size]).permute([0, 3, 1, 2, 4]);
            by_head.reshape([rows * width, kv_heads * group, size])
        })
    }
}

/// Of all queries, to the first columns of a cache of one sequence, which all of them see: out `[t, n, d]`.
fn attend_to_prefix(
    ((keys, values), length): (&KeysAndValues, i64),
    q_tnd: &Tensor,
    scale: f64,
    most_scores: i64,
) -> Attended {
    let (kv_heads, head_size) = (keys.size()[1], keys.size()[3]);
    let (tokens, heads) = (q_tnd.size()[0], q_tnd.size()[1]);
    let as_rows = [kv_heads, tokens * heads / kv_heads, head_size];
    let q = q_tnd.view([tokens, kv_heads, heads / kv_heads, head_size]).transpose(0, 1).reshape(as_rows);
    let [keys, values] = [keys, values].map(|cached| cached.squeeze_dim(0).narrow(1, 0, length));
    let at_once = (most_scores / (kv_heads * length)).max(1);
    let parts = q.split(at_once, 1).into_iter().map(|q| Attended::new(scores(&q, &keys, scale), &values));
    Attended::join(parts.collect(), 1).map(|x| {
        let by_head = x.view([kv_heads, tokens, heads / kv_heads, x.size()[2]]).transpose(0, 1);
        by_head.reshape([tokens, heads, x.size()[2]])
    })
}

/// What queries make of some columns, in the accumulation dtype.
struct Attended {
    /// The output, with the softmax over these columns.
    out: Tensor,
    /// Of the scores, with a last dimension of 1.
    logsumexp: Tensor,
}

impl Attended {
    /// Of scores `[b, queries, columns]`, values `[b, columns, d]`.
    fn new(mut scores: Tensor, values: &Tensor) -> Self {
        let largest = scores.amax([-1i64].as_slice(), true);
        // Divided by their sum after the product, as flash attention does it: so the largest, 1, is not rounded.
        let exponentials = scores.g_sub_(&largest).exp_();
        let sum = exponentials.sum_dim_intlist([-1i64].as_slice(), true, None);
        let factors = exponentials.to_kind(values.kind());
        drop((scores, exponentials));
        Self { out: product(&factors, values).g_div_(&sum), logsumexp: sum.log() + largest }
    }

    fn map(self, of: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { out: of(&self.out), logsumexp: of(&self.logsumexp) }
    }

    /// Of all parts, of which there is one.
    fn join(mut parts: Vec<Self>, dimension: i64) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let (outs, logsumexps): (Vec<_>, Vec<_>) = parts.into_iter().map(|part| (part.out, part.logsumexp)).unzip();
        Self { out: Tensor::cat(&outs, dimension), logsumexp: Tensor::cat(&logsumexps, dimension) }
    }

    /// The output of the same queries, with the softmax over both one's columns.
    fn merge(&self, other: &Self) -> Tensor {
        let share = (&other.logsumexp - &self.logsumexp).sigmoid();
        self.out.lerp_tensor(&other.out, &share)
    }
}

/// Scores in the accumulation dtype of queries `[b, queries, d]` and keys `[b, columns, d]`.
fn scores(q: &Tensor, keys: &Tensor, scale: f64) -> Tensor {
    product(q, &keys.transpose(1, 2)).g_mul_scalar_(scale)
}

/// Whether factors are copied into the accumulation dtype: CUDA's products of narrower ones sum and give them in it.
fn widens(kind: Kind, accelerator: bool) -> bool {
    accumulate_kind(kind) != kind && !accelerator
}

/// A batch of products in the accumulation dtype.
fn product(a: &Tensor, b: &Tensor) -> Tensor {
    let sum_kind = accumulate_kind(a.kind());
    if a.kind() == sum_kind || widens(a.kind(), a.device().is_cuda()) {
        return widened(a).bmm(&widened(b));
    }
    a.bmm_dtype(b, sum_kind)
}
