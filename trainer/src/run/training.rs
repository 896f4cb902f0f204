//! The stage that trains: from the newest checkpoint to the last step, and then the judgement of what came of it.

use std::time::Instant;

use crds::report::{Stage, Usage};
use crds::run::{Evaluate, Method, RunConfig};
use serde_json::json;

use super::evaluation::{AtOnce, Evaluation};
use super::saving::{self, Retention, Writer};
use super::surroundings::{Earlier, Evaluated, Failures, RunSurroundings, loop_plan};
use super::{Context, Error, Planned};
use crate::compute::device::{self, EnergyMeter};
use crate::data::generation::longest_answered;
use crate::model::{self, Built, build};
use crate::store::checkpoint::{EquivalenceClass, Identity, Store, Stored};
use crate::store::files::digest_of;
use crate::tell::history::History;
use crate::tell::record::{Event, Observer};
use crate::train::{Outcome, TrainState, train};

/// What an attempt takes, from its beginning.
pub(super) struct Meter {
    started: Instant,
    energy: Option<EnergyMeter>,
}

impl Meter {
    pub(super) fn start() -> Self {
        Self { started: Instant::now(), energy: EnergyMeter::start() }
    }
}

/// A resumed run computes as much at once as before, which keeps it exact to the bit, unless memory asks for less now. Returns
/// what to say where the plan differs.
fn resume_at_once(planned: AtOnce, state: &mut TrainState) -> Vec<String> {
    let mut told = Vec::new();
    let (before, planned_tokens) = (state.micro_batch_tokens, planned.micro_batch_tokens);
    state.micro_batch_tokens = before.min(planned_tokens);
    if planned_tokens < before {
        told.push(format!(
            "micro-batches have {planned_tokens} tokens from here on and had {before}: the result differs by rounding"
        ));
    } else if planned_tokens > before {
        told.push(format!(
            "micro-batches go on with {before} tokens, as the checkpoint was made, not the {planned_tokens} of the plan"
        ));
    }
    let (before, planned_tokens) = (state.cache_tokens, planned.cache_tokens);
    state.cache_tokens = if before == 0 { planned_tokens } else { before.min(planned_tokens) };
    if planned_tokens < before {
        told.push(format!(
            "caches of answers have room for {planned_tokens} tokens from here on and had it for {before}: answers may \
             differ by rounding"
        ));
    } else if planned_tokens > before && before > 0 {
        told.push(format!(
            "caches of answers go on with room for {before} tokens, as the checkpoint was made, not the {planned_tokens} \
             of the plan"
        ));
    }
    told
}

