//! What the ecosystem loads: a PEFT adapter, or a Hugging Face model; with the tokenizer, unchanged, and a model card.
//! Everything is written to a sibling folder that is renamed into place.

mod card;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crds::run::Lora;
use safetensors::Dtype;
use serde_json::json;

use crate::store::files::{digest_file, sync_folder};
use crate::store::weights::{StreamedTensor, TensorView, stream_safetensors};

pub use card::model_card;

/// Bytes of one weights file; larger models are split.
const MAX_SHARD_BYTES: usize = 5 << 30;
/// Files that go along with the weights, as they are.
const TOKENIZER_FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
];
const CONFIG_FILES: [&str; 2] = ["config.json", "generation_config.json"];

/// The output could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot be written ({source}); free space or choose another --dir", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        crds::exit::ExitCode::CannotWrite
    }
}

/// What is written.
pub enum Weights<'a> {
    /// A PEFT adapter.
    Adapter {
        /// How it was trained.
        lora: &'a Lora,
        /// Linears that have one, by last path segment.
        targets: &'a [&'a str],
        /// Tensors by `model.layers.N.….lora_A.weight` and `.lora_B.weight`, fp32.
        tensors: &'a [TensorView<'a>],
        /// URI of the base model.
        base_model: &'a str,
        /// Commit of the base model.
        revision: Option<&'a str>,
    },
    /// A whole model.
    Model {
        /// Tensors by Hugging Face name.
        tensors: &'a [StreamedTensor<'a>],
    },
}

/// Writes `output` and returns the digest of the (first) weights file. `card` is the model card, `plot` the loss curve.
pub fn write_output(output: &Path, base: &Path, weights: &Weights, card: &str, plot: &Path) -> Result<String, Error> {
    let failed = |source| Error { path: output.into(), source };
    let run = output.parent().unwrap_or(Path::new("."));
    // A temporary folder is private by default; whoever serves the output may be another user.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    let temporary =
        tempfile::Builder::new().prefix(".output-").permissions(readable).tempdir_in(run).map_err(failed)?;
    let digest = write_files(temporary.path(), base, weights, card, plot).map_err(failed)?;
    let old = run.join(".output-old");
    if output.exists() {
        let _ = fs::remove_dir_all(&old);
        fs::rename(output, &old).map_err(failed)?;
    }
    fs::rename(temporary.keep(), output).and_then(|()| sync_folder(run)).map_err(failed)?;
    // What is left of it is nobody's output any more.
    let _ = fs::remove_dir_all(&old);
    Ok(digest)
}

/// The weights file of an output folder, the first where there are several; its digest names the artifact.
pub fn weights_file(folder: &Path) -> Option<PathBuf> {
    let mut names: Vec<PathBuf> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    names.into_iter().min()
}

fn write_files(folder: &Path, base: &Path, weights: &Weights, card: &str, plot: &Path) -> io::Result<String> {
    fs::write(folder.join("README.md"), card)?;
    fs::copy(plot, folder.join("loss.svg"))?;
    copy_existing(base, folder, &TOKENIZER_FILES)?;
    let first = match weights {
        Weights::Adapter { lora, targets, tensors, base_model, revision } => {
            let config = adapter_config(lora, targets, base_model, *revision);
            fs::write(folder.join("adapter_config.json"), config)?;
            let renamed: Vec<StreamedTensor> = tensors
                .iter()
                .map(|tensor| StreamedTensor { name: format!("base_model.model.{}", tensor.name), ..tensor.into() })
                .collect();
            write_weights(&folder.join("adapter_model.safetensors"), &renamed)?
        }
        Weights::Model { tensors } => {
            copy_existing(base, folder, &CONFIG_FILES)?;
            write_shards(folder, tensors, MAX_SHARD_BYTES)?
        }
    };
    for entry in fs::read_dir(folder)? {
        File::open(entry?.path())?.sync_all()?;
    }
    sync_folder(folder)?;
    digest_file(&first)
}

fn copy_existing(from: &Path, to: &Path, names: &[&str]) -> io::Result<()> {
    for name in names {
        if from.join(name).exists() {
            let to = to.join(name);
            to.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&to, fs::read(from.join(name))?)?;
            File::open(to)?.sync_all()?;
        }
    }
    Ok(())
}

fn write_weights(path: &Path, tensors: &[StreamedTensor]) -> io::Result<PathBuf> {
    let mut sink = BufWriter::with_capacity(1 << 20, File::create(path)?);
    stream_safetensors(&mut sink, &[("format", "pt")], tensors)?;
    sink.flush()?;
    Ok(path.into())
}

