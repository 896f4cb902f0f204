//! The kernels of `cpp/decode.cpp`: attention to a key-value cache, and what is read off logits. They take what
//! [`super::cpu::fits`] takes, and panic as those of [`super::cpu`] do.

use std::ffi::{c_int, c_void};

use tch::{Device, Kind, Tensor};

use super::{done, handle};

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

/// Keys `[slots, k, d / w, columns, w]` and values `[slots, k, columns / w, d, w]` of one layer, where w numbers have 32 bits.
pub type KeysAndValues = (Tensor, Tensor);

/// Columns of a cache that has room for so many tokens: the kernel takes whole vectors of 16.
pub fn whole_columns(tokens: i64) -> i64 {
    (tokens + 15) / 16 * 16
}

/// Keys and values of one layer for `slots` sequences of at most `columns` tokens.
pub fn empty_cache([slots, kv_heads, columns, head_size]: [i64; 4], options: (Kind, Device)) -> KeysAndValues {
    let columns = whole_columns(columns);
    let per_word = 4 / options.0.elt_size_in_bytes() as i64;
    // What no token has been written to is multiplied by zero, so it has to be a number.
    let keys = Tensor::zeros([slots, kv_heads, head_size / per_word, columns, per_word], options);
    (keys, Tensor::zeros([slots, kv_heads, columns / per_word, head_size, per_word], options))
}

/// Appends new tokens, their keys and values `[t, k, d]`, to `cache` and lets their queries `[t, n, d]` attend to it, after the
/// first columns of `prefix`, which has one slot; gives the output `[t, n, d]`. `rows` int32 `[rows, 4]`: the first new token of
/// a row, the one after its last, its slot, its tokens in the cache so far; together they are all t in order, and no two have the
/// same slot. `scale` is what scores are multiplied by.
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

/// The place of the largest logit of each row of `[n, v]`, int64 `[n]`, as torch's argmax finds it: the first of several, and of
/// NaN where there is one.
pub fn argmax(logits: &Tensor) -> Tensor {
    let places = Tensor::empty([logits.size()[0]], (Kind::Int64, Device::Cpu));
    // SAFETY: as above.
    done(unsafe { ft_cpu_argmax(handle(logits), handle(&places)) });
    places
}

