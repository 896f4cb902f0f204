//! Pods, nodes and operators that go away while a job runs: it ends as if they had not.

use harness::cluster::{MINUTE, Node, TEST_NODE, wait_for};
use harness::operator::{FEW_MINUTES, Operator, PLACE, SYSTEM, Workspace, attempts, condition};

use super::{LONG, LONG_ON_CLAIM, artifact, long_adapter};

/// A job whose training goes to the nodes that the test labels: first the further one.
fn train_on<'a>(operator: &'a Operator, space: &Workspace) -> Node<'a> {
    let node = operator.cluster.node();
    let place = format!("{PLACE}={}", space.namespace.name());
    operator.cluster.kubectl(&["label", "node", &node.name(), &place]);
    space.run_claim();
    let scheduling = format!(
        "scheduling: {{nodeSelector: {{{PLACE}: {}}}, tolerations: [{{key: {TEST_NODE}, operator: Exists}}, \
         {{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 1}}]}}",
        space.namespace.name()
    );
    space.job("bot", &format!("{LONG_ON_CLAIM}{scheduling}"));
    let pod = space.trains("bot");
    let found = space.namespace.get(&["pod", &pod]).expect("it runs");
    assert_eq!(found["spec"]["nodeName"], node.name().as_str());
    node
}

/// Lets the job's training go to the first node too. The label is replaced by that of the next test that needs it.
fn allow_first_node(operator: &Operator, space: &Workspace) {
    let place = format!("{PLACE}={}", space.namespace.name());
    operator.cluster.kubectl(&["label", "node", "node1", "--overwrite", &place]);
}

/// The first node has the label of one test at a time.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_drained_node_is_a_preemption_and_the_job_ends_elsewhere_with_the_same_adapter() {
    let Some(operator) = Operator::shared() else { return };
    let _alone = alone();
    let space = operator.workspace("drain");
    let pods = space.watch("bot");
    let node = train_on(operator, &space);
    operator.cluster.kubectl(&["drain", &node.name(), "--delete-emptydir-data", "--timeout=2m"]);
    let status = space.until("bot", "the next attempt", |status| status["attempts"]["total"] == 2);
    assert_eq!((&status["attempts"]["preempted"], &status["attempts"]["failed"]), (&1.into(), &0.into()), "{status:#}");
    assert!(status["lastFailure"].is_null(), "{status:#}");
    allow_first_node(operator, &space);
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), long_adapter());
    assert!(status["attempts"]["resumedFromStep"].as_i64().is_some_and(|step| step > 0), "{status:#}");
    let pods = pods.one_after_another();
    assert_eq!(pods.len(), 4, "prepare, train twice, publish: {pods:?}");
}

#[test]
fn a_node_without_power_is_waited_for_until_it_is_gone_for_certain() {
    let Some(operator) = Operator::shared() else { return };
    let _alone = alone();
    let space = operator.workspace("power");
    let pods = space.watch("bot");
    let node = train_on(operator, &space);
    node.power_off();
    allow_first_node(operator, &space);
    let status = space.until_reason("bot", "Preempted");
    let message = condition(&status, "Running")["message"].as_str().unwrap_or_default();
    assert!(message.contains("when it is gone for certain"), "{status:#}");
    assert_eq!(status["attempts"]["total"], 1, "the lost pod may still write: {status:#}");
    assert_eq!(space.live_pods("bot").len(), 1);
    let taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";
    operator.cluster.kubectl(&["taint", "node", &node.name(), taint]);
    let status = space.succeeded("bot");
    assert_eq!(attempts(&status), (Some(2), Some(1), Some(0)), "{status:#}");
    assert_eq!(artifact(&status), long_adapter());
    assert_eq!(pods.one_after_another().len(), 4);
}

/// Takes the operator away while `name` is in each of its stages, one after another.
fn lose_the_operator(operator: &Operator, space: &Workspace, name: &str, lose: impl Fn(&str)) {
    let pods = space.watch(name);
    space.job(name, LONG);
    for stage in ["prepare", "train", "publish"] {
        space.reaches(name, stage);
        if stage == "train" {
            space.trains(name);
        }
        let [pod] = &operator.pods()[..] else { panic!("{:?}", operator.pods()) };
        lose(pod);
        wait_for("an operator that is ready", FEW_MINUTES, || {
            let pods = operator.pods();
            let [pod] = &pods[..] else { return Err(format!("{pods:?}")) };
            let found = operator.cluster.get(&["pod", "--namespace", SYSTEM, pod])?;
            let container = &found["status"]["containerStatuses"][0];
            if container["ready"] == true { Ok(()) } else { Err(container.to_string()) }
        });
    }
    let status = space.succeeded(name);
    assert_eq!(artifact(&status), long_adapter());
    assert_eq!(attempts(&status), (Some(1), Some(0), Some(0)), "{status:#}");
    assert_eq!(pods.one_after_another().len(), 3);
    let mut made = operator.cluster.created(space.namespace.name(), "jobs");
    made.sort();
    let expected = ["prepare", "publish", "train"].map(|stage| format!("{name}-{stage}-1"));
    assert_eq!(made, expected, "each Job is made once");
}

#[test]
fn an_operator_whose_pod_is_deleted_in_every_stage_is_not_missed() {
    let Some(operator) = Operator::shared() else { return };
    let disturbed = operator.disturb();
    let space = disturbed.workspace("operator-deleted");
    lose_the_operator(operator, &space, "bot", |pod| {
        let gone = ["delete", "pod", pod, "--namespace", SYSTEM, "--force", "--grace-period=0"];
        operator.cluster.kubectl(&gone);
    });
}

#[test]
fn an_operator_that_is_killed_in_every_stage_is_not_missed() {
    let Some(operator) = Operator::shared() else { return };
    let disturbed = operator.disturb();
    let space = disturbed.workspace("operator-killed");
    lose_the_operator(operator, &space, "bot", |pod| {
        let restarts = || {
            let found = operator.cluster.get(&["pod", "--namespace", SYSTEM, pod]).expect("it stays");
            found["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or(0)
        };
        let before = restarts();
        operator.cluster.kill_container(SYSTEM, pod);
        wait_for("the container's restart", MINUTE * 2, || {
            if restarts() > before { Ok(()) } else { Err("not yet".to_owned()) }
        });
    });
}
