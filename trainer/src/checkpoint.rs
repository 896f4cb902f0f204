//! Checkpoints on a volume that may vanish at any instant: one exists or it does not.
//!
//! `attempts/000003.json` claims an attempt by exclusive create; a higher attempt fences a lower one. A checkpoint is
//! written to a temporary folder, each file synced, the manifest with the SHA-256 of every file last, then renamed into
//! place and the parent synced; only then older ones go. The newest one that verifies is loaded. Nothing here knows
//! tensors: contents come and go as bytes.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::example::hex;

const MANIFEST: &str = "manifest.json";
const FORMAT: i32 = 1;

/// A checkpoint could not be written or must not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run directory cannot be written.
    #[error("{}: cannot be written ({source}{space}); older checkpoints are untouched: free space or choose another --dir", path.display())]
    Write {
        /// What was being written.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// How much was needed, if that is the point.
        space: String,
    },
    /// The run directory cannot be read.
    #[error("{}: cannot be read ({source})", path.display())]
    Read {
        /// What was being read.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The checkpoint belongs to other inputs.
    #[error("{}: the checkpoint belongs to another {what} (found {found}, this run has {expected}); choose another --dir, or set checkpoint.resume: Never to start from the beginning", path.display())]
    Foreign {
        /// The checkpoint.
        path: PathBuf,
        /// Job, configuration, dataset or base model.
        what: &'static str,
        /// In the manifest.
        found: String,
        /// Of this run.
        expected: String,
    },
    /// A newer attempt writes here.
    #[error("attempt {own} was overtaken by attempt {newer}, which writes to {}; this attempt leaves without a checkpoint", path.display())]
    Fenced {
        /// The run directory.
        path: PathBuf,
        /// This attempt.
        own: i32,
        /// The other one.
        newer: i32,
    },
    /// The attempt's number is taken.
    #[error("attempt {number} of {} is claimed already; a run is in progress there, or the attempt number was used twice", path.display())]
    AttemptTaken {
        /// The run directory.
        path: PathBuf,
        /// The number.
        number: i32,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::Write { .. } | Self::Read { .. } => ExitCode::CannotWrite,
            Self::Foreign { .. } => ExitCode::ForeignCheckpoint,
            Self::Fenced { .. } | Self::AttemptTaken { .. } => ExitCode::Preempted,
        }
    }
}

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
struct Sealed {
    sha256: String,
    manifest: Manifest,
}

impl Sealed {
    fn new(manifest: Manifest) -> Self {
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

/// A file to be written, as a function that writes it: large tensors are never copied.
pub struct Content<'a> {
    /// Its name.
    pub name: &'a str,
    /// Writes its bytes.
    pub write: &'a dyn Fn(&mut dyn Write) -> io::Result<()>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AttemptClaim {
    attempt: i32,
    job_uid: String,
    process: u32,
}

/// The checkpoints of one run directory, as one attempt sees them.
#[derive(Debug)]
pub struct Store {
    run: PathBuf,
    identity: Identity,
    class: EquivalenceClass,
    attempt: i32,
    sequence: i64,
    resumed_from: Option<String>,
}

/// The digest of some bytes in the form that manifests use.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// The digest of a file.
pub fn digest_file(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("sha256:{}", hex(&hash.finalize()))),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// Makes a rename or a new file in `folder` durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Writes a file to a sibling, syncs it and renames it into place.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // A temporary file is private by default; what it becomes is for everyone who may read the folder.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(folder)
}

impl Store {
    /// Opens the checkpoints of `run` and claims an attempt: `number`, or the next free one.
    pub fn open(run: &Path, identity: Identity, class: EquivalenceClass, number: Option<i32>) -> Result<Self, Error> {
        let write = |path: &Path| {
            let path = path.to_path_buf();
            move |source| Error::Write { path, source, space: String::new() }
        };
        let (attempts, checkpoints) = (run.join("attempts"), run.join("checkpoints"));
        for folder in [&attempts, &checkpoints] {
            fs::create_dir_all(folder).map_err(write(folder))?;
        }
        let mut attempt = number.unwrap_or_else(|| highest_attempt(run) + 1);
        loop {
            let path = attempts.join(format!("{attempt:06}.json"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    let claim =
                        AttemptClaim { attempt, job_uid: identity.job_uid.clone(), process: std::process::id() };
                    let bytes = serde_json::to_vec(&claim).expect("a claim is JSON");
                    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(write(&path))?;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number.is_none() => attempt += 1,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(Error::AttemptTaken { path: run.into(), number: attempt });
                }
                Err(error) => return Err(write(&path)(error)),
            }
        }
        sync_folder(&attempts).map_err(write(&attempts))?;
        let store = Self { run: run.into(), identity, class, attempt, sequence: 0, resumed_from: None };
        store.remove_leftovers();
        Ok(store)
    }

