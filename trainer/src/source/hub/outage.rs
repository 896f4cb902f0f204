//! Patience with a hub that is down, overloaded or cut off: what passes by itself is waited for, with growing pauses, until
//! nothing has got better for too long.

use std::cell::Cell;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::trouble::Trouble;
use super::{HubSettings, Reader};

/// Pause after the first failure; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How far a fetch is. Whatever takes it further than it has ever been ends an outage.
#[derive(Debug, Default)]
pub(super) struct Progress {
    files: Cell<u64>,
    /// Most bytes that there were of the file that is on its way: what arrives damaged again and again is no progress.
    bytes: Cell<u64>,
}

impl Progress {
    pub(super) fn file_is_there(&self) {
        self.files.set(self.files.get() + 1);
        self.bytes.set(0);
    }

    pub(super) fn bytes(&self, bytes: u64) {
        self.bytes.set(self.bytes.get().max(bytes));
    }

    fn mark(&self) -> (u64, u64) {
        (self.files.get(), self.bytes.get())
    }
}

/// Tries again what fails for a reason that passes by itself, for [`HubSettings::outage`] after the last progress.
pub(super) async fn outlast<T>(
    settings: &HubSettings,
    progress: &Progress,
    mut attempt: impl AsyncFnMut() -> Result<T, Trouble>,
) -> Result<T, Trouble> {
    let mut outage: Option<Outage> = None;
    loop {
        let trouble = match attempt().await {
            Err(trouble) if trouble.passes() => trouble,
            ended => return ended,
        };
        let mark = progress.mark();
        let now = Instant::now();
        let current = match outage.take() {
            Some(outage) if outage.mark == mark => outage,
            _ => Outage { mark, since: now, pause: FIRST_PAUSE },
        };
        let left = settings.outage.saturating_sub(now - current.since);
        let Some(pause) = pause(current.pause, trouble.retry_after(), left) else { return Err(trouble) };
        tell(settings, &trouble, pause, left);
        tokio::time::sleep(pause).await;
        outage = Some(Outage { pause: (current.pause * 2).min(LONGEST_PAUSE), ..current });
    }
}

struct Outage {
    mark: (u64, u64),
    since: Instant,
    pause: Duration,
}

/// How long to wait; `None`: it is no use within the time that is left.
fn pause(next: Duration, asked_for: Option<Duration>, left: Duration) -> Option<Duration> {
    // Pods that failed together do not come again together.
    let spread = next.mul_f64(rand::random_range(0.75..1.0));
    match asked_for {
        _ if left.is_zero() => None,
        Some(asked_for) if asked_for > left => None,
        Some(asked_for) => Some(spread.min(left).max(asked_for)),
        // The last attempt is made when patience ends.
        None => Some(spread.min(left)),
    }
}

fn tell(settings: &HubSettings, trouble: &Trouble, pause: Duration, left: Duration) {
    let how_to_stop = match settings.reader {
        Reader::Person => "; Ctrl-C stops",
        Reader::Cluster => "",
    };
    let seconds = |time: Duration| time.as_secs_f64().ceil();
    // Nobody may be left to read it.
    let _ = writeln!(
        io::stderr(),
        "waiting for {}: {}; trying again in {} s, for {} s at most{how_to_stop}",
        settings.endpoint,
        trouble.what(),
        seconds(pause),
        seconds(left)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_pause_is_as_long_as_was_asked_for_and_no_longer_than_there_is_time() {
        for _ in 0..100 {
            let found = pause(4 * SECOND, None, 60 * SECOND).expect("there is time");
            assert!(found >= 3 * SECOND && found <= 4 * SECOND, "{found:?}");
        }
        assert_eq!(pause(4 * SECOND, Some(9 * SECOND), 60 * SECOND), Some(9 * SECOND));
        assert_eq!(pause(4 * SECOND, Some(61 * SECOND), 60 * SECOND), None);
        assert_eq!(pause(30 * SECOND, None, SECOND), Some(SECOND));
        assert_eq!(pause(SECOND, None, Duration::ZERO), None);
    }

    #[test]
    fn only_what_goes_further_than_ever_is_progress() {
        let progress = Progress::default();
        progress.bytes(100);
        let before = progress.mark();
        for bytes in [0, 50, 100] {
            progress.bytes(bytes);
            assert_eq!(progress.mark(), before, "it arrived before, and was thrown away");
        }
        progress.bytes(101);
        assert_ne!(progress.mark(), before);
        let before = progress.mark();
        progress.file_is_there();
        assert_ne!(progress.mark(), before);
    }
}
