//! A server that speaks the Hugging Face hub's protocol as a reader sees it: revisions, listings in pages, small files by
//! a redirect within the hub, large ones by a redirect to a storage server or through Xet, gates, error codes. It has no
//! uploads, no accounts beyond two tokens, and it writes down every request.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

/// Entries per page of a listing: few, so that a small repository has several.
const PAGE: usize = 4;

/// What a chunk of Xet holds at most.
const CHUNK: usize = 64 * 1024;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The hub answers everything with this status.
    Status(u16),
    /// The hub takes requests and never answers.
    Silence,
    /// A large file's connection is closed half-way.
    CutContent,
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
    /// By a redirect.
    Redirect,
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
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime for the hub");
        let bind = || runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let (hub, storage) = (bind(), bind());
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
    trainer::checkpoint::digest_of(bytes).trim_start_matches("sha256:").to_owned()
}

fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors")
}

async fn answer(shared: Arc<Shared>, server: Server, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let fault = {
        let mut state = shared.state();
        let method = request.method().to_string();
        state.received.push(Received { server, method, path: path.clone(), authorization: authorization.clone() });
        state.fault
    };
    match (server, fault) {
        (Server::Hub, Fault::Silence) => std::future::pending().await,
        (Server::Hub, Fault::Status(status)) => refuse((status, None, "this is said to everyone")),
        (Server::Hub, _) => hub(&shared, &request, &path, authorization.as_deref()).unwrap_or_else(refuse),
        (Server::Storage, _) => storage(&shared, request.headers(), &path, fault),
    }
}

/// Status, code and message of an error.
type Refusal = (u16, Option<&'static str>, &'static str);

/// An error as the hub tells it: its code in a header where it has one, and words that a client must not repeat.
fn refuse((status, code, message): Refusal) -> Response {
    let mut builder = Response::builder().status(status).header("X-Error-Message", message);
    if let Some(code) = code {
        builder = builder.header("X-Error-Code", code);
    }
    let body = json!({"error": format!("{message}, {}, {}", Hub::TOKEN, Hub::TOKEN_WITHOUT_ACCESS)});
    builder.body(body.to_string().into()).expect("a response")
}

fn hub(shared: &Shared, request: &Request, path: &str, authorization: Option<&str>) -> Result<Response, Refusal> {
    let state = shared.state();
    let token = authorization.and_then(|value| value.strip_prefix("Bearer "));
    if authorization.is_some() && ![Some(Hub::TOKEN), Some(Hub::TOKEN_WITHOUT_ACCESS)].contains(&token) {
        return Err((401, None, "Invalid credentials in Authorization header"));
    }
    let decoded: Vec<String> = path.trim_start_matches('/').split('/').map(percent_decode).collect();
    let parts: Vec<&str> = decoded.iter().map(String::as_str).collect();
    let (kind, owner, name, verb, revision, rest) = match parts.as_slice() {
        ["api", "resolve-cache", kind, owner, name, commit, rest @ ..] => {
            (*kind, *owner, *name, "content", *commit, rest)
        }
        ["api", kind, owner, name, verb, revision, rest @ ..] => (*kind, *owner, *name, *verb, *revision, rest),
        ["datasets", owner, name, "resolve", revision, rest @ ..] => {
            ("datasets", *owner, *name, "resolve", *revision, rest)
        }
        [owner, name, "resolve", revision, rest @ ..] => ("models", *owner, *name, "resolve", *revision, rest),
        _ => return Err((404, None, "no such address")),
    };
    let rest = rest.join("/");
    let Some(repository) = state.repositories.get(&format!("{kind}/{owner}/{name}")) else {
        // Strangers are not told whether a repository is private or missing.
        return Err(match token {
            Some(_) => (404, Some("RepoNotFound"), "Repository not found"),
            None => (401, None, "Invalid username or password."),
        });
    };
    let Some((commit, files)) = repository.commit(revision) else {
        return Err((404, Some("RevisionNotFound"), "Invalid rev id"));
    };
    let file = || files.get(&rest).ok_or((404, Some("EntryNotFound"), "Entry not found"));
    let gate = || match token {
        _ if !repository.gated || token == Some(Hub::TOKEN) => Ok(()),
        Some(_) => Err((403, Some("GatedRepo"), "Access is restricted, ask for it")),
        None => Err((401, Some("GatedRepo"), "Access is restricted, you must be authenticated")),
    };
    match verb {
        "revision" => Ok(json_response(&json!({"_id": "1", "id": format!("{owner}/{name}"), "sha": commit}))),
        "tree" => tree(files, &rest, request, &format!("http://{}{path}", shared.address)),
        "resolve" => {
            gate()?;
            let bytes = file()?;
            let redirect = Response::builder().header("X-Repo-Commit", commit);
            let redirect = if is_large(&rest) {
                let digest = sha256(bytes);
                let redirect = redirect
                    .status(StatusCode::FOUND)
                    .header("X-Linked-Size", bytes.len())
                    .header("X-Linked-Etag", format!("\"{digest}\""))
                    .header(header::LOCATION, format!("http://{}/large/{digest}", shared.storage_address));
                if state.storage == Storage::Xet { redirect.header("X-Xet-Hash", digest) } else { redirect }
            } else {
                let location = format!("/api/resolve-cache/{kind}/{owner}/{name}/{commit}/{rest}");
                redirect.status(StatusCode::TEMPORARY_REDIRECT).header(header::LOCATION, location)
            };
            Ok(redirect.body(Body::empty()).expect("a response"))
        }
        "content" => {
            gate()?;
            let bytes = file()?.clone();
            if let (Fault::SmallContentStatus(status), &Method::GET) = (state.fault, request.method()) {
                return Err((status, None, "the hub is not well"));
            }
            let etag = format!("\"{}\"", &sha256(&bytes)[..40]);
            let response = Response::builder().header("X-Repo-Commit", commit).header(header::ETAG, etag);
            Ok(response.body(bytes.into()).expect("a response"))
        }
        "xet-read-token" => {
            gate()?;
            let address = format!("http://{}", shared.storage_address);
            let token = json!({"accessToken": "xet-access", "exp": 4_000_000_000_u64, "casUrl": address});
            Ok(json_response(&token))
        }
        _ => Err((404, None, "no such address")),
    }
}

