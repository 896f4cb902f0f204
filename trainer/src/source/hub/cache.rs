//! A repository's folder in the cache: `blobs/` by digest, `snapshots/<commit>/` of links to them, `refs/` of branches, as
//! `huggingface_hub` lays it out. Nothing in it is believed but by its digest.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha1::{Digest as _, Sha1};
use sha2::{Digest as _, Sha256};

use super::client::Listed;
use super::is_commit;
use super::trouble::Trouble;
use crate::ground::stop::Stop;
use crate::store::files::hex;
use crate::store::files::write_atomically;

/// What the hub says of a file's content, which also is its name among the blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    /// Of a large file: SHA-256 of its bytes, in hexadecimal.
    Sha256(String),
    /// Of a small one: git's name of it, see [`git_blob_id`].
    Git(String),
}

impl Digest {
    /// What a hexadecimal name of a blob says; `None` for a name that is none.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let is_hex = name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match name.len() {
            64 if is_hex => Some(Self::Sha256(name.to_owned())),
            40 if is_hex => Some(Self::Git(name.to_owned())),
            _ => None,
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Sha256(name) | Self::Git(name) => name,
        }
    }
}

/// What git calls a file's content.
pub fn git_blob_id(bytes: &[u8]) -> String {
    let mut hash = git_hash(bytes.len() as u64);
    hash.update(bytes);
    hex(&hash.finalize())
}

fn git_hash(bytes: u64) -> Sha1 {
    Sha1::new_with_prefix(format!("blob {bytes}\0"))
}

/// `sha256:…` of a file that is what `digest` says; `None` if it is something else or not there. All of it is read: about a
/// second for a gigabyte.
fn matching(path: &Path, digest: &Digest, stop: &Stop) -> Result<Option<String>, Trouble> {
    let failed = |source| Trouble::Io { path: path.to_owned(), source };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut git = match digest {
        Digest::Git(_) => Some(git_hash(file.metadata().map_err(failed)?.len())),
        Digest::Sha256(_) => None,
    };
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        if stop.requested() {
            return Err(Trouble::Stopped);
        }
        let length = file.read(&mut buffer).map_err(failed)?;
        if length == 0 {
            break;
        }
        sha256.update(&buffer[..length]);
        if let Some(git) = &mut git {
            git.update(&buffer[..length]);
        }
    }
    let sha256 = hex(&sha256.finalize());
    let found = git.map_or_else(|| sha256.clone(), |git| hex(&git.finalize()));
    Ok((found == digest.name()).then(|| format!("sha256:{sha256}")))
}

/// A repository's folder.
pub(super) struct Repository {
    pub(super) folder: PathBuf,
}

