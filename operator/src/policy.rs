//! One policy a file, all pure: they take facts and the time, and answer with a judgement and its reason.

pub mod attempts;
pub mod backoff;
pub mod deadline;
pub mod failure;
pub mod verdict;
