//! AdamW with moments in 8 bits against torchao's (`tests/golden/optimizer.py`).
//!
//! Codes and scales must be the same: they follow from the gradients alone, and both sides compute them by the same sums and
//! products. Weights differ by rounding, and by what torchao's bias corrections lack.

use crds::run::Optimizer;
use harness::{device, golden, on_host};
use tch::{Device, Kind, Tensor};
use trainer::compute::optim::{OptimizerConfig, ParameterInit, Parameters, StepConstants};
use trainer::store::weights::MappedFile;

const STEPS: i64 = 12;
const WEIGHT_DECAY: f64 = 0.125;
const BLOCK: i64 = 256;
const TENSORS: [(&str, i64); 3] = [("wide.weight", 5120), ("odd.weight", 4103), ("norm.weight", 4096)];
/// torchao takes bias corrections in fp32, where 0.999 is 1.3e-8 too large and a power is off by another 3e-8: `1 - 0.999^t`, some
/// t thousandths, is off by at most 2.8e-5 of itself and its root by 1.4e-5; `1 - 0.9^t`, at least a tenth, by 6e-7.
const CORRECTION: f64 = 1.5e-5;
/// Of the largest that a weight has been: three roundings in fp32 for each step on either side.
const ROUNDING: f64 = STEPS as f64 * 2.0 * 3.0 / (1 << 24) as f64;

fn start(tensor: i64, length: i64) -> Tensor {
    let number = |index: i64| ((index * 3571 + tensor * 101) % 511 - 255) as f32 / 512.0;
    Tensor::from_slice(&(0..length).map(number).collect::<Vec<_>>())
}

fn gradient(tensor: i64, step: i64, length: i64) -> Tensor {
    let number = |index: i64| {
        let block = index / BLOCK;
        if block == 1 || block == 2 && step % 2 == 0 {
            return 0.0;
        }
        let number = (index * 7919 + step * 104_729 + tensor * 1_299_709) % 509 - 254;
        let exponent = (index * 5 + step) % 12 + block % 16 + if block == 3 { 60 } else { 0 };
        number as f32 / 256.0 * 2f32.powi(-exponent as i32)
    };
    Tensor::from_slice(&(0..length).map(number).collect::<Vec<_>>())
}

/// A tensor of the file, of any shape that has so many elements.
fn read(file: &MappedFile, name: &str, length: i64, kind: Kind) -> Tensor {
    let found = file.tensor(name).unwrap_or_else(|| panic!("no {name}; run `make golden`"));
    Tensor::from_data_size(found.data, &[length], kind)
}

fn wide(tensor: &Tensor) -> Tensor {
    on_host(tensor).to_kind(Kind::Double)
}

/// How far a number may be from the one that was rounded to it in bf16.
fn half_a_place(bf16: &Tensor) -> Tensor {
    let exponent = wide(bf16).abs().clamp_min(2f64.powi(-126)).log2().floor();
    Tensor::pow_scalar(2.0, &(exponent - 8.0))
}

#[test]
fn adamw_in_8_bits_has_the_moments_and_weights_of_torchao() {
    let device = device();
    tch::set_num_threads(1);
    let file = MappedFile::open(&golden("optimizer.safetensors")).expect("golden steps; run `make golden`");
    let inits = (0..).zip(TENSORS).map(|(index, (name, length))| ParameterInit {
        name: name.into(),
        value: start(index, length),
        group: 0,
    });
    let config = OptimizerConfig { optimizer: Optimizer::AdamW8Bit, in_backward: false };
    let mut parameters = Parameters::new(inits.collect(), Kind::BFloat16, device, config);
    let places: Vec<_> = parameters.slots().iter().map(|slot| parameters.gradient(slot)).collect();
    // What the moments moved each weight by in all, at most, and the largest that it was.
    let mut moved = Tensor::zeros([parameters.num_elements()], (Kind::Double, Device::Cpu));
    let mut reach = wide(parameters.flat_master()).abs();
    for step in 1..=STEPS {
        let learning_rate = (17 - step) as f64 / 2048.0;
        let before = wide(parameters.flat_master());
        let taken =
            parameters.begin_step(StepConstants { learning_rate, weight_decay: WEIGHT_DECAY, max_grad_norm: 0.0 });
        for ((index, (_, length)), place) in (0..).zip(TENSORS).zip(&places) {
            place.view().copy_(&gradient(index, step, length));
        }
        taken.finish(&Tensor::from(1f32).to_device(device)).expect("no libtorch error");
        moved += (wide(parameters.flat_master()) - &before).abs() + before.abs() * (learning_rate * WEIGHT_DECAY);
        reach = reach.maximum(&wide(parameters.flat_master()).abs());
        for slot in parameters.slots() {
            let (master, bf16) = (wide(&parameters.master(slot)), parameters.working(slot));
            assert_eq!(
                on_host(&bf16),
                on_host(&parameters.master(slot).to_kind(Kind::BFloat16)),
                "{} step {step}",
                slot.name
            );
            let tolerance = slot.view(&(&moved * CORRECTION + &reach * ROUNDING));
            let check = |what: &str, theirs: &Tensor, tolerance: &Tensor| {
                let excess = ((wide(theirs) - &master).abs() - tolerance).max().double_value(&[]);
                assert!(excess <= 0.0, "{} {what}: {excess:e} more than the tolerance away", slot.name);
            };
            if step == 1 {
                let theirs = read(&file, &format!("{}.bf16", slot.name), slot.len(), Kind::BFloat16);
                check("bf16, step 1", &theirs, &(tolerance + half_a_place(&theirs)));
            } else if step == STEPS {
                check("fp32", &read(&file, &format!("{}.fp32", slot.name), slot.len(), Kind::Float), &tolerance);
            }
        }
    }
    let state: std::collections::HashMap<_, _> = parameters.state().into_iter().collect();
    let mut block = 0;
    for slot in parameters.slots() {
        let blocks = (slot.len() + BLOCK - 1) / BLOCK;
        for moment in ["exp_avg", "exp_avg_sq"] {
            let codes = read(&file, &format!("{}.{moment}", slot.name), slot.len(), Kind::Uint8);
            assert_eq!(on_host(&slot.view(state[moment])), codes, "codes of {}.{moment}", slot.name);
            let name = format!("{moment}_scale");
            let scales = read(&file, &format!("{}.{name}", slot.name), blocks, Kind::Float);
            assert_eq!(
                on_host(&state[name.as_str()].narrow(0, block, blocks)),
                scales,
                "scales of {}.{moment}",
                slot.name
            );
        }
        block += blocks;
    }
}
