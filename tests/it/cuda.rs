//! The CUDA kernels compute what is written out: without a GPU compiled for the CPU and started through a driver of our own
//! (`cuda/driver.cpp`), with one (`FINETUNE_TEST_DEVICE=cuda`) on it. And the image that the binary carries has machine code of each
//! for each architecture.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::LazyLock;

use harness::{device, is_on_gpu, on_host, skipped};
use object::{Object, ObjectSection};
use tch::{Device, Kind, Tensor};
use trainer::compute::ops::{residual_norm_backward, rms_norm, swiglu, swiglu_backward};
use trainer::compute::shim;
use trainer::compute::shim::cuda::{self, Kernels, NAMES};
use trainer::compute::shim::{DropoutMask, cpu};

static KERNELS: LazyLock<Kernels> = LazyLock::new(|| {
    let driver = if device() == Device::Cpu { env!("CUDA_ON_CPU").into() } else { cuda::library(cuda::DRIVER) };
    tch::set_num_threads(1);
    Kernels::load(&driver).unwrap_or_else(|error| panic!("{error}"))
});

fn random(size: &[i64]) -> Tensor {
    (Tensor::randn(size, (Kind::Float, device())) * 2).to_kind(Kind::BFloat16)
}

/// `few`, and on a GPU `more` of what takes too long thread by thread, or under a sanitizer.
fn and_on_a_gpu<T: Clone>(few: &[T], more: &[T]) -> Vec<T> {
    if is_on_gpu() && std::env::var("FINETUNE_TEST_FEW").is_err() { [few, more].concat() } else { few.to_vec() }
}

/// Whether what follows is of the driver of the tests.
fn without_a_gpu() -> bool {
    if is_on_gpu() {
        skipped("the driver of the tests");
    }
    !is_on_gpu()
}

fn wide(tensor: &Tensor) -> Tensor {
    tensor.to_kind(Kind::Double)
}

/// Rounding to bf16 is all that parts a kernel from fp64. Threads run in the opposite order in every other launch, which
/// changes no bit.
fn check<const N: usize>(what: &str, launch: impl Fn() -> [Tensor; N], exact: &[Tensor; N]) {
    let (ours, again) = (launch(), launch());
    for (place, ((ours, again), exact)) in ours.iter().zip(&again).zip(exact).enumerate() {
        let distance = ((wide(ours) - exact).norm() / exact.norm()).double_value(&[]);
        assert!(distance < 5e-3, "{what}, output {place}: {distance:e}");
        assert!(ours.equal(again), "{what}, output {place} depends on the order of threads");
    }
}

#[test]
fn norms_are_what_is_written_out() {
    let eps = 1e-5;
    // One vector, less than a warp, a whole number of warps and not, more vectors than threads.
    for (rows, columns) in and_on_a_gpu(
        &[(1, 8), (5, 48), (3, 256), (7, 576), (2, 2056), (2, 4096)],
        &[(8192, 576), (8192, 4096), (512, 14_336), (64, 128_256)],
    ) {
        let (x, gradient, residual) = (random(&[rows, columns]), random(&[rows, columns]), random(&[rows, columns]));
        let weight = random(&[columns]);
        let what = format!("{rows} x {columns}");
        check(&what, || [KERNELS.rms_norm(&x, &weight, eps)], &[rms_norm(&wide(&x), &wide(&weight), eps)]);
        let exact = residual_norm_backward(wide(&residual), &wide(&gradient), &wide(&x), &wide(&weight), eps, None);
        check(&what, || [KERNELS.rms_norm_backward(&gradient, &x, &weight, eps, &residual)], &[exact]);
    }
}

#[test]
fn swiglu_is_what_is_written_out() {
    // The last block is empty but for one vector, or full.
    for size in and_on_a_gpu(&[[1, 8], [257, 8], [37, 48], [32, 64]], &[[8192, 576], [8192, 4096], [4096, 14_336]]) {
        let (gate, up, gradient) = (random(&size), random(&size), random(&size));
        check("swiglu", || [KERNELS.swiglu(&gate, &up)], &[swiglu(&wide(&gate), &wide(&up))]);
        let exact = swiglu_backward(&wide(&gradient), &wide(&gate), &wide(&up));
        check("swiglu_backward", || KERNELS.swiglu_backward(&gradient, &gate, &up).into(), &exact.into());
    }
    // Where the exponential overflows the result is still a number.
    let gate = Tensor::from_slice(&[-1e4f32; 8]).to_kind(Kind::BFloat16).to_device(device());
    let up = random(&[8]);
    assert_eq!(KERNELS.swiglu(&gate, &up).abs().max().double_value(&[]), 0.0);
}

