//! One decoder layer: attention and MLP with norms and residuals, forward and backward written out.
//!
//! Shapes: t packed tokens, h hidden size, n query heads, k key-value heads, d head size, m MLP width,
//! r tokens whose output is wanted.

mod outputs;

use tch::Tensor;

pub use self::outputs::Outputs;
use self::outputs::SelectedMask;
use super::spec::{Activation, AttentionSpec, LayerSpec, MlpSpec, QueryKeyNorm};
use crate::compute::attention::{self, Segments};
use crate::compute::linear::{Adapters, InputMask, Linear, Saved};
use crate::compute::norm::Norm;
use crate::compute::ops::{RopeRows, Rotation, geglu, geglu_backward, swiglu, swiglu_backward};

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

/// What surrounds a layer in one pass over some rows.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub rope: &'a RopeRows,
    pub adapters: Adapters,
    pub dropout: &'a dyn InputMask,
    pub recompute: Recompute,
}

/// One decoder layer: `x + m * after(attention(before(x)))`, then the same with the MLP.
#[derive(Debug)]
pub struct Layer {
    pub attention: Attention,
    pub mlp: Mlp,
    /// m
    pub residual_multiplier: f64,
}

/// Attention and the norms around it.
#[derive(Debug)]
pub struct Attention {
    pub spec: AttentionSpec,
    pub before: Option<Norm>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub query_norm: Option<Norm>,
    pub key_norm: Option<Norm>,
    pub o: Linear,
    pub after: Option<Norm>,
}

/// The MLP and the norms around it.
#[derive(Debug)]
pub struct Mlp {
    pub spec: MlpSpec,
    pub before: Option<Norm>,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    pub after: Option<Norm>,
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
    projected: Projected,
    finished: Finished,
}

/// What is kept of a layer's projections of its input.
#[derive(Debug)]
pub struct Projected {
    normed_th: Option<Tensor>,
    /// Queries and keys before they were normalised, where they are.
    unnormed: Option<[Tensor; 2]>,
    adapters: [Saved; 3],
}

/// What is kept of a layer's part after attention, for its r outputs.
#[derive(Debug)]
pub struct Finished {
    /// Outputs of attention and MLP before they were normalised, where they are.
    attended_rh: Option<Tensor>,
    down_rh: Option<Tensor>,
    middle_rh: Tensor,
    normed_rh: Option<Tensor>,
    gate_rm: Tensor,
    up_rm: Tensor,
    product_rm: Option<Tensor>,
    adapters: [Saved; 4],
}

/// What the memory of a pass follows from, per token.
impl LayerSpec {
    /// Numbers that `LayerSaved` holds whatever is computed again, the layer's input included: queries, keys, values, the outputs of
    /// attention, `middle`, gate and up, and what is normalised later.
    pub fn kept(&self, hidden: i64) -> i64 {
        let (queries, keys) = (self.attention.query_size(), self.attention.key_size());
        let unnormed = if self.attention.query_key_norm.is_some() { queries + keys } else { 0 };
        let after = [self.attention_norms, self.mlp_norms].iter().filter(|norms| norms.after.is_some()).count() as i64;
        2 * queries + 2 * keys + unnormed + (2 + after) * hidden + 2 * self.mlp.width
    }

    /// Numbers that it holds besides where nothing is computed again: inputs that were normalised, and the MLP's product.
    pub fn cheap(&self, hidden: i64) -> i64 {
        let before =
            [self.attention_norms, self.mlp_norms].iter().filter(|norms| norms.before.is_some()).count() as i64;
        before * hidden + self.mlp.width
    }

    /// Bytes that its backward pass has alive besides: the MLP's product and its three gradients, norms in fp32. `element` is the
    /// size of an activation.
    pub fn live_bytes(&self, hidden: i64, element: i64) -> i64 {
        4 * self.mlp.width * element + 6 * hidden * 4 + 3 * self.attention.query_size() * element
    }
}

/// A block's input as it takes it.
fn before(norm: Option<&Norm>, x_th: &Tensor) -> Tensor {
    norm.map_or_else(|| x_th.shallow_clone(), |norm| norm.forward(x_th))
}

