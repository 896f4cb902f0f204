//! The kernels of `cpp/decode.cpp`: attention to a key-value cache, and what is read off logits. They take what
//! [`super::cpu::fits`] takes, in bf16.

use std::ffi::{c_int, c_void};

use tch::{Device, Kind, Tensor};

use super::{check, handle};

unsafe extern "C" {
    fn ft_cpu_cached_attention(
        query: *mut c_void,
        key: *mut c_void,
        value: *mut c_void,
        rows: *mut c_void,
        keys: *mut c_void,
        values: *mut c_void,
        prefix_keys: *mut c_void,
        prefix_values: *mut c_void,
        prefix_length: i64,
        scale: f64,
        out: *mut c_void,
    ) -> c_int;
    fn ft_cpu_argmax(logits: *mut c_void, places: *mut c_void) -> c_int;
    fn ft_cpu_score(logits: *mut c_void, labels: *mut c_void, losses: *mut c_void, correct: *mut c_void) -> c_int;
}

fn done(status: c_int) {
    check(status).unwrap_or_else(|error| panic!("{error}"));
}

/// What columns of a cache are a multiple of.
pub const COLUMNS: i64 = 16;

/// Keys `[slots, k, d / 2, columns, 2]` and values `[slots, k, columns / 2, d, 2]` of one layer.
pub type KeysAndValues = (Tensor, Tensor);

/// Appends new tokens, their keys and values `[t, k, d]`, to `cache` and lets their queries `[t, n, d]` attend to it, after
/// the first columns of `prefix`. `rows` int32 `[rows, 4]`: the first new token of a row, the one after its last, its slot,
/// its tokens in the cache so far.
pub fn cached_attention(
    [q, k, v]: [&Tensor; 3],
    rows: &Tensor,
    cache: &KeysAndValues,
    prefix: Option<(&KeysAndValues, i64)>,
    scale: f64,
) -> Tensor {
    let (out, none) = (q.empty_like(), Tensor::new());
    let (prefix_keys, prefix_values, prefix_length) =
        prefix.map_or((&none, &none, 0), |((keys, values), length)| (keys, values, length));
    // SAFETY: the handles are live tensors during the call; the kernel checks dtypes, layouts and that rows fit.
    done(unsafe {
        ft_cpu_cached_attention(
            handle(q),
            handle(k),
            handle(v),
            handle(rows),
            handle(&cache.0),
            handle(&cache.1),
            handle(prefix_keys),
            handle(prefix_values),
            prefix_length,
            scale,
            handle(&out),
        )
    });
    out
}

/// The place of the largest logit of each row of `[n, v]`, the first of several: int64 `[n]`.
pub fn argmax(logits: &Tensor) -> Tensor {
    let places = Tensor::empty([logits.size()[0]], (Kind::Int64, Device::Cpu));
    // SAFETY: as above.
    done(unsafe { ft_cpu_argmax(handle(logits), handle(&places)) });
    places
}

/// Negative log-likelihoods of `labels` (int64 `[n]`) under logits `[n, v]`, fp32 `[n]`, and whether each is the largest, bool
/// `[n]`.
pub fn score(logits: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    let rows = [logits.size()[0]];
    let (losses, correct) =
        (Tensor::empty(rows, (Kind::Float, Device::Cpu)), Tensor::empty(rows, (Kind::Bool, Device::Cpu)));
    // SAFETY: as above.
    done(unsafe { ft_cpu_score(handle(logits), handle(labels), handle(&losses), handle(&correct)) });
    (losses, correct)
}
