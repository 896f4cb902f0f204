//! The stage that needs no accelerator: fetch, check, tokenise. Its product lies on disk under `prepared/`, verified by
//! digest, and is made once; bad input ends here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crds::report::{DataReport, SourceDigest};
use crds::run::{RunConfig, ValidationRows};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{digest_file, digest_of, sync_folder};
use crate::data::example::{Example, Examples};
use crate::data::generation::GenerationRow;
use crate::data::{self, Inputs, Tokenized};
use crate::model::Config;
use crate::signal::Stop;
use crate::source::{self, Fetched, HubSettings, fetch_model, fetch_rows};
use crate::weights;

const MANIFEST: &str = "manifest.json";
/// Files and columns of the product; a product of another layout is made again.
const LAYOUT: i32 = 2;

/// Preparation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A source cannot be used.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The rows are not acceptable.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// The model's configuration is not acceptable.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// The product cannot be read back.
    #[error(transparent)]
    Product(#[from] weights::Error),
    /// A file cannot be read.
    #[error("{}: cannot be read ({source})", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The product cannot be written.
    #[error("{}: cannot be written ({source}); free space or choose another --dir", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::Source(error) => error.exit(),
            Self::Data(error) => error.exit(),
            Self::Model(error) => error.exit(),
            Self::Product(error) => error.exit(),
            Self::Read { .. } => ExitCode::InputNotFound,
            Self::Write { .. } => ExitCode::CannotWrite,
        }
    }
}

/// What training starts from.
#[derive(Debug)]
pub struct Prepared {
    /// Folder of the base model.
    pub model: PathBuf,
    /// Commit of the base model's repository.
    pub model_revision: Option<String>,
    /// SHA-256 over the base model's weight files.
    pub model_digest: String,
    /// Training examples.
    pub train: Examples,
    /// Validation examples; empty if there are none.
    pub validation: Examples,
    /// General text; empty if there is none.
    pub forgetting: Examples,
    /// Validation rows to be answered.
    pub generation: Vec<GenerationRow>,
    /// The first validation examples after the few-shot prompt's examples, at the same indices; without tokens where one
    /// does not fit.
    pub few_shot: Examples,
    /// What the data check found.
    pub report: DataReport,
    /// A training example with its trained tokens marked.
    pub sample: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    /// Digest of everything that the product was made from.
    key: String,
    /// What templates take for today: it stays when the product is made again.
    date: jiff::civil::DateTime,
    /// Digest of each file of the product.
    files: Vec<(String, String)>,
}

struct Sources {
    model: Fetched,
    train: Fetched,
    validation: Option<Fetched>,
    forgetting: Option<Fetched>,
    model_digest: String,
    digests: Vec<SourceDigest>,
}

/// Makes the product of `config` under `run`, or opens it where it is there and verifies.
pub fn prepare(config: &RunConfig, run: &Path, settings: &HubSettings, stop: &Stop) -> Result<Prepared, Error> {
    let sources = fetch(config, settings)?;
    let folder = run.join("prepared");
    let manifest = read_manifest(&folder);
    let key = key(config, &sources)?;
    if !manifest.as_ref().is_some_and(|manifest| manifest.key == key && verifies(&folder, manifest)) {
        let date = manifest.map_or_else(|| jiff::Zoned::now().datetime(), |manifest| manifest.date);
        make(config, &sources, &folder, key, date, stop)?;
    }
    open(&folder, sources)
}

fn fetch(config: &RunConfig, settings: &HubSettings) -> Result<Sources, Error> {
    let model = fetch_model(&config.model.uri, config.model.revision.as_deref(), settings)?;
    let train = fetch_rows("spec.dataset.train.uri", &config.dataset.train.uri, settings)?;
    let validation = match &config.dataset.validation {
        ValidationRows::Source(source) => Some(fetch_rows("spec.dataset.validation.uri", &source.uri, settings)?),
        ValidationRows::None | ValidationRows::SplitPercent(_) => None,
    };
    let forgetting = config
        .validation
        .forgetting
        .as_ref()
        .map(|forgetting| fetch_rows("spec.validation.forgetting.dataset.uri", &forgetting.dataset.uri, settings))
        .transpose()?;
    let digest = |path: &Path| digest_file(path).map_err(|source| Error::Read { path: path.into(), source });
    let mut digests = Vec::new();
    for file in [Some(&train), validation.as_ref(), forgetting.as_ref()].into_iter().flatten() {
        let bytes = fs::metadata(&file.path).map_or(0, |metadata| metadata.len() as i64);
        let uri = file.path.display().to_string();
        digests.push(SourceDigest { uri, revision: file.revision.clone(), digest: digest(&file.path)?, bytes });
    }
    let mut weights = String::new();
    for path in weights::WeightFiles::open(&model.path)?.paths() {
        weights.push_str(&digest(path)?);
    }
    Ok(Sources { model, train, validation, forgetting, model_digest: digest_of(weights.as_bytes()), digests })
}

