//! RMSNorm with its weight, frozen or trained.

use tch::Tensor;

use crate::compute::ops::{residual_norm_backward, rms_norm, rms_norm_backward};
use crate::compute::weight::Weight;

/// `x / rms(x) * w` of rows, or `x / rms(x) * (1 + w)`.
#[derive(Debug)]
pub struct Norm {
    /// w, as long as a row.
    pub weight: Weight,
    /// Added to the mean square.
    pub eps: f64,
    /// w is the distance from one.
    pub is_offset: bool,
}

impl Norm {
    fn factor(&self) -> Tensor {
        if self.is_offset { &self.weight.value + 1.0 } else { self.weight.value.shallow_clone() }
    }

    /// Of the last dimension of `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        rms_norm(x, &self.factor(), self.eps)
    }

    /// The gradient of `x` from that of the output; adds the weight's where it is trained.
    pub fn backward(&self, gradient: &Tensor, x: &Tensor) -> Tensor {
        rms_norm_backward(gradient, x, &self.factor(), self.eps, self.weight.gradient().as_ref())
    }

    /// `residual` plus [`backward`](Self::backward), of x whose other path the residual is.
    pub fn residual_backward(&self, residual: Tensor, gradient: &Tensor, x: &Tensor) -> Tensor {
        let weight_gradient = self.weight.gradient();
        residual_norm_backward(residual, gradient, x, &self.factor(), self.eps, weight_gradient.as_ref())
    }
}
