//! `config.json` as Hugging Face writes it (the layouts of transformers 4 and 5), as a closed schema: what the model cannot
//! honour is refused by name, and nothing in it is executable.

use std::path::Path;

use serde::Deserialize;

use super::Error;

/// Far beyond any model, and small enough that nothing derived from them overflows or exhausts the memory.
const MAX_SIZE: i64 = 1 << 24;
const MAX_HEADS: i64 = 1 << 16;
const MAX_LAYERS: i64 = 1 << 12;

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
    rope_type: Option<String>,
    /// The name before transformers 4.43; some files carry both.
    #[serde(rename = "type")]
    legacy_type: Option<String>,
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
        let mut config: Self =
            serde_json::from_str(&text).map_err(|source| Error::ParseConfig { path: path.clone(), source })?;
        // Some files say -1 for "none".
        config.pad_token_id = config.pad_token_id.filter(|id| *id >= 0);
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
        let within = |name: &str, value: i64, most: i64| {
            let fits = (1..=most).contains(&value);
            fits.then_some(()).ok_or_else(|| format!("{name} is {value}; expected a number between 1 and {most}"))
        };
        // Before head_size(), which divides by it.
        within("num_attention_heads", self.num_attention_heads, MAX_HEADS)?;
        for (name, value, most) in [
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_key_value_heads", self.kv_heads(), MAX_HEADS),
            ("head_dim", self.head_size(), MAX_HEADS),
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("max_position_embeddings", self.max_position_embeddings, MAX_SIZE),
        ] {
            within(name, value, most)?;
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps is {}; expected a number of at least 0", self.rms_norm_eps));
        }
        if let Some(id) = self.pad_token_id.filter(|id| *id >= self.vocab_size) {
            return Err(format!(
                "pad_token_id is {id}, beyond the vocabulary of {} tokens (vocab_size); expected a smaller id, or null",
                self.vocab_size
            ));
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
        if !(theta.is_finite() && theta > 0.0) {
            return Err(format!("rope_theta is {theta}; expected a number above 0"));
        }
        let head_size = self.head_size();
        let plain = (0..head_size / 2).map(|k| 1.0 / theta.powf((2 * k) as f64 / head_size as f64));
        let required = |name: &str, value: Option<f64>| {
            value
                .filter(|value| value.is_finite() && *value > 0.0)
                .ok_or_else(|| format!("rope_scaling.{name} is missing or not above 0"))
        };
        let names = scaling.map(|scaling| (scaling.rope_type.as_deref(), scaling.legacy_type.as_deref()));
        let rope_type = match names {
            Some((Some(new), Some(old))) if new != old => {
                return Err(format!(
                    "rope_scaling has rope_type {new} and type {old}; expected the same, or one of them"
                ));
            }
            Some((new, old)) => new.or(old).unwrap_or("default"),
            None => "default",
        };
        match scaling.map(|scaling| (scaling, rope_type)) {
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
                if high <= low {
                    return Err(format!(
                        "rope_scaling.high_freq_factor is {high}; expected more than low_freq_factor, {low}"
                    ));
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Reads a config.json that is right but for `changes`.
    fn read(changes: &Value) -> Result<Config, String> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5
        });
        for (name, value) in changes.as_object().expect("changes by name") {
            config[name] = value.clone();
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("writable");
        Config::read(folder.path())
            .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
    }

    #[test]
    fn odd_numbers_are_refused_and_never_panic() {
        for (changes, expected) in [
            (json!({"num_attention_heads": 0}), "num_attention_heads is 0; expected a number between 1 and 65536"),
            (json!({"num_attention_heads": -1, "hidden_size": i64::MIN}), "num_attention_heads is -1"),
            (json!({"num_key_value_heads": 0}), "num_key_value_heads is 0"),
            (
                json!({"num_hidden_layers": 16_000_000}),
                "num_hidden_layers is 16000000; expected a number between 1 and 4096",
            ),
            (json!({"pad_token_id": 256}), "pad_token_id is 256, beyond the vocabulary of 256 tokens (vocab_size)"),
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1"),
            (json!({"rope_theta": 0.0}), "rope_theta is 0"),
            (
                json!({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}),
                "rope_scaling has rope_type llama3 and type linear; expected the same, or one of them",
            ),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
                "rope_scaling.high_freq_factor is 4; expected more than low_freq_factor, 4",
            ),
        ] {
            let error = read(&changes).expect_err(expected);
            assert!(error.starts_with(&format!("config.json: {expected}")), "{error}");
        }
    }

    #[test]
    fn a_negative_pad_token_is_none_and_both_names_of_the_rope_type_are_accepted() {
        assert_eq!(read(&json!({"pad_token_id": -1})).expect("valid").pad_token_id, None);
        assert_eq!(read(&json!({"pad_token_id": 255})).expect("valid").pad_token_id, Some(255));
        let scaled = |names: Value| {
            let mut scaling = names;
            scaling["factor"] = json!(2.0);
            read(&json!({"rope_scaling": scaling})).expect("valid").rope_frequencies().expect("valid")
        };
        let linear = scaled(json!({"rope_type": "linear"}));
        assert_eq!(scaled(json!({"type": "linear"})), linear);
        assert_eq!(scaled(json!({"type": "linear", "rope_type": "linear"})), linear);
    }
}
