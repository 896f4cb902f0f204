//! Cross-entropy summed over trained tokens, with the language-model head applied to those tokens only, in chunks:
//! the logits of a whole row never exist. The backward pass of a chunk is taken while its logits are there.
//!
//! Shapes: n trained tokens, h hidden size, v vocabulary.

use tch::Tensor;

use crate::ops::accumulate_kind;

/// Bytes of one chunk's logits in the accumulation dtype.
const CHUNK_BYTES: i64 = 32 << 20;

/// Rows of logits that exist at once.
pub fn chunk_rows(vocabulary: i64) -> i64 {
    (CHUNK_BYTES / (4 * vocabulary)).clamp(16, 4096)
}

/// The output projection.
#[derive(Debug)]
pub struct Head {
    /// `[v, h]`
    pub weight: Tensor,
    /// fp32 `[v, h]` that the backward pass adds to; `None` where the head is frozen.
    pub gradient: Option<Tensor>,
}

/// Loss and hits of each trained token, on the device.
#[derive(Debug)]
pub struct Scored {
    /// Negative log-likelihoods in nats, `[n]` in the accumulation dtype.
    pub losses_n: Tensor,
    /// Whether the most likely prediction is the label, bool `[n]`.
    pub correct_n: Tensor,
}

fn chunks(rows: i64, chunk: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(chunk as usize).map(move |start| (start, chunk.min(rows - start)))
}

/// `scale * sum(NLL)` over all rows, and its gradient with respect to `hidden` `[n, h]`; adds the head's gradient where it
/// is trained. With `scale = 1 / N`, N the trained tokens of the whole step, the sum over micro-batches is the mean.
pub fn cross_entropy(hidden_nh: &Tensor, labels_n: &Tensor, head: &Head, scale: f64) -> (Tensor, Tensor) {
    let kind = accumulate_kind(hidden_nh.kind());
    let mut loss = Tensor::zeros([], (kind, hidden_nh.device()));
    let gradient_nh = hidden_nh.empty_like();
    for (start, rows) in chunks(hidden_nh.size()[0], chunk_rows(head.weight.size()[0])) {
        let hidden_ch = hidden_nh.narrow(0, start, rows);
        let labels_c1 = labels_n.narrow(0, start, rows).unsqueeze(1);
        let mut logits_cv = hidden_ch.matmul(&head.weight.tr()).to_kind(kind);
        let logsumexp_c1 = logits_cv.logsumexp([-1i64].as_slice(), true);
        loss += (&logsumexp_c1 - logits_cv.gather(1, &labels_c1, false)).sum(kind) * scale;
        // d(scale * NLL) / d(logits) = scale * (softmax - onehot), in place.
        let _ = logits_cv.g_sub_(&logsumexp_c1).exp_();
        let minus_one_c1 = Tensor::full([rows, 1], -1.0, (kind, hidden_nh.device()));
        let _ = logits_cv.scatter_add_(1, &labels_c1, &minus_one_c1).g_mul_scalar_(scale);
        let d_logits_cv = logits_cv.to_kind(hidden_nh.kind());
        if let Some(gradient) = &head.gradient {
            add_product(gradient, &d_logits_cv.tr(), &hidden_ch);
        }
        gradient_nh.narrow(0, start, rows).copy_(&d_logits_cv.matmul(&head.weight));
    }
    (loss, gradient_nh)
}

/// Loss and hits of at least one trained token, without gradients.
pub fn score(hidden_nh: &Tensor, labels_n: &Tensor, head: &Head) -> Scored {
    let kind = accumulate_kind(hidden_nh.kind());
    let (mut losses, mut correct) = (Vec::new(), Vec::new());
    for (start, rows) in chunks(hidden_nh.size()[0], chunk_rows(head.weight.size()[0])) {
        let labels_c = labels_n.narrow(0, start, rows);
        let logits_cv = hidden_nh.narrow(0, start, rows).matmul(&head.weight.tr()).to_kind(kind);
        let label_logits_c1 = logits_cv.gather(1, &labels_c.unsqueeze(1), false);
        let loss_c1 = logits_cv.logsumexp([-1i64].as_slice(), true) - label_logits_c1;
        losses.push(loss_c1.squeeze_dim(1));
        correct.push(logits_cv.argmax(-1, false).eq_tensor(&labels_c));
    }
    Scored { losses_n: Tensor::cat(&losses, 0), correct_n: Tensor::cat(&correct, 0) }
}

/// `target += a @ b` where the target may be fp32 and the factors bf16.
pub fn add_product(target: &Tensor, a: &Tensor, b: &Tensor) {
    let mut target = target.shallow_clone();
    if target.kind() == a.kind() {
        let _ = target.addmm_(a, b);
    } else {
        let _ = target.g_add_(&a.matmul(b));
    }
}
