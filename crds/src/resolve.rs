//! From a checked job and a profile to a [`RunConfig`] in which nothing is implicit. Pure.
//!
//! What the trainer does not honour yet is refused here, by name; what can do no harm here is warned about, by name. A
//! setting is never ignored.

mod cluster;
mod named;
mod resources;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use cluster::{VolumeClaim, claim_of, decimal_text, hyperparameters_spec, volume_claim};
pub use resources::{accelerators, training_resources};

use self::named::profile_of;
use crate::condition::reason;
use crate::finetunejob::{
    FineTuneJob, GateOperator, GateSpec, HyperparametersSpec, MethodSpec, MethodType, OnFailure, PublishWhen, Resume,
    RowSource, Uri,
};
use crate::profile::{self, Profile, Profiles};
use crate::run::{
    CheckpointConfig, CheckpointInterval, DataFormat, DataSource, DatasetConfig, Duration, EarlyStopping, Evaluate,
    Forgetting, Gate, Hyperparameters, JobIdentity, Lora, Method, Metric, ModelSource, OnProblem, OutputConfig,
    OutputFormat, Precision, ProblemAction, RUN_CONFIG_VERSION, RunConfig, Scheduler, ValidationConfig, ValidationRows,
};

/// Something to tell about a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Why, as the reason of a condition.
    pub reason: &'static str,
    /// Path of the field, as the API server writes it.
    pub field: String,
    /// What is wrong with it and what to do.
    pub message: String,
}

/// A run, and what its user should know about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The run.
    pub config: RunConfig,
    /// Settings that have no effect where it runs.
    pub warnings: Vec<Finding>,
}

/// Where the job runs.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// On this machine.
    Local {
        /// The folder of the YAML file, from which relative `file://` sources start.
        folder: &'a Path,
        /// Folders that stand for the claims of `pvc://` sources.
        claims: &'a BTreeMap<String, PathBuf>,
    },
    /// In pods of the job's namespace.
    Cluster,
}

/// Fields that are not honoured yet: JSON pointer below `spec`.
const NOT_SUPPORTED: [&str; 9] = [
    "/model/secretRef",
    "/dataset/train/secretRef",
    "/dataset/train/columnMap",
    "/dataset/validation/secretRef",
    "/dataset/validation/columnMap",
    "/validation/forgetting/dataset/secretRef",
    "/validation/forgetting/dataset/columnMap",
    "/checkpoint/resumeFrom",
    "/output/secretRef",
];

/// Fields that mean nothing without a cluster: JSON pointer below `spec`, and what holds instead.
const CLUSTER_ONLY: [(&str, &str); 8] = [
    ("/scheduling", "a local run has no scheduler"),
    ("/checkpoint/storage", "a local run keeps its checkpoints in the run directory (--dir)"),
    ("/output/uri", "a local run leaves its output in the run directory (--dir)"),
    ("/failurePolicy", "a local run is started again by hand, and continues"),
    ("/startDeadlineSeconds", "a local run starts at once"),
    ("/activeDeadlineSeconds", "a local run trains until it is done or stopped"),
    ("/ttlSecondsAfterFinished", "a local run leaves its directory"),
    ("/managedBy", "a local run has no controller"),
];

/// Resolves a job, by the profile that it names, for `target`.
pub fn resolve(job: &FineTuneJob, profiles: &Profiles, target: Target) -> Result<Resolved, Vec<Finding>> {
    let profile = profile_of(job, profiles, target).map_err(|finding| vec![finding])?;
    let mut resolver = Resolver { profile, target, problems: Vec::new(), warnings: Vec::new() };
    let config = resolver.resolve(job);
    if resolver.problems.is_empty() {
        Ok(Resolved { config, warnings: resolver.warnings })
    } else {
        Err(resolver.problems)
    }
}

struct Resolver<'a> {
    profile: &'a Profile,
    target: Target<'a>,
    problems: Vec<Finding>,
    warnings: Vec<Finding>,
}

