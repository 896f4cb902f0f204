//! Frequencies of the rotary embedding, from either layout of `config.json`: `rope_theta` with `rope_scaling` (transformers 4), or
//! `rope_parameters` (5).

use serde::Deserialize;
use serde_json::{Map, Value};

use super::keys::Keys;

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Scaling {
    rope_type: Option<String>,
    /// The name before transformers 4.43; some files carry both.
    #[serde(rename = "type")]
    legacy_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Inverse frequencies, `[head_size / 2]`; `theta` is the base where the file has none.
pub fn frequencies(keys: &Keys, head_size: i64, theta: f64) -> Result<Vec<f32>, String> {
    let (old, new): (Option<Scaling>, Option<Scaling>) = (keys.get("rope_scaling")?, keys.get("rope_parameters")?);
    let base: Option<f64> = keys.get("rope_theta")?;
    let scaling = new.as_ref().or(old.as_ref());
    let theta = scaling.and_then(|scaling| scaling.rope_theta).or(base).unwrap_or(theta);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(format!("rope_theta is {theta}; expected a number above 0"));
    }
    let plain = (0..head_size / 2).map(|k| 1.0 / theta.powf((2 * k) as f64 / head_size as f64));
    let required = |name: &str, value: Option<f64>| {
        value
            .filter(|value| value.is_finite() && *value > 0.0)
            .ok_or_else(|| format!("rope_scaling.{name} is missing or not above 0"))
    };
    let names = scaling.map(|scaling| (scaling.rope_type.as_deref(), scaling.legacy_type.as_deref()));
    let rope_type = match names {
        Some((Some(new), Some(old))) if new != old => {
            return Err(format!("rope_scaling has rope_type {new} and type {old}; expected the same, or one of them"));
        }
        Some((new, old)) => new.or(old).unwrap_or("default"),
        None => "default",
    };
    let others = scaling.iter().flat_map(|scaling| &scaling.others).filter(|(_, value)| !value.is_null());
    let others: Vec<&str> = others.map(|(name, _)| name.as_str()).collect();
    if ["default", "linear", "llama3"].contains(&rope_type) && !others.is_empty() {
        return Err(format!("not supported yet: rope_scaling.{} with rope_type {rope_type}", others.join(", ")));
    }
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
        Some((_, other)) => Err(format!("not supported yet: rope_type {other}; expected default, linear or llama3")),
    }
}
