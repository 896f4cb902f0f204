//! Fine-tunes a language model on one machine: prepare, train, validate, publish.

pub mod checkpoint;
pub mod data;
pub mod display;
pub mod export;
pub mod history;
pub mod plot;
pub mod prepare;
pub mod random;
pub mod record;
pub mod serve;
pub mod signal;
pub mod source;
pub mod tokenizer;
pub mod weights;
