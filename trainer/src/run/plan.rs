//! Memory, time and cost before anything runs: what will be held, how many tokens are computed at once, and what would
//! fit if this does not. The same numbers stand beside the measured ones in the report.
//!
//! Exact parts are counted; activations follow from what `model::layer` saves; time from one measured matrix product.

use std::time::Duration;

use crds::report::MemoryEstimate;
use crds::run::{Lora, Method, Optimizer, RunConfig};
use tch::Kind;

use crate::compute::attention::{flash_backward_bytes, score_bytes};
use crate::compute::loss::chunk_rows;
use crate::ground::units::display_bytes;
use crate::judge::generate::{PROMPT_TOKENS, copied_bytes, pass_bytes};
use crate::model::spec::{AttentionSpec, LayerSpec};
use crate::model::{Recompute, Spec, lora_parameters};

/// Resident bytes of the process before a model is there: libtorch, its threads, the binary and the prepared rows, as
/// measured on x86-64.
const RUNTIME_BYTES: i64 = 220 << 20;
/// The CUDA context and the libraries' workspaces: 0.6 to 1.4 GB, by card and driver.
const CUDA_CONTEXT_BYTES: i64 = 1 << 30;
/// What allocators hold beyond what is asked for, as a share of what is allocated and freed again in every step: rows of
/// ever new lengths leave holes.
const ALLOCATOR_SLACK: f64 = 0.8;
/// Share of the measured matrix-product rate that a whole step reaches; the rest goes to pointwise work and attention.
const STEP_EFFICIENCY: f64 = 0.4;
/// Tokens computed at once where memory allows more: beyond it matrix products no longer gain.
const MICRO_BATCH_TOKENS_CPU: i64 = 2048;
const MICRO_BATCH_TOKENS_GPU: i64 = 16_384;
/// With fewer tokens at once matrix products are no longer bound by arithmetic.
const ENOUGH_TOKENS_CPU: i64 = 512;
const ENOUGH_TOKENS_GPU: i64 = 2048;
/// Tokens that caches of prompts answered at once have room for where activations took less and memory suffices: one or two
/// hundred short prompts.
const CACHE_TOKENS: i64 = 16_384;

/// What the plan is made from.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The model.
    pub model: &'a Spec,
    /// The run.
    pub config: &'a RunConfig,
    /// Dtype of weights and activations.
    pub kind: Kind,
    /// Whether an accelerator computes.
    pub accelerator: bool,
    /// Whether that makes matrices of scores, as [`crate::compute::attention::makes_scores`] tells.
    pub makes_scores: bool,
    /// Whether answers take the plain cache, as `generate::is_plain` tells.
    pub plain_cache: bool,
    /// Multiprocessors of the accelerator.
    pub multiprocessors: i64,
    /// Longest example in tokens.
    pub longest: i64,
    /// Tokens of an example on average.
    pub mean_length: i64,
    /// Tokens of the longest row whose loss is measured.
    pub longest_measured: i64,
    /// Tokens of the longest possible step: no micro-batch is larger.
    pub step_tokens: i64,
    /// Validation rows that are answered.
    pub answered: i64,
    /// Tokens of the longest prompt of these and of an answer to it; 0: none are answered.
    pub longest_answered: i64,
    /// Tokens of one pass over the training rows.
    pub epoch_tokens: i64,
    /// Optimizer steps.
    pub total_steps: i64,
    /// Optimizer steps of one pass.
    pub steps_per_epoch: i64,
    /// Bytes that there are where the model computes.
    pub memory: i64,
    /// Bytes that there are on the host of an accelerator.
    pub host_memory: i64,
    /// Measured matrix-product rate, FLOP/s.
    pub matmul_rate: f64,
}

/// A method's predicted needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Peak memory.
    pub memory: MemoryEstimate,
    /// Tokens computed at once.
    pub micro_batch_tokens: i64,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Tokens for which the key-value caches of the prompts that are answered at once have room, beside what all begin with.
    pub cache_tokens: i64,
    /// Trained parameters.
    pub trainable_parameters: i64,
    /// All parameters of the base.
    pub base_parameters: i64,
    /// Seconds of all optimizer steps.
    pub seconds: f64,
    /// Whether the host has room for a copy of the trained state, from which a checkpoint is written while training goes on.
    pub has_room_for_copy: bool,
    /// Whether it fits.
    pub fits: bool,
}

/// It cannot fit.
#[derive(Debug, thiserror::Error)]
#[error(
    "the run needs {needed} of memory and {available} are there, even with {tokens} tokens per micro-batch and all \
     activations recomputed; {remedy}"
)]
pub struct DoesNotFit {
    needed: String,
    available: String,
    tokens: i64,
    remedy: String,
}

impl DoesNotFit {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        crds::exit::ExitCode::OutOfMemory
    }
}

