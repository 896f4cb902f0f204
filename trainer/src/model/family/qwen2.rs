//! Qwen2 and Qwen2.5: a bias of queries, keys and values, and none of what they give.

use super::{DEFAULTS, Defaults, decoder, silu, windows_of_qwen};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &Defaults { kv_heads: Some(32), ..DEFAULTS })?;
    windows_of_qwen(keys, &mut spec)?;
    // Multimodal positions, which text alone does not have.
    keys.only("use_mrope", &false.into())?;
    for layer in &mut spec.layers {
        layer.attention.input_bias = true;
    }
    Ok(spec)
}
