//! The volume of a run.

use crds::FineTuneJob;
use crds::resolve::VolumeClaim;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::labelled;
use crate::validate::Plan;

/// The claim that a run needs, if it is for us to make.
pub fn build_claim(job: &FineTuneJob, plan: &Plan) -> Option<PersistentVolumeClaim> {
    let VolumeClaim::New { name, size, storage_class_name, deleted_with_job } = &plan.claim else { return None };
    let mut metadata = labelled(job, name.clone(), &plan.pods.additions.labels);
    if !deleted_with_job {
        // Checkpoints and results outlive the job: nothing owns them but the user.
        metadata.owner_references = None;
    }
    Some(PersistentVolumeClaim {
        metadata,
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".into()]),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), Quantity(size.clone()))].into()),
                ..VolumeResourceRequirements::default()
            }),
            storage_class_name: storage_class_name.clone(),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    })
}
