//! The training loop and its step.
//!
//! The loop knows the model, the rows and the schedule. Files, sockets and terminals are behind [`Surroundings`].

mod error;
pub mod schedule;
mod state;

use std::time::{Duration, Instant};

use crds::report::Scores;
use crds::run::{CheckpointInterval, EarlyStopping, Metric};
use tch::Tensor;

pub use self::error::Error;
pub use self::state::{Best, TrainState};
use crate::compute::memory::guard_memory;
use crate::compute::optim::{Parameters, StepConstants};
use crate::compute::shim;
use crate::data::example::Examples;
use crate::data::order::Order;
use crate::data::pack::{PackedBatch, pack};
use crate::ground::stop::Stop;
use crate::model::{Decoder, DeviceBatch, Noise, Recompute};
use crate::tell::record::{EvaluationRecord, Event, StepRecord};
use crate::train::schedule::Schedule;

/// Non-finite steps in a row that end the run.
const MAX_NON_FINITE_STEPS: i64 = 3;

/// What one step is made with.
#[derive(Clone, Copy, Debug)]
pub struct StepConfig {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: nothing is clipped.
    pub max_grad_norm: f64,
    /// Randomness of the step.
    pub noise: Noise,
    /// What the backward pass computes again.
    pub recompute: Recompute,
}

/// What one step found, still on the device: nothing in a step waits for it.
#[derive(Debug)]
pub struct StepStats {
    /// Mean loss per trained token of the whole step.
    pub loss: Tensor,
    /// Global gradient norm before clipping.
    pub gradient_norm: Tensor,
    /// 1 where the update was made.
    pub finite: Tensor,
}

/// One optimizer step over the step's examples, however they are split into `micro_batches`.
///
/// The loss is summed over the trained tokens of the *whole* step and divided by their number, so the split (packing,
/// memory fallback, number of ranks) changes nothing but rounding. A non-finite step moves nothing, and neither does one
/// during which a stop is asked for: that one is `None`, and the next attempt makes it whole. With updates in the backward pass
/// there is one micro-batch, and a backward pass that has begun is finished.
pub fn train_step(
    model: &Decoder,
    parameters: &mut Parameters,
    micro_batches: &[PackedBatch],
    config: &StepConfig,
    stop: &Stop,
) -> Result<Option<StepStats>, shim::Error> {
    let num_tokens: usize = micro_batches.iter().map(|batch| batch.labels.len()).sum();
    let mut loss = Tensor::zeros([], (tch::Kind::Float, model.device()));
    let mut step = parameters.begin_step(StepConstants {
        learning_rate: config.learning_rate,
        weight_decay: config.weight_decay,
        max_grad_norm: config.max_grad_norm,
    });
    for batch in micro_batches {
        let batch = DeviceBatch::new(batch, model.device());
        let scale = 1.0 / num_tokens as f64;
        let share = model.forward_backward(&batch, config.noise, scale, config.recompute, stop, &mut step)?;
        let Some(share) = share else { return Ok(None) };
        loss += share;
    }
    let update = step.finish(&loss)?;
    Ok(Some(StepStats { loss, gradient_norm: update.gradient_norm, finite: update.finite }))
}

/// What does not change during a run.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Training examples.
    pub examples: &'a Examples,
    /// Which examples make up each step.
    pub order: &'a Order,
    /// Learning rates.
    pub schedule: Schedule,
    /// All randomness derives from it.
    pub seed: i64,
    /// NEFTune's alpha.
    pub neftune_alpha: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: nothing is clipped.
    pub max_grad_norm: f64,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Whether each layer is updated in the backward pass, which makes a step one micro-batch.
    pub in_backward: bool,
    /// Evaluate every so many steps; `None`: there is nothing to evaluate on.
    pub evaluate_every: Option<i64>,
    /// Decides which evaluation is best.
    pub metric: Metric,
    /// Stop when the metric no longer improves.
    pub early_stopping: Option<EarlyStopping>,
    /// When a checkpoint is due.
    pub checkpoint: CheckpointInterval,
}

impl Plan<'_> {
    /// What the step after `step` completed ones is made with.
    pub fn step_config(&self, step: i64) -> StepConfig {
        StepConfig {
            learning_rate: self.schedule.learning_rate(step),
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            noise: Noise { seed: self.seed, step, neftune_alpha: self.neftune_alpha },
            recompute: self.recompute,
        }
    }
}

