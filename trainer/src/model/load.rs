//! From a model folder and a method to a model and its trained tensors. Names are Hugging Face tensor names throughout:
//! there is no mapping table. Frozen CPU weights in the right dtype stay in the mapped files; nothing is copied.

use std::collections::HashSet;
use std::path::Path;

use crds::run::{Lora, Method, Optimizer};
use rand::RngExt;
use tch::{Device, Kind, Tensor};

use super::layer::{Layer, LayerShape};
use super::{Config, Error, Llama};
use crate::compute::linear::{Adapter, Linear};
use crate::compute::ops::Rope;
use crate::compute::optim::{OptimizerConfig, ParameterInit, Parameters, Slot};
use crate::compute::shim;
use crate::compute::weight::Weight;
use crate::ground::random::generator;
use crate::ground::stop::Stop;
use crate::store::weights::{Mapped, WeightFiles};

/// The linears of a decoder layer, by the path below `model.layers.N.`, in the order of use.
pub const LAYER_LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// What a model is made from.
#[derive(Debug)]
pub struct Source<'a> {
    /// Folder with `config.json` and safetensors files.
    pub folder: &'a Path,
    /// What is trained; `None`: nothing, the model only answers.
    pub method: Option<&'a Method>,
    /// What trained tensors are updated with.
    pub optimizer: Optimizer,
    /// Dtype of weights and activations.
    pub kind: Kind,
    /// Where it goes.
    pub device: Device,
    /// Seed of the adapters' initial values.
    pub seed: i64,
    /// Longest example; the rotary tables end there.
    pub max_positions: i64,
}

/// A model and its trained tensors; the model computes with views of them.
#[derive(Debug)]
pub struct Built {
    /// The model.
    pub model: Llama,
    /// What is trained.
    pub parameters: Parameters,
}

/// Builds the model that `source` describes. That its weights are finite was found when they were digested, or by
/// [`check_finite`].
pub fn build(source: &Source) -> Result<Built, Error> {
    let config = Config::read(source.folder)?;
    let files = WeightFiles::open(source.folder)?;
    let loader = Loader { source, config: &config, files: &files };
    let (lora, trained, base) = match source.method {
        Some(Method::LoRA { lora } | Method::QLoRA { lora, .. }) => {
            (Some(lora), loader.adapter_inits(lora)?, loader.frozen_base()?)
        }
        None => (None, Vec::new(), loader.frozen_base()?),
        Some(Method::Full { .. }) => {
            let copies = loader.base()?.into_iter().map(|(name, value)| {
                let group = gradient_group(&name);
                ParameterInit { name, value, group }
            });
            (None, copies.collect(), Vec::new())
        }
    };
    let in_backward = matches!(source.method, Some(Method::Full { optimizer_in_backward: true }));
    let optimizer = OptimizerConfig { optimizer: source.optimizer, in_backward };
    let parameters = Parameters::new(trained, source.kind, source.device, optimizer);
    // What full fine-tuning has copied need not stay mapped.
    let maps = (!base.is_empty()).then_some(files);
    let base = base.into_iter().collect();
    let model = Assembler { config: &config, base, parameters: &parameters, lora }.assemble(source, maps)?;
    Ok(Built { model, parameters })
}

/// Reads the weights of a model that no run has prepared, and refuses NaN and infinity.
pub fn check_finite(folder: &Path) -> Result<(), Error> {
    let names = weight_names(folder)?;
    for file in WeightFiles::open(folder)?.files() {
        file.read_through(&|name| names.contains(name), &mut |_| ())?;
    }
    Ok(())
}

/// Names of the tensors that a model is built from; its files may have others.
pub fn weight_names(folder: &Path) -> Result<HashSet<String>, Error> {
    Ok(base_shapes(&Config::read(folder)?).into_iter().map(|(name, _)| name).collect())
}

/// Whose gradients are there at the same time: layer by layer, and the rest all the time.
fn gradient_group(name: &str) -> usize {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    layer.map_or(0, |layer| layer.parse::<usize>().map_or(0, |layer| layer + 1))
}

struct Loader<'a> {
    source: &'a Source<'a>,
    config: &'a Config,
    files: &'a WeightFiles,
}

/// Shapes of the base model's tensors by name, as `config.json` implies them.
pub fn base_shapes(config: &Config) -> Vec<(String, Vec<i64>)> {
    let hidden = config.hidden_size;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden])];
    for layer in 0..config.num_hidden_layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![hidden]));
        }
        for linear in LAYER_LINEARS {
            shapes.push((format!("model.layers.{layer}.{linear}.weight"), linear_shape(config, linear)));
        }
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        shapes.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
    }
    shapes
}

