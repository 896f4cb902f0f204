use std::collections::BTreeMap;

use tch::{Device, Kind};

use super::*;
use crate::compute::linear::Adapter;
use crate::compute::ops::Rope;
use crate::compute::optim::{OptimizerConfig, ParameterInit, Parameters};
use crate::compute::shim::cpu;

const TOKENS: i64 = 11;
const HIDDEN: i64 = 8;
const WIDTH: i64 = 12;
const RANK: i64 = 2;
const ADAPTER_SCALE: f64 = 0.5;
const SHAPE: LayerShape = LayerShape { heads: 2, kv_heads: 1, head_size: 4, eps: 1e-5 };
/// Output and input width of each linear.
const LINEARS: [(&str, i64, i64); 7] = [
    ("q", HIDDEN, HIDDEN),
    ("k", SHAPE.head_size, HIDDEN),
    ("v", SHAPE.head_size, HIDDEN),
    ("o", HIDDEN, HIDDEN),
    ("gate", WIDTH, HIDDEN),
    ("up", WIDTH, HIDDEN),
    ("down", HIDDEN, WIDTH),
];

/// A mask for each place, the same on every call, of as many tokens as are asked for.
struct Masks;

impl InputMask for Masks {
    fn mask(&self, site: u64, tokens: i64, x: &Tensor) -> Option<Tensor> {
        assert_eq!(tokens, TOKENS, "masks are drawn for all tokens");
        tch::manual_seed(site as i64);
        let mut mask = Tensor::empty([tokens, x.size()[1]], (x.kind(), x.device()));
        Some(mask.bernoulli_float_(0.7) / 0.7)
    }
}

fn parameters() -> Parameters {
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Double, Device::Cpu)) * 0.3;
    let mut tensors = Vec::new();
    let mut add = |name: String, value: Tensor| tensors.push(ParameterInit { name, value, group: 0 });
    for norm in ["input_norm", "post_norm"] {
        add(norm.to_owned(), random(&[HIDDEN]) + 1.0);
    }
    for (name, output, input) in LINEARS {
        add(name.to_owned(), random(&[output, input]));
        add(format!("{name}.a"), random(&[RANK, input]));
        add(format!("{name}.b"), random(&[output, RANK]));
    }
    let config = OptimizerConfig { optimizer: crds::run::Optimizer::AdamW, in_backward: false };
    Parameters::new(tensors, Kind::Double, Device::Cpu, config)
}

fn layer(parameters: &Parameters) -> Layer {
    let weight = |name: &str| {
        let slot = parameters.slots().iter().find(|slot| slot.name == name).expect("a parameter");
        Weight { value: parameters.working(slot), gradient: Some(parameters.gradient(slot)) }
    };
    let linear = |index: usize| {
        let (name, ..) = LINEARS[index];
        let (a, b) = (weight(&format!("{name}.a")), weight(&format!("{name}.b")));
        Linear { weight: weight(name), adapter: Some(Adapter { a, b, scale: ADAPTER_SCALE, site: index as u64 }) }
    };
    Layer {
        shape: SHAPE,
        input_norm: weight("input_norm"),
        q: linear(0),
        k: linear(1),
        v: linear(2),
        o: linear(3),
        post_attention_norm: weight("post_norm"),
        gate: linear(4),
        up: linear(5),
        down: linear(6),
    }
}

