//! The Hugging Face hub. A branch or tag is pinned to its commit first; the files wanted at that commit are fetched into
//! the cache that `huggingface_hub` uses too, and each is compared with the hub's listing. Nothing is uploaded, and a
//! server's own words are never repeated: they may hold what should not be seen.

mod settings;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crds::exit::ExitCode;
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFError, HFRepositorySync, RepoType};

pub use self::settings::HubSettings;
use self::watch::{SignsOfLife, watched};
use super::{Fetched, MODEL_TEXTS};
use crate::checkpoint::{digest_file, write_atomically};

/// Which file holds which tensor, where there are several.
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// Why the hub did not give what was asked for, and what it means for the job.
#[derive(Debug)]
pub(super) struct Refusal {
    pub message: String,
    pub exit: ExitCode,
}

impl Refusal {
    fn unavailable(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit: ExitCode::SourceUnavailable }
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit: ExitCode::InputNotFound }
    }
}

/// Fetches what is read of a model; the path is a folder.
pub(super) fn fetch_model(owner: &str, name: &str, revision: &str, settings: &HubSettings) -> Result<Fetched, Refusal> {
    let repository = settings.client()?.model(owner, name);
    let resolve = {
        let repository = repository.clone();
        move |revision| repository.info().revision(revision).expand(vec!["sha".into()]).send().map(|info| info.sha)
    };
    let request = Request::new("models", owner, name, revision, settings);
    let fetched = fetch(repository, request, settings, resolve, None, |listed| {
        let (read, left): (Vec<Listed>, Vec<Listed>) = listed.into_iter().partition(|file| is_read(&file.path));
        if read.iter().any(|file| is_weights(&file.path)) {
            return Ok(read);
        }
        let pickles = [".bin", ".pt", ".pth", ".gguf"];
        let left = left.iter().map(|file| file.path.as_str());
        let found: Vec<&str> = left.filter(|path| pickles.iter().any(|end| path.ends_with(end))).collect();
        let found = if found.is_empty() { String::new() } else { format!(", only {}", found.join(", ")) };
        let message = format!("no model*.safetensors in the repository{found}; only safetensors weights are read");
        Err(Refusal::not_found(message))
    })?;
    // A snapshot that broke off is a folder too.
    let mut names = fs::read_dir(&fetched.path).into_iter().flatten().flatten().map(|entry| entry.file_name());
    if names.any(|name| name.to_str().is_some_and(is_weights)) {
        Ok(fetched)
    } else {
        Err(Refusal::not_found(NOT_IN_THE_CACHE))
    }
}

/// Fetches one file of a dataset.
pub(super) fn fetch_file(
    owner: &str,
    name: &str,
    file: &str,
    revision: &str,
    settings: &HubSettings,
) -> Result<Fetched, Refusal> {
    let repository = settings.client()?.dataset(owner, name);
    let resolve = {
        let repository = repository.clone();
        move |revision| repository.info().revision(revision).expand(vec!["sha".into()]).send().map(|info| info.sha)
    };
    let request = Request::new("datasets", owner, name, revision, settings);
    let parent = file.rsplit_once('/').map(|(parent, _)| parent.to_owned());
    let wanted = file.to_owned();
    let folder = fetch(repository, request, settings, resolve, parent, move |listed| {
        let names: Vec<&str> = listed.iter().map(|file| file.path.as_str()).take(10).collect();
        let message = format!("no file {wanted} in the repository; beside it are {}", names.join(", "));
        let found: Vec<Listed> = listed.into_iter().filter(|file| file.path == wanted).collect();
        if found.is_empty() { Err(Refusal::not_found(message)) } else { Ok(found) }
    })?;
    let path = folder.path.join(file);
    if path.is_file() { Ok(Fetched { path, ..folder }) } else { Err(Refusal::not_found(NOT_IN_THE_CACHE)) }
}

/// Fetches what `choose` takes of the files in `folder`; the path is the snapshot's.
fn fetch<T: RepoType>(
    repository: HFRepositorySync<T>,
    request: Request,
    settings: &HubSettings,
    resolve: impl FnOnce(String) -> Result<Option<String>, HFError> + Send + 'static,
    folder: Option<String>,
    choose: impl FnOnce(Vec<Listed>) -> Result<Vec<Listed>, Refusal> + Send + 'static,
) -> Result<Fetched, Refusal> {
    if settings.offline {
        return request.cached(&repository);
    }
    watched(settings.patience, move |signs| {
        let commit = request.commit(resolve)?;
        signs.fetch_add(1, Ordering::Relaxed);
        let listed = request.list(&repository, &commit, folder)?;
        for file in choose(listed)? {
            signs.fetch_add(1, Ordering::Relaxed);
            request.download(&repository, &commit, &file, signs)?;
        }
        request.fetched(commit)
    })
}

