//! Logs, `/metrics`, `/healthz` and `/readyz`. The series of jobs are read from the caches when they are asked for: a job that is
//! gone has none.

mod hearing;
mod series;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::{GaugeVec, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use self::hearing::Ear;
pub use self::hearing::{Hearing, HearingLayer};
use crate::caches::{Guarded, JobStore};

/// A watch asks anew every 200 s. One that has had no answer for so long is stuck.
pub const STUCK_AFTER: Duration = Duration::from_mins(10);
/// A process that cannot mend its watches for so long is to be replaced.
const DEAD_AFTER: Duration = Duration::from_mins(20);

/// What the operator tells about itself and its jobs.
pub struct Telemetry {
    registry: Registry,
    passes: IntCounterVec,
    pass_duration: Histogram,
    errors: IntCounterVec,
    polls: IntCounterVec,
    leader: IntGauge,
    ear: Ear,
    leads: AtomicBool,
    started: Instant,
    stores: Mutex<HashMap<Option<String>, JobStore>>,
}

impl Telemetry {
    /// Registers the series.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new_custom(Some("finetune_operator".into()), None)?;
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone())).map(|()| counters)
        };
        let passes = counters("reconcile_total", "Passes over a job by result", "result")?;
        let errors = counters("reconcile_errors_total", "Passes that failed, by what could not be done", "reason")?;
        let polls =
            counters("progress_polls_total", "Questions to running trainers, by whether they answered", "result")?;
        let pass_duration = Histogram::with_opts(
            HistogramOpts::new("reconcile_duration_seconds", "Seconds of a pass over a job")
                .buckets(prometheus::exponential_buckets(0.001, 2.0, 14)?),
        )?;
        registry.register(Box::new(pass_duration.clone()))?;
        let leader = IntGauge::new("leader", "1 if this replica leads")?;
        registry.register(Box::new(leader.clone()))?;
        let heard = GaugeVec::new(
            Opts::new("watch_last_success_timestamp_seconds", "When a list or watch last began well, by kind"),
            &["kind", "watched_namespace"],
        )?;
        registry.register(Box::new(heard.clone()))?;
        let refused = GaugeVec::new(
            Opts::new(
                "namespace_refused",
                "1 if the API server refuses every list of a namespace that is to be served",
            ),
            &["watched_namespace"],
        )?;
        registry.register(Box::new(refused.clone()))?;
        let build = GaugeVec::new(Opts::new("build_info", "1, with the version as label"), &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        registry.register(Box::new(build))?;
        // A ratio of errors needs both before the first error.
        passes.with_label_values(&["success"]);
        passes.with_label_values(&["error"]);
        passes.with_label_values(&["skipped"]);
        polls.with_label_values(&["ok"]);
        polls.with_label_values(&["error"]);
        for reason in ["observe", "apply", "status"] {
            errors.with_label_values(&[reason]);
        }
        Ok(Arc::new(Self {
            registry,
            passes,
            pass_duration,
            errors,
            polls,
            leader,
            ear: Ear::new(heard, refused),
            leads: AtomicBool::new(false),
            started: Instant::now(),
            stores: Mutex::default(),
        }))
    }

    /// A pass over a job ended.
    pub fn count_pass(&self, ok: bool, took: Duration) {
        self.passes.with_label_values(&[if ok { "success" } else { "error" }]).inc();
        self.pass_duration.observe(took.as_secs_f64());
    }

    /// A pass was put off: the cache has not seen what the last one wrote.
    pub fn count_skipped_pass(&self) {
        self.passes.with_label_values(&["skipped"]).inc();
    }

    /// A pass failed.
    pub fn count_error(&self, reason: &str) {
        self.errors.with_label_values(&[reason]).inc();
    }

    /// A running trainer was asked for its progress.
    pub fn count_poll(&self, was_answered: bool) {
        self.polls.with_label_values(&[if was_answered { "ok" } else { "error" }]).inc();
    }

    /// This replica leads, or no longer.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
        self.leads.store(leads, Ordering::Relaxed);
        if !leads {
            self.stores().clear();
            self.ear.forget();
        }
    }

    /// The jobs whose series are told.
    pub fn add_store(&self, namespace: Option<String>, store: JobStore) {
        self.ear.listen_to(namespace.as_deref());
        self.stores().insert(namespace, store);
    }

    fn stores(&self) -> MutexGuard<'_, HashMap<Option<String>, JobStore>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest silence of what is watched, since this replica leads.
    pub fn silence(&self) -> Duration {
        if self.leads.load(Ordering::Relaxed) { self.ear.silence() } else { Duration::ZERO }
    }

    /// Whether every kind was heard of in every namespace that is there, or another replica leads.
    fn is_ready(&self) -> bool {
        !self.leads.load(Ordering::Relaxed) || self.ear.has_heard_all(self.stores().keys())
    }

    fn text(&self) -> Result<String, prometheus::Error> {
        let mut families = self.registry.gather();
        families.extend(prometheus::gather());
        let mut text = TextEncoder::new().encode_to_string(&families)?;
        let jobs: Vec<Arc<Guarded>> = self.stores().values().flat_map(JobStore::state).collect();
        let jobs: Vec<_> = jobs.iter().filter_map(|guarded| guarded.0.as_ref().ok()).collect();
        series::write(&mut text, &jobs);
        Ok(text)
    }
}

