//! From the run directory to `output.uri`: the output is copied beside its destination, compared by digest, and renamed
//! into place. What is there already is replaced only if the same job left it: anything else is somebody's.

#[cfg(test)]
mod tests;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crds::exit::ExitCode;
use crds::run::JobIdentity;

use crate::ground::stop::Stop;
use crate::source::{self, Claims, Place, place};
use crate::store::checkpoint::run_of_another;
use crate::store::files::{digest_file, sync_folder};

const FIELD: &str = "spec.output.uri";
/// Says whose output a folder is.
const MARKER: &str = ".finetune-output.json";

/// The output could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URI is not one that can be written to.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// Something that is not ours is there.
    #[error("{FIELD}: {uri}: {found} is there already, which this job did not write; choose another path or remove it")]
    Occupied {
        /// The destination.
        uri: String,
        /// What was found.
        found: String,
    },
    /// What lies there is trusted by others.
    #[error("{FIELD}: {uri}: lies in {place}; choose a path that is no part of it")]
    Reserved {
        /// The destination.
        uri: String,
        /// What it lies in.
        place: String,
    },
    /// It cannot be written.
    #[error("{FIELD}: {uri}: cannot be written ({source}); free space, or give a claim that can be written to")]
    Write {
        /// The destination.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// What was written is not what was read.
    #[error("{FIELD}: {uri}: {name} did not arrive as it was written; the volume damages files")]
    Damaged {
        /// The destination.
        uri: String,
        /// The file.
        name: String,
    },
    /// A stop was asked for.
    #[error("stopped while the output was copied; nothing was replaced")]
    Stopped,
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Source(error) => error.exit(),
            Self::Reserved { .. } => ExitCode::BadConfiguration,
            Self::Occupied { .. } | Self::Write { .. } | Self::Damaged { .. } => ExitCode::CannotWrite,
            Self::Stopped => ExitCode::Preempted,
        }
    }
}

/// The same job, or an earlier one of its name: who deletes a job and makes it again wants the new result.
fn replaces(job: &JobIdentity, earlier: &JobIdentity) -> bool {
    earlier.uid == job.uid || (earlier.name == job.name && earlier.namespace == job.namespace)
}

/// A destination that may be written.
pub struct Destination<'a> {
    uri: &'a str,
    job: &'a JobIdentity,
    folder: PathBuf,
}

impl<'a> Destination<'a> {
    /// Looks at the destination before anything is made for it.
    pub fn open(uri: &'a str, job: &'a JobIdentity, claims: &Claims) -> Result<Self, Error> {
        let expected = "pvc://claim/path of a folder";
        let refuse = || Error::Source(source::Error::Uri { field: FIELD, uri: uri.into(), expected });
        let place = place(FIELD, uri, claims)?.ok_or_else(refuse)?;
        if place.path == place.root {
            // The folder of a mount cannot be renamed over.
            return Err(refuse());
        }
        let folder = below(&place, uri)?;
        if let Some(place) = reserved(&place.root, &folder) {
            return Err(Error::Reserved { uri: uri.into(), place });
        }
        // What another run keeps in its folder it believes: the model that it fetched, the rows that it prepared.
        let within = folder.ancestors().take_while(|ancestor| ancestor.starts_with(&place.root));
        if let Some(other) = within.into_iter().find_map(|ancestor| run_of_another(ancestor, &job.uid)) {
            return Err(Error::Occupied { uri: uri.into(), found: format!("the run of another job ({other})") });
        }
        let destination = Self { uri, job, folder };
        match destination.occupant()? {
            None => Ok(destination),
            Some(found) => Err(Error::Occupied { uri: uri.into(), found }),
        }
    }

    fn failed(&self) -> impl Fn(io::Error) -> Error {
        let uri = self.uri.to_owned();
        move |source| Error::Write { uri: uri.clone(), source }
    }

