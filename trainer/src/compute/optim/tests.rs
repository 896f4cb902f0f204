//! AdamW against its formula, at the end of a step against in the backward pass, and its other forms with 8 bits against each
//! other.

use super::step::{NORM_BLOCK, norm};
use super::*;

const FORMS: [Optimizer; 2] = [Optimizer::AdamW, Optimizer::AdamW8Bit];

#[test]
fn the_norm_of_a_long_buffer_is_accurate() {
    tch::set_num_threads(1);
    for length in [3, NORM_BLOCK, 5 * NORM_BLOCK + 7, 30_000_000] {
        let flat = Tensor::full([length], 1e-3, (Kind::Float, Device::Cpu));
        let expected = f64::from(1e-3f32) * (length as f64).sqrt();
        let norm =
            norm(&[flat.narrow(0, 0, length / 3), flat.narrow(0, length / 3, length - length / 3)]).double_value(&[]);
        assert!((norm / expected - 1.0).abs() < 1e-6, "{length}: {norm} instead of {expected}");
    }
}

fn parameters(values: &[f32], optimizer: Optimizer) -> Parameters {
    tch::set_num_threads(1);
    let tensors = vec![ParameterInit { name: "weight".into(), value: Tensor::from_slice(values), group: 0 }];
    Parameters::new(tensors, Kind::Float, Device::Cpu, OptimizerConfig { optimizer, in_backward: false })
}

/// A step of tensors that are all in group 0.
fn step(parameters: &mut Parameters, loss: f32, gradient: &[f32], constants: StepConstants) -> Update {
    let place = parameters.gradient(&parameters.slots()[0]);
    let step = parameters.begin_step(constants);
    place.view().copy_(&Tensor::from_slice(gradient));
    step.finish(&Tensor::from(loss)).expect("no libtorch error")
}

fn read(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).reshape([-1])).expect("a float tensor")
}

#[test]
fn two_steps_follow_the_formula() {
    let mut parameters = parameters(&[1.0, -2.0], Optimizer::AdamW);
    let (mut p, mut m, mut v) = ([1.0f64, -2.0], [0.0f64; 2], [0.0f64; 2]);
    let constants = StepConstants { learning_rate: 0.1, weight_decay: 0.01, max_grad_norm: 0.25 };
    let StepConstants { learning_rate, weight_decay, .. } = constants;
    for (t, gradient) in [(1, [0.3f32, -0.4]), (2, [0.1, 0.2])] {
        let update = step(&mut parameters, 1.0, &gradient, constants);
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!((update.gradient_norm.double_value(&[]) - norm).abs() < 1e-6);
        let clip = (0.25 / (norm + 1e-6)).min(1.0);
        for i in 0..2 {
            let g = f64::from(gradient[i]) * clip;
            p[i] *= 1.0 - learning_rate * weight_decay;
            m[i] += (1.0 - BETA1) * (g - m[i]);
            v[i] = BETA2 * v[i] + (1.0 - BETA2) * g * g;
            let corrected = (v[i] / (1.0 - BETA2.powi(t))).sqrt() + EPS;
            p[i] -= learning_rate / (1.0 - BETA1.powi(t)) * m[i] / corrected;
        }
    }
    for (ours, expected) in read(parameters.flat_master()).into_iter().zip(p) {
        assert!((ours - expected).abs() < 1e-6, "{ours} {expected}");
    }
}

#[test]
fn a_non_finite_step_moves_nothing() {
    let constants = StepConstants { learning_rate: 0.1, weight_decay: 0.1, max_grad_norm: 1.0 };
    for optimizer in FORMS {
        for (loss, gradient) in [(f32::NAN, [0.1f32, 0.1]), (1.0, [f32::INFINITY, 0.1]), (1.0, [f32::NAN, 0.1])] {
            let mut parameters = parameters(&[1.0, -2.0], optimizer);
            let update = step(&mut parameters, loss, &gradient, constants);
            assert_eq!(update.finite.double_value(&[]), 0.0);
            assert_eq!(read(parameters.flat_master()), [1.0, -2.0]);
            assert!(parameters.state().iter().all(|(_, held)| read(held).iter().all(|number| *number == 0.0)));
        }
    }
}

#[test]
fn norms_and_biases_are_not_decayed() {
    for (name, decayed) in [
        ("model.layers.0.self_attn.q_proj.weight", true),
        ("model.layers.0.input_layernorm.weight", false),
        ("model.norm.weight", false),
        ("model.layers.0.self_attn.q_proj.bias", false),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", true),
    ] {
        assert_eq!(is_decayed(name), decayed, "{name}");
    }
}

/// Numbers between -1 and 1 without a pattern, for each key others. libtorch's generator is not asked: tests on other threads do.
fn noise(length: i64, key: i64) -> Tensor {
    let index = Tensor::arange(length, (Kind::Double, Device::Cpu)) + key as f64 * 1e4;
    ((index * 12.9898).sin() * 43_758.545_3).frac().to_kind(Kind::Float)
}

