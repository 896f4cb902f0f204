//! Our kernels for bf16 and fp32 on CPUs (`cpp/attention.cpp`, `cpp/pointwise.cpp`, `cpp/linear.cpp`, `cpp/optimizer.cpp`,
//! `cpp/dropout.cpp`). Which instructions each is compiled for stands in one table, `cpp/kernels.h`, and one that the processor
//! cannot run is refused before it is entered. Like tch's own functions they panic with libtorch's message where arguments do not
//! belong together; [`fits`] says beforehand whether they can be used.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use super::{DropoutMask, check, done, handle};

unsafe extern "C" {
    fn ft_cpu_instructions() -> c_int;
    fn ft_cpu_processor() -> c_int;
    #[cfg(test)]
    fn ft_cpu_limit(instructions: c_int);
    fn ft_cpu_has_tiles() -> c_int;
    fn ft_cpu_kernel(index: c_int, variant: *mut c_int) -> *const c_char;
    fn ft_cpu_attention(
        query: *mut c_void,
        key: *mut c_void,
        value: *mut c_void,
        bounds: *mut c_void,
        scale: f64,
        out: *mut c_void,
        logsumexp: *mut c_void,
    ) -> c_int;
    fn ft_cpu_attention_backward(
        gradient: *mut c_void,
        query: *mut c_void,
        key: *mut c_void,
        value: *mut c_void,
        out: *mut c_void,
        logsumexp: *mut c_void,
        bounds: *mut c_void,
        scale: f64,
        d_query: *mut c_void,
        d_key: *mut c_void,
        d_value: *mut c_void,
    ) -> c_int;
    fn ft_cpu_swiglu(gate: *mut c_void, up: *mut c_void, out: *mut c_void) -> c_int;
    fn ft_cpu_swiglu_backward(
        gradient: *mut c_void,
        gate: *mut c_void,
        up: *mut c_void,
        d_gate: *mut c_void,
        d_up: *mut c_void,
    ) -> c_int;
    fn ft_cpu_rms_norm(x: *mut c_void, weight: *mut c_void, eps: f64, out: *mut c_void) -> c_int;
    fn ft_cpu_rms_norm_backward(
        gradient: *mut c_void,
        x: *mut c_void,
        weight: *mut c_void,
        eps: f64,
        residual: *mut c_void,
        out: *mut c_void,
    ) -> c_int;
    fn ft_cpu_rotate(x: *mut c_void, cos: *mut c_void, sin: *mut c_void, sign: f64, out: *mut c_void) -> c_int;
    fn ft_cpu_adamw_8bit(
        parameter: *mut c_void,
        gradient: *mut c_void,
        exp_avg: *const *mut c_void,
        exp_avg_sq: *const *mut c_void,
        rates: *mut c_void,
        found_inf: *mut c_void,
        decay: f64,
        one_minus_beta1: f64,
        one_minus_beta2: f64,
        eps: f64,
    ) -> c_int;
    fn ft_cpu_dropout(
        keys: *mut c_void,
        positions: *mut c_void,
        site: u32,
        threshold: u32,
        kept: f64,
        out: *mut c_void,
    ) -> c_int;
    fn ft_cpu_linear(inputs: *const *mut c_void, outs: *const *mut c_void, num_weights: c_int, add: c_int) -> c_int;
    fn ft_cpu_cross_entropy(logits: *mut c_void, labels: *mut c_void, scale: f64, losses: *mut c_void) -> c_int;
}

/// What code is compiled for, each with all before it. libtorch calls the first three `DEFAULT`, `AVX2` and `AVX512`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instructions {
    /// What every processor of the architecture has.
    Baseline,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, VL, BW and DQ.
    Avx512,
    /// Products of bf16 as well.
    Avx512Bf16,
}

impl Instructions {
    const ALL: [Self; 4] = [Self::Baseline, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    fn numbered(number: c_int) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }
}

