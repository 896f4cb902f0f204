//! Ends a process that computes no more: a device, a file system or a lock that never comes back is another attempt's
//! business. Only training and judging are watched; everything else waits for others by right.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crds::exit::ExitCode;
use crds::report::Stage;

use crate::ground::stop::Stop;
use crate::tell::record::{Event, Observer};
use crate::tell::report::LastWord;

const TICK: Duration = Duration::from_secs(1);
/// Patience before the first step of this process: it makes what later ones find.
const FIRST_PATIENCE: Duration = Duration::from_mins(10);
const LEAST_PATIENCE: Duration = Duration::from_mins(1);
/// Patience in median steps.
const STEPS: f64 = 10.0;
/// Steps that the median is taken over.
const RECENT_STEPS: usize = 64;
/// A volume that takes fewer bytes a second than this is as good as none.
const SLOWEST_VOLUME: u64 = 20_000_000;

/// Watches for signs of life. Clones share it; as an observer it is told when to watch.
#[derive(Clone, Debug, Default)]
pub struct Watchdog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    watching: AtomicBool,
    /// Seconds granted to a commit, in which nothing is computed.
    grant: AtomicU64,
    step_seconds: Mutex<VecDeque<f64>>,
}

impl Watchdog {
    /// Watches from now on, in a thread of its own.
    pub fn start(stop: Stop, last_word: LastWord) -> io::Result<Self> {
        let watchdog = Self::default();
        let watched = watchdog.clone();
        std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            // Ticks are counted, no clock is read: while the process or the machine is suspended none passes.
            let mut quiet = Quiet::default();
            loop {
                std::thread::sleep(TICK);
                let patience = watched.patience();
                if quiet.after_tick(stop.signs_of_life(), watched.0.watching.load(Ordering::SeqCst)) >= patience {
                    let message = format!(
                        "nothing was computed for {} s: no step, micro-batch or evaluation batch came to its end; the device, \
                         a volume or a library hangs, and the last checkpoint stands",
                        patience.as_secs()
                    );
                    last_word.leave(ExitCode::Stalled, &message);
                }
            }
        })?;
        Ok(watchdog)
    }

    fn patience(&self) -> Duration {
        let mut seconds: Vec<f64> =
            self.0.step_seconds.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        seconds.sort_by(f64::total_cmp);
        let patience = match seconds.get(seconds.len() / 2) {
            Some(median) => Duration::from_secs_f64(STEPS * median.max(0.0)).max(LEAST_PATIENCE),
            None => FIRST_PATIENCE,
        };
        patience + Duration::from_secs(self.0.grant.load(Ordering::SeqCst))
    }
}

/// How long there has been no sign of life.
#[derive(Debug, Default)]
struct Quiet {
    seen: u64,
    time: Duration,
}

impl Quiet {
    fn after_tick(&mut self, signs_of_life: u64, watching: bool) -> Duration {
        self.time = if watching && signs_of_life == self.seen { self.time + TICK } else { Duration::ZERO };
        self.seen = signs_of_life;
        self.time
    }
}

impl Observer for Watchdog {
    fn observe(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Stage(stage) => {
                self.0.watching.store(matches!(stage, Stage::Training | Stage::Evaluating), Ordering::SeqCst);
            }
            Event::Step(record) => {
                let mut seconds = self.0.step_seconds.lock().unwrap_or_else(PoisonError::into_inner);
                seconds.push_back(record.seconds);
                if seconds.len() > RECENT_STEPS {
                    seconds.pop_front();
                }
            }
            Event::Committing { bytes } => self.0.grant.store(bytes / SLOWEST_VOLUME, Ordering::SeqCst),
            Event::Checkpoint(_) | Event::CheckpointFailed { .. } => self.0.grant.store(0, Ordering::SeqCst),
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tell::record::StepRecord;

    #[test]
    fn patience_follows_the_median_step_and_a_commit_has_time() {
        let mut watchdog = Watchdog::default();
        let mut observe = |event: Event| {
            watchdog.observe(&event).expect("noted");
            watchdog.patience().as_secs()
        };
        let step = |seconds| Event::Step(StepRecord { seconds, ..StepRecord::default() });
        assert_eq!(observe(Event::Stage(Stage::Training)), 600);
        assert_eq!(observe(step(0.1)), 60);
        assert_eq!((observe(step(20.0)), observe(step(20.0))), (200, 200));
        assert_eq!(observe(Event::Committing { bytes: 2_000_000_000 }), 300);
        assert_eq!(observe(Event::CheckpointFailed { step: 3, message: "full".into() }), 200);
    }

    #[test]
    fn only_silence_that_is_watched_counts() {
        let mut quiet = Quiet::default();
        let seconds = [(1, true), (1, true), (1, true), (2, true), (2, true), (2, false), (2, true)]
            .map(|(signs, watching)| quiet.after_tick(signs, watching).as_secs());
        assert_eq!(seconds, [0, 1, 2, 0, 1, 0, 1]);
    }
}
