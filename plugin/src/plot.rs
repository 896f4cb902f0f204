//! `plot`: where the points of a loss curve come from.

mod curve;
mod prometheus;
mod svg;
mod terminal;

use std::path::Path;

use crds::FineTuneJob;
use crds::run::PodStage;
use kube::ResourceExt;

pub use curve::Curve;
pub use svg::svg;
pub use terminal::terminal;

use crate::cluster::Cluster;
use crate::error::Error;
use crate::logs::{Chosen, pods_of, record_place, text};

/// The points of a `metrics.jsonl`.
pub fn from_file(path: &Path) -> Result<Curve, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let curve = Curve::of_metrics(&text).map_err(|problem| Error::Usage(format!("{}:{problem}", path.display())))?;
    if curve.is_empty() {
        return Err(Error::Nothing(format!("{}: no line has a step and a loss", path.display())));
    }
    Ok(curve)
}

/// The points that Prometheus has.
pub async fn from_prometheus(url: &str, job: &FineTuneJob) -> Result<Curve, Error> {
    let curve = prometheus::curve(url, job).await?;
    if curve.is_empty() {
        let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
        return Err(Error::Nothing(format!(
            "{url}: no finetune_train_loss with finetunejob=\"{name}\" and namespace=\"{namespace}\" since the job was created; \
             see whether its Prometheus scrapes the trainers (metrics.podMonitor.enabled in the chart)"
        )));
    }
    Ok(curve)
}

/// The points that the logs of the training pods have, those of a later attempt over those of an earlier one.
pub async fn from_logs(cluster: &Cluster, job: &FineTuneJob) -> Result<Curve, Error> {
    let mut curve = Curve::default();
    let pods = pods_of(cluster, job, Chosen { stage: Some(PodStage::Train), attempt: None }).await?;
    for pod in &pods {
        // A pod that has not begun has no log, and the other ones may have enough.
        match text(cluster, pod).await {
            Ok(text) => curve.add_log(&text),
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    if curve.is_empty() {
        let what = if pods.is_empty() { "has no training pod" } else { "has trained no step in its newest pods" };
        return Err(Error::Nothing(format!(
            "{} {what}, so its log has no points; use --prometheus URL, or --file with a copy of metrics.jsonl: {}",
            job.name_any(),
            record_place(job)
        )));
    }
    Ok(curve)
}