    /// What is there and must stay.
    fn occupant(&self) -> Result<Option<String>, Error> {
        let metadata = match fs::symlink_metadata(&self.folder) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed()(error)),
        };
        if !metadata.is_dir() {
            return Ok(Some("a file".into()));
        }
        if let Ok(bytes) = fs::read(self.folder.join(MARKER))
            && let Ok(earlier) = serde_json::from_slice::<JobIdentity>(&bytes)
        {
            let other = || format!("the output of job {} ({})", earlier.name, earlier.uid);
            return Ok((!replaces(self.job, &earlier)).then(other));
        }
        let is_empty = fs::read_dir(&self.folder).map_err(self.failed())?.next().is_none();
        Ok((!is_empty).then(|| "a folder with files".into()))
    }

    /// Copies `output` into place.
    pub fn fill(&self, output: &Path, stop: &Stop) -> Result<(), Error> {
        let (parent, name) = (self.folder.parent(), self.folder.file_name());
        let (parent, name) = parent.zip(name).expect("a path below a claim's folder");
        fs::create_dir_all(parent).map_err(self.failed())?;
        let prefix = format!(".{}.{}-", name.to_string_lossy(), self.job.uid);
        remove_leftovers(parent, &prefix);
        let temporary = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .map_err(self.failed())?;
        self.copy(output, temporary.path(), stop)?;
        let marker = serde_json::to_vec(self.job).expect("an identity is JSON");
        let written = fs::write(temporary.path().join(MARKER), marker)
            .and_then(|()| File::open(temporary.path().join(MARKER))?.sync_all())
            .and_then(|()| sync_folder(temporary.path()));
        written.map_err(self.failed())?;
        if stop.requested() {
            return Err(Error::Stopped);
        }
        self.replace(&temporary.keep(), &parent.join(format!("{prefix}old"))).map_err(self.failed())?;
        sync_folder(parent).map_err(self.failed())
    }

    fn replace(&self, new: &Path, old: &Path) -> io::Result<()> {
        let is_there = self.folder.exists();
        if is_there {
            fs::rename(&self.folder, old)?;
        }
        if let Err(error) = fs::rename(new, &self.folder) {
            if is_there {
                fs::rename(old, &self.folder)?;
            }
            let _ = fs::remove_dir_all(new);
            return Err(error);
        }
        // What is left of it is nobody's output any more.
        let _ = fs::remove_dir_all(old);
        Ok(())
    }

    fn copy(&self, from: &Path, to: &Path, stop: &Stop) -> Result<(), Error> {
        for entry in fs::read_dir(from).map_err(self.failed())? {
            if stop.requested() {
                return Err(Error::Stopped);
            }
            let entry = entry.map_err(self.failed())?;
            let (source, target) = (entry.path(), to.join(entry.file_name()));
            if entry.file_type().map_err(self.failed())?.is_dir() {
                fs::create_dir(&target).map_err(self.failed())?;
                self.copy(&source, &target, stop)?;
                continue;
            }
            fs::copy(&source, &target)
                .and_then(|_| fs::set_permissions(&target, Permissions::from_mode(0o644)))
                .and_then(|()| File::open(&target)?.sync_all())
                .map_err(self.failed())?;
            let digests = digest_file(&source).and_then(|source| Ok((source, digest_file(&target)?)));
            let (expected, found) = digests.map_err(self.failed())?;
            if found != expected {
                let name = entry.file_name().to_string_lossy().into_owned();
                return Err(Error::Damaged { uri: self.uri.into(), name });
            }
        }
        sync_folder(to).map_err(self.failed())
    }
}

/// The folder that a place leads to, links resolved as far as it exists; it must stay in the claim.
fn below(place: &Place, uri: &str) -> Result<PathBuf, Error> {
    let mut missing = Vec::new();
    let mut existing = place.path.as_path();
    while fs::symlink_metadata(existing).is_err() {
        let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else { break };
        missing.push(name);
        existing = parent;
    }
    let mut folder = fs::canonicalize(existing).map_err(|source| Error::Write { uri: uri.into(), source })?;
    if !folder.starts_with(&place.root) || folder == place.root && missing.is_empty() {
        return Err(source::Error::LeavesClaim { field: FIELD, uri: uri.into() }.into());
    }
    folder.extend(missing.into_iter().rev());
    Ok(folder)
}

/// What a run leaves in its directory for its other stages and attempts.
const OF_A_RUN: [&str; 5] = ["attempts", "checkpoints", "output", "prepared", "reports"];

/// The part of the claim that `folder` lies in and that jobs read and trust: the hub's cache, or a run's own files.
fn reserved(root: &Path, folder: &Path) -> Option<String> {
    let mut around = root.to_path_buf();
    for part in folder.strip_prefix(root).ok()? {
        let name = part.to_string_lossy();
        let is_cache = around.join("blobs").is_dir() && around.join("snapshots").is_dir();
        if is_cache || name == ".huggingface" || name == ".locks" {
            return Some("the cache of the model hub".into());
        }
        let is_run = around.join("attempts").is_dir() || around.join("sources.json").is_file();
        let is_its_own = OF_A_RUN.contains(&&*name) || name.starts_with("checkpoints-") || name.starts_with('.');
        if is_run && is_its_own {
            return Some(format!("the files of a run ({name})"));
        }
        around.push(part);
    }
    None
}

/// What attempts of this job left that died while they copied.
fn remove_leftovers(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            // What cannot be removed is nobody's output.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
