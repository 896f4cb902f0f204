//! Rendered objects: valid, each behind its switch, with the rights and arguments of the contract.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::{NAMESPACE, built, chart, made_by, names, parse, read, render, run, text, the};

const VERSIONS: [&str; 5] = ["1.33.0", "1.34.0", "1.35.0", "1.36.0", "1.37.0"];
/// Kinds of the Prometheus operator, of which kubernetes-validate has no schema.
const FOREIGN_GROUP: &str = "monitoring.coreos.com/v1";

/// Values files of the chart, by name.
fn ci_values() -> Vec<(String, String)> {
    let folder = chart().join("ci");
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).expect("the folder ci").flatten().map(|file| file.path()).collect();
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), path.display().to_string())).collect()
}

#[test]
fn the_chart_lints_with_each_set_of_values() {
    for (name, path) in ci_values() {
        run(built("helm").args(["lint", "--strict"]).arg(chart()).args(["--values", &path]))
            .unwrap_or_else(|said| panic!("{name}: {said}"));
    }
}

/// Every rendered object against the schemas of each version of Kubernetes.
#[test]
fn what_is_rendered_is_valid_in_each_version_of_kubernetes() {
    let validate = |version: &str, files: &[PathBuf]| {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| made_by("tools/kubernetes-validate.sh"));
        run(Command::new(program).args(["--strict", "--kubernetes-version", version]).args(files))
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    for version in VERSIONS {
        let files: Vec<PathBuf> = ci_values()
            .iter()
            .map(|(name, path)| {
                let objects = render(&["--values", path, "--kube-version", version]);
                let known: Vec<_> = objects.iter().filter(|object| object["apiVersion"] != FOREIGN_GROUP).collect();
                assert!(known.len() >= 10, "{name}: {:?}", names(&objects));
                let text = known.iter().map(|object| format!("---\n{object}\n")).collect::<String>();
                let file = folder.path().join(format!("{version}-{name}"));
                std::fs::write(&file, text).expect("written");
                file
            })
            .collect();
        validate(version, &files).unwrap_or_else(|said| panic!("{said}"));
    }
    let typo = folder.path().join("typo.yaml");
    let mut deployment = the(&render(&[]), "Deployment", "finetune-operator").clone();
    deployment["spec"]["replicass"] = json!(1);
    std::fs::write(&typo, deployment.to_string()).expect("written");
    let said = validate(VERSIONS[0], &[typo]).expect_err("an unknown field is refused");
    assert!(said.contains("replicass"), "{said}");
}

