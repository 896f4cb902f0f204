//! What the training loop asks of the world: events to observers, evaluations, checkpoints on disk.

use std::io::Write;
use std::time::Instant;

use crds::report::Scores;
use crds::run::{CheckpointInterval, Method, Metric, RunConfig};
use tch::{Device, Kind, Tensor};

use super::evaluation::{Answers, TUNED, measure};
use super::{Context, Error, Planned};
use crate::checkpoint::{self, Content, Store, Stored};
use crate::device::{self, EnergyMeter};
use crate::export::dtype;
use crate::history::History;
use crate::model::Llama;
use crate::optim::Parameters;
use crate::record::{CheckpointRecord, Event, Observer};
use crate::shim::{release_free_memory, tensor_bytes};
use crate::signal::Stop;
use crate::train::{self, Need, Surroundings, TrainState};
use crate::weights::{MappedFile, TensorView, write_safetensors};

pub const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// Checkpoints in a row that may fail before the run ends: a full disk may be somebody's for a while.
const TOLERATED_FAILURES: u32 = 3;
/// Evaluations over a run where the configuration is silent.
const EVALUATIONS: i64 = 10;

/// The loop's surroundings in a run directory.
pub struct RunSurroundings<'a> {
    pub config: &'a RunConfig,
    pub context: &'a Context<'a>,
    pub planned: &'a Planned,
    pub observer: &'a mut dyn Observer,
    pub history: History,
    pub store: Store,
    pub started: Instant,
    pub energy: Option<EnergyMeter>,
    pub earlier: Earlier,
    pub failures: Failures,
}

/// What could not be written, since it last could.
#[derive(Clone, Copy, Debug, Default)]
pub struct Failures {
    checkpoints: u32,
    record: bool,
}

/// What earlier attempts took.
#[derive(Clone, Copy, Debug)]
pub struct Earlier {
    /// Wall time.
    pub seconds: f64,
    /// Energy, where the machine told.
    pub joules: Option<f64>,
}

/// The loop's constants.
pub fn loop_plan<'a>(config: &RunConfig, planned: &'a Planned) -> train::Plan<'a> {
    let total = planned.schedule.total_steps;
    let every = config.validation.every_steps.unwrap_or((total / EVALUATIONS).max(1));
    train::Plan {
        examples: &planned.prepared.train,
        order: &planned.order,
        schedule: planned.schedule,
        seed: config.hyperparameters.seed,
        neftune_alpha: config.hyperparameters.neftune_alpha,
        weight_decay: config.hyperparameters.weight_decay,
        max_grad_norm: config.hyperparameters.max_grad_norm,
        recompute: planned.estimate.recompute,
        in_backward: matches!(config.method, Method::Full { optimizer_in_backward: true }),
        evaluate_every: (!planned.prepared.validation.is_empty()).then_some(every),
        metric: config.validation.metric,
        early_stopping: config.early_stopping,
        checkpoint: match config.checkpoint.interval {
            CheckpointInterval::EverySteps(steps) => CheckpointInterval::EverySteps(steps.max(1)),
            seconds @ CheckpointInterval::EverySeconds(_) => seconds,
        },
    }
}

impl RunSurroundings<'_> {
    /// Wall seconds and joules of all attempts up to now.
    pub fn spent(&self) -> (f64, Option<f64>) {
        let joules = self.energy.as_ref().map(EnergyMeter::joules);
        let all_joules = joules.map(|joules| joules + self.earlier.joules.unwrap_or(0.0)).or(self.earlier.joules);
        (self.earlier.seconds + self.started.elapsed().as_secs_f64(), all_joules)
    }

    /// Hands an event to the record and to the observer.
    pub fn emit_event(&mut self, event: &Event) -> Result<(), Error> {
        if matches!(event, Event::Stage(_)) {
            // What one stage needed stands in the way of the next.
            release_free_memory();
        }
        // Checkpoints decide how long a run goes on without space; what the record lacks is added when there is some.
        if let Err(error) = self.history.observe(event) {
            if !self.failures.record {
                self.failures.record = true;
                let path = self.context.run.join("metrics.jsonl");
                let text = format!("{}: cannot be written ({error}); it is completed when it can be", path.display());
                self.observer.observe(&Event::Warning(text)).map_err(self.context.write_error())?;
            }
        } else if matches!(event, Event::Step(_)) {
            self.failures.record = false;
        }
        self.observer.observe(event).map_err(self.context.write_error())
    }

    fn try_commit(&mut self, state: &TrainState, parameters: &Parameters) -> Result<CheckpointRecord, Error> {
        let started = Instant::now();
        let mut state = state.clone();
        (state.wall_seconds, state.energy_joules) = self.spent();
        let best = state.best.is_some_and(|best| best.step == state.step);
        let held = parameters.state().into_iter().map(|(_, tensor)| tensor).chain([parameters.flat_master()]);
        let bytes = held.map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum();
        self.emit_event(&Event::Committing { bytes })?;
        let weights = host_masters(parameters);
        let optimizer = host_optimizer(parameters);
        let write_state = |sink: &mut dyn Write| serde_json::to_writer_pretty(sink, &state).map_err(Into::into);
        let write_weights = |sink: &mut dyn Write| write_safetensors(sink, &[], &views(&weights));
        let write_optimizer = |sink: &mut dyn Write| write_safetensors(sink, &[], &views(&optimizer));
        let stored = self.store.commit(
            state.step,
            best,
            &[
                Content { name: WEIGHTS, write: &write_weights },
                Content { name: OPTIMIZER, write: &write_optimizer },
                Content { name: STATE, write: &write_state },
            ],
        )?;
        Ok(CheckpointRecord {
            step: state.step,
            bytes: stored.bytes(),
            seconds: started.elapsed().as_secs_f64(),
            eval_loss: state.eval_loss.filter(|_| state.evaluated_step == state.step),
            best,
        })
    }
}

