//! Fine-tunes a language model on one machine: prepare, train, validate, publish.

pub mod attention;
pub mod checkpoint;
pub mod data;
pub mod device;
pub mod evaluate;
pub mod generate;
pub mod history;
pub mod linear;
pub mod loss;
pub mod model;
pub mod ops;
pub mod optim;
pub mod plan;
pub mod plot;
pub mod prepare;
pub mod random;
pub mod record;
pub mod schedule;
pub mod shim;
pub mod signal;
pub mod source;
pub mod tokenizer;
pub mod train;
pub mod weights;

/// A run ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Training.
    #[error(transparent)]
    Train(#[from] train::Error),
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        match self {
            Self::Train(error) => error.exit(),
        }
    }
}
