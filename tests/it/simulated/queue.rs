//! Jobs that a queue holds, and a report that takes its time.

use harness::apiserver::{Author, Key, Kind, Life, Simulation, Turn, Verb, Word};
use serde_json::{Value, json};

use super::{complete, simulate, train};

const HOUR: u64 = 3600;

/// What Kueue's controller does when it sees a Job: a Workload that waits.
fn enqueue(simulation: &Simulation, job: &str) {
    let found = simulation.server.get(Kind::Job, "team", job).unwrap_or_else(|| panic!("no Job {job}"));
    assert_eq!(found["spec"]["suspend"], true, "a queued Job is made closed");
    let uid = found["metadata"]["uid"].clone();
    let owner = json!({"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid, "controller": true});
    let workload = json!({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
        "metadata": {"name": format!("job-{job}"), "namespace": "team", "labels": {"kueue.x-k8s.io/job-uid": uid}, "ownerReferences": [owner]},
        "spec": {"queueName": "team-queue"},
        "status": {"conditions": [waiting("couldn't assign flavors: insufficient unused quota for nvidia.com/gpu, 1 more needed")]},
    });
    simulation.server.create(Kind::Workload, workload, Author::Cluster).expect("Kueue makes it");
}

fn waiting(message: &str) -> Value {
    json!({"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

fn set_conditions(simulation: &Simulation, job: &str, conditions: &Value) {
    let key = Key::new(Kind::Workload, "team", &format!("job-{job}"));
    simulation
        .server
        .edit_status(&key, Author::Cluster, |status| status["conditions"] = conditions.clone())
        .expect("it is there");
}

/// Kueue reserves quota, and opens the Job.
fn admit(simulation: &Simulation, job: &str) {
    let held = json!([{"type": "QuotaReserved", "status": "True", "reason": "QuotaReserved", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    set_conditions(simulation, job, &held);
    let key = Key::new(Kind::Job, "team", job);
    simulation.server.edit(&key, Author::Cluster, |job| job["spec"]["suspend"] = json!(false)).expect("it is there");
}

fn queued() -> Value {
    json!({"scheduling": {"queueName": "team-queue"}})
}

async fn until_enqueued(simulation: &Simulation, name: &str) {
    let job = format!("{name}-train-1");
    simulation
        .until("its training Job is made", 120, |simulation| simulation.server.get(Kind::Job, "team", &job).is_some())
        .await;
    enqueue(simulation, &job);
}

#[test]
fn a_job_that_is_admitted_after_an_hour_is_not_told_to_have_no_pod() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.server.serve_kueue(&["v1beta2"]);
        simulation.submit("bot", &queued());
        until_enqueued(&simulation, "bot").await;
        simulation
            .until("its queue is told", 60, |simulation| simulation.reason("bot", "Admitted") == "WaitingForQuota")
            .await;
        assert_eq!(simulation.job("bot")["status"]["phase"], "Queued");
        simulation.pass(HOUR).await;
        admit(&simulation, "bot-train-1");
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        let told = simulation.told("bot", "Running");
        assert!(told.iter().all(|(reason, _)| reason != "ChildCreationFailed"), "{told:#?}");
        assert!(simulation.told("bot", "Admitted").iter().any(|(reason, _)| reason == "QuotaReserved"));
    });
}

#[test]
fn a_report_that_is_read_from_the_volume_is_not_told_to_be_a_job_without_a_pod() {
    simulate(async || {
        let simulation = Simulation::start(|about| match (about.stage, about.attempt) {
            (crds::run::PodStage::Train, 1) => Life::running().then(20, Turn::Checkpoint(10)).then(10, Turn::Vanish),
            (crds::run::PodStage::Report, _) => Life::running().then(90, Turn::End(Word::Done)),
            _ => Life::of(about),
        });
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
        let told = simulation.told("bot", "Running");
        assert!(told.iter().all(|(reason, _)| reason != "ChildCreationFailed"), "{told:#?}");
        assert!(told.iter().any(|(reason, _)| reason == "ReadingVolume"), "{told:#?}");
    });
}

#[test]
fn many_queued_jobs_ask_seldom_and_write_seldom() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.server.serve_kueue(&["v1beta2"]);
        let names: Vec<String> = (0..20).map(|index| format!("bot-{index:02}")).collect();
        for name in &names {
            simulation.submit(name, &queued());
        }
        for name in &names {
            until_enqueued(&simulation, name).await;
        }
        simulation.pass(120).await;
        let from = simulation.server.noted().len();
        for minute in 0..60 {
            for name in &names {
                let message = format!(
                    "couldn't assign flavors: insufficient unused quota for nvidia.com/gpu, {} more needed",
                    minute % 7 + 1
                );
                set_conditions(&simulation, &format!("{name}-train-1"), &json!([waiting(&message)]));
            }
            simulation.pass(60).await;
        }
        let requests = simulation.requests(from);
        let lists = requests
            .iter()
            .filter(|noted| noted.call.place.kind == Kind::Workload && noted.call.verb == Verb::List)
            .count();
        assert!(lists <= 10, "{lists} lists of Workloads in an hour");
        let writes = requests.iter().filter(|noted| noted.call.verb.is_write()).count();
        assert!(writes <= 2 * names.len(), "{writes} writes in an hour");
    });
}

#[test]
fn a_queue_that_nobody_serves_is_told() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &queued());
        let told = |simulation: &Simulation| simulation.reason("bot", "Admitted") == "QueueControllerMissing";
        simulation.until("it is told", 120, told).await;
        let from = simulation.server.noted().len();
        simulation.pass(HOUR).await;
        assert!(!simulation.has_ended("bot"));
        let requests = simulation.requests(from);
        let asked = requests.iter().filter(|noted| noted.call.verb != Verb::Watch).count();
        assert!(
            asked <= 60,
            "{asked} requests in an hour: {:#?}",
            requests.iter().map(ToString::to_string).collect::<Vec<_>>()
        );
    });
}

#[test]
fn a_job_that_its_queue_closes_again_comes_back() {
    simulate(async || {
        let simulation = Simulation::start(train(|about| {
            let seconds = if about.earlier == 0 { 600 } else { 20 };
            Life::running().then(10, Turn::Checkpoint(10)).then(seconds, Turn::End(Word::Done))
        }));
        simulation.server.serve_kueue(&["v1beta2"]);
        simulation.submit("bot", &queued());
        until_enqueued(&simulation, "bot").await;
        admit(&simulation, "bot-train-1");
        let trains = |simulation: &Simulation| {
            simulation.pods("bot-train").len() == 1 && simulation.reason("bot", "Running") == "PodRunning"
        };
        simulation.until("it trains", 60, trains).await;
        let evicted = json!({"type": "Evicted", "status": "True", "reason": "Preempted", "message": "a job of higher priority came", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        set_conditions(&simulation, "bot-train-1", &json!([evicted]));
        let key = Key::new(Kind::Job, "team", "bot-train-1");
        simulation.server.edit(&key, Author::Cluster, |job| job["spec"]["suspend"] = json!(true)).expect("it is there");
        simulation.until("it is told", 120, |simulation| simulation.reason("bot", "Admitted") == "Evicted").await;
        simulation.pass(600).await;
        admit(&simulation, "bot-train-1");
        assert_eq!(simulation.end("bot", 900).await, complete(), "{}", simulation.account());
        let job = simulation.job("bot");
        assert_eq!(
            (&job["status"]["attempts"]["preempted"], &job["status"]["attempts"]["failed"]),
            (&json!(1), &json!(0)),
            "{job:#}"
        );
    });
}
