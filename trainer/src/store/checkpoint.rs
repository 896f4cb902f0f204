//! Checkpoints on a volume that may vanish at any instant: one exists or it does not.
//!
//! A checkpoint is written to a temporary folder, each file synced, the manifest with the SHA-256 of every file last, then
//! renamed into place and the parent synced; only then older ones go. The newest one that verifies is loaded, whatever an
//! overtaken pod wrote late. Nothing here knows tensors: contents come and go as bytes.

mod attempt;
mod committed;
mod manifest;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use self::attempt::{Claim, claim_stage, run_of_another};
use self::attempt::{Start, lock};
pub use self::committed::{Committed, committed};
pub use self::manifest::{EquivalenceClass, FileEntry, Identity, Manifest, Stored};
use self::manifest::{FORMAT, MANIFEST, Sealed, read_manifest, verify};
use crate::store::files::{HashingWriter, sync_folder};

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
    /// A newer attempt, or a later pod of this one, writes here.
    #[error("attempt {own} was overtaken by {newer}, which writes to {}; this one leaves without a trace", path.display())]
    Fenced {
        /// The run directory.
        path: PathBuf,
        /// This attempt.
        own: i32,
        /// The other one, and its pod.
        newer: String,
    },
    /// Another process runs here.
    #[error("{}: another run is in progress in this folder; wait for it, or choose another --dir", path.display())]
    InUse {
        /// The run directory.
        path: PathBuf,
    },
    /// Another job writes here.
    #[error("{}: the run directory belongs to job {found}, this is job {expected}; choose another checkpoint.storage.path", path.display())]
    ForeignRun {
        /// The claim that says so.
        path: PathBuf,
        /// The other job.
        found: String,
        /// This one.
        expected: String,
    },
    /// The judged checkpoint is not there as it was judged.
    #[error("{}: no checkpoint with digest {digest} that verifies ({message}); the result that was judged cannot be published", path.display())]
    Missing {
        /// The folder of checkpoints.
        path: PathBuf,
        /// Of its manifest.
        digest: String,
        /// What was found.
        message: String,
    },
}

impl Error {
    fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.into(), source, space: String::new() }
    }

    /// Whether another attempt or another job owns the run directory.
    pub fn folder_is_of_another(&self) -> bool {
        matches!(self, Self::InUse { .. } | Self::Fenced { .. } | Self::ForeignRun { .. })
    }

    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::Write { .. } | Self::Read { .. } | Self::InUse { .. } => ExitCode::CannotWrite,
            Self::Foreign { .. } | Self::ForeignRun { .. } | Self::Missing { .. } => ExitCode::ForeignCheckpoint,
            Self::Fenced { .. } => ExitCode::Preempted,
        }
    }
}

/// A file to be written, as a function that writes it: large tensors are never copied.
pub struct Content<'a> {
    /// Its name.
    pub name: &'a str,
    /// Writes its bytes.
    pub write: &'a dyn Fn(&mut dyn Write) -> io::Result<()>,
}

/// The checkpoints of one run directory, as one attempt sees them.
#[derive(Debug)]
pub struct Store {
    run: PathBuf,
    identity: Identity,
    class: EquivalenceClass,
    attempt: i32,
    /// Number of this pod's claim.
    claim: i32,
    /// Of the last commit that was made or seen.
    sequence: i64,
    resumed_from: Option<String>,
    /// Held as long as the store lives.
    _lock: Option<File>,
}

