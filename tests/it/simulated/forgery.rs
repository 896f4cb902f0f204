//! Whoever may create pods and Jobs in a namespace can make some that look like the operator's. None of them changes a verdict.

use crds::exit::ExitCode;
use crds::report::{Report, Stage};
use crds::run::PodStage;
use harness::apiserver::{Author, Calls, Fault, Key, Kind, Life, Simulation, Turn, Verb, Word};
use serde_json::{Value, json};

use super::{complete, failed, simulate, train};

/// A last word that claims success.
fn claim(job_uid: &str) -> String {
    let report = Report {
        job_uid: job_uid.to_owned(),
        pod_stage: Some(PodStage::Train),
        attempt: 1,
        stage: Stage::Succeeded,
        config_digest: "sha256:1".into(),
        ..Report::default()
    };
    report.termination_message()
}

/// A pod as the training Job would have one, but for `change`, that ends well at once and claims success.
fn forge_pod(simulation: &Simulation, job_uid: &str, change: impl FnOnce(&mut Value)) {
    let mut pod = simulation.pods("bot-train")[0].clone();
    pod["metadata"]["name"] = json!("bot-train-1-zzzzz");
    change(&mut pod["spec"]);
    let made = simulation.server.create(Kind::Pod, pod, Author::User).expect("a user may create pods");
    let key = Key::new(Kind::Pod, "team", "bot-train-1-zzzzz");
    let now = made["metadata"]["creationTimestamp"].clone();
    let ended = json!({"terminated": {"exitCode": 0, "reason": "Completed", "message": claim(job_uid), "startedAt": now, "finishedAt": now}});
    let container =
        json!({"name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": ended});
    let status = json!({"phase": "Succeeded", "containerStatuses": [container]});
    simulation.server.edit_status(&key, Author::Cluster, |found| *found = status).expect("it was made");
}

#[test]
fn a_forged_pod_changes_no_verdict() {
    let forgeries: [(&str, fn(&mut Value)); 4] = [
        ("another image", |spec| spec["containers"][0]["image"] = json!("registry.example/liar@sha256:2")),
        ("another command", |spec| spec["containers"][0]["command"] = json!(["/bin/sh", "-c", "echo"])),
        ("other arguments", |spec| spec["containers"][0]["args"] = json!(["run", "--stage", "train"])),
        ("a guest on the volume", |spec| {
            let mounts = spec["containers"][0]["volumeMounts"].clone();
            let guest = json!({"name": "guest", "image": "registry.example/liar@sha256:2", "volumeMounts": mounts});
            spec["containers"].as_array_mut().expect("containers").push(guest);
        }),
    ];
    for (what, change) in forgeries {
        simulate(async || {
            let word = || Word::Failed(ExitCode::BadData, "row 7 has no answer".into());
            let simulation = Simulation::start(train(move |_| Life::running().then(60, Turn::End(word()))));
            let uid = simulation.submit("bot", &json!({}));
            let runs = |simulation: &Simulation| {
                simulation.reason("bot", "Running") == "PodRunning" && simulation.pods("bot-train").len() == 1
            };
            simulation.until("it trains", 60, runs).await;
            simulation.pass(5).await;
            forge_pod(&simulation, &uid, change);
            assert_eq!(simulation.end("bot", 300).await, failed("BadData"), "{what}\n{}", simulation.account());
        });
    }
}

/// The operator dies when the Job was made and before its UID is noted: what its pods must run is noted as well.
#[test]
fn a_forged_pod_changes_no_verdict_of_a_job_that_was_found_again() {
    for fault in [Fault::CrashAfter, Fault::Hangs] {
        simulate(async || {
            let word = || Word::Failed(ExitCode::BadData, "row 7 has no answer".into());
            let simulation = Simulation::start(train(move |_| Life::running().then(60, Turn::End(word()))));
            let told = format!("{fault:?}");
            // The first of them is that of the preparing stage.
            simulation.server.inject(Calls::to(Verb::Create, Kind::Job).after(1).times(1), fault);
            let uid = simulation.submit("bot", &json!({}));
            let runs = |simulation: &Simulation| simulation.pods("bot-train").len() == 1;
            simulation.until("it trains", 200, runs).await;
            simulation.pass(5).await;
            let noted = &simulation.job("bot")["status"]["jobRefs"][1];
            assert!(noted["uid"].is_string() && noted["podDigest"].is_string(), "{told}: {noted}");
            forge_pod(&simulation, &uid, |spec| {
                spec["containers"][0]["image"] = json!("registry.example/liar@sha256:2");
            });
            assert_eq!(simulation.end("bot", 300).await, failed("BadData"), "{told}\n{}", simulation.account());
        });
    }
}

