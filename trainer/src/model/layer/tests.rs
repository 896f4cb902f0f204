use std::collections::BTreeMap;

use tch::{Device, Kind};

use super::*;
use crate::compute::linear::Adapter;
use crate::compute::ops::Rope;
use crate::compute::optim::{OptimizerConfig, ParameterInit, Parameters};
use crate::compute::shim::cpu;
use crate::compute::weight::Weight;
use crate::model::spec::NormNames;

const TOKENS: i64 = 11;
const HIDDEN: i64 = 8;
const RANK: i64 = 2;
const ADAPTER_SCALE: f64 = 0.5;
const EPS: f64 = 1e-5;

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

/// A layer of Llama.
fn plain() -> LayerSpec {
    let before = |name| NormNames { before: Some(name), after: None };
    LayerSpec {
        attention: AttentionSpec {
            heads: 2,
            kv_heads: 1,
            head_size: 4,
            input_bias: false,
            output_bias: false,
            query_key_norm: None,
            is_rotary: true,
            window: None,
            scale: 0.5,
        },
        mlp: MlpSpec { width: 12, bias: false, activation: Activation::Silu },
        attention_norms: before("input_norm"),
        mlp_norms: before("post_norm"),
        residual_multiplier: 1.0,
    }
}

/// Everything that a family may have besides, each at least once, and whether norms are told by their distance from one.
fn variants() -> [(LayerSpec, bool); 4] {
    let plain = plain();
    let biased = LayerSpec {
        attention: AttentionSpec { input_bias: true, output_bias: true, is_rotary: false, ..plain.attention },
        mlp: MlpSpec { bias: true, ..plain.mlp },
        residual_multiplier: 0.3,
        ..plain
    };
    let norms = |before, after| NormNames { before, after: Some(after) };
    let by_head = LayerSpec {
        attention: AttentionSpec { query_key_norm: Some(QueryKeyNorm::Head), scale: 0.7, ..plain.attention },
        mlp: MlpSpec { activation: Activation::GeluTanh, ..plain.mlp },
        attention_norms: norms(Some("input_norm"), "attention_after"),
        mlp_norms: norms(Some("post_norm"), "mlp_after"),
        ..plain
    };
    let after = LayerSpec {
        attention: AttentionSpec {
            query_key_norm: Some(QueryKeyNorm::Projection),
            input_bias: true,
            ..plain.attention
        },
        attention_norms: norms(None, "attention_after"),
        mlp_norms: norms(None, "mlp_after"),
        residual_multiplier: 1.5,
        ..plain
    };
    [(plain, false), (biased, false), (by_head, true), (after, false)]
}

fn parameters(spec: &LayerSpec) -> Parameters {
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Double, Device::Cpu)) * 0.3;
    let mut tensors = Vec::new();
    let mut add = |name: String, value: Tensor| tensors.push(ParameterInit { name, value, group: 0 });
    for (name, shape) in spec.tensors(HIDDEN) {
        let around = if name.contains("norm") || name.contains("after") { 1.0 } else { 0.0 };
        add(name, random(&shape) + around);
    }
    for linear in spec.linears(HIDDEN) {
        add(format!("{}.a", linear.name), random(&[RANK, linear.inputs]));
        add(format!("{}.b", linear.name), random(&[linear.outputs, RANK]));
    }
    let config = OptimizerConfig { optimizer: crds::run::Optimizer::AdamW, in_backward: false };
    Parameters::new(tensors, Kind::Double, Device::Cpu, config)
}

fn layer(spec: &LayerSpec, is_offset: bool, parameters: &Parameters) -> Layer {
    let weight = |name: &str| {
        let slot = parameters.slots().iter().find(|slot| slot.name == name).expect("a parameter");
        Weight { value: parameters.working(slot), gradient: Some(parameters.gradient(slot)) }
    };
    let linears = spec.linears(HIDDEN);
    let linear = |site: usize| {
        let name = linears[site].name;
        let (a, b) = (weight(&format!("{name}.a")), weight(&format!("{name}.b")));
        let bias = linears[site].bias.then(|| weight(&format!("{name}.bias")));
        let adapter = Some(Adapter { a, b, scale: ADAPTER_SCALE, site: site as u64 });
        Linear { weight: weight(&format!("{name}.weight")), bias, adapter }
    };
    let norm = |name: &str| Norm { weight: weight(&format!("{name}.weight")), eps: EPS, is_offset };
    let [query_norm, key_norm] =
        ["self_attn.q_norm", "self_attn.k_norm"].map(|name| spec.attention.query_key_norm.map(|_| norm(name)));
    let [q, k, v, o, gate, up, down] = std::array::from_fn(linear);
    let around = |names: NormNames| [names.before, names.after].map(|name| name.map(norm));
    let [before, after] = around(spec.attention_norms);
    let attention = Attention { spec: spec.attention, before, q, k, v, query_norm, key_norm, o, after };
    let [before, after] = around(spec.mlp_norms);
    let mlp = Mlp { spec: spec.mlp, before, gate, up, down, after };
    Layer { attention, mlp, residual_multiplier: spec.residual_multiplier }
}

