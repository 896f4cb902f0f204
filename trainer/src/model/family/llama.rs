//! Llama 2 and 3, and the many that are built like them (SmolLM2, Yi, DeepSeek's distillations of it).

use super::{DEFAULTS, biases, decoder, silu};
use crate::model::keys::Keys;
use crate::model::spec::Spec;

pub fn describe(keys: &Keys) -> Result<Spec, String> {
    silu(keys)?;
    let mut spec = decoder(keys, &DEFAULTS)?;
    biases(keys, &mut spec)?;
    Ok(spec)
}