impl Repository {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(digest.name())
    }

    /// The commit that a branch or tag was when it was fetched last.
    pub(super) fn read_reference(&self, revision: &str) -> Result<String, Trouble> {
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).unwrap_or_default();
        let commit = text.trim();
        if is_commit(commit) { Ok(commit.to_owned()) } else { Err(Trouble::NotInTheCache) }
    }

    pub(super) fn write_reference(&self, revision: &str, commit: &str) -> Result<(), Trouble> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let written = fs::create_dir_all(path.parent().unwrap_or(&self.folder))
            .and_then(|()| write_atomically(&path, commit.as_bytes()));
        written.map_err(|source| Trouble::Io { path, source })
    }

    /// `sha256:…` of a file that the cache has, linked into the commit's snapshot; `None`, and out of the way, if it is not
    /// there or not what the hub says.
    pub(super) fn take(&self, commit: &str, file: &Listed, stop: &Stop) -> Result<Option<String>, Trouble> {
        let target = self.snapshot(commit).join(&file.path);
        let blob = self.blob(&file.digest);
        let has_size = |path: &Path| fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == file.size);
        for path in [&target, &blob] {
            let digest = if has_size(path) { matching(path, &file.digest, stop)? } else { None };
            match digest {
                Some(digest) => {
                    if path == &blob {
                        self.link(commit, file)?;
                    }
                    return Ok(Some(digest));
                }
                None => remove(path)?,
            }
        }
        Ok(None)
    }

    /// The link is relative, so that the cache can be moved and mounted anywhere.
    fn link(&self, commit: &str, file: &Listed) -> Result<(), Trouble> {
        let path = self.snapshot(commit).join(&file.path);
        let up = "../".repeat(2 + file.path.matches('/').count());
        let linked = fs::create_dir_all(path.parent().unwrap_or(&self.folder))
            .and_then(|()| remove_file(&path))
            .and_then(|()| std::os::unix::fs::symlink(format!("{up}blobs/{}", file.digest.name()), &path));
        linked.map_err(|source| Trouble::Io { path, source })
    }

    /// Compares the files of a snapshot with what their blobs are called, where there is no hub to ask; gives their digests.
    /// A file that is no link to a blob cannot be compared with anything.
    pub(super) fn verify_snapshot(
        &self,
        commit: &str,
        is_wanted: &dyn Fn(&str) -> bool,
        stop: &Stop,
    ) -> Result<Vec<(PathBuf, String)>, Trouble> {
        let snapshot = self.snapshot(commit);
        let mut digests = Vec::new();
        for path in files(&snapshot, "").into_iter().filter(|path| is_wanted(path)) {
            let path = snapshot.join(path);
            let blob = fs::canonicalize(&path).unwrap_or_default();
            let name = blob.file_name().unwrap_or_default().to_string_lossy();
            let Some(digest) = Digest::from_name(&name) else { continue };
            match matching(&blob, &digest, stop)? {
                Some(digest) => digests.push((path, digest)),
                None => return Err(Trouble::DamagedInTheCache(path)),
            }
        }
        Ok(digests)
    }

    /// What has arrived of a file so far, for this process alone.
    pub(super) fn open_partial(&self, file: &Listed) -> Result<Partial<'_>, Trouble> {
        let path = self.folder.join("blobs").join(format!("{}.part", file.digest.name()));
        let failed = |source| Trouble::Io { path: path.clone(), source };
        fs::create_dir_all(self.folder.join("blobs")).map_err(failed)?;
        loop {
            // Not through a link: others may write the cache.
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o644).custom_flags(libc::O_NOFOLLOW);
            let mut content = options.open(&path).map_err(failed)?;
            match content.try_lock() {
                // A file system without locks.
                Ok(()) | Err(TryLockError::Error(_)) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Trouble::Busy { bytes: content.metadata().map_err(failed)?.len() });
                }
            }
            let found = content.metadata().map_err(failed)?;
            if fs::symlink_metadata(&path).map_or(true, |now| now.ino() != found.ino()) {
                // It was finished by another process while this one opened it.
                continue;
            }
            let have = if found.len() > file.size { 0 } else { found.len() };
            content.set_len(have).and_then(|()| content.seek(SeekFrom::Start(have))).map_err(failed)?;
            return Ok(Partial { repository: self, path, content, have, size: file.size });
        }
    }
}

/// A file that is on its way.
pub(super) struct Partial<'a> {
    repository: &'a Repository,
    path: PathBuf,
    content: File,
    /// Bytes that have arrived.
    pub(super) have: u64,
    size: u64,
}