    /// This attempt's number.
    pub fn attempt(&self) -> i32 {
        self.attempt
    }

    /// The newest checkpoint that verifies, and what was wrong with newer ones. One that belongs to other inputs is an
    /// error: going on without it would lose its work without a word.
    pub fn latest(&mut self) -> Result<(Option<Stored>, Vec<String>), Error> {
        let mut warnings = Vec::new();
        let mut candidates = self.folders()?;
        // Newest by sequence; a folder without a readable manifest comes first, so that it is named.
        candidates.sort_by_key(|folder| std::cmp::Reverse(read_manifest(folder).map_or(i64::MAX, |(m, _)| m.sequence)));
        for folder in candidates {
            match verify(&folder) {
                Ok(stored) => {
                    self.check_identity(&stored)?;
                    self.sequence = self.sequence.max(stored.manifest.sequence);
                    self.resumed_from = Some(stored.digest.clone());
                    return Ok((Some(stored), warnings));
                }
                Err(reason) => {
                    warnings.push(format!("{}: {reason}; falling back to the checkpoint before it", folder.display()));
                    if let Ok((manifest, _)) = read_manifest(&folder) {
                        self.sequence = self.sequence.max(manifest.sequence);
                    }
                }
            }
        }
        Ok((None, warnings))
    }

    /// All checkpoints that verify, oldest first.
    pub fn all(&self) -> Result<Vec<Stored>, Error> {
        let mut stored: Vec<Stored> = self.folders()?.iter().filter_map(|folder| verify(folder).ok()).collect();
        stored.sort_by_key(|stored| stored.manifest.sequence);
        Ok(stored)
    }

    /// Whether a run that continues `stored` will be bit-equal; if not, why.
    pub fn inexact_because(&self, stored: &Stored) -> Option<String> {
        let (before, now) = (&stored.manifest.class, &self.class);
        (before != now).then(|| format!("the checkpoint was made with {before:?}, this is {now:?}"))
    }

