//! What is told of a run: observers fill it, handlers read it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crds::report::{CheckpointInfo, MetricValue, Progress, Report, Stage};
use crds::run::{Method, RunConfig};
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
};

use crate::compute::gpu::Gpus;
use crate::tell::record::{CheckpointRecord, EvaluationRecord, Event, Observer, RecentSteps, StepRecord};

/// Checkpoints that `/status` lists.
const LISTED_CHECKPOINTS: usize = 16;

/// The state that observers fill and handlers read.
pub struct Telemetry {
    progress: Mutex<Progress>,
    recent: Mutex<RecentSteps>,
    pub(super) registry: Registry,
    series: Series,
    gpus: Option<Gpus>,
}

struct Series {
    /// Method and base model, for `job_info`.
    labels: [String; 2],
    step: Gauge,
    steps_planned: Gauge,
    epoch: Gauge,
    train_loss: Gauge,
    eval_loss: Gauge,
    learning_rate: Gauge,
    gradient_norm: Gauge,
    phase: GaugeVec,
    parameters: GaugeVec,
    job_info: GaugeVec,
    completion: Gauge,
    checkpoint_time: Gauge,
    checkpoint_size: Gauge,
    tokens: IntCounterVec,
    samples: IntCounter,
    checkpoints: IntCounterVec,
    resumes: IntCounter,
    nonfinite: IntCounter,
    step_duration: Histogram,
    step_phase: HistogramVec,
    checkpoint_duration: Histogram,
    gpu_memory: GaugeVec,
    gpu_utilization: GaugeVec,
    gpu_energy: CounterVec,
}

const PHASES: [(Stage, &str); 4] = [
    (Stage::Preparing, "preparing"),
    (Stage::Training, "training"),
    (Stage::Evaluating, "evaluating"),
    (Stage::Publishing, "publishing"),
];

impl Telemetry {
    /// Series with the constant label `finetunejob`; `report` says whose they are.
    pub fn new(config: &RunConfig, report: &Report) -> Result<Arc<Self>, prometheus::Error> {
        let labels = [("finetunejob".to_owned(), config.job.name.clone())].into();
        let registry = Registry::new_custom(Some("finetune".into()), Some(labels))?;
        let series = Series::register(&registry, config)?;
        let progress = Progress {
            job_uid: config.job.uid.clone(),
            pod_uid: report.pod_uid.clone(),
            pod_stage: report.pod_stage,
            attempt: report.attempt,
            ..Progress::default()
        };
        let (progress, recent) = (Mutex::new(progress), Mutex::default());
        Ok(Arc::new(Self { progress, recent, registry, series, gpus: Gpus::open() }))
    }

