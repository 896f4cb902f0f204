//! SIGTERM and SIGINT ask for a stop, and for no more than a while.

use std::io;
use std::time::Duration;

use crds::exit::ExitCode;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::ground::stop::Stop;
use crate::tell::report::LastWord;

/// How long the process may go on after the first signal; a cloud that takes a machine back grants about 15 seconds.
const PATIENCE: Duration = Duration::from_secs(9);

/// A flag that is set on SIGTERM and SIGINT. What hangs, or a checkpoint that takes too long, ends with the process: the
/// last committed one is whole. A second SIGINT ends it at once, as a user expects of Ctrl-C twice.
pub fn stop_on_signals(last_word: &LastWord) -> io::Result<Stop> {
    let stop = Stop::default();
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
