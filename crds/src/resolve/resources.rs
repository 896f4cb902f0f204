//! Resource requirements, as far as one machine without a scheduler can keep them.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::Resolver;
use crate::finetunejob::FineTuneJob;
use crate::run::ResourceLimits;

impl Resolver<'_> {
    pub(super) fn resources(&mut self, job: &FineTuneJob) -> ResourceLimits {
        let mut resolved = ResourceLimits { price_per_hour: self.profile.price_per_hour, ..ResourceLimits::default() };
        let resources = job.spec.resources.clone().unwrap_or_default().0;
        for (name, quantity) in resources.limits.iter().flatten() {
            let field = format!("spec.resources.limits{}", member(name));
            match name.as_str() {
                "memory" => {
                    resolved.memory_bytes =
                        self.amount(&field, quantity, "16Gi", |bytes| bytes >= 1.0).map(|b| b as i64);
                }
                "cpu" => resolved.cpus = self.amount(&field, quantity, "2", |cpus| cpus > 0.0),
                _ if name.contains('/') => {
                    let count = self.amount(&field, quantity, "1", |count| count.fract() == 0.0).unwrap_or_default();
                    if count > 1.0 || (count > 0.0 && resolved.accelerator) {
                        self.refuse(&field, "not supported yet: more than one accelerator");
                    }
                    resolved.accelerator |= count > 0.0;
                }
                _ => self.warn(&field, "a local run does not enforce this limit"),
            }
        }
        for name in resources.requests.as_ref().unwrap_or(&BTreeMap::new()).keys() {
            let field = format!("spec.resources.requests{}", member(name));
            self.warn(&field, "a local run has no scheduler: nothing is reserved");
        }
        resolved
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

/// The number that a Kubernetes quantity stands for.
fn value(text: &str) -> Option<f64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let factor = match &text[digits..] {
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 2f64.powi(10),
        "Mi" => 2f64.powi(20),
        "Gi" => 2f64.powi(30),
        "Ti" => 2f64.powi(40),
        "Pi" => 2f64.powi(50),
        "Ei" => 2f64.powi(60),
        _ => return None,
    };
    Some(number * factor)
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn quantities_are_numbers() {
        for (text, expected) in [
            ("16Gi", Some(17_179_869_184.0)),
            ("1.5G", Some(1_500_000_000.0)),
            ("1Pi", Some(1_125_899_906_842_624.0)),
            ("12", Some(12.0)),
            ("500m", Some(0.5)),
            ("x", None),
            ("-1", None),
            ("1.5.2", None),
        ] {
            assert_eq!(value(text), expected, "{text}");
        }
    }
}
