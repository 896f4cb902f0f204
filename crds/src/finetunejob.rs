//! The `FineTuneJob` resource: what a user writes and what he is told.
//!
//! Doc comments of fields are what `kubectl explain` prints. Every rule is CEL in the CRD; nothing is checked elsewhere
//! that could be checked there. What the trainer does not honour yet is refused by [`crate::resolve`], by name.

mod checkpoint;
mod data;
mod hyperparameters;
mod method;
mod output;
mod scalar;
mod scheduling;
mod status;
mod validation;

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

pub use checkpoint::{Checkpoint, KeepCheckpoints, Resume, ResumeFrom, Storage, WhenDeleted};
pub use data::{Dataset, Model, OnProblemSpec, RowSource, SecretReference};
pub use hyperparameters::HyperparametersSpec;
pub use method::{FullSpec, LoraSpec, MethodSpec, MethodType, QuantizationSpec};
pub use output::{FailurePolicy, Output, PublishWhen};
pub use scalar::{
    CLUSTER_URI_PATTERN, DECIMAL_PATTERN, Decimal, Epochs, LOCAL_URI_PATTERN, PositiveDecimal, Probability,
    QUANTITY_PATTERN, Share, Uri,
};
pub use scheduling::{JobToleration, Resources, Scheduling};
pub use status::*;
pub use validation::{
    Baselines, EarlyStoppingSpec, FewShot, ForgettingSpec, GateOperator, GateSpec, OnFailure, ValidationSpec,
};