impl Surroundings for RunSurroundings<'_> {
    fn emit(&mut self, event: Event) -> Result<(), crate::Error> {
        // Rows of ever new lengths leave holes in the heap. They are kept for speed as long as the plan is kept.
        if matches!(event, Event::Step(_))
            && device::resident_memory().is_some_and(|bytes| bytes > self.planned.estimate.memory.total)
        {
            release_free_memory();
        }
        self.emit_event(&event)
    }

    fn evaluate(&mut self, model: &Llama, micro_batch_tokens: i64) -> Result<Option<Scores>, crate::Error> {
        // Training is between two steps: nearly all of its memory is free, and measuring needs other pieces of it.
        release_free_memory();
        let answers =
            if self.config.validation.metric == Metric::ExactMatch { Answers::Asked } else { Answers::NotAsked };
        let measured = measure(
            model,
            &self.planned.prepared,
            TUNED,
            answers,
            micro_batch_tokens,
            self.context.stop,
            &mut |_, _| (),
        )?;
        Ok(measured.map(|measured| measured.scores()))
    }

    fn commit(&mut self, state: &TrainState, parameters: &Parameters, need: Need) -> Result<(), crate::Error> {
        let record = match self.try_commit(state, parameters) {
            Ok(record) => record,
            Err(Error::Checkpoint(error @ checkpoint::Error::Write { .. })) => {
                self.failures.checkpoints += 1;
                let failed = Event::CheckpointFailed { step: state.step, message: error.to_string() };
                self.emit_event(&failed)?;
                // Whoever is asked to leave leaves with the last one.
                let tolerated = self.failures.checkpoints <= TOLERATED_FAILURES && need == Need::Due;
                return if tolerated || self.context.stop.requested() { Ok(()) } else { Err(error.into()) };
            }
            Err(error) => return Err(error),
        };
        self.failures.checkpoints = 0;
        if let Err(error) = self.store.retain(self.config.checkpoint.keep_latest, self.config.checkpoint.keep_best) {
            self.emit_event(&Event::Warning(error.to_string()))?;
        }
        self.emit_event(&Event::Checkpoint(record))
    }
}

/// The masters by name, in host memory.
pub fn host_masters(parameters: &Parameters) -> Vec<(String, Tensor)> {
    let host = |slot| parameters.master(slot).to_device(Device::Cpu).contiguous();
    parameters.slots().iter().map(|slot| (slot.name.clone(), host(slot))).collect()
}

fn host_optimizer(parameters: &Parameters) -> Vec<(String, Tensor)> {
    let host = |(name, tensor): (&str, &Tensor)| (name.to_owned(), tensor.to_device(Device::Cpu).contiguous());
    parameters.state().into_iter().map(host).collect()
}

/// Named tensors as bytes.
pub fn views(tensors: &[(String, Tensor)]) -> Vec<TensorView<'_>> {
    tensors
        .iter()
        .map(|(name, tensor)| TensorView {
            name: name.clone(),
            dtype: dtype(tensor.kind()),
            shape: tensor.size().iter().map(|&size| size as usize).collect(),
            data: tensor_bytes(tensor),
        })
        .collect()
}

/// The tensor `name` of a checkpoint's file.
fn stored_tensor(file: &MappedFile, stored: &Stored, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor, Error> {
    let malformed = || {
        Error::Weights(crate::weights::Error::Malformed {
            path: stored.folder.clone(),
            message: format!("the checkpoint verifies and has no {kind:?} tensor {name} of shape {shape:?}"),
        })
    };
    let mapped = file.tensor(name).ok_or_else(malformed)?;
    if mapped.dtype != dtype(kind) || mapped.shape.iter().map(|&size| size as i64).ne(shape.iter().copied()) {
        return Err(malformed());
    }
    Ok(Tensor::from_data_size(mapped.data, shape, kind))
}

/// Puts a checkpoint's weights in place, and leaves the moments.
pub fn restore_weights(stored: &Stored, parameters: &mut Parameters, stop: &Stop) -> Result<(), Error> {
    let file = MappedFile::open(&stored.folder.join(WEIGHTS))?;
    parameters.set_masters(|slot| {
        stop.alive();
        stored_tensor(&file, stored, &slot.name, &slot.shape, Kind::Float)
    })
}

/// Puts a checkpoint's weights and moments in place, one tensor at a time, and returns the loop's state.
pub fn restore(stored: &Stored, parameters: &mut Parameters, stop: &Stop) -> Result<TrainState, Error> {
    let path = stored.folder.join(STATE);
    let read = |source| crate::checkpoint::Error::Read { path: path.clone(), source };
    let state = std::fs::read(&path).map_err(read)?;
    let state: TrainState = serde_json::from_slice(&state).map_err(|error| read(error.into()))?;
    restore_weights(stored, parameters, stop)?;
    let file = MappedFile::open(&stored.folder.join(OPTIMIZER))?;
    for (name, held) in parameters.state() {
        stop.alive();
        held.shallow_clone().copy_(&stored_tensor(&file, stored, name, &held.size(), held.kind())?);
    }
    Ok(state)
}
