//! Jobs from their first object to their last, and what others do to the objects in between.

use harness::Job;
use harness::cluster::wait_for;
use harness::operator::{FEW_MINUTES, Operator};
use trainer::store::files::digest_file;

use super::{LONG, LONG_ON_CLAIM, SHORT, artifact, long_adapter};

#[test]
fn a_full_job_leaves_a_whole_model_on_the_volume() {
    let Some(operator) = Operator::shared() else { return };
    let local = Job::new();
    local.edit("type: LoRA, lora: {rank: 4}", "type: Full");
    local.edit("maxSteps: 60", "maxSteps: 12");
    assert_eq!(local.run().code, Some(0));
    let space = operator.workspace("full");
    let folder = space.run_claim().join("bot");
    space.job(
        "bot",
        "method: {type: Full}\ncheckpoint: {everySteps: 4, storage: {claim: run, path: bot}}\n\
         hyperparameters: {maxSteps: 12, batchSize: 8, learningRate: \"1e-2\", precision: FP32}",
    );
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), local.report().artifact.expect("an output").digest);
    let output = folder.join("output");
    assert_eq!(digest_file(&output.join("model.safetensors")).expect("published"), artifact(&status));
    assert!(output.join("config.json").exists() && output.join("tokenizer.json").exists());
    assert_eq!(status["artifact"]["uri"], "pvc://run/bot/output");
}

#[test]
fn a_job_that_is_deleted_in_whatever_phase_leaves_only_its_claim() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("deleted");
    let delete = |name: &str| {
        space.namespace.kubectl(&["delete", "finetunejob", name]);
        let selector = format!("--selector=finetune.dev/job-name={name}");
        wait_for(format!("what {name} left to go"), FEW_MINUTES, || {
            let left = space.namespace.kubectl(&["get", "jobs,pods,configmaps", &selector, "--output=name"]);
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
    };
    space.job("prepare", LONG);
    space.reaches("prepare", "prepare");
    delete("prepare");
    space.job("train", LONG);
    space.trains("train");
    delete("train");
    space.job("publish", SHORT);
    space.reaches("publish", "publish");
    delete("publish");
    space.job("done", SHORT);
    space.succeeded("done");
    delete("done");
    space.job("held", LONG);
    space.trains("held");
    space.patch("held", "{\"suspend\": true}");
    space.until("held", "to be held", |status| status["phase"] == "Suspended");
    delete("held");
    space.job("forgotten", &LONG.replace("everySteps: 50", "everySteps: 50, storage: {whenDeleted: Delete}"));
    space.trains("forgotten");
    delete("forgotten");
    wait_for("the claim of forgotten to go", FEW_MINUTES, || {
        let selector = "--selector=finetune.dev/job-name";
        let found = space.namespace.get(&["persistentvolumeclaims", selector])?;
        let claims = found["items"].as_array().cloned().unwrap_or_default();
        let mut of: Vec<String> = claims
            .iter()
            .map(|claim| claim["metadata"]["labels"]["finetune.dev/job-name"].as_str().unwrap_or_default().to_owned())
            .collect();
        of.sort();
        if of == ["done", "held", "prepare", "publish", "train"] { Ok(()) } else { Err(format!("{of:?}")) }
    });
}

/// The status that the API server gives a job which no operator has looked at.
fn unseen() -> serde_json::Value {
    serde_json::json!({"observedGeneration": -1})
}

#[test]
fn a_job_of_another_controller_is_left_alone() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("others");
    space.job("theirs", &format!("managedBy: kueue.x-k8s.io/multikueue\n{SHORT}"));
    space.job("ours", &format!("managedBy: finetune-operator\n{SHORT}"));
    space.succeeded("ours");
    assert_eq!(space.status("theirs"), unseen());
    assert_eq!(space.jobs("theirs"), Vec::<String>::new());
}

