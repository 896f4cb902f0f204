//! Profiles from a file. What the schema of a profile cannot say is checked here besides.

use std::collections::BTreeSet;

use jsonschema::error::ValidationErrorKind as Kind;
use serde_json::Value;

use super::words::{self, CERTIFICATES};
use super::{Profile, Profiles};
use crate::quantity;

/// Why a file of profiles was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not YAML, or other fields than those of a profile.
    #[error(transparent)]
    Yaml(#[from] serde_saphyr::Error),
    /// A price that no cost can be told from.
    #[error("{profile}.pricePerHour: found {price}, expected a number that is not negative")]
    Price {
        /// The profile.
        profile: String,
        /// Its price.
        price: f64,
    },
    /// What a field may not say.
    #[error("{field}: found {found}, expected {expected}")]
    Field {
        /// The profile and its field.
        field: String,
        /// What it says.
        found: String,
        /// What it may say.
        expected: String,
    },
}

/// The JSON Schema of a file of profiles.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Profiles).to_value();
    close(&mut schema);
    schema
}

/// Kubernetes' own types take any field besides theirs: a misspelt one would be ignored without a word.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if map.get("properties").is_some_and(Value::is_object) && !map.contains_key("additionalProperties") {
                map.insert("additionalProperties".into(), false.into());
            }
            map.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// Reads a file of profiles.
pub fn parse(text: &str) -> Result<Profiles, Error> {
    let profiles: Profiles = serde_saphyr::from_str(text)?;
    for (name, profile) in &profiles {
        // YAML has NaN and infinity; JSON, which the schema is for, has neither.
        if let Some(price) = profile.price_per_hour.filter(|price| !(price.is_finite() && *price >= 0.0)) {
            return Err(Error::Price { profile: name.clone(), price });
        }
    }
    let file: Value = serde_saphyr::from_str(text)?;
    let validator = jsonschema::validator_for(&schema()).expect("what types generate is a schema");
    if let Some(error) = validator.iter_errors(&file).next() {
        return Err(refusal(&error));
    }
    for (name, profile) in &profiles {
        variables_are_named_once(profile).map_err(|(field, found, expected)| Error::Field {
            field: format!("{name}.{field}"),
            found,
            expected,
        })?;
    }
    Ok(profiles)
}

/// No schema can say it. Of two variables of a name one would be without effect.
fn variables_are_named_once(profile: &Profile) -> Result<(), (&'static str, String, String)> {
    let mut seen = BTreeSet::new();
    let all = profile.environment.iter().map(|variable| ("environment", variable));
    let all = all.chain(profile.cpu_pods.environment.iter().map(|variable| ("cpuPods.environment", variable)));
    for (field, variable) in all {
        if profile.ca_bundle.is_some() && variable.name == CERTIFICATES {
            return Err((field, variable.name.clone(), "none of the name, which caBundle sets".into()));
        }
        if !seen.insert((field, &variable.name)) {
            return Err((field, format!("{} twice", variable.name), "each name once".into()));
        }
    }
    Ok(())
}

