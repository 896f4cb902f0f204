//! Granite 3: multipliers of embeddings, scores, residuals and logits.

use super::{DEFAULTS, biases, decoder, silu};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &DEFAULTS)?;
    biases(keys, &mut spec)?;
    let multiplier = |name: &str| -> Result<f64, String> {
        let value: f64 = keys.or(name, 1.0)?;
        let fits = value.is_finite() && value > 0.0;
        fits.then_some(value).ok_or_else(|| format!("{name} is {value}; expected a number above 0"))
    };
    spec.embedding_multiplier = multiplier("embedding_multiplier")?;
    spec.logits_multiplier = 1.0 / multiplier("logits_scaling")?;
    let (scale, residual) = (multiplier("attention_multiplier")?, multiplier("residual_multiplier")?);
    for layer in &mut spec.layers {
        (layer.attention.scale, layer.residual_multiplier) = (scale, residual);
    }
    Ok(spec)
}
