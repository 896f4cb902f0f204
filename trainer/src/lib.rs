//! Fine-tunes a language model on one machine: prepare, train, validate, publish.

pub mod attention;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod device;
pub mod display;
pub mod evaluate;
pub mod export;
pub mod generate;
pub mod history;
pub mod judge;
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
pub mod run;
pub mod schedule;
pub mod serve;
pub mod shim;
pub mod signal;
pub mod source;
pub mod tokenizer;
pub mod train;
pub mod weights;

pub use run::Error;