    pub(super) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, record: &StepRecord) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (tokens_per_second, remaining) = recent.add(record);
        let series = &self.series;
        series.step.set(record.step as f64);
        series.steps_planned.set(record.total_steps as f64);
        series.epoch.set(record.epoch);
        series.train_loss.set(record.loss);
        series.learning_rate.set(record.learning_rate);
        series.gradient_norm.set(record.gradient_norm);
        series.completion.set(jiff::Timestamp::now().as_second() as f64 + remaining);
        series.tokens.with_label_values(&["input"]).inc_by(record.input_tokens.unsigned_abs());
        series.tokens.with_label_values(&["trained"]).inc_by(record.trained_tokens.unsigned_abs());
        series.samples.inc_by(record.examples.unsigned_abs());
        series.nonfinite.inc_by(u64::from(!record.finite));
        series.step_duration.observe(record.seconds);
        for (phase, seconds) in [("data", record.data_seconds), ("compute", record.seconds - record.data_seconds)] {
            series.step_phase.with_label_values(&[phase]).observe(seconds);
        }
        let mut progress = self.progress();
        progress.step = record.step;
        progress.total_steps = record.total_steps;
        progress.epoch = record.epoch;
        progress.trained_tokens = record.total_trained_tokens;
        progress.input_tokens = record.total_input_tokens;
        progress.tokens_per_second = Some(tokens_per_second);
        progress.estimated_remaining_seconds = Some(remaining as i64);
        for (name, value) in
            [("trainLoss", record.loss), ("learningRate", record.learning_rate), ("gradientNorm", record.gradient_norm)]
        {
            set_metric(&mut progress.metrics, name, value);
        }
    }

    fn evaluation(&self, record: &EvaluationRecord) {
        if let Some(loss) = record.scores.eval_loss {
            self.series.eval_loss.set(loss);
            set_metric(&mut self.progress().metrics, "evalLoss", loss);
        }
    }

    fn checkpoint(&self, record: &CheckpointRecord) {
        let series = &self.series;
        series.checkpoints.with_label_values(&["success"]).inc();
        series.checkpoint_time.set(jiff::Timestamp::now().as_second() as f64);
        series.checkpoint_size.set(record.bytes as f64);
        series.checkpoint_duration.observe(record.seconds);
        let mut progress = self.progress();
        if record.best {
            progress.checkpoints.iter_mut().for_each(|checkpoint| checkpoint.best = false);
        }
        let time = jiff::Timestamp::now().to_string();
        let info = CheckpointInfo { step: record.step, time, eval_loss: record.eval_loss, best: record.best };
        progress.checkpoints.push(info);
        if progress.checkpoints.len() > LISTED_CHECKPOINTS {
            progress.checkpoints.remove(0);
        }
    }

    /// What another pod trained.
    fn trained(&self, report: &Report) {
        self.series.step.set(report.step as f64);
        self.series.steps_planned.set(report.total_steps as f64);
        let mut progress = self.progress();
        progress.step = report.step;
        progress.total_steps = report.total_steps;
        progress.trained_tokens = report.usage.trained_tokens;
        progress.input_tokens = report.usage.input_tokens;
        progress.metrics.clone_from(&report.metrics);
    }

    /// Asks the GPUs; nobody else does.
    pub(super) fn read_gpus(&self) {
        for gpu in self.gpus.iter().flat_map(Gpus::read) {
            let device = [gpu.device.as_str()];
            if let Some(bytes) = gpu.memory_bytes {
                self.series.gpu_memory.with_label_values(&device).set(bytes);
            }
            if let Some(ratio) = gpu.utilization {
                self.series.gpu_utilization.with_label_values(&device).set(ratio);
            }
            if let Some(joules) = gpu.joules {
                // The driver counts; this only shows it.
                let counter = self.series.gpu_energy.with_label_values(&device);
                counter.reset();
                counter.inc_by(joules);
            }
        }
    }

    fn stage(&self, stage: Stage) {
        for (phase, name) in PHASES {
            self.series.phase.with_label_values(&[name]).set(f64::from(u8::from(phase == stage)));
        }
        self.progress().stage = stage;
    }
}

/// A value that is not finite has no JSON: it is left out of `/status` and exported as NaN to Prometheus.
fn set_metric(metrics: &mut Vec<MetricValue>, name: &str, value: f64) {
    metrics.retain(|metric| metric.name != name);
    if value.is_finite() {
        metrics.push(MetricValue { name: name.into(), value });
    }
}

impl Observer for Arc<Telemetry> {
    fn observe(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Stage(stage) => self.stage(*stage),
            Event::Step(record) => self.step(record),
            Event::Evaluation(record) => self.evaluation(record),
            Event::Checkpoint(record) => self.checkpoint(record),
            Event::Resumed { step, .. } => {
                self.series.resumes.inc();
                self.progress().resumed_from_step = Some(*step);
            }
            Event::CheckpointFailed { .. } => self.series.checkpoints.with_label_values(&["error"]).inc(),
            Event::Trained(report) => self.trained(report),
            Event::Attempt { number, step } => {
                self.series.step.set(*step as f64);
                let mut progress = self.progress();
                (progress.attempt, progress.step) = (*number, *step);
            }
            Event::Plan(plan) => {
                let parameters = &self.series.parameters;
                parameters.with_label_values(&["trainable"]).set(plan.trainable_parameters as f64);
                parameters.with_label_values(&["total"]).set(plan.total_parameters as f64);
                self.series.steps_planned.set(plan.total_steps as f64);
                let [method, base_model] = &self.series.labels;
                self.series.job_info.with_label_values(&[method, base_model, &plan.precision]).set(1.0);
                self.progress().total_steps = plan.total_steps;
            }
            Event::Derived { .. }
            | Event::Data(_)
            | Event::Sample { .. }
            | Event::Answered { .. }
            | Event::Note(_)
            | Event::Committing { .. }
            | Event::Warning(_)
            | Event::Validated(_) => {}
        }
        Ok(())
    }
}

