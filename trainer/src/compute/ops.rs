//! The pointwise parts of a decoder layer, each with its backward, on whole packed rows.
//!
//! Shapes: t packed tokens, h hidden size, n heads, d head size, m MLP width. Statistics are taken in fp32 whatever the
//! activation's dtype (fp64 stays fp64, for the tests against autograd), and cast once. Where there is a kernel of ours
//! each is one pass over its data (`shim::fused`); what is written out here is what that computes.

use tch::{Device, Kind, Tensor};

use crate::compute::shim::fused;

/// Elements of a product in bf16 that exist before they are added to fp32: libtorch on CPUs makes fp32 of all of them first, which
/// for a head is more than its logits take.
const PRODUCT_ELEMENTS_CPU: i64 = 2 << 20;
/// The same on an accelerator, where the product in bf16 exists: a head of 128,256 tokens by 3,072 would be 0.8 GB.
const PRODUCT_ELEMENTS_GPU: i64 = 64 << 20;

/// The dtype that statistics are taken in.
pub fn accumulate_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// A copy in the dtype that statistics are taken in, or the tensor itself where it is in that.
pub fn widened(x: &Tensor) -> Tensor {
    x.to_kind(accumulate_kind(x.kind()))
}

/// `x / rms(x)` in the accumulation dtype, and `1 / rms(x)` `[t, 1]`.
fn normalized(x_th: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let x_th = widened(x_th);
    let inverse_rms_t1 = (x_th.square().mean_dim(-1, true, None) + eps).rsqrt();
    (x_th * &inverse_rms_t1, inverse_rms_t1)
}

/// RMSNorm as in Llama: normalise in fp32, cast, then multiply by the weight `[h]`.
pub fn rms_norm(x_th: &Tensor, weight_h: &Tensor, eps: f64) -> Tensor {
    if let Some(normed_th) = fused::rms_norm(x_th, weight_h, eps) {
        return normed_th;
    }
    let (normalized_th, _) = normalized(x_th, eps);
    normalized_th.to_kind(x_th.kind()) * weight_h
}

/// The gradient of [`rms_norm`] with respect to `x`; adds the weight's to `weight_gradient` (fp32 `[h]`) where there is one.
pub fn rms_norm_backward(
    gradient_th: &Tensor,
    x_th: &Tensor,
    weight_h: &Tensor,
    eps: f64,
    weight_gradient: Option<&Tensor>,
) -> Tensor {
    let kind = accumulate_kind(x_th.kind());
    let (normalized_th, inverse_rms_t1) = normalized(x_th, eps);
    if let Some(weight_gradient) = weight_gradient {
        let share_th = (gradient_th.to_kind(kind) * &normalized_th).view([-1, weight_h.size()[0]]);
        let share_h = share_th.sum_dim_intlist([0i64].as_slice(), false, None);
        let _ = weight_gradient.shallow_clone().g_add_(&share_h);
    }
    let scaled_th = (gradient_th * weight_h).to_kind(kind);
    let mean_t1 = (&scaled_th * &normalized_th).mean_dim(-1, true, None);
    ((scaled_th - normalized_th * mean_t1) * inverse_rms_t1).to_kind(x_th.kind())
}

/// `residual` plus the gradient of [`rms_norm`] with respect to `x`, whose other path it is; adds the weight's as
/// [`rms_norm_backward`] does.
pub fn residual_norm_backward(
    residual_th: Tensor,
    gradient_th: &Tensor,
    x_th: &Tensor,
    weight_h: &Tensor,
    eps: f64,
    weight_gradient: Option<&Tensor>,
) -> Tensor {
    if weight_gradient.is_none()
        && let Some(sum_th) = fused::rms_norm_backward(gradient_th, x_th, weight_h, eps, &residual_th)
    {
        return sum_th;
    }
    residual_th + rms_norm_backward(gradient_th, x_th, weight_h, eps, weight_gradient)
}

/// `x W^T` of x `[t, in]` and W `[out, in]`.
pub fn linear(x_ti: &Tensor, weight_oi: &Tensor) -> Tensor {
    let [y_to] = linears(x_ti, [weight_oi]);
    y_to
}

/// [`linear`] of one x and several W.
pub fn linears<const N: usize>(x_ti: &Tensor, weights_oi: [&Tensor; N]) -> [Tensor; N] {
    fused::linears(x_ti, weights_oi).unwrap_or_else(|| weights_oi.map(|weight_oi| x_ti.matmul(&weight_oi.tr())))
}

/// Adds [`linear`] to `sum` `[t, out]`.
pub fn add_linear(sum_to: &mut Tensor, x_ti: &Tensor, weight_oi: &Tensor) {
    if !fused::add_linear(sum_to, x_ti, weight_oi) {
        let _ = sum_to.addmm_(x_ti, &weight_oi.tr());
    }
}

