//! What the rows are like: lengths, duplicates, leakage. Pure; the decision what a finding does is `onProblem`'s.

use std::collections::{HashMap, HashSet};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::format::Content;

/// A row's identity after normalising white space.
pub type RowHash = [u8; 32];

/// All text of a row with white space normalised.
pub fn normalized_text(content: &Content) -> String {
    let squeeze = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    match content {
        Content::Messages { messages, tools, .. } => {
            let parts: Vec<String> = messages.iter().map(|message| squeeze(&message.to_string())).collect();
            format!("{}\n{}", parts.join("\n"), tools.as_ref().map(ToString::to_string).unwrap_or_default())
        }
        Content::PromptCompletion { prompt, completion } => format!("{}\n{}", squeeze(prompt), squeeze(completion)),
        Content::Text(text) => squeeze(text),
    }
}

/// SHA-256 of [`normalized_text`].
pub fn row_hash(content: &Content) -> RowHash {
    Sha256::digest(normalized_text(content)).into()
}

/// Whether the row belongs to the validation rows: a pure function of seed and row, so that order does not matter and
/// equal rows stay together.
pub fn in_validation(seed: i64, hash: &RowHash, percent: i32) -> bool {
    let mut digest = Sha256::new();
    digest.update(seed.to_le_bytes());
    digest.update(hash);
    let value = u64::from_le_bytes(digest.finalize()[..8].try_into().expect("eight bytes"));
    value % 100 < percent.unsigned_abs().into()
}

/// Indices of rows that repeat an earlier one.
pub fn duplicates(hashes: &[RowHash]) -> Vec<usize> {
    let mut seen = HashSet::new();
    (0..hashes.len()).filter(|&index| !seen.insert(hashes[index])).collect()
}

/// Indices of `hashes` that are among `others`.
pub fn leaked(hashes: &[RowHash], others: &[RowHash]) -> Vec<usize> {
    let others: HashSet<&RowHash> = others.iter().collect();
    (0..hashes.len()).filter(|&index| others.contains(&hashes[index])).collect()
}

/// Values of a MinHash signature, and of each of its bands: rows whose Jaccard similarity is about 0.8 or more share a
/// band almost surely.
const SIGNATURE: usize = 32;
const BAND: usize = 4;
const NEAR_SIMILARITY: f64 = 0.8;

/// Number of rows that nearly repeat an earlier, different one: about four fifths of their three-word sequences are equal.
pub fn count_near_duplicates(texts: &[String], hashes: &[RowHash]) -> usize {
    let mut bands: HashMap<(usize, [u64; BAND]), usize> = HashMap::new();
    let mut signatures: Vec<[u64; SIGNATURE]> = Vec::with_capacity(texts.len());
    let mut count = 0;
    for (index, text) in texts.iter().enumerate() {
        let signature = signature(text);
        let mut near = false;
        for (band, values) in signature.chunks_exact(BAND).enumerate() {
            let key = (band, values.try_into().expect("chunks of a band"));
            let first = *bands.entry(key).or_insert(index);
            near |= first != index
                && hashes[first] != hashes[index]
                && similarity(&signatures[first], &signature) >= NEAR_SIMILARITY;
        }
        signatures.push(signature);
        count += usize::from(near);
    }
    count
}

fn similarity(a: &[u64; SIGNATURE], b: &[u64; SIGNATURE]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / SIGNATURE as f64
}

fn signature(text: &str) -> [u64; SIGNATURE] {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut signature = [u64::MAX; SIGNATURE];
    for shingle in words.windows(3.min(words.len()).max(1)) {
        let digest = Sha256::digest(shingle.join(" "));
        let (a, b) = digest.split_at(8);
        let a = u64::from_le_bytes(a.try_into().expect("eight bytes"));
        let b = u64::from_le_bytes(b[..8].try_into().expect("eight bytes")) | 1;
        for (index, value) in signature.iter_mut().enumerate() {
            // Double hashing gives as many independent hash functions as are wanted from two.
            *value = (*value).min(
                a.wrapping_add(b.wrapping_mul(index as u64 + 1)).rotate_left(31).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            );
        }
    }
    signature
}

/// Texts that the tokenizer takes for one token wherever they stand, such as `<|im_end|>`.
#[derive(Debug)]
pub struct SpecialTexts {
    texts: Vec<String>,
    /// What they begin with: a model may have hundreds, and rows are long.
    first: HashSet<char>,
}

impl SpecialTexts {
    /// From all of a tokenizer's.
    pub fn new(texts: Vec<String>) -> Self {
        let first = texts.iter().filter_map(|text| text.chars().next()).collect();
        Self { texts, first }
    }

    /// The first one in what the messages of a conversation say. Other rows are written as the model reads them.
    pub fn find(&self, content: &Content) -> Option<&str> {
        let Content::Messages { messages, .. } = content else { return None };
        messages.iter().find_map(|message| self.find_in(message))
    }

    fn find_in(&self, value: &Value) -> Option<&str> {
        match value {
            Value::String(text) => text
                .char_indices()
                .filter(|(_, character)| self.first.contains(character))
                .find_map(|(at, _)| self.texts.iter().find(|special| text[at..].starts_with(special.as_str())))
                .map(String::as_str),
            Value::Array(items) => items.iter().find_map(|item| self.find_in(item)),
            Value::Object(entries) => entries.values().find_map(|entry| self.find_in(entry)),
            _ => None,
        }
    }
}

/// Number of examples by length: upper bounds are powers of two from 16 on.
pub fn length_histogram(lengths: &[usize]) -> Vec<(i64, i64)> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut histogram = Vec::new();
    let (mut lower, mut upper) = (0, 16);
    loop {
        let inside = lengths.iter().filter(|&&length| length > lower && length <= upper).count();
        histogram.push((upper as i64, inside as i64));
        if upper >= longest {
            break;
        }
        (lower, upper) = (upper, upper * 2);
    }
    let first = histogram.iter().position(|(_, count)| *count > 0).unwrap_or(0);
    histogram.split_off(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Content {
        Content::Text(text.into())
    }

    #[test]
    fn white_space_does_not_make_a_row_new() {
        let hashes = [row_hash(&text("a  b")), row_hash(&text("a b\n")), row_hash(&text("a c"))];
        assert_eq!(duplicates(&hashes), [1]);
        assert_eq!(leaked(&hashes, &hashes[2..]), [2]);
    }

    #[test]
    fn the_split_depends_on_seed_and_row_alone() {
        let hashes: Vec<RowHash> = (0..2000).map(|index| row_hash(&text(&format!("row {index}")))).collect();
        let chosen = hashes.iter().filter(|hash| in_validation(1, hash, 10)).count();
        assert!((150..250).contains(&chosen), "{chosen}");
        assert!(hashes.iter().any(|hash| in_validation(1, hash, 10) != in_validation(2, hash, 10)));
    }

    #[test]
    fn near_duplicates_are_counted_and_equal_or_different_rows_are_not() {
        let long = "the quick brown fox jumps over the lazy dog and then it runs through the green forest until night falls on the hills";
        let texts: Vec<String> =
            [long, &long.replace("hills", "hill"), long, "something else entirely that shares nothing with the others"]
                .map(str::to_owned)
                .into();
        let hashes: Vec<RowHash> = texts.iter().map(|t| row_hash(&text(t))).collect();
        assert_eq!(count_near_duplicates(&texts, &hashes), 1);
    }

    #[test]
    fn the_histogram_starts_where_rows_are() {
        assert_eq!(length_histogram(&[20, 33, 64, 100]), [(32, 1), (64, 2), (128, 1)]);
    }
}
