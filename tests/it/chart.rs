//! The Helm chart: that its generated parts are current, what it renders, and what its values refuse.

mod alerts;
mod dashboards;
mod series;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use harness::repository;
use serde_json::{Value, json};

/// The namespace of every release here.
const NAMESPACE: &str = "finetune-system";
const VERSIONS: [&str; 5] = ["1.33.0", "1.34.0", "1.35.0", "1.36.0", "1.37.0"];
/// Kinds of the Prometheus operator, of which kubernetes-validate has no schema.
const FOREIGN_GROUP: &str = "monitoring.coreos.com/v1";

fn chart() -> PathBuf {
    repository().join("charts/finetune-operator")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn parse(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// What a program printed, or all that it said when it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if output.status.success() { Ok(stdout) } else { Err(stdout + &stderr) }
}

/// The path that a script of the checkout prints, after having made what lies there unless it did before.
fn made_by(script: &str) -> PathBuf {
    let printed = run(&mut Command::new(repository().join(script))).unwrap_or_else(|said| panic!("{script}: {said}"));
    PathBuf::from(printed.lines().last().unwrap_or_else(|| panic!("{script} printed no path")))
}

/// A program that is built with the test cluster: helm, promtool.
fn built(program: &str) -> Command {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    Command::new(FOLDER.get_or_init(|| made_by("tests/cluster/build.sh")).join("bin").join(program))
}

/// What `helm template` says.
fn template(arguments: &[&str]) -> Result<String, String> {
    run(built("helm")
        .args(["template", "finetune-operator"])
        .arg(chart())
        .args(["--namespace", NAMESPACE])
        .args(["--api-versions", "monitoring.coreos.com/v1/PodMonitor"])
        .args(arguments))
}

/// The rendered objects.
fn render(arguments: &[&str]) -> Vec<Value> {
    let text = template(arguments).unwrap_or_else(|said| panic!("{arguments:?}: {said}"));
    objects(&text)
}

fn objects(text: &str) -> Vec<Value> {
    let values: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}"));
    values.into_iter().filter(|value| !value.is_null()).collect()
}

/// `Kind namespace/name` of each object; cluster-scoped ones have no namespace.
fn names(objects: &[Value]) -> BTreeSet<String> {
    let name = |object: &Value| {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{} {namespace}{}", text(&object["kind"]), text(&metadata["name"]))
    };
    objects.iter().map(name).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

fn the<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name} in {:#?}", names(objects)))
}

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

fn compare_generated(path: &Path, generated: &str, test: &str) {
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, generated).expect("the chart's folder is writable");
    }
    assert!(
        read(path) == generated,
        "{} is not current; run `UPDATE=1 cargo test --release -p finetune-tests chart::{test}`",
        path.display()
    );
}

/// The template of the CRD is the CRD, behind its switches. `UPDATE=1` writes it.
#[test]
fn the_crd_is_current() {
    let crd = read(&repository().join("crds/finetunejobs.yaml"));
    let name = "metadata:\n  name: finetunejobs.finetune.dev\n";
    assert_eq!(crd.matches(name).count(), 1, "the CRD has another name");
    let metadata = format!(
        "{name}  labels:\n    {{{{- include \"finetune-operator.labels\" . | nindent 4 }}}}\n  \
         {{{{- if .Values.crds.keep }}}}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{{{- end }}}}\n"
    );
    // The text is spliced, not parsed and written again: that would make floats of its integers.
    let body = crd.replace("{{", "{{ \"{{\" }}").replace(name, &metadata);
    let generated = format!(
        "{{{{- /* Generated from crds/finetunejobs.yaml: UPDATE=1 cargo test --release -p finetune-tests \
         chart::the_crd_is_current */}}}}\n{{{{- if .Values.crds.enabled }}}}\n{body}{{{{- end }}}}\n"
    );
    compare_generated(&chart().join("templates/crds/finetunejobs.yaml"), &generated, "the_crd_is_current");

    let kind = "CustomResourceDefinition";
    let expected = parse(&crd);
    for (keep, annotation) in [("true", json!("keep")), ("false", Value::Null)] {
        let objects = render(&["--set", &format!("crds.keep={keep}")]);
        let rendered = the(&objects, kind, "finetunejobs.finetune.dev");
        assert_eq!(rendered["spec"], expected["spec"], "Helm renders another CRD than crds/finetunejobs.yaml");
        assert_eq!(rendered["metadata"]["annotations"]["helm.sh/resource-policy"], annotation);
    }
    assert!(!names(&render(&["--set", "crds.enabled=false"])).iter().any(|name| name.starts_with(kind)));
}

/// A value of values.yaml with its comment.
struct Documented {
    path: String,
    default: String,
    description: String,
}