/// `target += a @ b` where the target may be fp32 and the factors bf16.
pub fn add_product(target: &Tensor, a: &Tensor, b: &Tensor) {
    if target.kind() == a.kind() {
        let _ = target.shallow_clone().addmm_(a, b);
        return;
    }
    let size = target.size();
    let elements = if target.device() == Device::Cpu { PRODUCT_ELEMENTS_CPU } else { PRODUCT_ELEMENTS_GPU };
    let rows = (elements / size[1]).max(1);
    for start in (0..size[0]).step_by(rows as usize) {
        let part = |tensor: &Tensor| tensor.narrow(0, start, rows.min(size[0] - start));
        let _ = part(target).g_add_(&part(a).matmul(b));
    }
}

/// `gelu(gate) * up`, `[t, m]`, with GELU's approximation by tanh.
pub fn geglu(gate_tm: &Tensor, up_tm: &Tensor) -> Tensor {
    gate_tm.gelu("tanh") * up_tm
}

/// The gradients of [`geglu`] with respect to `gate` and `up`.
pub fn geglu_backward(gradient_tm: &Tensor, gate_tm: &Tensor, up_tm: &Tensor) -> (Tensor, Tensor) {
    let up_gradient_tm = gate_tm.gelu("tanh") * gradient_tm;
    let gate_gradient_tm = gate_tm.gelu_backward(&(gradient_tm * up_tm), "tanh");
    (gate_gradient_tm, up_gradient_tm)
}

