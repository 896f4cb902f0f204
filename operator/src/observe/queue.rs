//! What Kueue's Workload of a Job says.

use crds::FineTuneJob;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};

use super::Error;
use crate::facts::QueueSeen;

/// Versions of Kueue's API, the newest first: what is read is the same in both.
const KUEUE_VERSIONS: [&str; 2] = ["v1beta2", "v1beta1"];

/// What Kueue's Workload of a Job says. There is no watch on Workloads: their kind may not exist, and the Job, which is
/// watched, changes when the Workload is admitted.
pub(super) async fn queue(client: &Client, job: &FineTuneJob, child_uid: &str) -> Result<QueueSeen, Error> {
    let by_job = ListParams::default().labels(&format!("kueue.x-k8s.io/job-uid={child_uid}"));
    let mut found = None;
    for version in KUEUE_VERSIONS {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("kueue.x-k8s.io", version, "Workload"));
        let workloads: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &job.namespace().unwrap_or_default(), &kind);
        match workloads.list(&by_job).await {
            Ok(list) => {
                found = Some(list);
                break;
            }
            // Of an API group that is not served the answer is plain text, which `is_not_found` does not know.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(source) => return Err(Error::new("list", "Workloads", job, &job.name_any(), source)),
        }
    }
    let Some(found) = found else { return Ok(QueueSeen::ControllerMissing) };
    let Some(workload) = found.items.first() else {
        return Ok(QueueSeen::Waiting("the queue's controller has not looked at the Job yet".into()));
    };
    let conditions = workload.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let message = |name: &str, status: &str| {
        let condition =
            conditions.iter().find(|condition| condition["type"] == name && condition["status"] == status)?;
        let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        Some(format!("{}: {}", text("reason"), text("message")))
    };
    Ok(match (message("Evicted", "True"), message("QuotaReserved", "False")) {
        (Some(evicted), _) => QueueSeen::Evicted(evicted),
        (None, waiting) => QueueSeen::Waiting(waiting.unwrap_or_default()),
    })
}
