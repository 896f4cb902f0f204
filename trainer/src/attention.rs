//! Causal attention over packed examples: no padding, no example sees another.
//!
//! Shapes: t packed tokens, n heads, k key-value heads, d head size, b examples of one length, l that length.
//! In bf16 on a CPU that has AVX512-BF16 our own kernel takes the whole row (`shim::cpu`); elsewhere on the CPU each run of
//! examples of equal length is one call of libtorch's flash attention, with keys and values expanded to all heads (measured
//! faster there than native grouping). On CUDA one variable-length call takes the whole row.

use tch::{Device, Kind, Tensor};

use crate::shim::{self, cpu};

/// Where the examples of a packed row begin and end, on the host and (int32, for CUDA kernels) on the device.
#[derive(Debug)]
pub struct Segments {
    runs: Vec<Run>,
    cu_seqlens: Tensor,
    max_length: i64,
}

/// Adjacent examples of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: i64,
    examples: i64,
    length: i64,
}

impl Segments {
    /// From `[0, l1, l1 + l2, …]`.
    pub fn new(cu_seqlens: &[i32], device: Device) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for pair in cu_seqlens.windows(2) {
            let (start, length) = (i64::from(pair[0]), i64::from(pair[1] - pair[0]));
            match runs.last_mut() {
                Some(run) if run.length == length => run.examples += 1,
                _ => runs.push(Run { start, examples: 1, length }),
            }
        }
        let max_length = runs.iter().map(|run| run.length).max().unwrap_or(0);
        Self { runs, cu_seqlens: shim::upload(cu_seqlens, device), max_length }
    }
}

/// What the backward pass needs beside q, k and v.
#[derive(Debug)]
pub struct Saved {
    /// `[t, n, d]`
    pub out: Tensor,
    statistics: Statistics,
}

#[derive(Debug)]
enum Statistics {
    /// Log-sum-exp of each run, `[b, n, l]`.
    Runs(Vec<Tensor>),
    /// Log-sum-exp, `[n, t]`.
    Kernel(Tensor),
    Flash(shim::FlashAttention),
}

/// `[b * l, heads, d]` rows of a run as `[b, heads, l, d]`, without a copy.
fn as_batch(x_tnd: &Tensor, run: Run) -> Tensor {
    let size = x_tnd.size();
    x_tnd
        .narrow(0, run.start, run.examples * run.length)
        .view([run.examples, run.length, size[1], size[2]])
        .transpose(1, 2)
}

/// Repeats each key-value head for its group of query heads.
fn expand_heads(x_tkd: &Tensor, heads: i64) -> Tensor {
    let size = x_tkd.size();
    let (tokens, kv_heads, head_dim) = (size[0], size[1], size[2]);
    if kv_heads == heads {
        return x_tkd.shallow_clone();
    }
    x_tkd.unsqueeze(2).expand([tokens, kv_heads, heads / kv_heads, head_dim], false).reshape([tokens, heads, head_dim])
}

/// Adds up the gradients of the heads that share a key-value head.
fn sum_groups(x_tnd: &Tensor, kv_heads: i64) -> Tensor {
    let size = x_tnd.size();
    if size[1] == kv_heads {
        return x_tnd.shallow_clone();
    }
    x_tnd.view([size[0], kv_heads, size[1] / kv_heads, size[2]]).sum_dim_intlist([2i64].as_slice(), false, None)
}

/// What scores are multiplied by.
pub fn scale(head_size: i64) -> f64 {
    1.0 / (head_size as f64).sqrt()
}

fn uses_flash(q: &Tensor) -> bool {
    q.device().is_cuda() && matches!(q.kind(), Kind::BFloat16 | Kind::Half)
}

/// `softmax(scale * q k^T) v` within each example; the output is in [`Saved::out`].
pub fn attention(q_tnd: &Tensor, k_tkd: &Tensor, v_tkd: &Tensor, segments: &Segments, scale: f64) -> Saved {
    if uses_flash(q_tnd) {
        let saved = shim::flash_attention(q_tnd, k_tkd, v_tkd, &segments.cu_seqlens, segments.max_length, scale)
            .unwrap_or_else(|error| panic!("{error}"));
        return Saved { out: saved.out.shallow_clone(), statistics: Statistics::Flash(saved) };
    }
    let [q, k, v] = [q_tnd, k_tkd, v_tkd].map(Tensor::contiguous);
    if cpu::fits(&[&q, &k, &v], cpu::HEAD_WIDTH) {
        let (out, logsumexp) = cpu::attention(&q, &k, &v, &segments.cu_seqlens, scale);
        return Saved { out, statistics: Statistics::Kernel(logsumexp) };
    }
    by_runs(q_tnd, k_tkd, v_tkd, segments, scale)
}

