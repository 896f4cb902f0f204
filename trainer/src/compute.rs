//! Arithmetic on tensors, and where it is done: attention, linears, loss, optimizer, and kernels of our own. Nothing here knows
//! of a model.

pub mod attention;
pub mod device;
pub mod dropout;
pub mod gpu;
pub mod linear;
pub mod loss;
pub mod memory;
pub mod norm;
pub mod ops;
pub mod optim;
pub mod shim;
pub mod weight;
