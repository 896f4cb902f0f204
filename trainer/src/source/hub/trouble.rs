//! What goes wrong with a hub, and what is told of it: to whoever runs the trainer by hand, who can set variables and try
//! again, and to whoever reads the status of a job in a cluster, who can do neither.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crds::exit::ExitCode;

use super::{HubSettings, Reader};

/// Why the hub did not give what was asked for, and what it means for the job.
#[derive(Debug)]
pub(in crate::source) struct Refusal {
    pub message: String,
    pub exit: ExitCode,
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answerer {
    Hub,
    /// Where the hub sends readers for content.
    Storage,
}

/// What went wrong.
#[derive(Debug)]
pub(super) enum Trouble {
    /// No connection.
    Unreachable,
    /// A connection, and nothing through it for so long.
    Silent(Duration),
    /// A connection that ended in the middle.
    BrokenOff,
    /// An answer of refusal.
    Answer {
        status: u16,
        /// The hub's own word for it.
        code: Option<String>,
        by: Answerer,
        /// When to come again.
        retry_after: Option<Duration>,
    },
    /// An answer that no hub gives.
    NotAHub,
    /// A file that the hub lists and does not have.
    ListedAndGone(String),
    /// A file that is not what the hub says it is.
    Damaged(String),
    /// Another process fetches the same file, and has so much of it.
    Busy { bytes: u64 },
    /// What was asked for is not in the repository.
    NotThere(String),
    /// There is no hub to ask, and the cache has it not.
    NotInTheCache,
    /// There is no hub to ask, and the cache has something else.
    DamagedInTheCache(PathBuf),
    /// The cache cannot be used.
    Io { path: PathBuf, source: io::Error },
    /// The endpoint is no address.
    BadEndpoint,
    /// No connection can be set up at all.
    NoClient,
    /// A stop was asked for.
    Stopped,
}

impl Trouble {
    /// Whether it may pass by itself.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::Unreachable
            | Self::Silent(_)
            | Self::BrokenOff
            | Self::NotAHub
            | Self::ListedAndGone(_)
            | Self::Damaged(_)
            | Self::Busy { .. } => true,
            // A link to content is good for a while only.
            Self::Answer { status, by, .. } => matches!(status, 408 | 425 | 429 | 500..) || *by == Answerer::Storage,
            Self::NotThere(_)
            | Self::NotInTheCache
            | Self::DamagedInTheCache(_)
            | Self::Io { .. }
            | Self::BadEndpoint
            | Self::NoClient
            | Self::Stopped => false,
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Answer { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What happened, without what to do.
    pub(super) fn what(&self) -> String {
        match self {
            Self::Unreachable => "the hub cannot be reached".into(),
            Self::Silent(patience) => format!("the hub has been silent for {} s", patience.as_secs()),
            Self::BrokenOff => "the connection broke off".into(),
            Self::Answer { status: 429, by: Answerer::Hub, .. } => "the hub limits the rate of requests".into(),
            Self::Answer { status, by: Answerer::Hub, .. } => format!("the hub answered with status {status}"),
            Self::Answer { status, by: Answerer::Storage, .. } => {
                format!("the storage that the hub sends to answered with status {status}")
            }
            Self::NotAHub => "the answer is not a hub's".into(),
            Self::ListedAndGone(file) => format!("the hub lists {file} and does not have it"),
            Self::Damaged(file) => format!("{file} arrived damaged and was thrown away"),
            Self::Busy { .. } => "another process fetches the same file".into(),
            Self::NotThere(what) => what.clone(),
            Self::NotInTheCache => "not in the local cache".into(),
            Self::DamagedInTheCache(path) => format!("{}: damaged in the cache", path.display()),
            Self::Io { path, source } => format!("the hub's cache cannot be used ({}: {source})", path.display()),
            Self::BadEndpoint => "expected http(s)://host without user and password".into(),
            Self::NoClient => "no connection to the hub can be set up".into(),
            Self::Stopped => "stopped while sources were fetched; what has arrived is kept".into(),
        }
    }

    /// What happened and what to do. `page` is the repository's, for people.
    pub(super) fn explain(&self, page: &str, revision: &str, settings: &HubSettings) -> Refusal {
        let what = self.what();
        let refusal = |exit, message: String| Refusal { message, exit };
        match self {
            Self::Answer { status, code, .. } if !self.passes() => {
                explain_answer(*status, code.as_deref(), page, revision, settings)
            }
            Self::NotThere(_) => refusal(ExitCode::InputNotFound, what),
            Self::NotInTheCache => {
                let advice = match settings.reader {
                    Reader::Person if settings.offline => {
                        ", and HF_HUB_OFFLINE forbids fetching it; unset it, or fetch it once"
                    }
                    Reader::Person | Reader::Cluster => "",
                };
                refusal(ExitCode::InputNotFound, what + advice)
            }
            Self::DamagedInTheCache(_) => refusal(
                ExitCode::InputNotFound,
                format!("{what}, and no hub may be asked; unset HF_HUB_OFFLINE to fetch it again"),
            ),
            Self::Io { .. } => {
                let advice = match settings.reader {
                    Reader::Person => "free space or set HF_HUB_CACHE",
                    Reader::Cluster => "free space on the volume, or give the job a larger one (checkpoint.storage)",
                };
                refusal(ExitCode::CannotWrite, format!("{what}; {advice}"))
            }
            Self::BadEndpoint => {
                let name = settings.reader.endpoint();
                refusal(ExitCode::BadConfiguration, format!("{name} is not usable; {what}"))
            }
            Self::Stopped => refusal(ExitCode::Preempted, what),
            _ => refusal(ExitCode::SourceUnavailable, format!("{what}; {}", self.remedy(settings))),
        }
    }

    /// What to do about what did not pass by itself.
    fn remedy(&self, settings: &HubSettings) -> String {
        let is_elsewhere = matches!(self, Self::Unreachable | Self::Silent(_) | Self::NotAHub | Self::NoClient);
        match settings.reader {
            // The status says when the next attempt is made.
            Reader::Cluster => {
                let mirror = "; where the cluster has a mirror of the hub, its administrator names it in the profile (hub.endpoint)";
                format!(
                    "it was waited for, and the operator tries again by itself; what has arrived is kept{}",
                    if is_elsewhere { mirror } else { "" }
                )
            }
            Reader::Person => match self {
                Self::Unreachable | Self::NoClient => {
                    "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use the cache"
                }
                Self::Silent(_) => "try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
                Self::BrokenOff => "try again, what has arrived is kept",
                Self::NotAHub => "check HF_ENDPOINT",
                Self::Busy { .. } => "try again when it is done",
                Self::Damaged(_) => "try again",
                _ => "try again later",
            }
            .to_owned(),
        }
    }
}

/// The hub's own code says more than the status: a missing repository is 401 to strangers.
fn explain_answer(status: u16, code: Option<&str>, page: &str, revision: &str, settings: &HubSettings) -> Refusal {
    let denied = |message: String| Refusal { message, exit: ExitCode::AccessDenied };
    let not_found = |message: String| Refusal { message, exit: ExitCode::InputNotFound };
    let with_token = settings.token.is_some();
    // Jobs of a cluster are given no token yet.
    let in_cluster = settings.reader == Reader::Cluster && !with_token;
    let elsewhere = "jobs in this cluster have no token of the hub; put the files on a claim (pvc://), or have the profile name \
                     a mirror that gives them (hub.endpoint)";
    match (status, code) {
        (_, Some("GatedRepo")) if in_cluster => denied(format!("gated; {elsewhere}")),
        (_, Some("GatedRepo")) if with_token => denied(format!(
            "gated, and the account of the token has no access; accept the licence at {page}, or set HF_TOKEN to a token of an \
             account that did"
        )),
        (_, Some("GatedRepo")) => denied(format!(
            "gated, and there is no token; accept the licence at {page} and set HF_TOKEN to a token of that account"
        )),
        (_, Some("RevisionNotFound")) => {
            not_found(format!("no revision {revision}; expected a branch, tag or commit of the repository"))
        }
        (_, Some("EntryNotFound")) => not_found("no such file or folder in the repository".into()),
        (_, Some("RepoNotFound")) | (404, _) if with_token => {
            not_found("no such repository, or a private one that the token does not open; check owner and name".into())
        }
        (401, _) if with_token => denied("the hub does not accept the token; set HF_TOKEN to a valid one".into()),
        (_, Some("RepoNotFound")) | (401 | 404, _) if in_cluster => {
            not_found(format!("no such repository, or a private one; check owner and name: {elsewhere}"))
        }
        (_, Some("RepoNotFound")) | (401 | 404, _) => {
            not_found("no such repository, or a private one that needs HF_TOKEN; check owner and name".into())
        }
        (403, _) => denied(format!("the hub refuses access; see {page}")),
        _ => Refusal {
            message: format!(
                "the hub answered with status {status}, which is none of a hub; check {}",
                settings.reader.endpoint()
            ),
            exit: ExitCode::SourceUnavailable,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every() -> Vec<Trouble> {
        let answer = |status, code: Option<&str>, by| Trouble::Answer {
            status,
            code: code.map(str::to_owned),
            by,
            retry_after: None,
        };
        let io = Trouble::Io { path: "/data/x".into(), source: io::Error::from(io::ErrorKind::StorageFull) };
        let mut every = vec![
            Trouble::Unreachable,
            Trouble::Silent(Duration::from_mins(1)),
            Trouble::BrokenOff,
            Trouble::NotAHub,
            Trouble::ListedAndGone("config.json".into()),
            Trouble::Damaged("config.json".into()),
            Trouble::Busy { bytes: 1 },
            Trouble::NotThere("no file x in the repository".into()),
            Trouble::NotInTheCache,
            io,
            Trouble::BadEndpoint,
            Trouble::NoClient,
            Trouble::Stopped,
        ];
        for by in [Answerer::Hub, Answerer::Storage] {
            for status in [401, 403, 404, 418, 429, 500, 503] {
                for code in [None, Some("GatedRepo"), Some("RepoNotFound"), Some("RevisionNotFound")] {
                    every.push(answer(status, code, by));
                }
            }
        }
        every
    }

    /// Who reads a status cannot set the variables of a pod.
    #[test]
    fn a_job_in_a_cluster_is_not_told_to_set_variables() {
        let settings = HubSettings { reader: Reader::Cluster, ..HubSettings::read(|_| None) };
        for trouble in every() {
            let Refusal { message, exit } = trouble.explain("https://hub/acme/tiny", "main", &settings);
            for word in ["HF_", "Ctrl-C", "try again"] {
                assert!(!message.contains(word), "{trouble:?}: {message}");
            }
            if exit == ExitCode::SourceUnavailable && trouble.passes() {
                assert!(message.contains("the operator tries again by itself"), "{trouble:?}: {message}");
            }
            if matches!(trouble, Trouble::Unreachable | Trouble::Silent(_) | Trouble::NotAHub) {
                assert!(message.contains("hub.endpoint"), "{message}");
            }
        }
    }

    #[test]
    fn a_full_volume_is_told_with_its_place() {
        let source = io::Error::from_raw_os_error(libc::ENOSPC);
        let trouble = Trouble::Io { path: "/data/.huggingface/hub/models--a--b/blobs/x.part".into(), source };
        let told = |reader| {
            let settings = HubSettings { reader, ..HubSettings::read(|_| None) };
            trouble.explain("https://hub/a/b", "main", &settings)
        };
        for (reader, advice) in [(Reader::Person, "set HF_HUB_CACHE"), (Reader::Cluster, "free space on the volume")] {
            let Refusal { message, exit } = told(reader);
            assert_eq!(exit, ExitCode::CannotWrite);
            for words in ["/data/.huggingface/hub/models--a--b/blobs/x.part: No space left on device", advice] {
                assert!(message.contains(words), "{message}");
            }
        }
    }

    #[test]
    fn what_passes_by_itself_is_told_with_one_code() {
        let settings = HubSettings::read(|_| None);
        for trouble in every() {
            let Refusal { message, exit } = trouble.explain("https://hub/acme/tiny", "main", &settings);
            if trouble.passes() {
                assert_eq!(exit, ExitCode::SourceUnavailable, "{trouble:?}: {message}");
            }
            assert!(!message.contains("hub.endpoint"), "{message}");
        }
    }
}
