//! From URIs to files: `file://` is used in place, `hf://` is fetched through the hub's cache at a pinned commit. Only
//! weights, configuration and tokenizer files are taken from a model; never pickles, never code.

use std::path::{Path, PathBuf};

use crds::exit::ExitCode;
use hf_hub::{HFClientSync, HFError};

/// A source could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file.
    #[error("{field}: {} does not exist; expected {expected}", path.display())]
    NotFound {
        /// The field of the resource.
        field: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
    },
    /// The URI is not one that is fetched.
    #[error("{field}: found {uri}, expected {expected}")]
    Uri {
        /// The field of the resource.
        field: &'static str,
        /// As written, without its query.
        uri: String,
        /// What is possible.
        expected: &'static str,
    },
    /// The hub gave no answer, or not the wanted one.
    #[error("{field}: {uri}: {message}")]
    Hub {
        /// The field of the resource.
        field: &'static str,
        /// As written.
        uri: String,
        /// What happened and what to do.
        message: String,
        /// What it means for the job.
        exit: ExitCode,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::NotFound { .. } => ExitCode::InputNotFound,
            Self::Uri { .. } => ExitCode::BadConfiguration,
            Self::Hub { exit, .. } => *exit,
        }
    }
}

/// How the hub is reached. The token is not printed.
#[derive(Clone, Default)]
pub struct HubSettings {
    /// `HF_ENDPOINT`.
    pub endpoint: Option<String>,
    /// `HF_TOKEN`.
    pub token: Option<String>,
    /// `HF_HUB_CACHE`.
    pub cache: Option<PathBuf>,
    /// `HF_HUB_OFFLINE`: only what is in the cache.
    pub offline: bool,
}

impl std::fmt::Debug for HubSettings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish()
    }
}

/// A file or folder, and the commit that it was fetched from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Where it is.
    pub path: PathBuf,
    /// Commit of a hub repository.
    pub revision: Option<String>,
}

/// What is taken from a model's repository.
const MODEL_FILES: [&str; 9] = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
];

/// The folder of a base model.
pub fn fetch_model(uri: &str, revision: Option<&str>, settings: &HubSettings) -> Result<Fetched, Error> {
    const FIELD: &str = "spec.model.uri";
    if let Some(path) = local_path(uri) {
        return existing(FIELD, path, Path::is_dir, "a folder with config.json, safetensors weights and a tokenizer");
    }
    let (owner, name, rest) = hub_repository(FIELD, uri, "hf://")?;
    if !rest.is_empty() {
        return Err(Error::Uri { field: FIELD, uri: uri.into(), expected: "hf://owner/name or file://path" });
    }
    let failed = |error: &HFError| hub_error(FIELD, uri, error, settings);
    let client = client(settings).map_err(|error| failed(&error))?;
    let folder = client
        .model(owner, name)
        .snapshot_download()
        .revision(revision.unwrap_or("main"))
        .allow_patterns(MODEL_FILES.map(str::to_owned).to_vec())
        .local_files_only(settings.offline)
        .send()
        .map_err(|error| failed(&error))?;
    Ok(Fetched { revision: commit_of(&folder), path: folder })
}

/// A file of rows.
pub fn fetch_rows(field: &'static str, uri: &str, settings: &HubSettings) -> Result<Fetched, Error> {
    if let Some(path) = local_path(uri) {
        return existing(field, path, Path::is_file, "a file of JSON lines");
    }
    let (owner, name, file) = hub_repository(field, uri, "hf://datasets/")?;
    if file.is_empty() {
        let expected = "hf://datasets/owner/name/path/to/file.jsonl or file://path";
        return Err(Error::Uri { field, uri: uri.into(), expected });
    }
    let failed = |error: &HFError| hub_error(field, uri, error, settings);
    let client = client(settings).map_err(|error| failed(&error))?;
    let path = client
        .dataset(owner, name)
        .download_file()
        .filename(file)
        .local_files_only(settings.offline)
        .send()
        .map_err(|error| failed(&error))?;
    Ok(Fetched { revision: commit_of(&path), path })
}

