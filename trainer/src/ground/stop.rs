//! Requests to stop, polled between layers and inside every long loop: to leave, set by a signal, and to end training
//! early, set by the job's control file.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