/// The layer's output for all tokens, in operations that autograd knows.
fn written_out(x_th: &Tensor, leaves: &BTreeMap<String, Tensor>, rope: &RopeRows, bounds: &[i32]) -> Tensor {
    let linear = |index: usize, x_ti: &Tensor| {
        let (name, ..) = LINEARS[index];
        let masked = x_ti * Masks.mask(index as u64, TOKENS, x_ti).expect("a mask");
        let adapted = masked.matmul(&leaves[&format!("{name}.a")].tr()).matmul(&leaves[&format!("{name}.b")].tr());
        x_ti.matmul(&leaves[name].tr()) + adapted * ADAPTER_SCALE
    };
    let norm = |name: &str, x_th: &Tensor| {
        let mean = x_th.square().mean_dim([-1i64].as_slice(), true, Kind::Double);
        x_th * (mean + SHAPE.eps).rsqrt() * &leaves[name]
    };
    let normed = norm("input_norm", x_th);
    let heads = |index: usize, heads: i64| linear(index, &normed).view([TOKENS, heads, SHAPE.head_size]);
    let q = rope.rotate(&heads(0, SHAPE.heads), Rotation::Forward);
    let k = rope.rotate(&heads(1, SHAPE.kv_heads), Rotation::Forward);
    let v = heads(2, SHAPE.kv_heads);
    let attended = bounds.windows(2).map(|pair| {
        let part = |x: &Tensor| x.narrow(0, i64::from(pair[0]), i64::from(pair[1] - pair[0])).transpose(0, 1);
        let scale = 1.0 / (SHAPE.head_size as f64).sqrt();
        Tensor::scaled_dot_product_attention(&part(&q), &part(&k), &part(&v), None::<Tensor>, 0.0, true, scale, true)
            .transpose(0, 1)
            .flatten(1, 2)
    });
    let middle = x_th + linear(3, &Tensor::cat(&attended.collect::<Vec<_>>(), 0));
    let normed = norm("post_norm", &middle);
    &middle + linear(6, &(linear(4, &normed).silu() * linear(5, &normed)))
}

/// Gradients of parameters are summed in fp32, all else is fp64.
#[test]
fn output_and_gradients_are_those_of_autograd_for_all_tokens_and_for_some() {
    tch::set_num_threads(1);
    tch::manual_seed(3);
    let bounds = [0, 4, 11];
    let segments = Segments::new(&bounds, Device::Cpu);
    let positions = Tensor::from_slice(&[0i64, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]);
    let rope = Rope::new(&[1.0, 0.1], 16, Kind::Double, Device::Cpu).at(&positions);
    let rows = Tensor::from_slice(&[1i64, 2, 5, 9]);
    let x = Tensor::randn([TOKENS, HIDDEN], (Kind::Double, Device::Cpu));
    let cases = [
        (Outputs::All, Recompute::Nothing),
        (Outputs::Rows(&rows), Recompute::Nothing),
        (Outputs::Rows(&rows), Recompute::Pointwise),
    ];
    for (outputs, recompute) in cases {
        let pass = Pass { rope: &rope, adapters: Adapters::On, dropout: &Masks, recompute };
        let parameters = parameters();
        let layer = layer(&parameters);
        let leaf = |slot: &crate::compute::optim::Slot| {
            (slot.name.clone(), parameters.working(slot).copy().set_requires_grad(true))
        };
        let leaves: BTreeMap<_, _> = parameters.slots().iter().map(leaf).collect();
        let x_leaf = x.copy().set_requires_grad(true);
        let expected = outputs.select(&written_out(&x_leaf, &leaves, &rope, &bounds));
        let gradient = Tensor::randn(expected.size(), (Kind::Double, Device::Cpu));
        (&expected * &gradient).sum(Kind::Double).backward();

        let (output, saved) = layer.forward(&x, &segments, &pass, outputs);
        assert!(cpu::distance(&output, &expected.detach()) < 1e-12);
        let around = Around { outputs, below: Below::Trained };
        let d_x = layer.backward(gradient, &x, saved, &segments, &pass, around).expect("the input's gradient");
        assert!(cpu::distance(&d_x, &x_leaf.grad()) < 1e-12);
        for slot in parameters.slots() {
            let distance = cpu::distance(&parameters.gradient(slot).view(), &leaves[&slot.name].grad());
            assert!(distance < 1e-6, "{}: {distance:e}", slot.name);
        }
    }
}
