use super::super::decode;
use super::*;

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu))
}

fn fp32(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

fn dropout_mask<'a>(keys: &'a Tensor, positions: &'a Tensor) -> DropoutMask<'a> {
    DropoutMask { keys, positions, columns: 192, kind: Kind::BFloat16, site: 1, threshold: 1 << 30, kept: 1.5 }
}

/// The table says what runs here, and nothing else is entered: an entry that went past it would end this process.
#[test]
fn every_kernel_of_the_table_runs_or_refuses() {
    tch::set_num_threads(1);
    let (row, head) = (fp32(&[2, 32]), fp32(&[2, 1, 32]));
    let (labels, bounds) = (Tensor::from_slice(&[0i64, 1]), Tensor::from_slice(&[0, 2]));
    let logsumexp = fp32(&[1, 2]);
    let (table, codes) = (fp32(&[256]), Tensor::zeros([64], (Kind::Uint8, Device::Cpu)));
    let eight_bit = || {
        let (flat, scale, found_inf) = (fp32(&[64]), fp32(&[1]), Tensor::from(0f32));
        let moments = [[&codes, &scale, &table, &table]; 2];
        let constants = Adamw8BitConstants { decay: 1.0, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        adamw_8bit(&flat, &flat, moments, &Tensor::from_slice(&[1f32, 1.0]), &found_inf, constants)
            .unwrap_or_else(|error| panic!("{error}"));
    };
    let cached = || {
        let cache = decode::empty_cache([1, 1, 16, 32], (Kind::Float, Device::Cpu));
        let rows = Tensor::from_slice(&[0, 2, 0, 0]).view([1, 4]);
        drop(decode::cached_attention([&head; 3], &rows, &cache, None, 1.0));
    };
    let weight = fp32(&[32]);
    let calls: [(&str, &dyn Fn()); 14] = [
        ("attention", &|| drop(attention(&head, &head, &head, &bounds, 1.0))),
        ("attention_backward", &|| {
            drop(attention_backward(&head, [&head; 3], (&head, &logsumexp), &bounds, 1.0));
        }),
        ("swiglu", &|| drop(swiglu(&row, &row))),
        ("swiglu_backward", &|| drop(swiglu_backward(&row, &row, &row))),
        ("rms_norm", &|| drop(rms_norm(&row, &weight, 1.0))),
        ("rms_norm_backward", &|| drop(rms_norm_backward(&row, &row, &weight, 1.0, &row))),
        ("rotate", &|| drop(rotate(&head, &head, &head, 1.0))),
        ("cross_entropy", &|| drop(cross_entropy(&row.copy(), &labels, 1.0))),
        ("linear", &|| drop(linears(&row, [&row]))),
        ("cached_attention", &cached),
        ("argmax", &|| drop(decode::argmax(&row))),
        ("score", &|| drop(decode::score(&row, &labels))),
        ("adamw_8bit", &eight_bit),
        ("dropout", &|| drop(dropout(&dropout_mask(&labels, &labels)))),
    ];
    with_each_variant(|most| {
        let kernels = kernels();
        assert_eq!(kernels.len(), calls.len(), "{kernels:?}");
        for ((kernel, variant), (name, call)) in kernels.into_iter().zip(calls) {
            assert_eq!(kernel, format!("finetune::{name}"));
            if let Some(variant) = variant {
                assert!(variant <= most, "{kernel} is compiled for {variant:?}");
                call();
            } else {
                let message = refusal(call);
                assert!(message.contains("has no variant for the instructions"), "{message}");
            }
        }
    });
    assert!(instructions() <= processor());
    // Where a run is meant to show what a plainer processor does, it has to be one.
    if let Ok(expected) = std::env::var("FINETUNE_TEST_INSTRUCTIONS") {
        assert_eq!(format!("{:?}", instructions()).to_lowercase(), expected);
    }
}

/// Whoever writes a kernel cannot leave the table out: each entry that takes tensors is one of its, by name.
#[test]
fn every_entry_is_guarded_by_the_table() {
    let mut entries = Vec::new();
    for file in ["attention", "pointwise", "decode", "linear", "optimizer", "dropout"] {
        let text = std::fs::read_to_string(format!("cpp/{file}.cpp")).expect("readable");
        for entry in text.split("int ft_cpu_").skip(1) {
            let name = entry.split('(').next().expect("a name").to_owned();
            let body = entry.split_once("{\n").expect("a body").1.trim_start();
            let guards = ["recorded", "recorded_by_dtype"].map(|guard| format!("return {guard}(kernels::{name}, "));
            assert!(guards.iter().any(|guard| body.starts_with(guard)), "{name} is not guarded");
            entries.push(format!("finetune::{name}"));
        }
    }
    let mut listed: Vec<_> = kernels().into_iter().map(|(name, _)| name.to_owned()).collect();
    entries.sort();
    listed.sort();
    assert_eq!(entries, listed);
}

fn check_refusals(cases: &[(&dyn Fn(), &str)]) {
    for (work, expected) in cases {
        let message = refusal(work);
        assert!(message.contains(expected), "{message} is not {expected}");
    }
}

#[test]
fn rows_that_do_not_belong_together_are_refused() {
    tch::set_num_threads(1);
    if !kernels_run_here() {
        return;
    }
    let (x, fewer, narrower, wider) = (zeros(&[6, 32]), zeros(&[5, 32]), zeros(&[6, 16]), zeros(&[6, 33]));
    let (weight, other, turned) = (zeros(&[32]), zeros(&[16]), zeros(&[32, 6]).tr());
    check_refusals(&[
        (&|| drop(swiglu(&x, &fewer)), "up must be contiguous BFloat16 [6, 32] on the CPU, found BFloat16 [5, 32]"),
        (&|| drop(swiglu(&fewer, &x)), "up must be contiguous BFloat16 [5, 32] on the CPU, found BFloat16 [6, 32]"),
        (
            &|| drop(swiglu(&x, &fp32(&[6, 32]))),
            "up must be contiguous BFloat16 [6, 32] on the CPU, found Float [6, 32]",
        ),
        (&|| drop(swiglu(&x, &turned)), "up must be contiguous"),
        (&|| drop(swiglu(&wider, &wider)), "gate must be a multiple of 16 wide, found [6, 33]"),
        (&|| drop(swiglu(&zeros(&[6, 0]), &x)), "gate must be a multiple of 16 wide, found [6, 0]"),
        (&|| drop(swiglu_backward(&fewer, &x, &x)), "gradient must be"),
        (&|| drop(swiglu_backward(&x, &x, &narrower)), "up must be"),
        (&|| drop(rms_norm(&x, &other, 1e-5)), "weight must be contiguous BFloat16 [32]"),
        (&|| drop(rms_norm_backward(&fewer, &x, &weight, 1e-5, &x)), "gradient must be"),
        (&|| drop(rms_norm_backward(&x, &x, &other, 1e-5, &x)), "weight must be"),
        (&|| drop(rms_norm_backward(&x, &x, &weight, 1e-5, &narrower)), "residual must be"),
    ]);
    let (x, table) = (zeros(&[6, 2, 32]), zeros(&[6, 1, 32]));
    check_refusals(&[
        (&|| drop(rotate(&x, &zeros(&[0, 1, 32]), &table, 1.0)), "cos must be contiguous BFloat16 [6, 1, 32]"),
        (&|| drop(rotate(&x, &table, &zeros(&[5, 1, 32]), 1.0)), "sin must be"),
        (&|| drop(rotate(&x, &zeros(&[6, 1, 16]), &table, 1.0)), "cos must be"),
        (
            &|| drop(rotate(&zeros(&[6, 32]), &table, &table, 1.0)),
            "x must be [t, n, d], d a multiple of 32, found [6, 32]",
        ),
        (&|| drop(rotate(&zeros(&[6, 2, 48]), &table, &table, 1.0)), "x must be [t, n, d], d a multiple of 32"),
    ]);
    let labels = |labels: &[i64]| drop(cross_entropy(&zeros(&[2, 16]), &Tensor::from_slice(labels), 1.0));
    check_refusals(&[
        (&|| labels(&[0]), "labels must be contiguous Long [2] on the CPU, found Long [1]"),
        (&|| labels(&[0, 16]), "label 16 of 16"),
        (&|| labels(&[-1, 0]), "label -1 of 16"),
        (&|| drop(cross_entropy(&zeros(&[2, 16]), &Tensor::from_slice(&[0i32, 0]), 1.0)), "labels must be"),
        (&|| drop(cross_entropy(&zeros(&[2, 3, 16]), &Tensor::from_slice(&[0i64, 0]), 1.0)), "labels must be"),
    ]);
    let (matrix, rows) = (zeros(&[32, 32]), zeros(&[6, 32]));
    check_refusals(&[
        (&|| drop(linears(&rows, [&zeros(&[8, 16])])), "weight must be contiguous BFloat16 [8, 32]"),
        (&|| drop(linears(&rows, [&zeros(&[32, 8]).tr()])), "weight must be contiguous"),
        (&|| drop(linears(&rows, [&matrix, &weight])), "weight must be a matrix, found [32]"),
        (&|| drop(linears(&zeros(&[6, 33]), [&zeros(&[8, 33])])), "x must be a multiple of 2 wide, found [6, 33]"),
        (&|| add_linear(&zeros(&[5, 32]), &rows, &matrix), "out must be contiguous BFloat16 [6, 32]"),
        (&|| add_linear(&fp32(&[6, 32]), &rows, &matrix), "out must be contiguous BFloat16 [6, 32]"),
    ]);
    // No rows at all are an empty result.
    assert_eq!(linears(&zeros(&[0, 32]), [&matrix]).map(|none| none.size()), [[0, 32]]);
    assert_eq!(rotate(&zeros(&[0, 2, 32]), &zeros(&[0, 1, 32]), &zeros(&[0, 1, 32]), 1.0).size(), [0, 2, 32]);
    assert_eq!(swiglu(&zeros(&[0, 32]), &zeros(&[0, 32])).size(), [0, 32]);
}

#[test]
fn tokens_that_do_not_belong_together_are_refused() {
    let (two, three) = (Tensor::from_slice(&[0i64, 1]), Tensor::from_slice(&[0i64, 1, 2]));
    let half = DropoutMask { kind: Kind::Half, ..dropout_mask(&two, &two) };
    check_refusals(&[
        (
            &|| drop(dropout(&dropout_mask(&two, &three))),
            "positions must be contiguous Long [2] on the CPU, found Long [3]",
        ),
        (&|| drop(dropout(&dropout_mask(&two.to_kind(Kind::Int), &two))), "keys must be contiguous Long [2]"),
        (&|| drop(dropout(&half)), "out must be contiguous Float [2, 192] on the CPU, found Half"),
    ]);
}

#[test]
fn examples_that_do_not_belong_together_are_refused() {
    tch::set_num_threads(1);
    if !kernels_run_here() {
        return;
    }
    let (q, kv) = (zeros(&[6, 4, 32]), zeros(&[6, 2, 32]));
    let bounds = |bounds: &[i32]| drop(attention(&q, &kv, &kv, &Tensor::from_slice(bounds), 1.0));
    let whole = Tensor::from_slice(&[0, 6]);
    let with_key = |key: &Tensor, value: &Tensor| drop(attention(&q, key, value, &whole, 1.0));
    check_refusals(&[
        (&|| bounds(&[0, 2, 7]), "bounds must ascend from 0 to 6, found [0, 2, 7]"),
        (&|| bounds(&[0, 2]), "bounds must ascend from 0 to 6, found [0, 2]"),
        (&|| bounds(&[1, 6]), "bounds must ascend"),
        (&|| bounds(&[0, 8, 6]), "bounds must ascend"),
        (&|| bounds(&[0, -2, 6]), "bounds must ascend"),
        (&|| bounds(&[6]), "bounds must ascend"),
        (&|| bounds(&[]), "bounds must ascend"),
        (&|| drop(attention(&q, &kv, &kv, &Tensor::from_slice(&[0i64, 6]), 1.0)), "bounds must be contiguous Int [2]"),
        (&|| with_key(&zeros(&[5, 2, 32]), &kv), "query [6, 4, 32] and key [5, 2, 32] must be [t, n, d] and [t, k, d]"),
        (&|| with_key(&zeros(&[6, 3, 32]), &kv), "n a multiple of k"),
        (&|| with_key(&zeros(&[6, 0, 32]), &kv), "n a multiple of k"),
        (&|| with_key(&zeros(&[6, 2, 64]), &kv), "query [6, 4, 32] and key [6, 2, 64]"),
        (&|| with_key(&kv, &zeros(&[5, 2, 32])), "value must be contiguous BFloat16 [6, 2, 32]"),
    ]);
    let backward = |gradient: &Tensor, out: &Tensor, logsumexp: &Tensor| {
        drop(attention_backward(gradient, [&q, &kv, &kv], (out, logsumexp), &whole, 1.0));
    };
    check_refusals(&[
        (&|| backward(&kv, &q, &fp32(&[4, 6])), "gradient must be contiguous BFloat16 [6, 4, 32]"),
        (&|| backward(&q, &kv, &fp32(&[4, 6])), "out must be"),
        (&|| backward(&q, &q, &fp32(&[4, 5])), "logsumexp must be contiguous Float [4, 6]"),
    ]);
}

/// Each sum has one order, whichever thread takes it.
#[test]
fn threads_change_no_bit() {
    if !kernels_run_here() {
        return;
    }
    let all = |kind: Kind, threads: i32| {
        // A thread takes over the process's number at its first loop, unless it has asked for it before.
        tch::get_num_threads();
        tch::set_num_threads(threads);
        assert_eq!(tch::get_num_threads(), threads);
        let rows = |seed| noise(seed, &[300, 192]).to_kind(kind);
        let (a, b, c, weight) = (rows(1), rows(2), rows(3), noise(4, &[192]).to_kind(kind));
        let heads = |x: &Tensor, heads| x.narrow(1, 0, heads * 64).reshape([300, heads, 64]).contiguous();
        let (q, k, v, table) = (heads(&a, 3), heads(&b, 1), heads(&c, 1), heads(&c, 1));
        let (logits, labels) = (a.copy(), Tensor::arange(300, (Kind::Int64, Device::Cpu)).remainder(192));
        let (d_gate, d_up) = swiglu_backward(&c, &a, &b);
        let sum = noise(5, &[300, 300]).to_kind(kind);
        add_linear(&sum, &a, &b);
        let mut found = vec![
            swiglu(&a, &b),
            d_gate,
            d_up,
            rms_norm(&a, &weight, 1e-5),
            rms_norm_backward(&c, &a, &weight, 1e-5, &b),
            rotate(&q, &table, &table, -1.0),
            cross_entropy(&logits, &labels, 0.1),
            logits,
            sum,
            decode::argmax(&a),
            decode::score(&a, &labels).0,
            dropout(&DropoutMask { kind, ..dropout_mask(&labels, &labels) }),
        ];
        found.extend(linears(&a, [&b, &c]));
        let bounds = Tensor::from_slice(&[0, 100, 101, 300]);
        let (out, logsumexp) = attention(&q, &k, &v, &bounds, 0.1);
        let forward = (&out, &logsumexp);
        found.extend(attention_backward(&heads(&b, 3), [&q, &k, &v], forward, &bounds, 0.1));
        let rows = Tensor::from_slice(&[0, 100, 2, 0, 100, 101, 0, 0, 101, 300, 1, 0]).view([3, 4]);
        let cache = decode::empty_cache([3, 1, 200, 64], (kind, Device::Cpu));
        found.push(decode::cached_attention([&q, &k, &v], &rows, &cache, None, 0.1));
        found.extend([out, logsumexp, cache.0, cache.1]);
        found
    };
    for kind in [Kind::BFloat16, Kind::Float] {
        let (one, two) = (all(kind, 1), all(kind, 2));
        for (place, (one, two)) in one.iter().zip(&two).enumerate() {
            assert!(one.equal(two), "{kind:?}, output {place}");
        }
    }
    tch::set_num_threads(1);
}