impl Store {
    /// Opens the checkpoints of `run` and claims an attempt: the claim's number, or, where nobody counts attempts, the next
    /// free one and the folder for this process alone.
    pub fn open(run: &Path, identity: Identity, class: EquivalenceClass, claim: Claim) -> Result<Self, Error> {
        for folder in ["attempts", "checkpoints"].map(|name| run.join(name)) {
            fs::create_dir_all(&folder).map_err(|source| Error::write(&folder, source))?;
        }
        let lock = if claim.number.is_none() { Some(lock(run)?) } else { None };
        let (claim, attempt) = attempt::claim(run, "", &identity.job_uid, claim)?;
        let mut store =
            Self { run: run.into(), identity, class, attempt, claim, sequence: 0, resumed_from: None, _lock: lock };
        // A number that was ever given is not given again: the order of commits must hold whatever is read.
        let manifests = folders(run)?.into_iter().filter_map(|folder| read_manifest(&folder).ok());
        store.sequence = manifests.map(|(manifest, _)| manifest.sequence).max().unwrap_or(0);
        store.remove_leftovers();
        Ok(store)
    }

    /// This attempt's number.
    pub fn attempt(&self) -> i32 {
        self.attempt
    }

    /// The newest checkpoint that verifies, from which this attempt goes on, and what was wrong with newer ones. One that
    /// belongs to other inputs is an error: going on without it would lose its work without a word.
    pub fn latest(&mut self) -> Result<(Option<Stored>, Vec<String>), Error> {
        let mut warnings = Vec::new();
        let mut candidates = folders(&self.run)?;
        // Newest by sequence; a folder without a readable manifest comes first, so that it is named.
        candidates.sort_by_key(|folder| std::cmp::Reverse(read_manifest(folder).map_or(i64::MAX, |(m, _)| m.sequence)));
        let starts = attempt::starts(&self.run);
        let mut found = None;
        for folder in candidates {
            let checked = verify(&folder).and_then(|stored| {
                if starts.iter().any(|start| start.supersedes(&stored.manifest)) {
                    return Err("it was written after its attempt had been overtaken".into());
                }
                Ok(stored)
            });
            match checked {
                Ok(stored) => {
                    self.check_identity(&stored)?;
                    self.resumed_from = Some(stored.digest.clone());
                    found = Some(stored);
                    break;
                }
                Err(reason) => {
                    warnings.push(format!("{}: {reason}; falling back to the checkpoint before it", folder.display()));
                }
            }
        }
        let sequence = found.as_ref().map_or(0, |stored| stored.manifest.sequence);
        attempt::record_start(&self.run, Start { claim: self.claim, sequence })?;
        Ok((found, warnings))
    }

    /// Begins anew: checkpoints that are there are kept, in a folder whose path is returned, and never read again.
    pub fn set_aside(&mut self) -> Result<Option<PathBuf>, Error> {
        attempt::record_start(&self.run, Start { claim: self.claim, sequence: 0 })?;
        if folders(&self.run)?.is_empty() {
            return Ok(None);
        }
        let checkpoints = self.run.join("checkpoints");
        let aside = self.run.join(format!("checkpoints-before-claim-{:06}", self.claim));
        fs::rename(&checkpoints, &aside)
            .and_then(|()| fs::create_dir(&checkpoints))
            .and_then(|()| sync_folder(&self.run))
            .map_err(|source| Error::write(&aside, source))?;
        Ok(Some(aside))
    }

    /// The newest checkpoint of this run with `step` completed steps; `None` if there is none or it is damaged.
    pub fn find(&self, step: i64) -> Result<Option<Stored>, Error> {
        let mut own = self.own()?;
        own.sort_by_key(|(_, manifest)| std::cmp::Reverse(manifest.sequence));
        Ok(own.iter().filter(|(_, manifest)| manifest.step == step).find_map(|(folder, _)| verify(folder).ok()))
    }

    /// Checkpoints of this run by their manifests; their files are not looked at.
    fn own(&self) -> Result<Vec<(PathBuf, Manifest)>, Error> {
        let starts = attempt::starts(&self.run);
        let manifests = folders(&self.run)?.into_iter().filter_map(|folder| {
            let (manifest, _) = read_manifest(&folder).ok()?;
            let foreign = self.identity.difference(&manifest).is_some();
            let superseded = starts.iter().any(|start| start.supersedes(&manifest));
            (!foreign && !superseded).then_some((folder, manifest))
        });
        Ok(manifests.collect())
    }