/// Run by run, by libtorch.
fn by_runs(q_tnd: &Tensor, k_tkd: &Tensor, v_tkd: &Tensor, segments: &Segments, scale: f64) -> Saved {
    let heads = q_tnd.size()[1];
    let (k_tnd, v_tnd) = (expand_heads(k_tkd, heads), expand_heads(v_tkd, heads));
    let out_tnd = q_tnd.empty_like();
    let mut logsumexp = Vec::with_capacity(segments.runs.len());
    for &run in &segments.runs {
        let (q, k, v) = (as_batch(q_tnd, run), as_batch(&k_tnd, run), as_batch(&v_tnd, run));
        let (out, statistics) = if q_tnd.device() == Device::Cpu {
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(&q, &k, &v, 0.0, true, None, scale)
        } else {
            plain_attention(&q, &k, &v, scale)
        };
        as_batch(&out_tnd, run).copy_(&out);
        logsumexp.push(statistics);
    }
    Saved { out: out_tnd, statistics: Statistics::Runs(logsumexp) }
}

/// The gradients of [`attention`] with respect to q, k and v.
pub fn attention_backward(
    gradient_tnd: &Tensor,
    q_tnd: &Tensor,
    k_tkd: &Tensor,
    v_tkd: &Tensor,
    saved: &Saved,
    segments: &Segments,
    scale: f64,
) -> (Tensor, Tensor, Tensor) {
    let logsumexp = match &saved.statistics {
        Statistics::Flash(flash) => {
            return Tensor::internal_flash_attention_backward(
                &gradient_tnd.contiguous(),
                q_tnd,
                k_tkd,
                v_tkd,
                &flash.out,
                &flash.logsumexp,
                &segments.cu_seqlens,
                &segments.cu_seqlens,
                segments.max_length,
                segments.max_length,
                0.0,
                true,
                &flash.rng_state,
                &flash.unused,
                scale,
                None,
                None,
            );
        }
        Statistics::Kernel(logsumexp) => {
            let [gradient, q, k, v] = [gradient_tnd, q_tnd, k_tkd, v_tkd].map(Tensor::contiguous);
            let forward = (&saved.out, logsumexp);
            return cpu::attention_backward(&gradient, [&q, &k, &v], forward, &segments.cu_seqlens, scale).into();
        }
        Statistics::Runs(logsumexp) => logsumexp,
    };
    let (heads, kv_heads) = (q_tnd.size()[1], k_tkd.size()[1]);
    let (k_tnd, v_tnd) = (expand_heads(k_tkd, heads), expand_heads(v_tkd, heads));
    let (dq_tnd, dk_tnd, dv_tnd) = (q_tnd.empty_like(), k_tnd.empty_like(), v_tnd.empty_like());
    for (&run, logsumexp) in segments.runs.iter().zip(logsumexp) {
        let [q, k, v, out, gradient] =
            [q_tnd, &k_tnd, &v_tnd, &saved.out, gradient_tnd].map(|tensor| as_batch(tensor, run));
        let (dq, dk, dv) = if q_tnd.device() == Device::Cpu {
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward::<Tensor>(
                &gradient, &q, &k, &v, &out, logsumexp, 0.0, true, None, scale,
            )
        } else {
            plain_attention_backward(&gradient, &q, &k, &v, &out, logsumexp, scale)
        };
        as_batch(&dq_tnd, run).copy_(&dq);
        as_batch(&dk_tnd, run).copy_(&dk);
        as_batch(&dv_tnd, run).copy_(&dv);
    }
    (dq_tnd, sum_groups(&dk_tnd, kv_heads), sum_groups(&dv_tnd, kv_heads))
}

/// Scores `[b, n, l, l]` with what lies in the future masked out.
fn masked_scores(q_bnld: &Tensor, k_bnld: &Tensor, scale: f64) -> Tensor {
    let length = q_bnld.size()[2];
    let future = Tensor::ones([length, length], (Kind::Bool, q_bnld.device())).triu(1);
    (q_bnld.matmul(&k_bnld.transpose(2, 3)) * scale).masked_fill(&future, f64::NEG_INFINITY)
}

/// Attention from matrix products: for accelerators in a dtype that flash attention does not take.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let scores = masked_scores(q, k, scale);
    let logsumexp = scores.logsumexp([-1i64].as_slice(), true);
    ((scores - &logsumexp).exp().matmul(v), logsumexp.squeeze_dim(-1))
}