impl Resolver<'_> {
    fn refuse(&mut self, field: &str, message: impl Into<String>) {
        self.refuse_because(reason::NOT_SUPPORTED, field, message);
    }

    fn refuse_because(&mut self, reason: &'static str, field: &str, message: impl Into<String>) {
        self.problems.push(Finding { reason, field: field.into(), message: message.into() });
    }

    fn warn(&mut self, field: &str, message: impl Into<String>) {
        self.warnings.push(Finding { reason: reason::NOT_SUPPORTED, field: field.into(), message: message.into() });
    }

    fn refuse_unsupported(&mut self, job: &FineTuneJob) {
        let spec = serde_json::to_value(&job.spec).expect("a spec is JSON");
        let is_set = |pointer: &str| spec.pointer(pointer).is_some_and(|value| !value.is_null());
        let field = |pointer: &str| format!("spec{}", pointer.replace('/', "."));
        for pointer in NOT_SUPPORTED.into_iter().filter(|pointer| is_set(pointer)) {
            self.refuse(&field(pointer), "not supported yet: remove it");
        }
        if matches!(self.target, Target::Local { .. }) {
            for (pointer, instead) in CLUSTER_ONLY.into_iter().filter(|(pointer, _)| is_set(pointer)) {
                self.warn(&field(pointer), format!("has no effect: {instead}"));
            }
            if job.spec.suspend {
                self.refuse("spec.suspend", "a suspended job does not run: remove it");
            }
            if job.spec.stop_requested {
                self.refuse("spec.stopRequested", "a local run is stopped by Ctrl-C: remove it");
            }
        }
        if job.spec.nodes != 1 {
            self.refuse("spec.nodes", "not supported yet: more than one node");
        }
        if job.spec.method.method_type == MethodType::QLoRA {
            self.refuse("spec.method.type", "not supported yet: QLoRA; use LoRA");
        }
    }

    /// A source that this version fetches, with a relative path made absolute.
    fn source(&mut self, field: &str, uri: &Uri) -> String {
        let uri = uri.0.as_str();
        self.allowed(field, uri);
        match (uri.split_once("://"), self.target) {
            (Some(("hf", _)) | None, _) | (Some(("pvc", _)), Target::Cluster) => uri.to_owned(),
            (Some(("file", path)), Target::Local { folder, .. }) => {
                let path = Path::new(path);
                format!("file://{}", if path.is_absolute() { path.into() } else { folder.join(path) }.display())
            }
            (Some(("pvc", path)), Target::Local { folder, claims }) => {
                let (claim, path) = path.split_once('/').unwrap_or((path, ""));
                if let Some(stand_in) = claims.get(claim) {
                    return format!("file://{}", folder.join(stand_in).join(path).display());
                }
                self.refuse(field, format!("no folder stands for the claim {claim}: add --claim {claim}=FOLDER"));
                uri.to_owned()
            }
            (Some((scheme, _)), target) => {
                let known = if matches!(target, Target::Cluster) { "pvc://" } else { "file://" };
                self.refuse(field, format!("not supported yet: {scheme}:// sources; use hf:// or {known}"));
                uri.to_owned()
            }
        }
    }

    fn allowed(&mut self, field: &str, uri: &str) {
        // Whoever resolves it would end elsewhere than where the profile's prefixes and claims were compared.
        let climbs = |part: &str| matches!(part.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
        if !uri.starts_with("file://") && uri.split('/').any(climbs) {
            let message = format!("found {uri}, expected a path without the parts . and ..");
            self.refuse_because(reason::SOURCE_NOT_ALLOWED, field, message);
        }
        let prefixes = &self.profile.allowed.source_prefixes;
        if !profile::allows_prefix(prefixes, uri) {
            let message = format!("the profile allows sources that begin with {}", prefixes.join(", "));
            self.refuse_because(reason::SOURCE_NOT_ALLOWED, field, message);
        }
        if let Some((claim, _)) =
            claim_of(uri).filter(|(claim, _)| !profile::allows(&self.profile.allowed.claims, claim))
        {
            let list = &self.profile.allowed.claims;
            let expected = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
            let message = format!("found the claim {claim}, the profile allows {expected}");
            self.refuse_because(reason::SOURCE_NOT_ALLOWED, field, message);
        }
    }

    fn rows(&mut self, field: &str, source: &RowSource) -> DataSource {
        let format = source.format.unwrap_or_default();
        if matches!(format, DataFormat::ShareGPT | DataFormat::Alpaca) {
            self.refuse(
                &format!("{field}.format"),
                format!("not supported yet: {format:?}; convert the rows to Messages"),
            );
        }
        DataSource {
            uri: self.source(&format!("{field}.uri"), &source.uri),
            format,
            column_map: source.column_map.clone(),
            secret_path: None,
        }
    }

    fn resolve(&mut self, job: &FineTuneJob) -> RunConfig {
        self.refuse_unsupported(job);
        let spec = &job.spec;
        let name = job.metadata.name.clone().unwrap_or_default();
        let dataset = &spec.dataset;
        let validation_rows = match (&dataset.validation, dataset.split_percent) {
            (Some(source), _) => ValidationRows::Source(self.rows("spec.dataset.validation", source)),
            (None, Some(percent)) => ValidationRows::SplitPercent(percent),
            (None, None) => ValidationRows::None,
        };
        if spec.model.revision.is_some() && !spec.model.uri.0.starts_with("hf://") {
            self.refuse("spec.model.revision", "only a hf:// model has revisions: remove it");
        }
        if validation_rows == ValidationRows::None
            && spec.checkpoint.as_ref().and_then(|checkpoint| checkpoint.keep.as_ref()?.best).is_some()
        {
            self.warn(
                "spec.checkpoint.keep.best",
                "without validation rows no checkpoint is the best: it has no effect",
            );
        }
        let on_problem = dataset.on_problem.as_ref();
        let action = |chosen: Option<ProblemAction>, default| chosen.unwrap_or(default);
        let has_validation = validation_rows != ValidationRows::None;
        RunConfig {
            version: RUN_CONFIG_VERSION,
            job: JobIdentity {
                uid: match self.target {
                    Target::Local { .. } => local_uid(&name),
                    Target::Cluster => job.metadata.uid.clone().unwrap_or_default(),
                },
                name,
                namespace: job.metadata.namespace.clone(),
                attempt: None,
            },
            model: ModelSource {
                uri: self.source("spec.model.uri", &spec.model.uri),
                revision: spec.model.revision.clone(),
                secret_path: None,
            },
            dataset: DatasetConfig {
                train: self.rows("spec.dataset.train", &dataset.train),
                validation: validation_rows,
                on_problem: OnProblem {
                    leakage: action(on_problem.and_then(|p| p.leakage), ProblemAction::Fail),
                    duplicates: action(on_problem.and_then(|p| p.duplicates), ProblemAction::Warn),
                    truncated_answers: action(on_problem.and_then(|p| p.truncated_answers), ProblemAction::Fail),
                },
            },
            method: method(&spec.method),
            hyperparameters: hyperparameters(spec.method.method_type, spec.hyperparameters.as_ref()),
            checkpoint: checkpoint(job),
            validation: self.validation(job, has_validation),
            early_stopping: spec.early_stopping.as_ref().map(|stopping| EarlyStopping {
                patience: stopping.patience.into(),
                min_delta: stopping.min_delta.as_ref().map_or(0.0, crate::finetunejob::Decimal::value),
            }),
            output: self.output(job),
            resources: self.resources(job),
            storage: self.storage(job),
        }
    }

    fn validation(&mut self, job: &FineTuneJob, has_validation: bool) -> ValidationConfig {
        let validation = job.spec.validation.clone().unwrap_or_default();
        let baselines = validation.baselines.unwrap_or_default();
        let forgetting = validation.forgetting.as_ref().map(|forgetting| Forgetting {
            dataset: self.rows("spec.validation.forgetting.dataset", &forgetting.dataset),
            max_loss_increase: forgetting.max_loss_increase.as_ref().map_or(0.10, crate::finetunejob::Decimal::value),
        });
        ValidationConfig {
            every_steps: validation.every_steps,
            metric: validation.metric.unwrap_or(Metric::EvalLoss),
            evaluate: validation.evaluate.unwrap_or(Evaluate::Best),
            zero_shot: has_validation && baselines.zero_shot.unwrap_or(true),
            few_shot_examples: if has_validation { baselines.few_shot.map_or(4, |few| few.examples.into()) } else { 0 },
            gates: validation.gates.iter().filter_map(gate).collect(),
            forgetting,
            fail_on_gate: validation.on_failure != Some(OnFailure::Complete),
        }
    }
}

