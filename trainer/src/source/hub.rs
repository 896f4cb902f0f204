//! The Hugging Face hub. A branch or tag is pinned to its commit first; the files wanted at that commit are fetched into
//! the cache that `huggingface_hub` uses too. Whether it was there already or has just arrived, a file is believed by the
//! digest that the hub says it has, and by nothing else: others may write the cache. Outages are outlasted for a while, and
//! what broke off goes on from where it was. Nothing is uploaded, and a server's own words are never repeated: they may hold
//! what should not be seen.

mod cache;
mod client;
mod outage;
mod settings;
mod trouble;
mod xet;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use self::cache::Repository;
pub use self::cache::git_blob_id;
use self::client::{Client, Listed};
use self::outage::{Progress, outlast};
pub use self::settings::{HubSettings, Reader};
pub(super) use self::trouble::Refusal;
use self::trouble::Trouble;
use super::{Access, Fetched, MODEL_TEXTS};
use crate::ground::stop::Stop;

/// Which file holds which tensor, where there are several.
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// Fetches what is read of a model; the path is a folder.
pub(super) fn fetch_model(owner: &str, name: &str, revision: &str, access: Access) -> Result<Fetched, Refusal> {
    let request = Request::new(Kind::Model, owner, name, revision, access.hub);
    let fetched = request.fetch(access, None, &is_read, &|listed| {
        let (read, left): (Vec<Listed>, Vec<Listed>) = listed.into_iter().partition(|file| is_read(&file.path));
        if read.iter().any(|file| is_weights(&file.path)) {
            return Ok(read);
        }
        let pickles = [".bin", ".pt", ".pth", ".gguf"];
        let left = left.iter().map(|file| file.path.as_str());
        let found: Vec<&str> = left.filter(|path| pickles.iter().any(|end| path.ends_with(end))).collect();
        let found = if found.is_empty() { String::new() } else { format!(", only {}", found.join(", ")) };
        let message = format!("no model*.safetensors in the repository{found}; only safetensors weights are read");
        Err(Trouble::NotThere(message))
    })?;
    // A snapshot that broke off is a folder too.
    let mut names = fs::read_dir(&fetched.path).into_iter().flatten().flatten().map(|entry| entry.file_name());
    if names.any(|name| name.to_str().is_some_and(is_weights)) {
        Ok(fetched)
    } else {
        Err(request.explain(&Trouble::NotInTheCache, access.hub))
    }
}

/// Fetches one file of a dataset.
pub(super) fn fetch_file(
    owner: &str,
    name: &str,
    file: &str,
    revision: &str,
    access: Access,
) -> Result<Fetched, Refusal> {
    let request = Request::new(Kind::Dataset, owner, name, revision, access.hub);
    let parent = file.rsplit_once('/').map(|(parent, _)| parent);
    let folder = request.fetch(access, parent, &|path| path == file, &|listed| {
        let names: Vec<&str> = listed.iter().map(|file| file.path.as_str()).take(10).collect();
        let message = format!("no file {file} in the repository; beside it are {}", names.join(", "));
        let found: Vec<Listed> = listed.into_iter().filter(|listed| listed.path == file).collect();
        if found.is_empty() { Err(Trouble::NotThere(message)) } else { Ok(found) }
    })?;
    let path = folder.path.join(file);
    if path.is_file() {
        Ok(Fetched { path, ..folder })
    } else {
        Err(request.explain(&Trouble::NotInTheCache, access.hub))
    }
}

/// Weights that are read lie in the repository's root and are named as transformers names them: other folders and names
/// hold the same model for other programs, at the same size.
fn is_weights(path: &str) -> bool {
    path.starts_with("model") && path.ends_with(".safetensors") && !path.contains('/')
}

pub(super) fn is_read(path: &str) -> bool {
    path == WEIGHTS_INDEX || MODEL_TEXTS.contains(&path) || is_weights(path)
}

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Dataset,
}

/// A repository at a revision.
struct Request {
    kind: Kind,
    owner: String,
    name: String,
    revision: String,
    repository: Repository,
}

/// What an attempt leaves for the next one, which need not do it again.
#[derive(Default)]
struct Done {
    commit: Option<String>,
    /// Digest of each file that is in the cache and is what the hub says.
    files: BTreeMap<String, String>,
    /// Files that did not come through Xet.
    plain: BTreeSet<String>,
}

impl Request {
    fn new(kind: Kind, owner: &str, name: &str, revision: &str, settings: &HubSettings) -> Self {
        let plural = if kind == Kind::Model { "models" } else { "datasets" };
        Self {
            kind,
            owner: owner.to_owned(),
            name: name.to_owned(),
            revision: revision.to_owned(),
            repository: Repository::new(settings.cache.join(format!("{plural}--{owner}--{name}"))),
        }
    }

    fn explain(&self, trouble: &Trouble, settings: &HubSettings) -> Refusal {
        let prefix = if self.kind == Kind::Model { "" } else { "datasets/" };
        let page = format!("{}/{prefix}{}/{}", settings.endpoint, self.owner, self.name);
        trouble.explain(&page, &self.revision, settings)
    }

