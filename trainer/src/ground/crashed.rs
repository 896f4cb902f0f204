//! Whether a signal of native code is about to end the process.

use std::sync::atomic::{AtomicBool, Ordering};

static HAS_CRASHED: AtomicBool = AtomicBool::new(false);

/// Notes that it is; may be called in a handler of a signal.
pub fn note() {
    HAS_CRASHED.store(true, Ordering::SeqCst);
}

/// Comes back only where nothing has crashed: what another thread computed of a process that has is not to be kept.
pub fn wait() {
    while HAS_CRASHED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}