impl Resolver<'_> {
    fn output(&mut self, job: &FineTuneJob) -> OutputConfig {
        let spec = job.spec.output.clone().unwrap_or_default();
        let is_full = job.spec.method.method_type == MethodType::Full;
        let uri = spec.uri.map(|uri| uri.0).filter(|_| matches!(self.target, Target::Cluster));
        if let Some(uri) = &uri {
            let field = "spec.output.uri";
            self.allowed(field, uri);
            if claim_of(uri).is_none_or(|(_, path)| path.is_empty()) {
                self.refuse(field, format!("not supported yet: {uri}; use pvc://claim/path, or leave it out"));
            } else {
                self.destination(field, uri, job);
            }
        }
        OutputConfig {
            format: spec.format.unwrap_or(if is_full { OutputFormat::Merged } else { OutputFormat::Adapter }),
            publish_always: spec.publish_when == Some(PublishWhen::Always),
            uri,
        }
    }
}

/// A stable identity for a job that no API server gave one.
fn local_uid(name: &str) -> String {
    format!("local-{name}")
}

fn method(spec: &MethodSpec) -> Method {
    if spec.method_type == MethodType::Full {
        return Method::Full {
            optimizer_in_backward: spec.full.as_ref().is_some_and(|full| full.optimizer_in_backward),
        };
    }
    let lora = spec.lora.clone().unwrap_or_default();
    let rank = lora.rank.unwrap_or(16);
    Method::LoRA {
        lora: Lora {
            rank: rank.into(),
            alpha: lora.alpha.unwrap_or(2 * rank).into(),
            dropout: lora.dropout.as_ref().map_or(0.0, crate::finetunejob::Probability::value),
            target_modules: lora.target_modules,
            rank_stabilized: lora.rank_stabilized,
        },
    }
}