/// Trains to the end and judges the result.
pub(super) fn train_stage(
    config: &RunConfig,
    context: &Context,
    planned: &Planned,
    Meter { started, energy }: Meter,
    observer: &mut dyn Observer,
) -> Result<(), Error> {
    let write = context.write_error();
    let last_word = context.last_word;
    let mut store = open_store(config, context, planned)?;
    let source = model_source(config, planned);
    let Built { model, mut parameters } = build(&source)?;
    let mut state = TrainState {
        evaluated_step: -1,
        micro_batch_tokens: planned.estimate.micro_batch_tokens,
        cache_tokens: planned.estimate.cache_tokens,
        ..TrainState::default()
    };
    if config.checkpoint.resume {
        let (stored, warnings) = store.latest()?;
        for warning in warnings {
            observer.observe(&Event::Warning(warning)).map_err(&write)?;
        }
        if let Some(stored) = stored {
            let planned_at_once = AtOnce::from(&state);
            state = saving::restore(&stored, &mut parameters, context.stop)?;
            for text in resume_at_once(planned_at_once, &mut state) {
                observer.observe(&Event::Warning(text)).map_err(&write)?;
            }
            let inexact_because = store.inexact_because(&stored);
            observer.observe(&Event::Resumed { step: state.step, inexact_because }).map_err(&write)?;
        }
    } else if let Some(aside) = store.set_aside()? {
        let text = format!("checkpoint.resume is Never: earlier checkpoints were moved to {}", aside.display());
        observer.observe(&Event::Warning(text)).map_err(&write)?;
    }
    observer.observe(&Event::Attempt { number: store.attempt(), step: state.step }).map_err(&write)?;

    observer.observe(&Event::Stage(Stage::Training)).map_err(&write)?;
    let history = History::open(context.run, state.step, state.evaluated_step).map_err(&write)?;
    let retention = Retention { latest: config.checkpoint.keep_latest, best: config.checkpoint.keep_best };
    let writer = Writer::start(store, retention, context.last_word.clone()).map_err(&write)?;
    let earlier = Earlier { seconds: state.wall_seconds, joules: state.energy_joules };
    let mut surroundings = RunSurroundings {
        config,
        context,
        planned,
        observer,
        history,
        writer,
        begun_seconds: 0.0,
        started,
        energy,
        earlier,
        failures: Failures::default(),
        evaluated: Vec::new(),
    };
    let loop_plan = loop_plan(config, planned);
    let outcome = train(&model, &mut parameters, &mut state, &loop_plan, context.stop, &mut surroundings);
    let settled = surroundings.settle();
    let title = format!("{}: loss", config.job.name);
    let best = state.best.map(|best| (best.step, best.value));
    let summaries = surroundings.history.write_summaries(planned.schedule.total_steps, best, &title);
    let metrics = surroundings.history.newest();
    last_word.update(|report| report.metrics = metrics);
    if outcome? == Outcome::Yielded {
        return Err(Error::Stopped { step: state.step });
    }
    settled?;
    summaries.map_err(&write)?;
    if state.stopped_by_request {
        let note = format!("stopped early by request at step {} of {}", state.step, planned.schedule.total_steps);
        surroundings.emit_event(&Event::Note(note))?;
    }

    surroundings.emit_event(&Event::Stage(Stage::Evaluating))?;
    let (judged, warning) = judged_checkpoint(config, &surroundings.writer.store(), &state)?;
    if let Some(text) = warning {
        surroundings.emit_event(&Event::Warning(text))?;
    }
    parameters.forget_gradients();
    // The weights after the last step are those of its checkpoint.
    if judged.manifest.step != state.step {
        saving::restore_weights(&judged, &mut parameters, context.stop)?;
    }
    last_word.update(|report| report.checkpoint_digest = Some(judged.digest.clone()));
    let judged_step = judged.manifest.step;
    let evaluated = std::mem::take(&mut surroundings.evaluated);
    let is_judged = |one: &Evaluated| one.step == judged_step && one.at_once == AtOnce::from(&state);
    let known = evaluated.into_iter().find(is_judged).map(|one| one.measurement);
    let mut evaluation = Evaluation {
        config,
        prepared: &planned.prepared,
        at_once: (&state).into(),
        stop: context.stop,
        observer: &mut *surroundings.observer,
        run: context.run,
    };
    let Some(validation) = evaluation.validate(&model, &mut parameters, &source, judged_step, known)? else {
        return Err(Error::Stopped { step: state.step });
    };
    surroundings.emit_event(&Event::Validated(Box::new(validation)))?;
    let (wall_seconds, energy_joules) = surroundings.spent();
    let usage = usage(config, planned, &state, wall_seconds, energy_joules);
    last_word.update(|report| {
        report.usage = usage;
        if let Some(plan) = &mut report.plan {
            plan.measured_peak = device::peak_memory(planned.chosen.device);
            plan.measured_seconds = state.train_seconds;
        }
    });
    Ok(())
}

/// The digest of what decides the trained weights: a checkpoint is continued by the same only.
fn training_digest(config: &RunConfig) -> String {
    let mut hyperparameters = config.hyperparameters.clone();
    // It changes nothing beyond rounding, and the memory fallback lowers it.
    hyperparameters.micro_batch_tokens = None;
    let validation = &config.validation;
    let decides = json!({
        "method": config.method,
        "hyperparameters": hyperparameters,
        "everySteps": validation.every_steps,
        "metric": validation.metric,
        "earlyStopping": config.early_stopping,
    });
    digest_of(decides.to_string().as_bytes())
}