impl Partial<'_> {
    /// Bytes that have not arrived.
    pub(super) fn missing(&self) -> u64 {
        self.size - self.have
    }

    /// Begins anew.
    pub(super) fn restart(&mut self) -> Result<(), Trouble> {
        self.have = 0;
        let emptied = self.content.set_len(0).and_then(|()| self.content.rewind());
        emptied.map_err(|source| Trouble::Io { path: self.path.clone(), source })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        self.content.write_all(bytes).map_err(|source| Trouble::Io { path: self.path.clone(), source })?;
        self.have += bytes.len() as u64;
        Ok(())
    }

    /// Compares what has arrived with what the hub says, and gives it its place; what is damaged is thrown away.
    pub(super) fn finish(self, commit: &str, file: &Listed, stop: &Stop) -> Result<String, Trouble> {
        let Some(digest) = matching(&self.path, &file.digest, stop)? else {
            remove(&self.path)?;
            return Err(Trouble::Damaged(file.path.clone()));
        };
        let blob = self.repository.blob(&file.digest);
        fs::rename(&self.path, &blob).map_err(|source| Trouble::Io { path: blob, source })?;
        self.repository.link(commit, file)?;
        Ok(digest)
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes a link or a file; what a link points to is another's.
fn remove(path: &Path) -> Result<(), Trouble> {
    remove_file(path).map_err(|source| Trouble::Io { path: path.to_owned(), source })
}

/// Files and links below a folder; links to folders are not followed.
fn files(folder: &Path, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path(), &format!("{name}/")));
        } else {
            found.push(name);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_has_the_name_that_git_gives_it() {
        // `printf 'hello\n' | git hash-object --stdin`, and of nothing.
        assert_eq!(git_blob_id(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(git_blob_id(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
    }

    fn listed(path: &str, content: &[u8]) -> Listed {
        let digest = Digest::Git(git_blob_id(content));
        Listed { path: path.into(), size: content.len() as u64, digest, in_xet: false }
    }

    #[test]
    fn what_is_in_the_cache_is_believed_by_its_digest() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (repository, stop) = (Repository::new(folder.path().join("models--a--b")), Stop::default());
        let file = listed("a/config.json", b"genuine");
        let take = || repository.take("c0", &file, &stop).expect("readable");
        assert_eq!(take(), None);
        let arrive = |content: &[u8]| {
            let mut partial = repository.open_partial(&file).expect("writable");
            partial.write(content).expect("writable");
            partial.finish("c0", &file, &stop)
        };
        let digest = arrive(b"genuine").expect("genuine");
        assert_eq!(digest, crate::store::files::digest_of(b"genuine"));
        assert_eq!(take().as_ref(), Some(&digest));
        let path = repository.snapshot("c0").join("a/config.json");
        assert_eq!(fs::read(&path).expect("linked"), b"genuine");
        // Of the same size, whether in place or by another link.
        let other = folder.path().join("other");
        fs::write(&other, "exchang").expect("writable");
        fs::remove_file(&path).expect("removable");
        std::os::unix::fs::symlink(&other, &path).expect("writable");
        assert_eq!(take().as_ref(), Some(&digest), "the blob is what it was");
        assert_eq!(fs::read(&path).expect("linked again"), b"genuine");
        fs::write(&path, "exchang").expect("writable");
        assert_eq!(take(), None);
        assert!(!path.exists() && other.exists(), "it is out of the way, and what is not ours stays");
        assert!(matches!(arrive(b"exchang"), Err(Trouble::Damaged(_))));
        assert_eq!(repository.open_partial(&file).expect("writable").have, 0, "nothing of it is left");
    }

    #[test]
    fn what_is_on_its_way_is_one_processs_and_goes_on_from_where_it_was() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let repository = Repository::new(folder.path().join("models--a--b"));
        let file = listed("model.safetensors", b"0123456789");
        let mut first = repository.open_partial(&file).expect("writable");
        first.write(b"01234").expect("writable");
        assert!(matches!(repository.open_partial(&file), Err(Trouble::Busy { bytes: 5 })));
        drop(first);
        let mut second = repository.open_partial(&file).expect("writable");
        assert_eq!((second.have, second.missing()), (5, 5));
        second.write(b"56789").expect("writable");
        second.finish("c0", &file, &Stop::default()).expect("whole");
        // What is longer than the file is nothing of it.
        fs::write(repository.folder.join("blobs").join(format!("{}.part", git_blob_id(b"0123456789"))), [0; 11])
            .expect("writable");
        assert_eq!(repository.open_partial(&file).expect("writable").have, 0);
    }
}
