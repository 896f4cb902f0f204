//! `manifest.json`: what a checkpoint holds, what it was made from, and in which order. Sealed with its own digest.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store::files::{digest_file, digest_of};

pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const FORMAT: i32 = 1;

/// What a run is made from: a checkpoint is continued only by the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `metadata.uid`.
    pub job_uid: String,
    /// SHA-256 of what the configuration says about training.
    pub config: String,
    /// SHA-256 of the tokenised rows.
    pub dataset: String,
    /// SHA-256 of the base model's files.
    pub base_model: String,
}

impl Identity {
    /// What a checkpoint was made from and this run is not: its name, what the manifest says, what this run has.
    pub(super) fn difference(&self, manifest: &Manifest) -> Option<(&'static str, String, String)> {
        [
            ("job", &manifest.job_uid, &self.job_uid),
            ("configuration", &manifest.config, &self.config),
            ("dataset", &manifest.dataset, &self.dataset),
            ("base model", &manifest.base_model, &self.base_model),
        ]
        .into_iter()
        .find(|(_, found, expected)| found != expected)
        .map(|(what, found, expected)| (what, found.clone(), expected.clone()))
    }
}

/// Runs are bit-equal within one class only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EquivalenceClass {
    /// Version of the trainer.
    pub trainer: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// Model of the device.
    pub device: String,
    /// Dtype of weights and activations.
    pub precision: String,
    /// Threads of CPU operations.
    pub threads: i64,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// `sha256:…`
    pub sha256: String,
}

/// `manifest.json` of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Version of this layout.
    pub format: i32,
    /// Counts commits of the job; the order of checkpoints.
    pub sequence: i64,
    /// Completed steps.
    pub step: i64,
    /// The attempt that wrote it.
    pub attempt: i32,
    /// Number of the claim under which it was written: a later claim overtakes it.
    pub claim: i32,
    /// `metadata.uid` of the job.
    pub job_uid: String,
    /// Digest of the manifest that the attempt continued from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from: Option<String>,
    /// See [`Identity`].
    pub config: String,
    /// See [`Identity`].
    pub dataset: String,
    /// See [`Identity`].
    pub base_model: String,
    /// Where the run is bit-equal.
    pub class: EquivalenceClass,
    /// Whether this was the best so far when it was written.
    pub best: bool,
    /// The files.
    pub files: Vec<FileEntry>,
}

/// A manifest as it is written: with its own digest, so that a flipped bit in it is seen too.
#[derive(Serialize, Deserialize)]
pub(super) struct Sealed {
    pub sha256: String,
    pub manifest: Manifest,
}

impl Sealed {
    pub(super) fn new(manifest: Manifest) -> Self {
        Self { sha256: digest_of(&serde_json::to_vec(&manifest).expect("a manifest is JSON")), manifest }
    }
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Its folder.
    pub folder: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// `sha256:…` of the manifest.
    pub digest: String,
}

impl Stored {
    /// Bytes of all files.
    pub fn bytes(&self) -> i64 {
        self.manifest.files.iter().map(|file| file.bytes as i64).sum()
    }
}

pub(super) fn read_manifest(folder: &Path) -> Result<(Manifest, String), String> {
    let bytes = fs::read(folder.join(MANIFEST)).map_err(|error| format!("no manifest ({error})"))?;
    let sealed: Sealed =
        serde_json::from_slice(&bytes).map_err(|error| format!("the manifest is damaged ({error})"))?;
    let expected = Sealed::new(sealed.manifest);
    if expected.sha256 != sealed.sha256 {
        return Err("the manifest is damaged: its digest is another".into());
    }
    if expected.manifest.format != FORMAT {
        return Err(format!("the manifest has format {}, expected {FORMAT}", expected.manifest.format));
    }
    Ok((expected.manifest, expected.sha256))
}

/// A checkpoint whose every file has the digest that its manifest says.
pub(super) fn verify(folder: &Path) -> Result<Stored, String> {
    let (manifest, digest) = read_manifest(folder)?;
    for file in &manifest.files {
        if Path::new(&file.name).file_name().is_none_or(|name| name != file.name.as_str()) {
            return Err(format!("the manifest names {:?}, which is not a plain file name", file.name));
        }
        let found = digest_file(&folder.join(&file.name)).map_err(|error| format!("{}: {error}", file.name))?;
        if found != file.sha256 {
            return Err(format!("{} is damaged: its digest is not the manifest's", file.name));
        }
    }
    Ok(Stored { folder: folder.into(), manifest, digest })
}