/// Serves until the process ends.
pub async fn serve(address: SocketAddr, telemetry: Arc<Telemetry>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(telemetry);
    let listener = tokio::net::TcpListener::bind(address).await?;
    axum::serve(listener, router).await
}

async fn metrics(State(telemetry): State<Arc<Telemetry>>) -> Result<String, StatusCode> {
    telemetry.text().map_err(|error| {
        tracing::warn!("the metrics cannot be told: {error}");
        StatusCode::INTERNAL_SERVER_ERROR
    })
}

/// Progress, not mere life: a process that hears nothing does not heal by waiting.
async fn healthz(State(telemetry): State<Arc<Telemetry>>) -> (StatusCode, String) {
    let silence = telemetry.silence();
    if silence > DEAD_AFTER {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("no watch began well for {} s\n", silence.as_secs()));
    }
    (StatusCode::OK, "ok\n".into())
}

async fn readyz(State(telemetry): State<Arc<Telemetry>>) -> (StatusCode, String) {
    if telemetry.is_ready() {
        return (StatusCode::OK, "ok\n".into());
    }
    let waited = telemetry.started.elapsed().as_secs();
    (StatusCode::SERVICE_UNAVAILABLE, format!("not every kind was heard of, {waited} s after the start\n"))
}

/// How logs are written.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum LogLevel {
    /// What failed for good.
    Error,
    /// And what was tried again.
    Warn,
    /// And what changed.
    Info,
    /// And why.
    Debug,
    /// And everything else.
    Trace,
}

/// Writes logs to standard error: what is asked for of the operator, and warnings of its libraries.
pub fn start_logs(format: LogFormat, level: LogLevel) {
    use tracing_subscriber::EnvFilter;
    let level = format!("{level:?}").to_lowercase();
    let filter = EnvFilter::new(format!("warn,operator={level}"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_series_and_a_job_that_is_gone_has_none() {
        let telemetry = Telemetry::new().expect("series register");
        let (store, mut writer) = kube::runtime::reflector::store();
        telemetry.add_store(None, store);
        let job = serde_json::from_value(serde_json::json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": "bot", "namespace": "team", "uid": "u"},
            "spec": {"model": {"uri": "hf://a/b"}, "dataset": {"train": {"uri": "hf://a/b"}}, "method": {"type": "LoRA"}},
        }))
        .expect("a job");
        telemetry.count_poll(true);
        let guarded = kube::core::DeserializeGuard(Ok(job));
        writer.apply_watcher_event(&kube::runtime::watcher::Event::Apply(guarded.clone()));
        let text = telemetry.text().expect("text");
        for line in [
            "finetunejob_info{namespace=\"team\",finetunejob=\"bot\"",
            "finetune_operator_reconcile_total{result=\"error\"} 0",
            "finetune_operator_reconcile_total{result=\"skipped\"} 0",
            "finetune_operator_progress_polls_total{result=\"ok\"} 1",
            "finetune_operator_progress_polls_total{result=\"error\"} 0",
            "finetune_operator_leader 0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        writer.apply_watcher_event(&kube::runtime::watcher::Event::Delete(guarded));
        assert!(!telemetry.text().expect("text").contains("finetunejob_"), "its series go with it");
    }
}
