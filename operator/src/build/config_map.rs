//! What the trainer reads.

use crds::FineTuneJob;
use crds::run::Control;
use k8s_openapi::api::core::v1::ConfigMap;

use super::{config_map_name, control_name, labelled, metadata};
use crate::validate::Plan;

/// The trainer's configuration, in the ConfigMap and in the pod.
pub const RUN_FILE: &str = "run.yaml";
/// The whole plan, for the operator itself: made once, when the job is accepted.
pub const PLAN_FILE: &str = "plan.yaml";
/// What a running trainer is told.
pub const CONTROL_FILE: &str = "control.yaml";

/// The plan of a job. Immutable: it is what the job was accepted with.
pub fn build_config_map(job: &FineTuneJob, plan: &Plan) -> ConfigMap {
    let labels = &plan.pods.additions.labels;
    let (run, plan) = plan.files();
    let files = [(RUN_FILE, run), (PLAN_FILE, plan)];
    ConfigMap {
        metadata: labelled(job, config_map_name(job), labels),
        data: Some(files.map(|(name, text)| (name.to_owned(), text)).into()),
        immutable: Some(true),
        binary_data: None,
    }
}

/// The word to stop. It cannot be taken back, so it is made once.
pub fn build_control(job: &FineTuneJob) -> ConfigMap {
    ConfigMap {
        metadata: metadata(job, control_name(job)),
        data: Some(
            [(
                CONTROL_FILE.to_owned(),
                serde_saphyr::to_string(&Control { stop_requested: true }).expect("a flag is YAML"),
            )]
            .into(),
        ),
        ..ConfigMap::default()
    }
}
