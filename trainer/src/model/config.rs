//! `config.json` as Hugging Face writes it (the layouts of transformers 4 and 5), as a closed schema: what the model cannot
//! honour is refused by name, and nothing in it is executable.

use std::path::Path;

use serde::Deserialize;

use super::Error;

/// A decoder of the Llama family.
#[expect(clippy::struct_field_names, reason = "the names are those of config.json")]
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Number of decoder layers.
    pub num_hidden_layers: i64,
    /// Number of query heads.
    pub num_attention_heads: i64,
    /// Number of key-value heads; absent: as many as query heads.
    pub num_key_value_heads: Option<i64>,
    /// Size of a head; absent: `hidden_size / num_attention_heads`.
    pub head_dim: Option<i64>,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Row of the embedding that inputs do not train, as in transformers (`padding_idx`), even where it ends answers too.
    pub pad_token_id: Option<i64>,
    /// Whether head and embedding are one tensor.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    rope_parameters: Option<RopeScaling>,
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    quantization_config: Option<serde_json::Value>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct RopeScaling {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl Config {
    /// Reads and checks `config.json` of a model folder.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| Error::ReadConfig { path: path.clone(), source })?;
        let config: Self =
            serde_json::from_str(&text).map_err(|source| Error::ParseConfig { path: path.clone(), source })?;
        config.check().map_err(|message| Error::UnsupportedModel { path, message })?;
        Ok(config)
    }

    /// Number of key-value heads.
    pub fn kv_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Size of a head.
    pub fn head_size(&self) -> i64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    fn check(&self) -> Result<(), String> {
        let architecture = self.architectures.as_ref().and_then(|names| names.first()).map(String::as_str);
        if architecture.is_some_and(|name| name != "LlamaForCausalLM")
            || self.model_type.as_deref().is_some_and(|name| name != "llama")
        {
            return Err(format!(
                "not supported yet: architecture {} (model_type {}); expected LlamaForCausalLM",
                architecture.unwrap_or("absent"),
                self.model_type.as_deref().unwrap_or("absent"),
            ));
        }
        for (name, set) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            if set {
                return Err(format!("not supported yet: {name}: true"));
            }
        }
        if let Some(activation) = self.hidden_act.as_deref().filter(|name| *name != "silu") {
            return Err(format!("not supported yet: hidden_act {activation}; expected silu"));
        }
        if self.quantization_config.is_some() {
            return Err("the weights are quantised (quantization_config is present); give the original bf16 or fp32 \
                        model"
                .into());
        }
        for (name, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
            ("head_dim", self.head_size()),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if !(1..=1 << 24).contains(&value) {
                return Err(format!("{name} is {value}; expected a number between 1 and 16777216"));
            }
        }
        if self.num_attention_heads % self.kv_heads() != 0 {
            return Err(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads,
                self.kv_heads()
            ));
        }
        if self.head_size() % 2 != 0 {
            return Err(format!("head_dim is {}; rotary embedding needs an even number", self.head_size()));
        }
        self.rope_frequencies().map(drop)
    }

    /// Inverse frequencies of the rotary embedding, `[head_dim / 2]`.
    pub fn rope_frequencies(&self) -> Result<Vec<f32>, String> {
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = scaling.and_then(|scaling| scaling.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let head_size = self.head_size();
        let plain = (0..head_size / 2).map(|k| 1.0 / theta.powf((2 * k) as f64 / head_size as f64));
        let required = |name: &str, value: Option<f64>| {
            value
                .filter(|value| value.is_finite() && *value > 0.0)
                .ok_or_else(|| format!("rope_scaling.{name} is missing"))
        };
        match scaling.map(|scaling| (scaling, scaling.rope_type.as_deref().unwrap_or("default"))) {
            None | Some((_, "default")) => Ok(plain.map(|f| f as f32).collect()),
            Some((scaling, "linear")) => {
                let factor = required("factor", scaling.factor)?;
                Ok(plain.map(|f| (f / factor) as f32).collect())
            }
            Some((scaling, "llama3")) => {
                let factor = required("factor", scaling.factor)?;
                let low = required("low_freq_factor", scaling.low_freq_factor)?;
                let high = required("high_freq_factor", scaling.high_freq_factor)?;
                let original = required("original_max_position_embeddings", scaling.original_max_position_embeddings)?;
                Ok(plain
                    .map(|f| {
                        let wavelength = 2.0 * std::f64::consts::PI / f;
                        let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                        ((1.0 - smooth) * f / factor + smooth * f) as f32
                    })
                    .collect())
            }
            Some((_, other)) => {
                Err(format!("not supported yet: rope_type {other}; expected default, linear or llama3"))
            }
        }
    }
}