    /// Whether a run that continues `stored` will be bit-equal; if not, why.
    pub fn inexact_because(&self, stored: &Stored) -> Option<String> {
        let (before, now) = (&stored.manifest.class, &self.class);
        (before != now).then(|| format!("the checkpoint was made with {before:?}, this is {now:?}"))
    }

    /// Writes a checkpoint durably. On an error nothing of it is left and older ones are untouched.
    pub fn commit(&mut self, step: i64, best: bool, contents: &[Content]) -> Result<Stored, Error> {
        let checkpoints = self.run.join("checkpoints");
        let name = format!("step-{step:07}-c{:03}", self.claim);
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
        crate::ground::crashed::wait();
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
            let mut sink = HashingWriter::new(io::BufWriter::with_capacity(1 << 20, file));
            let result = (content.write)(&mut sink).and_then(|()| sink.inner.flush());
            *written += sink.bytes;
            result?;
            sink.inner.get_ref().sync_all()?;
            files.push(FileEntry { name: content.name.into(), bytes: sink.bytes, sha256: sink.digest() });
        }
        let manifest = Manifest {
            format: FORMAT,
            sequence: self.sequence + 1,
            step,
            attempt: self.attempt,
            claim: self.claim,
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
        let own = self.own()?;
        let kept = retained(
            &own.iter().map(|(_, manifest)| (manifest.sequence, manifest.best)).collect::<Vec<_>>(),
            keep_latest,
            keep_best,
        );
        for (folder, _) in own.iter().filter(|(_, manifest)| !kept.contains(&manifest.sequence)) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let doomed = self.run.join("checkpoints").join(format!(".tmp-old-{name}"));
            fs::rename(folder, &doomed)
                .and_then(|()| fs::remove_dir_all(&doomed))
                .map_err(|source| Error::write(folder, source))?;
        }
        Ok(())
    }

    fn check_identity(&self, stored: &Stored) -> Result<(), Error> {
        match self.identity.difference(&stored.manifest) {
            None => Ok(()),
            Some((what, found, expected)) => Err(Error::Foreign { path: stored.folder.clone(), what, found, expected }),
        }
    }

    fn check_fence(&self) -> Result<(), Error> {
        match attempt::overtaken_by(&self.run, self.claim) {
            Some(newer) => Err(Error::Fenced { path: self.run.clone(), own: self.attempt, newer }),
            None => Ok(()),
        }
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

/// The job's checkpoint whose manifest has this digest, if it verifies.
pub fn find_by_digest(run: &Path, job_uid: &str, digest: &str) -> Result<Stored, Error> {
    let path = run.join("checkpoints");
    let mut message = "there is none".to_owned();
    for folder in folders(run)? {
        if read_manifest(&folder).is_ok_and(|(manifest, found)| found == digest && manifest.job_uid == job_uid) {
            match verify(&folder) {
                Ok(stored) => return Ok(stored),
                Err(reason) => message = format!("{}: {reason}", folder.display()),
            }
        }
    }
    Err(Error::Missing { path, digest: digest.to_owned(), message })
}

/// Folders of checkpoints, whatever is in them.
fn folders(run: &Path) -> Result<Vec<PathBuf>, Error> {
    let checkpoints = run.join("checkpoints");
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

/// Sequences of the checkpoints that stay, given (sequence, best) of all: the newest `keep_latest`, and the newest
/// `keep_best` of those that were best when they were written. Never none of either kind.
pub fn retained(checkpoints: &[(i64, bool)], keep_latest: i64, keep_best: i64) -> BTreeSet<i64> {
    let mut newest_first = checkpoints.to_vec();
    newest_first.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
    let latest = newest_first.iter().take(keep_latest.max(1) as usize);
    let best = newest_first.iter().filter(|(_, best)| *best).take(keep_best.max(1) as usize);
    latest.chain(best).map(|(sequence, _)| *sequence).collect()
}
