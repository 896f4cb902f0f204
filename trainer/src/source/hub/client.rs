//! What is asked of the hub, with the token only where it belongs: the hub itself.

use std::future::Future;
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, HeaderMap, LINK, RANGE, RETRY_AFTER};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::cache::{Digest, Partial};
use super::outage::Progress;
use super::trouble::{Answerer, Trouble};
use super::{HubSettings, Kind, Request};

/// Pages of a listing that are read: more files than any model or folder of rows has.
const MOST_PAGES: usize = 1000;

/// A file as the hub lists it.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub path: String,
    pub size: u64,
    pub digest: Digest,
    /// Whether its content is stored in chunks that Xet hands out.
    pub in_xet: bool,
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

/// An entry of a listing.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    lfs: Option<LargeFile>,
    #[serde(default, rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct LargeFile {
    /// SHA-256 of the content.
    #[serde(alias = "sha256")]
    oid: String,
}

impl Entry {
    fn file(self) -> Option<Result<Listed, Trouble>> {
        if self.kind != "file" {
            return None;
        }
        let name = self.lfs.as_ref().map_or(&self.oid, |large| &large.oid);
        let digest = Digest::from_name(name).ok_or(Trouble::NotAHub);
        let in_xet = self.xet_hash.is_some();
        Some(digest.map(|digest| Listed { path: self.path, size: self.size, digest, in_xet }))
    }
}

pub(super) struct Client {
    http: reqwest::Client,
    endpoint: Url,
    token: Option<String>,
    /// How long the hub may be silent.
    patience: Duration,
}

impl Client {
    pub(super) fn new(settings: &HubSettings) -> Result<Self, Trouble> {
        let host = settings.endpoint.strip_prefix("https://").or_else(|| settings.endpoint.strip_prefix("http://"));
        let is_usable = host.is_some_and(|host| !host.is_empty() && !host.contains('@'));
        let endpoint = Url::parse(&settings.endpoint).ok().filter(|_| is_usable).ok_or(Trouble::BadEndpoint)?;
        let agent = concat!("finetune-trainer/", env!("CARGO_PKG_VERSION"));
        let http = reqwest::Client::builder().user_agent(agent).connect_timeout(settings.patience).build();
        let http = http.map_err(|_| Trouble::NoClient)?;
        Ok(Self { http, endpoint, token: settings.token.clone(), patience: settings.patience })
    }

    /// The commit that a revision is now.
    pub(super) async fn commit(&self, request: &Request) -> Result<String, Trouble> {
        let mut url = self.url(&request.api(&["revision", &request.revision]));
        url.set_query(Some("expand=sha"));
        let (revision, _): (Revision, _) = self.json(url).await?;
        if super::is_commit(&revision.sha) { Ok(revision.sha) } else { Err(Trouble::NotAHub) }
    }

    /// The files of one folder; of a model, whose folders are few, those below too.
    pub(super) async fn list(
        &self,
        request: &Request,
        commit: &str,
        folder: Option<&str>,
    ) -> Result<Vec<Listed>, Trouble> {
        let folders = folder.map(|folder| folder.split('/').collect::<Vec<_>>()).unwrap_or_default();
        let mut url = self.url(&request.api(&[&["tree", commit], folders.as_slice()].concat()));
        url.set_query((request.kind == Kind::Model).then_some("recursive=true"));
        let mut listed = Vec::new();
        for _ in 0..MOST_PAGES {
            let (entries, next): (Vec<Entry>, _) = self.json(url).await?;
            for file in entries.into_iter().filter_map(Entry::file) {
                listed.push(file?);
            }
            match next {
                Some(next) => url = next,
                None => return Ok(listed),
            }
        }
        Err(Trouble::NotAHub)
    }

    /// Adds what is missing of a file.
    pub(super) async fn download(
        &self,
        request: &Request,
        commit: &str,
        file: &Listed,
        partial: &mut Partial<'_>,
        progress: &Progress,
    ) -> Result<(), Trouble> {
        let url = self.url(&request.content(commit, &file.path));
        let range = (partial.have > 0).then(|| format!("bytes={}-", partial.have));
        let mut response = match self.get(url, range.as_deref()).await {
            // What is there is longer than the content that the server has.
            Err(Trouble::Answer { status: 416, .. }) => {
                partial.restart()?;
                return Err(Trouble::BrokenOff);
            }
            // It was listed: a hub that denies it now is not well.
            Err(Trouble::Answer { status: 404, .. }) => return Err(Trouble::ListedAndGone(file.path.clone())),
            answered => answered?,
        };
        if !continues(&response, partial.have) {
            partial.restart()?;
        }
        if response.content_length().is_some_and(|length| length != partial.missing()) {
            return Err(Trouble::Damaged(file.path.clone()));
        }
        while let Some(bytes) = self.patiently(response.chunk()).await? {
            if bytes.len() as u64 > partial.missing() {
                partial.restart()?;
                return Err(Trouble::Damaged(file.path.clone()));
            }
            partial.write(&bytes)?;
            progress.bytes(partial.have);
        }
        if partial.missing() > 0 { Err(Trouble::BrokenOff) } else { Ok(()) }
    }

