//! `kubectl finetune`: FineTuneJobs from a person's side. It asks the API server and nobody else, with the person's own rights;
//! what it shows is in the status, and what it changes is one field of the spec. Results go to standard output, the rest to
//! standard error. What is shown is made by pure functions of a job.

#![forbid(unsafe_code)]

mod arguments;
mod cluster;
mod completion;
mod control;
mod error;
#[cfg(test)]
mod fixture;
mod follow;
mod logs;
mod outcome;
mod page;
mod plot;
mod submit;
mod table;
mod text;

use std::io::IsTerminal;
use std::path::PathBuf;

use crds::FineTuneJob;
use crds::run::PodStage;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde::Serialize;

use arguments::{Command, Format, Output};
use cluster::{Cluster, Conflicts, Scope, Target};
use control::Wish;
use follow::{Shown, Until, follow};
use logs::{Chosen, Reading};
use outcome::Outcome;
use text::{Paint, print, tell};

pub use arguments::Arguments;
pub use error::Error;
pub use outcome::ERROR_EXIT;

/// What the environment says; read in `main` only.
#[derive(Clone, Copy, Debug)]
pub struct Environment {
    /// `NO_COLOR` is there and not empty.
    pub no_color: bool,
}

/// Carries out a command; returns the exit code.
pub fn run(arguments: Arguments, environment: Environment) -> Result<u8, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::Broken(format!("no runtime: {error}")))?;
    let colour = std::io::stdout().is_terminal() && !environment.no_color;
    let paint = if colour { Paint::Colour } else { Paint::Plain };
    runtime.block_on(carry_out(arguments.command, &arguments.target, paint))
}

async fn carry_out(command: Command, target: &Target, paint: Paint) -> Result<u8, Error> {
    match command {
        Command::Run { file, detach, force_conflicts } => {
            let document = submit::read(&file)?;
            let cluster = Cluster::connect(&submit::target(&document, target)?).await?;
            let conflicts = if force_conflicts { Conflicts::Win } else { Conflicts::Refuse };
            let job = submit::submit(&cluster, document, conflicts).await?;
            if detach {
                tell(&format!("follow it: kubectl finetune watch {} -n {}", job.name_any(), cluster.namespace));
                return Ok(0);
            }
            let (outcome, job) = Box::pin(follow(&cluster, job, Until::End, None, Shown::on(is_terminal()))).await?;
            if matches!(outcome, Outcome::Succeeded | Outcome::Failed | Outcome::ValidationFailed) {
                print(format!("\n{}", page::page(&job, Timestamp::now(), paint)))?;
            }
            return Ok(outcome.exit_code());
        }
        Command::List { all_namespaces, output } => {
            let scope = if all_namespaces { Scope::All } else { Scope::Namespace };
            let cluster = Cluster::connect(target).await?;
            let jobs = cluster.list(scope).await?;
            let items = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": jobs});
            if jobs.is_empty() && output.output == Format::Text {
                let place = if all_namespaces { String::new() } else { format!(" in namespace {}", cluster.namespace) };
                tell(&format!("there are no FineTuneJobs{place}"));
            } else {
                show(output, || table::list(&jobs, scope, Timestamp::now()), &items)?;
            }
        }
        Command::Status { name, output } => {
            let job = Cluster::connect(target).await?.job(&name).await?;
            show(output, || page::page(&job, Timestamp::now(), paint), &job)?;
        }
        Command::Watch { name } => {
            let cluster = Cluster::connect(target).await?;
            let job = cluster.job(&name).await?;
            let terminal = is_terminal();
            let (outcome, job) = Box::pin(follow(&cluster, job, Until::End, None, Shown::on(terminal))).await?;
            if terminal && outcome != Outcome::Interrupted {
                print(format!("{}\n", follow::line(&job)))?;
            }
            return Ok(outcome.exit_code());
        }
        Command::Wait { name, until, timeout } => {
            let cluster = Cluster::connect(target).await?;
            let job = cluster.job(&name).await?;
            let until = until.map_or(Until::End, Until::Phase);
            let (outcome, job) = Box::pin(follow(&cluster, job, until, timeout, Shown::Nothing)).await?;
            if outcome != Outcome::Deleted {
                print(format!("{}\n", follow::line(&job)))?;
            }
            return Ok(outcome.exit_code());
        }
        Command::Logs { name, stage, attempt, follow, tail } => {
            let cluster = Cluster::connect(target).await?;
            let job = cluster.job(&name).await?;
            let chosen = Chosen { stage: stage.map(PodStage::from), attempt };
            let reading = if follow { Reading::Follow } else { Reading::Once };
            logs::logs(&cluster, &job, chosen, reading, tail).await?;
        }
        Command::Plot { name, svg, prometheus, file } => {
            let (title, curve) = points(name, prometheus, file, target).await?;
            print(plot::terminal(&curve, &title))?;
            if let Some(path) = svg {
                let written = std::fs::write(&path, plot::svg(&curve, &title));
                written.map_err(|source| Error::Write { path: path.clone(), source })?;
                tell(&format!("written: {}", path.display()));
            }
        }
        Command::Stop { name } => wish(&name, Wish::Stop, target).await?,
        Command::Suspend { name } => wish(&name, Wish::Suspend, target).await?,
        Command::Resume { name } => wish(&name, Wish::Resume, target).await?,
        Command::Cost { names, all_namespaces, output } => {
            let cluster = Cluster::connect(target).await?;
            let jobs = if names.is_empty() {
                cluster.list(if all_namespaces { Scope::All } else { Scope::Namespace }).await?
            } else {
                let mut jobs = Vec::new();
                for name in &names {
                    jobs.push(cluster.job(name).await?);
                }
                jobs
            };
            show(output, || table::cost(&jobs), &table::cost_value(&jobs))?;
        }
        Command::Completion { shell } => print(completion::script(shell))?,
        Command::Complete { words } => print(complete(&words, target).await)?,
    }
    Ok(0)
}

