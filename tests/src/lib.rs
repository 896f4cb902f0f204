//! What the integration tests share: where files are, golden values, small inputs.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};

use crds::run::{Lora, Method};
use serde::Deserialize;
use tch::{Kind, Tensor};
use trainer::compute::optim::Parameters;
use trainer::data::example::{Example, Examples};

/// The checkout that `cargo test` runs in: it starts a test in its package's folder. A path fixed at compile time would be that
/// of another checkout where several share a target folder.
pub fn repository() -> PathBuf {
    Path::new("..").canonicalize().expect("the tests crate lies in the checkout")
}

/// Says that the running test proves nothing on this machine, past the runner that keeps what tests print: `make test` counts
/// these lines.
pub fn skipped(needs: &str) {
    // In one piece: others write to the same pipe.
    let line = format!("skipped: needs {needs}: {}\n", std::thread::current().name().unwrap_or_default());
    std::io::stderr().write_all(line.as_bytes()).expect("standard error is open");
}

/// A file or folder of golden values.
pub fn golden(name: &str) -> PathBuf {
    repository().join("tests/golden").join(name)
}

/// The base model's folder; `make base-model` puts it there.
pub fn base_model() -> PathBuf {
    let folder = repository().join("models/SmolLM2-135M-Instruct");
    assert!(folder.join("model.safetensors").exists(), "{} is missing: run `make base-model`", folder.display());
    folder
}

/// Whether the base model is here. Beside a GPU it need not be: it is too large to travel with the tests, which say what is
/// passed over then.
pub fn has_base_model() -> bool {
    let has = !is_on_gpu() || repository().join("models/SmolLM2-135M-Instruct").exists();
    if !has {
        skipped("the base model");
    }
    has
}

/// Reads a golden JSON file.
pub fn read_golden<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    let path = golden(name);
    let text =
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}; run `make golden`", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// One case of `steps.json` or `families.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepsCase {
    /// Its name.
    pub name: String,
    /// `base`, or a folder beside the file.
    pub model: String,
    /// What is trained.
    pub method: GoldenMethod,
    /// Largest gradient norm.
    pub max_grad_norm: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// File with the gradients of the first step.
    pub gradients: Option<String>,
    /// The examples.
    pub examples: Vec<GoldenExample>,
    /// The steps.
    pub steps: Vec<GoldenStep>,
    /// How far transformers in bf16 is from itself in fp32.
    pub bf16: Option<Distance>,
}

/// How far one computation of a model is from another, relative to the size of each.
#[derive(Debug, Deserialize)]
pub struct Distance {
    /// Of the logits of one example.
    pub logits: f64,
    /// Of the loss of the first step.
    pub loss: f64,
    /// Of the gradient of the first step as a whole.
    pub gradient: f64,
    /// Of that tensor's gradient which is farthest.
    pub farthest: f64,
}

/// All cases: of the base and of tiny Llamas, and of each family.
pub fn steps_cases() -> Vec<StepsCase> {
    let mut cases: Vec<StepsCase> = read_golden("steps.json");
    cases.extend(read_golden::<Vec<StepsCase>>("families.json"));
    cases
}

impl StepsCase {
    /// The model's folder.
    pub fn folder(&self) -> PathBuf {
        if self.model == "base" { base_model() } else { golden(&self.model) }
    }
}

/// The method of a golden case.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GoldenMethod {
    #[serde(rename = "type")]
    method_type: String,
    rank: Option<i64>,
    alpha: Option<f64>,
    #[serde(default)]
    rank_stabilized: bool,
    #[serde(default)]
    target_modules: Vec<String>,
}

impl GoldenMethod {
    /// As the trainer takes it.
    pub fn method(&self) -> Method {
        match self.method_type.as_str() {
            "LoRA" => Method::LoRA {
                lora: Lora {
                    rank: self.rank.expect("LoRA has a rank"),
                    alpha: self.alpha.expect("LoRA has an alpha"),
                    dropout: 0.0,
                    target_modules: self.target_modules.clone(),
                    rank_stabilized: self.rank_stabilized,
                },
            },
            _ => Method::Full { optimizer_in_backward: false },
        }
    }
}

/// Token ids and which of them are trained.
#[derive(Clone, Debug, Deserialize)]
pub struct GoldenExample {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// 1 where trained.
    pub trained: Vec<u8>,
}

/// One optimizer step of a peer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GoldenStep {
    /// Indices into the examples.
    pub examples: Vec<usize>,
    /// Learning rate.
    pub learning_rate: f64,
    /// Mean loss per trained token of the step.
    pub loss: f64,
    /// Norm before clipping.
    pub gradient_norm: f64,
}

/// Writes golden examples as the trainer stores them and maps the file.
pub fn examples(folder: &Path, golden: &[GoldenExample]) -> Examples {
    let path = folder.join("examples.safetensors");
    let examples: Vec<Example> = golden
        .iter()
        .map(|example| Example {
            tokens: example.tokens.clone(),
            trained: example.trained.iter().map(|&trained| trained == 1).collect(),
        })
        .collect();
    Examples::write(&mut std::fs::File::create(&path).expect("a writable folder"), &examples).expect("written");
    Examples::open(&path).expect("just written")
}

/// Gives the adapters the starting values of `tests/golden/make_golden.py`: A[i, j] = sin(i * columns + j + layer) /
/// sqrt(columns), B = 0.
pub fn start_adapters(parameters: &mut Parameters) {
    let flat = parameters.flat_master().copy();
    for slot in parameters.slots().iter().filter(|slot| slot.name.contains("lora_A")) {
        let layer = slot.name.split('.').nth(2).and_then(|layer| layer.parse::<i64>().ok()).expect("model.layers.N");
        let index = Tensor::arange_start(layer, layer + slot.len(), (Kind::Double, tch::Device::Cpu));
        let values = (index.sin() / (slot.shape[1] as f64).sqrt()).to_kind(Kind::Float);
        slot.view(&flat).copy_(&values.view(slot.shape.as_slice()));
    }
    parameters.set_master(&flat);
}

/// Largest absolute difference of two tensors.
pub fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

pub mod apiserver;
pub mod cluster;
mod device;
mod hub;
mod job;
pub mod kube_apiserver;
pub mod operator;
mod pods;

pub use device::{device, is_on_gpu, on_host};
pub use hub::{Fault, Hub, Received, Server, Storage};
pub use job::{Job, Outcome, trainer_binary, untimed_validation};
pub use pods::{Ended, Pods, hang, signal, terminate, wait_for};