/// Ranges of tensors for files of at most `most` bytes each, or of one tensor.
fn shards(tensors: &[StreamedTensor], most: usize) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut start, mut used) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if used + tensor.num_bytes() > most && used > 0 {
            shards.push(start..index);
            (start, used) = (index, 0);
        }
        used += tensor.num_bytes();
    }
    shards.push(start..tensors.len());
    shards
}

fn write_shards(folder: &Path, tensors: &[StreamedTensor], most: usize) -> io::Result<PathBuf> {
    let shards = shards(tensors, most);
    if shards.len() == 1 {
        return write_weights(&folder.join("model.safetensors"), tensors);
    }
    let total: usize = tensors.iter().map(StreamedTensor::num_bytes).sum();
    let mut weight_map = serde_json::Map::new();
    let mut first = None;
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        let shard = &tensors[shard.clone()];
        for tensor in shard {
            weight_map.insert(tensor.name.clone(), name.clone().into());
        }
        let path = write_weights(&folder.join(&name), shard)?;
        first.get_or_insert(path);
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    fs::write(folder.join("model.safetensors.index.json"), serde_json::to_vec_pretty(&index)?)?;
    Ok(first.expect("there is at least one shard"))
}

/// `adapter_config.json` as PEFT writes it: keys sorted, two spaces.
fn adapter_config(lora: &Lora, targets: &[&str], base_model: &str, revision: Option<&str>) -> String {
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let name = base_model.strip_prefix("hf://").or_else(|| base_model.strip_prefix("file://")).unwrap_or(base_model);
    let mut config = json!({
        "alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": name, "bias": "none",
        "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "layer_replication": null,
        "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": alpha,
        "lora_dropout": lora.dropout, "megatron_config": null, "megatron_core": "megatron.core",
        "modules_to_save": null, "peft_type": "LORA", "r": lora.rank, "rank_pattern": {}, "revision": revision,
        "target_modules": targets, "task_type": "CAUSAL_LM", "use_dora": false, "use_rslora": lora.rank_stabilized,
    });
    config.sort_all_objects();
    serde_json::to_string_pretty(&config).expect("JSON") + "\n"
}

/// An adapter folder's configuration, as far as loading needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInfo {
    /// Rank, alpha, targets.
    pub lora: Lora,
    /// As the configuration names it.
    pub base_model: String,
    /// Commit of the base model.
    pub revision: Option<String>,
}

