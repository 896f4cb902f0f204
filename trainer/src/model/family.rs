//! Families of decoders. Each has a file that says what it is, from the keys of its `config.json`; what they have in common is here.

mod gemma;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod qwen2;
mod qwen3;
mod smollm3;
#[cfg(test)]
mod tests;

use serde_json::json;

use super::keys::Keys;
use super::rope;
use super::spec::{Activation, AttentionSpec, LayerSpec, MlpSpec, NormNames, NormSpec, Spec};

/// Far beyond any model, and small enough that nothing derived from them overflows or exhausts the memory.
const MAX_SIZE: i64 = 1 << 24;
const MAX_HEADS: i64 = 1 << 16;
const MAX_LAYERS: i64 = 1 << 12;

/// Norms of a block's input alone, as most families have them.
const PRE_NORMS: [NormNames; 2] = [
    NormNames { before: Some("input_layernorm"), after: None },
    NormNames { before: Some("post_attention_layernorm"), after: None },
];

type Describe = fn(&Keys) -> Result<Spec, String>;

/// Architecture, `model_type`, and who describes it.
const FAMILIES: [(&str, &str, Describe); 8] = [
    ("GemmaForCausalLM", "gemma", gemma::describe),
    ("GraniteForCausalLM", "granite", granite::describe),
    ("LlamaForCausalLM", "llama", llama::describe),
    ("MistralForCausalLM", "mistral", mistral::describe),
    ("Olmo2ForCausalLM", "olmo2", olmo2::describe),
    ("Qwen2ForCausalLM", "qwen2", qwen2::describe),
    ("Qwen3ForCausalLM", "qwen3", qwen3::describe),
    ("SmolLM3ForCausalLM", "smollm3", smollm3::describe),
];

/// What is missing for some that are known and not computed.
const MISSING: [(&str, &str); 9] = [
    ("gemma2", "soft-caps of scores and logits"),
    ("gemma3", "two rotary embeddings, and images"),
    ("gemma3_text", "two rotary embeddings"),
    ("gpt_oss", "attention sinks, clamped SwiGLU and MXFP4"),
    ("ministral3", "yarn"),
    ("olmo3", "two rotary embeddings"),
    ("phi3", "fused projections and longrope"),
    ("qwen3_5", "Gated DeltaNet"),
    ("qwen3_moe", "experts"),
];

/// What a `config.json` describes.
pub fn describe(keys: &Keys) -> Result<Spec, String> {
    let architectures: Vec<String> = keys.or("architectures", Vec::new())?;
    let (architecture, model_type): (Option<&String>, Option<String>) =
        (architectures.first(), keys.get("model_type")?);
    let fits = |(name, of, _): &&(&str, &str, Describe)| {
        architecture.is_none_or(|found| found == name) && model_type.as_ref().is_none_or(|found| found == of)
    };
    let is_named = architecture.is_some() || model_type.is_some();
    let Some((.., describe)) = FAMILIES.iter().find(fits).filter(|_| is_named) else {
        let missing = MISSING.iter().find(|(name, _)| model_type.as_deref() == Some(name));
        let missing = missing.map_or_else(String::new, |(_, what)| format!(", which needs {what}"));
        let known: Vec<&str> = FAMILIES.iter().map(|(name, ..)| *name).collect();
        return Err(format!(
            "not supported yet: architecture {} (model_type {}){missing}; expected one of {}",
            architecture.map_or("absent", String::as_str),
            model_type.as_deref().unwrap_or("absent"),
            known.join(", ")
        ));
    };
    if keys.get::<serde_json::Value>("quantization_config")?.is_some() {
        return Err(
            "the weights are quantised (quantization_config is present); give the original bf16 or fp32 model".into()
        );
    }
    let spec = describe(keys)?;
    keys.finish()?;
    Ok(spec)
}

/// What transformers takes where a family's file is silent.
struct Defaults {
    theta: f64,
    eps: f64,
    kv_heads: Option<i64>,
    head_size: Option<i64>,
    tied: bool,
}

/// Those of Llama.
const DEFAULTS: Defaults = Defaults { theta: 10_000.0, eps: 1e-6, kv_heads: None, head_size: None, tied: false };

