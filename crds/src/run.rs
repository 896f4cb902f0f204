//! `RunConfig`: everything the trainer does, fully resolved.
//!
//! Written by [`crate::resolve`] (by the operator into a ConfigMap, by a local run in memory), read by the trainer.
//! Unknown fields are refused: a trainer that is older than its operator says so instead of ignoring a setting.
//! Numbers that the resource carries as quoted decimals are `f64` here, parsed once. `None` means that the trainer
//! chooses from what it sees (the model's context, the rows, the memory) and echoes the choice in its report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
        let config: Self = from_yaml(text)?;
        if config.version == RUN_CONFIG_VERSION {
            return Ok(config);
        }
        let (line, column) = crate::yaml::Document::parse(text)?.position("/version");
        let message = format!("found {}, expected {RUN_CONFIG_VERSION}", config.version);
        Err(Error::Field { line, column, field: "version".into(), message })
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

/// A base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// Where it is: `hf://owner/name`, or `file:///absolute/path` in local runs.
    pub uri: String,
    /// Branch, tag or commit of a hub repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Folder where the Secret of `secretRef` is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_path: Option<String>,
}

/// Rows from one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataSource {
    /// Where the rows are.
    pub uri: String,
    /// How a row is to be read.
    pub format: DataFormat,
    /// From the field name that the format expects to the column that holds it.
    #[serde(default)]
    pub column_map: std::collections::BTreeMap<String, String>,
    /// Folder where the Secret of `secretRef` is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_path: Option<String>,
}

/// How a dataset row is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// Decided by the keys of the rows.
    #[default]
    Auto,
    /// OpenAI chat: `messages`, `tools`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGPT,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `text`.
    Text,
}

/// Where validation rows come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ValidationRows {
    /// There are none.
    None,
    /// A source of their own.
    Source(DataSource),
    /// This percentage of the training rows, chosen by seed and row hash.
    SplitPercent(i32),
}

/// Training and validation rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetConfig {
    /// Training rows.
    pub train: DataSource,
    /// Validation rows.
    pub validation: ValidationRows,
    /// What each finding of the data check does.
    pub on_problem: OnProblem,
}

/// What a finding does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProblemAction {
    /// Ends the run before training.
    Fail,
    /// Is reported.
    Warn,
}

/// What each finding of the data check does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OnProblem {
    /// Training rows that are in the validation or forgetting rows too.
    pub leakage: ProblemAction,
    /// Rows that are in the training rows more than once.
    pub duplicates: ProblemAction,
    /// Rows whose answer does not fit into the sequence length.
    pub truncated_answers: ProblemAction,
}

/// What is trained: a value that decides which tensors move and what is exported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Method {
    /// Low-rank adapters on a frozen base.
    LoRA {
        /// The adapters.
        lora: Lora,
    },
    /// Low-rank adapters on a frozen base in four bits.
    QLoRA {
        /// The adapters.
        lora: Lora,
        /// How the base is stored.
        quantization: Quantization,
    },
    /// All weights.
    Full {
        /// Each layer is updated as soon as its backward pass is done, so that only one layer's gradients exist at a time.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        optimizer_in_backward: bool,
    },
}

/// Low-rank adapters: `y = W x + scale * B A drop(x)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lora {
    /// Rows of A, columns of B.
    pub rank: i64,
    /// `scale = alpha / rank`, or `alpha / sqrt(rank)` when rank-stabilised.
    pub alpha: f64,
    /// Probability that an input of A is dropped in training.
    pub dropout: f64,
    /// Last path segments of the linears that get an adapter; empty: every linear of the decoder layers.
    #[serde(default)]
    pub target_modules: Vec<String>,
    /// `alpha / sqrt(rank)`.
    pub rank_stabilized: bool,
}

/// How a frozen base is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quantization {
    /// The storage type.
    #[serde(rename = "type")]
    pub quantization_type: QuantizationType,
    /// Quantise the block scales too.
    pub double_quantization: bool,
}

/// Storage type of a quantised base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QuantizationType {
    /// Four-bit NormalFloat.
    NF4,
}

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Duration {
    /// Passes over the training rows.
    Epochs(f64),
    /// Optimizer steps.
    MaxSteps(i64),
}

/// Learning-rate schedules, by Hugging Face's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Scheduler {
    /// No change after warm-up.
    Constant,
    /// Down to zero in a straight line.
    Linear,
    /// Half a cosine down to zero.
    Cosine,
    /// Half a cosine down to a tenth.
    CosineWithMinLr,
    /// Falls with the square root of the step.
    InverseSqrt,
}

/// Number format of weights and activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// bf16 where the device computes in it, fp32 elsewhere.
    #[default]
    Auto,
    /// bfloat16 weights and activations; masters, moments and sums in fp32.
    BF16,
    /// fp32 throughout.
    FP32,
}

/// The optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optimizer {
    /// Moments in fp32: 8 bytes per trained weight.
    #[default]
    AdamW,
    /// Moments in 8 bits with a scale for every 256: 2 bytes per trained weight.
    AdamW8Bit,
}