/// FLOP/s of a matrix product as large as a layer's, in the model's dtype.
pub fn measure_matmul_rate(model: &Spec, kind: Kind, device: tch::Device) -> f64 {
    let shape = [512, model.hidden_size, model.first().mlp.width];
    crate::compute::device::matmul_rate(shape, (kind, device), Duration::from_millis(10))
}

/// Predicts the needs of `method` with the micro-batch and recomputation that fit best.
pub fn estimate(inputs: &Inputs, method: &Method) -> Estimate {
    let cap = if inputs.accelerator { MICRO_BATCH_TOKENS_GPU } else { MICRO_BATCH_TOKENS_CPU };
    let wanted = inputs.config.hyperparameters.micro_batch_tokens.unwrap_or(cap);
    let in_backward = is_in_backward(method);
    let largest = if in_backward { inputs.step_tokens } else { wanted.min(inputs.step_tokens) };
    let smallest = if in_backward { largest } else { inputs.longest };
    let largest = largest.max(inputs.longest);
    let enough = if inputs.accelerator { ENOUGH_TOKENS_GPU } else { ENOUGH_TOKENS_CPU }.clamp(smallest, largest);
    // Smaller micro-batches cost less than a third forward pass as long as they keep matrix products busy. On a CPU keeping norms and
    // SwiGLU products too takes half as much memory again and saves 1 % of a step.
    let keep = inputs.accelerator.then_some((Recompute::Nothing, largest));
    let cheap = halvings(largest, enough).map(|tokens| (Recompute::Pointwise, tokens));
    let whole = halvings(largest, smallest).map(|tokens| (Recompute::Layer, tokens));
    let choices = keep.into_iter().chain(cheap).chain(whole);
    let mut estimates = choices.map(|(recompute, tokens)| estimate_at(inputs, method, tokens, recompute)).peekable();
    loop {
        let estimate = estimates.next().expect("the last one is taken");
        if estimate.fits || estimates.peek().is_none() {
            return estimate;
        }
    }
}

/// `from`, half of it, and so on, none below `to`, which is the last.
fn halvings(from: i64, to: i64) -> impl Iterator<Item = i64> {
    std::iter::successors(Some(from), move |&tokens| (tokens > to).then_some((tokens / 2).max(to)))
}

fn is_in_backward(method: &Method) -> bool {
    matches!(method, Method::Full { optimizer_in_backward: true })
}

/// Bytes of the gradients that are there all the time, and of those that come layer by layer.
fn gradient_bytes(model: &Spec, method: &Method, trainable: i64) -> (i64, i64) {
    let elements = || model.layers.iter().map(|layer| layer.elements(model.hidden_size));
    let layers = elements().sum::<i64>() * 4;
    match method {
        Method::LoRA { .. } | Method::QLoRA { .. } => (trainable * 4, 0),
        Method::Full { optimizer_in_backward: false } => (trainable * 4 - layers, layers),
        Method::Full { optimizer_in_backward: true } => (trainable * 4 - layers + elements().max().unwrap_or(0) * 4, 0),
    }
}

/// Bytes of both moments; in 8 bits each has a scale for every 256.
fn moment_bytes(optimizer: Optimizer, trainable: i64) -> i64 {
    match optimizer {
        Optimizer::AdamW => trainable * 8,
        Optimizer::AdamW8Bit => trainable * 2 + trainable * 8 / 256,
    }
}