/// What comes with the values as they are, and what each switch adds or takes away.
#[test]
fn each_switch_adds_or_removes_its_objects() {
    let default = names(&render(&[]));
    let expected = [
        "ClusterRole finetune-operator",
        "ClusterRole finetune-operator-edit",
        "ClusterRole finetune-operator-view",
        "ClusterRoleBinding finetune-operator",
        "ConfigMap finetune-system/finetune-operator-dashboard-fleet",
        "ConfigMap finetune-system/finetune-operator-dashboard-run",
        "ConfigMap finetune-system/finetune-operator-profiles",
        "CustomResourceDefinition finetunejobs.finetune.dev",
        "Deployment finetune-system/finetune-operator",
        "NetworkPolicy finetune-system/finetune-operator",
        "Role finetune-system/finetune-operator-leader",
        "RoleBinding finetune-system/finetune-operator-leader",
        "Service finetune-system/finetune-operator-metrics",
        "ServiceAccount finetune-system/finetune-operator",
        "ValidatingAdmissionPolicy finetune-system-finetune-operator-children",
        "ValidatingAdmissionPolicyBinding finetune-system-finetune-operator-children",
    ];
    assert_eq!(default.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    let expected: [(&str, &[&str], &[&str]); 12] = [
        (
            "rbac.create=false",
            &[],
            &[
                "ClusterRole finetune-operator",
                "ClusterRoleBinding finetune-operator",
                "Role finetune-system/finetune-operator-leader",
                "RoleBinding finetune-system/finetune-operator-leader",
            ],
        ),
        (
            "rbac.aggregateClusterRoles=false",
            &[],
            &["ClusterRole finetune-operator-edit", "ClusterRole finetune-operator-view"],
        ),
        (
            "leaderElection.enabled=false",
            &[],
            &["Role finetune-system/finetune-operator-leader", "RoleBinding finetune-system/finetune-operator-leader"],
        ),
        (
            "serviceAccount.create=false,serviceAccount.name=mine",
            &[],
            &["ServiceAccount finetune-system/finetune-operator"],
        ),
        (
            "grafana.dashboards.enabled=false",
            &[],
            &[
                "ConfigMap finetune-system/finetune-operator-dashboard-fleet",
                "ConfigMap finetune-system/finetune-operator-dashboard-run",
            ],
        ),
        ("metrics.service.enabled=false", &[], &["Service finetune-system/finetune-operator-metrics"]),
        ("networkPolicy.enabled=false", &[], &["NetworkPolicy finetune-system/finetune-operator"]),
        ("podDisruptionBudget.enabled=true", &["PodDisruptionBudget finetune-system/finetune-operator"], &[]),
        (
            "metrics.serviceMonitor.enabled=true,metrics.podMonitor.enabled=true,metrics.prometheusRule.enabled=true",
            &[
                "PodMonitor finetune-system/finetune-operator-trainers",
                "PrometheusRule finetune-system/finetune-operator",
                "ServiceMonitor finetune-system/finetune-operator",
            ],
            &[],
        ),
        (
            "admissionPolicy.enabled=true",
            &[
                "ValidatingAdmissionPolicy finetune-system-finetune-operator",
                "ValidatingAdmissionPolicyBinding finetune-system-finetune-operator",
            ],
            &[],
        ),
        (
            "admissionPolicy.enabled=true,admissionPolicy.maxAcceleratorsPerJob=null,admissionPolicy.tenants[0].name=a,\
             admissionPolicy.tenants[0].namespaceSelector.matchLabels.team=a,admissionPolicy.tenants[0].allowedProfiles[0]=p",
            &[
                "ValidatingAdmissionPolicy finetune-system-finetune-operator-a",
                "ValidatingAdmissionPolicyBinding finetune-system-finetune-operator-a",
            ],
            &[],
        ),
        (
            "childPolicy.enabled=false",
            &[],
            &[
                "ValidatingAdmissionPolicy finetune-system-finetune-operator-children",
                "ValidatingAdmissionPolicyBinding finetune-system-finetune-operator-children",
            ],
        ),
    ];
    for (set, added, removed) in expected {
        let found = names(&render(&["--set", set]));
        assert_eq!(found.difference(&default).collect::<Vec<_>>(), added.iter().collect::<Vec<_>>(), "{set}");
        assert_eq!(default.difference(&found).collect::<Vec<_>>(), removed.iter().collect::<Vec<_>>(), "{set}");
    }
}

/// `group/resource verb` of every rule.
fn rights(role: &Value) -> BTreeSet<String> {
    let list = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().map(|item| text(item).to_owned()).collect()
    };
    let mut found = BTreeSet::new();
    for rule in role["rules"].as_array().expect("a role has rules") {
        for group in list(&rule["apiGroups"]) {
            for resource in list(&rule["resources"]) {
                found.extend(list(&rule["verbs"]).iter().map(|verb| format!("{group}/{resource} {verb}")));
            }
        }
    }
    found
}

