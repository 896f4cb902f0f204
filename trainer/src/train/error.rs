//! Why training ends early, and what to do about it.

use crate::compute::shim;

/// Training ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Loss or gradient stayed NaN or infinite.
    #[error(
        "step {step}: loss {loss} and gradient norm {gradient_norm} are not finite, {count} steps in a row; {moved} and none \
         was saved. Lower hyperparameters.learningRate (now {peak_learning_rate:e}) or use precision FP32"
    )]
    NonFinite {
        /// Completed steps.
        step: i64,
        /// As measured.
        loss: f64,
        /// As measured.
        gradient_norm: f64,
        /// Steps in a row.
        count: i64,
        /// What they did to the weights.
        moved: &'static str,
        /// From the schedule.
        peak_learning_rate: f64,
    },
    /// Trained weights became NaN or infinite.
    #[error(
        "step {step}: trained weights are not finite, so no checkpoint was written; lower hyperparameters.learningRate (now {peak_learning_rate:e})"
    )]
    NonFiniteWeights {
        /// Completed steps.
        step: i64,
        /// From the schedule.
        peak_learning_rate: f64,
    },
    /// Not enough memory for even the smallest micro-batch.
    #[error(
        "out of memory at {tokens} tokens per micro-batch, {why}; {remedy} or give the job more memory ({message})"
    )]
    OutOfMemory {
        /// Tokens computed at once.
        tokens: i64,
        /// Why it is not made smaller.
        why: &'static str,
        /// What to change.
        remedy: &'static str,
        /// libtorch's words.
        message: String,
    },
    /// A libtorch call failed.
    #[error(transparent)]
    Libtorch(#[from] shim::Error),
    /// A file could not be written, or another part of the surroundings failed.
    #[error(transparent)]
    Surroundings(Box<crate::Error>),
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::NonFinite { .. } | Self::NonFiniteWeights { .. } => ExitCode::NonFinite,
            Self::OutOfMemory { .. } => ExitCode::OutOfMemory,
            Self::Libtorch(_) => ExitCode::InternalError,
            Self::Surroundings(error) => error.exit(),
        }
    }
}
