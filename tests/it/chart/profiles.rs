//! Profiles: what the chart's schema takes is what the operator reads, since both come from one type.

use std::io::Write;

use serde_json::{Value, json};

use super::{chart, compare_generated, parse, read, template, text, the};

/// Where the written part of the schema ends.
const GENERATED: &str = "  \"$defs\": ";

/// The schema of a profile lies in the schema of the values as the types say it. `UPDATE=1` writes it.
#[test]
fn the_schema_of_profiles_is_current() {
    let mut profiles = crds::profile::schema();
    let mut definitions = profiles["$defs"].take();
    // Helm drops a profile that says nothing, or hands it over as null.
    definitions["Profile"]["type"] = json!(["object", "null"]);
    definitions["Profiles"] = json!({"type": "object", "additionalProperties": profiles["additionalProperties"]});
    without_kubernetes_words(&mut definitions);
    let path = chart().join("values.schema.json");
    let schema = read(&path);
    let written = schema.split_once(GENERATED).expect("the generated part comes last").0;
    let generated = serde_json::to_string_pretty(&definitions).expect("JSON").replace('\n', "\n  ");
    compare_generated(
        &path,
        &format!("{written}{GENERATED}{generated}\n}}\n"),
        "profiles::the_schema_of_profiles_is_current",
    );
}

/// Kubernetes explains its own types, at length.
fn without_kubernetes_words(definitions: &mut Value) {
    fn walk(schema: &mut Value) {
        if let Some(map) = schema.as_object_mut() {
            if map.get("description").is_some_and(Value::is_string) {
                map.remove("description");
            }
            map.values_mut().for_each(walk);
        }
    }
    let definitions = definitions.as_object_mut().expect("definitions");
    definitions.iter_mut().filter(|(name, _)| name.starts_with("io.k8s.")).for_each(|(_, schema)| walk(schema));
}

/// What each makes of a profile: the chart of its values, the operator of the file that the chart would write.
fn verdicts(profile: &str) -> (Result<String, String>, Result<crds::profile::Profiles, String>) {
    let mut values = tempfile::Builder::new().suffix(".yaml").tempfile().expect("a temporary file");
    writeln!(values, "profiles: {{default: {profile}}}").expect("written");
    let chart = template(&["--values", values.path().to_str().expect("a UTF-8 path")]);
    let operator = crds::profile::parse(&format!("default: {profile}")).map_err(|error| error.to_string());
    (chart, operator)
}

#[test]
fn chart_and_operator_take_and_refuse_the_same_profiles() {
    for (profile, is_taken) in [
        // As every manifest of a pod has it.
        ("{resources: {limits: {nvidia.com/gpu: 1, memory: 64Gi}}}", true),
        (
            "{resources: {limits: {nvidia.com/gpu: \"1\", memory: \"64e9\"}}, maxResources: {memory: \"128e9\"}, storage: {size: \"50e9\"}}",
            true,
        ),
        ("{maxResources: {memory: 128e9, cpu: 0.5}, storage: {size: 50000000000}, acceleratorMemory: 80e9}", true),
        ("{maxResources: {memory: 1k, cpu: .5}, acceleratorMemory: 1Pi}", true),
        ("{tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]}", true),
        ("{resources: null, pricePerHour: 0}", true),
        ("{maxResources: {memory: lots}}", false),
        ("{maxResources: {memory: -1}}", false),
        ("{maxResources: {memory: 1e999}}", false),
        ("{resources: {limit: {memory: 1Gi}}}", false),
        ("{resources: {limits: {memory: 64 GB}}}", false),
        ("{cpuResources: {requests: {cpu: true}}}", false),
        ("{storage: {size: big}}", false),
        ("{acceleratorMemory: 80GB}", false),
        ("{tolerations: [{kye: nvidia.com/gpu}]}", false),
        ("{imagePullPolicy: Sometimes}", false),
        ("{imagePullSecrets: [registry]}", false),
        ("{pricePerHour: -1}", false),
        ("{hub: {endpoint: hub.example}}", false),
        ("{allowed: {images: [x]}}", false),
        ("{terminationGracePeriodSeconds: 1.5}", false),
        ("{fallBackToCpu: \"yes\"}", false),
        ("{nodeSelector: {a: 1}}", false),
        ("{imgae: x}", false),
        (
            "{environment: [{name: HTTPS_PROXY, value: http://proxy}], cpuPods: {environment: [{name: HTTPS_PROXY, value: b}]}}",
            true,
        ),
        ("{environment: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]}", true),
        ("{environment: [{name: NODE, vale: x}]}", false),
        ("{environment: [{name: HF_HOME, value: /tmp}]}", false),
        ("{environment: [{name: A, value: b}, {name: A, value: c}]}", false),
        ("{cpuPods: {environment: [{name: A}, {name: A}]}}", false),
        ("{caBundle: {configMapName: c, key: k}, environment: [{name: SSL_CERT_FILE, value: /x}]}", false),
        ("{environment: [{name: SSL_CERT_FILE, value: /x}]}", true),
        ("{labels: {team: a}, inheritedLabels: [cost-center]}", true),
        ("{labels: {finetune.dev/job-uid: a}}", false),
        ("{inheritedLabels: [kubernetes.io/x]}", false),
        ("{topology: {required: rack}}", true),
        ("{topology: {required: rack, preferred: zone}}", false),
        (
            "{storage: {maxSize: 2Ti, fsGroupClaims: [data]}, otherDevices: [\"rdma/*\"], allowed: {namespaces: [\"team-*\"]}}",
            true,
        ),
    ] {
        let (chart, operator) = verdicts(profile);
        assert_eq!(operator.is_ok(), is_taken, "{profile}: the operator says {operator:?}");
        assert_eq!(chart.is_ok(), is_taken, "{profile}: the chart says {chart:?}");
        // What went through the chart means the same.
        let Ok(rendered) = chart else { continue };
        let objects = super::objects(&rendered);
        let file = text(&the(&objects, "ConfigMap", "finetune-operator-profiles")["data"]["profiles.yaml"]);
        let mut read = crds::profile::parse(file).unwrap_or_else(|error| panic!("{profile}: {error}\n{file}"));
        let image = read.get_mut("default").expect("it is there").image.take();
        assert!(image.is_some(), "the chart gives it an image");
        assert_eq!(amounts(&read), amounts(&operator.expect("it was taken")), "{profile}");
    }
}

/// A profile with its quantities as numbers: Helm may write 50000000000 as 5e+10.
fn amounts(profiles: &crds::profile::Profiles) -> Value {
    fn walk(value: &mut Value) {
        match value {
            Value::Object(map) => map.values_mut().for_each(walk),
            Value::Array(items) => items.iter_mut().for_each(walk),
            Value::String(text) => {
                if let Some(amount) = crds::quantity::value(text) {
                    *value = json!(amount);
                }
            }
            _ => {}
        }
    }
    let mut value = parse(&serde_json::to_string(profiles).expect("JSON"));
    walk(&mut value);
    value
}
