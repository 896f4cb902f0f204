//! From a checked job and a profile to a [`RunConfig`] in which nothing is implicit. Pure.
//!
//! What the trainer does not honour yet is refused here, by name: a setting is never ignored.

use std::path::Path;

use serde_json::Value;

use crate::finetunejob::{
    FineTuneJob, GateOperator, GateSpec, HyperparametersSpec, LoraSpec, MethodType, OnFailure, PublishWhen, Resume,
    RowSource, Uri,
};
use crate::profile::Profile;
use crate::run::{
    CheckpointConfig, CheckpointInterval, DataFormat, DataSource, DatasetConfig, Duration, EarlyStopping, Evaluate,
    Forgetting, Gate, Hyperparameters, JobIdentity, Lora, Method, Metric, ModelSource, OnProblem, OutputConfig,
    OutputFormat, Precision, ProblemAction, RUN_CONFIG_VERSION, ResourceLimits, RunConfig, Scheduler, ValidationConfig,
    ValidationRows,
};

/// A field that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresolved {
    /// Path of the field.
    pub field: String,
    /// What is wrong with it and what to do.
    pub message: String,
}

/// Where the job runs.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// On this machine; relative `file://` sources start from this folder.
    Local {
        /// The folder of the YAML file.
        folder: &'a Path,
    },
}

/// Fields that are not honoured yet: JSON pointer below `spec`, and the value that is as good as absent.
const NOT_SUPPORTED: [(&str, Value); 18] = [
    ("/model/secretRef", Value::Null),
    ("/dataset/train/secretRef", Value::Null),
    ("/dataset/train/columnMap", Value::Null),
    ("/dataset/validation/secretRef", Value::Null),
    ("/dataset/validation/columnMap", Value::Null),
    ("/validation/forgetting/dataset/secretRef", Value::Null),
    ("/validation/forgetting/dataset/columnMap", Value::Null),
    ("/scheduling", Value::Null),
    ("/checkpoint/resumeFrom", Value::Null),
    ("/checkpoint/storage", Value::Null),
    ("/output/uri", Value::Null),
    ("/output/secretRef", Value::Null),
    ("/failurePolicy", Value::Null),
    ("/startDeadlineSeconds", Value::Null),
    ("/activeDeadlineSeconds", Value::Null),
    ("/ttlSecondsAfterFinished", Value::Null),
    ("/managedBy", Value::Null),
    ("/suspend", Value::Bool(false)),
];

/// Resolves a job for `target`.
pub fn resolve(job: &FineTuneJob, profile: &Profile, target: Target) -> Result<RunConfig, Vec<Unresolved>> {
    let mut resolver = Resolver { profile, target, problems: Vec::new() };
    let config = resolver.resolve(job);
    if resolver.problems.is_empty() { Ok(config) } else { Err(resolver.problems) }
}

struct Resolver<'a> {
    profile: &'a Profile,
    target: Target<'a>,
    problems: Vec<Unresolved>,
}

