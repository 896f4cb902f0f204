//! One run from configuration to report: prepare, train, publish. A local run makes them one after another, a cluster in
//! pods of their own; the stages are the same.

pub mod control;
pub mod crash;
mod evaluation;
pub mod export;
pub mod plan;
mod planning;
pub mod pod;
pub mod prepare;
pub mod profile;
pub mod publish;
mod publishing;
mod saving;
pub mod signal;
mod surroundings;
mod training;
pub mod watchdog;

use std::io;
use std::path::{Path, PathBuf};

use crds::exit::ExitCode;
use crds::report::{Failure, Report, Stage};
use crds::run::{PodStage, RunConfig};

use crate::compute::{device, memory};
use crate::ground::stop::Stop;
use crate::model;
use crate::run::prepare::noted_base;
use crate::run::watchdog::Watchdog;
use crate::source::{Access, Claims, HubSettings};
use crate::store::checkpoint::{self, Claim, claim_stage};
use crate::store::files::{digest_file, digest_of};
use crate::tell::record::{Event, Observer, Observers};
use crate::tell::report::{self, LastWord};
use crate::train;
pub use planning::{Place, Planned, plan_run};
use publishing::publish;
pub use surroundings::loop_plan;
pub use training::model_source;
use training::{Meter, train_stage};

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
    /// The copy of the output.
    #[error(transparent)]
    Publish(#[from] crate::run::publish::Error),
    /// What the stage before left.
    #[error(transparent)]
    Report(#[from] report::Error),
    /// The rows are others than those that were prepared.
    #[error(
        "the training rows are not those that were prepared (found {found}, the prepare stage had {expected}); start a new job"
    )]
    OtherRows {
        /// Digest now.
        found: String,
        /// Digest in the report of prepare.
        expected: String,
    },
    /// The stage before was made with another configuration.
    #[error("the {stage} stage was made with another configuration than this; start a new job", stage = .0.name())]
    OtherConfiguration(PodStage),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] crate::data::tokenizer::Error),
    /// Weights that were just written cannot be read.
    #[error(transparent)]
    Weights(#[from] crate::store::weights::Error),
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
    /// The checkpoint of the last step does not verify.
    #[error("the checkpoint of the last step, {step}, is damaged; the next attempt goes on from the one before it")]
    LastCheckpointLost {
        /// Completed steps.
        step: i64,
    },
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
        let text = memory::panic_text(payload).unwrap_or("no message");
        let first = text.lines().next().unwrap_or_default().to_owned();
        if memory::is_out_of_memory(text) { Self::OutOfMemory(first) } else { Self::Bug { message: first } }
    }

    /// Whether another attempt or another job owns the run directory.
    fn folder_is_of_another(&self) -> bool {
        match self {
            Self::Checkpoint(error) => error.folder_is_of_another(),
            Self::Train(train::Error::Surroundings(error)) => error.folder_is_of_another(),
            Self::Report(report::Error::Foreign { .. }) => true,
            _ => false,
        }
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
            Self::Publish(error) => error.exit(),
            Self::Report(error) => error.exit(),
            Self::OtherRows { .. } => ExitCode::BadData,
            Self::OtherConfiguration(_) => ExitCode::ForeignCheckpoint,
            Self::Tokenizer(error) => error.exit(),
            Self::Weights(error) => error.exit(),
            Self::Write { .. } | Self::LastCheckpointLost { .. } => ExitCode::CannotWrite,
            Self::CannotValidate(_) | Self::NoAccelerator(_) => ExitCode::BadConfiguration,
            Self::Stopped { .. } => ExitCode::Preempted,
            Self::OutOfMemory(_) => ExitCode::OutOfMemory,
            Self::Bug { .. } => ExitCode::InternalError,
        }
    }
}

/// What the environment says; read in `main` only.
#[derive(Debug)]
pub struct Environment {
    /// How the hub is reached.
    pub hub: HubSettings,
    /// Whether libtorch's CUDA half is loaded; if not, why.
    pub cuda: Result<(), String>,
    /// `ATEN_CPU_CAPABILITY`, where it is set.
    pub cpu_capability: Option<String>,
    /// `metadata.uid` of the pod; empty where there is none.
    pub pod_uid: String,
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
    /// `metadata.uid` of the pod; empty in local runs.
    pub pod_uid: &'a str,
    /// What is said at the end.
    pub last_word: &'a LastWord,
}

impl<'a> Context<'a> {
    /// What the sources of `config` are reached through.
    fn access(&self, config: &'a RunConfig) -> Access<'a> {
        Access { hub: self.hub, claims: claims(config), stop: self.stop, noted: false }
    }

    fn claim(&self, config: &RunConfig) -> Claim<'a> {
        Claim { number: config.job.attempt, pod_uid: self.pod_uid }
    }

    fn write_error(&self) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.run.to_path_buf();
        move |source| Error::Write { path: path.clone(), source }
    }
}

/// Where claims are mounted; a local run has none.
fn claims(config: &RunConfig) -> &Claims {
    static NONE: Claims = Claims::new();
    config.storage.as_ref().map_or(&NONE, |storage| &storage.claims)
}

/// The report of an attempt that has just begun.
pub fn first_report(config: &RunConfig) -> Report {
    Report {
        job_uid: config.job.uid.clone(),
        attempt: config.job.attempt.unwrap_or(0),
        config_digest: config_digest(config),
        ..Report::default()
    }
}

/// The digest of what a configuration says, whichever attempt it is, whatever it costs and whatever is told of the accelerator.
pub fn config_digest(config: &RunConfig) -> String {
    let mut config = config.clone();
    config.job.attempt = None;
    config.resources.price_per_hour = None;
    config.resources.accelerator_memory_bytes = None;
    digest_of(serde_json::to_string(&config).expect("a configuration is JSON").as_bytes())
}