impl Optimizer {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How the model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hyperparameters {
    /// How long.
    pub duration: Duration,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Examples of one optimizer step.
    pub batch_size: i64,
    /// Tokens computed at once; `None`: chosen by the memory plan. Never changes the result beyond rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<i64>,
    /// Longest example in tokens; `None`: the model's context or the longest row, whichever is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<i64>,
    /// Schedule after warm-up.
    pub scheduler: Scheduler,
    /// Share of the steps spent warming up.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: gradients are not clipped.
    pub max_grad_norm: f64,
    /// The optimizer. The default is not written: runs that began before there was a choice go on.
    #[serde(default, skip_serializing_if = "Optimizer::is_default")]
    pub optimizer: Optimizer,
    /// All randomness derives from it.
    pub seed: i64,
    /// NEFTune noise; `None`: off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neftune_alpha: Option<f64>,
    /// Number format.
    pub precision: Precision,
}

/// When a checkpoint is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum CheckpointInterval {
    /// Every so many optimizer steps.
    EverySteps(i64),
    /// Every so many seconds, at the end of a step.
    EverySeconds(i64),
}

/// Checkpoints: when, which are kept, and whether to continue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckpointConfig {
    /// When one is due.
    pub interval: CheckpointInterval,
    /// Newest ones kept.
    pub keep_latest: i64,
    /// Best ones kept.
    pub keep_best: i64,
    /// Continue the newest checkpoint that verifies.
    pub resume: bool,
}

/// A metric that validation measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Metric {
    /// Mean negative log-likelihood in nats per trained token; lower is better.
    EvalLoss,
    /// `exp(evalLoss)`; lower is better.
    Perplexity,
    /// Share of trained tokens whose most likely prediction is the label.
    TokenAccuracy,
    /// Share of rows whose greedy answer equals the reference.
    ExactMatch,
}

impl Metric {
    /// The name used in YAML, reports and series.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EvalLoss => "evalLoss",
            Self::Perplexity => "perplexity",
            Self::TokenAccuracy => "tokenAccuracy",
            Self::ExactMatch => "exactMatch",
        }
    }

    /// Whether a smaller value is the better one.
    pub const fn lower_is_better(self) -> bool {
        matches!(self, Self::EvalLoss | Self::Perplexity)
    }
}

/// Which checkpoint is judged and exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Evaluate {
    /// The best by the metric.
    Best,
    /// The last.
    Last,
}

/// What a gate compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Baseline {
    /// The base model without examples in the prompt.
    Base,
    /// The base model with a few examples in the prompt.
    FewShot,
}

/// A condition that the result must meet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "operator", deny_unknown_fields)]
pub enum Gate {
    /// The metric is at most the value.
    AtMost {
        /// What is measured.
        metric: Metric,
        /// The bound.
        value: f64,
    },
    /// The metric is at least the value.
    AtLeast {
        /// What is measured.
        metric: Metric,
        /// The bound.
        value: f64,
    },
    /// The metric is better than the baseline's by at least this much.
    ImprovesOn {
        /// What is measured.
        metric: Metric,
        /// Whose value is to be beaten.
        baseline: Baseline,
        /// By how much, in the metric's own unit.
        by: f64,
    },
}

/// A check that general ability was not lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Forgetting {
    /// General text that has nothing to do with the task.
    pub dataset: DataSource,
    /// Largest tolerated increase of the mean loss over the base model's.
    pub max_loss_increase: f64,
}

/// How the result is judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ValidationConfig {
    /// Evaluate every so many steps; `None`: about ten times over the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<i64>,
    /// Decides which checkpoint is best.
    pub metric: Metric,
    /// Which checkpoint is judged and exported.
    pub evaluate: Evaluate,
    /// Measure the base model.
    pub zero_shot: bool,
    /// Measure the base model with this many examples in the prompt; 0: not at all.
    pub few_shot_examples: i64,
    /// What the result must meet.
    pub gates: Vec<Gate>,
    /// What must not be lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<Forgetting>,
    /// Whether a failed gate fails the job.
    pub fail_on_gate: bool,
}

/// Stop when the metric no longer improves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EarlyStopping {
    /// Evaluations without improvement.
    pub patience: i64,
    /// Smallest change that counts as one.
    pub min_delta: f64,
}

/// What the run writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OutputFormat {
    /// A PEFT adapter.
    Adapter,
    /// A Hugging Face model.
    Merged,
}

/// What is written at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputConfig {
    /// Adapter or merged model; `Full` is always a merged model.
    pub format: OutputFormat,
    /// Write the output even if validation failed.
    pub publish_always: bool,
    /// Where it is copied to: `pvc://claim/path`; `None`: it stays in the run directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
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
            ("rank: 16", "rank: 16\n      rang: 3", "method.loRA.lora.rang: unknown field `rang`, expected one of"),
            ("name: bot", "nom: bot", "job.nom: unknown field `nom`, expected one of"),
            ("  uid: local-bot\n", "", "job: missing field `uid`"),
            ("version: 1", "version: 2", "version: found 2, expected 1"),
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