/// A decoder with norms before its blocks, SwiGLU, rotary embeddings and no bias.
fn decoder(keys: &Keys, defaults: &Defaults) -> Result<Spec, String> {
    let within = |name: &str, value: i64, most: i64| {
        let fits = (1..=most).contains(&value);
        fits.then_some(value).ok_or_else(|| format!("{name} is {value}; expected a number between 1 and {most}"))
    };
    let size = |name: &str, most: i64| within(name, keys.required(name)?, most);
    // Before the size of a head, which is divided by it.
    let heads = size("num_attention_heads", MAX_HEADS)?;
    let hidden_size = size("hidden_size", MAX_SIZE)?;
    let width = size("intermediate_size", MAX_SIZE)?;
    let count = size("num_hidden_layers", MAX_LAYERS)?;
    let kv_heads = keys.get("num_key_value_heads")?.or(defaults.kv_heads).unwrap_or(heads);
    let kv_heads = within("num_key_value_heads", kv_heads, MAX_HEADS)?;
    let head_size = keys.get("head_dim")?.or(defaults.head_size).unwrap_or(hidden_size / heads);
    let head_size = within("head_dim", head_size, MAX_HEADS)?;
    let vocab_size = size("vocab_size", MAX_SIZE)?;
    let max_position_embeddings = size("max_position_embeddings", MAX_SIZE)?;
    let eps: f64 = keys.or("rms_norm_eps", defaults.eps)?;
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(format!("rms_norm_eps is {eps}; expected a number of at least 0"));
    }
    // Some files say -1 for "none".
    let pad_token_id = keys.get("pad_token_id")?.filter(|id: &i64| *id >= 0);
    if let Some(id) = pad_token_id.filter(|id| *id >= vocab_size) {
        return Err(format!(
            "pad_token_id is {id}, beyond the vocabulary of {vocab_size} tokens (vocab_size); expected a smaller id, or null"
        ));
    }
    if heads % kv_heads != 0 {
        return Err(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"));
    }
    if head_size % 2 != 0 {
        return Err(format!("head_dim is {head_size}; rotary embedding needs an even number"));
    }
    keys.only("attention_dropout", &json!(0.0))?;
    keys.only("rope_interleaved", &json!(false))?;
    keys.only("partial_rotary_factor", &json!(1.0))?;
    let [attention_norms, mlp_norms] = PRE_NORMS;
    let layer = LayerSpec {
        attention: AttentionSpec {
            heads,
            kv_heads,
            head_size,
            input_bias: false,
            output_bias: false,
            query_key_norm: None,
            is_rotary: true,
            window: None,
            scale: 1.0 / (head_size as f64).sqrt(),
        },
        mlp: MlpSpec { width, bias: false, activation: Activation::Silu },
        attention_norms,
        mlp_norms,
        residual_multiplier: 1.0,
    };
    Ok(Spec {
        hidden_size,
        vocab_size,
        max_position_embeddings,
        pad_token_id,
        tie_word_embeddings: keys.or("tie_word_embeddings", defaults.tied)?,
        embedding_multiplier: 1.0,
        logits_multiplier: 1.0,
        rope_frequencies: rope::frequencies(keys, head_size, defaults.theta)?,
        norm: NormSpec { eps, is_offset: false },
        layers: vec![layer; count as usize],
    })
}

/// `hidden_act`, which has to be SiLU.
fn silu(keys: &Keys) -> Result<(), String> {
    keys.only("hidden_act", &json!("silu"))
}

/// `attention_bias`, of all four projections, and `mlp_bias`.
fn biases(keys: &Keys, spec: &mut Spec) -> Result<(), String> {
    let (attention, mlp) = (keys.or("attention_bias", false)?, keys.or("mlp_bias", false)?);
    for layer in &mut spec.layers {
        (layer.attention.input_bias, layer.attention.output_bias, layer.mlp.bias) = (attention, attention, mlp);
    }
    Ok(())
}

/// `sliding_window`
fn window(keys: &Keys) -> Result<Option<i64>, String> {
    let window: Option<i64> = keys.get("sliding_window")?;
    match window {
        Some(window) if window < 1 => Err(format!("sliding_window is {window}; expected at least 1, or null")),
        window => Ok(window),
    }
}

/// Windows where `use_sliding_window` is set: of the layers that `layer_types` names, or else of those that `slides` tells.
fn windows_if_used(keys: &Keys, spec: &mut Spec, slides: impl Fn(usize, &LayerSpec) -> bool) -> Result<(), String> {
    let is_used = keys.or("use_sliding_window", false)?;
    let types: Option<Vec<String>> = keys.get("layer_types")?;
    let window: Option<i64> = if is_used { window(keys)? } else { keys.get("sliding_window")? };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let named = types.as_ref().map(|types| types.get(index).is_some_and(|kind| kind == "sliding_attention"));
        layer.attention.window = window.filter(|_| is_used && named.unwrap_or_else(|| slides(index, layer)));
    }
    Ok(())
}

/// Windows of Qwen: of the layers from `max_window_layers` on.
fn windows_of_qwen(keys: &Keys, spec: &mut Spec) -> Result<(), String> {
    let first: usize = keys.or("max_window_layers", 28)?;
    windows_if_used(keys, spec, |index, _| index >= first)
}
