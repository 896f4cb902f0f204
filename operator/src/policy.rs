//! One policy a file, all pure: they take facts and the time, and answer with a decision and its reason.

pub mod backoff;
pub mod deadline;
pub mod failure;
pub mod verdict;
