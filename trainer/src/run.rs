//! One run from configuration to report: prepare, plan, train, evaluate, publish. The same stages that a cluster runs in
//! separate pods run here one after another.

mod evaluation;
mod planning;
mod publishing;
mod surroundings;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crds::exit::ExitCode;
use crds::report::{Failure, Report, Stage, Usage};
use crds::run::{Evaluate, Method, RunConfig};
use serde_json::json;

use crate::checkpoint::{self, EquivalenceClass, Identity, Store, Stored, digest_of, write_atomically};
use crate::data::example::Examples;
use crate::data::generation::max_new_tokens;
use crate::device::{self, EnergyMeter};
use crate::export;
use crate::history::History;
use crate::model::{self, Built, build};
use crate::plan;
use crate::prepare;
use crate::record::{Event, Observer};
use crate::signal::Stop;
use crate::source::HubSettings;
use crate::train::{self, Outcome, TrainState, train};
pub use planning::{Planned, plan_run};
use publishing::publish;
use surroundings::{Earlier, RunSurroundings};

/// A run ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Fetching, checking or tokenising.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// The model cannot be built.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// It does not fit.
    #[error(transparent)]
    Plan(#[from] plan::DoesNotFit),
    /// Checkpoints.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// Training.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// The output.
    #[error(transparent)]
    Export(#[from] export::Error),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::Error),
    /// Weights that were just written cannot be read.
    #[error(transparent)]
    Weights(#[from] crate::weights::Error),
    /// The run directory cannot be written.
    #[error("{}: cannot be written ({source}); free space or choose another --dir", path.display())]
    Write {
        /// The run directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A gate needs what was not measured.
    #[error("spec.validation: {0}")]
    CannotValidate(String),
    /// A stop was asked for.
    #[error("stopped at step {step}; run the same command again to continue")]
    Stopped {
        /// Completed and committed steps.
        step: i64,
    },
    /// The job asks for an accelerator and there is none.
    #[error(
        "spec.resources asks for an accelerator and none can be used here ({0}); remove it from the resources to train on the CPU, \
         or run where there is one"
    )]
    NoAccelerator(String),
    /// Memory ran out outside a step, where nothing smaller could be tried.
    #[error("out of memory ({0}); lower hyperparameters.maxSequenceLength or give the job more memory")]
    OutOfMemory(String),
    /// A bug of ours.
    #[error("a bug in finetune-trainer {version}: {message}; please report it with the FineTuneJob", version = env!("CARGO_PKG_VERSION"))]
    Bug {
        /// The panic's message.
        message: String,
    },
}

impl Error {
    /// What a panic means: libtorch reports exhausted memory as one, everything else is a bug.
    pub fn from_panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = train::panic_text(payload).unwrap_or("no message");
        let first = text.lines().next().unwrap_or_default().to_owned();
        if train::is_out_of_memory(text) { Self::OutOfMemory(first) } else { Self::Bug { message: first } }
    }

    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Prepare(error) => error.exit(),
            Self::Model(error) => error.exit(),
            Self::Plan(error) => error.exit(),
            Self::Checkpoint(error) => error.exit(),
            Self::Train(error) => error.exit(),
            Self::Export(error) => error.exit(),
            Self::Tokenizer(error) => error.exit(),
            Self::Weights(error) => error.exit(),
            Self::Write { .. } => ExitCode::CannotWrite,
            Self::CannotValidate(_) | Self::NoAccelerator(_) => ExitCode::BadConfiguration,
            Self::Stopped { .. } => ExitCode::Preempted,
            Self::OutOfMemory(_) => ExitCode::OutOfMemory,
            Self::Bug { .. } => ExitCode::InternalError,
        }
    }
}

/// What a run needs beside its configuration.
#[derive(Debug)]
pub struct Context<'a> {
    /// The run directory.
    pub run: &'a Path,
    /// How the hub is reached.
    pub hub: &'a HubSettings,
    /// Whether libtorch's CUDA half is loaded.
    pub cuda: &'a Result<(), String>,
    /// The request to stop.
    pub stop: &'a Stop,
}