/// What this processor has, as far as libtorch's variable `ATEN_CPU_CAPABILITY` (`default`, `avx2`, `avx512`) lets kernels, its own
/// and ours, use it.
pub fn instructions() -> Instructions {
    // SAFETY: asks the CPU.
    Instructions::numbered(unsafe { ft_cpu_instructions() }).expect("the shim knows the same instructions")
}

/// What the processor has, whatever may be used of it.
pub fn processor() -> Instructions {
    // SAFETY: asks the CPU.
    Instructions::numbered(unsafe { ft_cpu_processor() }).expect("the shim knows the same instructions")
}

/// Each kernel of ours by the name that profiles show, and what its variant is compiled for that runs here, if one does.
pub fn kernels() -> Vec<(&'static str, Option<Instructions>)> {
    let kernel = |index| {
        let mut variant = -1;
        // SAFETY: the shim writes the variant, and gives a string literal or null.
        let name = unsafe { ft_cpu_kernel(index, &raw mut variant) };
        // SAFETY: as above.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
        Some((name.to_str().expect("ASCII"), Instructions::numbered(variant)))
    };
    (0..).map_while(kernel).collect()
}

/// Whether every kernel has a variant that runs here.
fn is_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| kernels().iter().all(|(_, variant)| variant.is_some()))
}

/// Whether this CPU multiplies whole tiles of bf16 (AMX): libtorch's products use them, ours do not.
pub fn has_tiles() -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    // SAFETY: asks the CPU.
    *TILES.get_or_init(|| unsafe { ft_cpu_has_tiles() != 0 })
}

/// Whether products in bf16 are arithmetic of this CPU; libtorch computes them number by number elsewhere.
pub fn multiplies_bf16() -> bool {
    instructions() >= Instructions::Avx512Bf16 || has_tiles()
}

/// Whether the kernels take these tensors: all bf16 or all fp32, on a CPU that has the instructions, contiguous, the last
/// dimension a multiple of `width`.
pub fn fits(tensors: &[&Tensor], width: i64) -> bool {
    let Some(kind) = tensors.first().map(|tensor| tensor.kind()) else { return false };
    let one_fits = |tensor: &&Tensor| {
        tensor.device() == Device::Cpu
            && tensor.kind() == kind
            && tensor.is_contiguous()
            && tensor.size().last().is_some_and(|size| size % width == 0)
    };
    matches!(kind, Kind::BFloat16 | Kind::Float) && is_supported() && tensors.iter().all(one_fits)
}

/// What [`attention`] and [`rotate`] need of a head's size.
pub const HEAD_WIDTH: i64 = 32;
/// What the others need of a row.
pub const ROW_WIDTH: i64 = 16;
/// Up to so many rows our product is faster than libtorch's: measured on two cores of Zen 4.
const FEW_ROWS: i64 = 256;

/// Causal attention over packed examples: q `[t, n, d]`, k and v `[t, k, d]`; `bounds` int32 `[examples + 1]`. Returns the
/// output `[t, n, d]` and the log-sum-exp of the scores, fp32 `[n, t]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, bounds: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let size = q.size();
    let (out, logsumexp) = (q.empty_like(), Tensor::empty([size[1], size[0]], (Kind::Float, Device::Cpu)));
    // SAFETY: the handles are live tensors during the call; the kernel checks dtypes and layouts.
    done(unsafe {
        let (out, logsumexp) = (handle(&out), handle(&logsumexp));
        ft_cpu_attention(handle(q), handle(k), handle(v), handle(bounds), scale, out, logsumexp)
    });
    (out, logsumexp)
}

/// The gradients of [`attention`] with respect to q, k and v, from that of its output and what it returned.
pub fn attention_backward(
    gradient: &Tensor,
    [q, k, v]: [&Tensor; 3],
    (out, logsumexp): (&Tensor, &Tensor),
    bounds: &Tensor,
    scale: f64,
) -> [Tensor; 3] {
    let gradients = [q, k, v].map(Tensor::empty_like);
    let [dq, dk, dv] = gradients.each_ref().map(handle);
    // SAFETY: as above.
    done(unsafe {
        let (gradient, out, logsumexp) = (handle(gradient), handle(out), handle(logsumexp));
        let (q, k, v) = (handle(q), handle(k), handle(v));
        ft_cpu_attention_backward(gradient, q, k, v, out, logsumexp, handle(bounds), scale, dq, dk, dv)
    });
    gradients
}

