//! Xet's way to a file's content: chunks over many connections. Only whether it worked is told; if not, the plain way is taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClientBuilder, HFError};
use tokio::sync::oneshot::error::TryRecvError;

use super::outage::Progress;
use super::{HubSettings, Kind, Request};

/// Between two looks at a download.
const LOOK: Duration = Duration::from_millis(50);

/// Most bytes seen: Xet reports at a fixed pace, whether bytes arrive or not.
struct SignsOfLife(Arc<AtomicU64>);

impl ProgressHandler for SignsOfLife {
    fn on_progress(&self, event: &ProgressEvent) {
        let bytes = match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                files.iter().map(|file| file.bytes_completed).sum()
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => *bytes_completed,
            _ => 0,
        };
        self.0.fetch_max(bytes, Ordering::Relaxed);
    }
}

/// Has a file fetched into the cache, unless that is silent for too long: hf-hub waits forever for a silent server, and its
/// client takes no limit. What hangs is left behind. What arrived is not believed yet.
pub(super) async fn download(
    request: &Request,
    settings: &HubSettings,
    commit: &str,
    file: &str,
    progress: &Progress,
) -> bool {
    let bytes = Arc::new(AtomicU64::new(0));
    let (sender, mut receiver) = tokio::sync::oneshot::channel();
    let work = {
        let (kind, owner, name) = (request.kind, request.owner.clone(), request.name.clone());
        let (settings, commit, file) = (settings.clone(), commit.to_owned(), file.to_owned());
        let signs = SignsOfLife(Arc::clone(&bytes));
        move || {
            // The receiver is gone only after the patience ended.
            let _ = sender.send(fetch(kind, &owner, &name, &settings, commit, file, signs).is_ok());
        }
    };
    if std::thread::Builder::new().name("xet".into()).spawn(work).is_err() {
        return false;
    }
    let (mut seen, mut silent) = (0, Duration::ZERO);
    loop {
        match receiver.try_recv() {
            Ok(arrived) => return arrived,
            Err(TryRecvError::Closed) => return false,
            Err(TryRecvError::Empty) => {}
        }
        let now = bytes.load(Ordering::Relaxed);
        silent = if now == seen { silent + LOOK } else { Duration::ZERO };
        seen = now;
        progress.bytes(now);
        if silent >= settings.patience {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn fetch(
    kind: Kind,
    owner: &str,
    name: &str,
    settings: &HubSettings,
    commit: String,
    file: String,
    signs: SignsOfLife,
) -> Result<(), HFError> {
    // Given even where it is the default: hf-hub would take an empty variable at its word.
    let builder = HFClientBuilder::new().endpoint(&settings.endpoint).cache_dir(&settings.cache).retry_max_attempts(1);
    let builder = if let Some(token) = &settings.token { builder.token(token) } else { builder };
    let client = builder.build_sync()?;
    let fetched = match kind {
        Kind::Model => client.model(owner, name).download_file().filename(file).revision(commit).progress(signs).send(),
        Kind::Dataset => {
            client.dataset(owner, name).download_file().filename(file).revision(commit).progress(signs).send()
        }
    };
    fetched.map(|_| ())
}