#[test]
fn the_operator_has_these_rights_and_no_others() {
    let expected = |rows: &[(&str, &[&str])]| -> BTreeSet<String> {
        rows.iter().flat_map(|(resource, verbs)| verbs.iter().map(move |verb| format!("{resource} {verb}"))).collect()
    };
    let served = expected(&[
        ("finetune.dev/finetunejobs", &["list", "watch", "delete"]),
        ("finetune.dev/finetunejobs/status", &["patch"]),
        ("finetune.dev/finetunejobs/finalizers", &["update"]),
        ("batch/jobs", &["get", "list", "watch", "create", "delete"]),
        ("/pods", &["list", "watch"]),
        ("/configmaps", &["get", "create"]),
        ("/persistentvolumeclaims", &["get", "create"]),
        ("events.k8s.io/events", &["create", "patch"]),
        ("/events", &["list"]),
        ("kueue.x-k8s.io/workloads", &["list", "watch"]),
    ]);
    let own = expected(&[("coordination.k8s.io/leases", &["get", "create", "update"])]);

    let everywhere = render(&[]);
    let of_cluster = expected(&[("/nodes", &["list"]), ("storage.k8s.io/storageclasses", &["list"])]);
    let all = served.union(&of_cluster).cloned().collect();
    assert_eq!(rights(the(&everywhere, "ClusterRole", "finetune-operator")), all);
    let leader = the(&everywhere, "Role", "finetune-operator-leader");
    assert_eq!((rights(leader), text(&leader["metadata"]["namespace"])), (own, NAMESPACE));

    let watched = render(&["--set", "watchNamespaces={team-a,team-b}"]);
    let found = names(&watched);
    assert!(!found.contains("ClusterRole finetune-operator"), "{found:?}");
    assert!(!found.iter().any(|name| name.starts_with("ClusterRoleBinding")), "{found:?}");
    for namespace in ["team-a", "team-b"] {
        assert!(found.contains(&format!("Role {namespace}/finetune-operator")), "{found:?}");
        assert!(found.contains(&format!("RoleBinding {namespace}/finetune-operator")), "{found:?}");
    }
    assert_eq!(rights(the(&watched, "Role", "finetune-operator")), served);

    for (name, path) in ci_values() {
        let objects = render(&["--values", &path]);
        let roles = objects.iter().filter(|object| text(&object["kind"]).ends_with("Role"));
        for right in roles.flat_map(rights) {
            for forbidden in ["*", "/secrets ", "/exec ", "/pods/log ", " escalate", " bind", " impersonate"] {
                assert!(!right.contains(forbidden), "{name}: {right}");
            }
        }
    }
}

#[test]
fn the_deployment_keeps_the_contract_and_pod_security_restricted() {
    let objects = render(&["--set", "watchNamespaces={team-a,team-b}"]);
    let deployment = the(&objects, "Deployment", "finetune-operator");
    assert_eq!(deployment["spec"]["replicas"], 1);
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let arguments: Vec<_> = container["args"].as_array().expect("arguments").iter().map(text).collect();
    assert_eq!(
        arguments,
        [
            "--profiles=/etc/finetune-operator/profiles.yaml",
            "--listen=0.0.0.0:8080",
            "--watch-namespace=team-a",
            "--watch-namespace=team-b",
            "--leader-election=true",
            "--lease-name=finetune-operator",
            "--lease-duration-seconds=15",
            "--renew-deadline-seconds=10",
            "--retry-period-seconds=2",
            "--poll-interval-seconds=15",
            "--log-format=json",
            "--log-level=info",
        ]
    );
    let env = json!([
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
    ]);
    assert_eq!(container["env"], env);
    for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": "http"}));
    }
    assert_eq!(container["ports"], json!([{"name": "http", "containerPort": 8080, "protocol": "TCP"}]));

    let security = &pod["securityContext"];
    assert_eq!((&security["runAsNonRoot"], &security["runAsUser"]), (&json!(true), &json!(65532)));
    assert_eq!(security["seccompProfile"], json!({"type": "RuntimeDefault"}));
    let expected = json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
    });
    assert_eq!(container["securityContext"], expected);
    let everywhere = render(&[]);
    let arguments =
        the(&everywhere, "Deployment", "finetune-operator")["spec"]["template"]["spec"]["containers"][0]["args"]
            .to_string();
    assert!(!arguments.contains("--watch-namespace"), "{arguments}");
}

#[test]
fn profiles_reach_the_operator_with_an_image_and_an_edit_restarts_it() {
    let of = |arguments: &[&str]| {
        let objects = render(arguments);
        let profiles = parse(text(&the(&objects, "ConfigMap", "finetune-operator-profiles")["data"]["profiles.yaml"]));
        let pod = &the(&objects, "Deployment", "finetune-operator")["spec"]["template"];
        (profiles, pod["metadata"]["annotations"]["checksum/profiles"].clone())
    };
    let version = text(&parse(&read(&chart().join("Chart.yaml")))["appVersion"]).to_owned();
    let (profiles, checksum) = of(&[]);
    assert_eq!(profiles["default"]["image"], format!("registry.example/finetune-trainer:{version}"));
    assert_eq!(profiles["default"]["resources"]["limits"]["nvidia.com/gpu"], "1", "somebody who says nothing has GPUs");
    let (own, _) = of(&["--set", "profiles.default.pricePerHour=1"]);
    assert_eq!(own["default"]["resources"], Value::Null, "an administrator's own profile is not mixed with ours");

    let digest = format!("sha256:{}", "a".repeat(64));
    let (profiles, changed) = of(&[
        "--set",
        &format!("image.registry=one.example,trainer.image.digest={digest},profiles.own.image=two.example/x@{digest}"),
    ]);
    assert_eq!(profiles["default"]["image"], format!("one.example/finetune-trainer@{digest}"));
    assert_eq!(profiles["own"]["image"], format!("two.example/x@{digest}"));
    assert_ne!(checksum, changed);
    let (profiles, _) = of(&["--set", "trainer.image.registry=three.example,trainer.image.tag=v1"]);
    assert_eq!(profiles["default"]["image"], "three.example/finetune-trainer:v1");
}

