//! The commands. Results go to standard output, everything else to standard error.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Parser, Subcommand};
use crds::check::{Scope, check};
use crds::exit::ExitCode;
use crds::profile;
use crds::report::Verdict;
use crds::resolve::{Target, resolve};
use crds::run::{Method, Optimizer, PodStage, Precision, RunConfig};

use crate::display::{Display, summary};
use crate::export::AdapterInfo;
use crate::generate::{Limits, generate};
use crate::linear::Adapters;
use crate::model::{Config, Source, build};
use crate::pod::{self, Order};
use crate::record::Observers;
use crate::report::LastWord;
use crate::run::{Context, Place, finished, first_report, plan_run, run};
use crate::serve::{Server, Telemetry};
use crate::signal::Stop;
use crate::source::{Access, Claims, HubSettings};
use crate::tokenizer::Tokenizer;

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
enum PrecisionArgument {
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
    fn precision(self) -> Precision {
        match self {
            Self::Auto => Precision::Auto,
            Self::Bf16 => Precision::BF16,
            Self::Fp32 => Precision::FP32,
        }
    }
}

#[derive(Debug, clap::Args)]
struct RunArguments {
    /// A FineTuneJob
    #[arg(required_unless_present = "config", conflicts_with = "config")]
    file: Option<PathBuf>,
    /// Run directory; by default runs/<name>
    #[arg(long, conflicts_with = "config")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    local: LocalArguments,
}

// No comment for clap here, as below.
#[derive(Debug, clap::Args)]
struct LocalArguments {
    /// File of profiles (prices, allowed sources)
    #[arg(long)]
    profiles: Option<PathBuf>,
    /// Folder that stands for a claim of pvc:// sources; may be repeated
    #[arg(long = "claim", value_name = "NAME=FOLDER", value_parser = stand_in)]
    claims: Vec<(String, PathBuf)>,
}

fn stand_in(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok((name.into(), folder.into())),
        _ => Err("expected NAME=FOLDER".into()),
    }
}

