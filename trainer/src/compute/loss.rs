//! Cross-entropy summed over trained tokens, with the language-model head applied to those tokens only, in chunks:
//! the logits of a whole row never exist. The backward pass of a chunk is taken while its logits are there.
//!
//! Shapes: n trained tokens, h hidden size, v vocabulary.

use tch::Tensor;

use crate::compute::ops::{accumulate_kind, add_product, linear};
use crate::compute::shim::{cpu, decode, fused};
use crate::compute::weight::Weight;

/// Bytes of one chunk's logits in the accumulation dtype. Every chunk reads the whole head: an accelerator needs a thousand rows
/// before its products are bound by arithmetic.
const CHUNK_BYTES_CPU: i64 = 32 << 20;
const CHUNK_BYTES_GPU: i64 = 512 << 20;
/// Rows of logits that exist at once.
pub fn chunk_rows(vocabulary: i64, accelerator: bool) -> i64 {
    let bytes = if accelerator { CHUNK_BYTES_GPU } else { CHUNK_BYTES_CPU };
    (bytes / (4 * vocabulary)).clamp(16, 4096)
}

/// Loss and hits of each trained token, on the device.
#[derive(Debug)]
pub struct Scored {
    /// Negative log-likelihoods in nats, `[n]` in the accumulation dtype.
    pub losses_n: Tensor,
    /// Whether the most likely prediction is the label, bool `[n]`.
    pub correct_n: Tensor,
}

fn chunks(hidden_nh: &Tensor, head_vh: &Weight) -> impl Iterator<Item = (i64, i64)> + use<> {
    let (rows, chunk) = (hidden_nh.size()[0], chunk_rows(head_vh.value.size()[0], hidden_nh.device().is_cuda()));
    (0..rows).step_by(chunk as usize).map(move |start| (start, chunk.min(rows - start)))
}

/// `scale * sum(NLL)` over all rows, and its gradient with respect to `hidden` `[n, h]`; adds the head's gradient where it
/// is trained. With `scale = 1 / N`, N the trained tokens of the whole step, the sum over micro-batches is the mean.
pub fn cross_entropy(hidden_nh: &Tensor, labels_n: &Tensor, head_vh: &Weight, scale: f64) -> (Tensor, Tensor) {
    let kind = accumulate_kind(hidden_nh.kind());
    let mut loss = Tensor::zeros([], (kind, hidden_nh.device()));
    let gradient_nh = hidden_nh.empty_like();
    for (start, rows) in chunks(hidden_nh, head_vh) {
        let hidden_ch = hidden_nh.narrow(0, start, rows);
        let labels_c = labels_n.narrow(0, start, rows);
        let logits_cv = linear(&hidden_ch, &head_vh.value);
        if let Some(losses_c) = fused::cross_entropy(&logits_cv, &labels_c, scale) {
            loss += losses_c.sum(kind) * scale;
            add_gradients(&logits_cv, &hidden_ch, head_vh, &gradient_nh.narrow(0, start, rows));
            continue;
        }
        let labels_c1 = labels_c.unsqueeze(1);
        let mut logits_cv = logits_cv.to_kind(kind);
        let logsumexp_c1 = logits_cv.logsumexp([-1i64].as_slice(), true);
        loss += (&logsumexp_c1 - logits_cv.gather(1, &labels_c1, false)).sum(kind) * scale;
        // d(scale * NLL) / d(logits) = scale * (softmax - onehot), in place.
        let _ = logits_cv.g_sub_(&logsumexp_c1).exp_();
        let minus_one_c1 = Tensor::full([rows, 1], -1.0, (kind, hidden_nh.device()));
        let _ = logits_cv.scatter_add_(1, &labels_c1, &minus_one_c1).g_mul_scalar_(scale);
        let d_logits_cv = logits_cv.to_kind(hidden_nh.kind());
        add_gradients(&d_logits_cv, &hidden_ch, head_vh, &gradient_nh.narrow(0, start, rows));
    }
    (loss, gradient_nh)
}

/// From the gradient of a chunk's logits that of its hidden states, which is written, and the head's, which is added to.
fn add_gradients(d_logits_cv: &Tensor, hidden_ch: &Tensor, head_vh: &Weight, d_hidden_ch: &Tensor) {
    if let Some(gradient_vh) = head_vh.gradient() {
        add_product(&gradient_vh, &d_logits_cv.tr(), hidden_ch);
    }
    d_hidden_ch.shallow_clone().copy_(&d_logits_cv.matmul(&head_vh.value));
}

