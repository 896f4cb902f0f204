//! Jobs on the real cluster: the operator as the chart installs it, trainers in real pods.

mod clusters;
mod disruption;
mod install;
mod lifecycle;
mod queue;

use harness::Job;
use harness::operator::{GPU, Operator, condition};
use trainer::store::files::digest_file;

/// Hyperparameters of a job that trains long enough to be disturbed.
const LONG: &str = "hyperparameters: {maxSteps: 3000, batchSize: 8, learningRate: \"1e-2\", precision: FP32}\ncheckpoint: {everySteps: 50}\n";
/// The same, with the run on the claim `run`.
const LONG_ON_CLAIM: &str = "hyperparameters: {maxSteps: 3000, batchSize: 8, learningRate: \"1e-2\", precision: FP32}\n\
    checkpoint: {everySteps: 50, storage: {claim: run, path: bot}}\n";
/// Hyperparameters of a job that is soon done.
const SHORT: &str = "hyperparameters: {maxSteps: 5, batchSize: 8, precision: FP32}\n";

/// The adapter that a local run of [`LONG`] ends with.
fn long_adapter() -> &'static str {
    static DIGEST: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    DIGEST.get_or_init(|| local_adapter("maxSteps: 60", "maxSteps: 3000"))
}

/// The adapter that a local run of the tiny job ends with, after an edit of its YAML.
fn local_adapter(from: &str, to: &str) -> String {
    let job = Job::new();
    job.edit(from, to);
    let outcome = job.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    job.adapter_digest()
}

/// The artifact's digest, as the status tells it.
fn artifact(status: &serde_json::Value) -> String {
    status["artifact"]["digest"].as_str().unwrap_or_else(|| panic!("no artifact: {status:#}")).to_owned()
}

#[test]
fn a_job_succeeds_and_its_adapter_is_that_of_a_local_run() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("lora");
    space.job("bot", "output: {uri: pvc://inputs/published}");
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), local_adapter("maxSteps: 60", "maxSteps: 60"));
    assert_eq!(status["artifact"]["uri"], "pvc://inputs/published");
    let published = space.inputs.path("published/adapter_model.safetensors");
    assert_eq!(digest_file(&published).expect("published"), artifact(&status));
    assert_eq!(condition(&status, "Published")["status"], "True");
    assert_eq!(condition(&status, "Complete")["status"], "True");
    assert_eq!(status["attempts"]["total"], 1);
    assert_eq!(space.jobs("bot"), ["bot-prepare-1", "bot-publish-1", "bot-train-1"]);
    assert_eq!(status["observedGeneration"], 1);
    assert!(status.to_string().len() < 8192, "{} bytes", status.to_string().len());
}

#[test]
fn a_killed_trainer_and_a_deleted_pod_end_with_the_same_adapter() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("kill");
    let pods = space.watch("bot");
    space.job("bot", LONG);
    let pod = space.trains("bot");
    space.namespace.kill_container(&pod);
    let status = space.until("bot", "the next attempt", |status| status["attempts"]["total"] == 2);
    assert_eq!(status["attempts"]["failed"], 1, "{status:#}");
    let pod = space.trains_again("bot", 2);
    space.namespace.kubectl(&["delete", "pod", &pod, "--wait=false"]);
    let status = space.until("bot", "the third attempt", |status| status["attempts"]["total"] == 3);
    assert_eq!(status["attempts"]["preempted"], 1, "{status:#}");
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), long_adapter());
    assert_eq!(pods.one_after_another().len(), 5);
}

#[test]
fn bad_data_ends_a_job_before_a_training_pod_was_made() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("bad-data");
    space.inputs.write("train.jsonl", "{\"messages\": []}\nnot JSON\n");
    space.job("bot", "profile: gpu");
    let status = space.ended("bot");
    let failed = condition(&status, "Failed");
    assert_eq!((failed["status"].as_str(), failed["reason"].as_str()), (Some("True"), Some("BadData")), "{status:#}");
    assert!(failed["message"].as_str().is_some_and(|text| text.contains("train.jsonl:")), "{failed}");
    assert_eq!(space.jobs("bot"), ["bot-prepare-1"]);
}

#[test]
fn a_failed_gate_fails_the_job_or_completes_it_without_a_pass() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("gate");
    let gates = "baselines: {zeroShot: false, fewShot: {examples: 0}}, gates: [{metric: evalLoss, operator: AtMost, value: \"0.001\"}]";
    space.job("fails", &format!("validation: {{everySteps: 20, {gates}}}"));
    space.job("completes", &format!("validation: {{everySteps: 20, {gates}, onFailure: Complete}}"));
    let status = space.ended("fails");
    assert_eq!(condition(&status, "Failed")["reason"], "ValidationFailed", "{status:#}");
    assert_eq!(status["validation"]["gates"][0]["passed"], false);
    let status = space.succeeded("completes");
    assert_eq!(condition(&status, "ValidationPassed")["status"], "False", "{status:#}");
    assert_eq!(condition(&status, "Complete")["status"], "True");
}