    /// Fetches what `choose` takes of the files in `folder`; the path is the snapshot's.
    fn fetch(
        &self,
        access: Access,
        folder: Option<&str>,
        is_wanted: &dyn Fn(&str) -> bool,
        choose: &dyn Fn(Vec<Listed>) -> Result<Vec<Listed>, Trouble>,
    ) -> Result<Fetched, Refusal> {
        let Access { hub, stop, .. } = access;
        let fetched = if access.noted || hub.offline {
            self.cached(access, is_wanted)
        } else {
            self.fetch_or_stop(hub, stop, folder, choose)
        };
        fetched.map_err(|trouble| self.explain(&trouble, hub))
    }

    /// The snapshot in the cache. Where nobody noted what it was, its files have to be what their names say.
    fn cached(&self, access: Access, is_wanted: &dyn Fn(&str) -> bool) -> Result<Fetched, Trouble> {
        let commit = if is_commit(&self.revision) {
            self.revision.clone()
        } else {
            self.repository.read_reference(&self.revision)?
        };
        let path = self.repository.snapshot(&commit);
        if !path.is_dir() {
            return Err(Trouble::NotInTheCache);
        }
        let digests =
            if access.noted { Vec::new() } else { self.repository.verify_snapshot(&commit, is_wanted, access.stop)? };
        Ok(Fetched { revision: Some(commit), path, digests })
    }

    fn fetch_or_stop(
        &self,
        settings: &HubSettings,
        stop: &Stop,
        folder: Option<&str>,
        choose: &dyn Fn(Vec<Listed>) -> Result<Vec<Listed>, Trouble>,
    ) -> Result<Fetched, Trouble> {
        let client = Client::new(settings)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| Trouble::Io { path: self.repository.folder.clone(), source })?;
        let progress = Progress::default();
        let mut done = Done::default();
        let fetched = runtime.block_on(async {
            let attempts = outlast(settings, &progress, async || {
                self.attempt(&client, settings, stop, folder, choose, &progress, &mut done).await
            });
            tokio::select! {
                fetched = attempts => fetched,
                () = asked_to_stop(stop) => Err(Trouble::Stopped),
            }
        });
        // A name that is being looked up need not be waited for.
        runtime.shutdown_background();
        fetched
    }

    #[expect(clippy::too_many_arguments, reason = "one attempt of many, which share all of it")]
    async fn attempt(
        &self,
        client: &Client,
        settings: &HubSettings,
        stop: &Stop,
        folder: Option<&str>,
        choose: &dyn Fn(Vec<Listed>) -> Result<Vec<Listed>, Trouble>,
        progress: &Progress,
        done: &mut Done,
    ) -> Result<Fetched, Trouble> {
        // The commit that the revision is now: a branch may move while its files are fetched.
        let commit = match &done.commit {
            Some(commit) => commit.clone(),
            None if is_commit(&self.revision) => self.revision.clone(),
            None => client.commit(self).await?,
        };
        done.commit = Some(commit.clone());
        for file in choose(client.list(self, &commit, folder).await?)? {
            if done.files.contains_key(&file.path) {
                continue;
            }
            let digest = match self.repository.take(&commit, &file, stop)? {
                Some(digest) => digest,
                None => self.download(client, settings, &commit, &file, stop, progress, done).await?,
            };
            progress.file_is_there();
            done.files.insert(file.path, digest);
        }
        // For the next time without a network, once all files are there.
        self.repository.write_reference(&self.revision, &commit)?;
        let path = self.repository.snapshot(&commit);
        let digests = done.files.iter().map(|(file, digest)| (path.join(file), digest.clone())).collect();
        Ok(Fetched { path, revision: Some(commit), digests })
    }

    #[expect(clippy::too_many_arguments, reason = "one file of an attempt")]
    async fn download(
        &self,
        client: &Client,
        settings: &HubSettings,
        commit: &str,
        file: &Listed,
        stop: &Stop,
        progress: &Progress,
        done: &mut Done,
    ) -> Result<String, Trouble> {
        // Xet's chunks come over many connections; a network that does not let them through still has the plain way.
        if file.in_xet && done.plain.insert(file.path.clone()) {
            xet::download(self, settings, commit, &file.path, progress).await;
            if let Some(digest) = self.repository.take(commit, file, stop)? {
                return Ok(digest);
            }
        }
        let partial = self.repository.open_partial(file);
        if let Err(Trouble::Busy { bytes }) = &partial {
            // As long as another process gets further, it is worth while to wait.
            progress.bytes(*bytes);
        }
        let mut partial = partial?;
        if partial.missing() > 0 {
            client.download(self, commit, file, &mut partial, progress).await?;
        }
        partial.finish(commit, file, stop)
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

async fn asked_to_stop(stop: &Stop) {
    const LOOK: Duration = Duration::from_millis(100);
    while !stop.requested() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Where a repository's files are on the hub, below its endpoint.
impl Request {
    fn api(&self, more: &[&str]) -> Vec<String> {
        let kind = if self.kind == Kind::Model { "models" } else { "datasets" };
        let parts = ["api", kind, &self.owner, &self.name];
        parts.iter().chain(more).map(|part| (*part).to_owned()).collect()
    }

    fn content(&self, commit: &str, file: &str) -> Vec<String> {
        let prefix: &[&str] = if self.kind == Kind::Model { &[] } else { &["datasets"] };
        let parts = [self.owner.as_str(), &self.name, "resolve", commit];
        prefix.iter().copied().chain(parts).chain(file.split('/')).map(str::to_owned).collect()
    }
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
