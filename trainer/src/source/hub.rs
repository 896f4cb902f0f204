//! The Hugging Face hub. A branch or tag is pinned to its commit first; the files wanted at that commit are fetched into
//! the cache that `huggingface_hub` uses too, and each is compared with the hub's listing. Nothing is uploaded, and a
//! server's own words are never repeated: they may hold what should not be seen.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use crds::exit::ExitCode;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClientSync, HFError, HFRepositorySync, RepoType};

use super::{Fetched, MODEL_TEXTS};
use crate::checkpoint::{digest_file, write_atomically};

/// Which file holds which tensor, where there are several.
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// How the hub is reached. The token is not printed.
#[derive(Clone)]
pub struct HubSettings {
    /// `HF_ENDPOINT`, without a slash at the end.
    pub endpoint: String,
    /// `HF_TOKEN`, or what `hf auth login` stored.
    pub token: Option<String>,
    /// `HF_HUB_CACHE`, or a folder of `HF_HOME`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE`: only what is in the cache.
    pub offline: bool,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`: how long the hub may be silent.
    pub patience: Duration,
}

impl HubSettings {
    /// From the variables that `huggingface_hub` reads, in its order of precedence.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let is_set = |name: &str| {
            variable(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()))
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
            cache.unwrap_or_else(std::env::temp_dir).join("huggingface")
        });
        let stored = || fs::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
        // A token from a file or a Secret often ends with a newline, and no header may.
        let trimmed = |token: String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = variable("HF_TOKEN").and_then(trimmed).or_else(|| stored().and_then(trimmed));
        Self {
            endpoint: variable("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |endpoint| endpoint.trim_end_matches('/').to_owned()),
            token: token.filter(|_| !is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN")),
            cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
            offline: is_set("HF_HUB_OFFLINE"),
            patience: variable("HF_HUB_DOWNLOAD_TIMEOUT")
                .and_then(|seconds| seconds.parse().ok())
                .filter(|&seconds| seconds > 0)
                .map_or(Duration::from_mins(1), Duration::from_secs),
        }
    }

    fn client(&self) -> Result<HFClientSync, Refusal> {
        let host = self.endpoint.strip_prefix("https://").or_else(|| self.endpoint.strip_prefix("http://"));
        if host.is_none_or(|host| host.is_empty() || host.contains('@')) {
            return Err(Refusal {
                message: "HF_ENDPOINT is not usable; expected http(s)://host without user and password".into(),
                exit: ExitCode::BadConfiguration,
            });
        }
        // Given even where it is the default: hf-hub would take an empty variable at its word.
        let builder = hf_hub::HFClientBuilder::new().endpoint(&self.endpoint).cache_dir(&self.cache);
        let builder = if let Some(token) = &self.token { builder.token(token) } else { builder };
        builder.build_sync().map_err(|_| Refusal::unavailable("no connection to the hub can be set up"))
    }
}

impl std::fmt::Debug for HubSettings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("patience", &self.patience)
            .finish()
    }
}

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

/// Counts what shows that a download moves.
struct SignsOfLife {
    all: Arc<AtomicU64>,
    /// Most bytes seen of this file: Xet reports at a fixed pace, whether bytes arrive or not.
    bytes: AtomicU64,
}

impl ProgressHandler for SignsOfLife {
    fn on_progress(&self, event: &ProgressEvent) {
        let bytes = match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                files.iter().map(|file| file.bytes_completed).sum()
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => *bytes_completed,
            _ => 0,
        };
        if self.bytes.fetch_max(bytes, Ordering::Relaxed) < bytes {
            self.all.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Runs `work` and gives up when it shows no sign of life for `patience`: hf-hub waits forever for a silent server, and
/// its client takes no limit. What hangs is left behind, as the process ends soon.
fn watched<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce(&Arc<AtomicU64>) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let signs = Arc::new(AtomicU64::new(0));
    let (sender, receiver) = channel();
    let worker = std::thread::spawn({
        let signs = Arc::clone(&signs);
        move || {
            // The receiver is gone only after the patience ended.
            let _ = sender.send(work(&signs));
        }
    });
    let mut seen = 0;
    loop {
        match receiver.recv_timeout(patience) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => match worker.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("a worker that ends well has sent its result"),
            },
            Err(RecvTimeoutError::Timeout) => {
                let now = signs.load(Ordering::Relaxed);
                if now == seen {
                    let seconds = patience.as_secs();
                    return Err(Refusal::unavailable(format!(
                        "the hub has been silent for {seconds} s; try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
                    )));
                }
                seen = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> HubSettings {
        let empty_is_unset = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned()).filter(|value| !value.is_empty())
        };
        HubSettings::read(empty_is_unset)
    }

    #[test]
    fn defaults_are_those_of_the_python_library() {
        let settings = read(&[("HOME", "/home/me"), ("HF_ENDPOINT", ""), ("HF_HUB_CACHE", "")]);
        assert_eq!(settings.endpoint, "https://huggingface.co");
        assert_eq!(settings.cache, Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!((settings.token, settings.offline, settings.patience), (None, false, Duration::from_mins(1)));
    }

    #[test]
    fn the_more_exact_variable_wins() {
        let caches: [(&[(&str, &str)], &str); 4] = [
            (&[("HF_HUB_CACHE", "/a"), ("HUGGINGFACE_HUB_CACHE", "/b"), ("HF_HOME", "/c")], "/a"),
            (&[("HUGGINGFACE_HUB_CACHE", "/b"), ("HF_HOME", "/c")], "/b"),
            (&[("HF_HOME", "/c"), ("XDG_CACHE_HOME", "/d")], "/c/hub"),
            (&[("XDG_CACHE_HOME", "/d"), ("HOME", "/e")], "/d/huggingface/hub"),
        ];
        for (variables, expected) in caches {
            assert_eq!(read(variables).cache, Path::new(expected), "{variables:?}");
        }
        for (value, expected) in [("1", true), ("True", true), ("0", false), ("false", false), ("", false)] {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value}");
        }
        for (value, expected) in [("5", 5), ("0", 60), ("soon", 60)] {
            let patience = read(&[("HF_HUB_DOWNLOAD_TIMEOUT", value)]).patience;
            assert_eq!(patience, Duration::from_secs(expected), "{value}");
        }
    }

    #[test]
    fn a_token_is_not_printed() {
        let settings = read(&[("HF_TOKEN", " hf_secret\n")]);
        assert_eq!(settings.token.as_deref(), Some("hf_secret"));
        assert!(!format!("{settings:?}").contains("secret"), "{settings:?}");
    }

    #[test]
    fn weights_for_other_programs_are_left() {
        let read = ["model.safetensors", "model-00001-of-00002.safetensors", "config.json", "tokenizer.json"];
        let left =
            ["consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin", "model.py", "a/config.json"];
        assert!(read.iter().all(|path| is_read(path)));
        assert!(!left.iter().any(|path| is_read(path)));
    }
}