fn estimate_at(inputs: &Inputs, method: &Method, tokens: i64, recompute: Recompute) -> Estimate {
    let model = inputs.model;
    let element = inputs.kind.elt_size_in_bytes() as i64;
    let base = model.elements();
    let (trainable, full) = match method {
        Method::LoRA { lora } | Method::QLoRA { lora, .. } => (lora_parameters(model, lora), false),
        Method::Full { .. } => (base, true),
    };
    let copies = if inputs.kind == Kind::Float { 4 } else { 4 + element };
    let hidden = model.hidden_size;
    let sum = |of: fn(&LayerSpec, i64) -> i64| model.layers.iter().map(|layer| of(layer, hidden)).sum::<i64>();
    let live = model.layers.iter().map(|layer| layer.live_bytes(hidden, element)).max().unwrap_or(0);
    // Of one layer; those of a decoder are alike.
    let (kept, cheap) = (model.first().kept(hidden), model.first().cheap(hidden));
    let (saved, live) = match recompute {
        Recompute::Nothing => ((sum(LayerSpec::kept) + sum(LayerSpec::cheap)) * element, live),
        Recompute::Pointwise => (sum(LayerSpec::kept) * element, live),
        Recompute::Layer => (model.layers.len() as i64 * hidden * element, kept * element + live),
    };
    let (gradients, layer_gradients) = gradient_bytes(model, method, trainable);
    let moments = moment_bytes(inputs.config.hyperparameters.optimizer, trainable);
    // Gradients of layers take the place of activations that are gone, unless another micro-batch of the step follows.
    let replaced = if tokens >= inputs.step_tokens { layer_gradients.min(tokens * saved) } else { 0 };
    let AttentionSpec { heads, head_size, .. } = model.first().attention;
    let scores = |longest| {
        if inputs.makes_scores { score_bytes(inputs.kind, heads, longest, tokens) } else { 0 }
    };
    let shape = [heads, head_size];
    // Of one long example, or of as many as there are on average: both need more than what lies between.
    let flash = [1, tokens / inputs.mean_length.max(1)]
        .map(|examples| flash_backward_bytes(shape, tokens, examples.max(1), inputs.multiprocessors));
    let flash = if inputs.accelerator && !inputs.makes_scores { flash.into_iter().max().unwrap_or(0) } else { 0 };
    let trained = tokens * (saved + live) + scores(inputs.longest) + flash - replaced;
    // Measuring keeps nothing, and is less unless it makes the scores of a longer row.
    let longer = inputs.makes_scores && inputs.longest_measured > inputs.longest;
    let measured = if longer { inputs.longest_measured * live + scores(inputs.longest_measured) } else { 0 };
    let activations = trained.max(measured);
    let logits = chunk_rows(model.vocab_size, inputs.accelerator).min(tokens) * model.vocab_size * (4 + 4 + element);
    // After training its activations are gone, and the caches of answers take their place.
    let others = activations + logits;
    let (slack, runtime) =
        if inputs.accelerator { (0.05, CUDA_CONTEXT_BYTES) } else { (ALLOCATOR_SLACK, RUNTIME_BYTES) };
    let memory_with = |transient: i64| {
        // In full fine-tuning the mapped files are read once into the masters and need not stay resident.
        let weights = if full { 0 } else { base * element };
        let (parameters, optimizer) = (trainable * copies, gradients + layer_gradients + moments);
        let workspace = (transient as f64 * slack) as i64 + runtime;
        let total = weights + parameters + optimizer + transient + workspace;
        MemoryEstimate { weights, parameters, optimizer, activations: transient, workspace, total }
    };
    // The copy lies on the host, whose memory an accelerator's is not.
    let host_copy = trainable * 4 + moments;
    let copy = if inputs.accelerator { 0 } else { host_copy };
    let answering_tokens = inputs.longest_answered.max(PROMPT_TOKENS as i64) + inputs.answered;
    let attending =
        if inputs.plain_cache { pass_bytes(inputs.kind, shape, answering_tokens, inputs.longest_answered) } else { 0 };
    let forward = (kept + cheap) * element * answering_tokens + attending;
    let (cache_tokens, caches) = caches(inputs, others, forward, copy, |bytes| memory_with(others.max(bytes)).total);
    let mut memory = memory_with(others.max(caches));
    let fits = memory.total <= inputs.memory;
    let has_room_for_copy = if inputs.accelerator {
        RUNTIME_BYTES + host_copy <= inputs.host_memory
    } else {
        memory.total + copy <= inputs.memory
    };
    if has_room_for_copy {
        memory.workspace += copy;
        memory.total += copy;
    }
    let linear = (base - model.vocab_size * hidden * if model.tie_word_embeddings { 1 } else { 2 }) as f64;
    let adapters = if full { 0.0 } else { trainable as f64 };
    // Forward and input gradient always; weight gradients where trained; a third pass where layers are recomputed.
    let passes = 2.0 + if full { 1.0 } else { 0.0 } + if recompute == Recompute::Layer { 1.0 } else { 0.0 };
    let per_token = 2.0 * (linear * passes + adapters * 3.0);
    let run_tokens = inputs.epoch_tokens as f64 * inputs.total_steps as f64 / inputs.steps_per_epoch.max(1) as f64;
    Estimate {
        memory,
        micro_batch_tokens: tokens,
        recompute,
        cache_tokens,
        trainable_parameters: trainable,
        base_parameters: base,
        seconds: run_tokens * per_token / (inputs.matmul_rate * STEP_EFFICIENCY),
        has_room_for_copy,
        fits,
    }
}

