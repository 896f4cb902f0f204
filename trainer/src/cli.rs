//! The commands. Results go to standard output, everything else to standard error.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Parser, Subcommand};
use crds::check::{Scope, check};
use crds::exit::ExitCode;
use crds::profile::{Profile, parse as parse_profiles};
use crds::resolve::{Target, resolve};
use crds::run::{Method, Precision, RunConfig};

use crate::display::{Display, summary};
use crate::generate::{Limits, generate};
use crate::linear::Adapters;
use crate::model::{Source, build};
use crate::record::Observers;
use crate::run::{Context, finished, plan_run, run};
use crate::serve::{Server, Telemetry};
use crate::signal::Stop;
use crate::source::HubSettings;
use crate::tokenizer::Tokenizer;
use crate::train::is_out_of_memory;

/// Fine-tunes and validates a language model from a FineTuneJob file.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune, validate and write the result; continues where an earlier run of the same file stopped
    Run {
        #[command(flatten)]
        job: JobArguments,
        /// Serve GET /status, /metrics and /healthz here, for example 127.0.0.1:9464
        #[arg(long)]
        listen: Option<SocketAddr>,
    },
    /// Tell memory, steps, time and cost without training
    Plan(JobArguments),
    /// Check the file without running it
    Check {
        /// A FineTuneJob
        file: PathBuf,
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
        #[arg(long, default_value_t = 256)]
        max_new_tokens: i64,
        /// Number format of weights and activations
        #[arg(long, value_enum, default_value_t = PrecisionArgument::Auto)]
        precision: PrecisionArgument,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PrecisionArgument {
    Auto,
    Bf16,
    Fp32,
}

impl PrecisionArgument {
    fn precision(self) -> Precision {
        match self {
            Self::Auto => Precision::Auto,
            Self::Bf16 => Precision::BF16,
            Self::Fp32 => Precision::FP32,
        }
    }
}

#[derive(Debug, clap::Args)]
struct JobArguments {
    /// A FineTuneJob
    file: PathBuf,
    /// Run directory; by default runs/<name>
    #[arg(long)]
    dir: Option<PathBuf>,
    /// File of profiles (prices, allowed sources)
    #[arg(long)]
    profiles: Option<PathBuf>,
}

/// What the environment says; read in `main` only.
#[derive(Debug)]
pub struct Environment {
    /// How the hub is reached.
    pub hub: HubSettings,
    /// Whether libtorch's CUDA half is loaded; if not, why.
    pub cuda: Result<(), String>,
}

fn fail(exit: ExitCode, message: &str) -> ExitCode {
    eprintln!("error: {message}");
    exit
}

/// Reports a panic: a bug of ours, or exhausted memory that libtorch reports as one.
pub fn report_panic(text: &str) -> ExitCode {
    let first = text.lines().next().unwrap_or_default();
    if is_out_of_memory(text) {
        let message =
            format!("out of memory ({first}); lower hyperparameters.maxSequenceLength or give the job more memory");
        return fail(ExitCode::OutOfMemory, &message);
    }
    let message = format!(
        "a bug in finetune-trainer {}: {first}; please report it with the FineTuneJob",
        env!("CARGO_PKG_VERSION")
    );
    fail(ExitCode::InternalError, &message)
}

/// Executes a command.
pub fn execute(arguments: &Arguments, environment: &Environment) -> ExitCode {
    let result = match &arguments.command {
        Command::Run { job, listen } => run_job(job, *listen, environment),
        Command::Plan(job) => plan_job(job, environment),
        Command::Check { file } => check_file(file),
        Command::Generate { folder, prompt, base, max_new_tokens, precision } => {
            let chosen = crate::device::choose(precision.precision(), &environment.cuda);
            answer(folder, prompt, base.as_deref(), *max_new_tokens, &chosen)
        }
    };
    result.unwrap_or_else(|(exit, message)| fail(exit, &message))
}

type Outcome = Result<ExitCode, (ExitCode, String)>;

/// Checks and resolves a file; the message lists every problem with its place.
fn load(file: &Path, profiles: Option<&Path>) -> Result<RunConfig, (ExitCode, String)> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).map_err(|error| {
            let exit = if error.kind() == std::io::ErrorKind::NotFound {
                ExitCode::InputNotFound
            } else {
                ExitCode::BadConfiguration
            };
            (exit, format!("{}: cannot be read ({error})", path.display()))
        })
    };
    let text = read(file)?;
    let refuse = |problems: Vec<String>| {
        let lines: Vec<String> = problems.iter().map(|problem| format!("{}:{problem}", file.display())).collect();
        (ExitCode::BadConfiguration, lines.join("\nerror: "))
    };
    let checked =
        check(&text, Scope::Local).map_err(|problems| refuse(problems.iter().map(ToString::to_string).collect()))?;
    let name = checked.job.spec.profile.as_deref().unwrap_or("default");
    let profile = match profiles {
        Some(path) => {
            let all = parse_profiles(&read(path)?).map_err(|error| {
                (ExitCode::BadConfiguration, format!("{}: not a file of profiles: {error}", path.display()))
            })?;
            let known: Vec<&String> = all.keys().collect();
            let known = format!("{known:?}");
            all.get(name).cloned().ok_or_else(|| {
                let problem = checked.problem(
                    "spec.profile",
                    format!("no profile {name} in {}; expected one of {known}", path.display()),
                );
                refuse(vec![problem.to_string()])
            })?
        }
        None if name == "default" => Profile::default(),
        None => {
            let problem =
                checked.problem("spec.profile", format!("profile {name} is not built in; give --profiles FILE"));
            return Err(refuse(vec![problem.to_string()]));
        }
    };
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
    let folder = absolute.parent().unwrap_or(Path::new("/"));
    resolve(&checked.job, &profile, Target::Local { folder }).map_err(|problems| {
        refuse(problems.into_iter().map(|p| checked.problem(&p.field, p.message).to_string()).collect())
    })
}