#[test]
fn the_configuration_of_a_run_cannot_be_edited_and_is_made_again() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("config");
    space.job("bot", LONG);
    space.trains("bot");
    let patch = "{\"data\": {\"plan.yaml\": \"\"}}";
    let map = space.config_map("bot");
    let edit = ["patch", "configmap", &map, "--namespace", space.namespace.name(), "--type=merge", "--patch", patch];
    let refused = operator.cluster.try_kubectl(&edit).expect_err("immutable");
    assert!(refused.contains("immutable"), "{refused}");
    space.namespace.kubectl(&["delete", "configmap", &map]);
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), long_adapter());
    assert!(space.namespace.get(&["configmap", &map]).is_ok(), "publishing needed it");
}

#[test]
fn a_forged_configuration_holds_its_job_and_no_other() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("forged");
    space.job("bot", LONG);
    space.trains("bot");
    let map = space.config_map("bot");
    let made = space.namespace.get(&["configmap", &map]).expect("it was made");
    let forged = serde_json::json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": map,
            "labels": made["metadata"]["labels"],
            "ownerReferences": made["metadata"]["ownerReferences"],
        },
        "data": {"run.yaml": "model: [", "plan.yaml": "pods: ["},
    });
    // The operator may be faster, and make its own again.
    wait_for("the forgery to be in place", FEW_MINUTES, || {
        space.namespace.kubectl(&["delete", "configmap", &map, "--ignore-not-found"]);
        operator.cluster.try_apply(space.namespace.name(), &forged.to_string())
    });
    // An owner reference proves nothing: no pod is made to read it.
    space.until_reason("bot", "ChildNameTaken");
    space.job("next", SHORT);
    space.succeeded("next");
    space.namespace.kubectl(&["delete", "configmap", &map]);
    space.succeeded("bot");
}

#[test]
fn an_object_of_another_version_stalls_no_other() {
    let Some(operator) = Operator::shared() else { return };
    let disturbed = operator.disturb();
    let space = disturbed.workspace("unheard");
    let crd = ["crd", "finetunejobs.finetune.dev"];
    let kinds = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/method/properties/type/enum";
    let change = |change: &str| {
        let patch = format!("[{{\"path\": \"{kinds}/0\", {change}}}]");
        operator.cluster.kubectl(&[&["patch"], &crd[..], &["--type=json", "--patch", &patch]].concat());
    };
    change("\"op\": \"add\", \"value\": \"Unheard\"");
    let refused = wait_for("the CRD to take a method that the operator does not know", FEW_MINUTES, || {
        let job = harness::operator::Workspace::yaml("bot", "method: {type: Unheard}");
        operator.cluster.try_apply(space.namespace.name(), &job)
    });
    assert!(refused.contains("bot"), "{refused}");
    space.job("next", SHORT);
    space.succeeded("next");
    assert_eq!(space.status("bot"), unseen(), "it is left alone");
    space.namespace.kubectl(&["delete", "finetunejob", "bot"]);
    change("\"op\": \"remove\"");
}

#[test]
fn a_report_that_is_torn_is_not_believed() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("torn");
    let reports = space.run_claim().join("bot/reports");
    space.job("bot", LONG_ON_CLAIM);
    let pod = space.trains("bot");
    let job = space.get("bot").expect("there");
    let uid = job["metadata"]["uid"].as_str().expect("a UID");
    let torn =
        format!("{{\"jobUid\": \"{uid}\", \"podStage\": \"train\", \"attempt\": 1, \"stage\": \"Succeeded\", \"st");
    std::fs::write(reports.join("train.json"), torn).expect("writable");
    // The dying trainer cannot replace it, and its own last word is lost with the pod: the volume is asked.
    let may_write = |mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&reports, mode).expect("this test is root");
    };
    may_write(0o555);
    space.namespace.kubectl(&["delete", "pod", &pod, "--force", "--grace-period=0"]);
    let status = space.until("bot", "the next attempt", |status| status["attempts"]["total"] == 2);
    may_write(0o777);
    let first = status["jobRefs"].as_array().expect("listed").iter().find(|one| one["name"] == "bot-train-1");
    let first = first.expect("listed");
    assert_eq!((&first["outcome"], &first["reason"]), (&"Failed".into(), &"ReportMissing".into()), "{status:#}");
    assert!(status["artifact"].is_null() && status["attempts"]["failed"] == 1, "{status:#}");
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), long_adapter());
}
