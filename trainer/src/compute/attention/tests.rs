use super::*;

/// Output, dq, dk and dv of [`by_runs`], and the number of its parts.
fn all_by_runs(
    [q, k, v, gradient]: [&Tensor; 4],
    segments: &Segments,
    scale: f64,
    most_scores: Option<i64>,
) -> ([Tensor; 4], usize) {
    let Saved { out, statistics: Statistics::Runs(logsumexp) } = by_runs([q, k, v], segments, scale, most_scores)
    else {
        unreachable!("runs have the statistics of runs")
    };
    let (dq, dk, dv) = by_runs_backward(gradient, [q, k, v], (&out, &logsumexp), segments, scale, most_scores);
    ([out, dq, dk, dv], logsumexp.len())
}

/// Our kernel and matrix products round to bf16 nearly where libtorch's kernel does: all are about as far from fp64. In fp32 they
/// are as far as sums of the longest example's terms are, whose roundings of 2^-24 add up as a random walk does: with their root.
#[test]
fn attention_is_as_exact_as_libtorchs() {
    const LONGEST: f64 = 600.0;
    tch::set_num_threads(1);
    let kernels_run_here = cpu::kernels_run_here();
    for (lengths, heads, kv_heads, head_dim) in
        [(&[1, 2, 17, 50, 23][..], 9, 3, 64), (&[130, 64, 257], 4, 4, 32), (&[600], 2, 1, 128)]
    {
        let mut bounds = vec![0];
        bounds.extend(lengths.iter().scan(0, |end, length: &i32| {
            *end += length;
            Some(*end)
        }));
        let tokens = i64::from(bounds[lengths.len()]);
        let segments = Segments::new(&bounds, Device::Cpu);
        let random = |seed, heads| (cpu::noise(seed, &[tokens, heads, head_dim]) * 2).to_kind(Kind::BFloat16);
        let inputs = [random(1, heads), random(2, kv_heads), random(3, kv_heads), random(4, heads)];
        let scale = 1.0 / (head_dim as f64).sqrt();
        let libtorchs = |kind: Kind, most_scores| {
            let inputs = inputs.each_ref().map(|tensor| tensor.to_kind(kind));
            all_by_runs(inputs.each_ref(), &segments, scale, most_scores).0
        };
        let ours = |kind: Kind| {
            let [q, k, v, gradient] = inputs.each_ref().map(|tensor| tensor.to_kind(kind));
            let saved = attention(&q, &k, &v, &segments, scale);
            assert_eq!(matches!(saved.statistics, Statistics::Kernel(_)), cpu::fits(&[&q], cpu::HEAD_WIDTH));
            let (dq, dk, dv) = attention_backward(&gradient, &q, &k, &v, &saved, &segments, scale);
            [saved.out, dq, dk, dv]
        };
        let exact = libtorchs(Kind::Double, None);
        let distances = |all: [Tensor; 4]| {
            let distance = |(all, exact): (&Tensor, &Tensor)| cpu::distance(&all.to_kind(Kind::Double), exact);
            all.iter().zip(&exact).map(distance).collect::<Vec<f64>>()
        };
        for (kind, most) in [(Kind::BFloat16, 1e-2), (Kind::Float, LONGEST.sqrt() / f64::from(1 << 24))] {
            let kernel = distances(libtorchs(kind, None));
            // Products round probabilities after they were divided by their sum, the kernels before.
            let (ours, products) = (ours(kind), libtorchs(kind, Some(MOST_SCORES)));
            // Where there is no kernel of ours it is libtorch's that stands in for it, and nothing is told.
            let ours = kernels_run_here.then_some(("ours", ours, 1.2));
            for (name, found, factor) in ours.into_iter().chain([("products", products, 1.5)]) {
                for (place, (found, kernel)) in distances(found).into_iter().zip(&kernel).enumerate() {
                    let bound = if kind == Kind::Float { most } else { (factor * kernel).min(most) };
                    assert!(found < bound, "{lengths:?} {kind:?} {name} {place}: {found:e}, libtorch {kernel:e}");
                }
            }
        }
    }
}