#[test]
fn rotation_is_what_is_written_out() {
    for (tokens, heads, size) in
        and_on_a_gpu(&[(1, 1, 16), (37, 3, 64), (5, 8, 128)], &[(8192, 32, 128), (4096, 9, 64)])
    {
        let x = random(&[tokens, heads, size]);
        let angles = Tensor::randn([tokens, 1, size / 2], (Kind::Float, device()));
        let table = |parts: [Tensor; 2]| Tensor::cat(&parts, -1).to_kind(Kind::BFloat16);
        let (cos, sin) = (table([angles.cos(), angles.cos()]), table([-angles.sin(), angles.sin()]));
        for sign in [1.0, -1.0] {
            let swapped = wide(&x).roll([size / 2], [2]);
            let exact = wide(&x) * wide(&cos) + swapped * wide(&sin) * sign;
            check("rotate", || [KERNELS.rotate(&x, &cos, &sin, sign)], &[exact]);
        }
    }
}

#[test]
fn cross_entropy_is_what_is_written_out() {
    // Rows of odd width begin at every alignment; the first have fewer elements than a vector.
    for (rows, vocabulary) in and_on_a_gpu(
        &[(3, 1), (9, 7), (9, 13), (5, 96), (9, 509), (3, 8200), (9, 32_001)],
        &[(512, 128_256), (64, 49_152)],
    ) {
        let logits = random(&[rows, vocabulary]) * 4;
        let labels = Tensor::randint(vocabulary, [rows], (Kind::Int64, device()));
        let scale = 1.0 / 3.0;
        let log_softmax = wide(&logits).log_softmax(-1, Kind::Double);
        let onehot = labels.one_hot(vocabulary).to_kind(Kind::Double);
        let losses = -(&log_softmax * &onehot).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
        let gradient = (log_softmax.exp() - onehot) * scale;
        let launch = || {
            let logits = logits.copy();
            [KERNELS.cross_entropy(&logits, &labels, scale), logits]
        };
        if vocabulary == 1 {
            // Nothing to divide by: the only answer is certain.
            assert!(launch().iter().all(|tensor| tensor.abs().max().double_value(&[]) == 0.0));
            continue;
        }
        check(&format!("{rows} x {vocabulary}"), launch, &[losses, gradient]);
    }
}

#[test]
fn masks_of_dropout_have_the_bits_of_those_on_the_cpu() {
    let keys = Tensor::from_slice(&[0, -1, i64::MIN, 0x0123_4567_89ab_cdef, -0x0123_4567_89ab_cdef]);
    let positions = Tensor::from_slice(&[0i64, 1, 4095, i64::from(u32::MAX), 77]);
    let on_device = [&keys, &positions].map(|tensor| tensor.to_device(device()));
    // Rows of whole vectors and not; the last block is full or not.
    for columns in [0, 1, 4, 7, 64, 66, 576, 1024] {
        for (site, threshold) in [(0, 1 << 31), (209, 1 << 28), (u32::MAX, u32::MAX - 9), (1, 0)] {
            for (kind, kept) in [(Kind::BFloat16, 1.109_375), (Kind::Float, f64::from(1f32 / 0.9))] {
                let mask = |keys, positions| DropoutMask { keys, positions, columns, kind, site, threshold, kept };
                let ours = on_host(&KERNELS.dropout(&mask(&on_device[0], &on_device[1])));
                assert_eq!((ours.kind(), ours.size()), (kind, vec![5, columns]));
                let on_cpu = mask(&keys, &positions);
                assert!(ours.equal(&cpu::dropout(&on_cpu)), "{on_cpu:?}");
            }
        }
    }
}

#[test]
fn cross_entropy_of_what_is_no_number_or_no_label_is_none_either() {
    let label = |label: i64| Tensor::from_slice(&[label, 1]).to_device(device());
    for (labels, broken) in [(label(0), f64::NAN), (label(0), f64::INFINITY), (label(-1), 0.0), (label(24), 0.0)] {
        let logits = random(&[2, 24]);
        let _ = logits.get(0).get(3).fill_(broken);
        let losses = KERNELS.cross_entropy(&logits, &labels, 1.0);
        let finite = losses.isfinite();
        assert_eq!([finite.int64_value(&[0]), finite.int64_value(&[1])], [0, 1], "{labels}, a logit of {broken}");
    }
    // A logit of -inf is a probability of zero.
    let logits = random(&[1, 24]);
    let _ = logits.narrow(1, 0, 20).fill_(f64::NEG_INFINITY);
    assert!(
        KERNELS
            .cross_entropy(&logits, &Tensor::from_slice(&[22i64]).to_device(device()), 1.0)
            .double_value(&[0])
            .is_finite()
    );
}

