//! The output folder of a run: the adapter or the whole model, with its card.

use crds::report::{Artifact, Report};
use crds::run::{Method, OutputFormat, RunConfig};

use super::{Context, Error, Planned, surroundings};
use crate::export::{Weights, model_card, write_output};
use crate::model::{self, target_linears};
use crate::optim::Parameters;

/// Writes `output` and tells what it is.
pub fn publish(
    config: &RunConfig,
    context: &Context,
    planned: &Planned,
    parameters: &Parameters,
    report: &Report,
) -> Result<Artifact, Error> {
    let output = context.run.join("output");
    let (lora, kind) = match (&config.method, config.output.format) {
        (Method::LoRA { lora } | Method::QLoRA { lora, .. }, format) => (Some(lora), format),
        (Method::Full {}, _) => (None, OutputFormat::Merged),
    };
    let mut artifact = Artifact {
        uri: format!("file://{}", output.display()),
        digest: String::new(),
        kind,
        lora_rank: lora.filter(|_| kind == OutputFormat::Adapter).map(|lora| lora.rank),
        base_model: config.model.uri.clone(),
    };
    let mut described = report.clone();
    described.artifact = Some(artifact.clone());
    let card = model_card(config, &described);
    let prepared = &planned.prepared;
    let plot = context.run.join("loss.svg");
    artifact.digest = if let (Some(lora), OutputFormat::Adapter) = (lora, kind) {
        let targets = target_linears(lora)?;
        let tensors = surroundings::host_masters(parameters);
        write_output(
            &output,
            &prepared.model,
            &Weights::Adapter {
                lora,
                targets: &targets,
                tensors: &surroundings::views(&tensors),
                base_model: &config.model.uri,
                revision: prepared.model_revision.as_deref(),
            },
            &card,
            &plot,
        )?
    } else {
        let tensors = model::merged(&prepared.model, parameters, lora)?;
        let views = surroundings::views(&tensors);
        write_output(&output, &prepared.model, &Weights::Model { tensors: &views }, &card, &plot)?
    };
    Ok(artifact)
}
