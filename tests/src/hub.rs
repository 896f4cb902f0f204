//! A server that speaks the Hugging Face hub's protocol as a reader sees it: revisions, listings in pages, small files by
//! a redirect within the hub, large ones by a redirect to a storage server or through Xet, gates, error codes. It has no
//! uploads, no accounts beyond two tokens, and it writes down every request.

mod answers;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use axum::Router;
use axum::extract::Request;
use axum::http::header;
use axum::response::Response;

use self::answers::{hub, refuse, storage};

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The hub answers everything with this status.
    Status(u16),
    /// The hub answers everything with this status, and says to come again after so many seconds.
    RetryAfter(u16, u64),
    /// The hub takes requests and never answers.
    Silence,
    /// A large file's connection is closed half-way.
    CutContent,
    /// The same, and from then on nothing goes wrong.
    CutContentOnce,
    /// A large file is answered with this status and a page of text.
    ContentStatus(u16),
    /// A small file is announced well, and then answered with this status and a page of text.
    SmallContentStatus(u16),
    /// A large file arrives with one bit flipped.
    FlippedContent,
}

/// How large files are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// By a redirect to a server that hands out ranges.
    Redirect,
    /// By a redirect to a server that knows no ranges.
    RedirectWhole,
    /// In chunks, through Xet's protocol.
    Xet,
}

/// One of the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// The one that `HF_ENDPOINT` names.
    Hub,
    /// The one that the hub sends readers to for large files.
    Storage,
}

/// A request as it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Who was asked.
    pub server: Server,
    /// For example `GET`.
    pub method: String,
    /// Without the query.
    pub path: String,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// The `Range` header.
    pub range: Option<String>,
    /// When it came.
    pub at: Instant,
}

/// The server; it ends with the value.
#[derive(Debug)]
pub struct Hub {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    storage_address: SocketAddr,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// By `models/owner/name` or `datasets/owner/name`.
    repositories: HashMap<String, Repository>,
    /// Large files by SHA-256.
    large: HashMap<String, Vec<u8>>,
    fault: Fault,
    storage: Storage,
    received: Vec<Received>,
}

#[derive(Debug, Default)]
struct Repository {
    /// Commit of each branch.
    branches: HashMap<String, String>,
    /// Files of each commit.
    commits: HashMap<String, BTreeMap<String, Vec<u8>>>,
    gated: bool,
}

impl Repository {
    fn commit(&self, revision: &str) -> Option<(&str, &BTreeMap<String, Vec<u8>>)> {
        let commit = self.branches.get(revision).map_or(revision, String::as_str);
        self.commits.get_key_value(commit).map(|(commit, files)| (commit.as_str(), files))
    }
}

impl Hub {
    /// A token of an account that every gate lets in.
    pub const TOKEN: &str = "hf_TokenOfTheHarnessThatNobodyMayPrint";
    /// A token of an account that no gate lets in.
    pub const TOKEN_WITHOUT_ACCESS: &str = "hf_TokenWithoutAccessThatNobodyMayPrint";

    /// Starts it without any repository.
    pub fn start() -> Self {
        Self::start_at("127.0.0.1:0")
    }

    /// Starts it at an address, such as one where there was [`Hub::nobody`].
    pub fn start_at(address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime for the hub");
        let address = address.trim_start_matches("http://");
        let bind = |address: &str| runtime.block_on(tokio::net::TcpListener::bind(address)).expect("a free port");
        let (hub, storage) = (bind(address), bind("127.0.0.1:0"));
        let address = hub.local_addr().expect("a bound socket");
        let state = State {
            repositories: HashMap::new(),
            large: HashMap::new(),
            fault: Fault::None,
            storage: Storage::Redirect,
            received: Vec::new(),
        };
        let storage_address = storage.local_addr().expect("a bound socket");
        let shared = Arc::new(Shared { address, storage_address, state: Mutex::new(state) });
        for (listener, server) in [(hub, Server::Hub), (storage, Server::Storage)] {
            let shared = Arc::clone(&shared);
            let router = Router::new().fallback(move |request: Request| answer(Arc::clone(&shared), server, request));
            // It serves until the runtime is gone; nothing waits for its result.
            runtime.spawn(async move { axum::serve(listener, router).await });
        }
        Self { address, shared, runtime: Some(runtime) }
    }

