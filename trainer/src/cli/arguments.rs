//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use crds::exit::ExitCode;
use crds::run::{PodStage, Precision};

use crate::run::pod::Order;

/// Fine-tunes and validates a language model from a FineTuneJob file.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Fine-tune, validate and write the result; continues where an earlier run of the same file stopped
    Run {
        #[command(flatten)]
        job: RunArguments,
        #[command(flatten)]
        pod: PodArguments,
        /// Serve GET /status, /metrics and /healthz here, for example 127.0.0.1:9464
        #[arg(long)]
        listen: Option<SocketAddr>,
    },
    /// Tell memory, steps, time and cost without training
    Plan(JobArguments),
    /// Train a few steps and tell where their time goes, beside what the machine could do
    Profile {
        #[command(flatten)]
        job: JobArguments,
        /// Where the Chrome trace goes (chrome://tracing, Perfetto); by default profile.json in the run directory
        #[arg(long)]
        trace: Option<PathBuf>,
    },
    /// Check the file without running it
    Check {
        /// A FineTuneJob
        file: PathBuf,
        #[command(flatten)]
        local: LocalArguments,
    },
    /// Answer a prompt with a model, or with the result of a run
    Generate {
        /// A model folder, or the output folder of a run
        folder: PathBuf,
        /// What to answer
        prompt: String,
        /// Base model folder of an adapter, where it is not where the adapter says
        #[arg(long)]
        base: Option<PathBuf>,
        /// New tokens at most
        #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(i64).range(1..))]
        max_new_tokens: i64,
        /// Number format of weights and activations
        #[arg(long, value_enum, default_value_t = PrecisionArgument::Auto)]
        precision: PrecisionArgument,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum PrecisionArgument {
    Auto,
    Bf16,
    Fp32,
}

impl Arguments {
    /// Whether something is computed: an accelerator takes a while to be found, and is none of the other commands' business.
    pub fn computes(&self) -> bool {
        match &self.command {
            Command::Run { pod, .. } => pod.stage.is_none_or(|stage| stage == StageArgument::Train),
            Command::Plan(_) | Command::Profile { .. } | Command::Generate { .. } => true,
            Command::Check { .. } => false,
        }
    }
}

impl PrecisionArgument {
    pub(super) fn precision(self) -> Precision {
        match self {
            Self::Auto => Precision::Auto,
            Self::Bf16 => Precision::BF16,
            Self::Fp32 => Precision::FP32,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct RunArguments {
    /// A FineTuneJob
    #[arg(required_unless_present = "config", conflicts_with = "config")]
    pub(super) file: Option<PathBuf>,
    /// Run directory; by default runs/<name>
    #[arg(long, conflicts_with = "config")]
    pub(super) dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) local: LocalArguments,
}

// No comment for clap here, as below.
#[derive(Debug, clap::Args)]
pub(super) struct LocalArguments {
    /// File of profiles (prices, allowed sources)
    #[arg(long)]
    pub(super) profiles: Option<PathBuf>,
    /// Folder that stands for a claim of pvc:// sources; may be repeated
    #[arg(long = "claim", value_name = "NAME=FOLDER", value_parser = stand_in)]
    pub(super) claims: Vec<(String, PathBuf)>,
}

fn stand_in(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok((name.into(), folder.into())),
        _ => Err("expected NAME=FOLDER".into()),
    }
}

// No comment for clap here: it would stand in the place of the command's own.
#[derive(Debug, clap::Args)]
pub(super) struct PodArguments {
    /// Run configuration, as the operator writes it, instead of a FineTuneJob
    #[arg(long, requires_all = ["stage", "attempt"])]
    config: Option<PathBuf>,
    /// The stage to run
    #[arg(long, value_enum, requires = "config")]
    stage: Option<StageArgument>,
    /// Attempt number, counted from 1 in each stage
    #[arg(long, requires = "config", value_parser = clap::value_parser!(i32).range(1..))]
    attempt: Option<i32>,
    /// The stage whose last word `--stage report` hands on
    #[arg(long, value_enum, requires = "config", required_if_eq("stage", "report"))]
    of: Option<StageArgument>,
    /// File that may say `stopRequested: true` while the run goes on; it may be absent
    #[arg(long, requires = "config")]
    control: Option<PathBuf>,
    /// Where the last word goes, in at most 4096 bytes
    #[arg(long, requires = "config")]
    termination_message: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum StageArgument {
    Prepare,
    Train,
    Publish,
    Report,
}

impl StageArgument {
    const fn stage(self) -> PodStage {
        match self {
            Self::Prepare => PodStage::Prepare,
            Self::Train => PodStage::Train,
            Self::Publish => PodStage::Publish,
            Self::Report => PodStage::Report,
        }
    }
}

impl PodArguments {
    /// What the pod is to do, if it is one.
    pub(super) fn order(&self, listen: Option<SocketAddr>) -> Option<Order<'_>> {
        Some(Order {
            config: self.config.as_deref()?,
            stage: self.stage?.stage(),
            attempt: self.attempt?,
            of: self.of.map(StageArgument::stage),
            control: self.control.as_deref(),
            termination_message: self.termination_message.as_deref(),
            listen,
        })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct JobArguments {
    /// A FineTuneJob
    pub(super) file: PathBuf,
    /// Run directory; by default runs/<name>
    #[arg(long)]
    pub(super) dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) local: LocalArguments,
}

/// The arguments of the process. Otherwise help, version or usage has been printed, and this is the exit code: clap's own
/// for a wrong command line is none of the table's.
pub fn parse_arguments(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Arguments, ExitCode> {
    Arguments::try_parse_from(arguments).map_err(|error| {
        // Nobody is left to tell that standard output or standard error is closed.
        let _ = error.print();
        if error.use_stderr() { ExitCode::BadConfiguration } else { ExitCode::Done }
    })
}
