//! A linear layer: a base weight and perhaps a bias, frozen or trained, and optionally a low-rank adapter.
//!
//! `y = x W^T + b + scale * drop(x) A^T B^T`, W `[out, in]`, b `[out]`, A `[r, in]`, B `[out, r]`. Forward and backward are written out:
//! a frozen W gets no gradient, and several linears that share an input share its buffers.

use tch::Tensor;

use crate::compute::ops::{add_linear, add_product, linear, linears};
use crate::compute::weight::Weight;

/// A low-rank adapter.
#[derive(Debug)]
pub struct Adapter {
    /// A `[r, in]`
    pub a: Weight,
    /// B `[out, r]`
    pub b: Weight,
    /// `alpha / r`, or `alpha / sqrt(r)` when rank-stabilised.
    pub scale: f64,
    /// Key of this linear in the dropout's randomness.
    pub site: u64,
}

/// A linear layer.
#[derive(Debug)]
pub struct Linear {
    /// W `[out, in]`
    pub weight: Weight,
    /// b `[out]`, if it has one.
    pub bias: Option<Weight>,
    /// The adapter, if this linear is a target.
    pub adapter: Option<Adapter>,
}

/// Whether adapters take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adapters {
    /// The tuned model.
    On,
    /// The base model.
    Off,
}

/// What the backward pass of one linear needs beside its input: `scale * drop(x) A^T`, `[t, r]`.
pub type Saved = Option<Tensor>;

/// A mask on the input of an adapter, already scaled by `1 / (1 - p)`; `None` without dropout.
pub trait InputMask {
    /// The mask `[tokens, in]` for `site`, with width, dtype and device of its input `x`; the same on every call.
    fn mask(&self, site: u64, tokens: i64, x: &Tensor) -> Option<Tensor>;
}

impl Linear {
    /// `y` `[t, out]`, and what the backward pass needs.
    pub fn forward(&self, x_ti: &Tensor, adapters: Adapters, dropout: &dyn InputMask) -> (Tensor, Saved) {
        let [output] = Self::forward_all([self], x_ti, adapters, dropout);
        output
    }

    /// [`forward`](Self::forward) of linears with one input.
    pub fn forward_all<const N: usize>(
        linears_of_x: [&Self; N],
        x_ti: &Tensor,
        adapters: Adapters,
        dropout: &dyn InputMask,
    ) -> [(Tensor, Saved); N] {
        let mut outputs = linears(x_ti, linears_of_x.map(|linear| &linear.weight.value)).into_iter();
        linears_of_x.map(|linear| {
            let mut y_to = outputs.next().expect("an output for each");
            if let Some(bias) = &linear.bias {
                let _ = y_to.g_add_(&bias.value);
            }
            linear.add_adapter(y_to, x_ti, adapters, dropout)
        })
    }

    fn add_adapter(
        &self,
        mut y_to: Tensor,
        x_ti: &Tensor,
        adapters: Adapters,
        dropout: &dyn InputMask,
    ) -> (Tensor, Saved) {
        let Some(adapter) = self.adapter.as_ref().filter(|_| adapters == Adapters::On) else {
            return (y_to, None);
        };
        let projected_tr = match dropout.mask(adapter.site, x_ti.size()[0], x_ti) {
            Some(mask_ti) => linear(&(x_ti * mask_ti), &adapter.a.value),
            None => linear(x_ti, &adapter.a.value),
        };
        let projected_tr = projected_tr * adapter.scale;
        add_linear(&mut y_to, &projected_tr, &adapter.b.value);
        (y_to, Some(projected_tr))
    }

    /// Adds the gradients of W, A and B where they are trained, from the gradient of `y`.
    /// `input_gradient` `[t, in]`, where it is wanted, is added to, so that linears with one input share the buffer.
    pub fn backward(
        &self,
        gradient_to: &Tensor,
        x_ti: &Tensor,
        saved: &Saved,
        dropout: &dyn InputMask,
        input_gradient: Option<&mut Tensor>,
    ) {
        if let Some(weight_gradient) = self.weight.gradient() {
            add_product(&weight_gradient, &gradient_to.tr(), x_ti);
        }
        if let Some(bias_gradient) = self.bias.as_ref().and_then(Weight::gradient) {
            let sum_o = gradient_to.sum_dim_intlist([0i64].as_slice(), false, bias_gradient.kind());
            let _ = bias_gradient.shallow_clone().g_add_(&sum_o);
        }
        let adapter = self.adapter.as_ref().zip(saved.as_ref()).map(|(adapter, projected_tr)| {
            let mask_ti = dropout.mask(adapter.site, x_ti.size()[0], x_ti);
            let gradient_tr = gradient_to.matmul(&adapter.b.value) * adapter.scale;
            if let Some(gradient) = adapter.b.gradient() {
                add_product(&gradient, &gradient_to.tr(), projected_tr);
            }
            if let Some(gradient) = adapter.a.gradient() {
                match &mask_ti {
                    Some(mask_ti) => add_product(&gradient, &gradient_tr.tr(), &(x_ti * mask_ti)),
                    None => add_product(&gradient, &gradient_tr.tr(), x_ti),
                }
            }
            (adapter, gradient_tr, mask_ti)
        });
        let Some(input_gradient_ti) = input_gradient else { return };
        let _ = input_gradient_ti.addmm_(gradient_to, &self.weight.value);
        match adapter {
            Some((adapter, gradient_tr, Some(mask_ti))) => {
                let _ = input_gradient_ti.g_add_(&(gradient_tr.matmul(&adapter.a.value) * mask_ti));
            }
            Some((adapter, gradient_tr, None)) => {
                let _ = input_gradient_ti.addmm_(&gradient_tr, &adapter.a.value);
            }
            None => {}
        }
    }
}
