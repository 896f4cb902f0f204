//! From a model folder and a method to a model and its trained tensors. Names are Hugging Face tensor names throughout:
//! there is no mapping table. Frozen CPU weights in the right dtype stay in the mapped files; nothing is copied.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use crds::run::{Lora, Method, Optimizer};
use rand::RngExt;
use tch::{Device, Kind, Tensor};

use super::layer::{Attention, Layer, Mlp};
use super::spec::{LayerSpec, LinearSpec, NormNames, NormSpec};
use super::{Decoder, Error, Spec};
use crate::compute::linear::{Adapter, Linear};
use crate::compute::norm::Norm;
use crate::compute::ops::Rope;
use crate::compute::optim::{OptimizerConfig, ParameterInit, Parameters, Slot};
use crate::compute::shim;
use crate::compute::weight::Weight;
use crate::ground::random::generator;
use crate::ground::stop::Stop;
use crate::store::weights::{Mapped, WeightFiles};

/// Tensors that an error names.
const NAMED_STRANGERS: usize = 3;

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
    pub model: Decoder,
    /// What is trained.
    pub parameters: Parameters,
}

/// Builds the model that `source` describes. That its weights are finite was found when they were digested, or by
/// [`check_finite`].
pub fn build(source: &Source) -> Result<Built, Error> {
    let spec = Spec::read(source.folder)?;
    if let Some(window) =
        spec.window().filter(|window| *window < source.max_positions.min(spec.max_position_embeddings))
    {
        return Err(Error::BeyondWindow { folder: source.folder.into(), longest: source.max_positions, window });
    }
    let files = WeightFiles::open(source.folder)?;
    check_tensors(source.folder, &spec, &files)?;
    let loader = Loader { source, spec: &spec, files: &files };
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
    let model = Assembler { spec: &spec, base, parameters: &parameters, lora }.assemble(source, maps);
    Ok(Built { model, parameters })
}

/// Reads the weights of a model that no run has prepared, and refuses NaN and infinity.
pub fn check_finite(folder: &Path) -> Result<(), Error> {
    let files = WeightFiles::open(folder)?;
    let names = weight_names(folder, &files)?;
    for file in files.files() {
        file.read_through(&|name| names.contains(name), &mut |_| ())?;
    }
    Ok(())
}

/// Names of the tensors that a model is built from, when its files have them all, and none that would change what it computes.
pub fn weight_names(folder: &Path, files: &WeightFiles) -> Result<HashSet<String>, Error> {
    let spec = Spec::read(folder)?;
    check_tensors(folder, &spec, files)?;
    Ok(spec.tensors().into_iter().map(|(name, _)| name).collect())
}

/// Weights of another family under a config would be computed as something that they are not.
fn check_tensors(folder: &Path, spec: &Spec, files: &WeightFiles) -> Result<(), Error> {
    let expected: HashMap<String, Vec<i64>> = spec.tensors().into_iter().collect();
    for (name, shape) in &expected {
        mapped(folder, files, name, shape)?;
    }
    // What old versions of transformers stored beside, and a head that is tied.
    let is_harmless = |name: &str| {
        ["rotary_emb.inv_freq", "self_attn.bias", "self_attn.masked_bias"].iter().any(|end| name.ends_with(end))
            || name == "lm_head.weight"
    };
    let is_stranger = |name: &&str| !expected.contains_key(*name) && !is_harmless(name);
    let mut strangers: Vec<String> = files.names().into_iter().filter(is_stranger).map(str::to_owned).collect();
    if strangers.is_empty() {
        return Ok(());
    }
    strangers.sort_unstable();
    let more = strangers.len().saturating_sub(NAMED_STRANGERS);
    strangers.truncate(NAMED_STRANGERS);
    Err(Error::Strangers { folder: folder.into(), names: strangers, more })
}

/// Whose gradients are there at the same time: layer by layer, and the rest all the time.
fn gradient_group(name: &str) -> usize {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    layer.map_or(0, |layer| layer.parse::<usize>().map_or(0, |layer| layer + 1))
}

struct Loader<'a> {
    source: &'a Source<'a>,
    spec: &'a Spec,
    files: &'a WeightFiles,
}

/// Elements of the adapters; 0 if the targets are not linears of the model, which `build` reports.
pub fn lora_parameters(spec: &Spec, lora: &Lora) -> i64 {
    let of_linear = |linear: LinearSpec| (linear.outputs + linear.inputs) * lora.rank;
    let of_layer = |layer: &LayerSpec| {
        target_linears(layer, spec.hidden_size, lora).unwrap_or_default().into_iter().map(of_linear).sum::<i64>()
    };
    spec.layers.iter().map(of_layer).sum()
}