/// The report of an earlier run of the same configuration on the same rows that came to its end.
pub fn finished(config: &RunConfig, run: &Path) -> Option<Report> {
    let report: Report = serde_json::from_slice(&std::fs::read(run.join("report.json")).ok()?).ok()?;
    if report.stage != Stage::Succeeded || report.config_digest != config_digest(config) {
        return None;
    }
    let is_there = |path: &str, digest: &str| digest_file(Path::new(path)).is_ok_and(|found| found == digest);
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

/// Runs all stages to the end, or to the next durable checkpoint after a stop was asked for. The last word is said in either
/// case.
pub fn run(config: &RunConfig, context: &Context, observer: &mut dyn Observer) -> Result<Report, Error> {
    attempt(context, observer, |observer| {
        let meter = Meter::start();
        let planned = plan_run(config, context, Place::Here, observer)?;
        train_stage(config, context, &planned, meter, observer)?;
        publish_stage(config, context, &planned.prepared.base, observer)
    })
}

/// Runs one stage of a job whose other stages run elsewhere. The last word is said in any case.
pub fn run_stage(
    config: &RunConfig,
    stage: PodStage,
    context: &Context,
    observer: &mut dyn Observer,
) -> Result<Report, Error> {
    attempt(context, observer, |observer| match stage {
        PodStage::Prepare => {
            claim_stage(context.run, stage.name(), &config.job.uid, context.claim(config))?;
            check_destination(config)?;
            plan_run(config, context, Place::Elsewhere, observer).map(|_| ())
        }
        PodStage::Train => {
            let meter = Meter::start();
            let prepared = report::read_done(context.run, &config.job.uid, PodStage::Prepare)?;
            check_configuration(config, PodStage::Prepare, &prepared)?;
            let planned = plan_run(config, context, Place::Prepared, observer)?;
            let found = planned.prepared.train.digest();
            match prepared.dataset_digest {
                Some(expected) if expected != found => Err(Error::OtherRows { found: found.to_owned(), expected }),
                _ => train_stage(config, context, &planned, meter, observer),
            }
        }
        PodStage::Publish => {
            let trained = report::read_done(context.run, &config.job.uid, PodStage::Train)?;
            check_configuration(config, PodStage::Train, &trained)?;
            claim_stage(context.run, stage.name(), &config.job.uid, context.claim(config))?;
            context.last_word.continue_from(&trained);
            observer.observe(&Event::Trained(Box::new(trained))).map_err(context.write_error())?;
            device::limit_threads(config.resources.cpus);
            let base = noted_base(config, context.run, context.access(config))?;
            publish_stage(config, context, &base, observer)
        }
        PodStage::Report => unreachable!("a report is handed on without a run"),
    })
}

/// Refuses an output that could never be put where it is to go, before an accelerator is taken. Where its claim is not mounted
/// yet, the publish stage looks.
fn check_destination(config: &RunConfig) -> Result<(), Error> {
    use crate::run::publish::{Destination, Error as Refused};
    let opened = config.output.uri.as_ref().map(|uri| Destination::open(uri, &config.job, claims(config)));
    match opened {
        Some(Err(refused @ (Refused::Reserved { .. } | Refused::Occupied { .. }))) => Err(refused.into()),
        _ => Ok(()),
    }
}

fn check_configuration(config: &RunConfig, stage: PodStage, report: &Report) -> Result<(), Error> {
    if report.config_digest == config_digest(config) { Ok(()) } else { Err(Error::OtherConfiguration(stage)) }
}

/// Makes `stages`, and says the last word whatever happens, a panic included.
fn attempt(
    context: &Context,
    observer: &mut dyn Observer,
    stages: impl FnOnce(&mut dyn Observer) -> Result<(), Error>,
) -> Result<Report, Error> {
    let last_word = context.last_word;
    let mut noting = last_word.clone();
    let watching = Watchdog::start(context.stop.clone(), last_word.clone());
    let mut watching = watching.map_err(context.write_error())?;
    let mut observers = Observers(vec![&mut noting, &mut watching, observer]);
    let attempted = std::panic::AssertUnwindSafe(|| stages(&mut observers));
    let result = std::panic::catch_unwind(attempted).unwrap_or_else(|payload| Err(Error::from_panic(payload.as_ref())));
    if result.as_ref().is_err_and(Error::folder_is_of_another) {
        last_word.leave_volume();
    }
    let said = last_word.say(result.as_ref().err().map(|error| Failure::new(error.exit(), error.to_string())));
    result?;
    said.map_err(context.write_error())?;
    Ok(last_word.report())
}

/// Writes what training left, if it is to be written.
fn publish_stage(
    config: &RunConfig,
    context: &Context,
    base: &prepare::Base,
    observer: &mut dyn Observer,
) -> Result<(), Error> {
    let artifact = publish(config, context, base, &context.last_word.report(), observer)?;
    context.last_word.update(|report| report.artifact = artifact);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By this digest a run that has begun is known again: of another one its checkpoints would be refused.
    #[test]
    fn a_configuration_of_an_earlier_day_has_the_digest_that_it_had() {
        let golden = include_str!("../../crds/src/run/golden/minimal.yaml");
        let mut config = RunConfig::from_yaml(golden).expect("an earlier operator's");
        let digest = config_digest(&config);
        assert_eq!(digest, "sha256:9f4cc3824f6f4a6d0c1b3f143753f81a2e9a081cae5d9264b48c4e6ed9f8a246");
        // Which attempt it is and what it costs is none of its business.
        config.job.attempt = Some(7);
        config.resources.price_per_hour = Some(1.5);
        assert_eq!(config_digest(&config), digest);
    }
}
