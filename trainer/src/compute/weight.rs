//! A tensor of the model, frozen or trained.

use tch::Tensor;

use crate::compute::optim::Gradient;

/// A tensor that the model computes with, and where its gradient is summed if it is trained.
#[derive(Debug)]
pub struct Weight {
    /// In the activation's dtype.
    pub value: Tensor,
    /// fp32, same shape; `None` where it is frozen.
    pub gradient: Option<Gradient>,
}

impl Weight {
    /// A weight that does not move.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, gradient: None }
    }

    /// What the backward pass adds the gradient to, if it is trained.
    pub fn gradient(&self) -> Option<Tensor> {
        self.gradient.as_ref().map(Gradient::view)
    }
}
