//! `RunConfig`: everything the trainer does, fully resolved.
//!
//! Written by [`crate::resolve`] (by the operator into a ConfigMap, by a local run in memory), read by the trainer.
//! Unknown fields are refused: a trainer that is older than its operator says so instead of ignoring a setting. So that a
//! profile may pin an older trainer all the same, a field that is added is left out where it says what a trainer without it
//! does anyway (`#[serde(default, skip_serializing_if = …)]`): only a job that asks for the new thing needs the new trainer.
//! `run/golden` holds that rule, and that digests of configurations, by which runs are resumed, stay as they are.
//! Numbers that the resource carries as quoted decimals are `f64` here, parsed once. `None` means that the trainer
//! chooses from what it sees (the model's context, the rows, the memory) and echoes the choice in its report.

mod checkpoint;
mod data;
#[cfg(test)]
mod golden;
mod hyperparameters;
mod method;
mod output;
mod validation;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use checkpoint::{CheckpointConfig, CheckpointInterval};
pub use data::{DataFormat, DataSource, DatasetConfig, ModelSource, OnProblem, ProblemAction, ValidationRows};
pub use hyperparameters::{Duration, Hyperparameters, Optimizer, Precision, Scheduler};
pub use method::{Lora, Method, Quantization, QuantizationType};
pub use output::{OutputConfig, OutputFormat};
pub use validation::{Baseline, EarlyStopping, Evaluate, Forgetting, Gate, Metric, ValidationConfig};

/// The version of this contract.
pub const RUN_CONFIG_VERSION: i32 = 1;

/// What one pod of a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PodStage {
    /// Fetches, checks and tokenises; needs no accelerator.
    Prepare,
    /// Trains and judges; needs no network.
    Train,
    /// Writes the output.
    Publish,
    /// Hands on the last word of one of the others, whose pod is gone.
    Report,
}

impl PodStage {
    /// Every stage, in the order of a job.
    pub const ALL: [Self; 4] = [Self::Prepare, Self::Train, Self::Publish, Self::Report];

    /// The name in arguments, labels, file names and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Train => "train",
            Self::Publish => "publish",
            Self::Report => "report",
        }
    }
}

/// A file of this contract could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not YAML.
    #[error(transparent)]
    Yaml(#[from] serde_saphyr::Error),
    /// Not what the contract says.
    #[error("line {line}, column {column}: {field}: {message}")]
    Field {
        /// Counted from 1.
        line: u64,
        /// Counted from 1.
        column: u64,
        /// Path of the field, or of the nearest one around it.
        field: String,
        /// What was found and what is expected.
        message: String,
    },
}

/// Reads YAML into `T`; what is wrong is told with its place.
fn from_yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Error> {
    let document = crate::yaml::Document::parse(text)?;
    serde_path_to_error::deserialize(document.value.clone()).map_err(|error| {
        use serde_path_to_error::Segment;
        let mut pointer = String::new();
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => pointer += &format!("/{index}"),
                Segment::Map { key } => pointer += &format!("/{}", key.replace('~', "~0").replace('/', "~1")),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        let (line, column) = document.position(&pointer);
        Error::Field { line, column, field: error.path().to_string(), message: error.inner().to_string() }
    })
}

/// What to do about a configuration that says more than this version knows. Nobody writes it by hand: its writer is newer.
fn older_than_the_operator(message: &str) -> Option<String> {
    let known =
        message.split_once(", expected").or_else(|| message.split_once(", there are no")).map(|(found, _)| found)?;
    let is_unknown = known.starts_with("unknown field") || known.starts_with("unknown variant");
    is_unknown.then(|| format!("{known}: {ADVICE}"))
}

const ADVICE: &str = concat!(
    "this trainer (version ",
    env!("CARGO_PKG_VERSION"),
    ") is older than the operator that wrote the file; set image in the job's profile to the trainer of the operator's version, \
     or leave out of the job what the older one does not know"
);

/// What a running job is told: a file that changes while the trainer runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Control {
    /// Stop at the next step, evaluate, and go on as if all steps were done.
    pub stop_requested: bool,
}

impl Control {
    /// Reads a control file. What a newer operator says beside is not for this trainer.
    pub fn from_yaml(text: &str) -> Result<Self, Error> {
        from_yaml(text)
    }
}

/// A fully resolved run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunConfig {
    /// [`RUN_CONFIG_VERSION`].
    pub version: i32,
    /// Which job and attempt this is.
    pub job: JobIdentity,
    /// The base model.
    pub model: ModelSource,
    /// Training and validation rows.
    pub dataset: DatasetConfig,
    /// What is trained.
    pub method: Method,
    /// How it is trained.
    pub hyperparameters: Hyperparameters,
    /// When checkpoints are committed and which are kept.
    pub checkpoint: CheckpointConfig,
    /// How the result is judged.
    pub validation: ValidationConfig,
    /// When to stop for lack of improvement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
    /// What is written at the end.
    pub output: OutputConfig,
    /// What the job may use.
    pub resources: ResourceLimits,
    /// Where the volumes are; absent in local runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageConfig>,
}

impl RunConfig {
    /// Reads a configuration file, strictly.
    pub fn from_yaml(text: &str) -> Result<Self, Error> {
        let document = crate::yaml::Document::parse(text)?;
        let refuse = |(line, column), field: String, message| Error::Field { line, column, field, message };
        // The version first: of another one no field means what it seems to.
        if let Some(version) = document.value.get("version").and_then(serde_json::Value::as_i64)
            && version != i64::from(RUN_CONFIG_VERSION)
        {
            let message = format!("found {version}, expected {RUN_CONFIG_VERSION}: {ADVICE}");
            return Err(refuse(document.position("/version"), "version".into(), message));
        }
        from_yaml(text).map_err(|error| match error {
            Error::Field { line, column, field, message } => {
                let message = older_than_the_operator(&message).unwrap_or(message);
                refuse((line, column), field, message)
            }
            yaml @ Error::Yaml(_) => yaml,
        })
    }

