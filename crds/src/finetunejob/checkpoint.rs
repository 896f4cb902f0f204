//! Checkpoints: when, which are kept, where.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::SecretReference;
use super::scalar::{QUANTITY_PATTERN, Uri};

/// Whether a run continues its newest checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Resume {
    /// It does.
    Auto,
    /// It starts from the beginning.
    Never,
}

/// What becomes of a volume that the operator made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WhenDeleted {
    /// It stays when the job is deleted.
    Retain,
    /// It goes with the job.
    Delete,
}

/// Which checkpoints are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeepCheckpoints {
    /// Newest ones; absent: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub latest: Option<i32>,
    /// Best ones; absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub best: Option<i32>,
}

/// A checkpoint of another job to start from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResumeFrom {
    /// Where it is.
    pub uri: Uri,
    /// Secret with the credentials of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
}

/// The volume of the run: an existing claim, or the size of a new one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "has(self.claim) ? !has(self.size) && !has(self.storageClassName) && !has(self.whenDeleted) : !has(self.path)"
).message("set {claim, path} for an existing volume or {size, storageClassName, whenDeleted} for a new one"))]
pub struct Storage {
    /// Name of an existing PersistentVolumeClaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub claim: Option<String>,
    /// Folder inside the claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub path: Option<String>,
    /// Size of a new claim, for example 50Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), regex(pattern = QUANTITY_PATTERN))]
    pub size: Option<String>,
    /// Storage class of a new claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
    /// What becomes of a new claim; absent: Retain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when_deleted: Option<WhenDeleted>,
}

/// Checkpoints: when, which are kept, where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.everySteps) && has(self.everySeconds))")
    .message("set everySteps or everySeconds, not both"))]
pub struct Checkpoint {
    /// Every so many optimizer steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub every_steps: Option<i64>,
    /// Every so many seconds; absent: 600, unless everySteps is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub every_seconds: Option<i64>,
    /// Which are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepCheckpoints>,
    /// Whether a run continues its newest checkpoint; absent: Auto.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    /// A checkpoint of another job to start from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_from: Option<ResumeFrom>,
    /// The volume of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
}
