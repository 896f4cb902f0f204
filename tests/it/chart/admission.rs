//! The chart's admission policies, as an API server applies them.

mod children;

use std::sync::OnceLock;

use harness::cluster::{MINUTE, wait_for};
use harness::kube_apiserver::KubeApiServer;
use harness::repository;
use serde_json::{Map, Value, json};

use super::{parse, program, read, template};

/// An API server with the CRD and without an operator; each test has namespaces and policies of its own.
struct Server(KubeApiServer);

impl Server {
    fn shared() -> &'static Self {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(|| {
            let server = Self(KubeApiServer::start());
            server.kubectl(
                &["apply", "--server-side", "--filename=-"],
                &read(&repository().join("crds/finetunejobs.yaml")),
            );
            server
                .kubectl(&["wait", "--for=condition=Established", "--timeout=1m", "crd/finetunejobs.finetune.dev"], "");
            server
        })
    }

    fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        self.0.ask(&program("kubectl"), arguments, input)
    }

    fn kubectl(&self, arguments: &[&str], input: &str) -> String {
        self.try_kubectl(arguments, input).unwrap_or_else(|said| panic!("kubectl {arguments:?}: {said}\n{input}"))
    }

    /// Applies a template of the chart.
    fn apply(&self, file: &str, release: &str, values: &Value) {
        let values = format!("global={{}},{}", values_of(values));
        let arguments = ["--set-json", &values, "--set", &format!("fullnameOverride={release}"), "--show-only", file];
        let policies = template(&arguments).unwrap_or_else(|said| panic!("{values}: {said}"));
        self.kubectl(&["apply", "--filename=-"], &policies);
    }

    /// What is said to a job, which is not kept: that it may be made, or the sentence of who refuses it.
    fn ask(&self, namespace: &str, spec: &Value) -> Result<String, String> {
        let job = json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot"}, "spec": spec,
        });
        self.try_kubectl(&["create", "--dry-run=server", "--namespace", namespace, "--filename=-"], &job.to_string())
    }

    /// Waits until a policy is heeded: an API server reads it some time after it took it.
    fn until_refused(&self, namespace: &str, spec: &Value) {
        wait_for(format!("a policy in {namespace}"), MINUTE, || match self.ask(namespace, spec) {
            Err(said) if said.contains("ValidatingAdmissionPolicy") => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

/// `--set-json` of each value.
fn values_of(values: &Value) -> String {
    let pairs = values.as_object().expect("values").iter().map(|(name, value)| format!("{name}={value}"));
    pairs.collect::<Vec<_>>().join(",")
}

/// A job that every policy here takes, with something laid over it.
fn spec(over: &str) -> Value {
    let mut spec = parse(
        "{model: {uri: hf://a/model}, dataset: {train: {uri: pvc://data/train.jsonl}, splitPercent: 10}, method: {type: LoRA}, profile: a100}",
    );
    merge(&mut spec, parse(over));
    spec
}

/// A merge patch.
fn merge(value: &mut Value, over: Value) {
    match (value, over) {
        (_, Value::Null) => {}
        (Value::Object(fields), Value::Object(over)) => {
            for (name, over) in over {
                if over.is_null() {
                    fields.remove(&name);
                } else {
                    merge(fields.entry(name).or_insert(Value::Null), over);
                }
            }
        }
        (value, over) => *value = over,
    }
}

/// A rule of `admissionPolicy`, in a namespace of its own.
fn check(namespace: &str, rules: Value, taken: &[&str], refused: &[(&str, &str)]) {
    let server = Server::shared();
    server.kubectl(&["create", "namespace", namespace], "");
    let mut values = Map::new();
    values.insert("admissionPolicy.enabled".into(), json!(true));
    values.insert("admissionPolicy.maxAcceleratorsPerJob".into(), Value::Null);
    values.insert("profiles.default.otherDevices".into(), json!(["rdma/*"]));
    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": namespace}});
    values.insert("admissionPolicy.namespaceSelector".into(), here);
    let Value::Object(rules) = rules else { panic!("{rules}") };
    values.extend(rules.into_iter().map(|(name, value)| (format!("admissionPolicy.{name}"), value)));
    server.apply("templates/admissionpolicy.yaml", namespace, &values.into());
    server.until_refused(namespace, &spec(refused[0].0));
    for over in taken {
        let said = server.ask(namespace, &spec(over));
        assert!(said.is_ok(), "{over}: {said:?}");
    }
    for (over, expected) in refused {
        let said = server.ask(namespace, &spec(over)).expect_err(over);
        assert!(said.contains("Forbidden") && said.contains(expected), "{over}: expected {expected:?} in {said}");
    }
}

/// Numbers and text, of every form that Kubernetes takes.
#[test]
fn accelerators_are_counted_over_nodes_in_any_form_of_a_quantity() {
    check(
        "accelerators",
        json!({"maxAcceleratorsPerJob": 8}),
        &[
            "{}",
            "{resources: {limits: {nvidia.com/gpu: 8}}}",
            "{resources: {limits: {nvidia.com/gpu: 8e0, cpu: 1k, memory: 64e9}}}",
            "{resources: {limits: {nvidia.com/gpu: \"2\", memory: 64Gi, cpu: 500m}}, nodes: 4}",
            "{resources: {limits: {nvidia.com/gpu: 8}, requests: {nvidia.com/gpu: 8}}}",
            // What is none to the operator is none here.
            "{resources: {limits: {nvidia.com/gpu: 8, rdma/hca_a: 4, attachable-volumes.kubernetes.io/x: 9}}}",
        ],
        &[
            ("{resources: {limits: {nvidia.com/gpu: 9}}}", "spec.resources: 9 accelerators over all nodes, at most 8"),
            ("{resources: {limits: {nvidia.com/gpu: \"9\"}}}", "spec.resources: 9 accelerators"),
            ("{resources: {limits: {nvidia.com/gpu: 1k}}}", "spec.resources: 1000 accelerators"),
            ("{resources: {limits: {nvidia.com/gpu: \"64e9\"}}}", "spec.resources: 6.4e+10 accelerators"),
            ("{resources: {limits: {nvidia.com/gpu: 4, nvidia.com/mig-1g.10gb: 5}}}", "spec.resources: 9 accelerators"),
            ("{resources: {limits: {amd.com/gpu: 2}}, nodes: 5}", "spec.resources: 10 accelerators"),
            ("{resources: {requests: {nvidia.com/gpu: 8100m}}}", "spec.resources: 8.1 accelerators"),
        ],
    );
}

/// Where each URI of a job is, in the CRD.
fn uris() -> Vec<Vec<String>> {
    fn walk(schema: &Value, path: &[String], found: &mut Vec<Vec<String>>) {
        for (name, below) in schema["properties"].as_object().into_iter().flatten() {
            let path = [path, std::slice::from_ref(name)].concat();
            if name == "uri" {
                found.push(path.clone());
            }
            walk(below, &path, found);
        }
        if schema["items"].is_object() {
            walk(&schema["items"], &[path, &["[]".into()]].concat(), found);
        }
    }
    let crd = parse(&read(&repository().join("crds/finetunejobs.yaml")));
    let mut found = Vec::new();
    walk(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"], &[], &mut found);
    assert!(found.len() >= 6, "{found:?}");
    found
}

/// A value at a path, as YAML.
fn at(path: &[String], value: &str) -> String {
    let value = path.iter().rev().fold(
        json!(value),
        |below, step| {
            if step == "[]" { json!([below]) } else { json!({step: below}) }
        },
    );
    value.to_string()
}

#[test]
fn every_uri_of_a_job_must_begin_as_is_allowed() {
    let evil: Vec<(String, &str)> = uris()
        .iter()
        .map(|path| {
            let kind = if path[0] == "output" { "a destination" } else { "a source" };
            // Both say what of the two it is, and that it begins wrongly.
            let mut over = parse(&at(path, "https://evil.example/x"));
            if path[1] == "validation" {
                over["dataset"]["splitPercent"] = Value::Null;
            }
            (over.to_string(), kind)
        })
        .collect();
    let mut refused: Vec<(&str, &str)> = evil.iter().map(|(over, expected)| (over.as_str(), *expected)).collect();
    refused.extend([
        (
            "{model: {uri: hf://abc/model}}",
            "a source of this job is not allowed here; allowed are those that start with hf://a/, pvc://",
        ),
        ("{output: {uri: hf://b/x}}", "a destination of this job is not allowed here"),
        ("{model: {uri: hf://a/../b}}", "has a part '..'"),
        ("{output: {uri: hf://a/%2E%2e/b}}", "has a part '..'"),
        ("{output: {uri: pvc://data/..}}", "has a part '..'"),
    ]);
    let taken: Vec<String> =
        uris().iter().filter(|path| path[1] != "validation").map(|path| at(path, "hf://a/x")).collect();
    let mut taken: Vec<&str> = taken.iter().map(String::as_str).collect();
    taken.extend(["{}", "{output: {uri: hf://a/..x}}"]);
    check("sources", json!({"allowedSourcePrefixes": ["hf://a/", "pvc://"]}), &taken, &refused);
}

#[test]
fn destinations_may_be_others_than_sources() {
    check(
        "destinations",
        json!({"allowedSourcePrefixes": ["hf://", "pvc://"], "allowedDestinationPrefixes": ["s3://acme/"]}),
        &["{}", "{output: {uri: s3://acme/bot}}"],
        &[
            ("{output: {uri: hf://a/bot}}", "allowed are those that start with s3://acme/"),
            ("{model: {uri: s3://acme/model}}", "a source of this job"),
        ],
    );
    check(
        "no-destination",
        json!({"allowedDestinationPrefixes": []}),
        &["{}", "{model: {uri: s3://anywhere/model}}"],
        &[(
            "{output: {uri: s3://acme/bot}}",
            "a destination of this job is not allowed here; allowed are those that start with none",
        )],
    );
}

#[test]
fn a_job_names_only_claims_that_are_allowed_wherever_it_names_them() {
    check(
        "claims",
        json!({"allowedClaims": ["data"]}),
        &[
            "{}",
            "{checkpoint: {storage: {claim: data}}}",
            "{checkpoint: {storage: {size: 1Gi}}}",
            "{output: {uri: pvc://data/out}}",
        ],
        &[
            (
                "{checkpoint: {storage: {claim: other}}}",
                "this job names a claim that is not allowed here; allowed are data",
            ),
            ("{model: {uri: pvc://other/model}}", "a claim"),
            ("{output: {uri: pvc://other}}", "a claim"),
            ("{checkpoint: {resumeFrom: {uri: pvc://other/run}}}", "a claim"),
        ],
    );
}

#[test]
fn a_volume_has_a_size_and_a_class_that_are_allowed() {
    check(
        "sizes",
        json!({"maxStorageSize": "1Ti"}),
        &[
            "{}",
            "{checkpoint: {everySteps: 3}}",
            "{checkpoint: {storage: {size: 1Ti}}}",
            "{checkpoint: {storage: {size: 1000G}}}",
            "{checkpoint: {storage: {size: \"1e12\"}}}",
        ],
        &[
            ("{checkpoint: {storage: {size: 900Ti}}}", "spec.checkpoint.storage.size: at most 1Ti is allowed here"),
            ("{checkpoint: {storage: {size: \"2e12\"}}}", "at most 1Ti"),
        ],
    );
    check(
        "classes",
        json!({"allowedStorageClasses": ["fast"]}),
        &["{}", "{checkpoint: {storage: {size: 1Gi}}}", "{checkpoint: {storage: {size: 1Gi, storageClassName: fast}}}"],
        &[(
            "{checkpoint: {storage: {size: 1Gi, storageClassName: gold}}}",
            "spec.checkpoint.storage.storageClassName: allowed here are fast",
        )],
    );
}

#[test]
fn a_job_names_only_profiles_and_queues_that_are_allowed() {
    check(
        "profiles",
        json!({"allowedProfiles": ["a100"]}),
        &["{}"],
        &[
            ("{profile: gold}", "spec.profile: allowed here are a100"),
            // Who names none gets `default`.
            ("{profile: null}", "spec.profile: allowed here are a100"),
        ],
    );
    check(
        "queues",
        json!({"allowedQueues": ["team"]}),
        &["{}", "{scheduling: {queueName: team}}"],
        &[("{scheduling: {queueName: others}}", "spec.scheduling.queueName: allowed here are team")],
    );
    check(
        "no-queue",
        json!({"allowedQueues": []}),
        &["{}"],
        &[("{scheduling: {queueName: team}}", "spec.scheduling.queueName: allowed here are none")],
    );
}

/// What a profile says of namespaces is refused where the job is made, in the words of the operator.
#[test]
fn a_profile_is_named_in_its_own_namespaces_only() {
    let profiles = json!({
        "default": {}, "a100": {"allowed": {"namespaces": ["of-profile", "ml-*"]}}, "mine": {"allowed": {"namespaces": ["of-*"]}},
        "none": {"allowed": {"namespaces": []}}, "unsaid": {}, "any": {"allowed": {"namespaces": ["*"]}},
    });
    let server = Server::shared();
    let read = crds::profile::parse(&profiles.to_string()).expect("profiles");
    for namespace in ["of-profile", "ml-a", "xml-a"] {
        server.kubectl(&["create", "namespace", namespace], "");
    }
    let here = json!({"matchExpressions": [{
        "key": "kubernetes.io/metadata.name", "operator": "In", "values": ["of-profile", "ml-a", "xml-a"],
    }]});
    let values = json!({
        "admissionPolicy.enabled": true, "admissionPolicy.namespaceSelector": here, "profiles": profiles,
    });
    server.apply("templates/admissionpolicy.yaml", "of-profiles", &values);
    server.until_refused("ml-a", &spec("{profile: none}"));
    for (name, profile) in &read {
        for namespace in ["of-profile", "ml-a", "xml-a"] {
            let said = server.ask(namespace, &spec(&format!("{{profile: {name}}}")));
            assert_eq!(said.is_ok(), profile.serves(name, namespace), "{name} in {namespace}: {said:?}");
            if let Err(said) = said {
                let expected = format!("spec.profile: jobs of this namespace may not name {name}");
                assert!(said.contains(&expected), "expected {expected:?} in {said}");
            }
        }
    }
    // Whether there is such a profile, the operator knows.
    assert!(server.ask("ml-a", &spec("{profile: nowhere}")).is_ok());
}

#[test]
fn each_tenant_has_rules_of_its_own() {
    let server = Server::shared();
    let tenant = |name: &str, profile: &str| {
        server.kubectl(&["create", "namespace", name], "");
        json!({
            "name": name, "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}, "allowedProfiles": [profile],
        })
    };
    let tenants = json!([tenant("tenant-a", "a100"), tenant("tenant-b", "gold")]);
    let values = json!({
        "admissionPolicy.enabled": true, "admissionPolicy.maxAcceleratorsPerJob": null, "admissionPolicy.tenants": tenants,
    });
    server.apply("templates/admissionpolicy.yaml", "tenants", &values);
    for (tenant, own, other) in [("tenant-a", "a100", "gold"), ("tenant-b", "gold", "a100")] {
        server.until_refused(tenant, &spec(&format!("{{profile: {other}}}")));
        let said = server.ask(tenant, &spec(&format!("{{profile: {own}}}")));
        assert!(said.is_ok(), "{tenant}: {said:?}");
    }
    let said = server.ask("default", &spec("{profile: platinum}"));
    assert!(said.is_ok(), "no tenant's namespace: {said:?}");
}

/// A job from before the policy must be stoppable, and its status must go on.
#[test]
fn a_job_that_is_there_already_can_be_changed() {
    let server = Server::shared();
    server.kubectl(&["create", "namespace", "older"], "");
    let job = json!({
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot"}, "spec": spec("{profile: gold}"),
    });
    server.kubectl(&["create", "--namespace=older", "--filename=-"], &job.to_string());
    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": "older"}});
    let values = json!({
        "admissionPolicy.enabled": true, "admissionPolicy.namespaceSelector": here, "admissionPolicy.allowedProfiles": ["a100"],
    });
    server.apply("templates/admissionpolicy.yaml", "older", &values);
    server.until_refused("older", &spec("{profile: gold}"));
    let patch = |more: &[&str]| {
        server.kubectl(&[&["patch", "finetunejob", "bot", "--namespace=older", "--type=merge"], more].concat(), "");
    };
    patch(&["--patch", "{\"spec\": {\"stopRequested\": true}}"]);
    patch(&["--subresource=status", "--patch", "{\"status\": {\"phase\": \"Succeeded\"}}"]);
}