/// Tokens for which the caches of answers have room, and bytes that they take with what all prompts begin with: as many as the
/// `others`, bytes in whose place they are, or [`CACHE_TOKENS`] where that is more, there are so many rows, and the `total` that
/// comes of it fits, with the `copy` of what is trained if that fits at all. `forward` are the bytes that new tokens take beside
/// them on their way through a layer.
fn caches(inputs: &Inputs, others: i64, forward: i64, copy: i64, total: impl Fn(i64) -> i64) -> (i64, i64) {
    let (model, longest) = (inputs.model, inputs.longest_answered);
    if longest == 0 {
        return (0, 0);
    }
    let keys = model.first().attention.key_size();
    let held = model.layers.len() as i64 * 2 * keys * inputs.kind.elt_size_in_bytes() as i64;
    let token = held + if inputs.plain_cache { copied_bytes(inputs.kind, keys, inputs.accelerator) } else { 0 };
    let bytes = |tokens: i64| (tokens + longest) * token + forward;
    let free = ((others - forward) / token - longest).max(longest);
    let wanted = CACHE_TOKENS.min(inputs.answered * longest).max(free);
    // Answers are a little faster with larger caches, training is held up by every checkpoint without the copy.
    let reserved = if total(bytes(free)) + copy <= inputs.memory { copy } else { 0 };
    let fits = |tokens: &i64| total(bytes(*tokens)) + reserved <= inputs.memory;
    let tokens = halvings(wanted, free).find(fits).unwrap_or(free);
    (tokens, bytes(tokens))
}

/// The estimate of the configured method, or what to do if it cannot fit.
pub fn plan(inputs: &Inputs) -> Result<Estimate, DoesNotFit> {
    let chosen = estimate(inputs, &inputs.config.method);
    if chosen.fits {
        return Ok(chosen);
    }
    let remedy = cheapest_that_fits(inputs).unwrap_or_else(|| {
        "no shorter sequence or smaller adapter fits either: choose a smaller model or more memory".into()
    });
    Err(DoesNotFit {
        needed: display_bytes(chosen.memory.total),
        available: display_bytes(inputs.memory),
        tokens: chosen.micro_batch_tokens,
        remedy,
    })
}

/// The method to compare with: LoRA with the usual settings, or full fine-tuning.
pub fn other_method(method: &Method) -> Method {
    match method {
        Method::LoRA { .. } | Method::QLoRA { .. } => Method::Full { optimizer_in_backward: false },
        Method::Full { .. } => {
            let lora = Lora { rank: 16, alpha: 32.0, dropout: 0.0, target_modules: Vec::new(), rank_stabilized: false };
            Method::LoRA { lora }
        }
    }
}

/// The least change that makes the run fit: moments in 8 bits, updates in the backward pass or a smaller step where it is whole,
/// LoRA instead of full fine-tuning, then shorter sequences.
fn cheapest_that_fits(inputs: &Inputs) -> Option<String> {
    let words = |change: &str, inputs: &Inputs, method: &Method| {
        let estimate = estimate(inputs, method);
        let needs = display_bytes(estimate.memory.total);
        estimate.fits.then(|| format!("the cheapest change that fits is {change}: {needs}"))
    };
    let method = &inputs.config.method;
    let mut small_moments = inputs.config.clone();
    small_moments.hyperparameters.optimizer = Optimizer::AdamW8Bit;
    let small_moments = Inputs { config: &small_moments, ..*inputs };
    let in_full = || {
        words("hyperparameters.optimizer: AdamW8Bit", &small_moments, method).or_else(|| {
            let change = "hyperparameters.optimizer: AdamW8Bit with method.full.optimizerInBackward: true and \
                          hyperparameters.maxGradNorm: \"0\"";
            words(change, &small_moments, &Method::Full { optimizer_in_backward: true })
        })
    };
    let smaller_step = || {
        halvings(inputs.config.hyperparameters.batch_size / 2, 1).filter(|&size| size > 0).find_map(|batch_size| {
            let step_tokens = inputs.step_tokens.min(inputs.longest * batch_size);
            let smaller = Inputs { step_tokens, ..*inputs };
            words(&format!("hyperparameters.batchSize: {batch_size}"), &smaller, method)
        })
    };
    let shorter = |method: &Method, also: &str| {
        halvings(inputs.longest, 64).find_map(|longest| {
            let examples = if is_in_backward(method) { inputs.config.hyperparameters.batch_size } else { 1 };
            let shorter = Inputs { longest, step_tokens: inputs.step_tokens.min(longest * examples), ..*inputs };
            let length = (longest != inputs.longest).then(|| format!("hyperparameters.maxSequenceLength: {longest}"));
            let change = match (also, length.as_deref()) {
                ("", None) => return None,
                (change, None) | ("", Some(change)) => change.to_owned(),
                (also, Some(length)) => format!("{also} with {length}"),
            };
            words(&change, &shorter, method)
        })
    };
    match method {
        Method::Full { optimizer_in_backward } => in_full()
            .or_else(|| optimizer_in_backward.then(smaller_step).flatten())
            .or_else(|| shorter(&other_method(method), "method.type: LoRA"))
            .or_else(|| shorter(method, "")),
        Method::LoRA { .. } | Method::QLoRA { .. } => shorter(method, ""),
    }
}

#[cfg(test)]
mod tests;
