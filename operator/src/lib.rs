//! Turns FineTuneJobs into the Jobs of their stages, and reports into their status.
//!
//! A pass over a job is observe → decide → apply → status ([`controller`]): [`observe`] gathers [`facts`], [`decide`] says what
//! happens next and is the one place that does, [`apply`] makes what [`build`] makes of it, [`status`] tells it. What holds:
//!
//! * Terminal absorbs: after `Complete` or `Failed` nothing is made for a job.
//! * An attempt is listed in the status before its Job is made, and its end before the next one is listed; so an operator that
//!   dies anywhere finds its place again. A Job that it made and did not note is found by its name and by what it runs.
//! * Objects are made once, under names that follow from the job. Absence proves nothing: what was recorded decides.
//! * One attempt runs at a time: the next Job is made when the last is done and no pod of it is left.
//! * What was merely not heard ends no job: before a life without progress is spent, a deadline ends what ran or an attempt
//!   without a last word fails, its volume is read. What a running trainer tells is shown, and spares that reading.
//! * Only what the trainer's own image said counts: a pod is believed for what it runs, not for its labels and owners.
//! * One status write a pass, only if something is new, refused if it was computed from an old status; events after it.
//! * No pod is waited for: progress is heard by a task of its own.
//!
//! The operator never links libtorch and never parses a model, a dataset or a tokenizer.

#![forbid(unsafe_code)]

pub mod apply;
pub mod build;
pub mod caches;
pub mod call;
pub mod controller;
pub mod decide;
pub mod events;
pub mod facts;
#[cfg(test)]
mod fake;
pub mod lease;
pub mod memory;
pub mod observe;
pub mod policy;
pub mod recorder;
pub mod run;
pub mod status;
pub mod telemetry;
pub mod validate;
