//! The life of the process: arguments, election, controllers, the watchdog over their watches, and a tidy end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use k8s_openapi::jiff::Timestamp;
use kube::client::ClientBuilder;
use tokio::signal::unix::{SignalKind, signal};

use crate::build::MANAGER;
use crate::controller::{self, Shared};
use crate::facts::Timing;
use crate::lease::{Elector, Settings};
use crate::observe::progress::Intervals;
use crate::recorder::Recorder;
use crate::telemetry::{HearingLayer, LogFormat, LogLevel, STUCK_AFTER, Telemetry, serve, start_logs};

/// Longest time that the API server may take to begin an answer. Shorter than a lease lasts.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at the watches.
const WATCHDOG_INTERVAL: Duration = Duration::from_secs(30);

/// Turns FineTuneJobs into Jobs and reports into their status.
#[derive(Debug, Parser)]
#[command(name = "finetune-operator", version)]
pub struct Arguments {
    /// File of profiles: what administrators decide for jobs
    #[arg(long)]
    profiles: PathBuf,
    /// Serve /metrics, /healthz and /readyz here
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Watch this namespace; may be repeated; without it all are watched
    #[arg(long = "watch-namespace")]
    watch_namespaces: Vec<String>,
    /// Take turns with other replicas
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    leader_election: bool,
    /// Name of the Lease
    #[arg(long, default_value = "finetune-operator")]
    lease_name: String,
    /// A lease that is not renewed for so long may be taken
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(2..))]
    lease_duration_seconds: u64,
    /// Stop working when the lease could not be renewed for so long
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    renew_deadline_seconds: u64,
    /// Between two attempts to take or renew the lease
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    retry_period_seconds: u64,
    /// Between two questions to a running trainer
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    poll_interval_seconds: u64,
    /// Between two status writes that tell a job's progress
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    progress_interval_seconds: u64,
    /// Wait after a job's first failed attempt; doubled by each further one, up to five minutes
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    retry_backoff_seconds: u64,
    /// How logs are written
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// How much is logged
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
}

/// What the environment says; read in `main` only.
#[derive(Clone, Debug)]
pub struct Environment {
    /// The pod's name: who holds the lease.
    pub pod_name: Option<String>,
    /// The pod's namespace: where the lease is.
    pub pod_namespace: Option<String>,
}

