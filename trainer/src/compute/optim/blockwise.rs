//! AdamW's moments in 8 bits: a code for each number and a scale for each block of 256, as bitsandbytes and torchao keep them
//! (<https://arxiv.org/abs/2110.02861>).
//!
//! A code stands for a value in `[-1, 1]`, or `[0, 1]` for the second moment; values lie closer the nearer they are to 0. The
//! scale is the largest magnitude of the block. Blocks do not reach over the end of a tensor unless it is a multiple of 256.

use tch::{Device, Kind, Tensor};

use super::{BETA1, BETA2, EPS};
use crate::compute::shim::{self, cpu};

/// Numbers that share a scale.
pub const BLOCK: i64 = 256;
/// Numbers that are in fp32 at once where torch operations compute.
const CHUNK: i64 = 1 << 22;
/// Scales are at least this, so that a block of zeros can be divided by its own.
const SMALLEST_SCALE: f64 = 1e-12;
/// From numbers to codes and back. Codes ascend with their values.
#[derive(Debug)]
pub struct Codec {
    /// What each code stands for, fp32 `[256]`.
    values: Tensor,
    /// The number from which on the next code is nearer, fp32 `[256]`; none is for the last.
    thresholds: Tensor,
    /// The same as a tree, which the kernel descends: its root at 1, those for smaller numbers below node n at 2 n, for others at
    /// 2 n + 1.
    tree: Tensor,
}