/// Elements of the base model's tensors.
pub fn base_elements(config: &Config) -> i64 {
    base_shapes(config).iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
}

/// Elements of one decoder layer.
pub fn layer_elements(config: &Config) -> i64 {
    let linears = LAYER_LINEARS.iter().map(|linear| linear_shape(config, linear).iter().product::<i64>());
    2 * config.hidden_size + linears.sum::<i64>()
}

/// Elements of the adapters; 0 if the targets are not linears of the model, which `build` reports.
pub fn lora_parameters(config: &Config, lora: &Lora) -> i64 {
    let per_layer: i64 = target_linears(lora)
        .unwrap_or_default()
        .into_iter()
        .map(|linear| linear_shape(config, linear).iter().sum::<i64>() * lora.rank)
        .sum();
    per_layer * config.num_hidden_layers
}

/// Puts the base model's weights in the place of what full fine-tuning made of them: it has no adapter to switch off, and
/// its baselines are measured so. No second copy of the weights is made, nor do the files stay in memory. Reading them takes a
/// while, and `stop` is told that it goes on.
pub fn restore_base(source: &Source, parameters: &mut Parameters, stop: &Stop) -> Result<(), Error> {
    let config = Config::read(source.folder)?;
    let files = WeightFiles::open(source.folder)?;
    let loader = Loader { source, config: &config, files: &files };
    let shapes: std::collections::HashMap<_, _> = base_shapes(&config).into_iter().collect();
    parameters.set_masters(|slot, master| {
        stop.alive();
        master.shallow_clone().copy_(&loader.read(&slot.name, &shapes[&slot.name])?);
        files.release(&slot.name);
        Ok(())
    })
}

/// A tensor of the base model, if it has the shape that `config.json` implies.
pub(super) fn mapped<'a>(
    folder: &Path,
    files: &'a WeightFiles,
    name: &str,
    expected: &[i64],
) -> Result<Mapped<'a>, Error> {
    let mapped = files.tensor(name)?;
    let found: Vec<i64> = mapped.shape.iter().map(|&size| size as i64).collect();
    if found != expected {
        return Err(Error::Shape { folder: folder.into(), name: name.into(), found, expected: expected.to_vec() });
    }
    Ok(mapped)
}

pub(super) fn kind_of(dtype: safetensors::Dtype) -> Kind {
    match dtype {
        safetensors::Dtype::BF16 => Kind::BFloat16,
        safetensors::Dtype::F16 => Kind::Half,
        _ => Kind::Float,
    }
}

/// `alpha / rank`, or `alpha / sqrt(rank)` when rank-stabilised.
pub(super) fn adapter_scale(lora: &Lora) -> f64 {
    let rank = lora.rank as f64;
    lora.alpha / if lora.rank_stabilized { rank.sqrt() } else { rank }
}

/// `[out, in]` of one linear of a layer.
fn linear_shape(config: &Config, linear: &str) -> Vec<i64> {
    let queries = config.num_attention_heads * config.head_size();
    let keys = config.kv_heads() * config.head_size();
    match linear {
        "self_attn.q_proj" => vec![queries, config.hidden_size],
        "self_attn.k_proj" | "self_attn.v_proj" => vec![keys, config.hidden_size],
        "self_attn.o_proj" => vec![config.hidden_size, queries],
        "mlp.down_proj" => vec![config.hidden_size, config.intermediate_size],
        _ => vec![config.intermediate_size, config.hidden_size],
    }
}

/// The linears of a layer that get an adapter: those whose last segment is listed, or all.
pub fn target_linears(lora: &Lora) -> Result<Vec<&'static str>, Error> {
    if lora.target_modules.is_empty() {
        return Ok(LAYER_LINEARS.to_vec());
    }
    let last = |linear: &str| linear.rsplit('.').next().unwrap_or_default().to_owned();
    for target in &lora.target_modules {
        if !LAYER_LINEARS.iter().any(|linear| last(linear) == *target) {
            return Err(Error::UnknownTarget { found: target.clone(), expected: LAYER_LINEARS.map(last).join(", ") });
        }
    }
    Ok(LAYER_LINEARS.into_iter().filter(|linear| lora.target_modules.contains(&last(linear))).collect())
}