#[test]
fn eight_jobs_share_two_gpus() {
    let Some(operator) = Operator::shared() else { return };
    operator.cluster.set_capacity("node1", GPU, 2);
    let space = operator.workspace("gpus");
    let names: Vec<String> = (0..8).map(|number| format!("bot-{number}")).collect();
    for name in &names {
        space.job(name, "profile: gpu\nhyperparameters: {maxSteps: 300, batchSize: 8, precision: FP32}");
    }
    let mut most = 0;
    // Two at a time: four turns of one job each.
    harness::cluster::wait_for("all of them to succeed", 4 * harness::operator::FEW_MINUTES, || {
        let selector =
            ["pods", "--selector=app.kubernetes.io/component=train", "--field-selector=status.phase=Running"];
        most = most.max(space.namespace.get(&selector)?["items"].as_array().map_or(0, Vec::len));
        let phases: Vec<_> = names.iter().map(|name| space.status(name)["phase"].clone()).collect();
        if phases.iter().all(|phase| phase == "Succeeded") { Ok(()) } else { Err(format!("{phases:?}")) }
    });
    assert_eq!(most, 2, "training pods at once on two GPUs");
    for name in &names {
        assert_eq!(space.status(name)["attempts"]["total"], 1);
    }
}

#[test]
fn what_no_node_has_is_told_and_recovers() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("mig");
    space.job("bot", "profile: mig\nhyperparameters: {maxSteps: 5, batchSize: 8, precision: FP32}");
    let status = space.until_reason("bot", "Unschedulable");
    let message = condition(&status, "Running")["message"].as_str().unwrap_or_default();
    assert!(message.contains("Insufficient nvidia.com/mig-1g.10gb"), "{message}");
    operator.cluster.set_capacity("node1", "nvidia.com/mig-1g.10gb", 1);
    space.succeeded("bot");
}

#[test]
fn an_image_that_cannot_be_pulled_and_a_claim_that_is_missing_are_told_in_the_words_of_the_kubelet_and_the_scheduler() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("missing");
    space.job("image", "profile: late");
    space.job("claim", "checkpoint: {storage: {claim: nowhere}}");
    let stuck = |name: &str, reason: &str| {
        let status = space.until_reason(name, reason);
        condition(&status, "Running")["message"].as_str().unwrap_or_default().to_owned()
    };
    let message = stuck("image", "ImagePullFailed");
    assert!(message.contains("10.99.0.1:5000/late-trainer:1"), "{message}");
    operator.cluster.push_product("trainer", "late-trainer:1");
    let message = stuck("claim", "Unschedulable");
    assert!(message.contains("persistentvolumeclaim \"nowhere\" not found"), "{message}");
    space.namespace.apply(
        "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: nowhere}\nspec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}\n",
    );
    space.succeeded("claim");
    space.succeeded("image");
}

#[test]
fn what_a_profile_does_not_allow_makes_no_child() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("profile");
    for (name, rest, reason, field) in [
        ("unknown", "profile: h100", "ProfileNotFound", "spec.profile"),
        ("more", "resources: {limits: {memory: 5Gi}}", "ResourceLimitExceeded", "spec.resources.limits.memory"),
        (
            "taint",
            "scheduling: {tolerations: [{key: control-plane, operator: Exists}]}",
            "SchedulingNotAllowed",
            "spec.scheduling.tolerations[0].key",
        ),
        ("away", "output: {uri: \"s3://elsewhere/x\"}", "SourceNotAllowed", "spec.output.uri"),
    ] {
        space.job(name, rest);
        let status = space.until(name, "a verdict", |status| status["conditions"].is_array());
        let accepted = condition(&status, "Accepted");
        assert_eq!(
            (accepted["status"].as_str(), accepted["reason"].as_str()),
            (Some("False"), Some(reason)),
            "{name}: {status:#}"
        );
        assert!(accepted["message"].as_str().is_some_and(|text| text.contains(field)), "{accepted}");
        assert_eq!(space.jobs(name), Vec::<String>::new());
    }
    // Somebody else's object has a name that a child would get.
    space.namespace.apply(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: taken-prepare-1}\nspec:\n  suspend: true\n  \
         template: {spec: {restartPolicy: Never, containers: [{name: idle, image: idle}]}}\n",
    );
    space.job("taken", "");
    let status = space.until_reason("taken", "ChildNameTaken");
    assert_eq!(condition(&status, "Accepted")["status"], "False");
    space.namespace.kubectl(&["delete", "job", "taken-prepare-1"]);
    space.succeeded("taken");
}