/// The layer's output for all tokens, in operations that autograd knows.
fn written_out(
    (spec, is_offset): (&LayerSpec, bool),
    x_th: &Tensor,
    leaves: &BTreeMap<String, Tensor>,
    rope: &RopeRows,
    bounds: &[i32],
) -> Tensor {
    let linears = spec.linears(HIDDEN);
    let linear = |site: usize, x_ti: &Tensor| {
        let name = linears[site].name;
        let masked = x_ti * Masks.mask(site as u64, TOKENS, x_ti).expect("a mask");
        let adapted = masked.matmul(&leaves[&format!("{name}.a")].tr()).matmul(&leaves[&format!("{name}.b")].tr());
        let product = x_ti.matmul(&leaves[&format!("{name}.weight")].tr()) + adapted * ADAPTER_SCALE;
        leaves.get(&format!("{name}.bias")).map_or(product.shallow_clone(), |bias| product + bias)
    };
    let norm = |name: Option<&str>, x: &Tensor| {
        let Some(name) = name else { return x.shallow_clone() };
        let mean = x.square().mean_dim([-1i64].as_slice(), true, Kind::Double);
        let factor = &leaves[&format!("{name}.weight")] + if is_offset { 1.0 } else { 0.0 };
        x * (mean + EPS).rsqrt() * factor
    };
    let AttentionSpec { heads, kv_heads, head_size, query_key_norm, is_rotary, scale, .. } = spec.attention;
    let normed = norm(spec.attention_norms.before, x_th);
    let heads_of = |site: usize, name: Option<&str>, heads: i64| {
        let x = linear(site, &normed);
        let x = if query_key_norm == Some(QueryKeyNorm::Projection) { norm(name, &x) } else { x };
        let x = x.view([TOKENS, heads, head_size]);
        let x = if query_key_norm == Some(QueryKeyNorm::Head) { norm(name, &x) } else { x };
        if is_rotary && name.is_some() { rope.rotate(&x, Rotation::Forward) } else { x }
    };
    let q = heads_of(0, Some("self_attn.q_norm"), heads);
    let k = heads_of(1, Some("self_attn.k_norm"), kv_heads);
    let v = heads_of(2, None, kv_heads);
    let attended = bounds.windows(2).map(|pair| {
        let part = |x: &Tensor| x.narrow(0, i64::from(pair[0]), i64::from(pair[1] - pair[0])).transpose(0, 1);
        Tensor::scaled_dot_product_attention(&part(&q), &part(&k), &part(&v), None::<Tensor>, 0.0, true, scale, true)
            .transpose(0, 1)
            .flatten(1, 2)
    });
    let attended = linear(3, &Tensor::cat(&attended.collect::<Vec<_>>(), 0));
    let middle = x_th + norm(spec.attention_norms.after, &attended) * spec.residual_multiplier;
    let normed = norm(spec.mlp_norms.before, &middle);
    let gate = linear(4, &normed);
    let gate = if spec.mlp.activation == Activation::Silu { gate.silu() } else { gate.gelu("tanh") };
    let down = linear(6, &(gate * linear(5, &normed)));
    &middle + norm(spec.mlp_norms.after, &down) * spec.residual_multiplier
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
    for (spec, is_offset) in variants() {
        for (outputs, recompute) in cases {
            let pass = Pass { rope: &rope, adapters: Adapters::On, dropout: &Masks, recompute };
            let parameters = parameters(&spec);
            let layer = layer(&spec, is_offset, &parameters);
            let leaf = |slot: &crate::compute::optim::Slot| {
                (slot.name.clone(), parameters.working(slot).copy().set_requires_grad(true))
            };
            let leaves: BTreeMap<_, _> = parameters.slots().iter().map(leaf).collect();
            let x_leaf = x.copy().set_requires_grad(true);
            let expected = outputs.select(&written_out((&spec, is_offset), &x_leaf, &leaves, &rope, &bounds));
            let gradient = Tensor::randn(expected.size(), (Kind::Double, Device::Cpu));
            (&expected * &gradient).sum(Kind::Double).backward();

            let (output, saved) = layer.forward(&x, &segments, &pass, outputs);
            assert!(cpu::distance(&output, &expected.detach()) < 1e-12, "{spec:?}");
            let around = Around { outputs, below: Below::Trained };
            let d_x = layer.backward(gradient, &x, saved, &segments, &pass, around).expect("the input's gradient");
            assert!(cpu::distance(&d_x, &x_leaf.grad()) < 1e-12, "{spec:?}");
            for slot in parameters.slots() {
                let (ours, exact) = (parameters.gradient(slot).view(), leaves[&slot.name].grad());
                // Without rotation a bias of keys moves all scores of a query alike: its gradient is nothing but rounding.
                let distance = cpu::distance(&ours, &exact).min((ours - exact).abs().max().double_value(&[]));
                assert!(distance < 1e-6, "{}: {distance:e} in {spec:?}", slot.name);
            }
        }
    }
}