impl Resolver<'_> {
    fn refuse(&mut self, field: &str, message: impl Into<String>) {
        self.problems.push(Unresolved { field: field.into(), message: message.into() });
    }

    fn refuse_unsupported(&mut self, job: &FineTuneJob) {
        let spec = serde_json::to_value(&job.spec).expect("a spec is JSON");
        for (pointer, absent) in &NOT_SUPPORTED {
            if spec.pointer(pointer).is_some_and(|value| value != absent && !value.is_null()) {
                let field = format!("spec{}", pointer.replace('/', "."));
                self.refuse(&field, "not supported yet by local runs: remove it");
            }
        }
        if job.spec.stop_requested {
            self.refuse("spec.stopRequested", "not supported yet by local runs: press Ctrl-C instead");
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
        if !self.profile.allowed_source_prefixes.is_empty()
            && !self.profile.allowed_source_prefixes.iter().any(|prefix| uri.starts_with(prefix.as_str()))
        {
            let allowed = self.profile.allowed_source_prefixes.join(", ");
            self.refuse(field, format!("the profile allows sources that begin with {allowed}"));
        }
        let Target::Local { folder } = self.target;
        match uri.split_once("://") {
            Some(("file", path)) => {
                let path = Path::new(path);
                format!("file://{}", if path.is_absolute() { path.into() } else { folder.join(path) }.display())
            }
            Some(("hf", _)) | None => uri.to_owned(),
            Some((scheme, _)) => {
                self.refuse(field, format!("not supported yet: {scheme}:// sources; use hf:// or file://"));
                uri.to_owned()
            }
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
        let on_problem = dataset.on_problem.as_ref();
        let action = |chosen: Option<ProblemAction>, default| chosen.unwrap_or(default);
        let has_validation = validation_rows != ValidationRows::None;
        RunConfig {
            version: RUN_CONFIG_VERSION,
            job: JobIdentity { uid: local_uid(&name), name, namespace: job.metadata.namespace.clone(), attempt: None },
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
            method: method(spec.method.method_type, spec.method.lora.as_ref()),
            hyperparameters: hyperparameters(spec.method.method_type, spec.hyperparameters.as_ref()),
            checkpoint: checkpoint(job),
            validation: self.validation(job, has_validation),
            early_stopping: spec.early_stopping.as_ref().map(|stopping| EarlyStopping {
                patience: stopping.patience.into(),
                min_delta: stopping.min_delta.as_ref().map_or(0.0, crate::finetunejob::Decimal::value),
            }),
            output: output(job),
            resources: self.resources(job),
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

    fn resources(&mut self, job: &FineTuneJob) -> ResourceLimits {
        let limits = job.spec.resources.as_ref().and_then(|resources| resources.0.limits.as_ref());
        let accelerator = limits.is_some_and(|limits| limits.keys().any(|name| name.contains('/')));
        let memory = limits.and_then(|limits| limits.get("memory"));
        let memory_bytes = memory.and_then(|quantity| {
            let bytes = quantity_bytes(&quantity.0);
            if bytes.is_none() {
                let message = format!("found {:?}, expected a quantity such as 16Gi", quantity.0);
                self.refuse("spec.resources.limits.memory", message);
            }
            bytes
        });
        ResourceLimits { accelerator, memory_bytes, price_per_hour: self.profile.price_per_hour }
    }
}

/// A stable identity for a job that no API server gave one.
fn local_uid(name: &str) -> String {
    format!("local-{name}")
}

/// Bytes of a Kubernetes quantity.
fn quantity_bytes(text: &str) -> Option<i64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let value: f64 = text[..digits].parse().ok()?;
    let factor = match &text[digits..] {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "Ki" => 1024.0,
        "Mi" => 1_048_576.0,
        "Gi" => 1_073_741_824.0,
        "Ti" => 1_099_511_627_776.0,
        _ => return None,
    };
    Some((value * factor) as i64)
}

fn method(method_type: MethodType, lora: Option<&LoraSpec>) -> Method {
    if method_type == MethodType::Full {
        return Method::Full {};
    }
    let lora = lora.cloned().unwrap_or_default();
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
        max_grad_norm: spec.max_grad_norm.as_ref().map_or(1.0, crate::finetunejob::PositiveDecimal::value),
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

fn output(job: &FineTuneJob) -> OutputConfig {
    let spec = job.spec.output.clone().unwrap_or_default();
    let default =
        if job.spec.method.method_type == MethodType::Full { OutputFormat::Merged } else { OutputFormat::Adapter };
    OutputConfig {
        format: spec.format.unwrap_or(default),
        publish_always: spec.publish_when == Some(PublishWhen::Always),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Scope, check};

    fn resolved(added: &str) -> Result<RunConfig, Vec<Unresolved>> {
        let text = format!(
            "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: bot}}\nspec:\n  \
             model: {{uri: hf://owner/name}}\n  dataset: {{train: {{uri: file://train.jsonl}}, splitPercent: 5}}\n  \
             method: {{type: LoRA}}\n{added}"
        );
        let checked = check(&text, Scope::Local).unwrap_or_else(|problems| panic!("{added}: {problems:?}"));
        resolve(&checked.job, &Profile::default(), Target::Local { folder: Path::new("/here") })
    }

    #[test]
    fn nothing_is_implicit_and_the_contract_round_trips() {
        let config = resolved("").expect("supported");
        assert_eq!(config.dataset.train.uri, "file:///here/train.jsonl");
        let Method::LoRA { lora } = &config.method else { panic!("LoRA") };
        assert_eq!((lora.rank, lora.alpha, config.hyperparameters.learning_rate), (16, 32.0, 2e-4));
        assert_eq!((config.validation.zero_shot, config.validation.few_shot_examples), (true, 4));
        let text = serde_json::to_string(&config).expect("JSON");
        assert_eq!(serde_json::from_str::<RunConfig>(&text).expect("round trip"), config);
        let with_more = text.replacen('{', "{\"surprise\":1,", 1);
        assert!(serde_json::from_str::<RunConfig>(&with_more).is_err(), "unknown fields are refused");
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name() {
        for (added, field) in [
            ("  nodes: 2\n", "spec.nodes"),
            ("  suspend: true\n", "spec.suspend"),
            ("  stopRequested: true\n", "spec.stopRequested"),
            ("  managedBy: other\n", "spec.managedBy"),
            ("  startDeadlineSeconds: 5\n", "spec.startDeadlineSeconds"),
            ("  activeDeadlineSeconds: 5\n", "spec.activeDeadlineSeconds"),
            ("  ttlSecondsAfterFinished: 5\n", "spec.ttlSecondsAfterFinished"),
            ("  failurePolicy: {maxRetries: 1}\n", "spec.failurePolicy"),
            ("  scheduling: {queueName: q}\n", "spec.scheduling"),
            ("  checkpoint: {resumeFrom: {uri: s3://b/k}}\n", "spec.checkpoint.resumeFrom"),
            ("  checkpoint: {storage: {claim: c}}\n", "spec.checkpoint.storage"),
            ("  output: {uri: s3://b/k}\n", "spec.output.uri"),
            ("  output: {secretRef: {name: s}}\n", "spec.output.secretRef"),
        ] {
            let problems = resolved(added).expect_err(added);
            assert_eq!(problems.len(), 1, "{added}: {problems:?}");
            assert_eq!(problems[0].field, field);
            assert!(problems[0].message.starts_with("not supported yet"), "{}", problems[0].message);
        }
    }

    #[test]
    fn other_sources_methods_and_formats_are_refused_by_name() {
        let text = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\nspec:\n  \
                    model: {uri: s3://bucket/model, secretRef: {name: s}}\n  \
                    dataset: {train: {uri: \"https://x/y\", format: Alpaca}}\n  method: {type: QLoRA}\n";
        let checked = check(text, Scope::Local).unwrap_or_else(|problems| panic!("{problems:?}"));
        let target = Target::Local { folder: Path::new("/here") };
        let problems = resolve(&checked.job, &Profile::default(), target).expect_err("unsupported");
        let mut fields: Vec<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
        fields.sort_unstable();
        assert_eq!(
            fields,
            [
                "spec.dataset.train.format",
                "spec.dataset.train.uri",
                "spec.method.type",
                "spec.model.secretRef",
                "spec.model.uri"
            ]
        );
    }

    #[test]
    fn quantities_are_bytes() {
        for (text, bytes) in
            [("16Gi", Some(17_179_869_184)), ("1.5G", Some(1_500_000_000)), ("12", Some(12)), ("x", None)]
        {
            assert_eq!(quantity_bytes(text), bytes, "{text}");
        }
    }
}