impl Series {
    fn register(registry: &Registry, config: &RunConfig) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone())).map(|()| gauge)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let gauges = GaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauges.clone())).map(|()| gauges)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone())).map(|()| counters)
        };
        let options = |name: &str, help: &str| {
            let buckets = prometheus::exponential_buckets(0.01, 2.0, 16)?;
            Ok::<_, prometheus::Error>(HistogramOpts::new(name, help).buckets(buckets))
        };
        let histogram = |name: &str, help: &str| {
            let histogram = Histogram::with_opts(options(name, help)?)?;
            registry.register(Box::new(histogram.clone())).map(|()| histogram)
        };
        let step_phase = HistogramVec::new(
            options("step_phase_seconds", "Seconds of an optimizer step by phase: packing rows, computing")?,
            &["phase"],
        )?;
        registry.register(Box::new(step_phase.clone()))?;
        gauges("build_info", "1, with the version as label", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1.0);
        let method = match config.method {
            Method::LoRA { .. } => "LoRA",
            Method::QLoRA { .. } => "QLoRA",
            Method::Full { .. } => "Full",
        };
        let gpu_energy = CounterVec::new(
            Opts::new("gpu_energy_joules_total", "Energy that the GPU took since its driver was loaded"),
            &["device"],
        )?;
        registry.register(Box::new(gpu_energy.clone()))?;
        // A query may be a presigned one, and is nobody's label.
        let base_model = config.model.uri.split('?').next().unwrap_or_default();
        Ok(Self {
            labels: [method.to_owned(), base_model.to_owned()],
            step_phase,
            gpu_energy,
            gpu_memory: gauges("gpu_memory_allocated_bytes", "Memory of the GPU that is taken", &["device"])?,
            gpu_utilization: gauges("gpu_utilization_ratio", "Share of time that the GPU computed", &["device"])?,
            job_info: gauges("job_info", "1, with what is trained as labels", &["method", "base_model", "dtype"])?,
            step: gauge("step", "Completed optimizer steps")?,
            steps_planned: gauge("steps_planned", "Planned optimizer steps")?,
            epoch: gauge("epoch", "Completed passes over the training rows")?,
            train_loss: gauge("train_loss", "Mean loss per trained token of the last step, nats")?,
            eval_loss: gauge("eval_loss", "Mean loss per trained token of the validation rows, nats")?,
            learning_rate: gauge("learning_rate", "Learning rate of the last step")?,
            gradient_norm: gauge("gradient_norm", "Global gradient norm before clipping of the last step")?,
            phase: gauges("phase", "1 for the stage that runs", &["phase"])?,
            parameters: gauges("parameters", "Parameters of the model", &["kind"])?,
            completion: gauge("estimated_completion_timestamp_seconds", "When the last step is expected")?,
            checkpoint_time: gauge(
                "checkpoint_last_success_timestamp_seconds",
                "When a checkpoint was last committed",
            )?,
            checkpoint_size: gauge("checkpoint_size_bytes", "Size of the last checkpoint")?,
            tokens: counters("tokens_total", "Tokens that went through the model, and trained ones", "kind")?,
            samples: counter("samples_total", "Examples that were trained on")?,
            checkpoints: counters("checkpoints_total", "Checkpoints by result", "result")?,
            resumes: counter("resumes_total", "Runs that continued a checkpoint")?,
            nonfinite: counter("nonfinite_steps_total", "Steps whose loss or gradient was not finite")?,
            step_duration: histogram("step_duration_seconds", "Seconds of an optimizer step")?,
            checkpoint_duration: histogram("checkpoint_duration_seconds", "Seconds of a commit")?,
        })
    }
}
