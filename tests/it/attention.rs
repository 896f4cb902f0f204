//! Attention on the device of the tests against attention written out in fp64: packed examples of every length, heads of every width
//! that is asked for, the same bits twice.

use harness::{device, is_on_gpu};
use tch::{Kind, Tensor};
use trainer::compute::attention::{Segments, attention, attention_backward};

/// Output and gradients of q, k and v `[t, heads, d]`, example by example, by what softmax's derivative says.
fn written_out([q, k, v, gradient]: [&Tensor; 4], bounds: &[i32], scale: f64) -> [Tensor; 4] {
    let group = q.size()[1] / k.size()[1];
    let mut parts: [Vec<Tensor>; 4] = Default::default();
    for pair in bounds.windows(2).filter(|pair| pair[0] < pair[1]) {
        let (start, length) = (i64::from(pair[0]), i64::from(pair[1] - pair[0]));
        // [heads, l, d]
        let of = |x: &Tensor| x.narrow(0, start, length).to_kind(Kind::Double).transpose(0, 1);
        let of_group = |x: &Tensor| of(x).repeat_interleave_self_int(group, 0, None);
        let (q, k, v, g) = (of(q), of_group(k), of_group(v), of(gradient));
        let future = Tensor::ones([length, length], (Kind::Bool, q.device())).triu(1);
        let scores = (q.matmul(&k.transpose(1, 2)) * scale).masked_fill(&future, f64::NEG_INFINITY);
        let p = scores.softmax(-1, Kind::Double);
        let out = p.matmul(&v);
        let dv = p.transpose(1, 2).matmul(&g);
        let dp = g.matmul(&v.transpose(1, 2));
        let share = (&g * &out).sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        let ds = &p * (dp - share) * scale;
        let (dq, dk) = (ds.matmul(&k), ds.transpose(1, 2).matmul(&q));
        let of_heads = |x: &Tensor| {
            let size = x.size();
            x.view([size[0] / group, group, size[1], size[2]]).sum_dim_intlist([1i64].as_slice(), false, Kind::Double)
        };
        for (part, tensor) in parts.iter_mut().zip([out, dq, of_heads(&dk), of_heads(&dv)]) {
            part.push(tensor.transpose(0, 1));
        }
    }
    parts.map(|part| Tensor::cat(&part, 0))
}

#[test]
fn packed_examples_are_what_is_written_out_and_the_same_bits_twice() {
    let device = device();
    tch::set_num_threads(1);
    tch::manual_seed(1);
    let (heads, kv_heads) = if is_on_gpu() { (32, 8) } else { (4, 2) };
    let lengths: &[i32] = if is_on_gpu() { &[1, 7, 128, 129, 2048] } else { &[1, 7, 33] };
    for head_size in [64, 96, 128, 192, 256] {
        let mut bounds = vec![0];
        bounds.extend(lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        let tokens = i64::from(*bounds.last().expect("an example"));
        let random = |heads| Tensor::randn([tokens, heads, head_size], (Kind::Float, device)).to_kind(Kind::BFloat16);
        let (q, k, v, gradient) = (random(heads), random(kv_heads), random(kv_heads), random(heads));
        let (segments, scale) = (Segments::new(&bounds, device), 1.0 / (head_size as f64).sqrt());
        let all = || {
            let saved = attention(&q, &k, &v, &segments, scale);
            let (dq, dk, dv) = attention_backward(&gradient, &q, &k, &v, &saved, &segments, scale);
            [saved.out, dq, dk, dv]
        };
        let (ours, again) = (all(), all());
        let exact = written_out([&q, &k, &v, &gradient], &bounds, scale);
        for (place, ((ours, again), exact)) in ours.iter().zip(&again).zip(&exact).enumerate() {
            let distance = ((ours.to_kind(Kind::Double) - exact).norm() / exact.norm()).double_value(&[]);
            assert!(distance < 1e-2, "heads of {head_size}, place {place}: {distance:e}");
            assert!(ours.equal(again), "heads of {head_size}, place {place}: other bits the second time");
        }
    }
}