#[test]
fn nothing_is_started_for_no_rows_and_nothing_is_loaded_for_the_cpu() {
    let none = random(&[0, 48]);
    assert_eq!(KERNELS.rms_norm(&none, &random(&[48]), 1e-5).size(), [0, 48]);
    assert_eq!(KERNELS.swiglu(&none, &none).size(), [0, 48]);
    assert!(cuda::fits(&[&random(&[2, 48]).to_device(Device::Cpu)], 8).is_none());
}

#[test]
fn the_profiler_sees_each_launch_as_an_operation_on_its_inputs() {
    if !without_a_gpu() {
        return;
    }
    let (x, weight) = (random(&[3, 16]), random(&[16]));
    let (heads, table) = (random(&[3, 2, 16]), random(&[3, 1, 16]));
    let (logits, labels) = (random(&[3, 24]), Tensor::from_slice(&[1i64, 2, 3]));
    let launches = || {
        let _ = KERNELS.swiglu(&x, &x);
        let _ = KERNELS.swiglu_backward(&x, &x, &x);
        let _ = KERNELS.rms_norm(&x, &weight, 1e-5);
        let _ = KERNELS.rms_norm_backward(&x, &x, &weight, 1e-5, &x);
        let _ = KERNELS.rotate(&heads, &table, &table, 1.0);
        let _ = KERNELS.cross_entropy(&logits, &labels, 1.0);
        let _ = KERNELS.dropout(&DropoutMask {
            keys: &labels,
            positions: &labels,
            columns: 8,
            kind: Kind::Float,
            site: 0,
            threshold: 9,
            kept: 1.0,
        });
    };
    launches();
    let folder = tempfile::tempdir().expect("writable");
    let ((), operations) = shim::profile(false, &folder.path().join("trace.json"), launches).expect("a profile");
    let mut ours: Vec<_> = operations.iter().filter(|operation| operation.name.starts_with("finetune::")).collect();
    ours.sort_by_key(|operation| operation.start);
    let [row, head, place] = ["c10::BFloat16 3 16", "c10::BFloat16 3 2 16", "c10::BFloat16 3 1 16"];
    let expected = [
        ("finetune::swiglu", [row, row].join(";")),
        ("finetune::swiglu_backward", [row, row, row].join(";")),
        ("finetune::rms_norm", [row, "c10::BFloat16 16"].join(";")),
        ("finetune::rms_norm_backward", [row, row, "c10::BFloat16 16", row].join(";")),
        ("finetune::rotate", [head, place, place].join(";")),
        ("finetune::cross_entropy", "c10::BFloat16 3 24;long int 3".into()),
        ("finetune::dropout", "long int 3;float 3 8".into()),
    ];
    let found: Vec<_> = ours.iter().map(|operation| (operation.name.as_str(), operation.inputs.clone())).collect();
    assert_eq!(found, expected);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    if !without_a_gpu() {
        return;
    }
    let (x, fewer, narrower, weight) = (random(&[6, 32]), random(&[5, 32]), random(&[6, 16]), random(&[32]));
    let (heads, table) = (random(&[6, 2, 32]), random(&[6, 1, 32]));
    let (logits, labels) = (random(&[2, 9]), Tensor::from_slice(&[0i64, 8]));
    let displaced = random(&[6 * 32 + 8]).narrow(0, 1, 6 * 32).view([6, 32]);
    let mask = |keys, positions, kind| {
        let mask = DropoutMask { keys, positions, columns: 8, kind, site: 0, threshold: 9, kept: 1.0 };
        drop(KERNELS.dropout(&mask));
    };
    let (fewer_tokens, narrow_tokens) = (labels.narrow(0, 0, 1), labels.to_kind(Kind::Int));
    let cases: [(&dyn Fn(), &str); 18] = [
        (&|| drop(KERNELS.swiglu(&x, &fewer)), "([5, 32], Cpu)"),
        (&|| drop(KERNELS.swiglu(&x, &wide(&x))), "must be contiguous and aligned bf16, a multiple of 8 wide"),
        (&|| drop(KERNELS.swiglu(&x, &random(&[32, 6]).tr())), "must be contiguous and aligned bf16"),
        (&|| drop(KERNELS.swiglu(&displaced, &x)), "must be contiguous and aligned bf16"),
        (&|| drop(KERNELS.swiglu(&random(&[6, 9]), &random(&[6, 9]))), "must be contiguous and aligned bf16"),
        (&|| drop(KERNELS.swiglu_backward(&narrower, &x, &x)), "([6, 16], Cpu)"),
        (&|| drop(KERNELS.rms_norm(&x, &random(&[16]), 1e-5)), "([16], Cpu)"),
        (&|| drop(KERNELS.rms_norm_backward(&fewer, &x, &weight, 1e-5, &x)), "([5, 32], Cpu)"),
        (&|| drop(KERNELS.rms_norm_backward(&x, &x, &weight, 1e-5, &narrower)), "([6, 16], Cpu)"),
        (&|| drop(KERNELS.rotate(&heads, &random(&[0, 1, 32]), &table, 1.0)), "([0, 1, 32], Cpu)"),
        (&|| drop(KERNELS.rotate(&heads, &table, &random(&[6, 1, 16]), 1.0)), "([6, 1, 16], Cpu)"),
        (&|| drop(KERNELS.rotate(&x, &table, &table, 1.0)), "expected"),
        (&|| drop(KERNELS.cross_entropy(&logits, &labels.to_kind(Kind::Int), 1.0)), "(Int, [2], Cpu, true)"),
        (&|| drop(KERNELS.cross_entropy(&logits, &labels.narrow(0, 0, 1), 1.0)), "(Int64, [1], Cpu, true)"),
        (
            &|| drop(KERNELS.cross_entropy(&logits, &labels.narrow(0, 0, 1).expand([2], false), 1.0)),
            "(Int64, [2], Cpu, false)",
        ),
        (&|| mask(&labels, &fewer_tokens, Kind::Float), "(Int64, [1], Cpu, true)"),
        (&|| mask(&narrow_tokens, &labels, Kind::Float), "(Int, [2], Cpu, true)"),
        (&|| mask(&labels, &labels, Kind::Half), "a mask of dropout in Half"),
    ];
    for (work, expected) in cases {
        let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).expect_err(expected);
        let message = *refused.downcast::<String>().expect("a message");
        assert!(message.contains(expected), "{message} is not {expected}");
    }
}

