//! Gemma: norms that are told by their distance from one, GELU, and embeddings that are scaled and tied.

use serde_json::json;

use super::{DEFAULTS, Defaults, biases, decoder};
use crate::model::keys::Keys;
use crate::model::spec::{Activation, Spec};

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    let defaults = Defaults { kv_heads: Some(16), head_size: Some(256), tied: true, ..DEFAULTS };
    let mut spec = decoder(keys, &defaults)?;
    biases(keys, &mut spec)?;
    // The first files say `gelu` and mean its approximation, as transformers reads them.
    let activation: Option<String> = keys.get("hidden_act")?;
    if let Some(found) = activation.filter(|name| !["gelu", "gelu_pytorch_tanh"].contains(&name.as_str())) {
        return Err(format!("not supported yet: hidden_act: {found}; expected gelu_pytorch_tanh"));
    }
    keys.only("hidden_activation", &json!("gelu_pytorch_tanh"))?;
    keys.only("use_bidirectional_attention", &json!(false))?;
    spec.norm.is_offset = true;
    spec.embedding_multiplier = (spec.hidden_size as f64).sqrt();
    for layer in &mut spec.layers {
        layer.mlp.activation = Activation::GeluTanh;
    }
    Ok(spec)
}