    /// What `HF_ENDPOINT` is set to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// An endpoint where nobody listens.
    pub fn nobody() -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        format!("http://{}", listener.local_addr().expect("a bound socket"))
    }

    /// Makes a commit of what lies in `folder` and moves the branch of `models/owner/name` or `datasets/owner/name` to
    /// it; gives the commit.
    pub fn publish(&self, repository: &str, branch: &str, folder: &Path) -> String {
        let mut files = BTreeMap::new();
        read_folder(folder, "", &mut files);
        let content: Vec<u8> =
            files.iter().flat_map(|(path, bytes)| [path.as_bytes(), bytes.as_slice()].concat()).collect();
        let commit = sha256(&content)[..40].to_owned();
        let mut state = self.shared.state();
        for bytes in files.iter().filter(|(path, _)| is_large(path)).map(|(_, bytes)| bytes) {
            state.large.insert(sha256(bytes), bytes.clone());
        }
        let repository = state.repositories.entry(repository.to_owned()).or_default();
        repository.commits.insert(commit.clone(), files);
        repository.branches.insert(branch.to_owned(), commit.clone());
        commit
    }

    /// From now on the files of a repository are for accounts that accepted its licence.
    pub fn gate(&self, repository: &str) {
        self.shared.state().repositories.get_mut(repository).expect("published before").gated = true;
    }

    /// From now on this goes wrong.
    pub fn set_fault(&self, fault: Fault) {
        self.shared.state().fault = fault;
    }

    /// From now on large files are handed out like this.
    pub fn set_storage(&self, storage: Storage) {
        self.shared.state().storage = storage;
    }

    /// How many requests came since the last [`Hub::take_received`].
    pub fn requests(&self) -> usize {
        self.shared.state().received.len()
    }

    /// Requests since the last call, in the order they came.
    pub fn take_received(&self) -> Vec<Received> {
        std::mem::take(&mut self.shared.state().received)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // Requests that are never answered must not keep a test waiting.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no request panics")
    }
}

fn read_folder(folder: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable")) {
        let name = format!("{prefix}{}", entry.file_name().to_str().expect("UTF-8"));
        if entry.path().is_dir() {
            read_folder(&entry.path(), &format!("{name}/"), files);
        } else {
            files.insert(name, fs::read(entry.path()).expect("readable"));
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    trainer::store::files::digest_of(bytes).trim_start_matches("sha256:").to_owned()
}

fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors")
}

async fn answer(shared: Arc<Shared>, server: Server, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let authorization = header_text(&request, &header::AUTHORIZATION);
    let range = header_text(&request, &header::RANGE);
    let fault = {
        let mut state = shared.state();
        let method = request.method().to_string();
        let (path, authorization) = (path.clone(), authorization.clone());
        state.received.push(Received { server, method, path, authorization, range, at: Instant::now() });
        state.fault
    };
    match (server, fault) {
        (Server::Hub, Fault::Silence) => std::future::pending().await,
        (Server::Hub, Fault::Status(status)) => refuse((status, None, "this is said to everyone")),
        (Server::Hub, Fault::RetryAfter(status, seconds)) => {
            let mut response = refuse((status, None, "come again"));
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            response
        }
        (Server::Hub, _) => hub(&shared, &request, &path, authorization.as_deref()).unwrap_or_else(refuse),
        (Server::Storage, _) => storage(&shared, request.headers(), &path, fault),
    }
}

fn header_text(request: &Request, name: &header::HeaderName) -> Option<String> {
    let value = request.headers().get(name)?;
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
}
