//! A decoder: embedding, layers, final norm, head; one packed row in, summed loss and gradients out.
//!
//! Everything runs without autograd; the tests hold it against autograd. Shapes as in `layer.rs`; n trained tokens.

use tch::{Device, Kind, Tensor};

use super::Spec;
use super::layer::{Around, Below, KeyValues, Layer, LayerSaved, Outputs, Pass, Recompute, scaled};
use crate::compute::attention::{self, Segments};
use crate::compute::dropout::Dropout;
use crate::compute::linear::{Adapters, InputMask};
use crate::compute::loss::{self, Scored};
use crate::compute::norm::Norm;
use crate::compute::ops::{Rope, linear};
use crate::compute::optim::BackwardPass;
use crate::compute::shim::{self, cpu, decode};
use crate::compute::weight::Weight;
use crate::data::pack::PackedBatch;
use crate::ground::random::seed64;
use crate::ground::stop::Stop;

/// A model on one device.
#[derive(Debug)]
pub struct Decoder {
    /// What it is.
    pub spec: Spec,
    pub(super) embedding: Weight,
    /// What embeddings are multiplied by, rounded to their dtype as transformers has it.
    pub(super) embedding_multiplier: f64,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    pub(super) head: Weight,
    pub(super) rope: Rope,
    pub(super) kind: Kind,
    pub(super) device: Device,
    pub(super) lora_dropout: f64,
    /// The mapped files that frozen weights point into; they live as long as the model. `None` where no weight is frozen.
    pub(super) _maps: Option<crate::store::weights::WeightFiles>,
}

/// A packed batch on the model's device.
#[derive(Debug)]
pub struct DeviceBatch {
    tokens_t: Tensor,
    positions_t: Tensor,
    label_positions_n: Tensor,
    labels_n: Tensor,
    segments: Segments,
    /// Example index and its first token, for randomness keyed by example.
    examples: Vec<(u64, i64, i64)>,
}

impl DeviceBatch {
    /// Uploads a packed batch.
    pub fn new(batch: &PackedBatch, device: Device) -> Self {
        let upload = |values: &[i64]| shim::upload(values, device);
        let bounds = batch.cu_seqlens.windows(2).map(|pair| (i64::from(pair[0]), i64::from(pair[1] - pair[0])));
        Self {
            tokens_t: upload(&batch.tokens),
            positions_t: upload(&batch.positions),
            label_positions_n: upload(&batch.label_positions),
            labels_n: upload(&batch.labels),
            segments: Segments::new(&batch.cu_seqlens, device),
            examples: batch
                .examples
                .iter()
                .zip(bounds)
                .map(|(&example, (start, length))| (example as u64, start, length))
                .collect(),
        }
    }
}

/// The randomness of one training step: LoRA dropout and NEFTune, keyed by example so that packing cannot change it.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    /// The run's seed.
    pub seed: i64,
    /// Completed steps.
    pub step: i64,
    /// NEFTune's alpha; `None`: off.
    pub neftune_alpha: Option<f64>,
}

/// No dropout: evaluation and generation.
pub(super) struct NoDropout;

impl InputMask for NoDropout {
    fn mask(&self, _site: u64, _tokens: i64, _x: &Tensor) -> Option<Tensor> {
        None
    }
}

impl Decoder {
    /// The dtype of activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What a layer's scores are multiplied by.
    pub(crate) fn scale(&self, layer: usize) -> f64 {
        self.spec.layers[layer].attention.scale
    }

    /// Where the model is.
    pub fn device(&self) -> Device {
        self.device
    }

    fn embed(&self, tokens_t: &Tensor) -> Tensor {
        scaled(self.embedding.value.index_select(0, tokens_t), self.embedding_multiplier)
    }

    /// What the head takes of the last layer's output.
    fn head_input(&self, x_rh: &Tensor) -> Tensor {
        scaled(self.norm.forward(x_rh), self.spec.logits_multiplier)
    }

