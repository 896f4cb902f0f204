//! One stage of a job in a pod of its own: `run --config FILE --stage STAGE --attempt N`. The configuration is complete, the
//! run directory is what the stages share, and the last word is said however it ends.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crds::exit::ExitCode;
use crds::report::{Failure, Report};
use crds::run::{PodStage, RunConfig, StorageConfig};

use crate::run::control;
use crate::run::signal::stop_on_signals;
use crate::run::{Context, Environment, Error, first_report, run_stage};
use crate::source::{HubSettings, Reader};
use crate::tell::display::Display;
use crate::tell::record::Observers;
use crate::tell::report::{self, LastWord};
use crate::tell::serve::{Server, Telemetry};

/// What a pod is told on its command line.
#[derive(Debug)]
pub struct Order<'a> {
    /// The run configuration.
    pub config: &'a Path,
    /// What is to be done.
    pub stage: PodStage,
    /// Attempt number.
    pub attempt: i32,
    /// Whose last word is handed on; for the stage `report` only.
    pub of: Option<PodStage>,
    /// The job's control file.
    pub control: Option<&'a Path>,
    /// Where the last word goes.
    pub termination_message: Option<&'a Path>,
    /// Where progress is served.
    pub listen: Option<SocketAddr>,
}

/// Does what the pod is told. The last word is said, and the error is returned for standard error.
pub fn execute(order: &Order, environment: &Environment) -> Result<(), (ExitCode, String)> {
    let report = Report {
        pod_stage: Some(order.stage),
        attempt: order.attempt,
        pod_uid: environment.pod_uid.clone(),
        ..Report::default()
    };
    let last_word = LastWord::new(report, None, order.termination_message.map(Path::to_path_buf));
    crate::run::crash::tell(&last_word);
    let worked = std::panic::catch_unwind(AssertUnwindSafe(|| work(order, environment, &last_word)));
    let result = worked.unwrap_or_else(|payload| {
        let error = Error::from_panic(payload.as_ref());
        Err((error.exit(), error.to_string()))
    });
    if let Err((exit, message)) = &result {
        // A run has said it already; an error is the volume's, and this one tells more.
        let _ = last_word.say(Some(Failure::new(*exit, message.as_str())));
    }
    result
}

fn work(order: &Order, environment: &Environment, last_word: &LastWord) -> Result<(), (ExitCode, String)> {
    let (config, storage) = read_config(order, last_word)?;
    let run = PathBuf::from(&storage.directory);
    if order.stage == PodStage::Report {
        let of = order.of.unwrap_or(PodStage::Train);
        let report = match report::read(&run, &config.job.uid, of, Some(order.attempt)) {
            // An attempt that was killed, or whose node died, left no word; how far it came lies beside it.
            Err(report::Error::Absent { message, .. }) if of == PodStage::Train && run.is_dir() => {
                let known = first_report(&config);
                report::read_volume(&run, Report { attempt: order.attempt, ..known }, &message)
                    .map_err(|error| (error.exit(), error.to_string()))?
            }
            read => read.map_err(|error| (error.exit(), error.to_string()))?,
        };
        last_word.hand_on(&report);
        return Ok(());
    }
    let bug = |what: &str, error: &dyn std::fmt::Display| (ExitCode::InternalError, format!("{what}: {error}"));
    last_word.set_run(Some(run.clone()));
    let stop = stop_on_signals(last_word).map_err(|error| bug("signals cannot be handled", &error))?;
    if let Some(path) = order.control.filter(|_| order.stage == PodStage::Train) {
        control::follow(path.into(), stop.clone())
            .map_err(|error| bug("the control file cannot be watched", &error))?;
    }
    let mut telemetry =
        Telemetry::new(&config, &last_word.report()).map_err(|error| bug("series cannot be registered", &error))?;
    if let Some(address) = order.listen {
        let server = Server::start(address, Arc::clone(&telemetry))
            .map_err(|error| (ExitCode::BadConfiguration, format!("--listen {address}: {error}")))?;
        // Nobody may be left to read it.
        let _ = writeln!(io::stderr(), "serving http://{}/status, /metrics and /healthz", server.address);
    }
    let hub = HubSettings { reader: Reader::Cluster, ..environment.hub.clone() };
    let context = Context {
        run: &run,
        hub: &hub,
        cuda: &environment.cuda,
        stop: &stop,
        pod_uid: &environment.pod_uid,
        last_word,
    };
    let mut display = Display::new(false);
    let mut observers = Observers(vec![&mut display, &mut telemetry]);
    let ended = run_stage(&config, order.stage, &context, &mut observers);
    ended.map(|_| ()).map_err(|error| (error.exit(), error.to_string()))
}

/// Reads the configuration and notes whose it is.
fn read_config(order: &Order, last_word: &LastWord) -> Result<(RunConfig, StorageConfig), (ExitCode, String)> {
    let path = order.config;
    let refuse = |message: String| (ExitCode::BadConfiguration, format!("{}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => (ExitCode::InputNotFound, format!("{}: does not exist", path.display())),
        _ => refuse(format!("cannot be read ({error})")),
    })?;
    if let Some(uid) = RunConfig::job_uid_of(&text) {
        last_word.update(|report| report.job_uid = uid);
    }
    let mut config = RunConfig::from_yaml(&text).map_err(|error| refuse(error.to_string()))?;
    config.job.attempt = Some(order.attempt);
    let storage = config.storage.clone().ok_or_else(|| {
        refuse("storage: missing; a stage needs storage.directory, where the others find what it leaves".into())
    })?;
    last_word.update(|report| report.config_digest = first_report(&config).config_digest);
    Ok((config, storage))
}
