//! The exit codes of the trainer: what each means and whether another attempt can help.
//!
//! The trainer leaves with one of these, the operator decides from it; nobody else keeps a copy of the table.

use serde::{Deserialize, Serialize};

/// What the operator does with an attempt that ended with a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The stage is done; the report says what validation found.
    Done,
    /// No attempt can succeed until a person changes something: the job fails at once.
    Final,
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
            Self::SourceUnavailable | Self::InternalError | Self::CannotWrite | Self::Stalled => Disposition::Retry,
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

#[cfg(test)]
mod tests {
    use super::*;

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
