//! The parts of a layer for which there is a kernel of ours on the tensors' device: each function computes what `ops.rs`,
//! `loss.rs` and `dropout.rs` write out beside its call, or gives `None` where no kernel takes these tensors.

use tch::{Device, Kind, Tensor};

use super::{DropoutMask, cpu, cuda};

/// RMSNorm of rows.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Option<Tensor> {
    let tensors = [x, weight];
    if cpu::fits(&tensors, cpu::ROW_WIDTH) {
        return Some(cpu::rms_norm(x, weight, eps));
    }
    cuda::fits(&tensors, cuda::ROW_WIDTH).map(|kernels| kernels.rms_norm(x, weight, eps))
}

/// `residual` plus the gradient of [`rms_norm`] with respect to `x`.
pub fn rms_norm_backward(
    gradient: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    residual: &Tensor,
) -> Option<Tensor> {
    let tensors = [gradient, x, weight, residual];
    if cpu::fits(&tensors, cpu::ROW_WIDTH) {
        return Some(cpu::rms_norm_backward(gradient, x, weight, eps, residual));
    }
    let kernels = cuda::fits(&tensors, cuda::ROW_WIDTH)?;
    Some(kernels.rms_norm_backward(gradient, x, weight, eps, residual))
}

/// x `[t, in]` times each of `weights` `[out, in]` transposed.
pub fn linears<const N: usize>(x: &Tensor, weights: [&Tensor; N]) -> Option<[Tensor; N]> {
    weights.iter().all(|weight| cpu::fits_linear(x, weight)).then(|| cpu::linears(x, weights))
}

/// Adds one of [`linears`] to `sum` `[t, out]`; whether there is a kernel.
pub fn add_linear(sum: &Tensor, x: &Tensor, weight: &Tensor) -> bool {
    let fits = cpu::fits_linear(x, weight) && sum.is_contiguous();
    if fits {
        cpu::add_linear(sum, x, weight);
    }
    fits
}

/// `silu(gate) * up`
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Option<Tensor> {
    let tensors = [gate, up];
    if cpu::fits(&tensors, cpu::ROW_WIDTH) {
        return Some(cpu::swiglu(gate, up));
    }
    cuda::fits(&tensors, cuda::ROW_WIDTH).map(|kernels| kernels.swiglu(gate, up))
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`.
pub fn swiglu_backward(gradient: &Tensor, gate: &Tensor, up: &Tensor) -> Option<(Tensor, Tensor)> {
    let tensors = [gradient, gate, up];
    if cpu::fits(&tensors, cpu::ROW_WIDTH) {
        return Some(cpu::swiglu_backward(gradient, gate, up));
    }
    cuda::fits(&tensors, cuda::ROW_WIDTH).map(|kernels| kernels.swiglu_backward(gradient, gate, up))
}

/// `x * cos + sign * swap_halves(x) * sin` of x `[t, n, d]`, cos and sin `[t, 1, d]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Option<Tensor> {
    let tensors = [x, cos, sin];
    if cpu::fits(&tensors, cpu::HEAD_WIDTH) {
        return Some(cpu::rotate(x, cos, sin, sign));
    }
    cuda::fits(&tensors, cuda::HEAD_WIDTH).map(|kernels| kernels.rotate(x, cos, sin, sign))
}

/// Negative log-likelihoods of `labels` (int64 `[n]`), fp32 `[n]`. The logits `[n, v]` become `scale * (softmax - onehot)`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, scale: f64) -> Option<Tensor> {
    if cpu::fits(&[logits], cpu::ROW_WIDTH) {
        return Some(cpu::cross_entropy(logits, labels, scale));
    }
    // Rows of any width: vocabularies to which tokens were added are seldom round.
    cuda::fits(&[logits], 1).map(|kernels| kernels.cross_entropy(logits, labels, scale))
}

/// A mask of dropout.
pub fn dropout(mask: &DropoutMask) -> Option<Tensor> {
    if !matches!(mask.kind, Kind::BFloat16 | Kind::Float) {
        return None;
    }
    match mask.keys.device() {
        Device::Cpu => Some(cpu::dropout(mask)),
        device => cuda::on(device).map(|kernels| kernels.dropout(mask)),
    }
}