/// Negative log-likelihoods of `labels` (int64 `[n]`) under logits `[n, v]`, fp32 `[n]` in nats, and whether each is what
/// [`argmax`] finds, bool `[n]`.
pub fn score(logits: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    let rows = [logits.size()[0]];
    let (losses, correct) =
        (Tensor::empty(rows, (Kind::Float, Device::Cpu)), Tensor::empty(rows, (Kind::Bool, Device::Cpu)));
    // SAFETY: as above.
    done(unsafe { ft_cpu_score(handle(logits), handle(labels), handle(&losses), handle(&correct)) });
    (losses, correct)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::shim::cpu;

    /// Few different values, so that nearly every row has its largest several times; some with infinities and NaN.
    fn logits_with_ties() -> Tensor {
        let logits = (cpu::noise(1, &[300, 48]) * 2).round();
        for (row, place, value) in [
            (0, 47, 9.0),
            (1, 0, 9.0),
            (2, 17, f64::INFINITY),
            (2, 40, f64::INFINITY),
            (3, 5, f64::NEG_INFINITY),
            (4, 33, f64::NAN),
            (4, 46, f64::NAN),
            (5, 0, f64::NAN),
        ] {
            let _ = logits.get(row).get(place).fill_(value);
        }
        let _ = logits.get(6).fill_(f64::NEG_INFINITY);
        let _ = logits.get(7).fill_(f64::NAN);
        let _ = logits.get(8).fill_(0.0);
        logits
    }

    /// In each dtype of the kernels.
    fn check_in_both(logits: &Tensor, check: impl Fn(&Tensor)) {
        tch::set_num_threads(1);
        for kind in [Kind::Float, Kind::BFloat16] {
            check(&logits.to_kind(kind));
        }
    }

    #[test]
    fn among_equals_the_first_is_the_largest_as_in_torch() {
        if !cpu::kernels_run_here() {
            return;
        }
        check_in_both(&logits_with_ties(), |logits| {
            let torchs = logits.to_kind(Kind::Float).argmax(-1, false);
            assert_eq!(argmax(logits), torchs);
            for (labels, right) in [(torchs.shallow_clone(), true), ((&torchs + 1).remainder(48), false)] {
                let (_, correct) = score(logits, &labels);
                assert_eq!(correct, Tensor::full([300], i64::from(right), (Kind::Bool, Device::Cpu)));
            }
        });
    }

    #[test]
    fn losses_are_those_of_log_softmax() {
        if !cpu::kernels_run_here() {
            return;
        }
        // From nearly uniform to one certain token; the last rows would overflow without the largest taken off.
        let row = Tensor::arange(200, (Kind::Float, Device::Cpu)).unsqueeze(1);
        check_in_both(&(cpu::noise(2, &[200, 176]) * (&row / 5.0) + row * 10.0), |logits| {
            let labels = Tensor::arange(200, (Kind::Int64, Device::Cpu)).remainder(176);
            let exact =
                logits.to_kind(Kind::Double).log_softmax(-1, Kind::Double).gather(1, &labels.unsqueeze(1), false);
            let (losses, _) = score(logits, &labels);
            let distance = cpu::distance(&losses, &-exact.squeeze_dim(1));
            assert!(distance < 1e-6, "{distance:e}");
        });
        // What is not a number is told, and not averaged away.
        check_in_both(&logits_with_ties(), |logits| {
            let (losses, _) = score(logits, &Tensor::zeros([300], (Kind::Int64, Device::Cpu)));
            assert!(losses.double_value(&[4]).is_nan());
            assert!((losses.double_value(&[8]) - 48f64.ln()).abs() < 1e-6);
        });
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        tch::set_num_threads(1);
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu));
        if !cpu::kernels_run_here() {
            return;
        }
        let attend = |tokens: i64, kv_tokens: i64, rows: &[i32], prefix_length: i64| {
            cpu::refusal(|| {
                let (q, kv) = (zeros(&[tokens, 4, 32]), zeros(&[kv_tokens, 2, 32]));
                let [cache, prefix] =
                    [3, 1].map(|slots| empty_cache([slots, 2, 16, 32], (Kind::BFloat16, Device::Cpu)));
                let rows = Tensor::from_slice(rows).view([-1, 4]);
                let _ = cached_attention([&q, &kv, &kv], &rows, &cache, Some((&prefix, prefix_length)), 1.0);
            })
        };
        for (tokens, kv_tokens, rows, prefix_length, expected) in [
            (2, 1, &[0, 2, 0, 0][..], 0, "query [2, 4, 32], key [1, 2, 32]"),
            (2, 2, &[0, 2, 3, 0], 0, "row 0 adds 2 tokens to 0 in slot 3 of 3 with room for 16"),
            (2, 2, &[0, 2, -1, 0], 0, "row 0 adds 2 tokens to 0 in slot -1"),
            (2, 2, &[0, 2, 0, 15], 0, "row 0 adds 2 tokens to 15 in slot 0 of 3 with room for 16"),
            (2, 2, &[0, 2, 0, -1], 0, "row 0 adds 2 tokens to -1 in slot 0"),
            (2, 2, &[0, 1, 0, 0, 1, 2, 0, 1], 0, "row 1 adds 1 tokens to 1 in slot 0"),
            (2, 2, &[0, 3, 0, 0], 0, "row 0 has the tokens from 0 to 3 of 2"),
            (2, 2, &[1, 2, 0, 0], 0, "row 0 has the tokens from 1 to 2 of 2, expected from 0"),
            (2, 2, &[0, 1, 0, 0], 0, "1 tokens belong to no row"),
            (2, 2, &[0, 2, 0, 0], 17, "the prefix is not one of this cache"),
            (2, 2, &[0, 2, 0, 0], -1, "the prefix is not one of this cache"),
        ] {
            let message = attend(tokens, kv_tokens, rows, prefix_length);
            assert!(message.contains(expected), "{message} is not {expected}");
        }
        let labels = |labels: &[i64]| cpu::refusal(|| drop(score(&zeros(&[2, 16]), &Tensor::from_slice(labels))));
        for (wrong, expected) in [(&[0, 16][..], "label 16 of 16"), (&[0, -1], "label -1"), (&[0], "labels must be")] {
            let message = labels(wrong);
            assert!(message.contains(expected), "{message} is not {expected}");
        }
    }
}