#[test]
fn the_driver_is_asked_for_what_the_device_is() {
    if !without_a_gpu() {
        return;
    }
    let found = cuda::read_properties(Path::new(env!("CUDA_ON_CPU"))).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(found, cuda::Properties { compute_capability: (9, 0), multiprocessors: 132 });
}

#[test]
fn a_missing_driver_is_named() {
    let error = Kernels::load(Path::new("/nowhere/libcuda.so.1")).err().expect("there is none").to_string();
    assert!(error.starts_with("/nowhere/libcuda.so.1: ") && error.contains("No such file"), "{error}");
}

/// What the image holds: (16-bit kind, architecture, content) of each entry behind a header of 16 bytes.
fn entries(image: &[u8]) -> Vec<(u16, u32, &[u8])> {
    let number = |at: usize, bytes: usize| {
        image[at..at + bytes].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    assert_eq!(number(0, 4), 0xba55_ed50, "the image is no fatbin");
    let (mut entries, mut at) = (Vec::new(), number(6, 2));
    let end = at + number(8, 8);
    while at < end {
        let content = at + number(at + 4, 4);
        let next = content + number(at + 8, 8);
        entries.push((number(at, 2) as u16, number(at + 28, 4) as u32, &image[content..next]));
        at = next;
    }
    entries
}

#[test]
fn the_image_has_every_kernel_for_every_architecture() {
    const PTX: u16 = 1;
    const MACHINE_CODE: u16 = 2;
    let names: BTreeSet<&str> = NAMES.into();
    let mut found = BTreeSet::new();
    for (kind, architecture, content) in entries(cuda::image()) {
        found.insert((kind, architecture));
        if kind == PTX {
            let text = String::from_utf8_lossy(content);
            let listed: BTreeSet<&str> =
                text.split(".entry ").skip(1).filter_map(|rest| rest.split('(').next()).collect();
            assert_eq!(listed, names, "PTX of {architecture}");
            continue;
        }
        let object = object::File::parse(content).unwrap_or_else(|error| panic!("sm_{architecture}: {error}"));
        // The code of each kernel is a section of its own.
        let sections: Vec<&str> = object.sections().map(|section| section.name().expect("UTF-8")).collect();
        let listed: BTreeSet<&str> = sections.iter().filter_map(|name| name.strip_prefix(".text.")).collect();
        assert_eq!(listed, names, "sm_{architecture}");
    }
    assert_eq!(found, BTreeSet::from([(MACHINE_CODE, 80), (MACHINE_CODE, 90), (MACHINE_CODE, 100), (PTX, 100)]));
}
