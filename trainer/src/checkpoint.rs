//! Checkpoints on a volume that may vanish at any instant: one exists or it does not.
//!
//! A checkpoint is written to a temporary folder, each file synced, the manifest with the SHA-256 of every file last, then
//! renamed into place and the parent synced; only then older ones go. The newest one that verifies is loaded, whatever an
//! overtaken pod wrote late. Nothing here knows tensors: contents come and go as bytes.

mod attempt;
mod files;
mod manifest;

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use self::attempt::Start;
use self::files::HashingWriter;
pub use self::files::{digest_file, digest_of, sync_folder, write_atomically};
pub use self::manifest::{EquivalenceClass, FileEntry, Identity, Manifest, Stored};
use self::manifest::{FORMAT, MANIFEST, Sealed, read_manifest, verify};

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

/// Who claims an attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claim<'a> {
    /// Its number; `None`: the next free one.
    pub number: Option<i32>,
    /// `metadata.uid` of the pod; empty where there is none.
    pub pod_uid: &'a str,
}

/// Claims an attempt of a stage that writes no checkpoints: a pod of a lower attempt than one that came leaves.
pub fn claim_stage(run: &Path, stage: &str, job_uid: &str, claim: Claim) -> Result<(), Error> {
    let folder = run.join("attempts");
    fs::create_dir_all(&folder).map_err(|source| Error::write(&folder, source))?;
    attempt::claim(run, &format!("{stage}-"), job_uid, claim).map(|_| ())
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

/// Takes the folder for this process. The lock goes with the process, however it ends.
fn lock(run: &Path) -> Result<File, Error> {
    let path = run.join(".lock");
    let file = File::create(&path).map_err(|source| Error::write(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path: run.into() }),
        Err(TryLockError::Error(source)) => Err(Error::write(&path, source)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let text = |text: &str| text.to_owned();
        Identity { job_uid: text("job"), config: text("config"), dataset: text("data"), base_model: text("base") }
    }

    fn claim(number: Option<i32>) -> Claim<'static> {
        Claim { number, pod_uid: "pod-1" }
    }

    fn open(run: &Path, attempt: Option<i32>) -> Store {
        Store::open(run, identity(), EquivalenceClass::default(), claim(attempt)).expect("opens")
    }

    fn open_as(run: &Path, attempt: i32, pod_uid: &str) -> Store {
        let claim = Claim { number: Some(attempt), pod_uid };
        Store::open(run, identity(), EquivalenceClass::default(), claim).expect("opens")
    }

    fn commit(store: &mut Store, step: i64, best: bool) -> Stored {
        let body = format!("weights of step {step}");
        let write = |sink: &mut dyn Write| sink.write_all(body.as_bytes());
        store.commit(step, best, &[Content { name: "a.safetensors", write: &write }]).expect("commits")
    }

    #[test]
    fn a_commit_of_an_overtaken_attempt_is_never_read() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut first = open(run.path(), Some(1));
        commit(&mut first, 10, false);
        // The lower attempt looks at the fence before the higher one claims it, and renames afterwards.
        let late = run.path().join("late");
        fs::rename(commit(&mut first, 20, true).folder, &late).expect("movable");
        let mut second = open(run.path(), Some(2));
        assert_eq!(second.latest().expect("readable").0.expect("a checkpoint").manifest.step, 10);
        fs::rename(&late, run.path().join("checkpoints/step-0000020-c001")).expect("movable");
        assert_eq!(second.find(20).expect("readable"), None);
        let (found, warnings) = open(run.path(), Some(3)).latest().expect("readable");
        assert_eq!(found.expect("a checkpoint").manifest.step, 10);
        assert!(warnings[0].contains("had been overtaken"), "{warnings:?}");
    }

    #[test]
    fn beginning_anew_keeps_what_is_there_and_never_reads_it() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let old = commit(&mut open(run.path(), Some(1)), 10, true);
        let mut store = open(run.path(), Some(2));
        let aside = store.set_aside().expect("movable").expect("there was one");
        assert!(aside.join(old.folder.file_name().expect("a name")).exists());
        assert_eq!(store.find(10).expect("readable"), None);
        commit(&mut store, 10, false);
        store.retain(1, 1).expect("removable");
        let stored = store.find(10).expect("readable").expect("just committed");
        assert_eq!((stored.manifest.attempt, stored.manifest.sequence), (2, 2));
    }

    #[test]
    fn a_folder_is_for_one_process_where_nobody_counts_attempts() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let first = open(run.path(), None);
        let error = Store::open(run.path(), identity(), EquivalenceClass::default(), claim(None)).expect_err("in use");
        assert!(error.to_string().contains("another run is in progress") && error.exit().code() == 73, "{error}");
        drop(first);
        assert_eq!(open(run.path(), None).attempt(), 2);
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
                    let mut store = open(run.path(), Some(1));
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
        let mut store = open(run.path(), Some(1));
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
            let mut store = Store::open(run.path(), other, EquivalenceClass::default(), claim(None)).expect("opens");
            let error = store.latest().expect_err("foreign");
            assert!(error.to_string().contains(what) && error.exit().code() == 78, "{error}");
        }
    }

    #[test]
    fn what_was_overtaken_never_commits_again() {
        // By a higher attempt, and by a later pod of the same.
        for later in [2, 1] {
            let run = tempfile::tempdir().expect("a temporary folder");
            let mut first = open(run.path(), Some(1));
            commit(&mut first, 10, false);
            let mut second = open_as(run.path(), later, "pod-2");
            assert_eq!(second.attempt(), later);
            assert!(second.latest().expect("readable").0.is_some());
            let write = |sink: &mut dyn Write| sink.write_all(b"late");
            let error = first.commit(20, false, &[Content { name: "a", write: &write }]).expect_err("fenced");
            let expected = format!("attempt 1 was overtaken by attempt {later} (pod pod-2)");
            assert!(error.to_string().contains(&expected) && error.exit().code() == 75, "{error}");
            // The same step is committed anew, beside what the first pod made of it.
            commit(&mut second, 10, false);
            commit(&mut second, 20, false);
            let mut third = open_as(run.path(), later, "pod-3");
            let (stored, warnings) = third.latest().expect("readable");
            assert_eq!((stored.expect("a checkpoint").manifest.step, warnings.len()), (20, 0));
        }
    }

    #[test]
    fn a_lower_attempt_is_refused() {
        let run = tempfile::tempdir().expect("a temporary folder");
        drop(open(run.path(), Some(2)));
        let error = Store::open(run.path(), identity(), EquivalenceClass::default(), claim(Some(1))).expect_err("late");
        let expected = "attempt 1 was overtaken by attempt 2 (pod pod-1)";
        assert!(error.to_string().contains(expected) && error.exit().code() == 75, "{error}");
        // A claim that the disk lost half of keeps its place.
        fs::write(run.path().join("attempts/000002.json"), "{\"attempt\"").expect("writable");
        drop(open(run.path(), Some(2)));
        assert!(run.path().join("attempts/000003.json").exists());
    }

    #[test]
    fn stages_count_their_own_attempts_and_a_folder_is_of_one_job() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let prepare = |uid: &str, number| claim_stage(run.path(), "prepare", uid, claim(Some(number)));
        prepare("job", 1).expect("the first");
        prepare("job", 1).expect("its next pod");
        prepare("job", 2).expect("the next");
        assert!(matches!(prepare("job", 1), Err(Error::Fenced { own: 1, .. })));
        assert_eq!(open(run.path(), Some(1)).attempt(), 1);
        let error = prepare("another", 3).expect_err("foreign");
        assert!(error.exit().code() == 78 && error.to_string().contains("belongs to job job"), "{error}");
    }

    #[test]
    fn the_judged_checkpoint_is_found_by_its_digest_or_refused() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut store = open(run.path(), Some(1));
        let (first, second) = (commit(&mut store, 10, true), commit(&mut store, 20, false));
        let find = |uid: &str, digest: &str| find_by_digest(run.path(), uid, digest);
        assert_eq!(find("job", &first.digest).expect("there"), first);
        assert!(matches!(find("another", &first.digest), Err(Error::Missing { .. })));
        assert!(matches!(find("job", "sha256:0"), Err(Error::Missing { .. })));
        fs::write(second.folder.join("a.safetensors"), "other").expect("writable");
        let error = find("job", &second.digest).expect_err("damaged");
        assert!(error.to_string().contains("a.safetensors is damaged"), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_older_checkpoints_and_no_rest() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut store = open(run.path(), Some(1));
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
        let mut store = open(run.path(), Some(1));
        for (step, best) in [(1, true), (2, false), (3, false)] {
            commit(&mut store, step, best);
        }
        store.retain(1, 1).expect("removable");
        let mut steps: Vec<i64> = store.own().expect("readable").iter().map(|(_, manifest)| manifest.step).collect();
        steps.sort_unstable();
        assert_eq!(steps, [1, 3]);
    }
}