/// The gradient of a block's input from its two paths.
fn before_backward(norm: Option<&Norm>, residual_th: Tensor, gradient_th: &Tensor, x_th: &Tensor) -> Tensor {
    match norm {
        Some(norm) => norm.residual_backward(residual_th, gradient_th, x_th),
        None => residual_th + gradient_th,
    }
}

/// A block's output as it is added, and what it was before a norm.
fn after(norm: Option<&Norm>, output_rh: Tensor) -> (Tensor, Option<Tensor>) {
    match norm {
        Some(norm) => (norm.forward(&output_rh), Some(output_rh)),
        None => (output_rh, None),
    }
}

/// The gradient of a block's output from that of what was added.
fn after_backward(norm: Option<&Norm>, gradient_rh: &Tensor, unnormed_rh: Option<&Tensor>) -> Tensor {
    match norm.zip(unnormed_rh) {
        Some((norm, unnormed_rh)) => norm.backward(gradient_rh, unnormed_rh),
        None => gradient_rh.shallow_clone(),
    }
}

/// `x * multiplier`, where that is not one.
pub(super) fn scaled(x: Tensor, multiplier: f64) -> Tensor {
    if multiplier == 1.0 { x } else { x * multiplier }
}

impl Attention {
    /// Heads of queries or keys `[t, n, d]`, normalised where they are.
    fn normed(&self, norm: Option<&Norm>, x_ti: &Tensor) -> Tensor {
        let size = self.spec.head_size;
        match (norm, self.spec.query_key_norm) {
            (Some(norm), Some(QueryKeyNorm::Projection)) => norm.forward(x_ti).view([x_ti.size()[0], -1, size]),
            (Some(norm), _) => norm.forward(&x_ti.view([x_ti.size()[0], -1, size])),
            (None, _) => x_ti.view([x_ti.size()[0], -1, size]),
        }
    }

    /// The gradient of what [`normed`](Self::normed) takes, `[t, n * d]`, from that of what it gives.
    fn normed_backward(&self, norm: Option<&Norm>, gradient_tnd: &Tensor, x_ti: Option<&Tensor>) -> Tensor {
        match (norm.zip(x_ti), self.spec.query_key_norm) {
            (Some((norm, x_ti)), Some(QueryKeyNorm::Projection)) => norm.backward(&gradient_tnd.flatten(1, 2), x_ti),
            (Some((norm, x_ti)), _) => {
                norm.backward(gradient_tnd, &x_ti.view(gradient_tnd.size().as_slice())).flatten(1, 2)
            }
            (None, _) => gradient_tnd.flatten(1, 2),
        }
    }

    fn rotate(&self, x_tnd: Tensor, rope: &RopeRows, rotation: Rotation) -> Tensor {
        if self.spec.is_rotary { rope.rotate(&x_tnd, rotation) } else { x_tnd }
    }
}

impl Mlp {
    fn product(&self, gate_rm: &Tensor, up_rm: &Tensor) -> Tensor {
        match self.spec.activation {
            Activation::Silu => swiglu(gate_rm, up_rm),
            Activation::GeluTanh => geglu(gate_rm, up_rm),
        }
    }

    fn product_backward(&self, gradient_rm: &Tensor, gate_rm: &Tensor, up_rm: &Tensor) -> (Tensor, Tensor) {
        match self.spec.activation {
            Activation::Silu => swiglu_backward(gradient_rm, gate_rm, up_rm),
            Activation::GeluTanh => geglu_backward(gradient_rm, gate_rm, up_rm),
        }
    }
}