// No comment for clap here: it would stand in the place of the command's own.
#[derive(Debug, clap::Args)]
struct PodArguments {
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
    fn order(&self, listen: Option<SocketAddr>) -> Option<Order<'_>> {
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
struct JobArguments {
    /// A FineTuneJob
    file: PathBuf,
    /// Run directory; by default runs/<name>
    #[arg(long)]
    dir: Option<PathBuf>,
    #[command(flatten)]
    local: LocalArguments,
}

/// What the environment says; read in `main` only.
#[derive(Debug)]
pub struct Environment {
    /// How the hub is reached.
    pub hub: HubSettings,
    /// Whether libtorch's CUDA half is loaded; if not, why.
    pub cuda: Result<(), String>,
    /// `metadata.uid` of the pod; empty where there is none.
    pub pod_uid: String,
}

/// Prints a result. A reader that has gone away (`| head`) ends nothing.
fn tell(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints an error.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "error: {text}");
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

fn fail(exit: ExitCode, message: &str) -> ExitCode {
    complain(message);
    exit
}

/// Reports a panic that no run has reported.
pub fn report_panic(payload: &(dyn std::any::Any + Send)) -> ExitCode {
    let error = crate::Error::from_panic(payload);
    fail(error.exit(), &error.to_string())
}

/// Executes a command.
pub fn execute(arguments: &Arguments, environment: &Environment) -> ExitCode {
    let result = match &arguments.command {
        Command::Run { job, pod, listen } => match (pod.order(*listen), &job.file) {
            (Some(order), _) => pod::execute(&order, environment).map(|()| ExitCode::Done),
            (None, Some(file)) => run_job(file, job, *listen, environment),
            (None, None) => unreachable!("clap asks for one of the two"),
        },
        Command::Plan(job) => plan_job(job, environment),
        Command::Profile { job, trace } => profile_job(job, trace.as_ref(), environment),
        Command::Check { file, local } => check_file(file, local),
        Command::Generate { folder, prompt, base, max_new_tokens, precision } => {
            let chosen = crate::device::choose(precision.precision(), None, &environment.cuda);
            answer(folder, prompt, base.as_deref(), *max_new_tokens, &chosen, &environment.hub)
        }
    };
    result.unwrap_or_else(|(exit, message)| fail(exit, &message))
}

type Outcome = Result<ExitCode, (ExitCode, String)>;

/// Checks and resolves a file. The message lists every problem with its place; warnings are told at once.
fn load(file: &Path, local: &LocalArguments, scope: Scope) -> Result<RunConfig, (ExitCode, String)> {
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
    let checked = check(&text, scope).map_err(|problems| refuse(problems.iter().map(ToString::to_string).collect()))?;
    let profiles = match &local.profiles {
        Some(path) => profile::parse(&read(path)?).map_err(|error| {
            (ExitCode::BadConfiguration, format!("{}: not a file of profiles: {error}", path.display()))
        })?,
        None => profile::built_in(),
    };
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let job = absolute(file);
    let claims: BTreeMap<String, PathBuf> =
        local.claims.iter().map(|(name, folder)| (name.clone(), absolute(folder))).collect();
    let target = match scope {
        Scope::Cluster => Target::Cluster,
        Scope::Local => Target::Local { folder: job.parent().unwrap_or(Path::new("/")), claims: &claims },
    };
    let resolved = resolve(&checked.job, &profiles, target).map_err(|problems| {
        refuse(problems.into_iter().map(|p| checked.problem(&p.field, p.message).to_string()).collect())
    })?;
    for warning in resolved.warnings {
        let problem = checked.problem(&warning.field, warning.message);
        let _ = writeln!(std::io::stderr(), "warning: {}:{problem}", file.display());
    }
    Ok(resolved.config)
}

fn check_file(file: &Path, local: &LocalArguments) -> Outcome {
    // A file for a cluster is judged as the cluster would: its claims need not be here.
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let scope =
        if local.claims.is_empty() && check(&text, Scope::Cluster).is_ok() { Scope::Cluster } else { Scope::Local };
    let config = load(file, local, scope)?;
    tell(&format!("{}: {} is valid", file.display(), config.job.name));
    Ok(ExitCode::Done)
}

fn run_directory(dir: Option<&PathBuf>, config: &RunConfig) -> PathBuf {
    dir.cloned().unwrap_or_else(|| Path::new("runs").join(&config.job.name))
}

fn run_job(file: &Path, job: &RunArguments, listen: Option<SocketAddr>, environment: &Environment) -> Outcome {
    let config = load(file, &job.local, Scope::Local)?;
    let directory = run_directory(job.dir.as_ref(), &config);
    if let Some(report) = finished(&config, &directory) {
        tell(&format!("{} is finished, nothing to do; its result:\n\n{}", config.job.name, summary(&report)));
        return Ok(ExitCode::Done);
    }
    let last_word = LastWord::new(first_report(&config), Some(directory.clone()), None);
    let stop = stop_on_signals(&last_word)?;
    let context = local_context(&directory, &stop, &last_word, environment);
    let mut display = Display::new(std::io::stderr().is_terminal());
    let mut telemetry = Telemetry::new(&config, &last_word.report())
        .map_err(|error| (ExitCode::InternalError, format!("series cannot be registered: {error}")))?;
    if let Some(address) = listen {
        let server = Server::start(address, Arc::clone(&telemetry)).map_err(|error| {
            (ExitCode::BadConfiguration, format!("--listen {address}: {error}; choose another address"))
        })?;
        let _ = writeln!(std::io::stderr(), "serving http://{}/status, /metrics and /healthz", server.address);
    }
    let mut observers = Observers(vec![&mut display, &mut telemetry]);
    let report = run(&config, &context, &mut observers).map_err(|error| (error.exit(), error.to_string()))?;
    tell(&summary(&report));
    let gate_failed = report.validation.is_some_and(|validation| validation.verdict == Verdict::GateFailed);
    if gate_failed && config.validation.fail_on_gate {
        complain("validation failed: the job counts as failed (validation.onFailure: Complete lets it pass)");
    }
    Ok(ExitCode::Done)
}

fn stop_on_signals(last_word: &LastWord) -> Result<Stop, (ExitCode, String)> {
    Stop::on_signals(last_word)
        .map_err(|error| (ExitCode::InternalError, format!("signals cannot be handled: {error}")))
}

fn local_context<'a>(
    run: &'a Path,
    stop: &'a Stop,
    last_word: &'a LastWord,
    environment: &'a Environment,
) -> Context<'a> {
    Context { run, hub: &environment.hub, cuda: &environment.cuda, stop, pod_uid: "", last_word }
}

