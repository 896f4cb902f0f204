//! Packs the examples of one step into rows without padding. How they are packed decides only how they are computed.

use super::example::Examples;

/// Examples side by side in one row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids, `[t]`.
    pub tokens: Vec<i64>,
    /// Position of each token within its example, `[t]`.
    pub positions: Vec<i64>,
    /// Where examples begin and end: `[0, l1, l1 + l2, …]`.
    pub cu_seqlens: Vec<i32>,
    /// Rows whose next token is trained, `[n]`.
    pub label_positions: Vec<i64>,
    /// Those next tokens, `[n]`.
    pub labels: Vec<i64>,
    /// Index of each example in the dataset.
    pub examples: Vec<usize>,
}

impl PackedBatch {
    /// Appends one example, given as tokens and the mask of trained ones.
    pub fn push(&mut self, index: usize, tokens: impl ExactSizeIterator<Item = u32>, trained: &[u8]) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        let start = self.tokens.len() as i64;
        for (position, token) in tokens.enumerate() {
            // The token before predicts this one; the first has none before it.
            if position > 0 && trained[position] == 1 {
                self.label_positions.push(start + position as i64 - 1);
                self.labels.push(i64::from(token));
            }
            self.tokens.push(i64::from(token));
            self.positions.push(position as i64);
        }
        self.cu_seqlens.push(self.tokens.len() as i32);
        self.examples.push(index);
    }
}

/// Packs the examples `ids` into rows of at most `max_tokens` tokens, best fit first; ties go to the lower index. An
/// example longer than that gets a row of its own.
pub fn pack(examples: &Examples, ids: &[usize], max_tokens: i64) -> Vec<PackedBatch> {
    let mut by_length: Vec<usize> = ids.to_vec();
    by_length.sort_by_key(|&id| (std::cmp::Reverse(examples.num_tokens(id)), id));
    let mut rows: Vec<(i64, Vec<usize>)> = Vec::new();
    for id in by_length {
        let length = examples.num_tokens(id) as i64;
        let fitting = rows.iter_mut().filter(|(used, _)| used + length <= max_tokens).max_by_key(|(used, _)| *used);
        match fitting {
            Some((used, members)) => {
                *used += length;
                members.push(id);
            }
            None => rows.push((length, vec![id])),
        }
    }
    rows.into_iter()
        .map(|(_, members)| {
            let mut batch = PackedBatch::default();
            for id in members {
                batch.push(id, examples.tokens(id), examples.trained(id));
            }
            batch
        })
        .collect()
}