/// Runs until a signal ends it, or until nothing can be done.
pub fn run(arguments: Arguments, environment: Environment) -> Result<(), anyhow::Error> {
    start_logs(arguments.log_format, arguments.log_level);
    anyhow::ensure!(
        arguments.renew_deadline_seconds < arguments.lease_duration_seconds,
        "--renew-deadline-seconds: found {}, expected less than --lease-duration-seconds, which is {}",
        arguments.renew_deadline_seconds,
        arguments.lease_duration_seconds
    );
    anyhow::ensure!(
        arguments.renew_deadline_seconds + arguments.retry_period_seconds <= arguments.lease_duration_seconds,
        "--retry-period-seconds: found {}, expected at most what --lease-duration-seconds, {}, has left after \
         --renew-deadline-seconds, {}",
        arguments.retry_period_seconds,
        arguments.lease_duration_seconds,
        arguments.renew_deadline_seconds
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(live(arguments, environment))
}

async fn live(arguments: Arguments, environment: Environment) -> Result<(), anyhow::Error> {
    let path = &arguments.profiles;
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let profiles =
        crds::profile::parse(&text).with_context(|| format!("{}: not a file of profiles", path.display()))?;
    let telemetry = Telemetry::new()?;
    let config = kube::Config::infer().await.context("no API server: neither a pod's account nor a kubeconfig")?;
    let client = ClientBuilder::try_from(config)?
        .with_layer(&HearingLayer(std::sync::Arc::clone(&telemetry)))
        .with_layer(&tower::timeout::TimeoutLayer::new(CALL_DEADLINE))
        .build();
    // Outside of a pod two operators must not take each other for themselves.
    let identity = environment.pod_name.unwrap_or_else(|| format!("{MANAGER}-{}", std::process::id()));
    for (name, profile) in &profiles {
        if profile.image.as_ref().is_some_and(|image| !image.contains("@sha256:")) {
            tracing::warn!(
                "profile {name}: its image is named by a tag; a tag that moves gives a job's next attempt another trainer"
            );
        }
        if name != crds::profile::DEFAULT && profile.allowed.namespaces.is_none() {
            tracing::warn!(
                "profile {name}: no job may name it; list namespaces in allowed.namespaces, [\"*\"] for all"
            );
        }
    }
    let shared = Shared {
        recorder: Recorder::new(client.clone(), identity.clone()),
        client: client.clone(),
        profiles,
        timing: Timing { first_backoff: Duration::from_secs(arguments.retry_backoff_seconds) },
        intervals: Intervals {
            poll: Duration::from_secs(arguments.poll_interval_seconds),
            write: Duration::from_secs(arguments.progress_interval_seconds),
        },
        telemetry: std::sync::Arc::clone(&telemetry),
        clock: std::sync::Arc::new(Timestamp::now),
    };
    let lease = arguments.leader_election.then(|| Settings {
        namespace: environment.pod_namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned()),
        name: arguments.lease_name.clone(),
        identity,
        lease_duration: Duration::from_secs(arguments.lease_duration_seconds),
        renew_deadline: Duration::from_secs(arguments.renew_deadline_seconds),
        retry_period: Duration::from_secs(arguments.retry_period_seconds),
    });
    let mut elector = lease.map(|settings| Elector::new(client, settings));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tracing::info!("finetune-operator {} serves on {}", env!("CARGO_PKG_VERSION"), arguments.listen);
    tokio::select! {
        served = serve(arguments.listen, std::sync::Arc::clone(&telemetry)) => {
            served.with_context(|| format!("--listen {}", arguments.listen))?;
        }
        () = lead(elector.as_mut(), &shared, &arguments.watch_namespaces) => {}
        _ = terminate.recv() => tracing::info!("asked to end"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
    }
    // Every controller was dropped with `lead`: nothing is written after the lease is given back.
    if let Some(elector) = &mut elector {
        elector.release().await;
    }
    Ok(())
}

/// Leads when it can, stands by when it cannot, for ever.
async fn lead(mut elector: Option<&mut Elector>, shared: &Shared, namespaces: &[String]) {
    loop {
        if let Some(elector) = &mut elector {
            elector.acquire().await;
        }
        tracing::info!("leading");
        shared.telemetry.set_leader(true);
        let lost = async {
            match &mut elector {
                Some(elector) => elector.keep().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = lost => tracing::warn!("standing by"),
            () = reconcile_all(shared, namespaces) => {}
        }
        shared.telemetry.set_leader(false);
    }
}

/// Reconciles all watched namespaces; builds the controllers anew when their watches are stuck.
async fn reconcile_all(shared: &Shared, namespaces: &[String]) {
    let scopes: Vec<Option<String>> =
        if namespaces.is_empty() { vec![None] } else { namespaces.iter().cloned().map(Some).collect() };
    loop {
        let controllers = scopes.iter().map(|scope| controller::run(shared.clone(), scope.clone()));
        tokio::select! {
            _ = futures::future::select_all(controllers.map(Box::pin)) => tracing::warn!("a controller ended"),
            () = stuck(&shared.telemetry) => tracing::warn!("a watch is stuck"),
        }
        tracing::warn!("building the watches anew");
    }
}

async fn stuck(telemetry: &Telemetry) {
    // Since the watches were built: what was heard before does not count.
    let built = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(WATCHDOG_INTERVAL).await;
        if telemetry.silence().min(built.elapsed()) > STUCK_AFTER {
            return;
        }
    }
}
