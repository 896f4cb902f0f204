//! Rights granted are rights used: what the API server wrote down about the operator, beside the roles that the chart made.

use std::collections::BTreeSet;

use harness::cluster::wait_for;
use harness::operator::{FEW_MINUTES, Operator, SYSTEM};
use serde_json::Value;

/// The operator, as the API server calls it.
const ACCOUNT: &str = "system:serviceaccount:finetune-system:finetune-finetune-operator";

/// Rights that are granted and not used here, and why.
const UNUSED: [(&str, &str); 1] = [(
    "update finetune.dev/finetunejobs/finalizers",
    "is asked for by OwnerReferencesPermissionEnforcement, an admission plugin that this API server runs without",
)];

/// A right that is used while another test has installed the kind that it is for: `tests/it/operator/queue.rs`.
const SOMETIMES: &str = "watch kueue.x-k8s.io/workloads";

/// Namespaces of the cluster's own parts, whose pods or programs may ask the API server.
const SYSTEMS: [&str; 3] = ["kube-system", "local-path-storage", SYSTEM];

#[test]
fn the_operator_uses_every_right_that_it_has_and_asks_for_no_other() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("rights");
    // finetunejobs delete; on the way there all that makes children, looks for those of earlier passes, and tells of them.
    space.job("forgotten", "ttlSecondsAfterFinished: 0");
    // jobs delete
    space.job("held", "hyperparameters: {maxSteps: 100000, batchSize: 8, precision: FP32}");
    // workloads list, of a kind that is not there; jobs get, once the Job is gone that the status names.
    space.job("queued", "scheduling: {queueName: team}");
    space.until("queued", "to wait in a queue", |status| status["phase"] == "Queued");
    let train = space.jobs("queued").pop().expect("a Job that waits");
    space.namespace.kubectl(&["delete", "job", &train]);
    space.trains("held");
    // events patch: an event that repeats.
    let newest = || space.status("held")["checkpoints"].as_array().and_then(|all| all.last()?["step"].as_i64());
    let mut first = None;
    wait_for("a checkpoint to be told, and a later one", FEW_MINUTES, || {
        let now = newest();
        first = first.or(now);
        if now > first { Ok(()) } else { Err(format!("{first:?}, then {now:?}")) }
    });
    space.patch("held", "{\"suspend\": true}");
    space.until("held", "to be held", |status| status["phase"] == "Suspended");
    space.forgotten("forgotten");

    let mut granted = granted(operator);
    for (right, _) in UNUSED {
        assert!(granted.remove(right), "{right} is not granted any more");
    }
    assert!(granted.remove(SOMETIMES), "{SOMETIMES} is not granted any more");
    let mut used = wait_for("every right to be used", FEW_MINUTES, || {
        let used = used(operator);
        let unused: Vec<&String> = granted.difference(&used).collect();
        if unused.is_empty() { Ok(used) } else { Err(format!("never used: {unused:?}")) }
    });
    used.remove(SOMETIMES);
    assert_eq!(used, granted);

    for event in audit(operator, "system:serviceaccount:") {
        let user = event["user"]["username"].as_str().unwrap_or_default();
        // Another test uninstalls the chart: its roles go before its pod does.
        let is_granted = |right: &str| right == SOMETIMES || granted.contains(right);
        assert!(user != ACCOUNT || is_granted(&right(&event)), "{event:#}");
        // A trainer holds a team's data, and nothing that opens the cluster.
        let namespace = user.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split(':').next());
        assert!(
            namespace.is_none_or(|namespace| SYSTEMS.contains(&namespace)),
            "a pod asked the API server: {event:#}"
        );
    }
}

/// `verb group/resource`, of each rule of the operator's roles.
fn granted(operator: &Operator) -> BTreeSet<String> {
    let roles = [
        vec!["clusterrole", "finetune-finetune-operator"],
        vec!["role", "finetune-finetune-operator-leader", "--namespace", SYSTEM],
    ];
    let mut rights = BTreeSet::new();
    for role in roles {
        let role = operator.cluster.get(&role).unwrap_or_else(|error| panic!("{error}"));
        for rule in role["rules"].as_array().expect("rules") {
            let words = |field: &str| {
                let words = rule[field].as_array().unwrap_or_else(|| panic!("no {field}: {rule}")).iter();
                words.map(|word| word.as_str().expect("a word").to_owned()).collect::<Vec<_>>()
            };
            for group in words("apiGroups") {
                for resource in words("resources") {
                    rights.extend(words("verbs").iter().map(|verb| format!("{verb} {group}/{resource}")));
                }
            }
        }
    }
    rights
}

/// The same, of each request of the operator that was allowed.
fn used(operator: &Operator) -> BTreeSet<String> {
    let asked = audit(operator, ACCOUNT);
    let own = asked.iter().filter(|event| event["user"]["username"] == ACCOUNT);
    own.filter(|event| event["annotations"]["authorization.k8s.io/decision"] == "allow").map(right).collect()
}

/// What a request needs.
fn right(event: &Value) -> String {
    let object = &event["objectRef"];
    let word = |field: &str| object[field].as_str().unwrap_or_default();
    let part = object["subresource"].as_str().map(|part| format!("/{part}")).unwrap_or_default();
    format!("{} {}/{}{part}", event["verb"].as_str().unwrap_or_default(), word("apiGroup"), word("resource"))
}

/// What the API server wrote down so far, of requests whose line has a word.
fn audit(operator: &Operator, word: &str) -> Vec<Value> {
    let text =
        std::fs::read_to_string(operator.cluster.run_dir().join("audit.log")).expect("the API server's audit.log");
    // What follows the last end of a line is being written.
    let (complete, _) = text.rsplit_once('\n').expect("the cluster's own parts have asked for something");
    let lines = complete.lines().filter(|line| line.contains(word));
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}