/// A fine-tuning of a language model on your data, validated against the base model.
#[derive(CustomResource, KubeSchema, Clone, Debug, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "finetune.dev",
    version = "v1alpha1",
    kind = "FineTuneJob",
    plural = "finetunejobs",
    shortname = "ftj",
    category = "finetune",
    namespaced,
    status = "FineTuneJobStatus",
    derive = "PartialEq",
    cel,
    selectable = ".spec.method.type",
    validation = Rule::new("size(self.metadata.name) <= 52").message("metadata.name must be at most 52 characters"),
    printcolumn(name = "Method", type_ = "string", json_path = ".spec.method.type"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Step", type_ = "string", json_path = ".status.progress.summary"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.metrics[?(@.name==\"trainLoss\")].value"),
    printcolumn(name = "Eval", type_ = "string", json_path = ".status.metrics[?(@.name==\"evalLoss\")].value"),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.progress.eta"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.uri", priority = "1"),
    printcolumn(name = "Queue", type_ = "string", json_path = ".spec.scheduling.queueName", priority = "1"),
    printcolumn(name = "Attempts", type_ = "integer", json_path = ".status.attempts.total", priority = "1"),
    printcolumn(name = "Verdict", type_ = "string", json_path = ".status.validation.verdict", priority = "1"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Failed\")].reason",
        priority = "1"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "self.model == oldSelf.model && self.dataset == oldSelf.dataset && self.method == oldSelf.method && \
         has(self.hyperparameters) == has(oldSelf.hyperparameters) && \
         (!has(self.hyperparameters) || self.hyperparameters == oldSelf.hyperparameters)"
    ).message("training inputs are immutable; create a new FineTuneJob (checkpoint.resumeFrom continues this one)"),
    validation = Rule::new(
        "has(self.managedBy) == has(oldSelf.managedBy) && (!has(self.managedBy) || self.managedBy == oldSelf.managedBy)"
    ).message("managedBy is immutable"),
    validation = Rule::new(
        "has(self.profile) == has(oldSelf.profile) && (!has(self.profile) || self.profile == oldSelf.profile)"
    ).message("profile is immutable"),
    validation = Rule::new(
        "self.nodes == oldSelf.nodes && has(self.resources) == has(oldSelf.resources) && \
         (!has(self.resources) || self.resources == oldSelf.resources) && \
         has(self.scheduling) == has(oldSelf.scheduling) && \
         (!has(self.scheduling) || self.scheduling == oldSelf.scheduling) && \
         has(self.checkpoint) == has(oldSelf.checkpoint) && \
         (!has(self.checkpoint) || self.checkpoint == oldSelf.checkpoint)"
    ).message("nodes, resources, scheduling and checkpoint are immutable; create a new FineTuneJob"),
    validation = Rule::new(
        "has(self.validation) == has(oldSelf.validation) && \
         (!has(self.validation) || self.validation == oldSelf.validation) && \
         has(self.earlyStopping) == has(oldSelf.earlyStopping) && \
         (!has(self.earlyStopping) || self.earlyStopping == oldSelf.earlyStopping) && \
         has(self.output) == has(oldSelf.output) && (!has(self.output) || self.output == oldSelf.output) && \
         has(self.failurePolicy) == has(oldSelf.failurePolicy) && \
         (!has(self.failurePolicy) || self.failurePolicy == oldSelf.failurePolicy)"
    ).message("validation, earlyStopping, output and failurePolicy are immutable; create a new FineTuneJob"),
    validation = Rule::new("!oldSelf.stopRequested || self.stopRequested").message("stopRequested cannot be taken back"),
    validation = Rule::new(
        "!has(self.validation) || !has(self.validation.gates) || size(self.validation.gates) == 0 || \
         has(self.dataset.validation) || has(self.dataset.splitPercent)"
    ).message("validation.gates needs dataset.validation or dataset.splitPercent"),
    validation = Rule::new(
        "!has(self.validation) || has(self.dataset.validation) || has(self.dataset.splitPercent) || \
         !(has(self.validation.everySteps) || has(self.validation.metric) || has(self.validation.evaluate) || \
         has(self.validation.baselines))"
    ).message(
        "validation.everySteps, metric, evaluate and baselines need dataset.validation or dataset.splitPercent"
    ),
    validation = Rule::new(
        "!has(self.earlyStopping) || has(self.dataset.validation) || has(self.dataset.splitPercent)"
    ).message("earlyStopping needs dataset.validation or dataset.splitPercent"),
    validation = Rule::new(
        "self.nodes == 1 || !has(self.resources) || !has(self.resources.limits) || \
         !self.resources.limits.exists(k, k.startsWith('nvidia.com/mig-'))"
    ).message("MIG slices cannot span nodes: set nodes: 1"),
    validation = Rule::new(
        "!has(self.output) || !has(self.output.format) || self.output.format != 'Adapter' || self.method.type != 'Full'"
    ).message("full fine-tuning has no adapter: set output.format: Merged or leave it out")
        .field_path(".output.format").reason(Reason::FieldValueForbidden),
    validation = Rule::new(
        "self.method.type != 'Full' || !has(self.method.full) || !self.method.full.optimizerInBackward || \
         has(self.hyperparameters) && has(self.hyperparameters.maxGradNorm) && double(self.hyperparameters.maxGradNorm) == 0.0"
    ).message(
        "method.full.optimizerInBackward never has all gradients at once to clip them: set hyperparameters.maxGradNorm: \"0\""
    ).field_path(".hyperparameters.maxGradNorm"),
    validation = Rule::new(
        "self.method.type != 'Full' || !has(self.method.full) || !self.method.full.optimizerInBackward || \
         !has(self.hyperparameters) || !has(self.hyperparameters.microBatchTokens)"
    ).message(
        "method.full.optimizerInBackward computes the whole step at once: remove hyperparameters.microBatchTokens"
    ).field_path(".hyperparameters.microBatchTokens"),
)]
pub struct FineTuneJobSpec {
    /// Name of an administrator's profile (image, defaults, limits); absent: `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub profile: Option<String>,
    /// The base model.
    pub model: Model,
    /// Training and validation rows.
    pub dataset: Dataset,
    /// What is trained.
    pub method: MethodSpec,
    /// How it is trained; what is absent is chosen for you and echoed in `status.resolved`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hyperparameters: Option<HyperparametersSpec>,
    /// Resources of the training pod, within the profile's limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Number of nodes that train together.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub nodes: i32,
    /// Where and when pods may run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduling: Option<Scheduling>,
    /// When checkpoints are written, which are kept, and where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// How the result is judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationSpec>,
    /// Stop when the validation metric no longer improves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStoppingSpec>,
    /// What is written at the end, and where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
    /// How often an attempt may fail or be preempted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_policy: Option<FailurePolicy>,
    /// Hold the job: no pod runs, a running one writes a checkpoint and leaves.
    #[serde(default)]
    pub suspend: bool,
    /// End training at the next step, evaluate and publish. Cannot be taken back.
    #[serde(default)]
    pub stop_requested: bool,
    /// Seconds from creation, or from when it was last resumed, until the first training pod must run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub start_deadline_seconds: Option<i64>,
    /// Seconds of training over all attempts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub active_deadline_seconds: Option<i64>,
    /// Seconds after the end until the job is deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i64>,
    /// Name of another controller that reconciles this job.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub managed_by: Option<String>,
}

fn one() -> i32 {
    1
}
