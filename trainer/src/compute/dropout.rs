//! Dropout of what goes into adapters. A mask is a function of its coordinates, and there is no generator whose state would have
//! to be kept: it is the same however examples are packed, in each pass that asks for it, and on every device.
//!
//! A column is dropped where its random word, of 32 bits, is below `probability * 2^32`. Words are those of Philox4x32-10
//! (`cpp/philox.h`): the key is of seed, step and example, and the counter (column / 4, position in the example, site, 0) gives
//! the words of four columns. Shapes: t tokens of a batch, i columns, g groups of four of them.

use tch::{Kind, Tensor};

use crate::compute::linear::InputMask;
use crate::compute::shim::{self, DropoutMask, fused};
use crate::ground::random::seed64;

/// The masks of one batch in one step.
#[derive(Debug)]
pub struct Dropout {
    probability: f64,
    keys_t: Tensor,
    positions_t: Tensor,
}

impl Dropout {
    /// Of `examples`, an id and a number of tokens for each in the batch's order; `positions_t` is that of each token in its
    /// example, int64. `probability` is below 1.
    pub fn new(
        probability: f64,
        seed: i64,
        step: i64,
        examples: impl IntoIterator<Item = (u64, i64)>,
        positions_t: &Tensor,
    ) -> Self {
        let key = |example| seed64(seed, "drop", &[step as u64, example]) as i64;
        let keys: Vec<i64> =
            examples.into_iter().flat_map(|(id, length)| std::iter::repeat_n(key(id), length as usize)).collect();
        let keys_t = shim::upload(&keys, positions_t.device());
        Self { probability, keys_t, positions_t: positions_t.shallow_clone() }
    }
}

impl InputMask for Dropout {
    fn mask(&self, site: u64, tokens: i64, x: &Tensor) -> Option<Tensor> {
        assert_eq!(self.keys_t.size(), [tokens], "tokens of the batch");
        // Rounded here, once for all devices.
        let kept = Tensor::from(1.0 / (1.0 - self.probability)).to_kind(x.kind()).double_value(&[]);
        let mask = DropoutMask {
            keys: &self.keys_t,
            positions: &self.positions_t,
            columns: x.size()[1],
            kind: x.kind(),
            site: u32::try_from(site).expect("a model has fewer linears"),
            // The conversion ends at the largest word.
            threshold: (self.probability * 2f64.powi(32)).round() as u32,
            kept,
        };
        Some(fused::dropout(&mask).unwrap_or_else(|| written_out(&mask)))
    }
}

/// In torch operations, on any device and in any dtype.
fn written_out(mask: &DropoutMask) -> Tensor {
    let integers = (Kind::Int64, mask.keys.device());
    let groups_1g = Tensor::arange((mask.columns + 3) / 4, integers).unsqueeze(0);
    let [keys_t1, positions_t1] = [mask.keys, mask.positions].map(|tensor| tensor.unsqueeze(1));
    let constant = |value: u32| Tensor::full([1, 1], i64::from(value), integers);
    let key = [low_word(&keys_t1), high_word(&keys_t1)];
    let words_tg = philox([groups_1g, low_word(&positions_t1), constant(mask.site), constant(0)], key);
    let words_ti = Tensor::stack(&words_tg, -1).flatten(1, 2).narrow(1, 0, mask.columns);
    words_ti.ge(i64::from(mask.threshold)).to_kind(mask.kind) * mask.kept
}

fn low_word(integers: &Tensor) -> Tensor {
    integers.bitwise_and(0xFFFF_FFFFi64)
}

/// The shift repeats the sign.
fn high_word(integers: &Tensor) -> Tensor {
    low_word(&integers.bitwise_right_shift_tensor_scalar(32))
}

/// Philox4x32-10: four words for each counter and key. Words are int64 below 2^32, and shapes broadcast; products are those of
/// 64 bits without a sign, bit for bit.
fn philox([mut a, mut b, mut c, mut d]: [Tensor; 4], [mut low, mut high]: [Tensor; 2]) -> [Tensor; 4] {
    for _ in 0..10 {
        let (first, second) = (a * 0xD251_1F53i64, c * 0xCD9E_8D57i64);
        a = high_word(&second).bitwise_xor_tensor(&b).bitwise_xor_tensor(&low);
        c = high_word(&first).bitwise_xor_tensor(&d).bitwise_xor_tensor(&high);
        (b, d) = (low_word(&second), low_word(&first));
        (low, high) = (low_word(&(low + 0x9E37_79B9i64)), low_word(&(high + 0xBB67_AE85i64)));
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests;
