//! OLMo 2: norms of what blocks give and none of what they take; queries and keys are normalised as a whole.

use super::{DEFAULTS, Defaults, biases, decoder, silu};
use crate::model::keys::Keys;
use crate::model::spec::{NormNames, QueryKeyNorm, Spec};

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &Defaults { eps: 1e-5, ..DEFAULTS })?;
    biases(keys, &mut spec)?;
    let after = |name| NormNames { before: None, after: Some(name) };
    for layer in &mut spec.layers {
        layer.attention.query_key_norm = Some(QueryKeyNorm::Projection);
        layer.attention_norms = after("post_attention_layernorm");
        layer.mlp_norms = after("post_feedforward_layernorm");
    }
    Ok(spec)
}