/// Reads the `# -- ` comments. A line that is neither a comment nor `key: value` belongs to the value above it.
fn documented_values(values: &str) -> Vec<Documented> {
    let mut rows = Vec::new();
    let mut parents: Vec<(usize, String)> = Vec::new();
    let mut comment: Option<String> = None;
    for line in values.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(first) = trimmed.strip_prefix("# -- ") {
            comment = Some(first.to_owned());
        } else if let (Some(comment), Some(more)) = (&mut comment, trimmed.strip_prefix("# ")) {
            comment.push(' ');
            comment.push_str(more);
        } else if let Some((key, default)) = trimmed.split_once(':').filter(|(key, _)| !key.contains([' ', '#', '{'])) {
            parents.retain(|(above, _)| *above < indent);
            parents.push((indent, key.to_owned()));
            if let Some(description) = comment.take() {
                let path: Vec<_> = parents.iter().map(|(_, key)| key.as_str()).collect();
                rows.push(Documented { path: path.join("."), default: default.trim().to_owned(), description });
            }
        }
    }
    rows
}

#[test]
fn the_values_table_is_current() {
    let mut table = "| value | default | meaning |\n|---|---|---|\n".to_owned();
    for Documented { path, default, description } in documented_values(&read(&chart().join("values.yaml"))) {
        let default = if default.is_empty() { "see values.yaml".to_owned() } else { format!("`{default}`") };
        table += &format!("| `{path}` | {default} | {description} |\n");
    }
    let path = chart().join("README.md");
    let readme = read(&path);
    let (before, rest) = readme.split_once("<!-- values -->\n").expect("README.md marks where the table begins");
    let (_, after) = rest.split_once("<!-- /values -->").expect("README.md marks where the table ends");
    let generated = format!("{before}<!-- values -->\n{table}<!-- /values -->{after}");
    compare_generated(&path, &generated, "the_values_table_is_current");
}

/// Paths of what is set in `value`, down to lists, scalars and empty maps.
fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
    match value.as_object().filter(|fields| !fields.is_empty()) {
        Some(fields) => fields.iter().for_each(|(key, below)| {
            leaves(below, &format!("{path}{}{key}", if path.is_empty() { "" } else { "." }), found);
        }),
        None => found.push(path.to_owned()),
    }
}

#[test]
fn every_value_is_documented() {
    let values = read(&chart().join("values.yaml"));
    let rows = documented_values(&values);
    let mut found = Vec::new();
    leaves(&parse(&values), "", &mut found);
    let below = |leaf: &str, row: &str| leaf == row || leaf.strip_prefix(row).is_some_and(|rest| rest.starts_with('.'));
    for leaf in &found {
        assert!(rows.iter().any(|row| below(leaf, &row.path)), "{leaf} has no `# -- ` comment in values.yaml");
    }
    for row in &rows {
        assert!(found.iter().any(|leaf| below(leaf, &row.path)), "the comment of {} was read wrongly", row.path);
    }
}

/// An object of the schema is closed, a map of one type, or listed here with a reason.
#[test]
fn the_values_schema_is_closed() {
    fn walk(schema: &Value, path: &str, open: &mut Vec<String>) {
        let object = schema["type"] == "object" || schema["properties"].is_object();
        let closed = schema["additionalProperties"] == false || schema["additionalProperties"].is_object();
        if object && !closed {
            open.push(path.to_owned());
        }
        for group in ["properties", "definitions"] {
            for (name, below) in schema[group].as_object().into_iter().flatten() {
                walk(below, &format!("{path}.{name}"), open);
            }
        }
        for (name, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
            if schema[name].is_object() {
                walk(&schema[name], &format!("{path}{mark}"), open);
            }
        }
    }
    let mut open = Vec::new();
    walk(&parse(&read(&chart().join("values.schema.json"))), "", &mut open);
    // Kubernetes has their fields, and more with each version; Helm gives `global` to every chart.
    let kubernetes = [
        ".global",
        ".podSecurityContext",
        ".securityContext",
        ".affinity.nodeAffinity",
        ".affinity.podAffinity",
        ".affinity.podAntiAffinity",
        ".topologySpreadConstraints[]",
        ".extraEnv[].valueFrom",
    ];
    assert_eq!(open, kubernetes);
}

