//! Volumes of a run in a cluster, and the configuration told back in the words of the resource.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Resolver, Target};
use crate::finetunejob::{
    Decimal, Epochs, FineTuneJob, HyperparametersSpec, PositiveDecimal, RowSource, Share, WhenDeleted,
};
use crate::profile::{DEFAULT_STORAGE_SIZE, Profile};
use crate::run::{Duration, Hyperparameters, StorageConfig};

/// Where a pod finds the volume of its run.
const RUN_VOLUME: &str = "/data";
/// Below it a pod finds every other claim, by name.
const SOURCE_VOLUMES: &str = "/sources";

/// The volume of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum VolumeClaim {
    /// A claim that the user made.
    Existing {
        /// Its name.
        name: String,
    },
    /// A claim that the operator makes.
    New {
        /// Its name: the job's, and enough of its UID that a job made anew does not meet the old one's files.
        name: String,
        /// For example `50Gi`.
        size: String,
        /// Absent: the cluster's default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        storage_class_name: Option<String>,
        /// Whether it goes with the job.
        deleted_with_job: bool,
    },
}

impl VolumeClaim {
    /// The claim's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Existing { name } | Self::New { name, .. } => name,
        }
    }
}

/// The first characters of a UID: enough to tell two jobs of one name apart.
fn short_uid(job: &FineTuneJob) -> &str {
    let uid = job.metadata.uid.as_deref().unwrap_or_default();
    uid.get(..8).unwrap_or(uid)
}

/// The volume of a run: the job's own words, else the profile's.
pub fn volume_claim(job: &FineTuneJob, profile: &Profile) -> VolumeClaim {
    let storage = job.spec.checkpoint.as_ref().and_then(|checkpoint| checkpoint.storage.clone());
    if let Some(name) = storage.as_ref().and_then(|storage| storage.claim.clone()) {
        return VolumeClaim::Existing { name };
    }
    let own = |field: fn(&crate::finetunejob::Storage) -> Option<String>| storage.as_ref().and_then(field);
    VolumeClaim::New {
        name: format!("{}-{}", job.metadata.name.as_deref().unwrap_or_default(), short_uid(job)),
        size: own(|storage| storage.size.clone())
            .or_else(|| profile.storage.size.clone())
            .unwrap_or_else(|| DEFAULT_STORAGE_SIZE.into()),
        storage_class_name: own(|storage| storage.storage_class_name.clone())
            .or_else(|| profile.storage.storage_class_name.clone()),
        deleted_with_job: storage.and_then(|storage| storage.when_deleted) == Some(WhenDeleted::Delete),
    }
}

/// Claim and path of a `pvc://` URI.
pub fn claim_of(uri: &str) -> Option<(&str, &str)> {
    let rest = uri.strip_prefix("pvc://")?;
    Some(rest.split_once('/').unwrap_or((rest, "")))
}

impl Resolver<'_> {
    /// Volumes by what the job names.
    pub(super) fn storage(&mut self, job: &FineTuneJob) -> Option<StorageConfig> {
        if matches!(self.target, Target::Local { .. }) {
            return None;
        }
        let spec = &job.spec;
        let claim = volume_claim(job, self.profile);
        let storage = spec.checkpoint.as_ref().and_then(|checkpoint| checkpoint.storage.as_ref());
        // Runs share a claim that is not their own: each has a folder for itself.
        let path = match (&claim, storage.and_then(|storage| storage.path.as_deref())) {
            (VolumeClaim::New { .. }, _) => String::new(),
            (VolumeClaim::Existing { .. }, Some(path)) => path.trim_matches('/').to_owned(),
            (VolumeClaim::Existing { .. }, None) => {
                format!("{}-{}", job.metadata.name.as_deref().unwrap_or_default(), short_uid(job))
            }
        };
        if matches!(claim, VolumeClaim::Existing { .. }) {
            self.allowed("spec.checkpoint.storage.claim", &format!("pvc://{}/{path}", claim.name()));
        }
        if path.split('/').any(|part| part == "..") {
            self.refuse("spec.checkpoint.storage.path", format!("found {path:?}, expected a folder inside the claim"));
        }
        let below = |root: &str| if path.is_empty() { root.to_owned() } else { format!("{root}/{path}") };
        let rows = |source: &RowSource| source.uri.0.clone();
        let uris = [
            Some(spec.model.uri.0.clone()),
            Some(rows(&spec.dataset.train)),
            spec.dataset.validation.as_ref().map(rows),
            spec.validation.as_ref().and_then(|v| v.forgetting.as_ref()).map(|f| rows(&f.dataset)),
            spec.output.as_ref().and_then(|output| output.uri.as_ref()).map(|uri| uri.0.clone()),
        ];
        let claims: BTreeMap<String, String> = uris
            .iter()
            .flatten()
            .filter_map(|uri| claim_of(uri))
            .map(|(name, _)| {
                let folder =
                    if name == claim.name() { RUN_VOLUME.to_owned() } else { format!("{SOURCE_VOLUMES}/{name}") };
                (name.to_owned(), folder)
            })
            .collect();
        Some(StorageConfig { directory: below(RUN_VOLUME), uri: below(&format!("pvc://{}", claim.name())), claims })
    }
}

/// A number as the resource's decimals are written, in at most 32 characters.
pub fn decimal_text(value: f64) -> String {
    let plain = value.to_string();
    if plain.len() <= 20 { plain } else { format!("{value:e}") }
}

/// What the run trains with, in the words of the resource: what the user may copy into his next job.
pub fn hyperparameters_spec(chosen: &Hyperparameters) -> HyperparametersSpec {
    let (epochs, max_steps) = match chosen.duration {
        Duration::Epochs(epochs) => (Some(Epochs(decimal_text(epochs))), None),
        Duration::MaxSteps(steps) => (None, Some(steps)),
    };
    HyperparametersSpec {
        epochs,
        max_steps,
        learning_rate: Some(PositiveDecimal(decimal_text(chosen.learning_rate))),
        batch_size: i32::try_from(chosen.batch_size).ok(),
        micro_batch_tokens: chosen.micro_batch_tokens,
        max_sequence_length: chosen.max_sequence_length,
        scheduler: Some(chosen.scheduler),
        warmup_ratio: Some(Share(decimal_text(chosen.warmup_ratio))),
        weight_decay: Some(Decimal(decimal_text(chosen.weight_decay))),
        max_grad_norm: Some(Decimal(decimal_text(chosen.max_grad_norm))),
        optimizer: Some(chosen.optimizer),
        seed: Some(chosen.seed),
        neftune_alpha: chosen.neftune_alpha.map(|alpha| PositiveDecimal(decimal_text(alpha))),
        precision: Some(chosen.precision),
    }
}