/// `silu(gate) * up`
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    let out = gate.empty_like();
    // SAFETY: as above.
    done(unsafe { ft_cpu_swiglu(handle(gate), handle(up), handle(&out)) });
    out
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`.
pub fn swiglu_backward(gradient: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let (d_gate, d_up) = (gate.empty_like(), up.empty_like());
    // SAFETY: as above.
    done(unsafe { ft_cpu_swiglu_backward(handle(gradient), handle(gate), handle(up), handle(&d_gate), handle(&d_up)) });
    (d_gate, d_up)
}

/// RMSNorm of rows.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let out = x.empty_like();
    // SAFETY: as above.
    done(unsafe { ft_cpu_rms_norm(handle(x), handle(weight), eps, handle(&out)) });
    out
}

/// `residual` plus the gradient of [`rms_norm`] with respect to `x`.
pub fn rms_norm_backward(gradient: &Tensor, x: &Tensor, weight: &Tensor, eps: f64, residual: &Tensor) -> Tensor {
    let out = x.empty_like();
    // SAFETY: as above.
    done(unsafe {
        let (weight, residual) = (handle(weight), handle(residual));
        ft_cpu_rms_norm_backward(handle(gradient), handle(x), weight, eps, residual, handle(&out))
    });
    out
}

/// Constants of one AdamW step with moments in 8 bits.
#[derive(Clone, Copy, Debug)]
pub struct Adamw8BitConstants {
    /// What weight decay leaves of a weight.
    pub decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// One AdamW step over a flat fp32 range that begins with a block, on any CPU. Each moment is codes, scales, and its codec's
/// values and tree of thresholds; `rates` (fp32 `[2]`) has step size and root of the second bias correction; where `found_inf`
/// (fp32 scalar) is 1 nothing moves.
pub fn adamw_8bit(
    parameter: &Tensor,
    gradient: &Tensor,
    moments: [[&Tensor; 4]; 2],
    rates: &Tensor,
    found_inf: &Tensor,
    constants: Adamw8BitConstants,
) -> Result<(), super::Error> {
    let [exp_avg, exp_avg_sq] = moments.map(|parts| parts.map(handle));
    let Adamw8BitConstants { decay, beta1, beta2, eps } = constants;
    // SAFETY: the handles are live tensors during the call; the kernel checks dtypes, lengths and layouts.
    check(unsafe {
        ft_cpu_adamw_8bit(
            handle(parameter),
            handle(gradient),
            exp_avg.as_ptr(),
            exp_avg_sq.as_ptr(),
            handle(rates),
            handle(found_inf),
            decay,
            1.0 - beta1,
            1.0 - beta2,
            eps,
        )
    })
}

/// A mask of dropout in bf16 or fp32, on any CPU.
pub fn dropout(mask: &DropoutMask) -> Tensor {
    let out = mask.empty();
    // SAFETY: as above.
    done(unsafe {
        let (keys, positions) = (handle(mask.keys), handle(mask.positions));
        ft_cpu_dropout(keys, positions, mask.site, mask.threshold, mask.kept, handle(&out))
    });
    out
}

/// `x * cos + sign * swap_halves(x) * sin` of x `[t, n, d]`, cos and sin `[t, 1, d]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Tensor {
    let out = x.empty_like();
    // SAFETY: as above.
    done(unsafe { ft_cpu_rotate(handle(x), handle(cos), handle(sin), sign, handle(&out)) });
    out
}

