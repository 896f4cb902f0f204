use super::*;

const LAYERS: i64 = 2;
const SLOTS: usize = 6;
const COLUMNS: i64 = 40;

/// Head counts and head size.
#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: i64,
    kv_heads: i64,
    head_size: i64,
}

/// How a cache lies in memory, and how much of it is attended to at once.
#[derive(Clone, Copy, Debug)]
struct Manner {
    layout: Layout,
    most_scores: i64,
}

/// A cache, and beside it all keys and values that it should hold, by layer and slot, `[tokens, k, d]`, the prefix's first.
struct Checked<'a> {
    cache: Cache<'a>,
    shape: Shape,
    manner: Manner,
    kind: Kind,
    held: Vec<Vec<[Tensor; 2]>>,
    /// Tensors of random numbers so far.
    drawn: i64,
}

impl<'a> Checked<'a> {
    fn new(shape: Shape, manner: Manner, kind: Kind, slots: usize, columns: i64, prefix: Option<&'a Self>) -> Self {
        let options = (kind, Device::Cpu);
        let sizes = [LAYERS, shape.heads, shape.kv_heads, shape.head_size];
        let mut cache = Cache::empty(sizes, options, manner.layout, slots, columns, prefix.map(|prefix| &prefix.cache));
        cache.most_scores = manner.most_scores;
        let nothing = || [(); 2].map(|()| Tensor::empty([0, shape.kv_heads, shape.head_size], options));
        let begin = |layer: usize| match prefix {
            Some(prefix) => prefix.held[layer][0].each_ref().map(Tensor::shallow_clone),
            None => nothing(),
        };
        let held = (0..LAYERS as usize).map(|layer| (0..slots).map(|_| begin(layer)).collect()).collect();
        Self { cache, shape, manner, kind, held, drawn: 0 }
    }

    fn clear(&mut self, slot: usize, prefix: Option<&'a Self>) {
        let empty = Self::new(self.shape, self.manner, self.kind, 1, 1, prefix);
        for (layer, mut held) in empty.held.into_iter().enumerate() {
            self.held[layer][slot] = held.remove(0);
        }
        self.cache.clear(slot);
    }

    /// Appends random tokens, and holds what the new ones attend to against the exact attention: as exact as libtorch's.
    fn pass(&mut self, new: &[NewLength]) {
        let Shape { heads, kv_heads, head_size } = self.shape;
        let scale = 1.0 / (head_size as f64).sqrt();
        let most = match self.kind {
            Kind::Double => 1e-12,
            Kind::Float => 1e-6,
            _ => 1e-2,
        };
        let tokens = new.iter().map(|&(_, appended)| appended).sum::<i64>();
        let mut random = |heads: i64| {
            self.drawn += 1;
            let values = cpu::noise(self.drawn, &[tokens, heads, head_size]) * 2;
            values.to_kind(Kind::BFloat16).to_kind(self.kind)
        };
        let rows = self.cache.rows(new, Device::Cpu);
        for (layer, held) in self.held.iter_mut().enumerate() {
            let (q, new_kv) = (random(heads), KeyValues { keys: random(kv_heads), values: random(kv_heads) });
            let ours = self.cache.attend(layer, &rows, &q, &new_kv, scale);
            let (mut exact, mut libtorchs, mut first) = (Vec::new(), Vec::new(), 0);
            for &(slot, appended) in new {
                let of_row = |x: &Tensor| x.narrow(0, first, appended);
                let [keys, values] = &held[slot];
                held[slot] = [(keys, &new_kv.keys), (values, &new_kv.values)]
                    .map(|(held, new)| Tensor::cat(&[held.shallow_clone(), of_row(new)], 0));
                let in_kind = |kind: Kind| {
                    let [keys, values] = held[slot].each_ref().map(|held| held.to_kind(kind));
                    attention(&of_row(&q).to_kind(kind), &keys, &values, scale)
                };
                let (row_exact, row_ours) = (in_kind(Kind::Double), of_row(&ours));
                let distance = cpu::distance(&row_ours, &row_exact);
                let (shape, manner, kind) = (self.shape, self.manner, self.kind);
                assert!(distance < most, "{shape:?} {manner:?} {kind:?} {new:?} slot {slot}: {distance:e}");
                libtorchs.push(in_kind(self.kind));
                exact.push(row_exact);
                first += appended;
            }
            let exact = Tensor::cat(&exact, 0);
            let [ours, theirs] = [&ours, &Tensor::cat(&libtorchs, 0)].map(|x| cpu::distance(x, &exact));
            let most = if self.kind == Kind::BFloat16 { 1.2 * theirs } else { most };
            let (shape, manner, kind) = (self.shape, self.manner, self.kind);
            assert!(ours <= most, "{shape:?} {manner:?} {kind:?} {new:?}: {ours:e}, libtorch {theirs:e}");
        }
        self.cache.grow(new);
    }
}