/// What the loop asks of the world around it.
pub trait Surroundings {
    /// Takes note of an event.
    fn emit(&mut self, event: Event) -> Result<(), crate::Error>;
    /// Measures the validation rows, as many tokens at once as the state says; `None` if a stop was asked for meanwhile.
    fn evaluate(&mut self, model: &Decoder, state: &TrainState) -> Result<Option<Scores>, crate::Error>;
    /// Commits a checkpoint durably. One that is only [`Need::Due`] may fail for a while.
    fn commit(&mut self, state: &TrainState, parameters: &Parameters, need: Need) -> Result<(), crate::Error>;
}

/// What a checkpoint is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// To lose less if this attempt dies.
    Due,
    /// It holds the result.
    Final,
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done, early stopping decided, or no more were asked for.
    Finished,
    /// A stop was asked for; the state is committed.
    Yielded,
}

/// Runs from `state` to the end, or to the next durable checkpoint after a stop was asked for.
pub fn train(
    model: &Decoder,
    parameters: &mut Parameters,
    state: &mut TrainState,
    plan: &Plan,
    stop: &Stop,
    surroundings: &mut dyn Surroundings,
) -> Result<Outcome, Error> {
    let mut committed = Committed { step: state.step, at: Instant::now() };
    while !state.finished {
        let all_done = state.step >= plan.schedule.total_steps;
        // Asked once a round: the evaluation belongs to the decision.
        let by_request = !all_done && stop.finish_requested();
        let ends = all_done || by_request;
        let improved =
            evaluation_is_due(state, plan, ends) && !stop.requested() && evaluate(model, state, plan, surroundings)?;
        let last = ends || stops_early(state, plan);
        // An evaluation that a stop cut short is still due: the next attempt makes it before it goes on.
        state.finished = last && !evaluation_is_due(state, plan, ends);
        state.stopped_by_request = state.finished && by_request;
        let due = committed.step != state.step && (stop.requested() || committed.is_due(state, plan));
        if state.finished || improved || due {
            let need = if state.finished { Need::Final } else { Need::Due };
            commit(parameters, state, plan, need, surroundings)?;
            committed = Committed { step: state.step, at: Instant::now() };
        }
        if state.finished {
            break;
        }
        if stop.requested() {
            return Ok(Outcome::Yielded);
        }
        step(model, parameters, state, plan, stop, surroundings)?;
    }
    Ok(Outcome::Finished)
}

/// The last commit.
struct Committed {
    step: i64,
    at: Instant,
}

impl Committed {
    fn is_due(&self, state: &TrainState, plan: &Plan) -> bool {
        match plan.checkpoint {
            CheckpointInterval::EverySteps(steps) => state.step % steps == 0,
            CheckpointInterval::EverySeconds(seconds) => {
                self.at.elapsed() >= Duration::from_secs(seconds.unsigned_abs())
            }
        }
    }
}

fn evaluation_is_due(state: &TrainState, plan: &Plan, ends: bool) -> bool {
    plan.evaluate_every
        .is_some_and(|every| state.step > 0 && state.evaluated_step != state.step && (state.step % every == 0 || ends))
}

fn stops_early(state: &TrainState, plan: &Plan) -> bool {
    plan.early_stopping.is_some_and(|stopping| state.evaluations_without_improvement >= stopping.patience)
}

/// Whether the metric improved.
fn evaluate(
    model: &Decoder,
    state: &mut TrainState,
    plan: &Plan,
    surroundings: &mut dyn Surroundings,
) -> Result<bool, Error> {
    let started = Instant::now();
    let scores = surroundings.evaluate(model, state);
    let Some(scores) = scores.map_err(surroundings_failed)? else { return Ok(false) };
    state.evaluated_step = state.step;
    state.eval_loss = scores.eval_loss;
    let value = scores.get(plan.metric).filter(|value| value.is_finite());
    let gain_over = |earlier: Option<f64>| match (value, earlier) {
        (None, _) => f64::NEG_INFINITY,
        (Some(_), None) => f64::INFINITY,
        (Some(value), Some(earlier)) if plan.metric.lower_is_better() => earlier - value,
        (Some(value), Some(earlier)) => value - earlier,
    };
    let improved = gain_over(state.best.map(|best| best.value)) > 0.0;
    // Patience counts from the last gain that is worth it: many tiny ones do not add up to patience for ever.
    let min_delta = plan.early_stopping.map_or(0.0, |stopping| stopping.min_delta);
    if gain_over(state.patience_reference) > min_delta {
        state.patience_reference = value;
        state.evaluations_without_improvement = 0;
    } else {
        state.evaluations_without_improvement += 1;
    }
    if let Some(value) = value.filter(|_| improved) {
        state.best = Some(Best { step: state.step, value });
    }
    let record = EvaluationRecord {
        step: state.step,
        epoch: plan.order.epoch(state.step),
        scores,
        best: improved,
        seconds: started.elapsed().as_secs_f64(),
    };
    surroundings.emit(Event::Evaluation(record)).map_err(surroundings_failed)?;
    Ok(improved)
}

