//! `generate`: a model, or the result of a run, answers one prompt.

use std::path::{Path, PathBuf};

use crds::exit::ExitCode;
use crds::run::{Method, Optimizer};

use super::{Outcome, tell};
use crate::compute::linear::Adapters;
use crate::data::tokenizer::Tokenizer;
use crate::ground::stop::Stop;
use crate::judge::generate::{Limits, generate};
use crate::model::{Source, Spec, build, check_finite};
use crate::run::export::AdapterInfo;
use crate::source::{Access, Claims, HubSettings};

/// A model that answers: its folder, and the adapter on it.
struct Answering {
    folder: PathBuf,
    adapter: Option<(PathBuf, AdapterInfo)>,
}

/// Finds what answers: a model folder, an adapter folder, or the folder of a run with either in `output`.
fn answering(folder: &Path, base: Option<&Path>, hub: &HubSettings) -> Result<Answering, (ExitCode, String)> {
    let output = folder.join("output");
    let folder = if output.is_dir() && !folder.join("config.json").exists() { output } else { folder.to_path_buf() };
    let Some(adapter) = crate::run::export::read_adapter(&folder).map_err(|message| (ExitCode::BadData, message))?
    else {
        return Ok(Answering { folder, adapter: None });
    };
    let model = match base {
        Some(base) => base.to_path_buf(),
        None if Path::new(&adapter.base_model).is_dir() => PathBuf::from(&adapter.base_model),
        None => {
            let uri = format!("hf://{}", adapter.base_model);
            let (claims, stop) = (Claims::new(), Stop::default());
            let access = Access { hub, claims: &claims, stop: &stop, noted: false };
            let fetched = crate::source::fetch_model(&uri, adapter.revision.as_deref(), access).map_err(|error| {
                let message = format!(
                    "{}: the base model {} is no folder here and cannot be fetched ({error}); give its folder with --base",
                    folder.display(),
                    adapter.base_model
                );
                (error.exit(), message)
            })?;
            fetched.path
        }
    };
    Ok(Answering { folder: model, adapter: Some((folder, adapter)) })
}

/// Answers one prompt through the model's chat template, if it has one.
pub(super) fn answer(
    folder: &Path,
    prompt: &str,
    base: Option<&Path>,
    max_new_tokens: i64,
    chosen: &crate::compute::device::Chosen,
    hub: &HubSettings,
) -> Outcome {
    let failed = |error: &dyn std::fmt::Display, exit: ExitCode| (exit, error.to_string());
    let Answering { folder, adapter } = answering(folder, base, hub)?;
    let method = adapter.as_ref().map(|(_, adapter)| Method::LoRA { lora: adapter.lora.clone() });
    let spec = Spec::read(&folder).map_err(|error| failed(&error, error.exit()))?;
    let tokenizer = Tokenizer::open(&folder).map_err(|error| failed(&error, error.exit()))?;
    let tokens = crate::data::prompt_tokens(&tokenizer, prompt).map_err(|error| failed(&error, error.exit()))?;
    let length = tokens.len() as i64;
    if length == 0 || length >= spec.longest() {
        let message = format!(
            "the prompt has {length} tokens; expected 1 to {}, the model's context less one",
            spec.longest() - 1
        );
        return Err((ExitCode::BadConfiguration, message));
    }
    let source = Source {
        folder: &folder,
        method: method.as_ref(),
        optimizer: Optimizer::default(),
        kind: chosen.kind,
        device: chosen.device,
        seed: 0,
        max_positions: length + max_new_tokens,
    };
    check_finite(&folder).map_err(|error| failed(&error, error.exit()))?;
    let mut built = build(&source).map_err(|error| failed(&error, error.exit()))?;
    if let Some((folder, _)) = &adapter {
        crate::run::export::load_adapter(folder, &mut built.parameters)
            .map_err(|message| (ExitCode::BadData, message))?;
    }
    let limits =
        Limits { max_new_tokens, end_tokens: tokenizer.end_tokens().to_vec(), stop_text: None, cache_tokens: 0 };
    let answers = generate(&built.model, &[&tokens], Adapters::On, &limits, &Stop::default(), &mut |_| ());
    let answers = answers.expect("nothing asked for a stop");
    tell(tokenizer.decode(&answers[0].tokens).map_err(|error| failed(&error, error.exit()))?.trim());
    Ok(ExitCode::Done)
}