impl Layer {
    /// Query `[t, n, d]`, rotated keys and values `[t, k, d]`, from the layer's input.
    pub fn project(&self, x_th: &Tensor, pass: &Pass) -> (Tensor, KeyValues, Projected) {
        let attention = &self.attention;
        let normed_th = before(attention.before.as_ref(), x_th);
        let inputs = [&attention.q, &attention.k, &attention.v];
        let [(q, saved_q), (k, saved_k), (v, saved_v)] =
            Linear::forward_all(inputs, &normed_th, pass.adapters, pass.dropout);
        let q_tnd = attention.normed(attention.query_norm.as_ref(), &q);
        let k_tkd = attention.normed(attention.key_norm.as_ref(), &k);
        let q_tnd = attention.rotate(q_tnd, pass.rope, Rotation::Forward);
        let keys = attention.rotate(k_tkd, pass.rope, Rotation::Forward);
        let values = v.view([-1, attention.spec.kv_heads, attention.spec.head_size]);
        let normed_th = attention.before.as_ref().and_then(|_| pass.recompute.keep(normed_th));
        let unnormed = attention.query_norm.is_some().then_some([q, k]);
        let projected = Projected { normed_th, unnormed, adapters: [saved_q, saved_k, saved_v] };
        (q_tnd, KeyValues { keys, values }, projected)
    }

    /// The layer's output `[r, h]` from its input and the attention's output `[t, n, d]`.
    pub fn finish(&self, x_th: &Tensor, attended_tnd: &Tensor, pass: &Pass, outputs: Outputs) -> (Tensor, Finished) {
        let Self { attention, mlp, residual_multiplier } = self;
        let dropout = SelectedMask { all: pass.dropout, outputs, tokens: x_th.size()[0] };
        let attended_rh = outputs.select(&attended_tnd.flatten(1, 2));
        let (attended_rh, saved_o) = attention.o.forward(&attended_rh, pass.adapters, &dropout);
        let (added_rh, attended_rh) = after(attention.after.as_ref(), attended_rh);
        let middle_rh = outputs.select(x_th) + scaled(added_rh, *residual_multiplier);
        let normed_rh = before(mlp.before.as_ref(), &middle_rh);
        let [(gate_rm, saved_gate), (up_rm, saved_up)] =
            Linear::forward_all([&mlp.gate, &mlp.up], &normed_rh, pass.adapters, &dropout);
        let product_rm = mlp.product(&gate_rm, &up_rm);
        let (down_rh, saved_down) = mlp.down.forward(&product_rm, pass.adapters, &dropout);
        let (added_rh, down_rh) = after(mlp.after.as_ref(), down_rh);
        let output_rh = &middle_rh + scaled(added_rh, *residual_multiplier);
        let normed_rh = mlp.before.as_ref().and_then(|_| pass.recompute.keep(normed_rh));
        let product_rm = pass.recompute.keep(product_rm);
        let adapters = [saved_o, saved_gate, saved_up, saved_down];
        (output_rh, Finished { attended_rh, down_rh, middle_rh, normed_rh, gate_rm, up_rm, product_rm, adapters })
    }

    /// Output and everything that the backward pass needs. Queries and keys are positioned within their examples by `rope`.
    pub fn forward(&self, x_th: &Tensor, segments: &Segments, pass: &Pass, outputs: Outputs) -> (Tensor, LayerSaved) {
        let (q_tnd, KeyValues { keys: k_tkd, values: v_tkd }, projected) = self.project(x_th, pass);
        let attention = attention::attention(&q_tnd, &k_tkd, &v_tkd, segments, self.attention.spec.scale);
        let (output_rh, finished) = self.finish(x_th, &attention.out, pass, outputs);
        (output_rh, LayerSaved { q_tnd, k_tkd, v_tkd, attention, projected, finished })
    }