fn plain_attention_backward(
    gradient: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    logsumexp: &Tensor,
    scale: f64,
) -> (Tensor, Tensor, Tensor) {
    let probabilities = (masked_scores(q, k, scale) - logsumexp.unsqueeze(-1)).exp();
    let dv = probabilities.transpose(2, 3).matmul(gradient);
    let row_sum = (gradient * out).sum_dim_intlist([-1i64].as_slice(), true, None);
    let d_scores = probabilities * (gradient.matmul(&v.transpose(2, 3)) - row_sum) * scale;
    (d_scores.matmul(k), d_scores.transpose(2, 3).matmul(q), dv)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our kernel rounds to bf16 where libtorch's does: both are as far from fp64. In fp32 it is exact to its last digits.
    #[test]
    fn our_kernel_is_as_exact_as_libtorchs() {
        tch::set_num_threads(1);
        for (lengths, heads, kv_heads, head_dim) in
            [(&[1, 2, 17, 50, 23][..], 9, 3, 64), (&[130, 64, 257], 4, 4, 32), (&[600], 2, 1, 128)]
        {
            let mut bounds = vec![0];
            bounds.extend(lengths.iter().scan(0, |end, length: &i32| {
                *end += length;
                Some(*end)
            }));
            let tokens = i64::from(bounds[lengths.len()]);
            let segments = Segments::new(&bounds, Device::Cpu);
            let random = |seed, heads| (cpu::noise(seed, &[tokens, heads, head_dim]) * 2).to_kind(Kind::BFloat16);
            let (q, k, v, gradient) = (random(1, heads), random(2, kv_heads), random(3, kv_heads), random(4, heads));
            let scale = 1.0 / (head_dim as f64).sqrt();
            let all = |kind: Kind, ours: bool| {
                let [q, k, v, gradient] = [&q, &k, &v, &gradient].map(|tensor| tensor.to_kind(kind));
                let saved =
                    if ours { attention(&q, &k, &v, &segments, scale) } else { by_runs(&q, &k, &v, &segments, scale) };
                assert_eq!(matches!(saved.statistics, Statistics::Kernel(_)), ours && cpu::fits(&[&q], 32));
                let (dq, dk, dv) = attention_backward(&gradient, &q, &k, &v, &saved, &segments, scale);
                [saved.out.shallow_clone(), dq, dk, dv].map(|tensor| tensor.to_kind(Kind::Double))
            };
            let exact = all(Kind::Double, false);
            for (kind, most) in [(Kind::BFloat16, 1e-2), (Kind::Float, 1e-6)] {
                let (ours, libtorchs) = (all(kind, true), all(kind, false));
                for (place, ((exact, ours), theirs)) in exact.iter().zip(&ours).zip(&libtorchs).enumerate() {
                    let (ours, theirs) = (cpu::distance(ours, exact), cpu::distance(theirs, exact));
                    let bound = if kind == Kind::Float { most } else { (1.2 * theirs).min(most) };
                    assert!(ours < bound, "{lengths:?} {kind:?} {place}: {ours:e}, libtorch {theirs:e}");
                }
            }
        }
    }

    #[test]
    fn kernel_and_plain_attention_agree_and_examples_do_not_mix() {
        tch::set_num_threads(1);
        let cu_seqlens = [0, 5, 10, 17];
        let segments = Segments::new(&cu_seqlens, Device::Cpu);
        assert_eq!(segments.runs.len(), 2, "two examples of five tokens are one run");
        let (heads, kv_heads, head_dim) = (4, 2, 8);
        let random = |seed, heads| cpu::noise(seed, &[17, heads, head_dim]).to_kind(Kind::Double);
        let (q, k, v, gradient) = (random(1, heads), random(2, kv_heads), random(3, kv_heads), random(4, heads));
        let saved = attention(&q, &k, &v, &segments, 0.3);
        let (dq, dk, dv) = attention_backward(&gradient, &q, &k, &v, &saved, &segments, 0.3);
        for pair in cu_seqlens.windows(2) {
            let run = Run { start: pair[0].into(), examples: 1, length: (pair[1] - pair[0]).into() };
            let (k_all, v_all) = (expand_heads(&k, heads), expand_heads(&v, heads));
            let [q, ke, ve, go] = [&q, &k_all, &v_all, &gradient].map(|tensor| as_batch(tensor, run));
            let (out, logsumexp) = plain_attention(&q, &ke, &ve, 0.3);
            let (eq, ek, ev) = plain_attention_backward(&go, &q, &ke, &ve, &out, &logsumexp, 0.3);
            let as_rows = |x: &Tensor| x.squeeze_dim(0).transpose(0, 1).contiguous();
            let expected = [as_rows(&out), as_rows(&eq), sum_groups(&as_rows(&ek), 2), sum_groups(&as_rows(&ev), 2)];
            for (ours, expected) in [&saved.out, &dq, &dk, &dv].into_iter().zip(expected) {
                let ours = ours.narrow(0, run.start, run.length);
                assert!((ours - expected).abs().max().double_value(&[]) < 1e-12);
            }
        }
    }
}
