//! Mistral: heads whose size is not the share of the width, and in its first version a window.

use super::{DEFAULTS, Defaults, decoder, silu};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &Defaults { kv_heads: Some(8), ..DEFAULTS })?;
    let window: Option<i64> = keys.get("sliding_window")?;
    if let Some(window) = window.filter(|window| *window < 1) {
        return Err(format!("sliding_window is {window}; expected at least 1, or null"));
    }
    for layer in &mut spec.layers {
        layer.attention.window = window;
    }
    Ok(spec)
}
