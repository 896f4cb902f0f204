//! The commands. Results go to standard output, everything else to standard error.

mod arguments;
mod generate;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crds::check::{Scope, check};
use crds::exit::ExitCode;
use crds::profile;
use crds::report::Verdict;
use crds::resolve::{Target, resolve};
use crds::run::RunConfig;

pub use self::arguments::{Arguments, parse_arguments};
use self::arguments::{Command, JobArguments, LocalArguments, RunArguments};
use self::generate::answer;
use crate::ground::stop::Stop;
use crate::run::{Context, Environment, Place, finished, first_report, plan_run, run};
use crate::run::{pod, signal};
use crate::tell::display::{Display, summary};
use crate::tell::record::Observers;
use crate::tell::report::LastWord;
use crate::tell::serve::{Server, Telemetry};

/// Prints a result. A reader that has gone away (`| head`) ends nothing.
fn tell(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints an error.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "error: {text}");
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
    if let Err(message) = crate::compute::device::check_capability(environment.cpu_capability.as_deref()) {
        return fail(ExitCode::BadConfiguration, &message);
    }
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
            let chosen = crate::compute::device::choose(precision.precision(), None, &environment.cuda);
            for warning in &chosen.warnings {
                let _ = writeln!(std::io::stderr(), "warning: {warning}");
            }
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
    crate::run::crash::tell(&last_word);
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
    signal::stop_on_signals(last_word)
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
    let profile = crate::run::profile::profile(&config, &context, &trace, &mut display);
    tell(&profile.map_err(|error| (error.exit(), error.to_string()))?.to_string());
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