fn hyperparameters(method_type: MethodType, spec: Option<&HyperparametersSpec>) -> Hyperparameters {
    let spec = spec.cloned().unwrap_or_default();
    let default_rate = if method_type == MethodType::Full { 2e-5 } else { 2e-4 };
    Hyperparameters {
        duration: match (&spec.epochs, spec.max_steps) {
            (Some(epochs), _) => Duration::Epochs(epochs.value()),
            (None, Some(steps)) => Duration::MaxSteps(steps),
            (None, None) => Duration::Epochs(3.0),
        },
        learning_rate: spec.learning_rate.as_ref().map_or(default_rate, crate::finetunejob::PositiveDecimal::value),
        batch_size: spec.batch_size.map_or(16, i64::from),
        micro_batch_tokens: spec.micro_batch_tokens,
        max_sequence_length: spec.max_sequence_length,
        scheduler: spec.scheduler.unwrap_or(Scheduler::CosineWithMinLr),
        warmup_ratio: spec.warmup_ratio.as_ref().map_or(0.03, crate::finetunejob::Share::value),
        weight_decay: spec.weight_decay.as_ref().map_or(0.0, crate::finetunejob::Decimal::value),
        max_grad_norm: spec.max_grad_norm.as_ref().map_or(1.0, crate::finetunejob::Decimal::value),
        optimizer: spec.optimizer.unwrap_or_default(),
        seed: spec.seed.unwrap_or(42),
        neftune_alpha: spec.neftune_alpha.as_ref().map(crate::finetunejob::PositiveDecimal::value),
        precision: spec.precision.unwrap_or(Precision::Auto),
    }
}

fn checkpoint(job: &FineTuneJob) -> CheckpointConfig {
    let spec = job.spec.checkpoint.clone().unwrap_or_default();
    let keep = spec.keep.as_ref();
    CheckpointConfig {
        interval: match (spec.every_steps, spec.every_seconds) {
            (Some(steps), _) => CheckpointInterval::EverySteps(steps),
            (None, seconds) => CheckpointInterval::EverySeconds(seconds.unwrap_or(600)),
        },
        keep_latest: keep.and_then(|keep| keep.latest).map_or(2, i64::from),
        keep_best: keep.and_then(|keep| keep.best).map_or(1, i64::from),
        resume: spec.resume != Some(Resume::Never),
    }
}

/// A gate whose fields the CRD's rules have checked.
fn gate(spec: &GateSpec) -> Option<Gate> {
    let metric = spec.metric;
    match spec.operator {
        GateOperator::AtMost => Some(Gate::AtMost { metric, value: spec.value.as_ref()?.value() }),
        GateOperator::AtLeast => Some(Gate::AtLeast { metric, value: spec.value.as_ref()?.value() }),
        GateOperator::ImprovesOn => {
            Some(Gate::ImprovesOn { metric, baseline: spec.baseline?, by: spec.by.as_ref()?.value() })
        }
    }
}
