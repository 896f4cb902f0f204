//! One decoder layer: attention and MLP with pre-norms and residuals, forward and backward written out.
//!
//! Shapes: t packed tokens, h hidden size, n query heads, k key-value heads, d head size, m MLP width,
//! r tokens whose output is wanted.

use tch::Tensor;

use crate::compute::attention::{self, Segments};
use crate::compute::linear::{Adapters, InputMask, Linear, Saved};
use crate::compute::ops::{RopeRows, Rotation, residual_norm_backward, rms_norm, swiglu, swiglu_backward};
use crate::compute::weight::Weight;

/// What a layer keeps from its forward pass for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// All that the backward pass reads is kept.
    Nothing,
    /// Norms and the SwiGLU product are computed again; projections and attention are kept.
    Pointwise,
    /// Everything is computed again from the layer's input: least memory, one more forward pass.
    Layer,
}

impl Recompute {
    /// `cheap_ti`, the output of a norm or of SwiGLU, if it is kept.
    fn keep(self, cheap_ti: Tensor) -> Option<Tensor> {
        (self == Recompute::Nothing).then_some(cheap_ti)
    }
}

/// Sizes and constants that all layers share.
#[derive(Clone, Copy, Debug)]
pub struct LayerShape {
    pub heads: i64,
    pub kv_heads: i64,
    pub head_size: i64,
    pub eps: f64,
}

/// What surrounds a layer in one pass over some rows.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub rope: &'a RopeRows,
    pub adapters: Adapters,
    pub dropout: &'a dyn InputMask,
    pub recompute: Recompute,
}

/// One decoder layer.
#[derive(Debug)]
pub struct Layer {
    pub shape: LayerShape,
    pub input_norm: Weight,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub post_attention_norm: Weight,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// Keys and values of some rows in one layer, `[t, k, d]` each.
#[derive(Debug)]
pub struct KeyValues {
    /// Rotated keys.
    pub keys: Tensor,
    /// Values.
    pub values: Tensor,
}

/// The tokens that a layer's output is wanted for. After the last layer's attention, work for any but the labels' is dead.
#[derive(Clone, Copy)]
pub enum Outputs<'a> {
    /// All t.
    All,
    /// These of t, int64 `[r]`, each once.
    Rows(&'a Tensor),
}

impl Outputs<'_> {
    fn select(self, x_th: &Tensor) -> Tensor {
        match self {
            Outputs::All => x_th.shallow_clone(),
            Outputs::Rows(rows_r) => x_th.index_select(0, rows_r),
        }
    }

    /// The gradient of all `tokens` from those that were selected.
    fn scatter(self, gradient_rh: Tensor, tokens: i64) -> Tensor {
        match self {
            Outputs::All => gradient_rh,
            Outputs::Rows(rows_r) => {
                let full =
                    gradient_rh.new_zeros([tokens, gradient_rh.size()[1]], (gradient_rh.kind(), gradient_rh.device()));
                full.index_copy(0, rows_r, &gradient_rh)
            }
        }
    }
}

/// The rows of the masks that all tokens have: which outputs are wanted does not change the randomness.
struct SelectedMask<'a> {
    all: &'a dyn InputMask,
    outputs: Outputs<'a>,
    tokens: i64,
}

impl InputMask for SelectedMask<'_> {
    fn mask(&self, site: u64, _rows: i64, x_ri: &Tensor) -> Option<Tensor> {
        self.all.mask(site, self.tokens, x_ri).map(|mask_ti| self.outputs.select(&mask_ti))
    }
}

/// What the backward pass needs beside the layer's input.
#[derive(Debug)]
pub struct LayerSaved {
    q_tnd: Tensor,
    k_tkd: Tensor,
    v_tkd: Tensor,
    attention: attention::Saved,
    projected: Projected,
    finished: Finished,
}

/// What is kept of a layer's projections of its input.
#[derive(Debug)]
pub struct Projected {
    normed_th: Option<Tensor>,
    adapters: [Saved; 3],
}

/// What is kept of a layer's part after attention, for its r outputs.
#[derive(Debug)]
pub struct Finished {
    middle_rh: Tensor,
    normed_rh: Option<Tensor>,
    gate_rm: Tensor,
    up_rm: Tensor,
    product_rm: Option<Tensor>,
    adapters: [Saved; 4],
}

