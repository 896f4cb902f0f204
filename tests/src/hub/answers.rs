//! What the hub and its storage answer.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use trainer::source::git_blob_id;

use super::{Fault, Hub, Shared, Storage, is_large, sha256};

/// Entries per page of a listing: few, so that a small repository has several.
const PAGE: usize = 4;

/// What a chunk of Xet holds at most.
const CHUNK: usize = 64 * 1024;

/// Status, code and message of an error.
type Refusal = (u16, Option<&'static str>, &'static str);

/// An error as the hub tells it: its code in a header where it has one, and words that a client must not repeat.
pub(super) fn refuse((status, code, message): Refusal) -> Response {
    let mut builder = Response::builder().status(status).header("X-Error-Message", message);
    if let Some(code) = code {
        builder = builder.header("X-Error-Code", code);
    }
    let body = json!({"error": format!("{message}, {}, {}", Hub::TOKEN, Hub::TOKEN_WITHOUT_ACCESS)});
    builder.body(body.to_string().into()).expect("a response")
}

pub(super) fn hub(
    shared: &Shared,
    request: &Request,
    path: &str,
    authorization: Option<&str>,
) -> Result<Response, Refusal> {
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
        "tree" => tree(files, &rest, request, &format!("http://{}{path}", shared.address), state.storage),
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
            let etag = format!("\"{}\"", git_blob_id(&bytes));
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
    storage: Storage,
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
            _ if is_large(path) => {
                // In git there is a pointer to it.
                let (digest, size) = (sha256(bytes), bytes.len());
                let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n");
                let large = json!({"oid": digest, "size": size, "pointerSize": pointer.len()});
                let oid = git_blob_id(pointer.as_bytes());
                let mut entry = json!({"type": "file", "oid": oid, "size": size, "path": path, "lfs": large});
                if storage == Storage::Xet {
                    entry["xetHash"] = digest.into();
                }
                entry
            }
            _ => json!({"type": "file", "oid": git_blob_id(bytes), "size": bytes.len(), "path": path}),
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

pub(super) fn storage(shared: &Shared, headers: &HeaderMap, path: &str, fault: Fault) -> Response {
    let mut state = shared.state();
    if fault == Fault::CutContentOnce {
        state.fault = Fault::None;
    }
    let (verb, digest) = path.trim_start_matches('/').rsplit_once('/').unwrap_or_default();
    let Some(bytes) = state.large.get(digest) else { return refuse((404, None, "no such content")) };
    match verb {
        "large" => match range(headers).filter(|_| state.storage != Storage::RedirectWhole) {
            Some((start, _)) if start >= bytes.len() => refuse((416, None, "beyond the end")),
            Some((start, _)) => {
                let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
                let mut response = content(bytes[start..].to_vec(), fault);
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                response.headers_mut().insert(header::CONTENT_RANGE, range.parse().expect("a header"));
                response
            }
            None => content(bytes.clone(), fault),
        },
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
        Fault::CutContent | Fault::CutContentOnce => {
            bytes.truncate(length / 2);
            // The header promises more than comes. What comes is on its way before the connection is closed: a body that has
            // nothing yet lets it go.
            let half = stream::once(async { Ok(bytes) });
            let end = stream::once(async {
                tokio::task::yield_now().await;
                Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
            });
            let body = Body::from_stream(half.chain(end));
            Response::builder().header(header::CONTENT_LENGTH, length).body(body).expect("a response")
        }
        Fault::ContentStatus(status) => refuse((status, None, "the storage is not well")),
        Fault::FlippedContent => {
            bytes[length / 2] ^= 1;
            Response::new(bytes.into())
        }
        Fault::None | Fault::Status(_) | Fault::RetryAfter(..) | Fault::Silence | Fault::SmallContentStatus(_) => {
            Response::new(bytes.into())
        }
    }
}

fn range(headers: &HeaderMap) -> Option<(usize, usize)> {
    let value = headers.get(header::RANGE)?.to_str().ok()?;
    let (start, end) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((start.parse().ok()?, end.parse().unwrap_or(usize::MAX)))
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