/// Whether [`linears`] and [`add_linear`] take these matrices and are faster than libtorch's product.
pub fn fits_linear(x: &Tensor, weight: &Tensor) -> bool {
    let libtorch_has_tiles = x.kind() == Kind::BFloat16 && has_tiles();
    x.dim() == 2 && x.size()[0] <= FEW_ROWS && !libtorch_has_tiles && fits(&[x, weight], 2)
}

/// x `[t, in]` times each of `weights` `[out, in]` transposed: `[t, out]`.
pub fn linears<const N: usize>(x: &Tensor, weights: [&Tensor; N]) -> [Tensor; N] {
    let outs = weights.map(|weight| Tensor::empty([x.size()[0], weight.size()[0]], (x.kind(), x.device())));
    let inputs: Vec<_> = std::iter::once(x).chain(weights).map(handle).collect();
    let places = outs.each_ref().map(handle);
    // SAFETY: as above; there is an output for each weight.
    done(unsafe { ft_cpu_linear(inputs.as_ptr(), places.as_ptr(), N as c_int, 0) });
    outs
}

/// Adds x `[t, in]` times `weight` `[out, in]` transposed to `sum` `[t, out]`, rounded once.
pub fn add_linear(sum: &Tensor, x: &Tensor, weight: &Tensor) {
    // SAFETY: as above; one weight and one output.
    done(unsafe { ft_cpu_linear([x, weight].map(handle).as_ptr(), [handle(sum)].as_ptr(), 1, 1) });
}

/// Negative log-likelihoods of `labels` (int64 `[n]`), fp32 `[n]`. The logits `[n, v]` become `scale * (softmax - onehot)`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, scale: f64) -> Tensor {
    let losses = Tensor::empty([logits.size()[0]], (Kind::Float, Device::Cpu));
    // SAFETY: as above.
    done(unsafe { ft_cpu_cross_entropy(handle(logits), handle(labels), scale, handle(&losses)) });
    losses
}

/// Uniform numbers of mean 0 and variance 1 for the kernels' tests, fp32, the same for a seed on every call: libtorch's own
/// generator is that of all tests which run at once.
#[cfg(test)]
pub fn noise(seed: i64, shape: &[i64]) -> Tensor {
    use rand::RngExt;

    let mut generator = crate::ground::random::generator(seed, "test", &[]);
    let most = 3f32.sqrt();
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| generator.random_range(-most..most)).collect();
    Tensor::from_slice(&values).view(shape)
}

/// How far a result is from the exact one, relative to it: what the kernels' tests judge by.
#[cfg(test)]
pub fn distance(ours: &Tensor, exact: &Tensor) -> f64 {
    let [ours, exact] = [ours, exact].map(|tensor| tensor.to_kind(Kind::Double));
    (ours - &exact).norm().double_value(&[]) / exact.norm().double_value(&[])
}

/// Whether the kernels run here. A test that can prove nothing elsewhere says so, past the runner that keeps what tests print:
/// `make test` counts these lines.
#[cfg(test)]
pub fn kernels_run_here() -> bool {
    use std::io::Write;

    if !is_supported() {
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        // In one piece: others write to the same pipe.
        let line = format!("skipped: needs avx512_bf16: {test}\n");
        std::io::stderr().write_all(line.as_bytes()).expect("standard error is open");
    }
    is_supported()
}

/// Does `work` with each set of instructions that kernels may use here, none of which has a better variant then.
#[cfg(test)]
pub fn with_each_variant(mut work: impl FnMut(Instructions)) {
    let limit = |most: Instructions| unsafe { ft_cpu_limit(most as c_int) };
    for most in Instructions::ALL.into_iter().filter(|set| *set <= instructions()) {
        // SAFETY: the number is one of the shim's own.
        limit(most);
        work(most);
    }
    limit(Instructions::Avx512Bf16);
}

/// What a kernel says of arguments that it refuses.
#[cfg(test)]
pub fn refusal(work: impl FnOnce()) -> String {
    let payload = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).expect_err("refused");
    *payload.downcast::<String>().expect("a message")
}

#[cfg(test)]
mod tests;