#[test]
fn kernel_and_products_agree_and_examples_do_not_mix() {
    tch::set_num_threads(1);
    let bounds = [0, 5, 10, 15, 22];
    let segments = Segments::new(&bounds, Device::Cpu);
    assert_eq!(segments.runs.len(), 2, "three examples of five tokens are one run");
    let (heads, kv_heads, head_dim, scale) = (4, 2, 8, 0.3);
    let random = |seed, heads| cpu::noise(seed, &[22, heads, head_dim]).to_kind(Kind::Double);
    let inputs = [random(1, heads), random(2, kv_heads), random(3, kv_heads), random(4, heads)];
    let (kernel, parts) = all_by_runs(inputs.each_ref(), &segments, scale, None);
    assert_eq!(parts, 2);
    let agree = |a: &Tensor, b: &Tensor| assert!((a - b).abs().max().double_value(&[]) < 1e-12);
    // One example at a time, two of the short ones, all of a run.
    for (most_scores, expected_parts) in [(1, 4), (2 * heads * 25, 3), (MOST_SCORES, 2)] {
        let (products, parts) = all_by_runs(inputs.each_ref(), &segments, scale, Some(most_scores));
        assert_eq!(parts, expected_parts);
        products.iter().zip(&kernel).for_each(|(products, kernel)| agree(products, kernel));
    }
    for pair in bounds.windows(2) {
        let (start, length) = (i64::from(pair[0]), i64::from(pair[1] - pair[0]));
        let alone = inputs.each_ref().map(|tensor| tensor.narrow(0, start, length));
        let segments = Segments::new(&[0, length as i32], Device::Cpu);
        let (alone, _) = all_by_runs(alone.each_ref(), &segments, scale, Some(MOST_SCORES));
        alone.iter().zip(&kernel).for_each(|(alone, kernel)| agree(alone, &kernel.narrow(0, start, length)));
    }
}

#[test]
fn flash_attention_sums_the_gradients_of_queries_several_times_over() {
    let bytes = |tokens, examples| flash_backward_bytes([32, 128], tokens, examples, 132);
    // One example leaves four fifths of 132 multiprocessors idle with one sum; a hundred have work for all of them.
    assert_eq!(bytes(4096, 1), 5 * (4096 + 128) * 32 * 128 * 4);
    assert_eq!(bytes(4096, 100), (4096 + 128 * 100) * 32 * 128 * 4);
    // Heads are rounded up to what a block of threads takes.
    assert_eq!(flash_backward_bytes([1, 40], 1, 1, 1), (1 + 128) * 64 * 4);
    assert_eq!(flash_backward_bytes([1, 160], 1, 1, 1), (1 + 128) * 192 * 4);
}

#[test]
fn scores_are_made_where_flash_attention_does_not_do() {
    let sizes = [64, 96, 128, 192, 100, 256];
    let made = sizes.map(|size| makes_scores(Kind::BFloat16, size, Some((8, 0))));
    assert_eq!(made, [false, false, false, false, true, true]);
    let gpus = [None, Some((9, 0)), Some((8, 0)), Some((7, 5))];
    assert_eq!(gpus.map(|gpu| makes_scores(Kind::BFloat16, 64, gpu)), [false, false, false, true]);
    assert!(makes_scores(Kind::Float, 64, Some((9, 0))));
    for (kind, size, capability, what, words) in [
        (Kind::BFloat16, 128, (9, 0), "flash attention", "heads of 128"),
        (
            Kind::BFloat16,
            256,
            (9, 0),
            "matrices of scores",
            "heads of 256; flash attention takes multiples of 8 up to 192",
        ),
        (Kind::Float, 64, (9, 0), "matrices of scores", "the run in Float"),
        (Kind::BFloat16, 64, (7, 5), "matrices of scores", "compute capability 7.5"),
    ] {
        let (found, why) = describe(kind, size, Some(capability));
        assert!(found == what && why.contains(words), "{found}: {why}");
    }
    // One long example, many short ones, few short ones.
    let bytes = |longest, tokens| score_bytes(Kind::Float, 32, longest, tokens);
    assert_eq!(
        [bytes(4096, 8192), bytes(512, 1 << 20), bytes(64, 128)],
        [8 * 32 * 4096 * 4096, 8 * MOST_SCORES, 8 * 32 * 64 * 128]
    );
    assert_eq!(score_bytes(Kind::BFloat16, 32, 64, 128), 10 * 32 * 64 * 128);
}
