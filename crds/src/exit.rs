//! The exit codes of the trainer: what each means and whether another attempt can help.
//!
//! The trainer leaves with one of these, the operator decides from it; nobody else keeps a copy of the table. Where native code
//! ends the process by a signal, [`Fault`] says what that was.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the operator does with an attempt that ended with a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The stage is done; the report says what validation found.
    Done,
    /// No attempt can succeed until a person changes something: the job fails at once.
    Final,
    /// A source is down: another attempt succeeds when it is back; counted in no budget, bounded by time.
    Wait,
    /// Another attempt may succeed; counted in `failurePolicy.maxRetries`.
    Retry,
    /// The attempt gave way after a checkpoint; counted in `failurePolicy.maxPreemptions`, never as a failure.
    Preempted,
}

/// Why the trainer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ExitCode {
    /// The stage is done.
    Done,
    /// The resource, the run configuration or the plan cannot be carried out as written.
    BadConfiguration,
    /// A dataset, model or tokenizer file has unacceptable content.
    BadData,
    /// A file, repository or revision does not exist.
    InputNotFound,
    /// A source could not be reached or gave up half-way.
    SourceUnavailable,
    /// A bug in the trainer.
    InternalError,
    /// Out of memory after the trainer's own fallbacks.
    OutOfMemory,
    /// The output directory cannot be written: full, read-only, or an input/output error.
    CannotWrite,
    /// Checkpointed and yielding to a signal.
    Preempted,
    /// A source refused access.
    AccessDenied,
    /// The checkpoint in the run directory belongs to other inputs or another job.
    ForeignCheckpoint,
    /// Loss or gradient stayed NaN or infinite.
    NonFinite,
    /// No step was completed within the watchdog's limit.
    Stalled,
}

impl ExitCode {
    /// Every code, in the order of its number.
    pub const ALL: [Self; 13] = [
        Self::Done,
        Self::BadConfiguration,
        Self::BadData,
        Self::InputNotFound,
        Self::SourceUnavailable,
        Self::InternalError,
        Self::OutOfMemory,
        Self::CannotWrite,
        Self::Preempted,
        Self::AccessDenied,
        Self::ForeignCheckpoint,
        Self::NonFinite,
        Self::Stalled,
    ];

    /// The number given to the operating system.
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::BadConfiguration => 64,
            Self::BadData => 65,
            Self::InputNotFound => 66,
            Self::SourceUnavailable => 69,
            Self::InternalError => 70,
            Self::OutOfMemory => 71,
            Self::CannotWrite => 73,
            Self::Preempted => 75,
            Self::AccessDenied => 77,
            Self::ForeignCheckpoint => 78,
            Self::NonFinite => 79,
            Self::Stalled => 80,
        }
    }

    /// The code with this number, if the table has it.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|exit| i32::from(exit.code()) == code)
    }

    /// The CamelCase reason that a condition carries.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Done => "Completed",
            Self::BadConfiguration => "BadConfiguration",
            Self::BadData => "BadData",
            Self::InputNotFound => "InputNotFound",
            Self::SourceUnavailable => "SourceUnavailable",
            Self::InternalError => "InternalError",
            Self::OutOfMemory => "OutOfMemory",
            Self::CannotWrite => "CannotWriteOutput",
            Self::Preempted => "Preempted",
            Self::AccessDenied => "AccessDenied",
            Self::ForeignCheckpoint => "ForeignCheckpoint",
            Self::NonFinite => "NonFinite",
            Self::Stalled => "Stalled",
        }
    }

    /// What an ended attempt with this code means for the job.
    pub const fn disposition(self) -> Disposition {
        match self {
            Self::Done => Disposition::Done,
            Self::Preempted => Disposition::Preempted,
            Self::SourceUnavailable => Disposition::Wait,
            Self::InternalError | Self::CannotWrite | Self::Stalled => Disposition::Retry,
            Self::BadConfiguration
            | Self::BadData
            | Self::InputNotFound
            | Self::OutOfMemory
            | Self::AccessDenied
            | Self::ForeignCheckpoint
            | Self::NonFinite => Disposition::Final,
        }
    }
}

/// A signal that ends a process whose native code went wrong. Displayed as its name and what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The number on Linux.
    pub signal: i32,
    name: &'static str,
    meaning: &'static str,
    advice: &'static str,
}

const IS_A_BUG: &str = "that is a bug in the trainer or in a library below it, not in the job: if it comes again, report it with this \
                        message and the machine's processor and GPU";

impl Fault {
    /// Every one, in the order of its number.
    pub const ALL: [Self; 7] = [
        Self::new(
            4,
            "SIGILL",
            "an instruction that the processor does not have",
            "that is a bug in the choice of kernels, not in the job: another node may have the instruction, and ATEN_CPU_CAPABILITY=avx2 \
             or default in the environment chooses plainer kernels; report it with this message and the processor",
        ),
        Self::new(5, "SIGTRAP", "a trap", IS_A_BUG),
        Self::new(6, "SIGABRT", "an abort; a line before it may say why", IS_A_BUG),
        Self::new(
            7,
            "SIGBUS",
            "a page of a mapped file that could not be read",
            "the volume failed, or somebody changed the model's files while they were used",
        ),
        Self::new(8, "SIGFPE", "an integer division by zero", IS_A_BUG),
        Self::new(11, "SIGSEGV", "memory that is not the program's, or a stack that overflowed", IS_A_BUG),
        Self::new(
            31,
            "SIGSYS",
            "a system call that is forbidden here",
            "the pod's seccomp profile forbids what the trainer needs",
        ),
    ];

    const fn new(signal: i32, name: &'static str, meaning: &'static str, advice: &'static str) -> Self {
        Self { signal, name, meaning, advice }
    }

    /// The fault that a signal stands for; none for signals that somebody sends, such as SIGTERM.
    pub fn from_signal(signal: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.signal == signal)
    }

    /// The fault that ended a container, whose exit code is then 128 more than the signal.
    pub fn from_exit_code(code: i32) -> Option<Self> {
        Self::from_signal(code - 128)
    }

    /// What is told of a process that ended so while it did `what`, and what to do.
    pub fn message(self, what: &str) -> String {
        format!(
            "the trainer was ended by {self} in native code while {what}; the next attempt, on a laptop the same command, goes on \
             from the newest checkpoint; {}",
            self.advice
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.meaning)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_by_signal_and_by_exit_code() {
        for fault in Fault::ALL {
            assert_eq!(Fault::from_signal(fault.signal), Some(fault));
            assert_eq!(Fault::from_exit_code(128 + fault.signal), Some(fault));
        }
        // SIGKILL and SIGTERM come from outside; a code of the table is no signal.
        assert_eq!([137, 143, 70].map(Fault::from_exit_code), [None; 3]);
    }

    #[test]
    fn numbers_are_unique_ascending_and_found_again() {
        let codes: Vec<_> = ExitCode::ALL.iter().map(|exit| exit.code()).collect();
        assert!(codes.windows(2).all(|pair| pair[0] < pair[1]), "{codes:?}");
        for exit in ExitCode::ALL {
            assert_eq!(ExitCode::from_code(i32::from(exit.code())), Some(exit));
        }
        assert_eq!(ExitCode::from_code(1), None);
    }

    #[test]
    fn codes_that_end_the_job_are_those_of_the_design() {
        let end: Vec<_> = ExitCode::ALL
            .iter()
            .filter(|exit| exit.disposition() == Disposition::Final)
            .map(|exit| exit.code())
            .collect();
        assert_eq!(end, [64, 65, 66, 71, 77, 78, 79]);
    }
}
