//! The stage that needs no accelerator: fetch, check, tokenise. Its product lies on disk under `prepared/`, verified by
//! digest, and is made once; bad input ends here.

mod sources;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;

use crds::report::{DataReport, SourceDigest};
use crds::run::{DataSource, ModelSource, RunConfig, ValidationRows};
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::sources::SourceRecord;
pub use self::sources::Sources;
use crate::data::example::{Example, Examples};
use crate::data::generation::GenerationRow;
use crate::data::{self, Tokenized};
use crate::ground::stop::Stop;
use crate::model::{Spec, weight_names};
use crate::source::{self, Access, Fetched, MODEL_TEXTS, fetch_model, fetch_rows};
use crate::store::files::{HashingWriter, digest_file, digest_of, sync_folder};
use crate::store::weights::{self, MappedFile, WeightFiles};

const MANIFEST: &str = "manifest.json";
/// Files and columns of the product; a product of another layout is made again.
const LAYOUT: i32 = 3;

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
    /// A source is not there as it was prepared.
    #[error("{uri}: not on the volume as it was prepared ({message}); it is fetched by the prepare stage only")]
    NotPrepared {
        /// The source.
        uri: String,
        /// What was found.
        message: String,
    },
    /// A source is another than the one that was prepared.
    #[error("{}: it was changed since it was prepared; keep sources as they are while a job runs, and start a new job", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
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
            Self::Read { .. } | Self::NotPrepared { .. } => ExitCode::InputNotFound,
            Self::Changed { .. } => ExitCode::BadData,
            Self::Write { .. } => ExitCode::CannotWrite,
        }
    }
}

/// The base model of a run.
#[derive(Clone, Debug)]
pub struct Base {
    /// Its folder.
    pub folder: PathBuf,
    /// Commit of its repository.
    pub revision: Option<String>,
    /// SHA-256 over its configuration and weight files.
    pub digest: String,
}

/// The base model's files, before its weights are digested.
struct BaseFiles {
    folder: PathBuf,
    revision: Option<String>,
    /// Digests of [`MODEL_TEXTS`], as far as they are there.
    texts: Vec<(&'static str, String)>,
    weights: WeightFiles,
}

impl BaseFiles {
    fn fetch(config: &RunConfig, from: Sources, access: Access, record: &mut SourceRecord) -> Result<Self, Error> {
        let ModelSource { uri, revision, .. } = &config.model;
        let Fetched { path: folder, revision, .. } =
            record
                .fetch(uri, revision.as_deref(), from, access, |revision, access| fetch_model(uri, revision, access))?;
        let mut texts = Vec::new();
        for name in MODEL_TEXTS {
            let path = folder.join(name);
            if path.exists() {
                texts.push((name, record.digest(&path, from)?));
            }
        }
        let weights = WeightFiles::open(&folder)?;
        Ok(Self { folder, revision, texts, weights })
    }

    /// Reads all weights, unless their digests are known.
    fn digest(&self, from: Sources, record: &mut SourceRecord) -> Result<Base, Error> {
        // The tokens' digest speaks for the tokenizer; the configuration decides what the weights compute.
        let mut parts: Vec<String> =
            self.texts.iter().filter(|(name, _)| *name == "config.json").map(|(_, digest)| digest.clone()).collect();
        for file in self.weights.files() {
            parts.push(record.digest_as_read(file.path(), from, || self.read_weights(file))?);
        }
        let digest = digest_of(parts.concat().as_bytes());
        Ok(Base { folder: self.folder.clone(), revision: self.revision.clone(), digest })
    }