/// The operator reads what the chart writes, and the schema of the values has every field of a profile.
#[test]
fn the_operator_reads_the_profiles_of_every_set_of_values() {
    let mut fields = BTreeSet::new();
    for (name, path) in ci_values() {
        let objects = render(&["--values", &path, "--set", "fullnameOverride=finetune-operator"]);
        let written = text(&the(&objects, "ConfigMap", "finetune-operator-profiles")["data"]["profiles.yaml"]);
        let profiles = crds::profile::parse(written).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (profile, of) in &profiles {
            assert!(of.image.is_some(), "{name}: {profile} has no image");
            let of = serde_json::to_value(of).expect("a profile is JSON");
            fields.extend(of.as_object().expect("a map").keys().cloned());
        }
    }
    let schema = parse(&read(&chart().join("values.schema.json")));
    let typed = schema["$defs"]["Profile"]["properties"].as_object().expect("fields").keys().cloned();
    assert_eq!(typed.collect::<BTreeSet<_>>(), fields, "full-values.yaml sets every field of a profile");
}

#[test]
fn trainers_are_fenced_in_where_namespaces_are_known() {
    let objects = render(&["--set", "watchNamespaces={team-a}"]);
    let all = &the(&objects, "NetworkPolicy", "finetune-trainers")["spec"];
    assert_eq!(all["policyTypes"], json!(["Ingress", "Egress"]));
    assert!(all["egress"].is_null(), "a train pod reaches nothing: {all}");
    let peers = all["ingress"][0]["from"].as_array().expect("peers");
    assert_eq!(peers[0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], NAMESPACE);
    assert_eq!(peers.len(), 2, "the operator and Prometheus: {peers:?}");
    let sources = &the(&objects, "NetworkPolicy", "finetune-trainers-sources")["spec"];
    let component = &sources["podSelector"]["matchExpressions"][0];
    assert_eq!(component["values"], json!(["prepare", "publish"]));
    let excepted = sources["egress"][1]["to"].to_string();
    assert!(excepted.contains("169.254.0.0/16"), "{excepted}");

    // A rule with an empty list of peers would let everyone in.
    for arguments in [["--set", "networkPolicy.metricsFrom=null"], ["--set-json", "networkPolicy.metricsFrom=[]"]] {
        let objects = render(&arguments);
        let operator = &the(&objects, "NetworkPolicy", "finetune-operator")["spec"];
        assert!(operator["ingress"].is_null() && operator["policyTypes"] == json!(["Ingress", "Egress"]), "{operator}");
    }
}

/// Where the cluster assigns users, a pod that asks for one is refused: neither the operator's does, nor do those of any profile that
/// does not say so itself.
#[test]
fn where_the_cluster_assigns_users_nobody_asks_for_one() {
    let asked = |more: &[&str]| {
        let objects = render(more);
        let pod =
            the(&objects, "Deployment", "finetune-operator")["spec"]["template"]["spec"]["securityContext"].clone();
        let profiles = the(&objects, "ConfigMap", "finetune-operator-profiles")["data"]["profiles.yaml"].clone();
        (pod, parse(profiles.as_str().expect("a file")))
    };
    let (pod, profiles) =
        asked(&["--set", "clusterAssignsUser=true", "--set", "profiles.fixed.clusterAssignsUser=false"]);
    assert_eq!(pod, json!({"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}}));
    assert_eq!(profiles["default"]["clusterAssignsUser"], true);
    assert_eq!(profiles["fixed"]["clusterAssignsUser"], false);
    let (pod, profiles) = asked(&[]);
    assert_eq!((&pod["runAsUser"], &profiles["default"]["clusterAssignsUser"]), (&json!(65532), &Value::Null));
}