#[test]
fn wrong_values_are_refused_with_their_place() {
    let digest = format!("image.digest=sha256:{}", "0".repeat(64));
    template(&["--set", &digest]).expect("a whole digest is taken");
    for (set, expected) in [
        ("replicaCoutn=2", "'replicaCoutn' not allowed"),
        ("image.tagg=x", "at '/image': additional properties 'tagg' not allowed"),
        ("image.digest=sha256:1", "at '/image/digest'"),
        ("log.level=loud", "at '/log/level'"),
        ("metrics.port=80", "at '/metrics/port'"),
        ("watchNamespaces={Team}", "at '/watchNamespaces/0'"),
        ("profiles.default.imgae=x", "at '/profiles/default': additional properties 'imgae' not allowed"),
        (
            "profiles.default.resources.limits.cpu=4",
            "at '/profiles/default/resources/limits/cpu': got number, want string",
        ),
        ("profiles.default.storage.size=many", "at '/profiles/default/storage/size'"),
        ("profiles.default.allowed.images={x}", "at '/profiles/default/allowed'"),
        ("profiles.default.pricePerHour=-1", "at '/profiles/default/pricePerHour'"),
        ("profiles.Not_A_Name.image=x", "Not_A_Name"),
        ("replicaCount=2,leaderElection.enabled=false", "set leaderElection.enabled"),
        ("leaderElection.renewDeadlineSeconds=15", "must be less than leaderElection.leaseDurationSeconds"),
        ("serviceAccount.create=false", "name the account to use in serviceAccount.name"),
        ("metrics.serviceMonitor.enabled=true,metrics.service.enabled=false", "needs metrics.service.enabled"),
        ("admissionPolicy.enabled=true,admissionPolicy.maxAcceleratorsPerJob=null", "without a rule"),
    ] {
        let said = template(&["--set", set]).expect_err(set);
        assert!(said.contains(expected), "{set}: expected {expected:?} in {said}");
    }
    let said = template(&["--kube-version", "1.32.0"]).expect_err("too old a cluster");
    assert!(said.contains("requires kubeVersion: >=1.33.0-0"), "{said}");
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
    ];
    assert_eq!(default.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    let expected: [(&str, &[&str], &[&str]); 10] = [
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
            &["ValidatingAdmissionPolicy finetune-operator", "ValidatingAdmissionPolicyBinding finetune-operator"],
            &[],
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
        ("finetune.dev/finetunejobs", &["get", "list", "watch", "delete"]),
        ("finetune.dev/finetunejobs/status", &["patch"]),
        ("finetune.dev/finetunejobs/finalizers", &["update"]),
        ("batch/jobs", &["get", "list", "watch", "create", "patch", "delete"]),
        ("/pods", &["get", "list", "watch"]),
        ("/configmaps", &["get", "create", "patch"]),
        ("/persistentvolumeclaims", &["get", "create"]),
        ("/services", &["get", "create"]),
        ("events.k8s.io/events", &["create", "patch"]),
        ("kueue.x-k8s.io/workloads", &["get", "list", "watch", "patch"]),
    ]);
    let own = expected(&[("coordination.k8s.io/leases", &["get", "create", "update"])]);

    let everywhere = render(&[]);
    assert_eq!(rights(the(&everywhere, "ClusterRole", "finetune-operator")), served);
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
    let values = parse(&read(&chart().join("values.yaml")));
    let (profiles, checksum) = of(&[]);
    let mut expected = values["profiles"].clone();
    expected["default"]["image"] = json!(format!("registry.example/finetune-trainer:{version}"));
    assert_eq!(profiles, expected);

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

#[test]
fn notes_and_readme_show_jobs_that_the_operator_takes() {
    let notes = run(built("helm").args(["install", "finetune-operator"]).arg(chart()).args([
        "--namespace",
        NAMESPACE,
        "--dry-run=client",
    ]))
    .expect("installed for show");
    let (_, notes) = notes.split_once("\nNOTES:\n").expect("notes");
    let readme = read(&chart().join("README.md"));
    for page in [notes, &readme] {
        let job = page.split_once("<<EOF\n").and_then(|(_, rest)| rest.split_once("EOF\n")).expect("an example").0;
        crds::check::check(job, crds::check::Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}\n{job}"));
    }
    let annotations = parse(&read(&chart().join("Chart.yaml")))["annotations"].clone();
    let examples = parse(text(&annotations["artifacthub.io/crdsExamples"]));
    crds::check::check(&examples[0].to_string(), crds::check::Scope::Cluster)
        .unwrap_or_else(|problems| panic!("{problems:?}"));
    for line in notes.lines().filter(|line| line.contains("rollout status")) {
        assert!(line.contains(&format!("-n {NAMESPACE} rollout status deployment/finetune-operator")), "{line}");
    }
}

/// Values that readers of the chart's page are told to set exist.
#[test]
fn values_named_in_texts_exist() {
    let mut values = Vec::new();
    leaves(&parse(&read(&chart().join("values.yaml"))), "", &mut values);
    let roots: BTreeMap<&str, ()> =
        values.iter().map(|path| (path.split('.').next().unwrap_or_default(), ())).collect();
    let mut pages: Vec<PathBuf> = alerts::runbooks();
    pages.extend([chart().join("README.md"), chart().join("templates/NOTES.txt")]);
    let mut checked = 0;
    for page in pages {
        let content = read(&page);
        for word in content.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.')) {
            let named = word.trim_end_matches('.');
            let Some((root, rest)) = named.split_once('.') else { continue };
            // `.status.…` and file names are no values.
            if rest.is_empty()
                || !roots.contains_key(root)
                || ["yaml", "yml", "json", "md"].iter().any(|end| rest.ends_with(end))
            {
                continue;
            }
            let below = |path: &String| path == named || path.starts_with(&format!("{named}."));
            assert!(
                root == "resources" || values.iter().any(below),
                "{} names the value {named}, which does not exist",
                page.display()
            );
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} values were found");
}
