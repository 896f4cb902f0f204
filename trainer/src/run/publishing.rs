//! The output folder of a run: the adapter or the whole model, from the checkpoint that was judged, with its card.

use crds::report::{Artifact, Report, Stage, Verdict};
use crds::run::{Method, OutputFormat, RunConfig};

use super::saving::WEIGHTS;
use super::{Context, Error, claims};
use crate::compute::shim::release_free_memory;
use crate::model::spec::LinearSpec;
use crate::model::{self, Spec, target_linears};
use crate::run::export::{Weights, model_card, write_output};
use crate::run::prepare::Base;
use crate::run::publish::Destination;
use crate::store::checkpoint::{Stored, find_by_digest};
use crate::store::weights::{MappedFile, TensorView, WeightFiles};
use crate::tell::record::{Event, Observer};

/// Writes the output of the weights that `report` judged, and copies it to where it is wanted; `None` if it is not to be
/// written.
pub fn publish(
    config: &RunConfig,
    context: &Context,
    base: &Base,
    report: &Report,
    observer: &mut dyn Observer,
) -> Result<Option<Artifact>, Error> {
    let failed = |source| Error::Write { path: context.run.into(), source };
    let gate_failed = report.validation.as_ref().is_some_and(|validation| validation.verdict == Verdict::GateFailed);
    if gate_failed && !config.output.publish_always {
        let note = "not published: validation failed, and output.publishWhen is ValidationPassed";
        observer.observe(&Event::Note(note.into())).map_err(failed)?;
        return Ok(None);
    }
    observer.observe(&Event::Stage(Stage::Publishing)).map_err(failed)?;
    // What training took is free and still this process's.
    release_free_memory();
    let destination =
        config.output.uri.as_ref().map(|uri| Destination::open(uri, &config.job, claims(config))).transpose()?;
    let digest = report.checkpoint_digest.as_deref().unwrap_or_default();
    let stored = find_by_digest(context.run, &config.job.uid, digest)?;
    let artifact = write(config, context, base, report, &stored)?;
    if let Some(destination) = destination {
        destination.fill(&context.run.join("output"), context.stop)?;
    }
    Ok(Some(artifact))
}

fn write(
    config: &RunConfig,
    context: &Context,
    base: &Base,
    report: &Report,
    stored: &Stored,
) -> Result<Artifact, Error> {
    let output = context.run.join("output");
    let (lora, kind) = match (&config.method, config.output.format) {
        (Method::LoRA { lora } | Method::QLoRA { lora, .. }, format) => (Some(lora), format),
        (Method::Full { .. }, _) => (None, OutputFormat::Merged),
    };
    let uri = match (&config.output.uri, &config.storage) {
        (Some(uri), _) => uri.clone(),
        (None, Some(storage)) => format!("{}/output", storage.uri.trim_end_matches('/')),
        (None, None) => format!("file://{}", output.display()),
    };
    let mut artifact = Artifact {
        uri,
        digest: String::new(),
        kind,
        lora_rank: lora.filter(|_| kind == OutputFormat::Adapter).map(|lora| lora.rank),
        base_model: config.model.uri.clone(),
    };
    let described = Report { artifact: Some(artifact.clone()), ..report.clone() };
    let card = model_card(config, &described);
    let plot = context.run.join("loss.svg");
    let file = MappedFile::open(&stored.folder.join(WEIGHTS))?;
    artifact.digest = if let (Some(lora), OutputFormat::Adapter) = (lora, kind) {
        let spec = Spec::read(&base.folder)?;
        let targets = target_linears(spec.first(), spec.hidden_size, lora)?;
        let targets: Vec<&str> = targets.iter().map(LinearSpec::target).collect();
        let tensors: Vec<TensorView> = file
            .names()
            .into_iter()
            .filter_map(|name| {
                let mapped = file.tensor(&name)?;
                Some(TensorView { name, dtype: mapped.dtype, shape: mapped.shape, data: mapped.data })
            })
            .collect();
        let weights = Weights::Adapter {
            lora,
            targets: &targets,
            tensors: &tensors,
            base_model: &config.model.uri,
            revision: base.revision.as_deref(),
        };
        write_output(&output, &base.folder, &weights, &card, &plot)?
    } else {
        let files = WeightFiles::open(&base.folder).map_err(model::Error::from)?;
        let tensors = model::merged(&base.folder, &files, &file, lora, context.stop)?;
        let written = write_output(&output, &base.folder, &Weights::Model { tensors: &tensors }, &card, &plot);
        if written.is_err() && context.stop.requested() {
            return Err(Error::Stopped { step: stored.manifest.step });
        }
        written?
    };
    Ok(artifact)
}