fn refusal(error: &jsonschema::ValidationError) -> Error {
    let steps = error.instance_path().to_string();
    let steps: Vec<String> = steps.split('/').skip(1).map(|step| step.replace("~1", "/").replace("~0", "~")).collect();
    Error::Field {
        field: steps.join("."),
        found: error.instance().to_string(),
        expected: match error.kind() {
            Kind::Pattern { pattern } if pattern == quantity::PATTERN => quantity::EXPECTED.into(),
            Kind::Pattern { pattern } => format!("text that matches {pattern}"),
            Kind::Enum { options } => {
                let words = options.as_array().into_iter().flatten().filter_map(Value::as_str);
                format!("one of {}", words.collect::<Vec<_>>().join(", "))
            }
            Kind::PropertyNames { error } => format!("other keys than {} ({})", error.instance(), words::KEYS),
            Kind::Not { .. } => words::RESERVED.into(),
            Kind::MinLength { .. } => "text that is not empty".into(),
            Kind::Minimum { limit } => format!("a number from {limit}"),
            Kind::AdditionalProperties { unexpected } => format!("nothing named {}", unexpected.join(", ")),
            _ => format!("something else: {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::ANY;
    use super::*;

    #[test]
    fn a_file_of_profiles_is_read_or_refused() {
        let text = "default: {pricePerHour: 0.10}\na100: {allowed: {sourcePrefixes: [\"hf://\"]}}\n";
        let profiles = parse(text).expect("valid");
        assert_eq!(profiles["default"].price_per_hour, Some(0.10));
        assert_eq!(profiles["a100"].allowed.source_prefixes, ["hf://"]);
        assert_eq!(profiles["a100"].allowed.queues, [ANY], "what a profile does not name keeps its default");
        for (fields, expected) in [
            ("pricePerHour: .nan", "default.pricePerHour: found NaN"),
            ("pricePerHour: .inf", "default.pricePerHour: found inf"),
            ("pricePerHour: -1", "default.pricePerHour: found -1"),
            ("price: 1", "price"),
            ("resources: {limit: {memory: 1Gi}}", "limit"),
            ("maxResources: {memory: lots}", "default.maxResources.memory: found \"lots\", expected a quantity"),
            (
                "maxResources: {nvidia.com/gpu: -1}",
                "default.maxResources.nvidia.com/gpu: found -1, expected a number from 0",
            ),
            ("resources: {requests: {memory: 64 GB}}", "default.resources.requests.memory: found \"64 GB\""),
            ("cpuResources: {limits: {cpu: two}}", "default.cpuResources.limits.cpu: found \"two\""),
            ("storage: {size: big}", "default.storage.size: found \"big\""),
            ("acceleratorMemory: 80 GB", "default.acceleratorMemory: found \"80 GB\""),
            ("imagePullPolicy: Sometimes", "default.imagePullPolicy: found \"Sometimes\", expected one of Always"),
            ("image: ''", "default.image: found \"\", expected text that is not empty"),
            ("hub: {endpoint: hub.example}", "default.hub.endpoint: found \"hub.example\""),
            (
                "tolerations: [{kye: nvidia.com/gpu}]",
                "default.tolerations.0: found {\"kye\":\"nvidia.com/gpu\"}, expected nothing named kye",
            ),
            ("labels: {finetune.dev/job-uid: x}", "default.labels: found"),
            ("labels: {app.kubernetes.io/managed-by: me}", "default.labels: found"),
            ("labels: {'two words': x}", "default.labels: found"),
            ("labels: {team: 'two words'}", "default.labels.team: found"),
            ("cpuPods: {labels: {kueue.x-k8s.io/queue-name: q}}", "default.cpuPods.labels: found"),
            ("annotations: {kubectl.kubernetes.io/default-container: x}", "default.annotations: found"),
            (
                "inheritedLabels: [app.kubernetes.io/name]",
                "default.inheritedLabels.0: found \"app.kubernetes.io/name\"",
            ),
            ("inheritedLabels: [finetune.dev/job-name]", "default.inheritedLabels.0: found"),
            ("environment: [{name: HF_HOME, value: /tmp}]", "default.environment.0.name: found \"HF_HOME\""),
            ("environment: [{name: A B, value: x}]", "default.environment.0.name: found \"A B\""),
            ("environment: [{name: A}, {name: A}]", "default.environment: found A twice"),
            (
                "caBundle: {configMapName: c, key: k}, environment: [{name: SSL_CERT_FILE, value: x}]",
                "default.environment: found SSL_CERT_FILE",
            ),
            ("caBundle: {configMapName: c}", "key"),
            (
                "tolerations: [{kye: nvidia.com/gpu}]",
                "default.tolerations.0: found {\"kye\":\"nvidia.com/gpu\"}, expected nothing named kye",
            ),
            ("topology: {required: a, preferred: b}", "topology"),
            ("storage: {maxSize: lots}", "default.storage.maxSize: found \"lots\""),
            ("terminationGracePeriodSeconds: -1", "default.terminationGracePeriodSeconds: found -1"),
        ] {
            let error = parse(&format!("default: {{{fields}}}")).expect_err(fields).to_string();
            assert!(error.contains(expected), "{fields}: {error}");
        }
    }

    #[test]
    fn what_belongs_to_other_tools_is_taken_as_it_is_written() {
        let text = "default:
  labels: {team: ml, app.kubernetes.io/part-of: training}
  annotations: {sidecar.istio.io/inject: 'false'}
  inheritedLabels: [cost-center, acme.example/team]
  environment:
    - {name: HTTPS_PROXY, value: 'http://proxy:3128'}
    - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hub, key: token, optional: true}}}
  caBundle: {configMapName: authorities, key: bundle.pem}
  cpuPods: {nodeSelector: {}, tolerations: [{operator: Exists}], environment: [{name: HTTPS_PROXY, value: 'http://other:3128'}]}
  topology: {required: cloud.provider.com/rack}
  allowed: {namespaces: ['team-*'], claims: [], storageClasses: [fast]}
";
        let profile = &parse(text).unwrap_or_else(|error| panic!("{error}"))["default"];
        assert_eq!(profile.environment[1].name, "HF_TOKEN");
        assert!(profile.environment[1].value_from.as_ref().is_some_and(|source| source.secret_key_ref.is_some()));
        assert_eq!(profile.cpu_pods.node_selector.as_ref().map(std::collections::BTreeMap::len), Some(0));
        assert_eq!(profile.allowed.namespaces.as_deref(), Some(&["team-*".to_owned()][..]));
    }

    /// As every manifest of a pod writes them.
    #[test]
    fn quantities_are_text_or_numbers() {
        let text = "default: {resources: {limits: {nvidia.com/gpu: 1, cpu: 0.5, memory: 64e9}}, maxResources: {memory: '128e9'}, storage: {size: 50000000000}}";
        let profile = &parse(text).unwrap_or_else(|error| panic!("{error}"))["default"];
        let limits = profile.resources.limits.clone().unwrap_or_default();
        let limit = |name: &str| limits[name].0.as_str();
        assert_eq!((limit("nvidia.com/gpu"), limit("cpu"), limit("memory")), ("1", "0.5", "64000000000"));
        assert_eq!(profile.max_resources["memory"].0, "128e9");
        assert_eq!(profile.storage.size.as_deref(), Some("50000000000"));
    }
}
