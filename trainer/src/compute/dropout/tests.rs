use tch::Device;

use super::*;
use crate::compute::shim::cpu;

/// Counter, key and words of Random123's `kat_vectors` for `philox4x32 10`.
const KNOWN: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
    ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
    ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
    (
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
    ),
];

#[test]
fn written_out_words_are_random123s() {
    for (counter, key, expected) in KNOWN {
        let scalars =
            philox(counter.map(|word| Tensor::from(i64::from(word))), key.map(|word| Tensor::from(i64::from(word))));
        assert_eq!(scalars.map(|word| word.int64_value(&[])), expected.map(i64::from), "{counter:x?} {key:x?}");
    }
}

/// A mask's first counter at key, position and site 0 is the first known one, and a word drops its column from a threshold above it
/// on.
#[test]
fn words_of_the_kernel_are_random123s() {
    let zero = Tensor::from_slice(&[0i64]);
    let (_, _, words) = KNOWN[0];
    for (column, word) in words.into_iter().enumerate() {
        for (threshold, kept) in [(word, 1.0), (word + 1, 0.0)] {
            let mask = DropoutMask {
                keys: &zero,
                positions: &zero,
                columns: 4,
                kind: Kind::Float,
                site: 0,
                threshold,
                kept: 1.0,
            };
            assert_eq!(cpu::dropout(&mask).double_value(&[0, column as i64]), kept, "column {column} at {threshold:x}");
        }
    }
}

#[test]
fn the_kernel_has_the_bits_that_are_written_out() {
    cpu::with_each_variant(|_| check_bits());
}

fn check_bits() {
    let keys = Tensor::from_slice(&[0, -1, i64::MIN, 0x0123_4567_89ab_cdef, -0x0123_4567_89ab_cdef]);
    let positions = Tensor::from_slice(&[0i64, 1, 4095, i64::from(u32::MAX), 77]);
    // Less than a group, whole groups and not, less than the kernel's block, whole blocks and not.
    for columns in [0, 1, 4, 7, 63, 64, 66, 576] {
        for (site, threshold) in [(0, 1 << 31), (209, 1 << 28), (u32::MAX, u32::MAX - 9), (1, 0)] {
            for (kind, kept) in [(Kind::BFloat16, 1.109_375), (Kind::Float, f64::from(1f32 / 0.9))] {
                let (keys, positions) = (&keys, &positions);
                let mask = DropoutMask { keys, positions, columns, kind, site, threshold, kept };
                let (ours, exact) = (fused::dropout(&mask).expect("a kernel"), written_out(&mask));
                assert_eq!((ours.kind(), ours.size()), (kind, vec![5, columns]));
                assert!(ours.equal(&exact), "{mask:?}");
            }
        }
    }
}

/// `[t, columns]` of a batch of examples (id, tokens).
fn mask(probability: f64, step: i64, examples: &[(u64, i64)], site: u64, columns: i64) -> Tensor {
    let positions: Vec<i64> = examples.iter().flat_map(|&(_, tokens)| 0..tokens).collect();
    let dropout = Dropout::new(probability, 42, step, examples.iter().copied(), &Tensor::from_slice(&positions));
    let tokens = positions.len() as i64;
    dropout.mask(site, tokens, &Tensor::empty([tokens, columns], (Kind::Float, Device::Cpu))).expect("a mask")
}

#[test]
fn an_example_has_its_mask_wherever_it_is_packed() {
    let alone = mask(0.3, 5, &[(7, 11)], 3, 50);
    let packed = mask(0.3, 5, &[(1, 4), (7, 11), (2, 9)], 3, 50);
    assert!(packed.narrow(0, 4, 11).equal(&alone));
    // Nor does a mask depend on what is drawn beside it: a shorter and narrower one is a part of it.
    assert!(mask(0.3, 5, &[(7, 6)], 3, 18).equal(&alone.narrow(0, 0, 6).narrow(1, 0, 18)));
}

/// Two masks that have nothing to do with each other agree in p^2 + (1 - p)^2 of their columns.
#[test]
fn each_coordinate_gives_another_mask() {
    let (probability, columns) = (0.4f64, 4096);
    let base = mask(probability, 5, &[(7, 16)], 3, columns);
    let others = [
        ("step", mask(probability, 6, &[(7, 16)], 3, columns)),
        ("example", mask(probability, 5, &[(8, 16)], 3, columns)),
        ("site", mask(probability, 5, &[(7, 16)], 4, columns)),
        ("position", base.roll([1], [0])),
        ("column", base.roll([1], [1])),
        ("group of columns", base.roll([4], [1])),
    ];
    for (coordinate, other) in others {
        let agreement = base.eq_tensor(&other).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let expected = probability.powi(2) + (1.0 - probability).powi(2);
        assert!((agreement - expected).abs() < 0.01, "{coordinate}: {agreement}");
    }
}

/// Six standard deviations of the share are at most 0.006; the mean of the mask is 1, up to rounding.
#[test]
fn as_many_columns_are_dropped_as_asked_for() {
    for probability in [1e-3, 0.05, 0.1, 0.5, 0.999] {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
            let dropout = Dropout::new(probability, 1, 2, [(3, 64)], &Tensor::arange(64, (Kind::Int64, Device::Cpu)));
            let mask = dropout.mask(0, 64, &Tensor::empty([64, 4096], (kind, Device::Cpu))).expect("a mask");
            assert_eq!(mask.kind(), kind);
            let dropped = mask.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            assert!((dropped - probability).abs() < 0.006, "{dropped} of {probability}");
            let kept = mask.max().double_value(&[]) * (1.0 - probability);
            let rounding = if kind == Kind::BFloat16 { 1.0 / 256.0 } else { 1e-6 };
            assert!((kept - 1.0).abs() < rounding, "{kind:?}: {kept}");
        }
    }
}
