//! One run from configuration to report: prepare, plan, train, evaluate, publish. The same stages that a cluster runs in
//! separate pods run here one after another.

mod evaluation;
mod surroundings;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crds::exit::ExitCode;
use crds::report::{Artifact, Failure, PlanReport, Report, Stage, Usage};
use crds::run::{Evaluate, Method, OutputFormat, RunConfig};
use serde_json::json;

use crate::checkpoint::{self, EquivalenceClass, Identity, Store, Stored, digest_of, write_atomically};
use crate::data::example::Examples;
use crate::data::generation::max_new_tokens;
use crate::data::order::Order;
use crate::device::{self, Chosen, EnergyMeter};
use crate::evaluate::GENERATION_CACHE_TOKENS;
use crate::export::{self, Weights, model_card, write_output};
use crate::history::History;
use crate::model::{self, Built, Config, build, target_linears};
use crate::optim::Parameters;
use crate::plan::{self, Estimate, display_bytes};
use crate::prepare::{self, Prepared, prepare};
use crate::record::{Event, Observer};
use crate::schedule::Schedule;
use crate::signal::Stop;
use crate::source::HubSettings;
use crate::train::{self, Outcome, TrainState, train};
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

/// Device, prepared rows and plan: everything that is known before anything is trained.
#[derive(Debug)]
pub struct Planned {
    /// Device, dtype, threads.
    pub chosen: Chosen,
    /// Rows and model folder.
    pub prepared: Prepared,
    /// Which examples make up each step.
    pub order: Order,
    /// Learning rates.
    pub schedule: Schedule,
    /// The configured method.
    pub estimate: Estimate,
    /// The other method, for comparison.
    pub alternative: Estimate,
    /// Bytes that there are.
    pub memory: i64,
}

/// Prepares and plans a run; refuses one that cannot fit before anything is allocated.
pub fn plan_run(config: &RunConfig, context: &Context, observer: &mut dyn Observer) -> Result<Planned, Error> {
    let write = |source| Error::Write { path: context.run.into(), source };
    std::fs::create_dir_all(context.run).map_err(write)?;
    observer.observe(&Event::Stage(Stage::Preparing)).map_err(write)?;
    let prepared = prepare(config, context.run, context.hub, context.stop)?;
    observer.observe(&Event::Data(Box::new(prepared.report.clone()))).map_err(write)?;
    let sample = Event::Sample { text: prepared.sample.clone(), path: prepared.sample_path.clone() };
    observer.observe(&sample).map_err(write)?;
    check_gates(config, &prepared)?;
    let chosen = device::choose(config.hyperparameters.precision, config.resources.cpus, context.cuda);
    let model = Config::read(&prepared.model)?;
    let hyperparameters = &config.hyperparameters;
    let batch_size = hyperparameters.batch_size.unsigned_abs() as usize;
    let order = Order::new(hyperparameters.seed, prepared.train.digest(), prepared.train.len(), batch_size);
    let total_steps = order.total_steps(hyperparameters.duration);
    let schedule = Schedule::new(
        hyperparameters.scheduler,
        hyperparameters.learning_rate,
        hyperparameters.warmup_ratio,
        total_steps,
    );
    if config.resources.accelerator && !chosen.device.is_cuda() {
        return Err(Error::NoAccelerator(chosen.device_reason));
    }
    let machine = device::memory_limit(chosen.device).unwrap_or(i64::MAX);
    let memory = config.resources.memory_bytes.map_or(machine, |limit| limit.min(machine));
    let longest = prepared.train.longest() as i64;
    let inputs = plan::Inputs {
        model: &model,
        config,
        kind: chosen.kind,
        accelerator: chosen.device.is_cuda(),
        longest,
        step_tokens: (longest * hyperparameters.batch_size).min(prepared.train.total_tokens() as i64),
        cache_tokens: if prepared.generation.is_empty() { 0 } else { GENERATION_CACHE_TOKENS },
        epoch_tokens: prepared.train.total_tokens() as i64,
        total_steps,
        steps_per_epoch: order.steps_per_epoch(),
        memory,
        matmul_rate: plan::measure_matmul_rate(&model, chosen.kind, chosen.device),
    };
    let estimate = plan::plan(&inputs)?;
    let alternative = plan::estimate(&inputs, &plan::other_method(&config.method));
    Ok(Planned { chosen, prepared, order, schedule, estimate, alternative, memory })
}