    /// NEFTune: uniform noise of magnitude `alpha / sqrt(length * hidden_size)` on each example's embeddings.
    fn add_neftune(&self, x_th: &Tensor, batch: &DeviceBatch, noise: Noise) {
        let Some(alpha) = noise.neftune_alpha else { return };
        for &(example, start, length) in &batch.examples {
            let magnitude = alpha / ((length * self.spec.hidden_size) as f64).sqrt();
            tch::manual_seed(seed64(noise.seed, "neft", &[noise.step as u64, example]) as i64);
            let mut rows = x_th.narrow(0, start, length);
            let _ = rows.g_add_(&rows.empty_like().uniform_(-magnitude, magnitude));
        }
    }

    fn dropout(&self, batch: &DeviceBatch, noise: Noise) -> Box<dyn InputMask> {
        if self.lora_dropout == 0.0 {
            return Box::new(NoDropout);
        }
        let examples = batch.examples.iter().map(|&(example, _, length)| (example, length));
        Box::new(Dropout::new(self.lora_dropout, noise.seed, noise.step, examples, &batch.positions_t))
    }

    /// `last`: what is wanted of the last layer.
    fn around<'a>(&self, layer: usize, last: Outputs<'a>) -> Around<'a> {
        // The embedding, norms and earlier layers are trained together or not at all; adapters exist from layer 0 on.
        let below = if layer > 0 || self.embedding.gradient.is_some() { Below::Trained } else { Below::Frozen };
        Around { outputs: if layer + 1 == self.layers.len() { last } else { Outputs::All }, below }
    }

    /// `scale * sum(NLL)` over the batch's trained tokens (a scalar on the device); adds the gradients of everything that
    /// is trained. With `scale = 1 / N`, N the trained tokens of the whole step, the sum over its batches is the mean.
    /// `None` if a stop was asked for meanwhile: the gradients are then worth nothing. `backward` hears of each layer.
    pub fn forward_backward(
        &self,
        batch: &DeviceBatch,
        noise: Noise,
        scale: f64,
        recompute: Recompute,
        stop: &Stop,
        backward: &mut dyn BackwardPass,
    ) -> Result<Option<Tensor>, shim::Error> {
        let dropout = self.dropout(batch, noise);
        let rope = self.rope.at(&batch.positions_t);
        let pass = Pass { rope: &rope, adapters: Adapters::On, dropout: dropout.as_ref(), recompute };
        let segments = &batch.segments;
        let last = Outputs::Rows(&batch.label_positions_n);

        let mut x_th = self.embed(&batch.tokens_t);
        self.add_neftune(&x_th, batch, noise);
        let mut saved: Vec<(Tensor, Option<LayerSaved>)> = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            if stop.requested() {
                return Ok(None);
            }
            let (output_th, kept) = layer.forward(&x_th, segments, &pass, self.around(index, last).outputs);
            let kept = (recompute != Recompute::Layer).then_some(kept);
            saved.push((std::mem::replace(&mut x_th, output_th), kept));
        }

        let x_nh = x_th;
        let normed_nh = self.head_input(&x_nh);
        let (loss, d_normed_nh) = loss::cross_entropy(&normed_nh, &batch.labels_n, &self.head, scale);
        let mut gradient_th = self.norm.backward(&scaled(d_normed_nh, self.spec.logits_multiplier), &x_nh);
        drop((x_nh, normed_nh));

        backward.begin(&loss);
        for (index, layer) in self.layers.iter().enumerate().rev() {
            if stop.requested() && !backward.must_be_finished() {
                return Ok(None);
            }
            backward.begin_layer(index);
            let (input_th, kept) = saved.pop().expect("one entry per layer");
            let around = self.around(index, last);
            let kept = kept.unwrap_or_else(|| layer.forward(&input_th, segments, &pass, around.outputs).1);
            let input_gradient = layer.backward(gradient_th, &input_th, kept, segments, &pass, around);
            backward.end_layer(index)?;
            match input_gradient {
                Some(input_gradient_th) => gradient_th = input_gradient_th,
                None => return Ok(Some(loss)),
            }
        }
        if let Some(mut gradient) = self.embedding.gradient() {
            let mut source = scaled(gradient_th, self.embedding_multiplier).to_kind(gradient.kind());
            if let Some(pad) = self.spec.pad_token_id {
                let _ = source.masked_fill_(&batch.tokens_t.eq(pad).unsqueeze(1), 0.0);
            }
            let _ = gradient.index_add_(0, &batch.tokens_t, &source);
        }
        Ok(Some(loss))
    }

    /// Final hidden states `[r, h]` before the last norm, those of `outputs` of `tokens_t` at `positions_t`, without gradients.
    /// `attend(layer, q, key_values)` gives the attention's output `[t, n, d]` from q `[t, n, d]`: over a packed batch, or
    /// over a cache. `None` if a stop was asked for meanwhile.
    pub(crate) fn infer(
        &self,
        tokens_t: &Tensor,
        positions_t: &Tensor,
        outputs: Outputs,
        adapters: Adapters,
        stop: &Stop,
        attend: &mut dyn FnMut(usize, &Tensor, KeyValues) -> Tensor,
    ) -> Option<Tensor> {
        let rope = self.rope.at(positions_t);
        let pass = Pass { rope: &rope, adapters, dropout: &NoDropout, recompute: Recompute::Layer };
        let mut x_th = self.embed(tokens_t);
        for (index, layer) in self.layers.iter().enumerate() {
            if stop.requested() {
                return None;
            }
            let (q_tnd, key_values, _) = layer.project(&x_th, &pass);
            let attended_tnd = attend(index, &q_tnd, key_values);
            x_th = layer.finish(&x_th, &attended_tnd, &pass, self.around(index, outputs).outputs).0;
        }
        Some(x_th)
    }

    fn hidden(&self, batch: &DeviceBatch, outputs: Outputs, adapters: Adapters, stop: &Stop) -> Option<Tensor> {
        let attend = &mut |layer: usize, q_tnd: &Tensor, KeyValues { keys, values }: KeyValues| {
            attention::attention(q_tnd, &keys, &values, &batch.segments, self.scale(layer)).out
        };
        self.infer(&batch.tokens_t, &batch.positions_t, outputs, adapters, stop, attend)
    }

    /// Loss and hits of each of the batch's trained tokens; `None` if a stop was asked for meanwhile.
    pub fn score(&self, batch: &DeviceBatch, adapters: Adapters, stop: &Stop) -> Option<Scored> {
        let x_nh = self.hidden(batch, Outputs::Rows(&batch.label_positions_n), adapters, stop)?;
        Some(loss::score(&self.head_input(&x_nh), &batch.labels_n, &self.head))
    }

    /// Logits `[rows, v]` of some rows of final hidden states.
    fn logits(&self, hidden_rh: &Tensor) -> Tensor {
        linear(&self.head_input(hidden_rh), &self.head.value)
    }

    /// The likeliest next token of some rows of final hidden states, int64 `[rows]`.
    pub(crate) fn likeliest(&self, hidden_rh: &Tensor) -> Tensor {
        let logits_rv = self.logits(hidden_rh);
        if cpu::fits(&[&logits_rv], cpu::ROW_WIDTH) {
            return decode::argmax(&logits_rv);
        }
        logits_rv.argmax(-1, false)
    }

    /// Logits `[t, v]` of every position of a batch; `None` if a stop was asked for meanwhile.
    pub fn all_logits(&self, batch: &DeviceBatch, adapters: Adapters, stop: &Stop) -> Option<Tensor> {
        let logits_tv = self.logits(&self.hidden(batch, Outputs::All, adapters, stop)?);
        Some(logits_tv.to_kind(crate::compute::ops::accumulate_kind(self.kind)))
    }

    /// Positions that the rotary tables hold.
    pub fn max_positions(&self) -> i64 {
        self.rope.max_positions()
    }
}