    /// The digest of a file whose weights are finite: what is not finite has none that could be known later.
    fn read_weights(&self, file: &MappedFile) -> Result<String, Error> {
        let names = weight_names(&self.folder, &self.weights)?;
        let mut hash = HashingWriter::new(io::sink());
        let read = file.read_through(&|name| names.contains(name), &mut |piece| {
            hash.write_all(piece).expect("a sink takes everything");
        });
        match read {
            Ok(()) => Ok(hash.digest()),
            Err(weights::Error::Read { path, source }) => Err(Error::Read { path, source }),
            Err(error) => Err(error.into()),
        }
    }
}

/// What training starts from.
#[derive(Debug)]
pub struct Prepared {
    /// The base model.
    pub base: Base,
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
    /// Where the sample is too.
    pub sample_path: PathBuf,
}

impl Prepared {
    /// Tokens of the longest row whose loss is measured.
    pub fn longest_measured(&self) -> usize {
        [&self.validation, &self.few_shot, &self.forgetting].map(Examples::longest).into_iter().fold(0, usize::max)
    }
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

/// What a product is made from.
struct Inputs {
    base: BaseFiles,
    train: Fetched,
    validation: Option<Fetched>,
    forgetting: Option<Fetched>,
    digests: Vec<SourceDigest>,
}

/// Makes the product of `config` under `run`, or opens it where it is there and verifies.
pub fn prepare(config: &RunConfig, run: &Path, from: Sources, access: Access, stop: &Stop) -> Result<Prepared, Error> {
    let mut record = SourceRecord::read(run);
    let inputs = fetch(config, from, access, &mut record)?;
    record.write(run)?;
    let folder = run.join("prepared");
    // Gigabytes of weights are digested while rows are tokenised.
    let (made, base) = thread::scope(|scope| {
        let base = scope.spawn(|| inputs.base.digest(from, &mut record));
        (make_if_needed(config, &inputs, &folder, stop), base.join())
    });
    made?;
    let base = base.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    record.write(run)?;
    open(&folder, base)
}

fn make_if_needed(config: &RunConfig, inputs: &Inputs, folder: &Path, stop: &Stop) -> Result<(), Error> {
    let manifest = read_manifest(folder);
    let key = key(config, inputs);
    if manifest.as_ref().is_some_and(|manifest| manifest.key == key && verifies(folder, manifest)) {
        return Ok(());
    }
    let date = manifest.map_or_else(|| jiff::Zoned::now().datetime(), |manifest| manifest.date);
    make(config, inputs, folder, key, date, stop)
}

/// The base model as it was noted.
pub fn noted_base(config: &RunConfig, run: &Path, access: Access) -> Result<Base, Error> {
    let mut record = SourceRecord::read(run);
    BaseFiles::fetch(config, Sources::AsNoted, access, &mut record)?.digest(Sources::AsNoted, &mut record)
}

fn fetch(config: &RunConfig, from: Sources, access: Access, record: &mut SourceRecord) -> Result<Inputs, Error> {
    let base = BaseFiles::fetch(config, from, access, record)?;
    let mut rows = |field, source: &DataSource| {
        record
            .fetch(&source.uri, None, from, access, |revision, access| fetch_rows(field, &source.uri, revision, access))
    };
    let train = rows("spec.dataset.train.uri", &config.dataset.train)?;
    let validation = match &config.dataset.validation {
        ValidationRows::Source(source) => Some(rows("spec.dataset.validation.uri", source)?),
        ValidationRows::None | ValidationRows::SplitPercent(_) => None,
    };
    let forgetting = config.validation.forgetting.as_ref();
    let forgetting =
        forgetting.map(|forgetting| rows("spec.validation.forgetting.dataset.uri", &forgetting.dataset)).transpose()?;
    let mut digests = Vec::new();
    let source_of = |source: &DataSource| source.uri.split('?').next().unwrap_or_default().to_owned();
    let validation_source = match &config.dataset.validation {
        ValidationRows::Source(source) => Some(source),
        ValidationRows::None | ValidationRows::SplitPercent(_) => None,
    };
    let forgetting_source = config.validation.forgetting.as_ref().map(|forgetting| &forgetting.dataset);
    for (source, file) in [
        (Some(&config.dataset.train), Some(&train)),
        (validation_source, validation.as_ref()),
        (forgetting_source, forgetting.as_ref()),
    ] {
        let (Some(source), Some(file)) = (source, file) else { continue };
        let bytes = fs::metadata(&file.path).map_or(0, |metadata| metadata.len() as i64);
        let uri = source_of(source);
        let digest = record.digest(&file.path, from)?;
        digests.push(SourceDigest { uri, revision: file.revision.clone(), digest, bytes });
    }
    Ok(Inputs { base, train, validation, forgetting, digests })
}

fn key(config: &RunConfig, inputs: &Inputs) -> String {
    let made_from = json!({
        "layout": LAYOUT,
        "trainer": env!("CARGO_PKG_VERSION"),
        "dataset": config.dataset,
        "forgetting": config.validation.forgetting,
        "fewShotExamples": config.validation.few_shot_examples,
        "seed": config.hyperparameters.seed,
        "maxSequenceLength": config.hyperparameters.max_sequence_length,
        "sources": inputs.digests,
        "model": inputs.base.texts,
    });
    digest_of(made_from.to_string().as_bytes())
}

fn read_manifest(folder: &Path) -> Option<Manifest> {
    serde_json::from_slice(&fs::read(folder.join(MANIFEST)).ok()?).ok()
}

fn verifies(folder: &Path, manifest: &Manifest) -> bool {
    manifest.files.iter().all(|(name, digest)| digest_file(&folder.join(name)).is_ok_and(|found| found == *digest))
}

fn make(
    config: &RunConfig,
    inputs: &Inputs,
    folder: &Path,
    key: String,
    date: jiff::civil::DateTime,
    stop: &Stop,
) -> Result<(), Error> {
    let tokenized = data::tokenize(&data::Inputs {
        config,
        train: &inputs.train.path,
        validation: inputs.validation.as_ref().map(|file| file.path.as_path()),
        forgetting: inputs.forgetting.as_ref().map(|file| file.path.as_path()),
        model: &inputs.base.folder,
        max_context: Spec::read(&inputs.base.folder)?.longest(),
        date,
        stop,
    })?;
    let run = folder.parent().unwrap_or(Path::new("."));
    let failed = |source| Error::Write { path: folder.into(), source };
    fs::create_dir_all(run).map_err(failed)?;
    let temporary = tempfile::Builder::new().prefix(".prepared-").tempdir_in(run).map_err(failed)?;
    write_product(temporary.path(), tokenized, inputs, key, date).map_err(failed)?;
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
    inputs: &Inputs,
    key: String,
    date: jiff::civil::DateTime,
) -> io::Result<()> {
    let Tokenized { train, validation, forgetting, generation, few_shot, mut report, sample } = tokenized;
    report.sources.clone_from(&inputs.digests);
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
    let write = |name: &str, bytes: &[u8]| {
        let mut file = fs::File::create(folder.join(name))?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    };
    let mut files = Vec::new();
    for (name, bytes) in contents {
        write(name, &bytes)?;
        files.push((name.to_owned(), digest_of(&bytes)));
    }
    write(MANIFEST, &serde_json::to_vec_pretty(&Manifest { key, date, files })?)?;
    sync_folder(folder)
}

fn open(folder: &Path, base: Base) -> Result<Prepared, Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|source| Error::Read { path, source })
    };
    let damaged = |source: serde_json::Error| Error::Read { path: folder.into(), source: source.into() };
    let mut report: DataReport = serde_json::from_slice(&read("data_report.json")?).map_err(damaged)?;
    let train = Examples::open(&folder.join("train.safetensors"))?;
    train.digest().clone_into(&mut report.dataset_digest);
    Ok(Prepared {
        base,
        train,
        validation: Examples::open(&folder.join("validation.safetensors"))?,
        forgetting: Examples::open(&folder.join("forgetting.safetensors"))?,
        few_shot: Examples::open(&folder.join("few_shot.safetensors"))?,
        generation: serde_json::from_slice(&read("generation.json")?).map_err(damaged)?,
        report,
        sample: String::from_utf8_lossy(&read("sample.txt")?).into_owned(),
        sample_path: folder.join("sample.txt"),
    })
}
