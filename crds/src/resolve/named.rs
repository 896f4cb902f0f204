//! The profile that a job names, if it may.

use super::{Finding, Target};
use crate::condition::reason;
use crate::finetunejob::FineTuneJob;
use crate::profile::{self, Profile, Profiles};

/// The profile of a job. Who may not name one is not told of it.
pub(super) fn profile_of<'a>(job: &FineTuneJob, all: &'a Profiles, target: Target) -> Result<&'a Profile, Finding> {
    let name = job.spec.profile.as_deref().unwrap_or(profile::DEFAULT);
    let namespace = job.metadata.namespace.as_deref().unwrap_or_default();
    // A laptop has no namespaces.
    let (local, whose, who) = match target {
        Target::Local { .. } => (true, String::new(), "--profiles FILE gives other ones"),
        Target::Cluster => {
            (false, format!(" for the namespace {namespace}"), "the administrator of the operator defines them")
        }
    };
    let serves = |name: &str, profile: &Profile| local || profile.serves(name, namespace);
    all.get(name).filter(|profile| serves(name, profile)).ok_or_else(|| {
        let known = all.iter().filter(|(name, profile)| serves(name, profile));
        let known: Vec<&str> = known.map(|(name, _)| name.as_str()).collect();
        let expected = if known.is_empty() { "none".to_owned() } else { format!("one of {}", known.join(", ")) };
        let message = format!("no profile {name}{whose}, expected {expected}; {who}");
        Finding { reason: reason::PROFILE_NOT_FOUND, field: "spec.profile".into(), message }
    })
}