/// What the verdict, early stopping or the best checkpoint would hang on and cannot be measured is refused before training,
/// not after it.
fn check_gates(config: &RunConfig, prepared: &Prepared) -> Result<(), Error> {
    use crds::run::{Baseline, Gate, Metric, ValidationRows};
    let refuse = |text: String| Err(Error::CannotValidate(text));
    let validation = &config.validation;
    if config.dataset.validation != ValidationRows::None && prepared.validation.is_empty() {
        let text = format!(
            "no validation row has an answer token within the sequence length of {}, so nothing could be judged; raise \
             hyperparameters.maxSequenceLength or give other validation rows",
            prepared.report.max_sequence_length
        );
        return refuse(text);
    }
    if validation.forgetting.is_some() && prepared.forgetting.is_empty() {
        let text = format!(
            "no row of forgetting.dataset has a token to measure within the sequence length of {}; give other rows or leave \
             forgetting out",
            prepared.report.max_sequence_length
        );
        return refuse(text);
    }
    let gated = |gate: &Gate| match gate {
        Gate::AtMost { metric, .. } | Gate::AtLeast { metric, .. } | Gate::ImprovesOn { metric, .. } => *metric,
    };
    let metrics: Vec<Metric> = validation.gates.iter().map(gated).chain([validation.metric]).collect();
    if metrics.contains(&Metric::ExactMatch) && prepared.generation.is_empty() {
        return refuse("exactMatch needs validation rows with answers (messages, or prompt and completion)".into());
    }
    for gate in &validation.gates {
        let Gate::ImprovesOn { metric, baseline, .. } = gate else { continue };
        let metric_name = metric.name();
        match baseline {
            Baseline::Base if !validation.zero_shot => {
                return refuse(format!(
                    "a gate compares {metric_name} with the base model, which is not measured; set baselines.zeroShot: true"
                ));
            }
            Baseline::FewShot if validation.few_shot_examples == 0 => {
                return refuse(format!(
                    "a gate compares {metric_name} with examples in the prompt, which is not measured; set \
                     baselines.fewShot.examples to 1 or more"
                ));
            }
            Baseline::FewShot => {
                let measurable = match metric {
                    Metric::ExactMatch => prepared.generation.iter().any(|row| row.few_shot_prompt.is_some()),
                    Metric::EvalLoss | Metric::Perplexity | Metric::TokenAccuracy => {
                        prepared.few_shot.total_tokens() > 0
                    }
                };
                if !measurable {
                    return refuse(format!(
                        "a gate compares {metric_name} with examples in the prompt, and no validation row can be measured so: \
                         with {} examples before it none fits into the model's context, or the training rows have another \
                         shape; lower baselines.fewShot.examples",
                        validation.few_shot_examples
                    ));
                }
            }
            Baseline::Base => {}
        }
    }
    Ok(())
}

impl Planned {
    /// The plan as the report has it.
    pub fn report(&self) -> PlanReport {
        PlanReport {
            device: self.chosen.device_name.clone(),
            precision: format!("{:?}", self.chosen.kind),
            memory: self.estimate.memory,
            memory_available: self.memory,
            measured_peak: 0,
            micro_batch_tokens: self.estimate.micro_batch_tokens,
            total_steps: self.schedule.total_steps,
            trainable_parameters: self.estimate.trainable_parameters,
            total_parameters: self.estimate.base_parameters,
            estimated_seconds: self.estimate.seconds,
            measured_seconds: 0.0,
        }
    }

