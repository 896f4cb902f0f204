//! Turns FineTuneJobs into the Jobs of their stages, and reports into their status.
//!
//! A pass over a job is observe → validate → build → apply → status ([`controller`]); the middle is pure. What holds:
//!
//! * Terminal absorbs: after `Complete` or `Failed` nothing is made for a job.
//! * An attempt is listed in the status before its Job is made, and its end before the next one is listed; so an operator that
//!   dies anywhere finds its place again.
//! * Objects are made once, under names that follow from the job. Absence proves nothing: what was recorded decides.
//! * One attempt runs at a time: the next Job is made when the last is done and no pod of it is left.
//! * One status write a pass, only if something is new, refused if it was computed from an old status; events after it.
//! * No pod is waited for: progress is heard by a task of its own and decides nothing.
//!
//! The operator never links libtorch and never parses a model, a dataset or a tokenizer.

#![forbid(unsafe_code)]

pub mod apply;
pub mod build;
pub mod controller;
pub mod events;
#[cfg(test)]
mod fake;
pub mod lease;
pub mod memory;
pub mod observe;
pub mod plugin;
pub mod policy;
pub mod recorder;
pub mod run;
pub mod status;
pub mod telemetry;
pub mod validate;
