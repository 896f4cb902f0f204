//! The volume of a run.

use crds::FineTuneJob;
use crds::resolve::VolumeClaim;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::metadata;

/// The claim that a run needs, if it is for us to make.
pub fn build_claim(job: &FineTuneJob, claim: &VolumeClaim) -> Option<PersistentVolumeClaim> {
    let VolumeClaim::New { name, size, storage_class_name, deleted_with_job } = claim else { return None };
    let mut metadata = metadata(job, name.clone());
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