    /// The gradients of the selected attention outputs and of `middle`, from that of the layer's output.
    fn finish_backward(
        &self,
        gradient_rh: Tensor,
        attended_rh: &Tensor,
        finished: Finished,
        dropout: &dyn InputMask,
    ) -> (Tensor, Tensor) {
        let Self { attention, mlp, residual_multiplier } = self;
        let Finished { attended_rh: unnormed_rh, down_rh, middle_rh, normed_rh, gate_rm, up_rm, product_rm, adapters } =
            finished;
        let [saved_o, saved_gate, saved_up, saved_down] = adapters;

        // output = middle + down(swiglu(gate(n), up(n))), n = norm(middle)
        let d_added_rh = scaled(gradient_rh.shallow_clone(), *residual_multiplier);
        let d_down_rh = after_backward(mlp.after.as_ref(), &d_added_rh, down_rh.as_ref());
        drop((d_added_rh, down_rh));
        let product_rm = product_rm.unwrap_or_else(|| mlp.product(&gate_rm, &up_rm));
        let mut d_product_rm = product_rm.zeros_like();
        mlp.down.backward(&d_down_rh, &product_rm, &saved_down, dropout, Some(&mut d_product_rm));
        drop((product_rm, d_down_rh));
        let (d_gate_rm, d_up_rm) = mlp.product_backward(&d_product_rm, &gate_rm, &up_rm);
        drop((d_product_rm, gate_rm, up_rm));
        let normed_rh = normed_rh.unwrap_or_else(|| before(mlp.before.as_ref(), &middle_rh));
        let mut d_normed_rh = normed_rh.zeros_like();
        mlp.gate.backward(&d_gate_rm, &normed_rh, &saved_gate, dropout, Some(&mut d_normed_rh));
        mlp.up.backward(&d_up_rm, &normed_rh, &saved_up, dropout, Some(&mut d_normed_rh));
        drop((d_gate_rm, d_up_rm, normed_rh));
        let d_middle_rh = before_backward(mlp.before.as_ref(), gradient_rh, &d_normed_rh, &middle_rh);
        // middle = x + o(attended)
        let d_added_rh = scaled(d_middle_rh.shallow_clone(), *residual_multiplier);
        let d_output_rh = after_backward(attention.after.as_ref(), &d_added_rh, unnormed_rh.as_ref());
        let mut d_attended_rh = attended_rh.zeros_like();
        attention.o.backward(&d_output_rh, attended_rh, &saved_o, dropout, Some(&mut d_attended_rh));
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
        let own = &self.attention;
        let LayerSaved { q_tnd, k_tkd, v_tkd, attention, projected, finished } = saved;
        let Projected { normed_th, unnormed, adapters: [saved_q, saved_k, saved_v] } = projected;
        let tokens = x_th.size()[0];
        let selected = SelectedMask { all: pass.dropout, outputs, tokens };
        let attended_rh = outputs.select(&attention.out.flatten(1, 2));
        let (d_attended_rh, d_middle_rh) = self.finish_backward(gradient_rh, &attended_rh, finished, &selected);
        drop(attended_rh);

        // attention(q(n), k(n), v(n)), n = norm(x)
        let d_attended_tnd = outputs.scatter(d_attended_rh, tokens).view(q_tnd.size().as_slice());
        let (dq_tnd, dk_tkd, dv_tkd) = attention::attention_backward(
            &d_attended_tnd,
            &q_tnd,
            &k_tkd,
            &v_tkd,
            &attention,
            segments,
            own.spec.scale,
        );
        let [unnormed_q, unnormed_k] = unnormed.map_or([None, None], |both| both.map(Some));
        let dq_tnd = own.rotate(dq_tnd, pass.rope, Rotation::Backward);
        let dk_tkd = own.rotate(dk_tkd, pass.rope, Rotation::Backward);
        let dq_th = own.normed_backward(own.query_norm.as_ref(), &dq_tnd, unnormed_q.as_ref());
        let dk_th = own.normed_backward(own.key_norm.as_ref(), &dk_tkd, unnormed_k.as_ref());
        let dv_th = dv_tkd.flatten(1, 2);
        let normed_th = normed_th.unwrap_or_else(|| before(own.before.as_ref(), x_th));
        let mut d_normed_th = (below == Below::Trained).then(|| normed_th.zeros_like());
        own.q.backward(&dq_th, &normed_th, &saved_q, pass.dropout, d_normed_th.as_mut());
        own.k.backward(&dk_th, &normed_th, &saved_k, pass.dropout, d_normed_th.as_mut());
        own.v.backward(&dv_th, &normed_th, &saved_v, pass.dropout, d_normed_th.as_mut());
        d_normed_th.map(|d_normed_th| {
            let d_middle_th = outputs.scatter(d_middle_rh, tokens);
            before_backward(own.before.as_ref(), d_middle_th, &d_normed_th, x_th)
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