    /// Writes a checkpoint durably. On an error nothing of it is left and older ones are untouched.
    pub fn commit(&mut self, step: i64, best: bool, contents: &[Content]) -> Result<Stored, Error> {
        let checkpoints = self.run.join("checkpoints");
        let name = format!("step-{step:07}-a{:03}", self.attempt);
        let target = checkpoints.join(&name);
        let temporary = tempfile::Builder::new()
            .prefix(&format!(".tmp-{name}-"))
            .tempdir_in(&checkpoints)
            .map_err(|source| Error::Write { path: target.clone(), source, space: String::new() })?;
        let mut written = 0;
        let result = self.write_files(temporary.path(), step, best, contents, &mut written);
        let (manifest, digest) = result.map_err(|source| {
            let space = match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!(" after {written} bytes"),
                _ => String::new(),
            };
            Error::Write { path: target.clone(), source, space }
        })?;
        self.check_fence()?;
        // From here on the folder is not removed with its handle.
        let temporary = temporary.keep();
        let failed = |source| {
            let _ = fs::remove_dir_all(&temporary);
            Error::Write { path: target.clone(), source, space: String::new() }
        };
        fs::rename(&temporary, &target).and_then(|()| sync_folder(&checkpoints)).map_err(failed)?;
        self.sequence = manifest.sequence;
        Ok(Stored { folder: target, manifest, digest })
    }

    fn write_files(
        &self,
        folder: &Path,
        step: i64,
        best: bool,
        contents: &[Content],
        written: &mut u64,
    ) -> io::Result<(Manifest, String)> {
        let mut files = Vec::new();
        for content in contents {
            let file = File::create(folder.join(content.name))?;
            let mut sink =
                HashingWriter { inner: io::BufWriter::with_capacity(1 << 20, file), hash: Sha256::new(), bytes: 0 };
            let result = (content.write)(&mut sink).and_then(|()| sink.inner.flush());
            *written += sink.bytes;
            result?;
            sink.inner.get_ref().sync_all()?;
            let sha256 = format!("sha256:{}", hex(&sink.hash.finalize()));
            files.push(FileEntry { name: content.name.into(), bytes: sink.bytes, sha256 });
        }
        let manifest = Manifest {
            format: FORMAT,
            sequence: self.sequence + 1,
            step,
            attempt: self.attempt,
            job_uid: self.identity.job_uid.clone(),
            resumed_from: self.resumed_from.clone(),
            config: self.identity.config.clone(),
            dataset: self.identity.dataset.clone(),
            base_model: self.identity.base_model.clone(),
            class: self.class.clone(),
            best,
            files,
        };
        let sealed = Sealed::new(manifest);
        let mut file = File::create(folder.join(MANIFEST))?;
        file.write_all(&serde_json::to_vec_pretty(&sealed).map_err(io::Error::other)?)?;
        file.sync_all()?;
        sync_folder(folder)?;
        Ok((sealed.manifest, sealed.sha256))
    }

    /// Removes checkpoints beyond the newest and best ones. A folder is renamed before it is unlinked, so that a crash
    /// leaves no half of one.
    pub fn retain(&self, keep_latest: i64, keep_best: i64) -> Result<(), Error> {
        let stored = self.all()?;
        let kept = retained(
            &stored.iter().map(|s| (s.manifest.sequence, s.manifest.best)).collect::<Vec<_>>(),
            keep_latest,
            keep_best,
        );
        for old in stored.iter().filter(|stored| !kept.contains(&stored.manifest.sequence)) {
            let name = old.folder.file_name().unwrap_or_default().to_string_lossy();
            let doomed = self.run.join("checkpoints").join(format!(".tmp-old-{name}"));
            fs::rename(&old.folder, &doomed)
                .and_then(|()| fs::remove_dir_all(&doomed))
                .map_err(|source| Error::Write { path: old.folder.clone(), source, space: String::new() })?;
        }
        Ok(())
    }

    fn check_identity(&self, stored: &Stored) -> Result<(), Error> {
        let manifest = &stored.manifest;
        let own = &self.identity;
        for (what, found, expected) in [
            ("job", &manifest.job_uid, &own.job_uid),
            ("configuration", &manifest.config, &own.config),
            ("dataset", &manifest.dataset, &own.dataset),
            ("base model", &manifest.base_model, &own.base_model),
        ] {
            if found != expected {
                let (found, expected) = (found.clone(), expected.clone());
                return Err(Error::Foreign { path: stored.folder.clone(), what, found, expected });
            }
        }
        Ok(())
    }

    fn check_fence(&self) -> Result<(), Error> {
        let newer = highest_attempt(&self.run);
        if newer > self.attempt {
            return Err(Error::Fenced { path: self.run.clone(), own: self.attempt, newer });
        }
        Ok(())
    }

    fn folders(&self) -> Result<Vec<PathBuf>, Error> {
        let checkpoints = self.run.join("checkpoints");
        let read = |source| Error::Read { path: checkpoints.clone(), source };
        let mut folders = Vec::new();
        for entry in fs::read_dir(&checkpoints).map_err(read)? {
            let entry = entry.map_err(read)?;
            if entry.file_name().to_string_lossy().starts_with("step-") {
                folders.push(entry.path());
            }
        }
        Ok(folders)
    }

    /// Temporary folders of attempts that died; this attempt holds the fence, nobody else may commit them.
    fn remove_leftovers(&self) {
        for entry in fs::read_dir(self.run.join("checkpoints")).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".tmp-") {
                // What cannot be removed is never loaded either.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// The highest attempt that was claimed; 0 if none.
fn highest_attempt(run: &Path) -> i32 {
    let entries = fs::read_dir(run.join("attempts")).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok());
    numbers.max().unwrap_or(0)
}

/// Sequences of the checkpoints that stay, given (sequence, best) of all: the newest `keep_latest`, and the newest
/// `keep_best` of those that were best when they were written. Never none of either kind.
pub fn retained(checkpoints: &[(i64, bool)], keep_latest: i64, keep_best: i64) -> BTreeSet<i64> {
    let mut newest_first = checkpoints.to_vec();
    newest_first.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
    let latest = newest_first.iter().take(keep_latest.max(1) as usize);
    let best = newest_first.iter().filter(|(_, best)| *best).take(keep_best.max(1) as usize);
    latest.chain(best).map(|(sequence, _)| *sequence).collect()
}

