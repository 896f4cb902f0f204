//! Mistral: heads whose size is not the share of the width, and in its first version a window.

use super::{DEFAULTS, Defaults, decoder, silu, window};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &Defaults { kv_heads: Some(8), ..DEFAULTS })?;
    let window = window(keys)?;
    for layer in &mut spec.layers {
        layer.attention.window = window;
    }
    Ok(spec)
}
