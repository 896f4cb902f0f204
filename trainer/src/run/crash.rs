//! A last word for what no unwinding catches: a signal with which native code ends the process (an illegal instruction, a wild
//! pointer, an abort). The handler only writes to a pipe and waits; a thread that has not crashed says what happened and leaves.

use std::ffi::c_int;
use std::io::{self, Read};
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use crds::exit::{ExitCode, Fault};
use crds::report::{Report, Stage};

use crate::ground::crashed;
use crate::tell::report::LastWord;

/// Where the handler writes the number of the signal.
static PIPE: AtomicI32 = AtomicI32::new(-1);
/// Who says the last word, once a run has one.
static LAST_WORD: Mutex<Option<LastWord>> = Mutex::new(None);
/// Seconds for the last word. A crash inside the allocator, say, leaves a lock that whoever says it needs: the signal ends the
/// process then, as it would have without a handler.
const PATIENCE: i64 = 5;

/// From now on a [`Fault`] is told on standard error and ends the process with exit code 70. To be called once, early.
pub fn watch() -> io::Result<()> {
    let (mut faults, pipe) = io::pipe()?;
    PIPE.store(pipe.into_raw_fd(), Ordering::SeqCst);
    std::thread::Builder::new().name("crash".into()).spawn(move || {
        let mut signal = [0];
        // A signal that somebody sends goes to any thread that takes it, and this one has to stay.
        if mask_faults(libc::SIG_BLOCK).is_ok() && faults.read_exact(&mut signal).is_ok() {
            let fault = Fault::from_signal(signal[0].into()).expect("only faults are handled");
            let last_word = LAST_WORD.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let what = last_word.as_ref().map_or("computing".to_owned(), |last_word| doing(&last_word.report()));
            last_word.unwrap_or_default().leave(ExitCode::InternalError, &fault.message(&what));
        }
    })?;
    Fault::ALL.into_iter().try_for_each(|fault| handle(fault.signal))
}

/// Has a [`Fault`] told in the run's report too.
pub fn tell(last_word: &LastWord) {
    *LAST_WORD.lock().unwrap_or_else(PoisonError::into_inner) = Some(last_word.clone());
}

fn doing(report: &Report) -> String {
    match report.stage {
        Stage::Training => format!("training, after step {} of {}", report.step, report.total_steps),
        stage => format!("{stage:?}").to_lowercase(),
    }
}

fn handle(signal: c_int) -> io::Result<()> {
    // SAFETY: an action without flags or masked signals is all zeros.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fault as extern "C" fn(c_int) as usize;
    // On the stack that Rust keeps for the handler of a stack that overflowed; other threads' own.
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the handler calls nothing but what may be called in one.
    match unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_fault(signal: c_int) {
    crashed::note();
    let number = signal as u8;
    let mut rest = libc::timespec { tv_sec: PATIENCE, tv_nsec: 0 };
    // SAFETY: each of these may be called in a handler of a signal.
    unsafe {
        libc::write(PIPE.load(Ordering::SeqCst), (&raw const number).cast(), 1);
        while libc::nanosleep(&raw const rest, &raw mut rest) != 0 {}
        libc::signal(signal, libc::SIG_DFL);
        // Not told where it cannot be: the signal, which is raised again, does the rest.
        let _ = mask_faults(libc::SIG_UNBLOCK);
        libc::raise(signal);
        // The first process of a container takes no signal that it does not handle.
        libc::_exit(128 + signal);
    }
}

/// Blocks or unblocks faults in this thread and those that it starts.
fn mask_faults(how: c_int) -> io::Result<()> {
    // SAFETY: the set is made empty before it is read.
    let status = unsafe {
        let mut faults: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut faults);
        for fault in Fault::ALL {
            libc::sigaddset(&raw mut faults, fault.signal);
        }
        libc::pthread_sigmask(how, &raw const faults, std::ptr::null_mut())
    };
    if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set in the process that crashes.
    const CRASH: &str = "FINETUNE_TEST_CRASH";

    /// What a thread runs that Rust did not make, as libtorch's threads are.
    extern "C" fn crash(nothing: *mut libc::c_void) -> *mut libc::c_void {
        // SAFETY: none: it is the crash.
        unsafe { nothing.cast::<u8>().write_volatile(1) };
        nothing
    }

    /// The test starts itself again in a process that crashes.
    #[test]
    fn a_crash_in_native_code_leaves_a_word() {
        let folder = tempfile::tempdir().expect("writable");
        let message = folder.path().join("message");
        if let Some(path) = std::env::var_os(CRASH) {
            let report = Report { stage: Stage::Training, step: 7, total_steps: 9, ..Report::default() };
            watch().expect("watched");
            tell(&LastWord::new(report, None, Some(path.into())));
            let mut thread = 0;
            // SAFETY: the thread takes nothing, and is waited for.
            unsafe {
                libc::pthread_create(&raw mut thread, std::ptr::null(), crash, std::ptr::null_mut());
                libc::pthread_join(thread, std::ptr::null_mut());
            }
            unreachable!("the process has ended");
        }
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", "run::crash::tests::a_crash_in_native_code_leaves_a_word", "--nocapture"]);
        let output = command.env(CRASH, &message).output().expect("it starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(70), "{stderr}");
        let told = std::fs::read_to_string(&message).expect("a last word");
        for words in [
            "ended by SIGSEGV (memory that is not the program's, or",
            "training, after step 7 of 9",
            "newest checkpoint",
        ] {
            assert!(stderr.contains(words) && told.contains(words), "no {words:?} in\n{stderr}\n{told}");
        }
    }
}
