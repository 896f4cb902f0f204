//! Fine-tunes a language model on one machine: prepare, train, validate, publish.
//!
//! `cli → run → judge → train → model → compute`; beside them `data`, `source`, `store` and `tell`; below all `ground`.

pub mod cli;
pub mod compute;
pub mod data;
pub mod ground;
pub mod judge;
pub mod model;
pub mod run;
pub mod source;
pub mod store;
pub mod tell;
pub mod train;

pub use run::Error;
