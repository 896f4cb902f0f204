//! Files that a run keeps: whole or not at all, with their digests; tensors, and checkpoints of them.

pub mod checkpoint;
pub mod files;
pub mod weights;