/// `silu(gate) * up`, `[t, m]`.
pub fn swiglu(gate_tm: &Tensor, up_tm: &Tensor) -> Tensor {
    fused::swiglu(gate_tm, up_tm).unwrap_or_else(|| gate_tm.silu() * up_tm)
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`.
pub fn swiglu_backward(gradient_tm: &Tensor, gate_tm: &Tensor, up_tm: &Tensor) -> (Tensor, Tensor) {
    if let Some(gradients_tm) = fused::swiglu_backward(gradient_tm, gate_tm, up_tm) {
        return gradients_tm;
    }
    let up_gradient_tm = gate_tm.silu() * gradient_tm;
    let gate_gradient_tm = gate_tm.silu_backward(&(gradient_tm * up_tm));
    (gate_gradient_tm, up_gradient_tm)
}

/// Rotary position embedding, rotate-half, with tables in the activation's dtype as transformers casts them.
#[derive(Debug)]
pub struct Rope {
    /// `[positions, 1, d]`
    cos: Tensor,
    /// `[positions, 1, d]`; its first half is negated, so that the rotation is `x * cos + swap_halves(x) * sin`.
    sin: Tensor,
}

/// Which way [`RopeRows::rotate`] turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// As in the forward pass.
    Forward,
    /// The transpose, for gradients.
    Backward,
}

impl Rope {
    /// Tables for positions `0..max_positions` from inverse frequencies `[d / 2]` (fp32).
    pub fn new(inverse_frequencies: &[f32], max_positions: i64, kind: Kind, device: tch::Device) -> Self {
        let inverse = Tensor::from_slice(inverse_frequencies).to_device(device);
        let positions = Tensor::arange(max_positions, (Kind::Float, device));
        let angles = positions.outer(&inverse);
        let sin = angles.sin();
        Self {
            cos: Tensor::cat(&[angles.cos(), angles.cos()], -1).to_kind(kind).unsqueeze(1),
            sin: Tensor::cat(&[-&sin, sin], -1).to_kind(kind).unsqueeze(1),
        }
    }

    /// The rows of the tables for `positions` (int64 `[t]`), gathered once per batch.
    pub fn at(&self, positions: &Tensor) -> RopeRows {
        RopeRows { cos: self.cos.index_select(0, positions), sin: self.sin.index_select(0, positions) }
    }

    /// Number of positions in the tables.
    pub fn max_positions(&self) -> i64 {
        self.cos.size()[0]
    }
}

/// Tables of one packed batch: `[t, 1, d]` each.
#[derive(Debug)]
pub struct RopeRows {
    cos: Tensor,
    sin: Tensor,
}

impl RopeRows {
    /// Rotates `x` `[t, n, d]`.
    pub fn rotate(&self, x_tnd: &Tensor, rotation: Rotation) -> Tensor {
        let sign = if rotation == Rotation::Forward { 1.0 } else { -1.0 };
        if let Some(rotated_tnd) = fused::rotate(x_tnd, &self.cos, &self.sin, sign) {
            return rotated_tnd;
        }
        let half = x_tnd.size()[2] / 2;
        let swapped_tnd = x_tnd.roll([half], [2]);
        match rotation {
            Rotation::Forward => x_tnd * &self.cos + swapped_tnd * &self.sin,
            Rotation::Backward => x_tnd * &self.cos - swapped_tnd * &self.sin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::shim::cpu;

    /// A fused kernel and the operations it stands for differ by rounding to the dtype at most.
    #[test]
    fn fused_kernels_compute_what_is_written_out() {
        tch::set_num_threads(1);
        if !cpu::kernels_run_here() {
            return;
        }
        for (kind, most) in [(Kind::BFloat16, 5e-3), (Kind::Float, 1e-6)] {
            let mut seed = 0;
            let mut random = |shape: &[i64]| {
                seed += 1;
                cpu::noise(seed, shape).to_kind(kind)
            };
            let (gate, up, gradient) = (random(&[37, 48]), random(&[37, 48]), random(&[37, 48]));
            let (weight, residual) = (random(&[48]), random(&[37, 48]));
            let eps = 1e-5;
            let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);
            let check = |what: &str, ours: &Tensor, exact: &Tensor| {
                let distance = cpu::distance(ours, exact);
                assert!(distance < most, "{kind:?} {what}: {distance:e}");
            };
            let [g, u, d, w, r] = [&gate, &up, &gradient, &weight, &residual].map(wide);
            check("swiglu", &swiglu(&gate, &up), &swiglu(&g, &u));
            let (ours, exact) = (swiglu_backward(&gradient, &gate, &up), swiglu_backward(&d, &g, &u));
            check("d_gate", &ours.0, &exact.0);
            check("d_up", &ours.1, &exact.1);
            check("rms_norm", &rms_norm(&gate, &weight, eps), &rms_norm(&g, &w, eps));
            let ours = residual_norm_backward(residual.shallow_clone(), &gradient, &gate, &weight, eps, None);
            check("d_norm", &ours, &residual_norm_backward(r.shallow_clone(), &d, &g, &w, eps, None));
            let (x, positions) = (random(&[37, 3, 64]), Tensor::arange(37, (Kind::Int64, Device::Cpu)));
            let inverse: Vec<f32> = (0..32u8).map(|pair| 100f32.powf(-f32::from(pair) / 32.0)).collect();
            for rotation in [Rotation::Forward, Rotation::Backward] {
                let rows = |kind| Rope::new(&inverse, 64, kind, Device::Cpu).at(&positions);
                check("rope", &rows(kind).rotate(&x, rotation), &rows(Kind::Double).rotate(&wide(&x), rotation));
            }
        }
    }

    /// Rows and outputs that fill no tile, and several; sums are added to and rounded once.
    #[test]
    fn few_rows_times_a_weight_are_the_product() {
        tch::set_num_threads(1);
        if !cpu::kernels_run_here() {
            return;
        }
        for (kind, most) in [(Kind::BFloat16, 3e-3), (Kind::Float, 1e-6)] {
            for (rows, inputs, outputs) in [
                (1, 576, 192),
                (3, 2, 50),
                (16, 8, 48),
                (22, 200, 97),
                (40, 34, 7),
                (64, 194, 8),
                (150, 1536, 64),
                (256, 18, 33),
            ] {
                let random = |seed, shape: &[i64]| cpu::noise(seed, shape).to_kind(kind);
                let (x, weight, sum) =
                    (random(1, &[rows, inputs]), random(2, &[outputs, inputs]), random(3, &[rows, outputs]));
                // Where there are kernels this one is asked.
                assert_eq!(
                    cpu::fits_linear(&x, &weight),
                    cpu::fits(&[&x, &weight], 2) && !(kind == Kind::BFloat16 && cpu::has_tiles())
                );
                let check = |what: &str, ours: &Tensor, exact: &Tensor| {
                    let distance = cpu::distance(ours, exact);
                    assert!(distance < most, "{kind:?} {rows} {inputs} {outputs} {what}: {distance:e}");
                };
                let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);
                let exact = wide(&x).matmul(&wide(&weight).tr());
                let product = linear(&x, &weight);
                check("product", &product, &exact);
                if cpu::fits_linear(&x, &weight) {
                    let last = |matrix: &Tensor| matrix.narrow(0, rows - 1, 1);
                    assert!(
                        linear(&last(&x), &weight).equal(&last(&product)),
                        "a row is the same among others and alone"
                    );
                }
                let larger = random(4, &[outputs + 50, inputs]);
                let [first, second] = linears(&x, [&larger, &weight]);
                assert!(first.equal(&linear(&x, &larger)) && second.equal(&product), "one x and two weights");
                let mut added = sum.copy();
                add_linear(&mut added, &x, &weight);
                check("sum", &added, &(wide(&sum) + exact));
            }
        }
    }
}