/// Whoever knows the UID can make both before the operator does: a Job that is right, and a configuration that is not.
#[test]
fn a_right_job_beside_a_forged_configuration_is_not_taken_for_an_attempt() {
    // In each simulation the first job has the same UID.
    let mut right = None;
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        let uid = simulation.submit("bot", &json!({}));
        simulation.until("it prepares", 60, |simulation| !simulation.pods("bot-prepare").is_empty()).await;
        let job = simulation.server.get(Kind::Job, "team", "bot-prepare-1").expect("it was made");
        let map = simulation.server.list(Kind::ConfigMap).remove(0);
        right = Some((uid, job, map));
    });
    let (uid, job, mut map) = right.expect("the simulation came so far");
    map["data"]["run.yaml"] = json!("job: {uid: x}");
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        assert_eq!(simulation.submit("bot", &json!({"suspend": true})), uid);
        for (kind, object) in [(Kind::Job, &job), (Kind::ConfigMap, &map)] {
            simulation.server.create(kind, object.clone(), Author::User).expect("a user may create both");
        }
        simulation.edit("bot", |spec| spec["suspend"] = json!(false));
        simulation.pass(600).await;
        assert!(!simulation.has_ended("bot"), "{}", simulation.account());
        assert_eq!(simulation.reason("bot", "Running"), "ChildNameTaken", "{}", simulation.account());
        assert!(simulation.outcomes("bot").iter().all(|(_, outcome)| outcome.is_empty()));
    });
}

/// A Job that would make two pods of one attempt is not the operator's, whatever they run.
#[test]
fn a_job_that_makes_several_pods_is_not_taken_for_an_attempt() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &json!({}));
        simulation.until("it trains", 100, |simulation| !simulation.pods("bot-train").is_empty()).await;
        let mut job = simulation.server.get(Kind::Job, "team", "bot-train-1").expect("it was made");
        job["metadata"]["name"] = json!("bot-publish-1");
        job["spec"]["parallelism"] = json!(2);
        job["spec"]["template"]["spec"]["containers"][0]["args"][4] = json!("publish");
        simulation.server.create(Kind::Job, job, Author::User).expect("a user may create Jobs");
        let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "ChildNameTaken";
        simulation.until("it is told that the name is taken", 300, told).await;
        simulation.pass(300).await;
        assert!(!simulation.has_ended("bot"), "{}", simulation.account());
    });
}

/// An admission webhook that changes Jobs changes their pods as well: they are what was made.
#[test]
fn a_job_that_admission_changed_runs() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.server.admit(Kind::Job, |job| {
            let container = &mut job["spec"]["template"]["spec"]["containers"][0];
            container["image"] = json!("mirror.example/trainer:1");
            container["env"]
                .as_array_mut()
                .expect("variables")
                .push(json!({"name": "LD_PRELOAD", "value": "/agent.so"}));
        });
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
    });
}

/// One that changes the pods alone makes other ones of them: in what, is told.
#[test]
fn a_pod_that_admission_changed_is_told_with_what_differs() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation
            .server
            .admit(Kind::Pod, |pod| pod["spec"]["containers"][0]["image"] = json!("mirror.example/trainer:1"));
        // The operator has no right to get a pod.
        let forbidden = Fault::Refused(403, "pods is forbidden: User \"operator\" cannot get it".into());
        simulation.server.inject(Calls::to(Verb::Get, Kind::Pod).always(), forbidden);
        simulation.submit("bot", &json!({}));
        let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "ChildNameTaken";
        simulation.until("it is told", 60, told).await;
        let message = simulation.condition("bot", "Running").2;
        assert!(message.contains("image differ") && message.contains("admission webhook"), "{message}");
    });
}

