//! A causal language model with an explicit forward and backward pass, chosen by `config.json`.
//!
//! It knows tensors and packed batches; nothing of files other than weights, or of the loop around it. Of the optimizer only
//! `load.rs` knows, which builds the parameters that one updates.

use std::path::PathBuf;

mod decoder;
mod family;
mod keys;
mod layer;
mod load;
mod merge;
mod rope;
pub mod spec;

pub use decoder::{Decoder, DeviceBatch, Noise};
pub use layer::{KeyValues, Outputs, Recompute};
pub use load::{Built, Source, build, check_finite, lora_parameters, restore_base, target_linears, weight_names};
pub use merge::merged;
pub use spec::Spec;

/// A model could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` cannot be read.
    #[error("{}: cannot be read ({source}); a model folder needs config.json", path.display())]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `config.json` is not what it should be.
    #[error("{}: {source}; expected the config.json of a decoder as transformers writes it", path.display())]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The model needs something that is not there.
    #[error("{}: {message}", path.display())]
    UnsupportedModel {
        /// The file.
        path: PathBuf,
        /// What was found and what is expected.
        message: String,
    },
    /// The weight files are not acceptable.
    #[error(transparent)]
    Weights(#[from] crate::store::weights::Error),
    /// A tensor has another shape than `config.json` says.
    #[error("{folder}: tensor {name} has shape {found:?}, config.json says {expected:?}; the files do not belong together", folder = folder.display())]
    Shape {
        /// The model's folder.
        folder: PathBuf,
        /// Which tensor.
        name: String,
        /// Its shape.
        found: Vec<i64>,
        /// What the configuration implies.
        expected: Vec<i64>,
    },
    /// The files have tensors that the family does not know.
    #[error("{}: the files have {}{}, which a model as config.json describes it has not; they do not belong together", folder.display(), names.join(", "), if *more > 0 { format!(" and {more} more") } else { String::new() })]
    Strangers {
        /// The model's folder.
        folder: PathBuf,
        /// The first of them.
        names: Vec<String>,
        /// How many others there are.
        more: usize,
    },
    /// Rows are longer than what is computed as the family does.
    #[error("{}: rows of {longest} tokens, and layers whose tokens see {window} at most (sliding_window), which is not supported yet; expected maxSequenceLength of at most {window}", folder.display())]
    BeyondWindow {
        /// The model's folder.
        folder: PathBuf,
        /// Tokens of the longest row.
        longest: i64,
        /// The smallest window.
        window: i64,
    },
    /// A LoRA target names no linear of the model.
    #[error("method.lora.targetModules: {found} is no linear layer of the model; expected some of {expected}")]
    UnknownTarget {
        /// As written.
        found: String,
        /// What there is.
        expected: String,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::ReadConfig { source, .. } if source.kind() == std::io::ErrorKind::NotFound => ExitCode::InputNotFound,
            Self::Weights(error) => error.exit(),
            Self::UnknownTarget { .. } | Self::UnsupportedModel { .. } | Self::BeyondWindow { .. } => {
                ExitCode::BadConfiguration
            }
            Self::ReadConfig { .. } | Self::ParseConfig { .. } | Self::Shape { .. } | Self::Strangers { .. } => {
                ExitCode::BadData
            }
        }
    }
}