/// Causal attention of a sequence's last tokens, q `[t, n, d]`, to all of it, keys and values `[all, k, d]`.
fn attention(q: &Tensor, keys: &Tensor, values: &Tensor, scale: f64) -> Tensor {
    let (heads, new, all) = (q.size()[1], q.size()[0], keys.size()[0]);
    let of_heads = |x: &Tensor| x.repeat_interleave_self_int(heads / x.size()[1], 1, None).transpose(0, 1).unsqueeze(0);
    let mask = Tensor::ones([new, all], (Kind::Bool, Device::Cpu)).tril(all - new);
    let [q, keys, values] = [q, keys, values].map(of_heads);
    let out = Tensor::scaled_dot_product_attention(&q, &keys, &values, Some(&mask), 0.0, false, scale, false);
    out.squeeze_dim(0).transpose(0, 1)
}

fn check(shape: Shape, manner: Manner, kind: Kind, prefix_length: i64) {
    let mut before = Checked::new(shape, manner, kind, 1, prefix_length, None);
    if prefix_length > 0 {
        before.pass(&[(0, prefix_length)]);
    }
    let prefix = (prefix_length > 0).then_some(&before);
    let mut checked = Checked::new(shape, manner, kind, SLOTS, COLUMNS, prefix);
    checked.pass(&[(2, 17), (0, 1), (1, 5)]);
    checked.pass(&[(0, 1), (1, 1), (2, 1)]);
    checked.pass(&[(3, 33), (1, 1), (0, 2), (2, 1)]);
    // What a slot held before is seen no more.
    checked.clear(3, prefix);
    checked.pass(&[(3, 5), (1, 1), (2, 1)]);
    // Slots in no order, with some between them that wait, and with many.
    checked.pass(&[(5, 3), (4, 3)]);
    checked.pass(&[(5, 1), (0, 1), (3, 1), (2, 1)]);
    checked.pass(&[(5, 1), (0, 1)]);
    checked.pass(&[(4, 7), (1, 7), (5, 1)]);
    // To the last column, and no further.
    checked.pass(&[(0, COLUMNS - 6), (3, 1)]);
    let full = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| checked.pass(&[(3, 1), (0, 1)])));
    let message = *full.expect_err("it is full").downcast::<String>().expect("a message");
    assert_eq!(message, "slot 0 holds 40 of 40 tokens, 1 more do not fit");
    checked.pass(&[(1, 1), (3, 1), (2, 1)]);
}

#[test]
fn attention_to_the_cache_is_as_exact_as_to_all_keys_and_values() {
    tch::set_num_threads(1);
    let plain = |most_scores| Manner { layout: Layout::Plain, most_scores };
    let kernel = Manner { layout: Layout::Kernel, most_scores: plain::MOST_SCORES };
    for (heads, kv_heads, head_size) in [(6, 2, 64), (4, 4, 32), (8, 1, 128), (6, 2, 16)] {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let has_kernel = Layout::of(kind, head_size, Device::Cpu) == Layout::Kernel;
            // All at once, some rows or some tokens of one, and a token at a time.
            let manners = [plain::MOST_SCORES, 1000, 1].map(plain).into_iter().chain(has_kernel.then_some(kernel));
            for manner in manners {
                for prefix_length in [0, 1, 16, 37] {
                    check(Shape { heads, kv_heads, head_size }, manner, kind, prefix_length);
                }
            }
        }
    }
}

#[test]
fn the_kernel_is_for_its_dtypes_and_heads_on_a_cpu() {
    let plain = |kind, head_size| is_plain(kind, head_size, Device::Cpu);
    assert!(plain(Kind::Double, 64) && plain(Kind::Float, 16));
    assert!(is_plain(Kind::BFloat16, 64, Device::Cuda(0)));
    if cpu::kernels_run_here() {
        assert!(!plain(Kind::BFloat16, 64) && !plain(Kind::Float, 32));
    }
}

#[test]
fn slots_are_read_where_they_lie_unless_they_are_few_and_scattered() {
    let sizes = [1, 6, 2, 16];
    let options = (Kind::Float, Device::Cpu);
    let cache = Cache::empty(sizes, options, Layout::Plain, SLOTS, COLUMNS, None);
    // Rows of each group that are looked at where they lie; `None` where they are copied.
    let in_place = |new: &[NewLength]| plain::Rows::new(&cache, new, Device::Cpu).in_place();
    assert_eq!(in_place(&[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]), [Some(6)]);
    assert_eq!(in_place(&[(3, 1), (1, 1), (2, 1)]), [Some(3)]);
    assert_eq!(in_place(&[(5, 1), (1, 1), (2, 1)]), [Some(5)]);
    assert_eq!(in_place(&[(5, 1), (0, 1)]), [None]);
    // Queries of many tokens that are dropped cost more than a copy.
    assert_eq!(in_place(&[(5, 9), (3, 9), (1, 1)]), [Some(1), None]);
}