fn json_response(value: &Value) -> Response {
    let builder = Response::builder().header(header::CONTENT_TYPE, "application/json");
    builder.body(value.to_string().into()).expect("a response")
}

fn percent_decode(part: &str) -> String {
    let mut pieces = part.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        bytes.push(u8::from_str_radix(&piece[..2], 16).expect("two hexadecimal digits"));
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).expect("UTF-8")
}

/// One page of the entries below `folder`; the next page is told in a header.
fn tree(
    files: &BTreeMap<String, Vec<u8>>,
    folder: &str,
    request: &Request,
    address: &str,
) -> Result<Response, Refusal> {
    let query = request.uri().query().unwrap_or_default();
    let recursive = query.contains("recursive=true");
    let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let mut entries: Vec<Value> = Vec::new();
    for (path, bytes) in files {
        let Some(below) = path.strip_prefix(&prefix) else { continue };
        let entry = match below.split_once('/') {
            Some((child, _)) if !recursive => {
                json!({"type": "directory", "oid": "0", "size": 0, "path": format!("{prefix}{child}")})
            }
            _ => json!({"type": "file", "oid": &sha256(bytes)[..40], "size": bytes.len(), "path": path}),
        };
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    if entries.is_empty() {
        return Err((404, Some("EntryNotFound"), "no such folder"));
    }
    let start: usize = query.split('&').find_map(|pair| pair.strip_prefix("cursor=")?.parse().ok()).unwrap_or(0);
    let page = &entries[start.min(entries.len())..entries.len().min(start + PAGE)];
    let mut response = json_response(&json!(page));
    if start + PAGE < entries.len() {
        let next = format!("<{address}?recursive={recursive}&cursor={}>; rel=\"next\"", start + PAGE);
        response.headers_mut().insert(header::LINK, next.parse().expect("a header"));
    }
    Ok(response)
}

fn storage(shared: &Shared, headers: &HeaderMap, path: &str, fault: Fault) -> Response {
    let state = shared.state();
    let (verb, digest) = path.trim_start_matches('/').rsplit_once('/').unwrap_or_default();
    let Some(bytes) = state.large.get(digest) else { return refuse((404, None, "no such content")) };
    match verb {
        "large" => content(bytes.clone(), fault),
        "v2/reconstructions" => {
            let (start, _) = range(headers).unwrap_or((0, usize::MAX));
            if start >= bytes.len() {
                return refuse((416, None, "beyond the end"));
            }
            let chunks = json!({"start": 0, "end": bytes.len().div_ceil(CHUNK)});
            let last = chunked(bytes).len() - 1;
            let address = format!("http://{}/chunks/{digest}", shared.storage_address);
            json_response(&json!({
                "offset_into_first_range": start,
                "terms": [{"hash": digest, "unpacked_length": bytes.len(), "range": chunks}],
                "xorbs": {digest: [{"url": address, "ranges": [{"chunks": chunks, "bytes": {"start": 0, "end": last}}]}]},
            }))
        }
        "chunks" => content(chunked(bytes), fault),
        _ => refuse((404, None, "no such address")),
    }
}

fn content(mut bytes: Vec<u8>, fault: Fault) -> Response {
    let length = bytes.len();
    match fault {
        Fault::CutContent => {
            bytes.truncate(length / 2);
            // A stream has no length of its own: the header promises more than comes, and the connection is closed.
            let half = Body::from_stream(Body::from(bytes).into_data_stream());
            Response::builder().header(header::CONTENT_LENGTH, length).body(half).expect("a response")
        }
        Fault::ContentStatus(status) => refuse((status, None, "the storage is not well")),
        Fault::FlippedContent => {
            bytes[length / 2] ^= 1;
            Response::new(bytes.into())
        }
        Fault::None | Fault::Status(_) | Fault::Silence | Fault::SmallContentStatus(_) => Response::new(bytes.into()),
    }
}

fn range(headers: &HeaderMap) -> Option<(usize, usize)> {
    let value = headers.get(header::RANGE)?.to_str().ok()?;
    let (start, end) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((start.parse().ok()?, end.parse().ok()?))
}

/// Xet's packing of a file: per chunk a header (version 0; packed length, 3 bytes; scheme 0, that is none; length, 3
/// bytes; little-endian) and the bytes.
fn chunked(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    for chunk in bytes.chunks(CHUNK) {
        let length = &u32::try_from(chunk.len()).expect("a small chunk").to_le_bytes()[..3];
        packed.extend_from_slice(&[&[0], length, &[0], length, chunk].concat());
    }
    packed
}