/// The digest of what a configuration says, whichever attempt it is and whatever it costs.
pub fn config_digest(config: &RunConfig) -> String {
    let mut config = config.clone();
    config.job.attempt = None;
    config.resources.price_per_hour = None;
    digest_of(serde_json::to_string(&config).expect("a configuration is JSON").as_bytes())
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

/// The report of an earlier run of the same configuration on the same rows that came to its end.
pub fn finished(config: &RunConfig, run: &Path) -> Option<Report> {
    let report: Report = serde_json::from_slice(&std::fs::read(run.join("report.json")).ok()?).ok()?;
    if report.stage != Stage::Succeeded || report.config_digest != config_digest(config) {
        return None;
    }
    let is_there =
        |path: &str, digest: &str| checkpoint::digest_file(Path::new(path)).is_ok_and(|found| found == digest);
    // A commit of the hub does not change.
    let files =
        report.data.as_ref()?.sources.iter().filter_map(|source| Some((source.uri.strip_prefix("file://")?, source)));
    let same_rows = files.into_iter().all(|(path, source)| is_there(path, &source.digest));
    let output_is_there = report.artifact.as_ref().is_none_or(|artifact| {
        let folder = artifact.uri.trim_start_matches("file://");
        let weights = export::weights_file(Path::new(folder));
        weights.is_some_and(|path| is_there(&path.to_string_lossy(), &artifact.digest))
    });
    (same_rows && output_is_there).then_some(report)
}

/// Runs to the end, or to the next durable checkpoint after a stop was asked for. The report is on disk in either case.
pub fn run(config: &RunConfig, context: &Context, observer: &mut dyn Observer) -> Result<Report, Error> {
    let mut report = Report {
        job_uid: config.job.uid.clone(),
        attempt: config.job.attempt.unwrap_or(0),
        stage: Stage::Preparing,
        failure: None,
        step: 0,
        total_steps: 0,
        resumed_from_step: None,
        checkpoint_digest: None,
        config_digest: config_digest(config),
        dataset_digest: None,
        model_revision: None,
        data: None,
        plan: None,
        metrics: Vec::new(),
        validation: None,
        usage: Usage::default(),
        artifact: None,
    };
    // The last word is written whatever happens, a panic included.
    let attempted = std::panic::AssertUnwindSafe(|| stages(config, context, observer, &mut report));
    let result = std::panic::catch_unwind(attempted).unwrap_or_else(|payload| Err(Error::from_panic(payload.as_ref())));
    if let Err(error) = &result {
        report.failure = Some(Failure::new(error.exit(), error.to_string()));
        if error.exit() != ExitCode::Preempted {
            report.stage = Stage::Failed;
        }
    }
    let text = serde_json::to_vec_pretty(&report).expect("a report is JSON");
    let written = write_atomically(&context.run.join("report.json"), &text);
    result?;
    written.map_err(|source| Error::Write { path: context.run.into(), source })?;
    Ok(report)
}

fn stages(
    config: &RunConfig,
    context: &Context,
    observer: &mut dyn Observer,
    report: &mut Report,
) -> Result<(), Error> {
    let started = Instant::now();
    let energy = EnergyMeter::start();
    let planned = plan_run(config, context, observer)?;
    let write = |source| Error::Write { path: context.run.into(), source };
    for event in planned.derived(config) {
        observer.observe(&event).map_err(write)?;
    }
    report.data = Some(planned.prepared.report.clone());
    report.model_revision.clone_from(&planned.prepared.model_revision);
    report.dataset_digest = Some(planned.prepared.train.digest().to_owned());
    report.plan = Some(planned.report());
    report.total_steps = planned.schedule.total_steps;

    let mut store = open_store(config, context, &planned)?;
    report.attempt = store.attempt();
    let source = model_source(config, &planned);
    let Built { model, mut parameters } = build(&source)?;
    let mut state = TrainState {
        evaluated_step: -1,
        micro_batch_tokens: planned.estimate.micro_batch_tokens,
        ..TrainState::default()
    };
    if config.checkpoint.resume {
        let (stored, warnings) = store.latest()?;
        for warning in warnings {
            observer.observe(&Event::Warning(warning)).map_err(write)?;
        }
        if let Some(stored) = stored {
            state = surroundings::restore(&stored, &mut parameters)?;
            report.resumed_from_step = Some(state.step);
            let inexact_because = store.inexact_because(&stored);
            observer.observe(&Event::Resumed { step: state.step, inexact_because }).map_err(write)?;
        }
    } else if let Some(aside) = store.set_aside()? {
        let text = format!("checkpoint.resume is Never: earlier checkpoints were moved to {}", aside.display());
        observer.observe(&Event::Warning(text)).map_err(write)?;
    }
    observer.observe(&Event::Attempt { number: store.attempt(), step: state.step }).map_err(write)?;

    observer.observe(&Event::Stage(Stage::Training)).map_err(write)?;
    report.stage = Stage::Training;
    let history = History::open(context.run, state.step, state.evaluated_step).map_err(write)?;
    let earlier = Earlier { seconds: state.wall_seconds, joules: state.energy_joules };
    let mut surroundings =
        RunSurroundings { config, context, planned: &planned, observer, history, store, started, energy, earlier };
    let loop_plan = surroundings::loop_plan(config, &planned);
    let outcome = train(&model, &mut parameters, &mut state, &loop_plan, context.stop, &mut surroundings);
    report.step = state.step;
    let title = format!("{}: loss", config.job.name);
    let best = state.best.map(|best| (best.step, best.value));
    surroundings.history.write_summaries(planned.schedule.total_steps, best, &title).map_err(write)?;
    report.metrics = surroundings.history.newest();
    if outcome? == Outcome::Yielded {
        return Err(Error::Stopped { step: state.step });
    }

    surroundings.emit_event(&Event::Stage(Stage::Evaluating))?;
    report.stage = Stage::Evaluating;
    let judged = judged_checkpoint(config, &surroundings.store, &state)?;
    if let (None, Evaluate::Best, Some(best)) = (&judged, config.validation.evaluate, state.best) {
        let text = format!("the best checkpoint, step {}, is damaged or gone; the last weights are judged", best.step);
        surroundings.emit_event(&Event::Warning(text))?;
    }
    if let Some(stored) = &judged {
        surroundings::restore_weights(stored, &mut parameters)?;
        report.checkpoint_digest = Some(stored.digest.clone());
    }
    let judged_step = judged.as_ref().map_or(state.step, |stored| stored.manifest.step);
    let mut evaluation = evaluation::Evaluation {
        config,
        prepared: &planned.prepared,
        micro_batch_tokens: state.micro_batch_tokens,
        stop: context.stop,
        observer: &mut *surroundings.observer,
        run: context.run,
    };
    let Some(validation) = evaluation.validate(&model, &mut parameters, &source, judged_step, judged.as_ref())? else {
        return Err(Error::Stopped { step: state.step });
    };
    surroundings.emit_event(&Event::Validated(Box::new(validation.clone())))?;
    let gate_failed = validation.verdict == crds::report::Verdict::GateFailed;
    report.validation = Some(validation);
    let (wall_seconds, energy_joules) = surroundings.spent();
    report.usage = usage(config, &planned, &state, wall_seconds, energy_joules);
    if let Some(plan) = &mut report.plan {
        plan.measured_peak = device::peak_memory(planned.chosen.device);
        plan.measured_seconds = state.train_seconds;
    }

    if !gate_failed || config.output.publish_always {
        surroundings.emit_event(&Event::Stage(Stage::Publishing))?;
        report.stage = Stage::Publishing;
        report.artifact = Some(publish(config, context, &planned, &parameters, report)?);
    }
    report.stage = Stage::Succeeded;
    Ok(())
}

fn open_store(config: &RunConfig, context: &Context, planned: &Planned) -> Result<Store, Error> {
    let prepared = &planned.prepared;
    let identity = Identity {
        job_uid: config.job.uid.clone(),
        config: training_digest(config),
        // Validation rows decide which checkpoint is best and when to stop.
        dataset: digest_of(format!("{}\n{}", prepared.train.digest(), prepared.validation.digest()).as_bytes()),
        base_model: prepared.model_digest.clone(),
    };
    let class = EquivalenceClass {
        trainer: env!("CARGO_PKG_VERSION").to_owned(),
        libtorch: crate::shim::libtorch_version(),
        device: planned.chosen.device_name.clone(),
        precision: format!("{:?}", planned.chosen.kind),
        threads: planned.chosen.threads,
    };
    Ok(Store::open(context.run, identity, class, config.job.attempt)?)
}

fn model_source<'a>(config: &'a RunConfig, planned: &'a Planned) -> model::Source<'a> {
    let prepared = &planned.prepared;
    let new_tokens = max_new_tokens(&prepared.generation) as usize;
    let prompts = prepared
        .generation
        .iter()
        .map(|row| row.few_shot_prompt.as_ref().map_or(0, Vec::len).max(row.prompt.len()) + new_tokens);
    let examples = [&prepared.train, &prepared.validation, &prepared.few_shot, &prepared.forgetting];
    let max_positions = prompts.chain(examples.map(Examples::longest)).max().unwrap_or(1) as i64;
    model::Source {
        folder: &prepared.model,
        method: Some(&config.method),
        kind: planned.chosen.kind,
        device: planned.chosen.device,
        seed: config.hyperparameters.seed,
        max_positions,
    }
}

/// The checkpoint that is judged: the best, or `None` for the weights as they are.
fn judged_checkpoint(config: &RunConfig, store: &Store, state: &TrainState) -> Result<Option<Stored>, Error> {
    let wanted = match (config.validation.evaluate, state.best) {
        (Evaluate::Best, Some(best)) => best.step,
        _ => state.step,
    };
    Ok(store.find(wanted)?)
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
        Method::Full {} => None,
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