fn key(config: &RunConfig, sources: &Sources) -> Result<String, Error> {
    let mut model_files = Vec::new();
    for name in
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json"]
    {
        let path = sources.model.path.join(name);
        if path.exists() {
            model_files.push((name, digest_file(&path).map_err(|source| Error::Read { path, source })?));
        }
    }
    let made_from = json!({
        "layout": LAYOUT,
        "trainer": env!("CARGO_PKG_VERSION"),
        "dataset": config.dataset,
        "forgetting": config.validation.forgetting,
        "fewShotExamples": config.validation.few_shot_examples,
        "seed": config.hyperparameters.seed,
        "maxSequenceLength": config.hyperparameters.max_sequence_length,
        "sources": sources.digests,
        "model": model_files,
    });
    Ok(digest_of(made_from.to_string().as_bytes()))
}

fn read_manifest(folder: &Path) -> Option<Manifest> {
    serde_json::from_slice(&fs::read(folder.join(MANIFEST)).ok()?).ok()
}

fn verifies(folder: &Path, manifest: &Manifest) -> bool {
    manifest.files.iter().all(|(name, digest)| digest_file(&folder.join(name)).is_ok_and(|found| found == *digest))
}

fn make(
    config: &RunConfig,
    sources: &Sources,
    folder: &Path,
    key: String,
    date: jiff::civil::DateTime,
    stop: &Stop,
) -> Result<(), Error> {
    let tokenized = data::tokenize(&Inputs {
        config,
        train: &sources.train.path,
        validation: sources.validation.as_ref().map(|file| file.path.as_path()),
        forgetting: sources.forgetting.as_ref().map(|file| file.path.as_path()),
        model: &sources.model.path,
        max_context: Config::read(&sources.model.path)?.max_position_embeddings,
        date,
        stop,
    })?;
    let run = folder.parent().unwrap_or(Path::new("."));
    let failed = |source| Error::Write { path: folder.into(), source };
    fs::create_dir_all(run).map_err(failed)?;
    let temporary = tempfile::Builder::new().prefix(".prepared-").tempdir_in(run).map_err(failed)?;
    write_product(temporary.path(), tokenized, sources, key, date).map_err(failed)?;
    let old = run.join(".prepared-old");
    if folder.exists() {
        let _ = fs::remove_dir_all(&old);
        fs::rename(folder, &old).map_err(failed)?;
    }
    fs::rename(temporary.keep(), folder).and_then(|()| sync_folder(run)).map_err(failed)?;
    // What is left of it is never opened again.
    let _ = fs::remove_dir_all(&old);
    Ok(())
}

fn write_product(
    folder: &Path,
    tokenized: Tokenized,
    sources: &Sources,
    key: String,
    date: jiff::civil::DateTime,
) -> io::Result<()> {
    let Tokenized { train, validation, forgetting, generation, few_shot, mut report, sample } = tokenized;
    report.sources.clone_from(&sources.digests);
    let examples = |examples: &[Example]| {
        let mut bytes = Vec::new();
        Examples::write(&mut bytes, examples).map(|()| bytes)
    };
    let contents = [
        ("train.safetensors", examples(&train)?),
        ("validation.safetensors", examples(&validation)?),
        ("forgetting.safetensors", examples(&forgetting)?),
        ("few_shot.safetensors", examples(&few_shot)?),
        ("generation.json", serde_json::to_vec(&generation)?),
        ("data_report.json", serde_json::to_vec_pretty(&report)?),
        ("sample.txt", sample.into_bytes()),
    ];
    let mut files = Vec::new();
    for (name, bytes) in contents {
        let mut file = fs::File::create(folder.join(name))?;
        io::Write::write_all(&mut file, &bytes)?;
        file.sync_all()?;
        files.push((name.to_owned(), digest_of(&bytes)));
    }
    fs::write(folder.join(MANIFEST), serde_json::to_vec_pretty(&Manifest { key, date, files })?)?;
    sync_folder(folder)
}

fn open(folder: &Path, sources: Sources) -> Result<Prepared, Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|source| Error::Read { path, source })
    };
    let damaged = |source: serde_json::Error| Error::Read { path: folder.into(), source: source.into() };
    let mut report: DataReport = serde_json::from_slice(&read("data_report.json")?).map_err(damaged)?;
    let train = Examples::open(&folder.join("train.safetensors"))?;
    train.digest().clone_into(&mut report.dataset_digest);
    Ok(Prepared {
        model: sources.model.path,
        model_revision: sources.model.revision,
        model_digest: sources.model_digest,
        train,
        validation: Examples::open(&folder.join("validation.safetensors"))?,
        forgetting: Examples::open(&folder.join("forgetting.safetensors"))?,
        few_shot: Examples::open(&folder.join("few_shot.safetensors"))?,
        generation: serde_json::from_slice(&read("generation.json")?).map_err(damaged)?,
        report,
        sample: String::from_utf8_lossy(&read("sample.txt")?).into_owned(),
    })
}