fn plan_job(job: &JobArguments, environment: &Environment) -> Outcome {
    let config = load(&job.file, &job.local, Scope::Local)?;
    let directory = run_directory(job.dir.as_ref(), &config);
    // A plan leaves no report.
    let last_word = LastWord::default();
    let stop = stop_on_signals(&last_word)?;
    let context = local_context(&directory, &stop, &last_word, environment);
    let mut display = Display::new(std::io::stderr().is_terminal());
    let planned = plan_run(&config, &context, Place::Here, &mut display);
    let planned = planned.map_err(|error| (error.exit(), error.to_string()))?;
    tell(&planned.describe(&config));
    Ok(ExitCode::Done)
}

fn profile_job(job: &JobArguments, trace: Option<&PathBuf>, environment: &Environment) -> Outcome {
    let config = load(&job.file, &job.local, Scope::Local)?;
    let directory = run_directory(job.dir.as_ref(), &config);
    let trace = trace.map_or_else(|| directory.join("profile.json"), Clone::clone);
    // A profile leaves no report.
    let last_word = LastWord::default();
    let stop = stop_on_signals(&last_word)?;
    let context = local_context(&directory, &stop, &last_word, environment);
    let mut display = Display::new(std::io::stderr().is_terminal());
    let profile = crate::profile::profile(&config, &context, &trace, &mut display);
    tell(&profile.map_err(|error| (error.exit(), error.to_string()))?.to_string());
    Ok(ExitCode::Done)
}

/// A model that answers: its folder, and the adapter on it.
struct Answering {
    folder: PathBuf,
    adapter: Option<(PathBuf, AdapterInfo)>,
}

/// Finds what answers: a model folder, an adapter folder, or the folder of a run with either in `output`.
fn answering(folder: &Path, base: Option<&Path>, hub: &HubSettings) -> Result<Answering, (ExitCode, String)> {
    let output = folder.join("output");
    let folder = if output.is_dir() && !folder.join("config.json").exists() { output } else { folder.to_path_buf() };
    let Some(adapter) = crate::export::read_adapter(&folder).map_err(|message| (ExitCode::BadData, message))? else {
        return Ok(Answering { folder, adapter: None });
    };
    let model = match base {
        Some(base) => base.to_path_buf(),
        None if Path::new(&adapter.base_model).is_dir() => PathBuf::from(&adapter.base_model),
        None => {
            let uri = format!("hf://{}", adapter.base_model);
            let access = Access { hub, claims: &Claims::new() };
            let fetched = crate::source::fetch_model(&uri, adapter.revision.as_deref(), access).map_err(|error| {
                let message = format!(
                    "{}: the base model {} is no folder here and cannot be fetched ({error}); give its folder with --base",
                    folder.display(),
                    adapter.base_model
                );
                (error.exit(), message)
            })?;
            fetched.path
        }
    };
    Ok(Answering { folder: model, adapter: Some((folder, adapter)) })
}