/// Puts the base model's weights in the place of what full fine-tuning made of them: it has no adapter to switch off, and
/// its baselines are measured so. No second copy of the weights is made, nor do the files stay in memory. Reading them takes a
/// while, and `stop` is told that it goes on.
pub fn restore_base(source: &Source, parameters: &mut Parameters, stop: &Stop) -> Result<(), Error> {
    let spec = Spec::read(source.folder)?;
    let files = WeightFiles::open(source.folder)?;
    let loader = Loader { source, spec: &spec, files: &files };
    let shapes: HashMap<_, _> = spec.tensors().into_iter().collect();
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

/// The linears of a layer that get an adapter: those whose last segment is listed, or all.
pub fn target_linears(layer: &LayerSpec, hidden: i64, lora: &Lora) -> Result<Vec<LinearSpec>, Error> {
    let linears = layer.linears(hidden);
    if lora.target_modules.is_empty() {
        return Ok(linears.to_vec());
    }
    for target in &lora.target_modules {
        if !linears.iter().any(|linear| linear.target() == *target) {
            let expected = linears.map(|linear| linear.target()).join(", ");
            return Err(Error::UnknownTarget { found: target.clone(), expected });
        }
    }
    let is_target = |linear: &LinearSpec| lora.target_modules.iter().any(|target| linear.target() == *target);
    Ok(linears.into_iter().filter(is_target).collect())
}

impl Loader<'_> {
    /// All tensors of the base on the device in the dtype that they are stored in.
    fn base(&self) -> Result<Vec<(String, Tensor)>, Error> {
        self.spec.tensors().into_iter().map(|(name, shape)| Ok((name.clone(), self.read(&name, &shape)?))).collect()
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
        for (index, layer) in self.spec.layers.iter().enumerate() {
            for LinearSpec { name, outputs, inputs, .. } in target_linears(layer, self.spec.hidden_size, lora)? {
                let module = format!("model.layers.{index}.{name}");
                let bound = 1.0 / (inputs as f32).sqrt();
                let mut random = generator(self.source.seed, &format!("init {module}"), &[]);
                let values: Vec<f32> = (0..lora.rank * inputs).map(|_| random.random_range(-bound..bound)).collect();
                let a = Tensor::from_slice(&values).view([lora.rank, inputs]);
                let b = Tensor::zeros([outputs, lora.rank], (Kind::Float, Device::Cpu));
                inits.push(ParameterInit { name: format!("{module}.lora_A.weight"), value: a, group: 0 });
                inits.push(ParameterInit { name: format!("{module}.lora_B.weight"), value: b, group: 0 });
            }
        }
        Ok(inits)
    }
}

struct Assembler<'a> {
    spec: &'a Spec,
    base: HashMap<String, Tensor>,
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

    /// The linear that is `place` in a layer of `of_layer`.
    fn linear(
        &self,
        layer: usize,
        (place, of_layer): (usize, usize),
        LinearSpec { name, bias, .. }: LinearSpec,
    ) -> Linear {
        let module = format!("model.layers.{layer}.{name}");
        let adapter =
            self.lora.filter(|_| self.slot(&format!("{module}.lora_A.weight")).is_some()).map(|lora| Adapter {
                a: self.weight(&format!("{module}.lora_A.weight")),
                b: self.weight(&format!("{module}.lora_B.weight")),
                scale: adapter_scale(lora),
                site: (layer * of_layer + place) as u64,
            });
        let bias = bias.then(|| self.weight(&format!("{module}.bias")));
        Linear { weight: self.weight(&format!("{module}.weight")), bias, adapter }
    }

    fn norm(&self, module: &str) -> Norm {
        let NormSpec { eps, is_offset } = self.spec.norm;
        Norm { weight: self.weight(&format!("{module}.weight")), eps, is_offset }
    }

    fn layer(&self, layer: usize, spec: &LayerSpec) -> Layer {
        let linears = spec.linears(self.spec.hidden_size);
        let [q, k, v, o, gate, up, down] =
            std::array::from_fn(|place| self.linear(layer, (place, linears.len()), linears[place]));
        let norm = |name: &str| self.norm(&format!("model.layers.{layer}.{name}"));
        let around = |NormNames { before, after }: NormNames| [before, after].map(|name| name.map(norm));
        let mut query_key = spec.attention.norms().into_iter().map(|(name, _)| norm(name));
        let (query_norm, key_norm) = (query_key.next(), query_key.next());
        let [before, after] = around(spec.attention_norms);
        let attention = Attention { spec: spec.attention, before, q, k, v, query_norm, key_norm, o, after };
        let [before, after] = around(spec.mlp_norms);
        let mlp = Mlp { spec: spec.mlp, before, gate, up, down, after };
        Layer { attention, mlp, residual_multiplier: spec.residual_multiplier }
    }

    fn assemble(&self, source: &Source, maps: Option<WeightFiles>) -> Decoder {
        let spec = self.spec.clone();
        let layers = spec.layers.iter().enumerate().map(|(index, layer)| self.layer(index, layer)).collect();
        let head = if spec.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let max_positions = source.max_positions.min(spec.max_position_embeddings);
        Decoder {
            rope: Rope::new(&spec.rope_frequencies, max_positions, source.kind, source.device),
            embedding: self.weight("model.embed_tokens.weight"),
            embedding_multiplier: Tensor::from(spec.embedding_multiplier).to_kind(source.kind).double_value(&[]),
            layers,
            norm: self.norm("model.norm"),
            head: self.weight(head),
            kind: source.kind,
            device: source.device,
            lora_dropout: self.lora.map_or(0.0, |lora| lora.dropout),
            _maps: maps,
            spec,
        }
    }
}
