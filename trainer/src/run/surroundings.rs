//! What the training loop asks of the world: events to observers, evaluations, checkpoints on disk.

use std::time::Instant;

use crds::report::Scores;
use crds::run::{CheckpointInterval, Method, Metric, RunConfig};

use super::evaluation::{AtOnce, TUNED, answer, score};
use super::saving::{Hold, Snapshot, Writer, Written};
use super::{Context, Error, Planned};
use crate::compute::device::{self, EnergyMeter};
use crate::compute::optim::Parameters;
use crate::compute::shim::release_free_memory;
use crate::judge::evaluate::Measurement;
use crate::model::Decoder;
use crate::store::checkpoint;
use crate::tell::history::History;
use crate::tell::record::{CheckpointRecord, Event, Observer};
use crate::train::{self, Need, Surroundings, TrainState};

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
    pub writer: Writer,
    /// Seconds for which the commit that is being written held training up at its beginning.
    pub begun_seconds: f64,
    pub started: Instant,
    pub energy: Option<EnergyMeter>,
    pub earlier: Earlier,
    pub failures: Failures,
    /// This attempt's newest evaluation, and its best before that.
    pub evaluated: Vec<Evaluated>,
}

/// What an evaluation found, row by row.
pub struct Evaluated {
    /// Completed steps.
    pub step: i64,
    /// What was computed at once: with other numbers it would differ by rounding.
    pub at_once: AtOnce,
    pub measurement: Measurement,
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

    /// Takes note of what became of a commit, for which training waited so long.
    fn note(&mut self, written: Written, need: Need, waited_seconds: f64) -> Result<(), Error> {
        let error = match written.result {
            Ok(record) => {
                self.failures.checkpoints = 0;
                if let Some(error) = written.leftover {
                    self.emit_event(&Event::Warning(error.to_string()))?;
                }
                return self.emit_event(&Event::Checkpoint(CheckpointRecord { waited_seconds, ..record }));
            }
            Err(error @ checkpoint::Error::Write { .. }) => error,
            Err(error) => return Err(error.into()),
        };
        self.failures.checkpoints += 1;
        self.emit_event(&Event::CheckpointFailed { step: written.step, message: error.to_string() })?;
        // Whoever is asked to leave leaves with the last one.
        let tolerated = self.failures.checkpoints <= TOLERATED_FAILURES && need == Need::Due;
        if tolerated || self.context.stop.requested() { Ok(()) } else { Err(error.into()) }
    }

    /// Waits for the commit that was begun, if one was.
    pub fn settle(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        let Some(written) = self.writer.wait() else { return Ok(()) };
        self.note(written, Need::Due, self.begun_seconds + started.elapsed().as_secs_f64())
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
        self.emit_event(&event)?;
        match self.writer.poll() {
            Some(written) => self.note(written, Need::Due, self.begun_seconds),
            None => Ok(()),
        }
    }

    fn evaluate(&mut self, model: &Decoder, state: &TrainState) -> Result<Option<Scores>, crate::Error> {
        // Training is between two steps: nearly all of its memory is free, and measuring needs other pieces of it.
        release_free_memory();
        let (prepared, at_once, stop) = (&self.planned.prepared, state.into(), self.context.stop);
        let Some(mut measurement) = score(model, prepared, TUNED, at_once, stop) else { return Ok(None) };
        if self.config.validation.metric == Metric::ExactMatch {
            let answered = answer(model, prepared, TUNED, measurement, at_once, stop, &mut |_, _| ())?;
            let Some(answered) = answered else { return Ok(None) };
            measurement = answered;
        }
        let scores = measurement.scores();
        self.evaluated.retain(|one| state.best.is_some_and(|best| best.step == one.step));
        self.evaluated.push(Evaluated { step: state.step, at_once, measurement });
        Ok(Some(scores))
    }

    fn commit(&mut self, state: &TrainState, parameters: &Parameters, need: Need) -> Result<(), crate::Error> {
        self.settle()?;
        let started = Instant::now();
        let mut state = state.clone();
        (state.wall_seconds, state.energy_joules) = self.spent();
        self.emit_event(&Event::Committing { bytes: parameters.state_bytes() })?;
        let behind = need == Need::Due && self.planned.estimate.has_room_for_copy && !self.context.stop.requested();
        let hold = if behind { Hold::Copied } else { Hold::Shared };
        self.writer.begin(Snapshot::of(state, parameters, hold));
        if behind {
            self.begun_seconds = started.elapsed().as_secs_f64();
            return Ok(());
        }
        let written = self.writer.wait().expect("it was begun");
        self.note(written, need, started.elapsed().as_secs_f64())
    }
}