/// Weights that are read lie in the repository's root and are named as transformers names them: other folders and names
/// hold the same model for other programs, at the same size.
fn is_weights(path: &str) -> bool {
    path.starts_with("model") && path.ends_with(".safetensors") && !path.contains('/')
}

pub(super) fn is_read(path: &str) -> bool {
    path == WEIGHTS_INDEX || MODEL_TEXTS.contains(&path) || is_weights(path)
}

/// A file as the hub lists it.
struct Listed {
    path: String,
    size: u64,
}

/// A repository at a revision, with what the hub's answers are explained by.
struct Request {
    /// The repository's folder in the cache.
    folder: PathBuf,
    /// The repository's page, for people.
    page: String,
    revision: String,
    with_token: bool,
    /// A model's files may lie in folders of it; a dataset may have more folders than anybody wants listed.
    is_model: bool,
}

impl Request {
    fn new(kind: &str, owner: &str, name: &str, revision: &str, settings: &HubSettings) -> Self {
        let prefix = if kind == "datasets" { "datasets/" } else { "" };
        Self {
            folder: settings.cache.join(format!("{kind}--{owner}--{name}")),
            page: format!("{}/{prefix}{owner}/{name}", settings.endpoint),
            revision: revision.to_owned(),
            with_token: settings.token.is_some(),
            is_model: kind == "models",
        }
    }

    /// The snapshot in the cache.
    fn cached<T: RepoType>(&self, repository: &HFRepositorySync<T>) -> Result<Fetched, Refusal> {
        let snapshot = repository.snapshot_download().revision(&self.revision).local_files_only(true).send();
        let path = snapshot.map_err(|error| self.explain(&error))?;
        Ok(Fetched { revision: path.file_name().map(|name| name.to_string_lossy().into_owned()), path })
    }

    /// The commit that the revision is now: a branch may move while its files are fetched.
    fn commit(&self, resolve: impl FnOnce(String) -> Result<Option<String>, HFError>) -> Result<String, Refusal> {
        let is_commit = |text: &str| text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_commit(&self.revision) {
            return Ok(self.revision.clone());
        }
        let commit = resolve(self.revision.clone()).map_err(|error| self.explain(&error))?;
        commit.filter(|commit| is_commit(commit)).ok_or_else(|| Refusal::unavailable(NOT_A_HUB))
    }

    /// The files of one folder.
    fn list<T: RepoType>(
        &self,
        repository: &HFRepositorySync<T>,
        commit: &str,
        folder: Option<String>,
    ) -> Result<Vec<Listed>, Refusal> {
        let entries =
            repository.list_tree().revision(commit).maybe_path_in_repo(folder).recursive(self.is_model).send();
        let file = |entry| match entry {
            RepoTreeEntry::File { path, size, .. } => Some(Listed { path, size }),
            RepoTreeEntry::Directory { .. } => None,
        };
        Ok(entries.map_err(|error| self.explain(&error))?.into_iter().filter_map(file).collect())
    }

    /// Makes sure that the cache holds a file as it is listed. hf-hub stores whatever answers its download, error pages
    /// too, and what is in the cache once is never asked for again.
    fn download<T: RepoType>(
        &self,
        repository: &HFRepositorySync<T>,
        commit: &str,
        file: &Listed,
        signs: &Arc<AtomicU64>,
    ) -> Result<(), Refusal> {
        let target = self.folder.join("snapshots").join(commit).join(&file.path);
        let has_size = || fs::metadata(&target).is_ok_and(|metadata| metadata.len() == file.size);
        let io = |source| self.explain(&HFError::Io(source));
        if has_size() {
            return Ok(());
        }
        remove(&target).map_err(io)?;
        let progress = SignsOfLife { all: Arc::clone(signs), bytes: AtomicU64::new(0) };
        let downloaded = repository.download_file().filename(&file.path).revision(commit).progress(progress).send();
        downloaded.map_err(|error| self.explain(&error))?;
        if has_size() && has_digest(&target).map_err(io)? {
            return Ok(());
        }
        remove(&target).map_err(io)?;
        let message = format!("{} arrived damaged and was thrown away; try again", file.path);
        Err(Refusal::unavailable(message))
    }

    /// Tells the cache what the revision is, for the next time without a network, once all files are there.
    fn fetched(&self, commit: String) -> Result<Fetched, Refusal> {
        if self.revision != commit {
            let reference = self.folder.join("refs").join(&self.revision);
            fs::create_dir_all(reference.parent().unwrap_or(&self.folder))
                .and_then(|()| write_atomically(&reference, commit.as_bytes()))
                .map_err(|source| self.explain(&HFError::Io(source)))?;
        }
        Ok(Fetched { path: self.folder.join("snapshots").join(&commit), revision: Some(commit) })
    }