fn check_file(file: &Path) -> Outcome {
    let config = load(file, None)?;
    println!("{}: {} is valid", file.display(), config.job.name);
    Ok(ExitCode::Done)
}

fn run_directory(job: &JobArguments, config: &RunConfig) -> PathBuf {
    job.dir.clone().unwrap_or_else(|| Path::new("runs").join(&config.job.name))
}

fn run_job(job: &JobArguments, listen: Option<SocketAddr>, environment: &Environment) -> Outcome {
    let config = load(&job.file, job.profiles.as_deref())?;
    let directory = run_directory(job, &config);
    if let Some(report) = finished(&config, &directory) {
        println!("{} is finished, nothing to do; its result:\n\n{}", config.job.name, summary(&report));
        return Ok(ExitCode::Done);
    }
    let stop =
        Stop::on_signals().map_err(|error| (ExitCode::InternalError, format!("signals cannot be handled: {error}")))?;
    let context = Context { run: &directory, hub: &environment.hub, cuda: &environment.cuda, stop: &stop };
    let mut display = Display::new(std::io::stderr().is_terminal());
    let mut telemetry = Telemetry::new(&config.job.name, &config.job.uid)
        .map_err(|error| (ExitCode::InternalError, format!("series cannot be registered: {error}")))?;
    if let Some(address) = listen {
        let server = Server::start(address, Arc::clone(&telemetry)).map_err(|error| {
            (ExitCode::BadConfiguration, format!("--listen {address}: {error}; choose another address"))
        })?;
        eprintln!("serving http://{}/status, /metrics and /healthz", server.address);
    }
    let mut observers = Observers(vec![&mut display, &mut telemetry]);
    match run(&config, &context, &mut observers) {
        Ok(report) => {
            println!("{}", summary(&report));
            Ok(ExitCode::Done)
        }
        Err(error @ crate::Error::ValidationFailed(_)) => {
            if let Some(report) =
                std::fs::read(directory.join("report.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok())
            {
                println!("{}", summary(&report));
            }
            Ok(fail(error.exit(), &error.to_string()))
        }
        Err(error) => Err((error.exit(), error.to_string())),
    }
}

fn plan_job(job: &JobArguments, environment: &Environment) -> Outcome {
    let config = load(&job.file, job.profiles.as_deref())?;
    let directory = run_directory(job, &config);
    let stop =
        Stop::on_signals().map_err(|error| (ExitCode::InternalError, format!("signals cannot be handled: {error}")))?;
    let context = Context { run: &directory, hub: &environment.hub, cuda: &environment.cuda, stop: &stop };
    let mut display = Display::new(std::io::stderr().is_terminal());
    let planned = plan_run(&config, &context, &mut display).map_err(|error| (error.exit(), error.to_string()))?;
    for event in planned.derived(&config) {
        let _ = crate::record::Observer::observe(&mut display, &event);
    }
    println!("{}", planned.describe(&config));
    Ok(ExitCode::Done)
}

/// Answers one prompt through the model's chat template, if it has one.
fn answer(
    folder: &Path,
    prompt: &str,
    base: Option<&Path>,
    max_new_tokens: i64,
    chosen: &crate::device::Chosen,
) -> Outcome {
    let failed = |error: &dyn std::fmt::Display, exit: ExitCode| (exit, error.to_string());
    let adapter = crate::export::read_adapter(folder).map_err(|message| (ExitCode::BadData, message))?;
    let model_folder = match (&adapter, base) {
        (_, Some(base)) => base.to_path_buf(),
        (Some(adapter), None) => PathBuf::from(&adapter.base_model),
        (None, None) => folder.to_path_buf(),
    };
    if !model_folder.is_dir() {
        let message = format!(
            "{}: the adapter's base model {} is no folder here; give it with --base FOLDER",
            folder.display(),
            model_folder.display()
        );
        return Err((ExitCode::InputNotFound, message));
    }
    let method = adapter.as_ref().map(|adapter| Method::LoRA { lora: adapter.lora.clone() });
    let tokenizer = Tokenizer::open(&model_folder).map_err(|error| failed(&error, error.exit()))?;
    let text = crate::data::chat_prompt(&tokenizer, prompt).map_err(|error| failed(&error, error.exit()))?;
    let tokens = tokenizer.encode(&text).map_err(|error| failed(&error, error.exit()))?.ids;
    let max_positions = tokens.len() as i64 + max_new_tokens;
    let source = Source {
        folder: &model_folder,
        method: method.as_ref(),
        kind: chosen.kind,
        device: chosen.device,
        seed: 0,
        max_positions,
    };
    let mut built = build(&source).map_err(|error| failed(&error, error.exit()))?;
    if adapter.is_some() {
        crate::export::load_adapter(folder, &mut built.parameters).map_err(|message| (ExitCode::BadData, message))?;
    }
    let limits =
        Limits { max_new_tokens, end_tokens: tokenizer.end_tokens().to_vec(), stop_text: None, cache_tokens: 0 };
    let answers = generate(&built.model, &[&tokens], Adapters::On, &limits, &Stop::default(), &mut |_| ());
    let answers = answers.expect("nothing asked for a stop");
    println!("{}", tokenizer.decode(&answers[0].tokens).map_err(|error| failed(&error, error.exit()))?.trim());
    Ok(ExitCode::Done)
}
