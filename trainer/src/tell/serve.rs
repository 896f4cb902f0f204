//! What a running trainer tells over HTTP, read-only: `GET /status` (`Progress`), `/metrics` (Prometheus), `/healthz`.
//! The only module with an async runtime; it has a thread of its own and never touches the loop.

mod telemetry;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use crds::report::Progress;
use prometheus::TextEncoder;

pub use self::telemetry::Telemetry;

/// A server on a thread of its own; it ends with the process.
#[derive(Debug)]
pub struct Server {
    /// Where it listens; the port is the chosen one if 0 was asked for.
    pub address: SocketAddr,
}

impl Server {
    /// Listens on `address`.
    pub fn start(address: SocketAddr, telemetry: Arc<Telemetry>) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let router = Router::new()
            .route("/status", get(status))
            .route("/metrics", get(metrics))
            .route("/healthz", get(async || "ok\n"))
            .with_state(telemetry);
        std::thread::Builder::new().name("http".into()).spawn(move || {
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                axum::serve(listener, router).await
            })
        })?;
        Ok(Self { address })
    }
}

async fn status(State(telemetry): State<Arc<Telemetry>>) -> Json<Progress> {
    let mut progress = telemetry.progress().clone();
    progress.last_report_time = jiff::Timestamp::now().to_string();
    Json(progress)
}

async fn metrics(State(telemetry): State<Arc<Telemetry>>) -> Result<String, axum::http::StatusCode> {
    telemetry.read_gpus();
    let families = telemetry.registry.gather();
    TextEncoder::new().encode_to_string(&families).map_err(|_| axum::http::StatusCode::INTERNAL_SERVER_ERROR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::gpu::Gpus;
    use crate::tell::record::{Event, Observer, StepRecord};
    use crds::report::{PlanReport, Report, Stage};
    use crds::run::RunConfig;
    use std::io::{Read, Write};

    fn config() -> RunConfig {
        let text = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\nspec:\n  \
                    model: {uri: hf://owner/name}\n  dataset: {train: {uri: hf://datasets/a/b/c}}\n  method: {type: LoRA}\n";
        let checked = crds::check::check(text, crds::check::Scope::Local).expect("valid");
        let claims = std::collections::BTreeMap::new();
        let target = crds::resolve::Target::Local { folder: std::path::Path::new("/"), claims: &claims };
        crds::resolve::resolve(&checked.job, &crds::profile::built_in(), target).expect("supported").config
    }

    fn request(address: SocketAddr, line: &str) -> String {
        let mut stream = std::net::TcpStream::connect(address).expect("listening");
        write!(stream, "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        answer
    }

    #[test]
    fn status_metrics_and_health_are_served_and_nothing_can_be_changed() {
        let mut telemetry = Telemetry::new(&config(), &Report::default()).expect("series register");
        let server =
            Server::start("127.0.0.1:0".parse().expect("an address"), Arc::clone(&telemetry)).expect("listens");
        telemetry.observe(&Event::Stage(Stage::Training)).expect("noted");
        telemetry.observe(&Event::Attempt { number: 2, step: 2 }).expect("noted");
        let plan = PlanReport { precision: "BFloat16".into(), ..PlanReport::default() };
        telemetry.observe(&Event::Plan(Box::new(plan))).expect("noted");
        let answer = request(server.address, "GET /status");
        assert!(answer.contains("\"attempt\":2") && answer.contains("\"step\":2"), "{answer}");
        let record = StepRecord {
            step: 3,
            total_steps: 9,
            loss: f64::NAN,
            learning_rate: 0.5,
            input_tokens: 100,
            seconds: 2.0,
            ..StepRecord::default()
        };
        telemetry.observe(&Event::Step(record)).expect("noted");
        let answer = request(server.address, "GET /status");
        let body = answer.split("\r\n\r\n").nth(1).expect("a body");
        let progress: Progress = serde_json::from_str(body).expect("Progress");
        assert_eq!((progress.step, progress.tokens_per_second, progress.stage), (3, Some(50.0), Stage::Training));
        assert_eq!(progress.estimated_remaining_seconds, Some(12));
        assert!(progress.metrics.iter().all(|metric| metric.name != "trainLoss"), "NaN is left out");
        let text = request(server.address, "GET /metrics");
        for line in [
            "finetune_step{finetunejob=\"bot\"} 3",
            "finetune_train_loss{finetunejob=\"bot\"} NaN",
            "finetune_nonfinite_steps_total{finetunejob=\"bot\"} 1",
            "finetune_phase{phase=\"training\",finetunejob=\"bot\"} 1",
            "finetune_job_info{base_model=\"hf://owner/name\",dtype=\"BFloat16\",method=\"LoRA\",finetunejob=\"bot\"} 1",
            "finetune_step_phase_seconds_count{phase=\"data\",finetunejob=\"bot\"} 1",
            concat!("finetune_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\",finetunejob=\"bot\"} 1"),
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert_eq!(text.contains("finetune_gpu_memory_allocated_bytes{"), Gpus::open().is_some());
        let message = "no space".to_owned();
        telemetry.observe(&Event::CheckpointFailed { step: 3, message }).expect("noted");
        let text = request(server.address, "GET /metrics");
        assert!(text.contains("finetune_checkpoints_total{result=\"error\",finetunejob=\"bot\"} 1"), "{text}");
        assert!(request(server.address, "GET /healthz").contains("200 OK"));
        assert!(request(server.address, "POST /status").contains("405"));
        assert!(request(server.address, "GET /").contains("404"));
    }
}