/// The Job of an attempt is there before the operator makes it, and claims to be of the FineTuneJob.
#[test]
fn a_forged_job_is_not_taken_for_an_attempt() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        let uid = simulation.submit("bot", &json!({}));
        simulation.until("it prepares", 60, |simulation| !simulation.pods("bot-prepare").is_empty()).await;
        let mut job = simulation.server.get(Kind::Job, "team", "bot-prepare-1").expect("it was made");
        job["metadata"]["name"] = json!("bot-train-1");
        assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], uid.as_str());
        let template = &mut job["spec"]["template"];
        template["spec"]["containers"][0]["image"] = json!("registry.example/liar@sha256:2");
        template["spec"]["containers"][0]["args"] = json!(["run", "--stage", "train", "--attempt", "1"]);
        simulation.server.create(Kind::Job, job, Author::User).expect("a user may create Jobs");
        let told = |simulation: &Simulation| {
            ["Accepted", "Running"].iter().any(|kind| simulation.reason("bot", kind) == "ChildNameTaken")
        };
        simulation.until("it is told that the name is taken", 120, told).await;
        simulation.pass(600).await;
        assert!(!simulation.has_ended("bot"), "{}", simulation.account());
        assert!(simulation.outcomes("bot").iter().all(|(name, outcome)| !name.contains("train") || outcome.is_empty()));
        simulation.delete_child("bot-train-1");
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
    });
}

/// The Job that reads the volume of an attempt is there before the operator makes it.
#[test]
fn a_forged_report_is_not_believed() {
    simulate(async || {
        let simulation = Simulation::start(|about| match (about.stage, about.attempt) {
            (PodStage::Train, 1) => Life::running().then(20, Turn::Checkpoint(10)).then(40, Turn::Vanish),
            _ => Life::of(about),
        });
        simulation.submit("bot", &json!({}));
        let runs = |simulation: &Simulation| simulation.pods("bot-train").len() == 1;
        simulation.until("it trains", 60, runs).await;
        let mut job = simulation.server.get(Kind::Job, "team", "bot-train-1").expect("it was made");
        job["metadata"]["name"] = json!("bot-train-1-report");
        job["metadata"]["labels"]["app.kubernetes.io/component"] = json!("report");
        let container = &mut job["spec"]["template"]["spec"]["containers"][0];
        container["image"] = json!("registry.example/liar@sha256:2");
        container["args"] = json!(["run", "--stage", "prepare", "--attempt", "1"]);
        simulation.server.create(Kind::Job, job, Author::User).expect("a user may create Jobs");
        let told = |simulation: &Simulation| {
            ["Accepted", "Running"].iter().any(|kind| simulation.reason("bot", kind) == "ChildNameTaken")
        };
        simulation.until("it is told that the name is taken", 300, told).await;
        simulation.pass(600).await;
        assert!(!simulation.has_ended("bot"), "{}", simulation.account());
        simulation.delete_child("bot-train-1-report");
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
    });
}

/// What the pod reads is what was planned, whoever made a ConfigMap of its name before.
#[test]
fn a_forged_configuration_is_not_run() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        let uid = simulation.submit("bot", &json!({}));
        simulation.operator.stop();
        let owner = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "bot", "uid": uid, "controller": true});
        // By both names that a ConfigMap of this job could have.
        for name in ["bot-run".to_owned(), format!("bot-{}-run", &uid[..8])] {
            let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "team", "ownerReferences": [owner]},
                             "data": {"run.yaml": "job: {uid: x}", "plan.yaml": ""}});
            simulation.server.create(Kind::ConfigMap, map, Author::User).expect("a user may create ConfigMaps");
        }
        simulation.operator.resume();
        simulation.pass(120).await;
        let maps = simulation.server.list(Kind::ConfigMap);
        let ours = maps.iter().filter(|map| map["immutable"] == true).count();
        let taken = simulation.reason("bot", "Accepted") == "ChildNameTaken";
        assert!(ours == 1 || taken, "{}", simulation.account());
        assert_eq!(taken, simulation.server.list(Kind::Job).is_empty(), "{}", simulation.account());
    });
}
