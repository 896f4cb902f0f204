//! Patience with a silent hub.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};

use super::Refusal;

/// Counts what shows that a download moves.
pub(super) struct SignsOfLife {
    pub(super) all: Arc<AtomicU64>,
    /// Most bytes seen of this file: Xet reports at a fixed pace, whether bytes arrive or not.
    pub(super) bytes: AtomicU64,
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
pub(super) fn watched<T: Send + 'static>(
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
