//! The request to stop: set by a signal, polled between layers and inside every long loop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crds::exit::ExitCode;
use signal_hook::consts::{SIGINT, SIGTERM};

/// How long the process may go on after the first signal; a cloud that takes a machine back grants about 15 seconds.
const PATIENCE: Duration = Duration::from_secs(9);

/// A flag that says "checkpoint and leave". Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Sets the flag on SIGTERM and SIGINT. What hangs, or a checkpoint that takes too long, ends with the process: the
    /// last committed one is whole. A second SIGINT ends it at once, as a user expects of Ctrl-C twice.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self::default();
        let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
        let flag = stop.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                if flag.requested() && signal == SIGINT {
                    signal_hook::low_level::exit(130);
                }
                if !flag.requested() {
                    flag.request();
                    leave_in_time();
                }
            }
        })?;
        Ok(stop)
    }

    /// Asks for a stop, as a signal would.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether a stop was asked for.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Ends the process when patience is over, if it has not ended by then.
fn leave_in_time() {
    let spawned = std::thread::Builder::new().name("patience".into()).spawn(|| {
        std::thread::sleep(PATIENCE);
        let seconds = PATIENCE.as_secs();
        // Nobody may be left to read it; the exit code says the same.
        let _ = io::Write::write_all(
            &mut io::stderr(),
            format!("error: not done {seconds} s after the request to stop; the last checkpoint stands\n").as_bytes(),
        );
        signal_hook::low_level::exit(i32::from(ExitCode::Preempted.code()));
    });
    // Without a thread to watch it, the process still stops at the next place that looks at the flag.
    drop(spawned);
}
