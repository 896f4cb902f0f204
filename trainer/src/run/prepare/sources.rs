//! What the sources of a run turned out to be: noted at its first start and kept.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::source::{self, Access, Fetched};
use crate::store::files::{digest_file, write_atomically};

const SOURCES: &str = "sources.json";

/// Where sources may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// From wherever they are; what they turn out to be is noted.
    Anywhere,
    /// From where they were when they were noted, unchanged, without a network.
    AsNoted,
}

/// `sources.json`: what a run's sources turned out to be, kept for its later attempts.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SourceRecord {
    /// Commit of each hub source, by URI and asked-for revision: a branch that moves does not change a run that has begun,
    /// and a hub that is down does not stop it.
    commits: BTreeMap<String, String>,
    /// Digest of each file that was compared with what the hub said of it when it was fetched, with what tells that it is
    /// still the same: others may write the cache.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    fetched: BTreeMap<PathBuf, FileDigest>,
    /// Digest of each file that was read, with what tells that it is still the same.
    digests: BTreeMap<PathBuf, FileDigest>,
}

/// A file's digest and its identity: a large model is not read again at every start only to be digested.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FileDigest {
    bytes: u64,
    inode: u64,
    /// Time of the last change of the content, nanoseconds: whoever changes the content can set it back.
    modified: i128,
    /// Time of the last change of anything, nanoseconds: only the system sets it. 0 in records of earlier versions.
    #[serde(default)]
    changed: i128,
    digest: String,
}

impl SourceRecord {
    pub(super) fn read(run: &Path) -> Self {
        // What cannot be read is found out anew.
        fs::read(run.join(SOURCES)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    pub(super) fn write(&self, run: &Path) -> Result<(), Error> {
        let path = run.join(SOURCES);
        let bytes = serde_json::to_vec_pretty(self).expect("a record is JSON");
        write_atomically(&path, &bytes).map_err(|source| Error::Write { path, source })
    }

    /// Fetches a source at the commit that an earlier attempt took, or at `revision`, and notes the commit.
    pub(super) fn fetch(
        &mut self,
        uri: &str,
        revision: Option<&str>,
        from: Sources,
        access: Access,
        fetch: impl Fn(Option<&str>, Access) -> Result<Fetched, source::Error>,
    ) -> Result<Fetched, Error> {
        let key = format!("{uri}@{}", revision.unwrap_or("main"));
        let not_prepared = |message: String| Error::NotPrepared { uri: uri.to_owned(), message };
        if let Some(commit) = self.commits.get(&key).cloned() {
            // It was fetched whole once; only if the cache has lost or changed it the hub is asked again.
            return match (fetch(Some(&commit), Access { noted: true, ..access }), from) {
                (Ok(fetched), _) if self.is_intact(&fetched.path) => Ok(fetched),
                (_, Sources::Anywhere) => {
                    let fetched = fetch(Some(&commit), access)?;
                    self.note(&fetched);
                    Ok(fetched)
                }
                (Ok(fetched), Sources::AsNoted) => Err(not_prepared(format!("{} is damaged", fetched.path.display()))),
                (Err(_), Sources::AsNoted) => Err(not_prepared(format!("commit {commit} is not in the cache"))),
            };
        }
        if from == Sources::AsNoted && uri.starts_with("hf://") {
            return Err(not_prepared(format!("{SOURCES} has no commit of it")));
        }
        let fetched = fetch(revision, access)?;
        if let Some(commit) = &fetched.revision {
            self.commits.insert(key, commit.clone());
        }
        self.note(&fetched);
        Ok(fetched)
    }

    fn note(&mut self, fetched: &Fetched) {
        for (path, digest) in &fetched.digests {
            // A file that is gone again is missed by whoever reads it.
            if let Ok(metadata) = fs::metadata(path) {
                self.fetched.insert(path.clone(), FileDigest::new(&metadata, digest.clone()));
            }
        }
    }

    /// Whether the files at or below `path` are what they were.
    fn is_intact(&self, path: &Path) -> bool {
        let known = self.fetched.iter().chain(&self.digests).filter(|(file, _)| file.starts_with(path));
        let mut known = known.filter(|(file, known)| !known.is_current(file));
        known.all(|(file, known)| digest_file(file).is_ok_and(|found| found == known.digest))
    }

    pub(super) fn digest(&mut self, path: &Path, from: Sources) -> Result<String, Error> {
        self.digest_as_read(path, from, || {
            digest_file(path).map_err(|source| Error::Read { path: path.into(), source })
        })
    }

    /// The digest that `read` finds, or the one that is known if the file has not been touched since.
    pub(super) fn digest_as_read(
        &mut self,
        path: &Path,
        from: Sources,
        read: impl FnOnce() -> Result<String, Error>,
    ) -> Result<String, Error> {
        if let Some(known) = self.digests.get(path).filter(|known| known.is_current(path)) {
            return Ok(known.digest.clone());
        }
        let metadata = fs::metadata(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let digest = read()?;
        let is_another = |known: &FileDigest| known.digest != digest;
        if from == Sources::AsNoted && self.digests.get(path).is_none_or(is_another)
            || self.fetched.get(path).is_some_and(is_another)
        {
            return Err(Error::Changed { path: path.into() });
        }
        self.digests.insert(path.into(), FileDigest::new(&metadata, digest.clone()));
        Ok(digest)
    }
}

impl FileDigest {
    fn new(metadata: &fs::Metadata, digest: String) -> Self {
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Self {
            bytes: metadata.len(),
            inode: metadata.ino(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            digest,
        }
    }

    /// Whether the file has not been touched since.
    fn is_current(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|metadata| *self == Self::new(&metadata, self.digest.clone()))
    }
}
