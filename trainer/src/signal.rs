//! The request to stop: set once by a signal handler, polled between micro-batches and inside every long loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that says "checkpoint and leave". Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Sets the flag on SIGTERM and SIGINT; a second SIGINT ends the process at once, as a user expects of Ctrl-C twice.
    pub fn on_signals() -> std::io::Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let stop = Self::default();
        signal_hook::flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&stop.0))?;
        signal_hook::flag::register(SIGINT, Arc::clone(&stop.0))?;
        signal_hook::flag::register(SIGTERM, Arc::clone(&stop.0))?;
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
