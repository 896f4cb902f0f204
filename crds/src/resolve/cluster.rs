//! Volumes of a run in a cluster, and the configuration told back in the words of the resource.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Resolver, Target};
use crate::condition::reason;
use crate::finetunejob::{
    Decimal, Epochs, FineTuneJob, HyperparametersSpec, PositiveDecimal, RowSource, Share, Storage, WhenDeleted,
};
use crate::profile::{self, DEFAULT_STORAGE_SIZE, Profile};
use crate::quantity::value;
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
        let path = run_folder(job, &claim);
        if matches!(claim, VolumeClaim::Existing { .. }) {
            self.allowed("spec.checkpoint.storage.claim", &format!("pvc://{}/{path}", claim.name()));
        }
        if path.is_empty() && matches!(claim, VolumeClaim::Existing { .. }) || has_hidden_part(&path) {
            let message =
                format!("found {path:?}, expected a folder of its own whose path has no part that begins with a point");
            self.refuse("spec.checkpoint.storage.path", message);
        }
        self.new_volume(&claim, storage);
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

    /// A volume that is to be made, by what the profile allows.
    fn new_volume(&mut self, claim: &VolumeClaim, asked: Option<&Storage>) {
        let VolumeClaim::New { .. } = claim else { return };
        let most = self.profile.max_storage_size();
        if let Some(size) = asked.and_then(|storage| storage.size.as_ref())
            && value(size).zip(value(most)).is_none_or(|(asked, most)| asked > most)
        {
            let message = format!("found {size}, the profile allows at most {most}");
            self.refuse_because(reason::RESOURCE_LIMIT_EXCEEDED, "spec.checkpoint.storage.size", message);
        }
        let (own, allowed) = (self.profile.storage.storage_class_name.as_ref(), &self.profile.allowed.storage_classes);
        if let Some(class) = asked.and_then(|storage| storage.storage_class_name.as_ref())
            && Some(class) != own
            && !profile::allows(allowed, class)
        {
            let classes: Vec<&str> = own.into_iter().chain(allowed).map(String::as_str).collect();
            let expected = if classes.is_empty() { "none".to_owned() } else { classes.join(", ") };
            let message = format!("found {class}, the profile allows {expected}");
            self.refuse_because(reason::RESOURCE_LIMIT_EXCEEDED, "spec.checkpoint.storage.storageClassName", message);
        }
    }

    /// A destination must not be where a run keeps what it believes: its own folder as a whole, or a hidden folder, such as the one of
    /// downloads. Folders of other runs are known to whoever reads the volume, and refused there.
    pub(super) fn destination(&mut self, field: &str, uri: &str, job: &FineTuneJob) {
        let Some((name, path)) = claim_of(uri) else { return };
        let path = path.trim_matches('/');
        if has_hidden_part(path) {
            let message = format!("found {uri}, expected a path without a part that begins with a point");
            self.refuse_because(reason::SOURCE_NOT_ALLOWED, field, message);
        }
        let claim = volume_claim(job, self.profile);
        let run = run_folder(job, &claim);
        let holds = |outer: &str, inner: &str| {
            inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if name == claim.name() && holds(path, &run) {
            let message = format!("found {uri}, where the run itself is; choose a path beside pvc://{name}/{run}");
            self.refuse_because(reason::SOURCE_NOT_ALLOWED, field, message);
        }
    }
}

/// Folder of a run on its claim. Runs share a claim that is not their own: each has a folder for itself.
fn run_folder(job: &FineTuneJob, claim: &VolumeClaim) -> String {
    let storage = job.spec.checkpoint.as_ref().and_then(|checkpoint| checkpoint.storage.as_ref());
    match (claim, storage.and_then(|storage| storage.path.as_deref())) {
        (VolumeClaim::New { .. }, _) => String::new(),
        (VolumeClaim::Existing { .. }, Some(path)) => path.trim_matches('/').to_owned(),
        (VolumeClaim::Existing { .. }, None) => {
            format!("{}-{}", job.metadata.name.as_deref().unwrap_or_default(), short_uid(job))
        }
    }
}

/// What runs keep for themselves is hidden.
fn has_hidden_part(path: &str) -> bool {
    path.split('/').any(|part| part.starts_with('.'))
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