impl Layer {
    fn norm_in(&self, x_th: &Tensor) -> Tensor {
        rms_norm(x_th, &self.input_norm.value, self.shape.eps)
    }

    fn norm_post(&self, x_th: &Tensor) -> Tensor {
        rms_norm(x_th, &self.post_attention_norm.value, self.shape.eps)
    }

    /// Query `[t, n, d]`, rotated keys and values `[t, k, d]`, from the layer's input.
    pub fn project(&self, x_th: &Tensor, pass: &Pass) -> (Tensor, KeyValues, Projected) {
        let LayerShape { heads, kv_heads, head_size, .. } = self.shape;
        let normed_th = self.norm_in(x_th);
        let [(q, saved_q), (k, saved_k), (v, saved_v)] =
            Linear::forward_all([&self.q, &self.k, &self.v], &normed_th, pass.adapters, pass.dropout);
        let q_tnd = pass.rope.rotate(&q.view([-1, heads, head_size]), Rotation::Forward);
        let keys = pass.rope.rotate(&k.view([-1, kv_heads, head_size]), Rotation::Forward);
        let values = v.view([-1, kv_heads, head_size]);
        let projected = Projected { normed_th: pass.recompute.keep(normed_th), adapters: [saved_q, saved_k, saved_v] };
        (q_tnd, KeyValues { keys, values }, projected)
    }

    /// The layer's output `[r, h]` from its input and the attention's output `[t, n, d]`.
    pub fn finish(&self, x_th: &Tensor, attended_tnd: &Tensor, pass: &Pass, outputs: Outputs) -> (Tensor, Finished) {
        let dropout = SelectedMask { all: pass.dropout, outputs, tokens: x_th.size()[0] };
        let attended_rh = outputs.select(&attended_tnd.flatten(1, 2));
        let (attended_rh, saved_o) = self.o.forward(&attended_rh, pass.adapters, &dropout);
        let middle_rh = outputs.select(x_th) + attended_rh;
        let normed_rh = self.norm_post(&middle_rh);
        let [(gate_rm, saved_gate), (up_rm, saved_up)] =
            Linear::forward_all([&self.gate, &self.up], &normed_rh, pass.adapters, &dropout);
        let product_rm = swiglu(&gate_rm, &up_rm);
        let (down_rh, saved_down) = self.down.forward(&product_rm, pass.adapters, &dropout);
        let output_rh = &middle_rh + down_rh;
        let (normed_rh, product_rm) = (pass.recompute.keep(normed_rh), pass.recompute.keep(product_rm));
        let adapters = [saved_o, saved_gate, saved_up, saved_down];
        (output_rh, Finished { middle_rh, normed_rh, gate_rm, up_rm, product_rm, adapters })
    }

    /// The layer's output `[r, h]`, and what its backward pass needs.
    pub fn forward(&self, x_th: &Tensor, segments: &Segments, pass: &Pass, outputs: Outputs) -> (Tensor, LayerSaved) {
        let (q_tnd, KeyValues { keys: k_tkd, values: v_tkd }, projected) = self.project(x_th, pass);
        let scale = attention::scale(self.shape.head_size);
        let attention = attention::attention(&q_tnd, &k_tkd, &v_tkd, segments, scale);
        let (output_rh, finished) = self.finish(x_th, &attention.out, pass, outputs);
        (output_rh, LayerSaved { q_tnd, k_tkd, v_tkd, attention, projected, finished })
    }

