//! From URIs to files: `file://` and `pvc://` are used in place, `hf://` is fetched through the hub's cache at a pinned commit. Only
//! weights, configuration and tokenizer files are taken from a model; never pickles, never code.

mod claim;
mod hub;

use std::path::{Path, PathBuf};

use crds::exit::ExitCode;

use crate::ground::stop::Stop;

pub use claim::{Claims, Place, place};
pub use hub::{HubSettings, Reader, git_blob_id};

/// What decides how a model's weights are used and a text is tokenised: read beside the weights, as far as it is there.
pub const MODEL_TEXTS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
];

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
    /// A place in a claim cannot be used.
    #[error("{field}: {uri}: {message}")]
    Claim {
        /// The field of the resource.
        field: &'static str,
        /// As written.
        uri: String,
        /// The system's words.
        message: String,
    },
    /// A link leads out of the claim.
    #[error("{field}: {uri} leads out of the claim; put the file itself there")]
    LeavesClaim {
        /// The field of the resource.
        field: &'static str,
        /// What leads out.
        uri: String,
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
            Self::NotFound { .. } | Self::Claim { .. } => ExitCode::InputNotFound,
            Self::LeavesClaim { .. } => ExitCode::AccessDenied,
            Self::Uri { .. } => ExitCode::BadConfiguration,
            Self::Hub { exit, .. } => *exit,
        }
    }
}

/// A file or folder, and the commit that it was fetched from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Where it is.
    pub path: PathBuf,
    /// Commit of a hub repository.
    pub revision: Option<String>,
    /// Digests of the files that were compared with what the hub says of them.
    pub digests: Vec<(PathBuf, String)>,
}

/// What sources are reached through.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// How the hub is reached.
    pub hub: &'a HubSettings,
    /// Where claims are mounted.
    pub claims: &'a Claims,
    /// The request to stop.
    pub stop: &'a Stop,
    /// Take what the cache has of a commit, without a network: the caller noted what it was, and compares.
    pub noted: bool,
}

const A_MODEL: &str = "a folder with config.json, safetensors weights and a tokenizer";
const ROWS: &str = "a file of JSON lines";

/// The folder of a base model.
pub fn fetch_model(uri: &str, revision: Option<&str>, access: Access) -> Result<Fetched, Error> {
    const FIELD: &str = "spec.model.uri";
    if let Some(place) = place(FIELD, uri, access.claims)? {
        let fetched = existing(FIELD, claim::resolve(FIELD, uri, &place)?, Path::is_dir, A_MODEL)?;
        return claim::check_links(FIELD, uri, &place, &fetched.path).map(|()| fetched);
    }
    if let Some(path) = local_path(uri) {
        return existing(FIELD, path, Path::is_dir, A_MODEL);
    }
    let (owner, name, rest) = hub_repository(FIELD, uri, "hf://")?;
    if !rest.is_empty() {
        return Err(Error::Uri {
            field: FIELD,
            uri: uri.into(),
            expected: "hf://owner/name, pvc://claim/path or file://path",
        });
    }
    let revision = revision.unwrap_or("main");
    if !is_plain(revision) {
        let expected = "a branch, tag or commit";
        return Err(Error::Uri { field: "spec.model.revision", uri: revision.into(), expected });
    }
    hub::fetch_model(owner, name, revision, access).map_err(|refusal| refused(FIELD, uri, refusal))
}

/// A file of rows; `revision` is a commit that an earlier attempt took.
pub fn fetch_rows(field: &'static str, uri: &str, revision: Option<&str>, access: Access) -> Result<Fetched, Error> {
    if let Some(place) = place(field, uri, access.claims)? {
        return existing(field, claim::resolve(field, uri, &place)?, Path::is_file, ROWS);
    }
    if let Some(path) = local_path(uri) {
        return existing(field, path, Path::is_file, ROWS);
    }
    let (owner, name, file) = hub_repository(field, uri, "hf://datasets/")?;
    if file.is_empty() {
        let expected = "hf://datasets/owner/name/path/to/file.jsonl, pvc://claim/path or file://path";
        return Err(Error::Uri { field, uri: uri.into(), expected });
    }
    hub::fetch_file(owner, name, file, revision.unwrap_or("main"), access)
        .map_err(|refusal| refused(field, uri, refusal))
}

fn refused(field: &'static str, uri: &str, refusal: hub::Refusal) -> Error {
    Error::Hub { field, uri: uri.into(), message: refusal.message, exit: refusal.exit }
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
    if is_it(&path) {
        Ok(Fetched { path, revision: None, digests: Vec::new() })
    } else {
        Err(Error::NotFound { field, path, expected })
    }
}

/// Owner, name and the path that follows. They become parts of addresses and of paths in the cache.
fn hub_repository<'a>(field: &'static str, uri: &'a str, prefix: &str) -> Result<(&'a str, &'a str, &'a str), Error> {
    let parts: Vec<&str> = uri.strip_prefix(prefix).unwrap_or_default().splitn(3, '/').collect();
    let is_name =
        |name: &str| is_plain(name) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    match parts.as_slice() {
        [owner, name] if is_name(owner) && is_name(name) => Ok((owner, name, "")),
        [owner, name, rest] if is_name(owner) && is_name(name) && is_plain(rest) => Ok((owner, name, rest)),
        _ => Err(Error::Uri {
            field,
            uri: uri.into(),
            expected: "hf://owner/name (datasets: hf://datasets/owner/name/file), pvc://claim/path or file://path",
        }),
    }
}

/// Whether a path stays below the folder that it is joined to.
fn is_plain(path: &str) -> bool {
    path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}