#[test]
fn a_held_job_goes_on_where_it_was() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("suspend");
    space.job("bot", "hyperparameters: {maxSteps: 400, batchSize: 8, learningRate: \"1e-2\", precision: FP32}");
    space.trains("bot");
    space.patch("bot", "{\"suspend\": true}");
    let status = space.until("bot", "to be held", |status| {
        status["phase"] == "Suspended"
            && status["jobRefs"].as_array().is_some_and(|all| all.iter().all(|one| !one["outcome"].is_null()))
    });
    assert_eq!(space.live_pods("bot"), Vec::<String>::new(), "{status:#}");
    space.patch("bot", "{\"suspend\": false}");
    let status = space.succeeded("bot");
    assert!(status["attempts"]["resumedFromStep"].as_i64().is_some_and(|step| step > 0), "{status:#}");
    assert_eq!((status["attempts"]["failed"].as_i64(), status["attempts"]["preempted"].as_i64()), (Some(0), Some(0)));
}

#[test]
fn a_job_that_is_asked_to_stop_evaluates_and_publishes() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("stop");
    space.job("bot", "hyperparameters: {maxSteps: 100000, batchSize: 8, learningRate: \"1e-3\", precision: FP32}");
    space.trains("bot");
    space.patch("bot", "{\"stopRequested\": true}");
    let status = space.succeeded("bot");
    assert!(status["progress"]["step"].as_i64().is_some_and(|step| step < 100_000), "{status:#}");
    assert!(status["artifact"]["digest"].is_string() && status["validation"]["best"].is_object(), "{status:#}");
}

#[test]
fn deadlines_end_jobs_and_the_ttl_forgets_them() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("deadline");
    space.job("start", "profile: unpullable\nstartDeadlineSeconds: 5");
    space.job("active", "activeDeadlineSeconds: 5\nttlSecondsAfterFinished: 20\nhyperparameters: {maxSteps: 100000, batchSize: 8, precision: FP32}");
    let status = space.ended("start");
    assert_eq!(condition(&status, "Failed")["reason"], "StartDeadlineExceeded", "{status:#}");
    let status = space.ended("active");
    assert_eq!(condition(&status, "Failed")["reason"], "DeadlineExceeded", "{status:#}");
    for name in ["start", "active"] {
        harness::cluster::wait_for(format!("no pod of {name}"), harness::operator::FEW_MINUTES, || {
            let live = space.live_pods(name);
            if live.is_empty() { Ok(()) } else { Err(format!("{live:?}")) }
        });
    }
    space.forgotten("active");
}

#[test]
fn a_finished_job_stays_finished() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("finished");
    space.job("bot", "hyperparameters: {maxSteps: 5, batchSize: 8, precision: FP32}");
    let status = space.succeeded("bot");
    space.namespace.kubectl(&["delete", "jobs", "--all"]);
    space.namespace.kubectl(&["label", "finetunejob", "bot", "touched=yes"]);
    // Another job passes through: whatever the operator wanted to do for the first one, it has done by then.
    space.job("next", "hyperparameters: {maxSteps: 5, batchSize: 8, precision: FP32}");
    space.succeeded("next");
    assert_eq!((space.jobs("bot"), space.status("bot")), (Vec::new(), status));
}

/// One YAML for every rule and bound of the CRD: the API server refuses what `check` refuses.
#[test]
fn the_api_server_and_the_local_check_refuse_the_same() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("refused");
    let folder = harness::repository().join("tests/invalid");
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).expect("tests/invalid").flatten() {
        let text = std::fs::read_to_string(entry.path()).expect("readable");
        let line = |mark: &str| {
            text.lines().find_map(|line| line.strip_prefix(mark)).unwrap_or_else(|| panic!("{mark} in {text}"))
        };
        let name = entry.file_name();
        let local = crds::check::check(&text, crds::check::Scope::Cluster).expect_err(&text);
        let expected = line("# check: ");
        assert!(local.iter().any(|problem| problem.to_string().contains(expected)), "{name:?}: {local:?}");
        let refused = operator.cluster.try_apply(space.namespace.name(), &text).expect_err(&text);
        assert!(refused.contains(line("# server: ")), "{name:?}: {refused}");
        seen += 1;
    }
    assert!(seen >= 30, "{seen} files");
}