    /// What happened and what to do.
    fn explain(&self, error: &HFError) -> Refusal {
        let answer = match error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context }
            | HFError::RateLimited { context, .. } => Some(context),
            HFError::RepoNotFound { context, .. }
            | HFError::RevisionNotFound { context, .. }
            | HFError::EntryNotFound { context, .. } => context.as_ref(),
            _ => None,
        };
        if let Some(answer) = answer {
            return self.explain_answer(answer.status.as_u16(), answer.error_code.as_deref());
        }
        match error {
            HFError::LocalEntryNotFound { .. } => Refusal::not_found(NOT_IN_THE_CACHE),
            HFError::EntryNotFound { path, .. } => Refusal::not_found(format!("no file {path} in the repository")),
            HFError::Io(source) => Refusal {
                message: format!("the hub's cache cannot be used ({source}); free space or set HF_HUB_CACHE"),
                exit: ExitCode::CannotWrite,
            },
            HFError::CacheLockTimeout { .. } => {
                Refusal::unavailable("another process fetches the same file; try again when it is done")
            }
            HFError::Request { source, .. } if source.is_connect() => Refusal::unavailable(
                "the hub cannot be reached; check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use the cache",
            ),
            HFError::Request { source, .. } if is_not_json(source) => Refusal::unavailable(NOT_A_HUB),
            HFError::Request { .. } | HFError::Xet { .. } => {
                Refusal::unavailable("the connection broke off; try again, files that are complete are kept")
            }
            _ => Refusal::unavailable(NOT_A_HUB),
        }
    }

    /// The hub's own code says more than the status: a missing repository is 401 to strangers.
    fn explain_answer(&self, status: u16, code: Option<&str>) -> Refusal {
        let Self { page, revision, .. } = self;
        let denied = |message: String| Refusal { message, exit: ExitCode::AccessDenied };
        match (status, code) {
            (_, Some("GatedRepo")) if self.with_token => denied(format!(
                "gated, and the account of the token has no access; accept the licence at {page}, or set HF_TOKEN to a \
                 token of an account that did"
            )),
            (_, Some("GatedRepo")) => denied(format!(
                "gated, and there is no token; accept the licence at {page} and set HF_TOKEN to a token of that account"
            )),
            (_, Some("RevisionNotFound")) => Refusal::not_found(format!(
                "no revision {revision}; expected a branch, tag or commit of the repository"
            )),
            (_, Some("EntryNotFound")) => Refusal::not_found("no such file or folder in the repository"),
            (_, Some("RepoNotFound")) | (404, _) if self.with_token => Refusal::not_found(
                "no such repository, or a private one that the token does not open; check owner and name",
            ),
            (401, _) if self.with_token => {
                denied("the hub does not accept the token; set HF_TOKEN to a valid one".into())
            }
            (_, Some("RepoNotFound")) | (401 | 404, _) => {
                Refusal::not_found("no such repository, or a private one that needs HF_TOKEN; check owner and name")
            }
            (403, _) => denied(format!("the hub refuses access; see {page}")),
            (429, _) => Refusal::unavailable("the hub limits the rate of requests; try again later"),
            _ => Refusal::unavailable(format!("the hub answered with status {status}; try again later")),
        }
    }
}

const NOT_A_HUB: &str = "the answer is not a hub's; check HF_ENDPOINT";

const NOT_IN_THE_CACHE: &str =
    "not in the local cache, and HF_HUB_OFFLINE forbids fetching it; unset it, or fetch it once";

fn is_not_json(error: &dyn std::error::Error) -> bool {
    error.source().is_some_and(<dyn std::error::Error>::is::<serde_json::Error>)
}

/// Removes a file of a snapshot: the link and what it points to.
fn remove(target: &Path) -> std::io::Result<()> {
    let Ok(blob) = fs::canonicalize(target) else { return Ok(()) };
    fs::remove_file(target)?;
    if blob.exists() { fs::remove_file(blob) } else { Ok(()) }
}

/// The cache names a large file by its SHA-256; what names a small one is git's SHA-1, which says little.
fn has_digest(target: &Path) -> std::io::Result<bool> {
    let blob = fs::canonicalize(target)?;
    let name = blob.file_name().unwrap_or_default().to_string_lossy();
    Ok(name.len() != 64 || digest_file(&blob)? == format!("sha256:{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_for_other_programs_are_left() {
        let read = ["model.safetensors", "model-00001-of-00002.safetensors", "config.json", "tokenizer.json"];
        let left =
            ["consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin", "model.py", "a/config.json"];
        assert!(read.iter().all(|path| is_read(path)));
        assert!(!left.iter().any(|path| is_read(path)));
    }
}