/// The values of the dynamic map with 7 exponents: of each power of ten twice as many as of the one before, linearly apart.
///
/// They are what `torch.linspace` makes of them on CPUs with a fused multiply-add, and the same on all: a checkpoint's codes mean
/// the same everywhere.
fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for (exponent, power) in [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
        let intervals: u16 = if signed { 1 << exponent } else { 2 << exponent };
        let (first, last) = (0.1f32, 1.0f32);
        let step = (last - first) / f32::from(intervals);
        let bound = |index: u16| {
            if index < intervals.div_ceil(2) {
                step.mul_add(index.into(), first)
            } else {
                (-step).mul_add((intervals - index).into(), last)
            }
        };
        for index in 0..intervals {
            let mean = f32::midpoint(bound(index), bound(index + 1)) * power;
            values.push(mean);
            if signed {
                values.push(-mean);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// The smallest number that is nearer to `above` than to `below`, or as near: by torchao's arithmetic in fp32.
fn threshold(below: f32, above: f32) -> f32 {
    let is_above = |number: f32| number - below >= (above - below) * 0.5;
    let mut number = below + (above - below) * 0.5;
    while is_above(number.next_down()) {
        number = number.next_down();
    }
    while !is_above(number) {
        number = number.next_up();
    }
    number
}

/// Sorted thresholds, of which the last is not needed, in the order of a tree.
fn tree(thresholds: &[f32]) -> Vec<f32> {
    let of_node = |node: usize| {
        let (level, leaves) = (node.ilog2(), thresholds.len());
        let step = leaves >> (level + 1);
        thresholds[2 * step * (node - (1 << level)) + step - 1]
    };
    std::iter::once(0.0).chain((1..thresholds.len()).map(of_node)).collect()
}

impl Codec {
    fn new(signed: bool, device: Device) -> Self {
        let values = dynamic_map(signed);
        let mut thresholds: Vec<f32> = values.windows(2).map(|pair| threshold(pair[0], pair[1])).collect();
        thresholds.push(f32::INFINITY);
        let upload = |numbers: &[f32]| Tensor::from_slice(numbers).to_device(device);
        Self { values: upload(&values), thresholds: upload(&thresholds), tree: upload(&tree(&thresholds)) }
    }

    /// Codes and scales `[b, 1]` of whole blocks `[b, n]`.
    fn encode(&self, numbers_bn: &Tensor) -> (Tensor, Tensor) {
        let scales_b1 = numbers_bn.abs().amax([-1i64].as_slice(), true).clamp_min(SMALLEST_SCALE);
        let codes_bn = (numbers_bn / &scales_b1).bucketize(&self.thresholds, true, true).to_kind(Kind::Uint8);
        (codes_bn, scales_b1)
    }

    fn decode(&self, codes_bn: &Tensor, scales_b1: &Tensor) -> Tensor {
        self.values.index_select(0, &codes_bn.flatten(0, -1).to_kind(Kind::Int)).view_as(codes_bn) * scales_b1
    }
}

/// One moment of all trained tensors.
#[derive(Debug)]
struct Moment {
    codec: Codec,
    codes: Tensor,
    scales: Tensor,
}

/// Part of a moment.
struct Part {
    codes: Tensor,
    scales: Tensor,
}

impl Moment {
    fn new(signed: bool, numbers: i64, blocks: i64, device: Device) -> Self {
        let codes = Tensor::zeros([numbers], (Kind::Uint8, device));
        let scales = Tensor::zeros([blocks], (Kind::Float, device));
        Self { codec: Codec::new(signed, device), codes, scales }
    }

    fn part(&self, start: i64, length: i64, first_block: i64) -> Part {
        Part {
            codes: self.codes.narrow(0, start, length),
            scales: self.scales.narrow(0, first_block, num_blocks(length)),
        }
    }

    fn parts<'a>(&'a self, part: &'a Part) -> [&'a Tensor; 4] {
        [&part.codes, &part.scales, &self.codec.values, &self.codec.tree]
    }
}

/// Blocks of a range.
pub fn num_blocks(length: i64) -> i64 {
    (length + BLOCK - 1) / BLOCK
}

/// Both moments of all trained tensors.
#[derive(Debug)]
pub struct Blockwise {
    exp_avg: Moment,
    exp_avg_sq: Moment,
}

/// What a range is updated with.
#[derive(Debug)]
pub struct Rates<'a> {
    /// Learning rate over the first bias correction, and the root of the second one, fp32 `[2]` on the device.
    pub corrected: &'a Tensor,
    /// fp32 scalar on the device; where it is 1 nothing moves.
    pub found_inf: &'a Tensor,
    /// What weight decay leaves of a weight.
    pub decay: f64,
}

impl Blockwise {
    /// Zeros for so many numbers in so many blocks.
    pub fn new(numbers: i64, blocks: i64, device: Device) -> Self {
        let moment = |signed| Moment::new(signed, numbers, blocks, device);
        Self { exp_avg: moment(true), exp_avg_sq: moment(false) }
    }

    /// What a checkpoint holds.
    pub fn state(&self) -> [(&'static str, &Tensor); 4] {
        [
            ("exp_avg", &self.exp_avg.codes),
            ("exp_avg_scale", &self.exp_avg.scales),
            ("exp_avg_sq", &self.exp_avg_sq.codes),
            ("exp_avg_sq_scale", &self.exp_avg_sq.scales),
        ]
    }

    /// Updates masters from gradients, both flat; they are the numbers from `start` on, with which block `first_block` begins.
    pub fn update(
        &self,
        master: &Tensor,
        gradient: &Tensor,
        start: i64,
        first_block: i64,
        rates: &Rates,
    ) -> Result<(), shim::Error> {
        let length = master.size()[0];
        let [m, v] = [&self.exp_avg, &self.exp_avg_sq].map(|moment| moment.part(start, length, first_block));
        if master.device() == Device::Cpu {
            let moments = [self.exp_avg.parts(&m), self.exp_avg_sq.parts(&v)];
            let constants = cpu::Adamw8BitConstants { decay: rates.decay, beta1: BETA1, beta2: BETA2, eps: EPS };
            return cpu::adamw_8bit(master, gradient, moments, rates.corrected, rates.found_inf, constants);
        }
        self.update_with_operations(master, gradient, &m, &v, rates);
        Ok(())
    }

    /// What the kernel computes, in torch operations; a chunk's numbers are in fp32 at a time.
    fn update_with_operations(&self, master: &Tensor, gradient: &Tensor, m: &Part, v: &Part, rates: &Rates) {
        let length = master.size()[0];
        let whole = length - length % BLOCK;
        let chunks = (0..whole).step_by(CHUNK as usize).map(|start| (start, CHUNK.min(whole - start), BLOCK));
        let rest = (whole < length).then_some((whole, length - whole, length - whole));
        let finite = rates.found_inf.eq(0.0);
        let [step_size, root] = [0, 1].map(|index| rates.corrected.get(index));
        for (start, length, block) in chunks.chain(rest) {
            let blocks = |flat: &Tensor| flat.narrow(0, start, length).view([-1, block]);
            let scales = |part: &Part| part.scales.narrow(0, start / BLOCK, length / block).unsqueeze(1);
            let (p, g) = (blocks(master), blocks(gradient));
            let old_m = self.exp_avg.codec.decode(&blocks(&m.codes), &scales(m));
            let new_m = &old_m + (&g - &old_m) * (1.0 - BETA1);
            let old_v = self.exp_avg_sq.codec.decode(&blocks(&v.codes), &scales(v));
            let new_v = &old_v + (g.square() - &old_v) * (1.0 - BETA2);
            let new_p = &p * rates.decay - &new_m * &step_size / (new_v.sqrt() / &root + EPS);
            let put = |mut place: Tensor, value: &Tensor| place.copy_(&value.where_self(&finite, &place));
            put(p, &new_p);
            for (moment, part, numbers) in [(&self.exp_avg, m, &new_m), (&self.exp_avg_sq, v, &new_v)] {
                let (codes, new_scales) = moment.codec.encode(numbers);
                put(blocks(&part.codes), &codes);
                put(scales(part), &new_scales);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tests/golden/optimizer.py` writes them.
    #[test]
    fn codes_stand_for_the_values_of_torchao() {
        let golden = std::path::Path::new("../tests/golden/optimizer.safetensors");
        let file = crate::store::weights::MappedFile::open(golden).expect("golden values; run `make golden`");
        for (name, signed) in [("exp_avg.map", true), ("exp_avg_sq.map", false)] {
            let theirs = file.tensor(name).expect("written by the script").data.chunks_exact(4);
            let theirs: Vec<f32> = theirs.map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four"))).collect();
            assert_eq!(dynamic_map(signed), theirs, "{name}");
        }
    }

    #[test]
    fn the_tree_leads_to_the_highest_threshold_that_is_reached() {
        for signed in [true, false] {
            let codec = Codec::new(signed, Device::Cpu);
            let [values, thresholds, tree] = [&codec.values, &codec.thresholds, &codec.tree]
                .map(|table| Vec::<f32>::try_from(table).expect("a vector of fp32"));
            assert_eq!((values.len(), thresholds.len(), tree.len()), (256, 256, 256));
            assert!(values.is_sorted_by(|a, b| a < b) && thresholds.is_sorted_by(|a, b| a < b));
            for (code, threshold) in thresholds.iter().take(255).enumerate() {
                for (number, expected) in [(threshold.next_down(), code), (*threshold, code + 1)] {
                    let leaf = (0..8).fold(1, |node, _| 2 * node + usize::from(number >= tree[node]));
                    assert_eq!(leaf - 256, expected, "{signed} {number:e}");
                }
            }
        }
    }

    #[test]
    fn the_kernel_has_the_codes_of_what_is_written_out() {
        cpu::with_each_variant(|_| check_codes());
    }

    /// Gradients from large to tiny, and a last block that is short.
    fn check_codes() {
        // Two threads take some blocks each. A thread takes over the process's number at its first loop, unless it has asked before.
        tch::get_num_threads();
        tch::set_num_threads(2);
        assert_eq!(tch::get_num_threads(), 2);
        tch::manual_seed(1);
        let length = 150 * BLOCK + 7;
        let ours = Blockwise::new(length, num_blocks(length), Device::Cpu);
        let other = Blockwise::new(length, num_blocks(length), Device::Cpu);
        let master = Tensor::randn([length], (Kind::Float, Device::Cpu));
        let other_master = master.copy();
        let spread = Tensor::randn([length], (Kind::Float, Device::Cpu)) * 4.0;
        let mut reach = master.abs() + 1.0;
        for step in 1..=6 {
            let gradient = Tensor::randn([length], (Kind::Float, Device::Cpu)) * (spread.exp() * 1e-3);
            let rates = Tensor::from_slice(&[1e-2 / (1.0 - 0.9f32.powi(step)), (1.0 - 0.999f32.powi(step)).sqrt()]);
            let found_inf = Tensor::from(if step == 4 { 1f32 } else { 0f32 });
            let rates = Rates { corrected: &rates, found_inf: &found_inf, decay: 0.99 };
            ours.update(&master, &gradient, 0, 0, &rates).expect("no libtorch error");
            let [m, v] = [&other.exp_avg, &other.exp_avg_sq].map(|moment| moment.part(0, length, 0));
            other.update_with_operations(&other_master, &gradient, &m, &v, &rates);
            assert_eq!(ours.state(), other.state(), "step {step}");
            // libtorch's square root on CPUs is not always the nearest number: some units in the last place of the farthest yet.
            reach = reach.maximum(&master.abs());
            let difference = ((&master - &other_master).abs() / &reach).max().double_value(&[]);
            assert!(difference < 1e-6, "step {step}: {difference:e}");
        }
        let used: std::collections::BTreeSet<u8> =
            Vec::<u8>::try_from(&ours.exp_avg.codes).expect("a vector of bytes").into_iter().collect();
        assert!(used.len() > 128, "only {} codes are tested", used.len());
        tch::set_num_threads(1);
    }
}
