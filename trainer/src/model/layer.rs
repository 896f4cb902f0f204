//! One decoder layer: attention and MLP with pre-norms and residuals, forward and backward written out.
//!
//! Shapes: t packed tokens, h hidden size, n query heads, k key-value heads, d head size, m MLP width.

use tch::Tensor;

use crate::attention::{self, Segments};
use crate::linear::{Adapters, InputMask, Linear, Saved, Weight};
use crate::ops::{RopeRows, Rotation, residual_norm_backward, rms_norm, swiglu, swiglu_backward};

/// What a layer keeps from its forward pass for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Norms and the SwiGLU product are computed again; projections and attention are kept.
    Pointwise,
    /// Everything is computed again from the layer's input: least memory, one more forward pass.
    Layer,
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

/// What the backward pass needs beside the layer's input.
#[derive(Debug)]
pub struct LayerSaved {
    q_tnd: Tensor,
    k_tkd: Tensor,
    v_tkd: Tensor,
    attention: attention::Saved,
    middle_th: Tensor,
    gate_tm: Tensor,
    up_tm: Tensor,
    adapters: [Saved; 7],
}

impl Layer {
    fn norm_in(&self, x_th: &Tensor) -> Tensor {
        rms_norm(x_th, &self.input_norm.value, self.shape.eps)
    }