    /// What was derived, and why.
    pub fn derived(&self, config: &RunConfig) -> Vec<Event> {
        let hyperparameters = &config.hyperparameters;
        let chosen = &self.chosen;
        let estimate = &self.estimate;
        let derived = |name, value: String, reason: String| Event::Derived { name, value, reason };
        let method = match &config.method {
            Method::LoRA { lora } | Method::QLoRA { lora, .. } => {
                format!("LoRA, rank {}, alpha {}", lora.rank, lora.alpha)
            }
            Method::Full {} => "full fine-tuning".to_owned(),
        };
        let share = 100.0 * estimate.trainable_parameters as f64 / estimate.base_parameters as f64;
        vec![
            derived("device", chosen.device_name.clone(), chosen.device_reason.clone()),
            derived("precision", format!("{:?}", chosen.kind), chosen.kind_reason.clone()),
            derived("threads", chosen.threads.to_string(), chosen.threads_reason.clone()),
            derived(
                "method",
                method,
                format!(
                    "{} of {} parameters trained, {share:.2} %",
                    estimate.trainable_parameters, estimate.base_parameters
                ),
            ),
            derived(
                "steps",
                self.schedule.total_steps.to_string(),
                format!(
                    "{} rows / {} examples a step = {} steps a pass; {:?}",
                    self.prepared.train.len(),
                    hyperparameters.batch_size,
                    self.order.steps_per_epoch(),
                    hyperparameters.duration
                ),
            ),
            derived(
                "learning rate",
                format!("{:e}", hyperparameters.learning_rate),
                format!("{:?} after {} warm-up steps", hyperparameters.scheduler, self.schedule.warmup_steps),
            ),
            derived(
                "micro-batch",
                format!("{} tokens", estimate.micro_batch_tokens),
                format!("backward pass recomputes: {:?}; the result does not depend on it", estimate.recompute),
            ),
            derived(
                "estimated time",
                crate::display::display_duration(estimate.seconds),
                "from a measured matrix product".into(),
            ),
            Event::Plan(Box::new(self.report())),
        ]
    }

    /// What `plan` prints: the configured method beside the other.
    pub fn describe(&self, config: &RunConfig) -> String {
        let cost = |seconds: f64| {
            config
                .resources
                .price_per_hour
                .map_or(String::new(), |price| format!(", cost {:.4}", seconds / 3600.0 * price))
        };
        let line = |name: &str, estimate: &Estimate| {
            format!(
                "{name:<6} {:>10} of memory{}, {:>9} trained parameters, about {} for {} steps{}",
                display_bytes(estimate.memory.total),
                if estimate.fits { "" } else { " (does not fit)" },
                estimate.trainable_parameters,
                crate::display::display_duration(estimate.seconds),
                self.schedule.total_steps,
                cost(estimate.seconds)
            )
        };
        let (own, other) = match config.method {
            Method::Full {} => ("Full", "LoRA"),
            Method::LoRA { .. } | Method::QLoRA { .. } => ("LoRA", "Full"),
        };
        format!("{}\n{}", line(own, &self.estimate), line(other, &self.alternative))
    }
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
    let result = std::panic::catch_unwind(attempted).unwrap_or_else(|payload| Err(panicked(payload.as_ref())));
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

/// What a panic means: libtorch reports exhausted memory as one, everything else is a bug.
fn panicked(payload: &(dyn std::any::Any + Send)) -> Error {
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("no message");
    let first = text.lines().next().unwrap_or_default().to_owned();
    if train::is_out_of_memory(text) { Error::OutOfMemory(first) } else { Error::Bug { message: first } }
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

fn publish(
    config: &RunConfig,
    context: &Context,
    planned: &Planned,
    parameters: &Parameters,
    report: &Report,
) -> Result<Artifact, Error> {
    let output = context.run.join("output");
    let (lora, kind) = match (&config.method, config.output.format) {
        (Method::LoRA { lora } | Method::QLoRA { lora, .. }, format) => (Some(lora), format),
        (Method::Full {}, _) => (None, OutputFormat::Merged),
    };
    let mut artifact = Artifact {
        uri: format!("file://{}", output.display()),
        digest: String::new(),
        kind,
        lora_rank: lora.filter(|_| kind == OutputFormat::Adapter).map(|lora| lora.rank),
        base_model: config.model.uri.clone(),
    };
    let mut described = report.clone();
    described.artifact = Some(artifact.clone());
    let card = model_card(config, &described);
    let prepared = &planned.prepared;
    let plot = context.run.join("loss.svg");
    artifact.digest = if let (Some(lora), OutputFormat::Adapter) = (lora, kind) {
        let targets = target_linears(lora)?;
        let tensors = surroundings::host_masters(parameters);
        write_output(
            &output,
            &prepared.model,
            &Weights::Adapter {
                lora,
                targets: &targets,
                tensors: &surroundings::views(&tensors),
                base_model: &config.model.uri,
                revision: prepared.model_revision.as_deref(),
            },
            &card,
            &plot,
        )?
    } else {
        let tensors = model::merged(&prepared.model, parameters, lora)?;
        let views = surroundings::views(&tensors);
        write_output(&output, &prepared.model, &Weights::Model { tensors: &views }, &card, &plot)?
    };
    Ok(artifact)
}