async fn points(
    name: Option<String>,
    prometheus: Option<String>,
    file: Option<PathBuf>,
    target: &Target,
) -> Result<(String, plot::Curve), Error> {
    if let Some(path) = file {
        let curve = plot::from_file(&path)?;
        return Ok((name.unwrap_or_else(|| path.display().to_string()), curve));
    }
    let name = name.unwrap_or_default();
    let cluster = Cluster::connect(target).await?;
    let job = cluster.job(&name).await?;
    let curve = match prometheus {
        Some(url) => plot::from_prometheus(&url, &job).await?,
        None => plot::from_logs(&cluster, &job).await?,
    };
    Ok((name, curve))
}

async fn wish(name: &str, wish: Wish, target: &Target) -> Result<(), Error> {
    let cluster = Cluster::connect(target).await?;
    let job = cluster.job(name).await?;
    let answer = control::answer(&job, wish);
    if let Some(patch) = answer.patch {
        cluster.merge(name, patch).await?;
    }
    print(format!("{}\n", answer.told))
}

/// A person who presses Tab gets no error: where the cluster does not answer there are no words.
async fn complete(words: &[String], target: &Target) -> String {
    use completion::{Files, Wanted};
    let last = words.last().map_or("", String::as_str);
    match completion::wanted(words) {
        Wanted::Words(words) => completion::answer(&words, last, Files::Kept),
        Wanted::File => completion::answer(&[], last, Files::Offered),
        Wanted::Job => {
            let target = Target { namespace: completion::namespace(words), ..target.clone() };
            let jobs = match Cluster::connect(&target).await {
                Ok(cluster) => cluster.list(Scope::Namespace).await.unwrap_or_default(),
                Err(_) => Vec::new(),
            };
            let names: Vec<String> = jobs.iter().map(FineTuneJob::name_any).collect();
            completion::answer(&names, last, Files::Kept)
        }
    }
}

fn show(output: Output, text: impl FnOnce() -> String, value: &impl Serialize) -> Result<(), Error> {
    let broken = |error: &dyn std::error::Error| Error::Broken(format!("the answer cannot be written: {error}"));
    match output.output {
        Format::Text => print(text()),
        Format::Json => {
            print(serde_json::to_string_pretty(value).map_err(|error| broken(&error))?)?;
            print("\n")
        }
        Format::Yaml => {
            // By way of JSON, so that both have the same fields in the same order.
            let value = serde_json::to_value(value).map_err(|error| broken(&error))?;
            print(serde_saphyr::to_string(&value).map_err(|error| broken(&error))?)
        }
    }
}

fn is_terminal() -> bool {
    std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
}