fn local_path(uri: &str) -> Option<PathBuf> {
    uri.strip_prefix("file://").map(PathBuf::from)
}

fn existing(
    field: &'static str,
    path: PathBuf,
    is_it: fn(&Path) -> bool,
    expected: &'static str,
) -> Result<Fetched, Error> {
    if is_it(&path) { Ok(Fetched { path, revision: None }) } else { Err(Error::NotFound { field, path, expected }) }
}

/// Owner, name and what follows.
fn hub_repository<'a>(field: &'static str, uri: &'a str, prefix: &str) -> Result<(&'a str, &'a str, &'a str), Error> {
    let parts = uri.strip_prefix(prefix).map(|rest| rest.splitn(3, '/').collect::<Vec<_>>());
    match parts.as_deref() {
        Some([owner, name]) if !owner.is_empty() && !name.is_empty() => Ok((owner, name, "")),
        Some([owner, name, rest]) if !owner.is_empty() && !name.is_empty() => Ok((owner, name, rest)),
        _ => Err(Error::Uri {
            field,
            uri: uri.into(),
            expected: "hf://owner/name (datasets: hf://datasets/owner/name/file) or file://path",
        }),
    }
}

fn client(settings: &HubSettings) -> Result<HFClientSync, HFError> {
    let mut builder = hf_hub::HFClientBuilder::new();
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.endpoint(endpoint.clone());
    }
    if let Some(token) = &settings.token {
        builder = builder.token(token.clone());
    }
    if let Some(cache) = &settings.cache {
        builder = builder.cache_dir(cache.clone());
    }
    builder.build_sync()
}

/// The commit in a path of the hub's cache: `…/snapshots/<commit>/…`.
fn commit_of(path: &Path) -> Option<String> {
    let mut parts = path.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    parts.find(|part| part == "snapshots").and_then(|_| parts.next())
}

/// Fixed sentences: what a server said is not repeated, it may hold what should not be seen.
fn hub_error(field: &'static str, uri: &str, error: &HFError, settings: &HubSettings) -> Error {
    let repository = uri.trim_start_matches("hf://");
    let (message, exit) = match error {
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            let token = if settings.token.is_some() { "the token in HF_TOKEN was not accepted" } else { "no HF_TOKEN is set" };
            let message = format!(
                "the hub refuses access ({token}); if the model is gated, accept its licence at https://huggingface.co/{repository} \
                 and set HF_TOKEN to a token of that account"
            );
            (message, ExitCode::AccessDenied)
        }
        HFError::RepoNotFound { .. } => {
            ("no such repository, or a private one that needs HF_TOKEN; check owner and name".to_owned(), ExitCode::InputNotFound)
        }
        HFError::RevisionNotFound { revision, .. } => {
            (format!("no revision {revision}; expected a branch, tag or commit of the repository"), ExitCode::InputNotFound)
        }
        HFError::EntryNotFound { path, .. } => (format!("no file {path} in the repository"), ExitCode::InputNotFound),
        HFError::LocalEntryNotFound { .. } => (
            "not in the local cache, and HF_HUB_OFFLINE forbids fetching it; unset it, or fetch the model once".to_owned(),
            ExitCode::InputNotFound,
        ),
        HFError::RateLimited { .. } => ("the hub limits the rate of requests; try again later".to_owned(), ExitCode::SourceUnavailable),
        HFError::Io(source) => (format!("the hub's cache cannot be used ({source})"), ExitCode::CannotWrite),
        HFError::Http { context } => {
            (format!("the hub answered with status {}; try again later", context.status.as_u16()), ExitCode::SourceUnavailable)
        }
        _ => (
            "the hub cannot be reached or its answer is not understood; check the network and HF_ENDPOINT, and try again".to_owned(),
            ExitCode::SourceUnavailable,
        ),
    };
    Error::Hub { field, uri: uri.into(), message, exit }
}