fn read_manifest(folder: &Path) -> Result<(Manifest, String), String> {
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
fn verify(folder: &Path) -> Result<Stored, String> {
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

struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let length = self.inner.write(data)?;
        self.hash.update(&data[..length]);
        self.bytes += length as u64;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let text = |text: &str| text.to_owned();
        Identity { job_uid: text("job"), config: text("config"), dataset: text("data"), base_model: text("base") }
    }

    fn open(run: &Path, attempt: Option<i32>) -> Store {
        Store::open(run, identity(), EquivalenceClass::default(), attempt).expect("opens")
    }

    fn commit(store: &mut Store, step: i64, best: bool) -> Stored {
        let body = format!("weights of step {step}");
        let write = |sink: &mut dyn Write| sink.write_all(body.as_bytes());
        store.commit(step, best, &[Content { name: "a.safetensors", write: &write }]).expect("commits")
    }

    fn latest_step(run: &Path) -> (Option<i64>, usize) {
        let (stored, warnings) = open(run, None).latest().expect("readable");
        (stored.map(|stored| stored.manifest.step), warnings.len())
    }

    #[test]
    fn the_newest_that_verifies_wins_whatever_is_damaged() {
        for name in ["a.safetensors", MANIFEST] {
            let length = {
                let run = tempfile::tempdir().expect("a temporary folder");
                fs::metadata(commit(&mut open(run.path(), None), 10, false).folder.join(name)).expect("there").len()
            };
            for offset in (0..length as usize).step_by(7) {
                for truncate in [true, false] {
                    let run = tempfile::tempdir().expect("a temporary folder");
                    let mut store = open(run.path(), None);
                    commit(&mut store, 10, false);
                    let damaged = commit(&mut store, 20, false).folder.join(name);
                    let mut bytes = fs::read(&damaged).expect("readable");
                    if truncate {
                        bytes.truncate(offset);
                    } else {
                        bytes[offset] ^= 0x10;
                    }
                    fs::write(&damaged, bytes).expect("writable");
                    let (step, warnings) = latest_step(run.path());
                    assert_eq!((step, warnings), (Some(10), 1), "{name} at {offset}, truncated: {truncate}");
                }
            }
        }
    }

    #[test]
    fn a_folder_without_its_manifest_never_was() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut store = open(run.path(), None);
        commit(&mut store, 10, false);
        let stored = commit(&mut store, 20, false);
        fs::remove_file(stored.folder.join(MANIFEST)).expect("removable");
        assert_eq!(latest_step(run.path()), (Some(10), 1));
    }

    #[test]
    fn other_inputs_are_refused_by_name() {
        let run = tempfile::tempdir().expect("a temporary folder");
        commit(&mut open(run.path(), None), 10, false);
        let changes: [(&str, fn(&mut Identity)); 4] = [
            ("another job", |identity| identity.job_uid.push('x')),
            ("another configuration", |identity| identity.config.push('x')),
            ("another dataset", |identity| identity.dataset.push('x')),
            ("another base model", |identity| identity.base_model.push('x')),
        ];
        for (what, change) in changes {
            let mut other = identity();
            change(&mut other);
            let mut store = Store::open(run.path(), other, EquivalenceClass::default(), None).expect("opens");
            let error = store.latest().expect_err("foreign");
            assert!(error.to_string().contains(what) && error.exit().code() == 78, "{error}");
        }
    }

    #[test]
    fn a_lower_attempt_never_commits_again() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut first = open(run.path(), Some(1));
        commit(&mut first, 10, false);
        let mut second = open(run.path(), Some(2));
        assert!(second.latest().expect("readable").0.is_some());
        let write = |sink: &mut dyn Write| sink.write_all(b"late");
        let error = first.commit(20, false, &[Content { name: "a", write: &write }]).expect_err("fenced");
        assert!(matches!(error, Error::Fenced { own: 1, newer: 2, .. }), "{error}");
        commit(&mut second, 30, false);
        assert_eq!(latest_step(run.path()), (Some(30), 0));
        assert!(matches!(
            Store::open(run.path(), identity(), EquivalenceClass::default(), Some(2)),
            Err(Error::AttemptTaken { number: 2, .. })
        ));
    }

    #[test]
    fn a_failed_write_leaves_older_checkpoints_and_no_rest() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut store = open(run.path(), None);
        commit(&mut store, 10, false);
        let write = |sink: &mut dyn Write| {
            sink.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        let error = store.commit(20, false, &[Content { name: "a", write: &write }]).expect_err("full");
        assert!(error.exit().code() == 73 && error.to_string().contains("after 4 bytes"), "{error}");
        let names: Vec<_> =
            fs::read_dir(run.path().join("checkpoints")).expect("there").flatten().map(|e| e.file_name()).collect();
        assert_eq!(names.len(), 1, "{names:?}");
        assert_eq!(latest_step(run.path()), (Some(10), 0));
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let all = [(1, true), (2, false), (3, true), (4, false), (5, false)];
        assert_eq!(retained(&all, 2, 1), BTreeSet::from([3, 4, 5]));
        assert_eq!(retained(&all, 0, 0), BTreeSet::from([3, 5]));
        assert_eq!(retained(&all, 9, 9).len(), 5);
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut store = open(run.path(), None);
        for (step, best) in [(1, true), (2, false), (3, false)] {
            commit(&mut store, step, best);
        }
        store.retain(1, 1).expect("removable");
        let steps: Vec<i64> = store.all().expect("readable").iter().map(|stored| stored.manifest.step).collect();
        assert_eq!(steps, [1, 3]);
    }
}