/// Answers one prompt through the model's chat template, if it has one.
fn answer(
    folder: &Path,
    prompt: &str,
    base: Option<&Path>,
    max_new_tokens: i64,
    chosen: &crate::device::Chosen,
    hub: &HubSettings,
) -> Outcome {
    let failed = |error: &dyn std::fmt::Display, exit: ExitCode| (exit, error.to_string());
    let Answering { folder, adapter } = answering(folder, base, hub)?;
    let method = adapter.as_ref().map(|(_, adapter)| Method::LoRA { lora: adapter.lora.clone() });
    let config = Config::read(&folder).map_err(|error| failed(&error, error.exit()))?;
    let tokenizer = Tokenizer::open(&folder).map_err(|error| failed(&error, error.exit()))?;
    let tokens = crate::data::prompt_tokens(&tokenizer, prompt).map_err(|error| failed(&error, error.exit()))?;
    let length = tokens.len() as i64;
    if length == 0 || length >= config.max_position_embeddings {
        let message = format!(
            "the prompt has {length} tokens; expected 1 to {}, the model's context less one",
            config.max_position_embeddings - 1
        );
        return Err((ExitCode::BadConfiguration, message));
    }
    let source = Source {
        folder: &folder,
        method: method.as_ref(),
        optimizer: Optimizer::default(),
        kind: chosen.kind,
        device: chosen.device,
        seed: 0,
        max_positions: length + max_new_tokens,
    };
    let mut built = build(&source).map_err(|error| failed(&error, error.exit()))?;
    if let Some((folder, _)) = &adapter {
        crate::export::load_adapter(folder, &mut built.parameters).map_err(|message| (ExitCode::BadData, message))?;
    }
    let limits =
        Limits { max_new_tokens, end_tokens: tokenizer.end_tokens().to_vec(), stop_text: None, cache_tokens: 0 };
    let answers = generate(&built.model, &[&tokens], Adapters::On, &limits, &Stop::default(), &mut |_| ());
    let answers = answers.expect("nothing asked for a stop");
    tell(tokenizer.decode(&answers[0].tokens).map_err(|error| failed(&error, error.exit()))?.trim());
    Ok(ExitCode::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLES: &str = "../crds/examples";

    fn parsed(line: &str) -> Result<Arguments, ExitCode> {
        parse_arguments(line.split_whitespace().map(Into::into))
    }

    #[test]
    fn a_wrong_command_line_has_an_exit_code_of_the_table() {
        for line in [
            "finetune-trainer",
            "finetune-trainer run",
            "finetune-trainer fly",
            "finetune-trainer run --listen nowhere job.yaml",
            "finetune-trainer run --speed 9 job.yaml",
        ] {
            assert_eq!(parsed(line).expect_err(line), ExitCode::BadConfiguration, "{line}");
        }
        for line in ["finetune-trainer --help", "finetune-trainer help run", "finetune-trainer --version"] {
            assert_eq!(parsed(line).expect_err(line), ExitCode::Done, "{line}");
        }
        assert!(parsed("finetune-trainer run job.yaml").is_ok());
    }

    #[test]
    fn check_knows_the_profiles_of_a_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let job = folder.path().join("job.yaml");
        let profiles = folder.path().join("profiles.yaml");
        std::fs::write(
            &job,
            "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\nspec:\n  profile: a100\n  \
             model: {uri: hf://a/b}\n  dataset: {train: {uri: file://train.jsonl}}\n  method: {type: LoRA}\n",
        )
        .expect("writable");
        std::fs::write(&profiles, "a100: {pricePerHour: 2.5}\n").expect("writable");
        let check = |more: &str| {
            let Arguments { command } =
                parsed(&format!("finetune-trainer check {} {more}", job.display())).expect("valid");
            let Command::Check { file, local } = command else { panic!("{command:?}") };
            check_file(&file, &local)
        };
        let (exit, message) = check("").expect_err("no such profile is built in");
        assert_eq!(exit, ExitCode::BadConfiguration);
        let expected =
            "job.yaml:5:12: spec.profile: no profile a100, expected one of default; --profiles FILE gives other ones";
        assert!(message.ends_with(expected), "{message}");
        assert_eq!(check(&format!("--profiles {}", profiles.display())), Ok(ExitCode::Done));
    }

    #[test]
    fn the_demo_has_a_price() {
        let folder = Path::new(EXAMPLES);
        let config = {
            let profiles = Some(folder.join("profiles.yaml"));
            load(&folder.join("demo.yaml"), &LocalArguments { profiles, claims: Vec::new() }, Scope::Local)
                .expect("valid")
        };
        assert!(config.resources.price_per_hour.is_some_and(|price| price > 0.0));
        let makefile = std::fs::read_to_string(folder.join("../../Makefile")).expect("readable");
        assert!(makefile.contains("run --profiles crds/examples/profiles.yaml crds/examples/demo.yaml"));
    }
}