/// Loss and hits of at least one trained token, without gradients.
pub fn score(hidden_nh: &Tensor, labels_n: &Tensor, head_vh: &Weight) -> Scored {
    let kind = accumulate_kind(hidden_nh.kind());
    let (mut losses, mut correct) = (Vec::new(), Vec::new());
    for (start, rows) in chunks(hidden_nh, head_vh) {
        let labels_c = labels_n.narrow(0, start, rows);
        let logits_cv = linear(&hidden_nh.narrow(0, start, rows), &head_vh.value);
        if cpu::fits(&[&logits_cv], cpu::ROW_WIDTH) {
            let (losses_c, correct_c) = decode::score(&logits_cv, &labels_c);
            losses.push(losses_c);
            correct.push(correct_c);
            continue;
        }
        let logits_cv = logits_cv.to_kind(kind);
        let label_logits_c1 = logits_cv.gather(1, &labels_c.unsqueeze(1), false);
        let loss_c1 = logits_cv.logsumexp([-1i64].as_slice(), true) - label_logits_c1;
        losses.push(loss_c1.squeeze_dim(1));
        correct.push(logits_cv.argmax(-1, false).eq_tensor(&labels_c));
    }
    Scored { losses_n: Tensor::cat(&losses, 0), correct_n: Tensor::cat(&correct, 0) }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::compute::optim::{OptimizerConfig, ParameterInit, Parameters};

    #[test]
    fn the_fused_loss_is_the_one_that_is_written_out() {
        tch::set_num_threads(1);
        if !cpu::kernels_run_here() {
            return;
        }
        let hidden = cpu::noise(1, &[19, 32]).to_kind(Kind::BFloat16);
        let weight = (cpu::noise(2, &[96, 32]) / 2).to_kind(Kind::BFloat16);
        let labels = (Tensor::arange(19, (Kind::Int64, Device::Cpu)) * 37).remainder(96);
        let all = |kind: Kind| {
            let init = ParameterInit { name: "head".to_owned(), value: weight.shallow_clone(), group: 0 };
            let parameters = Parameters::new(vec![init], kind, Device::Cpu, OptimizerConfig::default());
            let slot = &parameters.slots()[0];
            let head = Weight { value: parameters.working(slot), gradient: Some(parameters.gradient(slot)) };
            let (loss, gradient) = cross_entropy(&hidden.to_kind(kind), &labels, &head, 1.0 / 19.0);
            [loss, gradient, head.gradient().expect("it is trained")].map(|tensor| tensor.to_kind(Kind::Double))
        };
        for (kind, most) in [(Kind::BFloat16, 1e-2), (Kind::Float, 1e-6)] {
            for (place, (ours, exact)) in all(kind).iter().zip(&all(Kind::Double)).enumerate() {
                let distance = cpu::distance(ours, exact);
                assert!(distance < most, "{kind:?} {place}: {distance:e}");
            }
        }
    }

    #[test]
    fn the_fused_score_is_the_one_that_is_written_out() {
        tch::set_num_threads(1);
        if !cpu::kernels_run_here() {
            return;
        }
        // Whole numbers: products in bf16 are exact, and the largest logit of a row is often there twice.
        let small = |seed, shape: &[i64]| cpu::noise(seed, shape).round().to_kind(Kind::BFloat16);
        let (hidden, weight) = (small(3, &[400, 32]), small(4, &[96, 32]));
        let labels = hidden.matmul(&weight.tr()).to_kind(Kind::Float).argmax(-1, false);
        // Half of the labels are the largest.
        let labels = labels.where_self(&labels.remainder(2).eq(0), &Tensor::zeros_like(&labels));
        let score = |kind: Kind| score(&hidden.to_kind(kind), &labels, &Weight::frozen(weight.to_kind(kind)));
        let exact = score(Kind::Double);
        let [ours, _] = [Kind::BFloat16, Kind::Float].map(|kind| {
            let ours = score(kind);
            let distance = cpu::distance(&ours.losses_n, &exact.losses_n);
            assert!(distance < 1e-6, "{kind:?} {distance:e}");
            assert_eq!(ours.correct_n, exact.correct_n, "{kind:?}");
            ours
        });
        let hits = ours.correct_n.to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]);
        assert!((100..300).contains(&hits), "{hits}");
    }
}
