//! SmolLM3: every fourth layer does not rotate.

use super::{DEFAULTS, Defaults, biases, decoder, silu};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let defaults = Defaults { kv_heads: Some(4), theta: 2_000_000.0, tied: true, ..DEFAULTS };
    let mut spec = decoder(keys, &defaults)?;
    biases(keys, &mut spec)?;
    let interval: usize = keys.or("no_rope_layer_interval", 4)?;
    let rotary: Option<Vec<i64>> = keys.get("no_rope_layers")?;
    let (uses_window, window): (bool, Option<i64>) =
        (keys.or("use_sliding_window", false)?, keys.get("sliding_window")?);
    let types: Option<Vec<String>> = keys.get("layer_types")?;
    // Its files have it, and transformers reads it of other families alone.
    keys.get::<i64>("max_window_layers")?;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let listed = rotary.as_ref().map(|rotary| rotary.get(index) == Some(&1));
        layer.attention.is_rotary = listed.unwrap_or(interval == 0 || (index + 1) % interval != 0);
        let slides = types.as_ref().map_or(!layer.attention.is_rotary, |types| {
            types.get(index).is_some_and(|kind| kind == "sliding_attention")
        });
        layer.attention.window = window.filter(|_| uses_window && slides);
    }
    Ok(spec)
}