impl Loader<'_> {
    /// All tensors of the base on the device in the dtype that they are stored in.
    fn base(&self) -> Result<Vec<(String, Tensor)>, Error> {
        base_shapes(self.config)
            .into_iter()
            .map(|(name, shape)| Ok((name.clone(), self.read(&name, &shape)?)))
            .collect()
    }

    /// The same in the dtype that the model computes in.
    fn frozen_base(&self) -> Result<Vec<(String, Tensor)>, Error> {
        let in_kind = |(name, stored): (String, Tensor)| (name, stored.to_kind(self.source.kind));
        Ok(self.base()?.into_iter().map(in_kind).collect())
    }

    /// One tensor, checked for its shape.
    fn read(&self, name: &str, expected: &[i64]) -> Result<Tensor, Error> {
        let mapped = mapped(self.source.folder, self.files, name, expected)?;
        let kind = kind_of(mapped.dtype);
        // SAFETY: the model keeps the map alive (`_maps`) if a weight stays frozen, and nothing writes to one; trained ones are
        // copied while it is alive.
        let stored = unsafe { shim::borrow_bytes(mapped.data, expected, kind) };
        Ok(stored.to_device(self.source.device))
    }

    /// A ~ U(-1/sqrt(in), 1/sqrt(in)), keyed by the linear's name; B = 0: the tuned model starts as the base.
    fn adapter_inits(&self, lora: &Lora) -> Result<Vec<ParameterInit>, Error> {
        let mut inits = Vec::new();
        for layer in 0..self.config.num_hidden_layers {
            for linear in target_linears(lora)? {
                let module = format!("model.layers.{layer}.{linear}");
                let shape = linear_shape(self.config, linear);
                let bound = 1.0 / (shape[1] as f32).sqrt();
                let mut random = generator(self.source.seed, &format!("init {module}"), &[]);
                let values: Vec<f32> = (0..lora.rank * shape[1]).map(|_| random.random_range(-bound..bound)).collect();
                let a = Tensor::from_slice(&values).view([lora.rank, shape[1]]);
                let b = Tensor::zeros([shape[0], lora.rank], (Kind::Float, Device::Cpu));
                inits.push(ParameterInit { name: format!("{module}.lora_A.weight"), value: a, group: 0 });
                inits.push(ParameterInit { name: format!("{module}.lora_B.weight"), value: b, group: 0 });
            }
        }
        Ok(inits)
    }
}

struct Assembler<'a> {
    config: &'a Config,
    base: std::collections::HashMap<String, Tensor>,
    parameters: &'a Parameters,
    lora: Option<&'a Lora>,
}

impl Assembler<'_> {
    fn slot(&self, name: &str) -> Option<&Slot> {
        self.parameters.slots().iter().find(|slot| slot.name == name)
    }

    fn weight(&self, name: &str) -> Weight {
        match self.slot(name) {
            Some(slot) => {
                Weight { value: self.parameters.working(slot), gradient: Some(self.parameters.gradient(slot)) }
            }
            None => Weight::frozen(self.base[name].shallow_clone()),
        }
    }

    fn linear(&self, layer: usize, index: usize) -> Linear {
        let module = format!("model.layers.{layer}.{}", LAYER_LINEARS[index]);
        let adapter =
            self.lora.filter(|_| self.slot(&format!("{module}.lora_A.weight")).is_some()).map(|lora| Adapter {
                a: self.weight(&format!("{module}.lora_A.weight")),
                b: self.weight(&format!("{module}.lora_B.weight")),
                scale: adapter_scale(lora),
                site: (layer * LAYER_LINEARS.len() + index) as u64,
            });
        Linear { weight: self.weight(&format!("{module}.weight")), adapter }
    }

    fn assemble(&self, source: &Source, maps: Option<WeightFiles>) -> Result<Llama, Error> {
        let config = self.config.clone();
        let shape = LayerShape {
            heads: config.num_attention_heads,
            kv_heads: config.kv_heads(),
            head_size: config.head_size(),
            eps: config.rms_norm_eps,
        };
        let layers = (0..config.num_hidden_layers as usize)
            .map(|layer| {
                let [q, k, v, o, gate, up, down] = std::array::from_fn(|index| self.linear(layer, index));
                let norm = |name: &str| self.weight(&format!("model.layers.{layer}.{name}.weight"));
                let (input_norm, post_attention_norm) = (norm("input_layernorm"), norm("post_attention_layernorm"));
                Layer { shape, input_norm, q, k, v, o, post_attention_norm, gate, up, down }
            })
            .collect();
        let embedding = self.weight("model.embed_tokens.weight");
        let head = self.weight(if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" });
        let frequencies = config
            .rope_frequencies()
            .map_err(|message| Error::UnsupportedModel { path: source.folder.join("config.json"), message })?;
        let max_positions = source.max_positions.min(config.max_position_embeddings);
        Ok(Llama {
            rope: Rope::new(&frequencies, max_positions, source.kind, source.device),
            embedding,
            layers,
            norm: self.weight("model.norm.weight"),
            head,
            kind: source.kind,
            device: source.device,
            lora_dropout: self.lora.map_or(0.0, |lora| lora.dropout),
            _maps: maps,
            config,
        })
    }
}