    /// The configuration as a file.
    pub fn to_yaml(&self) -> String {
        // By way of JSON: YAML's own tags for enums are nothing that other readers know.
        let value = serde_json::to_value(self).expect("a configuration is JSON");
        serde_saphyr::to_string(&value).expect("JSON is YAML")
    }

    /// `job.uid` of a file that cannot be read as a whole, so that the refusal can still be told to somebody.
    pub fn job_uid_of(text: &str) -> Option<String> {
        let document = crate::yaml::Document::parse(text).ok()?;
        document.value.pointer("/job/uid").and_then(|uid| uid.as_str()).map(str::to_owned)
    }
}

/// Where a pod finds its volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StorageConfig {
    /// The run directory: everything that the stages leave for each other.
    pub directory: String,
    /// What `directory` is called outside of the pod: `pvc://claim` or `pvc://claim/path`.
    pub uri: String,
    /// Folder where each claim is mounted that a `pvc://` URI of this configuration names.
    pub claims: std::collections::BTreeMap<String, String>,
}

/// Which job and attempt a run belongs to; checked against every checkpoint before it is trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JobIdentity {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`; absent in local runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// `metadata.uid`; in local runs derived from the name.
    pub uid: String,
    /// 1 for the first attempt. `None` in local runs: the next free number of the run directory is claimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<i32>,
}

/// What the job may use. In a cluster the kubelet enforces it; a local run has no scheduler and no enforcer, so it holds
/// itself to these limits, and of requests and other limits it warns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResourceLimits {
    /// Whether an accelerator was asked for. A machine without one is then refused (exit code 64), not made do with.
    pub accelerator: bool,
    /// CPUs, whole or in part; `None`: as many as the cgroup and the affinity mask allow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// Memory limit in bytes; `None`: the cgroup's or the machine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<i64>,
    /// Memory of the accelerator in bytes, as the profile tells it to those who plan without one; `None`: nobody tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator_memory_bytes: Option<i64>,
    /// Price of an hour of the machine or accelerator, in the currency of the profile's owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn config() -> RunConfig {
        let text = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\nspec:\n  \
                    model: {uri: hf://owner/name}\n  dataset: {train: {uri: hf://datasets/a/b/c}, splitPercent: 5}\n  method: {type: LoRA}\n  \
                    validation: {gates: [{metric: evalLoss, operator: AtMost, value: \"1\"}]}\n";
        let checked = crate::check::check(text, crate::check::Scope::Local).expect("valid");
        let claims = BTreeMap::new();
        let target = crate::resolve::Target::Local { folder: std::path::Path::new("/"), claims: &claims };
        let profiles = crate::profile::built_in();
        let mut config = crate::resolve::resolve(&checked.job, &profiles, target).expect("supported").config;
        config.storage = Some(StorageConfig {
            directory: "/data".into(),
            uri: "pvc://bot".into(),
            claims: [("rows".to_owned(), "/sources/rows".to_owned())].into(),
        });
        config
    }

    #[test]
    fn a_configuration_comes_back_from_yaml_and_from_json() {
        let config = config();
        assert_eq!(RunConfig::from_yaml(&config.to_yaml()).expect("strict"), config);
        let json = serde_json::to_string(&config).expect("JSON");
        assert_eq!(RunConfig::from_yaml(&json).expect("JSON is YAML"), config);
        assert_eq!(RunConfig::job_uid_of(&format!("{}surprise: 1\n", config.to_yaml())), Some("local-bot".into()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (from, to, expected) in [
            (
                "batchSize: 16",
                "batchSize: many",
                "hyperparameters.batchSize: invalid type: string \"many\", expected i64",
            ),
            (
                "rank: 16",
                "rank: 16\n      rang: 3",
                "method.loRA.lora.rang: unknown field `rang`: this trainer (version 0.1.0) is older than the operator",
            ),
            ("name: bot", "nom: bot", "job.nom: unknown field `nom`: this trainer"),
            ("metric: evalLoss", "metric: rouge", "validation.metric: unknown variant `rouge`: this trainer"),
            ("  uid: local-bot\n", "", "job: missing field `uid`"),
            ("version: 1", "version: 2\nsurprise: 1", "version: found 2, expected 1: this trainer"),
        ] {
            let text = config().to_yaml();
            assert!(text.contains(from), "{from}\n{text}");
            let error = RunConfig::from_yaml(&text.replacen(from, to, 1)).expect_err(to).to_string();
            let (place, message) = error.split_once(": ").expect("place and message");
            assert!(place.starts_with("line ") && message.starts_with(expected), "{error}");
        }
        assert!(RunConfig::from_yaml("version: [").is_err());
    }

    #[test]
    fn control_asks_for_a_stop_or_for_nothing() {
        for (text, expected) in [
            ("stopRequested: true", Some(true)),
            ("{}", Some(false)),
            ("later: 1", Some(false)),
            ("stopRequested: soon", None),
        ] {
            assert_eq!(Control::from_yaml(text).ok().map(|control| control.stop_requested), expected, "{text}");
        }
    }

    #[test]
    fn a_stage_has_one_name() {
        for stage in PodStage::ALL {
            assert_eq!(serde_json::to_value(stage).expect("JSON"), stage.name());
        }
    }
}