fn commit(
    parameters: &Parameters,
    state: &TrainState,
    plan: &Plan,
    need: Need,
    surroundings: &mut dyn Surroundings,
) -> Result<(), Error> {
    if !parameters.flat_master().sum(tch::Kind::Float).double_value(&[]).is_finite() {
        return Err(Error::NonFiniteWeights { step: state.step, peak_learning_rate: plan.schedule.peak });
    }
    surroundings.commit(state, parameters, need).map_err(surroundings_failed)
}

/// Takes the next step; a stop during it leaves everything as it was before.
fn step(
    model: &Decoder,
    parameters: &mut Parameters,
    state: &mut TrainState,
    plan: &Plan,
    stop: &Stop,
    surroundings: &mut dyn Surroundings,
) -> Result<(), Error> {
    let started = Instant::now();
    let ids = plan.order.examples(state.step);
    let config = plan.step_config(state.step);
    let mut data_seconds = 0.0;
    let stats = loop {
        let packing = Instant::now();
        let micro_batches = pack(plan.examples, &ids, state.micro_batch_tokens);
        data_seconds += packing.elapsed().as_secs_f64();
        match guard_memory(|| train_step(model, parameters, &micro_batches, &config, stop)) {
            Ok(stats) => match stats? {
                Some(stats) => break stats,
                None => return Ok(()),
            },
            Err(message) => {
                let longest = micro_batches.iter().map(|batch| batch.tokens.len() as i64).max().unwrap_or(0);
                // Where weights have moved this state is never saved, the next attempt begins at the last checkpoint.
                let has_moved = parameters.is_moving();
                let (why, remedy) = if plan.in_backward {
                    (
                        "the whole step, as method.full.optimizerInBackward asks for",
                        "lower hyperparameters.batchSize or maxSequenceLength",
                    )
                } else if has_moved {
                    ("in the optimizer's update", "lower method.lora.rank where there is one")
                } else {
                    ("the longest example of the step", "lower hyperparameters.maxSequenceLength")
                };
                if plan.in_backward || has_moved || micro_batches.len() >= ids.len() {
                    return Err(Error::OutOfMemory { tokens: longest, why, remedy, message });
                }
                // Which examples make up the step does not change, so the update is the same beyond rounding.
                state.micro_batch_tokens = (longest / 2).max(1);
                let text = format!(
                    "out of memory at {longest} tokens per micro-batch; going on with {}",
                    state.micro_batch_tokens
                );
                surroundings.emit(Event::Warning(text)).map_err(surroundings_failed)?;
            }
        }
    };
    let loss = stats.loss.double_value(&[]);
    let gradient_norm = stats.gradient_norm.double_value(&[]);
    let finite = stats.finite.double_value(&[]) == 1.0;
    let count = |of: &dyn Fn(usize) -> usize| ids.iter().map(|&id| of(id) as i64).sum::<i64>();
    let input_tokens = count(&|id| plan.examples.tokens(id).len());
    let trained_tokens = count(&|id| plan.examples.num_trained(id));
    state.step += 1;
    state.input_tokens += input_tokens;
    state.trained_tokens += trained_tokens;
    state.consecutive_non_finite = if finite { 0 } else { state.consecutive_non_finite + 1 };
    state.non_finite_steps += i64::from(!finite);
    let seconds = started.elapsed().as_secs_f64();
    state.train_seconds += seconds;
    let record = StepRecord {
        step: state.step,
        total_steps: plan.schedule.total_steps,
        epoch: plan.order.epoch(state.step),
        loss,
        gradient_norm,
        learning_rate: config.learning_rate,
        examples: ids.len() as i64,
        input_tokens,
        trained_tokens,
        total_input_tokens: state.input_tokens,
        total_trained_tokens: state.trained_tokens,
        seconds,
        data_seconds,
        finite,
    };
    surroundings.emit(Event::Step(record)).map_err(surroundings_failed)?;
    if state.consecutive_non_finite >= MAX_NON_FINITE_STEPS {
        return Err(Error::NonFinite {
            step: state.step,
            loss,
            gradient_norm,
            count: state.consecutive_non_finite,
            moved: if plan.in_backward {
                "layers above the first gradient that was not finite were moved by them,"
            } else {
                "no weight was moved by them"
            },
            peak_learning_rate: plan.schedule.peak,
        });
    }
    Ok(())
}

fn surroundings_failed(error: crate::Error) -> Error {
    Error::Surroundings(Box::new(error))
}