/// Reads `adapter_config.json`; `None` if the folder holds no adapter.
pub fn read_adapter(folder: &Path) -> Result<Option<AdapterInfo>, String> {
    let path = folder.join("adapter_config.json");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
    let refuse =
        |what: &str| format!("{}: {what}; expected a LoRA adapter_config.json as PEFT writes it", path.display());
    let config: serde_json::Value = serde_json::from_str(&text).map_err(|error| refuse(&error.to_string()))?;
    let targets = config["target_modules"].as_array().ok_or_else(|| refuse("target_modules is not a list"))?;
    let is_set = |name: &str| match &config[name] {
        serde_json::Value::Null | serde_json::Value::Bool(false) => false,
        serde_json::Value::Object(entries) => !entries.is_empty(),
        serde_json::Value::Array(items) => !items.is_empty(),
        serde_json::Value::String(text) => !text.is_empty() && text != "none",
        _ => true,
    };
    // Each of these changes what the adapter computes.
    let unsupported = ["use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "bias"];
    if let Some(name) = unsupported.into_iter().find(|name| is_set(name)) {
        return Err(refuse(&format!("not supported yet: {name} is {}", config[name])));
    }
    if config["peft_type"].as_str().is_some_and(|kind| kind != "LORA") {
        return Err(refuse(&format!("not supported yet: peft_type {}", config["peft_type"])));
    }
    Ok(Some(AdapterInfo {
        lora: Lora {
            rank: config["r"].as_i64().filter(|rank| *rank > 0).ok_or_else(|| refuse("r is no positive number"))?,
            alpha: config["lora_alpha"].as_f64().ok_or_else(|| refuse("lora_alpha is missing"))?,
            dropout: 0.0,
            target_modules: targets.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
            rank_stabilized: config["use_rslora"].as_bool().unwrap_or(false),
        },
        base_model: config["base_model_name_or_path"].as_str().unwrap_or_default().to_owned(),
        revision: config["revision"].as_str().map(str::to_owned),
    }))
}

/// Puts an adapter folder's weights in place.
pub fn load_adapter(folder: &Path, parameters: &mut crate::compute::optim::Parameters) -> Result<(), String> {
    let path = folder.join("adapter_model.safetensors");
    let file = crate::store::weights::MappedFile::open(&path).map_err(|error| error.to_string())?;
    let flat = parameters.flat_master().zeros_like();
    for slot in parameters.slots() {
        let tensor = file
            .tensor(&format!("base_model.model.{}", slot.name))
            .filter(|tensor| {
                tensor.dtype == Dtype::F32 && tensor.shape.iter().map(|&s| s as i64).eq(slot.shape.iter().copied())
            })
            .ok_or_else(|| format!("{}: no fp32 tensor {} of shape {:?}", path.display(), slot.name, slot.shape))?;
        slot.view(&flat).copy_(&tch::Tensor::from_data_size(tensor.data, &slot.shape, tch::Kind::Float));
    }
    parameters.set_master(&flat);
    Ok(())
}

/// Safetensors' word for a tch dtype.
pub fn dtype(kind: tch::Kind) -> Dtype {
    match kind {
        tch::Kind::BFloat16 => Dtype::BF16,
        tch::Kind::Half => Dtype::F16,
        tch::Kind::Double => Dtype::F64,
        tch::Kind::Uint8 => Dtype::U8,
        _ => Dtype::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_too_large_for_one_file_is_split_and_indexed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let data: Vec<u8> = (0..40).collect();
        let view = |name: &str, range: Range<usize>| TensorView {
            name: name.to_owned(),
            dtype: Dtype::U8,
            shape: vec![range.len()],
            data: &data[range],
        };
        let views = [view("a", 0..10), view("b", 10..20), view("c", 20..38), view("d", 38..40)];
        let tensors: Vec<StreamedTensor> = views.iter().map(Into::into).collect();
        assert_eq!(shards(&tensors, 20), [0..2, 2..4]);
        assert_eq!(shards(&tensors, 15), [0..1, 1..2, 2..3, 3..4], "one that is larger has a file of its own");
        assert_eq!(shards(&tensors, 40), std::slice::from_ref(&(0..4)));
        let first = write_shards(folder.path(), &tensors, 20).expect("written");
        assert_eq!(first, folder.path().join("model-00001-of-00002.safetensors"));
        let index = fs::read_to_string(folder.path().join("model.safetensors.index.json")).expect("there");
        let index: serde_json::Value = serde_json::from_str(&index).expect("JSON");
        assert_eq!(index["metadata"]["total_size"], 40);
        for view in &views {
            let file = index["weight_map"][&view.name].as_str().expect("a file");
            let bytes = fs::read(folder.path().join(file)).expect("there");
            let parsed = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
            assert_eq!(parsed.tensor(&view.name).expect("there").data(), view.data);
        }
    }

    #[test]
    fn the_adapter_has_pefts_layout() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let base = run.path().join("base");
        fs::create_dir(&base).expect("writable");
        fs::write(base.join("tokenizer.json"), "{}").expect("writable");
        fs::write(run.path().join("loss.svg"), "<svg/>").expect("writable");
        let lora = Lora { rank: 2, alpha: 4.0, dropout: 0.0, target_modules: Vec::new(), rank_stabilized: false };
        let data = [0u8; 16];
        let name = "model.layers.0.self_attn.q_proj.lora_A.weight".to_owned();
        let tensors = [TensorView { name, dtype: Dtype::F32, shape: vec![2, 2], data: &data }];
        let weights = Weights::Adapter {
            lora: &lora,
            targets: &["q_proj"],
            tensors: &tensors,
            base_model: "hf://owner/name",
            revision: Some("abc"),
        };
        let output = run.path().join("output");
        for _ in 0..2 {
            let digest = write_output(&output, &base, &weights, "card", &run.path().join("loss.svg")).expect("written");
            assert_eq!(digest, digest_file(&output.join("adapter_model.safetensors")).expect("there"));
        }
        let bytes = fs::read(output.join("adapter_model.safetensors")).expect("there");
        let parsed = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
        assert_eq!(parsed.names(), ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]);
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(output.join("adapter_config.json")).expect("there")).expect("JSON");
        let expected = json!(["owner/name", 2, 4, ["q_proj"], "abc"]);
        let found =
            ["base_model_name_or_path", "r", "lora_alpha", "target_modules", "revision"].map(|key| config[key].clone());
        assert_eq!(json!(found), expected);
        assert!(output.join("tokenizer.json").exists() && output.join("README.md").exists());
    }
}
