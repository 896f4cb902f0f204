//! What the trainer reads.

use crds::FineTuneJob;
use crds::run::Control;
use k8s_openapi::api::core::v1::ConfigMap;

use super::{config_map_name, control_name, metadata};
use crate::validate::Plan;

/// The trainer's configuration, in the ConfigMap and in the pod.
pub const RUN_FILE: &str = "run.yaml";
/// The whole plan, for the operator itself: made once, when the job is accepted.
pub const PLAN_FILE: &str = "plan.yaml";
/// What a running trainer is told.
pub const CONTROL_FILE: &str = "control.yaml";

fn yaml<T: serde::Serialize>(value: &T) -> String {
    // By way of JSON: YAML's own tags for enums are nothing that other readers know.
    let value = serde_json::to_value(value).expect("plans are JSON");
    serde_saphyr::to_string(&value).expect("JSON is YAML")
}

/// The plan of a job. Immutable: it is what the job was accepted with.
pub fn build_config_map(job: &FineTuneJob, plan: &Plan) -> ConfigMap {
    let files = [(RUN_FILE, plan.run.to_yaml()), (PLAN_FILE, yaml(plan))];
    ConfigMap {
        metadata: metadata(job, config_map_name(job)),
        data: Some(files.map(|(name, text)| (name.to_owned(), text)).into()),
        immutable: Some(true),
        binary_data: None,
    }
}

/// The word to stop. It cannot be taken back, so it is made once.
pub fn build_control(job: &FineTuneJob) -> ConfigMap {
    ConfigMap {
        metadata: metadata(job, control_name(job)),
        data: Some([(CONTROL_FILE.to_owned(), yaml(&Control { stop_requested: true }))].into()),
        ..ConfigMap::default()
    }
}
