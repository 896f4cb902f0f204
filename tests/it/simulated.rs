//! The real controller against a fake API server and a scripted cluster, in virtual time: what needs many failures, hours, or an
//! operator that dies at a chosen write. What must hold in every scenario (never two live pods of a job, an end that stays, no
//! status that an API server refuses) is looked at when its simulation is dropped.

mod absence;
mod crashes;
mod forgery;
mod happy;
mod hostile;
mod lives;
mod nodes;
mod queue;
mod refusals;
mod sidecars;
mod versions;

use crds::run::PodStage;
use harness::apiserver::{About, Life};

/// Runs a scenario in a world whose time goes by when nobody has anything to do.
pub fn simulate(scenario: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(scenario());
}

/// Training goes as `life` says, everything else as usual.
fn train(life: impl Fn(&About) -> Life + Send + Sync + 'static) -> impl Fn(&About) -> Life + Send + Sync + 'static {
    move |about| if about.stage == PodStage::Train { life(about) } else { Life::of(about) }
}

/// How a job is to end.
fn complete() -> (String, String) {
    ("Complete".into(), "Completed".into())
}

/// How a job is to end.
fn failed(reason: &str) -> (String, String) {
    ("Failed".into(), reason.into())
}

/// The outcomes of attempts, without those of stages that went well at once.
fn outcomes(found: Vec<(String, String)>, stage: &str) -> Vec<String> {
    found.into_iter().filter(|(name, _)| name.contains(stage)).map(|(_, outcome)| outcome).collect()
}
