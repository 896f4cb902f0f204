//! Causal attention over packed examples: no padding, no example sees another.
//!
//! Shapes: t packed tokens, n heads, k key-value heads, d head size, b examples of one length, l that length.
//! In bf16 on a CPU that has AVX512-BF16 our own kernel takes the whole row (`shim::cpu`); elsewhere on the CPU each run of
//! examples of equal length is one call of libtorch's flash attention, with keys and values expanded to all heads (measured
//! faster there than native grouping). On CUDA one variable-length call takes the whole row, where flash attention takes it.

use tch::{Device, Kind, Tensor};

use crate::compute::ops::{accumulate_kind, widened};
use crate::compute::shim::cuda::ComputeCapability;
use crate::compute::shim::{self, cpu, cuda};

/// Larger heads flash attention takes on some GPUs only, and no model that is known here has them.
const LARGEST_FLASH_HEAD: i64 = 192;
/// Most elements of a matrix of scores, unless those of one example are more.
const MOST_SCORES: i64 = 64 << 20;

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

impl Run {
    /// Its examples, so many at a time.
    fn parts(self, examples: i64) -> impl Iterator<Item = Self> {
        (0..self.examples).step_by(examples as usize).map(move |first| Self {
            start: self.start + first * self.length,
            examples: examples.min(self.examples - first),
            length: self.length,
        })
    }
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

