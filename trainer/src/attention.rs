//! Causal attention over packed examples: no padding, no example sees another.
//!
//! Shapes: t packed tokens, n heads, k key-value heads, d head size, b examples of one length, l that length.
//! In bf16 on a CPU that has AVX512-BF16 our own kernel takes the whole row (`shim::cpu`); elsewhere on the CPU each run of
//! examples of equal length is one call of libtorch's flash attention, with keys and values expanded to all heads (measured
//! faster there than native grouping). On CUDA one variable-length call takes the whole row, where flash attention takes it.

use tch::{Device, Kind, Tensor};

use crate::shim::{self, cpu, cuda};

/// Head sizes that flash attention takes on every GPU that it takes: multiples of 8 up to this one.
const LARGEST_FLASH_HEAD: i64 = 192;
/// Elements of a matrix of scores, where it is made: of many short examples, or of one long one.
const SCORES: i64 = 64 << 20;

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

    /// What is computed at once: runs, or where their scores are made, parts of them whose scores have about so many elements.
    fn parts(&self, heads: i64, scores: Option<i64>) -> impl Iterator<Item = Run> {
        self.runs.iter().flat_map(move |&run| {
            let examples = scores.map_or(run.examples, |scores| (scores / (heads * run.length * run.length)).max(1));
            run.parts(examples)
        })
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

/// What scores are multiplied by.
pub fn scale(head_size: i64) -> f64 {
    1.0 / (head_size as f64).sqrt()
}

/// Whether an accelerator makes a matrix of the scores, because flash attention takes not the dtype, the head size, or the GPU.
pub fn makes_scores(kind: Kind, head_size: i64) -> bool {
    let takes_heads = head_size % 8 == 0 && head_size <= LARGEST_FLASH_HEAD;
    !matches!(kind, Kind::BFloat16 | Kind::Half)
        || !takes_heads
        || cuda::compute_capability().is_some_and(|capability| capability < cuda::HAS_BF16)
}

/// Elements of the largest matrix of scores of so many tokens in examples of at most `longest`.
pub fn score_elements(heads: i64, longest: i64, tokens: i64) -> i64 {
    (heads * longest * longest).max(SCORES.min(heads * longest * tokens))
}

fn uses_flash(q_tnd: &Tensor) -> bool {
    q_tnd.device().is_cuda() && !makes_scores(q_tnd.kind(), q_tnd.size()[2])
}

/// How large matrices of scores are made; `None` on a CPU, where libtorch's kernel makes none.
fn scores_at_once(q_tnd: &Tensor) -> Option<i64> {
    (q_tnd.device() != Device::Cpu).then_some(SCORES)
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
    by_runs([q_tnd, k_tkd, v_tkd], segments, scale, scores_at_once(q_tnd))
}

/// Run by run, by libtorch: its kernel for CPUs, or matrix products with `scores` of so many elements.
fn by_runs([q_tnd, k_tkd, v_tkd]: [&Tensor; 3], segments: &Segments, scale: f64, scores: Option<i64>) -> Saved {
    let heads = q_tnd.size()[1];
    let (k_tnd, v_tnd) = (expand_heads(k_tkd, heads), expand_heads(v_tkd, heads));
    let out_tnd = q_tnd.empty_like();
    let mut logsumexp = Vec::with_capacity(segments.runs.len());
    for run in segments.parts(heads, scores) {
        let (q, k, v) = (as_batch(q_tnd, run), as_batch(&k_tnd, run), as_batch(&v_tnd, run));
        let (out, statistics) = if scores.is_none() {
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
            by_runs_backward(gradient_tnd, [q_tnd, k_tkd, v_tkd], forward, segments, scale, scores_at_once(q_tnd))
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
    scores: Option<i64>,
) -> (Tensor, Tensor, Tensor) {
    let (heads, kv_heads) = (q_tnd.size()[1], k_tkd.size()[1]);
    let (k_tnd, v_tnd) = (expand_heads(k_tkd, heads), expand_heads(v_tkd, heads));
    let (dq_tnd, dk_tnd, dv_tnd) = (q_tnd.empty_like(), k_tnd.empty_like(), v_tnd.empty_like());
    for (run, logsumexp) in segments.parts(heads, scores).zip(logsumexp) {
        let [q, k, v, out, gradient] =
            [q_tnd, &k_tnd, &v_tnd, out_tnd, gradient_tnd].map(|tensor| as_batch(tensor, run));
        let (dq, dk, dv) = if scores.is_none() {
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
    let mut scores_bnll = q_bnld.matmul(&k_bnld.transpose(2, 3));
    let _ = scores_bnll.g_mul_scalar_(scale).masked_fill_(&future, f64::NEG_INFINITY);
    scores_bnll
}

/// Attention from matrix products, on accelerators where flash attention does not do: see [`makes_scores`]. Two matrices as large
/// as the scores are there at once.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let mut scores = masked_scores(q, k, scale);
    let logsumexp = scores.logsumexp([-1i64].as_slice(), true);
    let probabilities = scores.g_sub_(&logsumexp).exp_();
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
    let dv = probabilities.transpose(2, 3).matmul(gradient);
    let row_sum = (gradient * out).sum_dim_intlist([-1i64].as_slice(), true, None);
    let mut d_scores = gradient.matmul(&v.transpose(2, 3));
    let _ = d_scores.g_sub_(&row_sum).g_mul_(&probabilities).g_mul_scalar_(scale);
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
                let saved = if ours {
                    attention(&q, &k, &v, &segments, scale)
                } else {
                    by_runs([&q, &k, &v], &segments, scale, None)
                };
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
        let bounds = [0, 5, 10, 15, 22];
        let segments = Segments::new(&bounds, Device::Cpu);
        assert_eq!(segments.runs.len(), 2, "three examples of five tokens are one run");
        let (heads, kv_heads, head_dim, scale) = (4, 2, 8, 0.3);
        let random = |seed, heads| cpu::noise(seed, &[22, heads, head_dim]).to_kind(Kind::Double);
        let (q, k, v, gradient) = (random(1, heads), random(2, kv_heads), random(3, kv_heads), random(4, heads));
        let all = |[q, k, v, gradient]: [&Tensor; 4], segments: &Segments, scores: Option<i64>| {
            let Saved { out, statistics: Statistics::Runs(logsumexp) } = by_runs([q, k, v], segments, scale, scores)
            else {
                panic!("no kernel of ours takes fp64")
            };
            let (dq, dk, dv) = by_runs_backward(gradient, [q, k, v], (&out, &logsumexp), segments, scale, scores);
            ([out, dq, dk, dv], logsumexp.len())
        };
        let (kernel, parts) = all([&q, &k, &v, &gradient], &segments, None);
        assert_eq!(parts, 2);
        // One example at a time, two of the short ones, all of a run.
        for (scores, expected_parts) in [(1, 4), (2 * heads * 25, 3), (SCORES, 2)] {
            let (plain, parts) = all([&q, &k, &v, &gradient], &segments, Some(scores));
            assert_eq!(parts, expected_parts);
            for (plain, kernel) in plain.iter().zip(&kernel) {
                assert!((plain - kernel).abs().max().double_value(&[]) < 1e-12);
            }
        }
        for pair in bounds.windows(2) {
            let (start, length) = (i64::from(pair[0]), i64::from(pair[1] - pair[0]));
            let alone = [&q, &k, &v, &gradient].map(|tensor| tensor.narrow(0, start, length));
            let (alone, _) = all(alone.each_ref(), &Segments::new(&[0, length as i32], Device::Cpu), Some(SCORES));
            for (alone, kernel) in alone.iter().zip(&kernel) {
                assert!((alone - kernel.narrow(0, start, length)).abs().max().double_value(&[]) < 1e-12);
            }
        }
    }

    #[test]
    fn scores_are_made_where_flash_attention_does_not_do() {
        // Without a GPU the newest is taken for granted.
        let sizes = [64, 96, 128, 192, 100, 256];
        assert_eq!(sizes.map(|size| makes_scores(Kind::BFloat16, size)), [false, false, false, false, true, true]);
        assert!(makes_scores(Kind::Float, 64));
        // One long example, many short ones, few short ones.
        let elements =
            [(4096, 8192), (64, 8192), (64, 128)].map(|(longest, tokens)| score_elements(32, longest, tokens));
        assert_eq!(elements, [32 << 24, 32 * 64 * 8192, 32 * 64 * 128]);
        assert_eq!(score_elements(32, 512, 1 << 20), SCORES);
    }
}
