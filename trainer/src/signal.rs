//! Requests to stop, polled between layers and inside every long loop: to leave, set by a signal, and to end training
//! early, set by the job's control file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crds::exit::ExitCode;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::report::LastWord;

/// How long the process may go on after the first signal; a cloud that takes a machine back grants about 15 seconds.
const PATIENCE: Duration = Duration::from_secs(9);

/// A flag that says "checkpoint and leave", and one that says "train no more". Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    leave: AtomicBool,
    finish: AtomicBool,
    signs_of_life: AtomicU64,
}

impl Stop {
    /// Sets the flag on SIGTERM and SIGINT. What hangs, or a checkpoint that takes too long, ends with the process: the
    /// last committed one is whole. A second SIGINT ends it at once, as a user expects of Ctrl-C twice.
    pub fn on_signals(last_word: &LastWord) -> io::Result<Self> {
        let stop = Self::default();
        let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
        let (flag, last_word) = (stop.clone(), last_word.clone());
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                let first = !flag.requested();
                if !first && signal == SIGINT {
                    signal_hook::low_level::exit(130);
                }
                if first {
                    flag.request();
                    leave_in_time(last_word.clone());
                }
            }
        })?;
        Ok(stop)
    }

    /// Asks for a stop, as a signal would.
    pub fn request(&self) {
        self.0.leave.store(true, Ordering::SeqCst);
    }

    /// Whether a stop was asked for. Asking is a sign of life.
    pub fn requested(&self) -> bool {
        self.alive();
        self.0.leave.load(Ordering::SeqCst)
    }

    /// Asks for no more steps: what follows training goes on.
    pub fn request_finish(&self) {
        self.0.finish.store(true, Ordering::SeqCst);
    }

    /// Whether no more steps were asked for.
    pub fn finish_requested(&self) -> bool {
        self.0.finish.load(Ordering::SeqCst)
    }

    /// Gives a sign of life where nobody asks for a while.
    pub fn alive(&self) {
        self.0.signs_of_life.fetch_add(1, Ordering::Relaxed);
    }

    /// Signs of life so far: whoever computes gives one between two layers, so that a number that stays is a stall.
    pub fn signs_of_life(&self) -> u64 {
        self.0.signs_of_life.load(Ordering::Relaxed)
    }
}

/// Ends the process when patience is over, if it has not ended by then.
fn leave_in_time(last_word: LastWord) {
    let spawned = std::thread::Builder::new().name("patience".into()).spawn(move || {
        std::thread::sleep(PATIENCE);
        let seconds = PATIENCE.as_secs();
        let message = format!("not done {seconds} s after the request to stop; the last checkpoint stands");
        last_word.leave(ExitCode::Preempted, &message);
    });
    // Without a thread to watch it, the process still stops at the next place that looks at the flag.
    drop(spawned);
}