/// Embedding, head and final norm, and two layers, whose blocks and runs end at odd places; the first layer has two buffers.
fn layered(config: OptimizerConfig) -> Parameters {
    tch::set_num_threads(1);
    let tensors = [("embed.weight", 700), ("0.q.weight", 768_000), ("0.k.weight", 300_300), ("0.norm.weight", 20)];
    let more =
        [("1.q.weight", 512), ("1.k.weight", 300), ("1.norm.weight", 20), ("norm.weight", 20), ("head.weight", 700)];
    let init = |(name, length): (&str, i64)| ParameterInit {
        name: name.into(),
        value: noise(length, -length),
        group: name.split('.').next().and_then(|layer| layer.parse::<usize>().ok()).map_or(0, |layer| layer + 1),
    };
    Parameters::new(tensors.into_iter().chain(more).map(init).collect(), Kind::BFloat16, Device::Cpu, config)
}

/// A step whose backward pass leaves gradients by `seed`, times `factor` in layer 1 and in layer 0.
fn layered_step(parameters: &mut Parameters, seed: i64, factors: [f64; 2]) -> Update {
    let places: Vec<_> =
        parameters.slots().iter().map(|slot| (slot.gradient.group, parameters.gradient(slot))).collect();
    let add = |group: usize, factor: f64| {
        for ((_, place), key) in places.iter().zip(seed * 100..).filter(|((its, _), _)| *its == group) {
            let mut gradient = place.view();
            let _ = gradient.g_add_(&(noise(gradient.numel() as i64, key) * factor));
        }
    };
    let loss = Tensor::from(1f32);
    let mut step = parameters.begin_step(StepConstants { learning_rate: 0.01, weight_decay: 0.1, max_grad_norm: 0.0 });
    add(0, 1.0);
    step.begin(&loss);
    for (layer, factor) in [1, 0].into_iter().zip(factors) {
        step.begin_layer(layer);
        add(layer + 1, factor);
        step.end_layer(layer).expect("no libtorch error");
    }
    step.finish(&loss).expect("no libtorch error")
}

#[test]
fn an_update_in_the_backward_pass_has_the_bits_of_one_at_its_end() {
    for optimizer in FORMS {
        let [mut at_end, mut in_backward] =
            [false, true].map(|in_backward| layered(OptimizerConfig { optimizer, in_backward }));
        for seed in 0..4 {
            let updates = [&mut at_end, &mut in_backward].map(|parameters| layered_step(parameters, seed, [1.0, 0.1]));
            assert_eq!(updates[0].gradient_norm, updates[1].gradient_norm);
            assert_eq!(updates.each_ref().map(|update| update.finite.double_value(&[])), [1.0, 1.0]);
        }
        assert_eq!((&at_end.master, &at_end.working), (&in_backward.master, &in_backward.working));
        assert_eq!(at_end.state(), in_backward.state());
        assert_eq!(in_backward.updates.double_value(&[]), 4.0);
    }
}

#[test]
fn in_the_backward_pass_a_non_finite_gradient_stops_what_comes_after_it() {
    for optimizer in FORMS {
        // Which layers moved, and how many updates are counted.
        for (factors, moved, updates) in [([1.0, f64::NAN], [false, true], 1.0), ([f64::NAN, 1.0], [false; 2], 0.0)] {
            let mut parameters = layered(OptimizerConfig { optimizer, in_backward: true });
            let before = parameters.master.copy();
            let update = layered_step(&mut parameters, 1, factors);
            assert_eq!((update.finite.double_value(&[]), parameters.updates.double_value(&[])), (0.0, updates));
            for slot in parameters.slots() {
                let expected = slot.gradient.group > 0 && moved[slot.gradient.group - 1];
                assert_eq!(slot.view(&parameters.master) != slot.view(&before), expected, "{}", slot.name);
            }
            assert!(read(&parameters.master).iter().all(|weight| weight.is_finite()));
        }
    }
}

#[test]
fn a_layer_has_buffers_of_a_few_tensors_and_what_stays_has_one() {
    let mut layout = Layout::new(2);
    let quarter = gradients::MOST_ELEMENTS / 4;
    let places = [3, 1, 1, 9, 2].map(|quarters| layout.place(1, quarters * quarter));
    let found = places.map(|place| (place.buffer, place.offset / quarter));
    assert_eq!(found, [(0, 0), (0, 3), (1, 0), (2, 0), (3, 0)]);
    let of_the_rest = [9, 9].map(|quarters| layout.place(0, quarters * quarter));
    assert_eq!(of_the_rest.map(|place| (place.buffer, place.offset / quarter)), [(0, 0), (0, 9)]);
}

#[test]
fn layers_take_turns_with_the_same_buffers_in_the_backward_pass() {
    let mut parameters = layered(OptimizerConfig { optimizer: Optimizer::AdamW, in_backward: true });
    layered_step(&mut parameters, 1, [1.0, 1.0]);
    let [rest, first, second] = [0, 1, 2].map(|group| {
        parameters.gradients.of(group).iter().map(|gradient| gradient.data_ptr() as usize).collect::<Vec<_>>()
    });
    assert_eq!([first.len(), second.len()], [2, 1]);
    assert_eq!(first[0], second[0]);
    assert!(!first.contains(&rest[0]));
}