fn open_store(config: &RunConfig, context: &Context, planned: &Planned) -> Result<Store, Error> {
    let prepared = &planned.prepared;
    let identity = Identity {
        job_uid: config.job.uid.clone(),
        config: training_digest(config),
        // Validation rows decide which checkpoint is best and when to stop.
        dataset: digest_of(format!("{}\n{}", prepared.train.digest(), prepared.validation.digest()).as_bytes()),
        base_model: prepared.base.digest.clone(),
    };
    let class = EquivalenceClass {
        trainer: env!("CARGO_PKG_VERSION").to_owned(),
        libtorch: crate::compute::shim::libtorch_version(),
        device: planned.chosen.device_name.clone(),
        precision: format!("{:?}", planned.chosen.kind),
        threads: planned.chosen.threads,
    };
    Ok(Store::open(context.run, identity, class, context.claim(config))?)
}

/// What the model of a run is built from.
pub fn model_source<'a>(config: &'a RunConfig, planned: &'a Planned) -> model::Source<'a> {
    let prepared = &planned.prepared;
    let scored = prepared.train.longest().max(prepared.longest_measured()) as i64;
    let max_positions = scored.max(longest_answered(&prepared.generation));
    model::Source {
        folder: &prepared.base.folder,
        method: Some(&config.method),
        optimizer: config.hyperparameters.optimizer,
        kind: planned.chosen.kind,
        device: planned.chosen.device,
        seed: config.hyperparameters.seed,
        max_positions,
    }
}

/// The checkpoint that is judged: the best, or the last; and what should be known about the choice.
fn judged_checkpoint(config: &RunConfig, store: &Store, state: &TrainState) -> Result<(Stored, Option<String>), Error> {
    let mut warning = None;
    if let (Evaluate::Best, Some(best)) = (config.validation.evaluate, state.best) {
        if let Some(stored) = store.find(best.step)? {
            return Ok((stored, None));
        }
        warning =
            Some(format!("the best checkpoint, step {}, is damaged or gone; the last weights are judged", best.step));
    }
    match store.find(state.step)? {
        Some(stored) => Ok((stored, warning)),
        None => Err(Error::LastCheckpointLost { step: state.step }),
    }
}

fn usage(
    config: &RunConfig,
    planned: &Planned,
    state: &TrainState,
    wall_seconds: f64,
    energy_joules: Option<f64>,
) -> Usage {
    let price = config.resources.price_per_hour;
    let cost = |seconds: f64| price.map(|price| seconds / 3600.0 * price);
    // The estimates' ratio, applied to what was measured: the other method on the same machine.
    let full = match config.method {
        Method::Full { .. } => None,
        Method::LoRA { .. } | Method::QLoRA { .. } => {
            cost(wall_seconds + state.train_seconds * (planned.alternative.seconds / planned.estimate.seconds - 1.0))
        }
    };
    Usage {
        wall_seconds,
        train_seconds: state.train_seconds,
        input_tokens: state.input_tokens,
        trained_tokens: state.trained_tokens,
        energy_joules,
        cost: cost(wall_seconds),
        full_fine_tuning_cost: full,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_computes_as_much_at_once_as_before_if_the_plan_allows() {
        let planned = AtOnce { micro_batch_tokens: 512, cache_tokens: 4096 };
        let resumed = |micro_batch_tokens, cache_tokens| {
            let mut state = TrainState { micro_batch_tokens, cache_tokens, ..TrainState::default() };
            let told = resume_at_once(planned, &mut state);
            ((state.micro_batch_tokens, state.cache_tokens), told)
        };
        assert_eq!(resumed(512, 4096), ((512, 4096), Vec::new()));
        // A checkpoint that does not tell.
        assert_eq!(resumed(512, 0), ((512, 4096), Vec::new()));
        let (kept, told) = resumed(256, 1024);
        assert_eq!((kept, told.len()), ((256, 1024), 2));
        assert!(told[0].contains("go on with 256") && told[1].contains("room for 1024"), "{told:?}");
        let (lowered, told) = resumed(1024, 8192);
        assert_eq!((lowered, told.len()), ((512, 4096), 2));
        assert!(told[0].contains("had 1024") && told[1].contains("had it for 8192"), "{told:?}");
    }
}