    /// Adds the gradients of what follows attention; returns those of the attention's output and of the residual, `[r, h]`.
    fn finish_backward(
        &self,
        gradient_rh: Tensor,
        attended_rh: &Tensor,
        finished: Finished,
        dropout: &dyn InputMask,
    ) -> (Tensor, Tensor) {
        let Finished { middle_rh, normed_rh, gate_rm, up_rm, product_rm, adapters } = finished;
        let [saved_o, saved_gate, saved_up, saved_down] = adapters;
        // output = middle + down(swiglu(gate(n), up(n))), n = norm(middle)
        let product_rm = product_rm.unwrap_or_else(|| swiglu(&gate_rm, &up_rm));
        let mut d_product_rm = product_rm.zeros_like();
        self.down.backward(&gradient_rh, &product_rm, &saved_down, dropout, Some(&mut d_product_rm));
        drop(product_rm);
        let (d_gate_rm, d_up_rm) = swiglu_backward(&d_product_rm, &gate_rm, &up_rm);
        drop((d_product_rm, gate_rm, up_rm));
        let normed_rh = normed_rh.unwrap_or_else(|| self.norm_post(&middle_rh));
        let mut d_normed_rh = normed_rh.zeros_like();
        self.gate.backward(&d_gate_rm, &normed_rh, &saved_gate, dropout, Some(&mut d_normed_rh));
        self.up.backward(&d_up_rm, &normed_rh, &saved_up, dropout, Some(&mut d_normed_rh));
        drop((d_gate_rm, d_up_rm, normed_rh));
        let norm = &self.post_attention_norm;
        let d_middle_rh = residual_norm_backward(
            gradient_rh,
            &d_normed_rh,
            &middle_rh,
            &norm.value,
            self.shape.eps,
            norm.gradient().as_ref(),
        );
        // middle = x + o(attended)
        let mut d_attended_rh = attended_rh.zeros_like();
        self.o.backward(&d_middle_rh, attended_rh, &saved_o, dropout, Some(&mut d_attended_rh));
        (d_attended_rh, d_middle_rh)
    }

    /// Adds this layer's gradients, from that of its output, and returns the gradient of its input, unless nothing below it is
    /// trained.
    pub fn backward(
        &self,
        gradient_rh: Tensor,
        x_th: &Tensor,
        saved: LayerSaved,
        segments: &Segments,
        pass: &Pass,
        Around { outputs, below }: Around,
    ) -> Option<Tensor> {
        let LayerSaved { q_tnd, k_tkd, v_tkd, attention, projected, finished } = saved;
        let Projected { normed_th, adapters: [saved_q, saved_k, saved_v] } = projected;
        let tokens = x_th.size()[0];
        let selected = SelectedMask { all: pass.dropout, outputs, tokens };
        let attended_rh = outputs.select(&attention.out.flatten(1, 2));
        let (d_attended_rh, d_middle_rh) = self.finish_backward(gradient_rh, &attended_rh, finished, &selected);
        drop(attended_rh);

        // attention(q(n), k(n), v(n)), n = norm(x)
        let d_attended_tnd = outputs.scatter(d_attended_rh, tokens).view(q_tnd.size().as_slice());
        let scale = attention::scale(self.shape.head_size);
        let (dq_tnd, dk_tkd, dv_tkd) =
            attention::attention_backward(&d_attended_tnd, &q_tnd, &k_tkd, &v_tkd, &attention, segments, scale);
        let dq_th = pass.rope.rotate(&dq_tnd, Rotation::Backward).flatten(1, 2);
        let dk_th = pass.rope.rotate(&dk_tkd, Rotation::Backward).flatten(1, 2);
        let dv_th = dv_tkd.flatten(1, 2);
        let normed_th = normed_th.unwrap_or_else(|| self.norm_in(x_th));
        let mut d_normed_th = (below == Below::Trained).then(|| normed_th.zeros_like());
        self.q.backward(&dq_th, &normed_th, &saved_q, pass.dropout, d_normed_th.as_mut());
        self.k.backward(&dk_th, &normed_th, &saved_k, pass.dropout, d_normed_th.as_mut());
        self.v.backward(&dv_th, &normed_th, &saved_v, pass.dropout, d_normed_th.as_mut());
        let (norm, eps) = (&self.input_norm, self.shape.eps);
        d_normed_th.map(|d_normed_th| {
            let d_middle_th = outputs.scatter(d_middle_rh, tokens);
            residual_norm_backward(d_middle_th, &d_normed_th, x_th, &norm.value, eps, norm.gradient().as_ref())
        })
    }
}

/// What is around a layer: which of its outputs is used, and what is trained before it.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    pub outputs: Outputs<'a>,
    pub below: Below,
}

/// Whether anything before a layer is trained; if not, the gradient of its input is not computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// An earlier layer, the embedding, or this layer's own norm.
    Trained,
    /// Nothing.
    Frozen,
}

#[cfg(test)]
mod tests;
