//! SmolLM3: every fourth layer does not rotate.

use super::{DEFAULTS, Defaults, biases, decoder, silu, windows_if_used};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let defaults = Defaults { kv_heads: Some(4), theta: 2_000_000.0, tied: true, ..DEFAULTS };
    let mut spec = decoder(keys, &defaults)?;
    biases(keys, &mut spec)?;
    let interval: usize = keys.or("no_rope_layer_interval", 4)?;
    let rotary: Option<Vec<i64>> = keys.get("no_rope_layers")?;
    // Its files have it, and transformers reads it of other families alone.
    keys.get::<i64>("max_window_layers")?;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let listed = rotary.as_ref().map(|rotary| rotary.get(index) == Some(&1));
        layer.attention.is_rotary = listed.unwrap_or(interval == 0 || (index + 1) % interval != 0);
    }
    windows_if_used(keys, &mut spec, |_, layer| !layer.attention.is_rotary)?;
    Ok(spec)
}
