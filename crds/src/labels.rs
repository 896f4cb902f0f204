//! What the objects of a job are called, so that whoever looks for them finds what the operator made.

/// Value of [`MANAGED_BY_LABEL`] on everything that the operator makes.
pub const MANAGER: &str = "finetune-operator";
/// Kubernetes' recommended label.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// Kubernetes' recommended label; here the stage of a Job and its pod.
pub const STAGE_LABEL: &str = "app.kubernetes.io/component";
/// `metadata.name` of the FineTuneJob.
pub const JOB_NAME_LABEL: &str = "finetune.dev/job-name";
/// `metadata.uid` of the FineTuneJob.
pub const JOB_UID_LABEL: &str = "finetune.dev/job-uid";
/// Attempt of the stage.
pub const ATTEMPT_LABEL: &str = "finetune.dev/attempt";
/// The container that a pod is there for.
pub const CONTAINER: &str = "trainer";
