//! Resource requirements: the job's over the profile's, within the profile's maximum.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{Resolver, Target};
use crate::condition::reason;
use crate::finetunejob::FineTuneJob;
use crate::profile;
use crate::quantity::value;
use crate::run::ResourceLimits;

/// What a training pod asks for: the profile's requirements with each that the job names in its place. A limit of the job
/// does away with the profile's request of the same resource, which could be above it.
pub fn training_resources(job: &FineTuneJob, profile: &ResourceRequirements) -> ResourceRequirements {
    let own = job.spec.resources.clone().unwrap_or_default().0;
    let (own_limits, own_requests) = (own.limits.unwrap_or_default(), own.requests.unwrap_or_default());
    let mut limits = profile.limits.clone().unwrap_or_default();
    let mut requests = profile.requests.clone().unwrap_or_default();
    requests.retain(|name, _| !own_limits.contains_key(name));
    limits.extend(own_limits);
    requests.extend(own_requests);
    ResourceRequirements {
        limits: Some(limits).filter(|limits| !limits.is_empty()),
        requests: Some(requests).filter(|requests| !requests.is_empty()),
        claims: None,
    }
}

/// Whether a resource is an accelerator: every extended resource is, whoever's device it stands for, but those that the profile
/// calls other devices. What is Kubernetes' own (`cpu`, `memory`, `ephemeral-storage`, `hugepages-2Mi`) is none.
pub fn is_accelerator(resource: &str, other_devices: &[String]) -> bool {
    let is_extended = resource.split_once('/').is_some_and(|(domain, _)| {
        domain != "kubernetes.io" && !domain.ends_with(".kubernetes.io") && !domain.starts_with("requests.")
    });
    is_extended && !profile::allows(other_devices, resource)
}

/// Accelerators of a pod.
pub fn accelerators(resources: &ResourceRequirements, other_devices: &[String]) -> i64 {
    let limits = resources.limits.iter().flatten().filter(|(name, _)| is_accelerator(name, other_devices));
    limits.filter_map(|(_, quantity)| value(&quantity.0)).sum::<f64>() as i64
}

impl Resolver<'_> {
    pub(super) fn resources(&mut self, job: &FineTuneJob) -> ResourceLimits {
        let accelerator_memory = self.profile.accelerator_memory.as_deref().and_then(value);
        let mut resolved = ResourceLimits {
            price_per_hour: self.profile.price_per_hour,
            accelerator_memory_bytes: accelerator_memory.map(|bytes| bytes as i64),
            ..ResourceLimits::default()
        };
        let local = matches!(self.target, Target::Local { .. });
        let own = job.spec.resources.clone().unwrap_or_default().0;
        self.within_maximum("limits", own.limits.as_ref());
        self.within_maximum("requests", own.requests.as_ref());
        // A laptop is not what the profile describes.
        let resources = if local { own } else { training_resources(job, &self.profile.resources) };
        for (name, quantity) in resources.limits.iter().flatten() {
            let field = format!("spec.resources.limits{}", member(name));
            match name.as_str() {
                "memory" => {
                    resolved.memory_bytes =
                        self.amount(&field, quantity, "16Gi", |bytes| bytes >= 1.0).map(|b| b as i64);
                }
                "cpu" => resolved.cpus = self.amount(&field, quantity, "2", |cpus| cpus > 0.0),
                _ if is_accelerator(name, &self.profile.other_devices) => {
                    let count = self.amount(&field, quantity, "1", |count| count.fract() == 0.0).unwrap_or_default();
                    if count > 1.0 || (count > 0.0 && resolved.accelerator) {
                        let message = "not supported yet: more than one accelerator (a device that is none is for the profile's otherDevices to name)";
                        self.refuse(&field, message);
                    }
                    resolved.accelerator |= count > 0.0;
                }
                _ if local => self.warn(&field, "a local run does not enforce this limit"),
                _ => {}
            }
        }
        if local {
            for name in resources.requests.as_ref().unwrap_or(&BTreeMap::new()).keys() {
                let field = format!("spec.resources.requests{}", member(name));
                self.warn(&field, "a local run has no scheduler: nothing is reserved");
            }
        } else if self.profile.fall_back_to_cpu {
            resolved.accelerator = false;
        }
        resolved
    }

    fn within_maximum(&mut self, kind: &str, asked: Option<&BTreeMap<String, Quantity>>) {
        for (name, quantity) in asked.into_iter().flatten() {
            let Some(maximum) = self.profile.max_resources.get(name) else { continue };
            if value(&quantity.0).zip(value(&maximum.0)).is_some_and(|(asked, most)| asked > most) {
                let field = format!("spec.resources.{kind}{}", member(name));
                let message = format!("found {}, the profile allows at most {}", quantity.0, maximum.0);
                self.refuse_because(reason::RESOURCE_LIMIT_EXCEEDED, &field, message);
            }
        }
    }

    fn amount(&mut self, field: &str, quantity: &Quantity, example: &str, fits: fn(f64) -> bool) -> Option<f64> {
        let amount = value(&quantity.0).filter(|amount| fits(*amount));
        if amount.is_none() {
            self.refuse(field, format!("found {:?}, expected a quantity such as \"{example}\"", quantity.0));
        }
        amount
    }
}

/// The step from a map to a name, as the API server writes it.
fn member(name: &str) -> String {
    if name.contains(['.', '/']) { format!("[{name}]") } else { format!(".{name}") }
}