    fn norm_post(&self, x_th: &Tensor) -> Tensor {
        rms_norm(x_th, &self.post_attention_norm.value, self.shape.eps)
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f64 {
        1.0 / (self.shape.head_size as f64).sqrt()
    }

    /// Query `[t, n, d]`, rotated keys and values `[t, k, d]`, from the layer's input.
    pub fn project(&self, x_th: &Tensor, pass: &Pass) -> (Tensor, KeyValues, [Saved; 3]) {
        let LayerShape { heads, kv_heads, head_size, .. } = self.shape;
        let normed_th = self.norm_in(x_th);
        let (q, saved_q) = self.q.forward(&normed_th, pass.adapters, pass.dropout);
        let (k, saved_k) = self.k.forward(&normed_th, pass.adapters, pass.dropout);
        let (v, saved_v) = self.v.forward(&normed_th, pass.adapters, pass.dropout);
        let q_tnd = pass.rope.rotate(&q.view([-1, heads, head_size]), Rotation::Forward);
        let keys = pass.rope.rotate(&k.view([-1, kv_heads, head_size]), Rotation::Forward);
        let values = v.view([-1, kv_heads, head_size]);
        (q_tnd, KeyValues { keys, values }, [saved_q, saved_k, saved_v])
    }

    /// The layer's output from its input and the attention's output `[t, n, d]`, without saving anything.
    pub fn finish(&self, x_th: &Tensor, attended_tnd: &Tensor, pass: &Pass) -> Tensor {
        let (attended_th, _) = self.o.forward(&attended_tnd.flatten(1, 2), pass.adapters, pass.dropout);
        let middle_th = x_th + attended_th;
        let normed_th = self.norm_post(&middle_th);
        let (gate_tm, _) = self.gate.forward(&normed_th, pass.adapters, pass.dropout);
        let (up_tm, _) = self.up.forward(&normed_th, pass.adapters, pass.dropout);
        middle_th + self.down.forward(&swiglu(&gate_tm, &up_tm), pass.adapters, pass.dropout).0
    }

    /// The layer's output `[t, h]`, and what its backward pass needs.
    pub fn forward(&self, x_th: &Tensor, segments: &Segments, pass: &Pass) -> (Tensor, LayerSaved) {
        let (q_tnd, KeyValues { keys: k_tkd, values: v_tkd }, [saved_q, saved_k, saved_v]) = self.project(x_th, pass);
        let attention = attention::attention(&q_tnd, &k_tkd, &v_tkd, segments, self.scale());
        let (attended_th, saved_o) = self.o.forward(&attention.out.flatten(1, 2), pass.adapters, pass.dropout);
        let middle_th = x_th + attended_th;
        let normed_th = self.norm_post(&middle_th);
        let (gate_tm, saved_gate) = self.gate.forward(&normed_th, pass.adapters, pass.dropout);
        let (up_tm, saved_up) = self.up.forward(&normed_th, pass.adapters, pass.dropout);
        let (down_th, saved_down) = self.down.forward(&swiglu(&gate_tm, &up_tm), pass.adapters, pass.dropout);
        let output_th = &middle_th + down_th;
        let adapters = [saved_q, saved_k, saved_v, saved_o, saved_gate, saved_up, saved_down];
        (output_th, LayerSaved { q_tnd, k_tkd, v_tkd, attention, middle_th, gate_tm, up_tm, adapters })
    }

    /// Adds this layer's gradients and returns the gradient of its input, unless nothing below it is trained.
    pub fn backward(
        &self,
        gradient_th: Tensor,
        x_th: &Tensor,
        saved: LayerSaved,
        segments: &Segments,
        pass: &Pass,
        below: Below,
    ) -> Option<Tensor> {
        let LayerSaved { q_tnd, k_tkd, v_tkd, attention, middle_th, gate_tm, up_tm, adapters } = saved;
        let [saved_q, saved_k, saved_v, saved_o, saved_gate, saved_up, saved_down] = &adapters;
        let dropout = pass.dropout;
        let eps = self.shape.eps;

        // MLP: output = middle + down(swiglu(gate(n), up(n))), n = norm(middle)
        let product_tm = swiglu(&gate_tm, &up_tm);
        let mut d_product_tm = product_tm.zeros_like();
        self.down.backward(&gradient_th, &product_tm, saved_down, dropout, Some(&mut d_product_tm));
        drop(product_tm);
        let (d_gate_tm, d_up_tm) = swiglu_backward(&d_product_tm, &gate_tm, &up_tm);
        drop((d_product_tm, gate_tm, up_tm));
        let normed_th = self.norm_post(&middle_th);
        let mut d_normed_th = normed_th.zeros_like();
        self.gate.backward(&d_gate_tm, &normed_th, saved_gate, dropout, Some(&mut d_normed_th));
        self.up.backward(&d_up_tm, &normed_th, saved_up, dropout, Some(&mut d_normed_th));
        drop((d_gate_tm, d_up_tm, normed_th));
        let norm = &self.post_attention_norm;
        let d_middle_th =
            residual_norm_backward(gradient_th, &d_normed_th, &middle_th, &norm.value, eps, norm.gradient().as_ref());

        // Attention: middle = x + o(attention(q(n), k(n), v(n))), n = norm(x)
        let attended_th = attention.out.flatten(1, 2);
        let mut d_attended_th = attended_th.zeros_like();
        self.o.backward(&d_middle_th, &attended_th, saved_o, dropout, Some(&mut d_attended_th));
        let d_attended_tnd = d_attended_th.view(q_tnd.size().as_slice());
        let (dq_tnd, dk_tkd, dv_tkd) =
            attention::attention_backward(&d_attended_tnd, &q_tnd, &k_tkd, &v_tkd, &attention, segments, self.scale());
        let dq_th = pass.rope.rotate(&dq_tnd, Rotation::Backward).flatten(1, 2);
        let dk_th = pass.rope.rotate(&dk_tkd, Rotation::Backward).flatten(1, 2);
        let dv_th = dv_tkd.flatten(1, 2);
        let normed_th = self.norm_in(x_th);
        let mut d_normed_th = (below == Below::Trained).then(|| normed_th.zeros_like());
        self.q.backward(&dq_th, &normed_th, saved_q, dropout, d_normed_th.as_mut());
        self.k.backward(&dk_th, &normed_th, saved_k, dropout, d_normed_th.as_mut());
        self.v.backward(&dv_th, &normed_th, saved_v, dropout, d_normed_th.as_mut());
        let norm = &self.input_norm;
        d_normed_th.map(|d_normed_th| {
            residual_norm_backward(d_middle_th, &d_normed_th, x_th, &norm.value, eps, norm.gradient().as_ref())
        })
    }
}

/// Whether anything before a layer is trained; if not, the gradient of its input is not computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// An earlier layer, the embedding, or this layer's own norm.
    Trained,
    /// Nothing.
    Frozen,
}