    fn url(&self, parts: &[String]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(parts);
        }
        url
    }

    /// An answer, and where the next page of it is.
    async fn json<T: DeserializeOwned>(&self, url: Url) -> Result<(T, Option<Url>), Trouble> {
        let mut response = self.get(url, None).await?;
        let next = next_page(response.headers());
        let mut body = Vec::new();
        while let Some(bytes) = self.patiently(response.chunk()).await? {
            body.extend_from_slice(&bytes);
        }
        let value = serde_json::from_slice(&body).map_err(|_| Trouble::NotAHub)?;
        Ok((value, next))
    }

    /// An answer that is none of refusal. A redirect to another host is followed without the token.
    async fn get(&self, url: Url, range: Option<&str>) -> Result<Response, Trouble> {
        let mut request = self.http.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some(token) = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header(RANGE, range);
        }
        let response = self.patiently(request.send()).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let by = if response.url().origin() == self.endpoint.origin() { Answerer::Hub } else { Answerer::Storage };
        let retry_after = header(RETRY_AFTER.as_str()).and_then(seconds_or_date);
        let code = header("x-error-code").map(str::to_owned);
        Err(Trouble::Answer { status: response.status().as_u16(), code, by, retry_after })
    }

    async fn patiently<T>(&self, answer: impl Future<Output = reqwest::Result<T>>) -> Result<T, Trouble> {
        match tokio::time::timeout(self.patience, answer).await {
            Err(_) => Err(Trouble::Silent(self.patience)),
            Ok(answer) => answer.map_err(|error| match error {
                error if error.is_connect() && error.is_timeout() => Trouble::Silent(self.patience),
                error if error.is_connect() => Trouble::Unreachable,
                error if error.is_builder() || error.is_redirect() => Trouble::NotAHub,
                _ => Trouble::BrokenOff,
            }),
        }
    }
}

/// Whether the answer is what follows the first `have` bytes; a server may send all of them again.
fn continues(response: &Response, have: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
    response.status() == StatusCode::PARTIAL_CONTENT && start == Some(have)
}

fn next_page(headers: &HeaderMap) -> Option<Url> {
    let links = headers.get(LINK)?.to_str().ok()?;
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Url::parse(next.split_once('<')?.1.split_once('>')?.0).ok()
}

/// `Retry-After`, either way that it may be written.
fn seconds_or_date(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(value).ok()?.timestamp();
    Duration::try_from(date.duration_since(jiff::Timestamp::now())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_when_to_come_again_in_seconds_or_by_a_date() {
        assert_eq!(seconds_or_date(" 120 "), Some(Duration::from_mins(2)));
        let soon = seconds_or_date("Wed, 21 Oct 2122 07:28:00 GMT").expect("a date to come");
        assert!(soon > Duration::from_hours(24), "{soon:?}");
        for nothing in ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1", ""] {
            assert_eq!(seconds_or_date(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn the_next_page_is_where_the_answer_says() {
        let headers = |link: &str| HeaderMap::from_iter([(LINK, link.parse().expect("a header"))]);
        let next = |link: &str| next_page(&headers(link)).map(String::from);
        assert_eq!(
            next("<http://a/x?c=1>; rel=\"prev\", <http://a/x?c=3>; rel=\"next\"").as_deref(),
            Some("http://a/x?c=3")
        );
        assert_eq!(next("<http://a/x?c=1>; rel=\"prev\""), None);
    }

    #[test]
    fn a_large_file_is_listed_by_its_content_and_a_small_one_as_git_calls_it() {
        let (sha256, git) = ("b".repeat(64), "a".repeat(40));
        let entries = serde_json::json!([
            {"type": "directory", "oid": git, "size": 0, "path": "onnx"},
            {"type": "file", "oid": git, "size": 5, "path": "config.json"},
            {"type": "file", "oid": git, "size": 9, "path": "model.safetensors", "xetHash": "x",
             "lfs": {"oid": sha256, "size": 9, "pointerSize": 135}},
        ]);
        let entries: Vec<Entry> = serde_json::from_value(entries).expect("entries");
        let listed: Vec<Listed> =
            entries.into_iter().filter_map(|entry| Some(entry.file()?.expect("a digest"))).collect();
        let found: Vec<_> = listed.iter().map(|file| (&file.digest, file.in_xet)).collect();
        assert_eq!(found, [(&Digest::Git(git), false), (&Digest::Sha256(sha256), true)]);
    }
}
