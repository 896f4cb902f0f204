//! Qwen3: each head of queries and keys is normalised before it is rotated.

use super::{DEFAULTS, Defaults, biases, decoder, silu, windows_of_qwen};
use crate::model::keys::Keys;
use crate::model::spec::{QueryKeyNorm, Spec};

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &Defaults { kv_heads: Some(32), head_size: Some(128), ..DEFAULTS })?;
    biases(keys, &mut spec)?;
    windows_of_qwen(keys, &mut spec)?;
    for layer in &mut spec.layers {
        layer.attention.query_key_norm = Some(QueryKeyNorm::Head);
    }
    Ok(spec)
}