    /// What is computed at once: runs, or where scores are made, parts of runs whose scores are at most so many, or one example.
    fn parts(&self, heads: i64, most_scores: Option<i64>) -> Vec<Run> {
        let at_once =
            |run: Run| most_scores.map_or(run.examples, |most| (most / (heads * run.length * run.length)).max(1));
        self.runs.iter().flat_map(|&run| run.parts(at_once(run))).collect()
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
    /// Log-sum-exp of each run or part of one, `[b, n, l]`.
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

/// Whether a GPU makes matrices of scores because flash attention takes not the dtype, the head size, or the GPU.
pub fn makes_scores(kind: Kind, head_size: i64, compute_capability: Option<ComputeCapability>) -> bool {
    let takes_kind = matches!(kind, Kind::BFloat16 | Kind::Half);
    let takes_heads = head_size % 8 == 0 && head_size <= LARGEST_FLASH_HEAD;
    !(takes_kind && takes_heads && cuda::multiplies_bf16(compute_capability))
}

/// What attention on a GPU computes with, and why.
pub fn describe(kind: Kind, head_size: i64, compute_capability: Option<ComputeCapability>) -> (&'static str, String) {
    let narrow = matches!(kind, Kind::BFloat16 | Kind::Half);
    let why = match compute_capability {
        Some((major, minor)) if !cuda::multiplies_bf16(compute_capability) => {
            format!("flash attention is not for a GPU of compute capability {major}.{minor}")
        }
        _ if !narrow => format!("flash attention computes in bf16, the run in {kind:?}"),
        _ => format!(
            "heads of {head_size}; flash attention takes multiples of 8 up to {LARGEST_FLASH_HEAD}, at any length, without a matrix"
        ),
    };
    (if makes_scores(kind, head_size, compute_capability) { "matrices of scores" } else { "flash attention" }, why)
}

/// Bytes in which flash attention's backward pass sums the gradients of queries, in fp32, for so many tokens of so many examples. In
/// deterministic mode there are as many sums of each as let all `multiprocessors` work: `mha_varlen_bwd` of libtorch 2.11.
pub fn flash_backward_bytes([heads, head_size]: [i64; 2], tokens: i64, examples: i64, multiprocessors: i64) -> i64 {
    const BLOCK: i64 = 128;
    let sums = (multiprocessors + heads * examples - 1) / (heads * examples);
    let width = if head_size <= BLOCK { 32 } else { 64 };
    sums * (tokens + BLOCK * examples) * heads * ((head_size + width - 1) / width * width) * 4
}

/// Bytes of the matrices that exist at once where scores are made of so many tokens in examples of at most `longest`: two in the
/// accumulation dtype, and one in a narrower dtype where that is the activations'.
pub fn score_bytes(kind: Kind, heads: i64, longest: i64, tokens: i64) -> i64 {
    let bytes = |kind: Kind| kind.elt_size_in_bytes() as i64;
    let narrow = if accumulate_kind(kind) == kind { 0 } else { bytes(kind) };
    let elements = (heads * longest * longest).max(MOST_SCORES.min(heads * longest * tokens));
    elements * (2 * bytes(accumulate_kind(kind)) + narrow)
}

fn uses_flash(q_tnd: &Tensor) -> bool {
    q_tnd.device().is_cuda()
        && !makes_scores(q_tnd.kind(), q_tnd.size()[2], cuda::properties().map(|gpu| gpu.compute_capability))
}

/// Elements that a matrix of scores has at most; `None` on a CPU, where libtorch's kernel makes none.
fn most_scores(q_tnd: &Tensor) -> Option<i64> {
    (q_tnd.device() != Device::Cpu).then_some(MOST_SCORES)
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
    by_runs([q_tnd, k_tkd, v_tkd], segments, scale, most_scores(q_tnd))
}

/// Run by run, by libtorch: its kernel for CPUs, or matrix products in parts as [`Segments::parts`] gives them.
fn by_runs([q_tnd, k_tkd, v_tkd]: [&Tensor; 3], segments: &Segments, scale: f64, most_scores: Option<i64>) -> Saved {
    let heads = q_tnd.size()[1];
    let (k_tnd, v_tnd) = (expand_heads(k_tkd, heads), expand_heads(v_tkd, heads));
    let out_tnd = q_tnd.empty_like();
    let mut logsumexp = Vec::with_capacity(segments.runs.len());
    for run in segments.parts(heads, most_scores) {
        let (q, k, v) = (as_batch(q_tnd, run), as_batch(&k_tnd, run), as_batch(&v_tnd, run));
        let (out, statistics) = if most_scores.is_none() {
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
    match &saved.statistics {
        Statistics::Flash(flash) => Tensor::internal_flash_attention_backward(
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
        ),
        Statistics::Kernel(logsumexp) => {
            let [gradient, q, k, v] = [gradient_tnd, q_tnd, k_tkd, v_tkd].map(Tensor::contiguous);
            let forward = (&saved.out, logsumexp);
            cpu::attention_backward(&gradient, [&q, &k, &v], forward, &segments.cu_seqlens, scale).into()
        }
        Statistics::Runs(logsumexp) => {
            let forward = (&saved.out, logsumexp.as_slice());
            by_runs_backward(gradient_tnd, [q_tnd, k_tkd, v_tkd], forward, segments, scale, most_scores(q_tnd))
        }
    }
}

/// The gradients of [`by_runs`], from its output and each run's log-sum-exp.
fn by_runs_backward(
    gradient_tnd: &Tensor,
    [q_tnd, k_tkd, v_tkd]: [&Tensor; 3],
    (out_tnd, logsumexp): (&Tensor, &[Tensor]),
    segments: &Segments,
    scale: f64,
    most_scores: Option<i64>,
) -> (Tensor, Tensor, Tensor) {
    let (heads, kv_heads) = (q_tnd.size()[1], k_tkd.size()[1]);
    let (k_tnd, v_tnd) = (expand_heads(k_tkd, heads), expand_heads(v_tkd, heads));
    let (dq_tnd, dk_tnd, dv_tnd) = (q_tnd.empty_like(), k_tnd.empty_like(), v_tnd.empty_like());
    let parts = segments.parts(heads, most_scores);
    assert_eq!(parts.len(), logsumexp.len(), "backward goes through the parts of forward");
    for (run, logsumexp) in parts.into_iter().zip(logsumexp) {
        let [q, k, v, out, gradient] =
            [q_tnd, &k_tnd, &v_tnd, out_tnd, gradient_tnd].map(|tensor| as_batch(tensor, run));
        let (dq, dk, dv) = if most_scores.is_none() {
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

/// Scores `[b, n, l, l]` in the accumulation dtype, with what lies in the future masked out.
fn masked_scores(q_bnld: &Tensor, k_bnld: &Tensor, scale: f64) -> Tensor {
    let length = q_bnld.size()[2];
    let future = Tensor::ones([length, length], (Kind::Bool, q_bnld.device())).triu(1);
    let mut scores_bnll = widened(q_bnld).matmul(&widened(k_bnld).transpose(2, 3));
    let _ = scores_bnll.g_mul_scalar_(scale).masked_fill_(&future, f64::NEG_INFINITY);
    scores_bnll
}

/// Attention from matrix products, on accelerators where flash attention does not do: see [`makes_scores`]. As there, scores and their
/// gradients are in the accumulation dtype until they are factors.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let mut scores = masked_scores(q, k, scale);
    let logsumexp = scores.logsumexp([-1i64].as_slice(), true);
    let probabilities = scores.g_sub_(&logsumexp).exp_().to_kind(v.kind());
    (probabilities.matmul(v), logsumexp.squeeze_dim(-1))
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
    let probabilities = masked_scores(q, k, scale).g_sub_(&logsumexp.unsqueeze(-1)).exp_();
    let dv = probabilities.to_kind(v.kind()).transpose(2, 3).matmul(gradient);
    let row_sum = (widened(gradient) * widened(out)).sum_dim_intlist([-1i64].as_slice(), true, None);
    let mut d_scores = widened(gradient).matmul(&widened(v).transpose(2, 3));
    let _ = d_scores.g_sub_(&row_sum).g_mul_(&probabilities).g_mul_scalar_(scale);
    let d_scores = d_scores.to_kind(q.kind());
    (d_scores.matmul(k), d_scores.transpose(2, 3).matmul(q), dv)
}

#[cfg(test)]
mod tests;
