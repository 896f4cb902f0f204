//! The two contracts of the project, as types.
//!
//! User and operator meet in the `FineTuneJob` resource; operator and trainer meet in [`run::RunConfig`] (in),
//! [`report::Progress`] (live), [`report::Report`] and [`exit::ExitCode`] (last word).
//! This crate knows no HTTP client, no async runtime and no tensor.

#![forbid(unsafe_code)]

pub mod exit;
pub mod report;
pub mod run;
