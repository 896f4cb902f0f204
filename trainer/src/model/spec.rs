//! What a decoder is, as its family describes it from `config.json`: sizes, names and constants of its blocks, and nothing of how
//! they are computed. Names and shapes of tensors, targets of adapters and the bytes of a plan follow from it.

use std::path::Path;

use super::keys::Keys;
use super::{Error, family};

/// A decoder: embedding, layers, final norm, head.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Row of the embedding that inputs do not train, as in transformers (`padding_idx`), even where it ends answers too.
    pub pad_token_id: Option<i64>,
    /// Whether head and embedding are one tensor.
    pub tie_word_embeddings: bool,
    /// What embeddings are multiplied by.
    pub embedding_multiplier: f64,
    /// What logits are multiplied by.
    pub logits_multiplier: f64,
    /// Inverse frequencies of the rotary embedding, `[head_size / 2]`.
    pub rope_frequencies: Vec<f32>,
    /// The norm after the last layer; those of layers are like it.
    pub norm: NormSpec,
    /// From the first to the last.
    pub layers: Vec<LayerSpec>,
}

/// RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f64,
    /// The stored weight is the distance from one.
    pub is_offset: bool,
}

/// One layer: attention, then the MLP, each added to the residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// Its MLP.
    pub mlp: MlpSpec,
    /// Norms around attention.
    pub attention_norms: NormNames,
    /// Norms around the MLP.
    pub mlp_norms: NormNames,
    /// What each block's output is multiplied by.
    pub residual_multiplier: f64,
}

/// Names of the norms of a block's input and output, below the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormNames {
    /// Of its input.
    pub before: Option<&'static str>,
    /// Of its output, before that is added.
    pub after: Option<&'static str>,
}

/// Causal attention with grouped heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: i64,
    /// Key-value heads.
    pub kv_heads: i64,
    /// Size of a head.
    pub head_size: i64,
    /// Whether q, k and v have a bias.
    pub input_bias: bool,
    /// Whether o has one.
    pub output_bias: bool,
    /// Norms of queries and keys.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Whether queries and keys are rotated by their position.
    pub is_rotary: bool,
    /// A token sees itself and as many before it as make so many; `None`: all before it.
    pub window: Option<i64>,
    /// What scores are multiplied by.
    pub scale: f64,
}

/// Over what queries and keys are normalised, before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Each head.
    Head,
    /// All heads at once.
    Projection,
}

/// `down(activation(gate(x)) * up(x))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlpSpec {
    /// Its width.
    pub width: i64,
    /// Whether its linears have a bias.
    pub bias: bool,
    /// Of the gate.
    pub activation: Activation,
}

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// A linear of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Below the layer.
    pub name: &'static str,
    /// Width of its output.
    pub outputs: i64,
    /// Width of its input.
    pub inputs: i64,
    /// Whether it has a bias.
    pub bias: bool,
}

impl LinearSpec {
    /// The last part of its name, by which adapters choose it.
    pub fn target(&self) -> &'static str {
        self.name.rsplit('.').next().unwrap_or(self.name)
    }
}

impl AttentionSpec {
    /// Width of all queries.
    pub fn query_size(&self) -> i64 {
        self.heads * self.head_size
    }

    /// Width of all keys, and of all values.
    pub fn key_size(&self) -> i64 {
        self.kv_heads * self.head_size
    }

    /// Names and lengths of the norms of queries and keys.
    pub fn norms(&self) -> Vec<(&'static str, i64)> {
        let [query, key] = match self.query_key_norm {
            None => return Vec::new(),
            Some(QueryKeyNorm::Head) => [self.head_size; 2],
            Some(QueryKeyNorm::Projection) => [self.query_size(), self.key_size()],
        };
        vec![("self_attn.q_norm", query), ("self_attn.k_norm", key)]
    }
}

impl LayerSpec {
    /// Its linears in the order of use.
    pub fn linears(&self, hidden: i64) -> [LinearSpec; 7] {
        let AttentionSpec { input_bias, output_bias, .. } = self.attention;
        let (queries, keys) = (self.attention.query_size(), self.attention.key_size());
        let MlpSpec { width, bias, .. } = self.mlp;
        let linear = |name, outputs, inputs, bias| LinearSpec { name, outputs, inputs, bias };
        [
            linear("self_attn.q_proj", queries, hidden, input_bias),
            linear("self_attn.k_proj", keys, hidden, input_bias),
            linear("self_attn.v_proj", keys, hidden, input_bias),
            linear("self_attn.o_proj", hidden, queries, output_bias),
            linear("mlp.gate_proj", width, hidden, bias),
            linear("mlp.up_proj", width, hidden, bias),
            linear("mlp.down_proj", hidden, width, bias),
        ]
    }

    /// Names below the layer and shapes of its tensors.
    pub fn tensors(&self, hidden: i64) -> Vec<(String, Vec<i64>)> {
        let around = [self.attention_norms, self.mlp_norms];
        let around = around.into_iter().flat_map(|norms| norms.before.into_iter().chain(norms.after));
        let norms = around.map(|name| (name, hidden)).chain(self.attention.norms());
        let norms = norms.map(|(name, length)| (format!("{name}.weight"), vec![length]));
        let linears = self.linears(hidden).into_iter().flat_map(|LinearSpec { name, outputs, inputs, bias }| {
            let weight = (format!("{name}.weight"), vec![outputs, inputs]);
            [Some(weight), bias.then(|| (format!("{name}.bias"), vec![outputs]))]
        });
        norms.chain(linears.flatten()).collect()
    }

    /// Elements of its tensors.
    pub fn elements(&self, hidden: i64) -> i64 {
        elements(&self.tensors(hidden))
    }
}

impl Spec {
    /// Reads and checks `config.json` of a model folder.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| Error::ReadConfig { path: path.clone(), source })?;
        let keys = Keys::parse(&text).map_err(|source| Error::ParseConfig { path: path.clone(), source })?;
        family::describe(&keys).map_err(|message| Error::UnsupportedModel { path, message })
    }

    /// Names and shapes of all its tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, self.hidden_size])];
        for (index, layer) in self.layers.iter().enumerate() {
            let below = |(name, shape)| (format!("model.layers.{index}.{name}"), shape);
            tensors.extend(layer.tensors(self.hidden_size).into_iter().map(below));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    /// Elements of all its tensors.
    pub fn elements(&self) -> i64 {
        elements(&self.tensors())
    }

    /// The smallest window of its layers; `None`: every token sees all before it.
    pub fn window(&self) -> Option<i64> {
        self.layers.iter().filter_map(|layer| layer.attention.window).min()
    }

    /// The first layer: sizes of heads and widths are those of all.
    pub fn first(&self) -> &LayerSpec {
        &self.layers[0]
    }

    /// Tokens of the longest row that is computed as the family does; longer ones are refused.
    pub fn longest(&self) -> i64 {
        self.window().map_or(self.max_position_embeddings, |window| window.min(self.max_position_embeddings))
    }
}

fn elements(tensors: &[(String, Vec<i64>)]) -> i64 {
    tensors.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
}
