//! A job that nothing happens to, and what the operator does while nothing changes.

use harness::apiserver::{Kind, Life, Simulation, Turn, Verb, Word};
use serde_json::json;

use super::{complete, simulate, train};

/// An hour.
const HOUR: u64 = 3600;

#[test]
fn a_job_goes_its_way_with_these_writes_and_no_others() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &json!({"output": {"uri": "pvc://published/bot"}}));
        assert_eq!(simulation.end("bot", 120).await, complete(), "{}", simulation.account());
        let writes: Vec<String> = simulation
            .writes()
            .into_iter()
            // Their names tell of the job's UID.
            .map(|write| if write.starts_with("create configmaps") { "create configmaps".to_owned() } else { write })
            .map(
                |write| if write.contains("volumeclaims") { "create persistentvolumeclaims".to_owned() } else { write },
            )
            .collect();
        let status = "patch finetunejobs/status bot";
        let expected = [
            // An attempt is listed before anything is made for it, …
            vec![status, "create configmaps", "create persistentvolumeclaims", "create jobs bot-prepare-1"],
            // … then the Job is known, its pod runs, and how it ended is told with the next one.
            vec![status, status, status, "create jobs bot-train-1"],
            vec![status, status, status, "create jobs bot-publish-1"],
            vec![status, status, status],
        ];
        assert_eq!(writes, expected.concat());
        let job = simulation.job("bot");
        assert_eq!(job["status"]["phase"], "Succeeded");
        assert_eq!(job["status"]["attempts"]["total"], 1);
        assert_eq!(job["status"]["attempts"]["checkpointStep"], 100);
        assert_eq!(job["status"]["artifact"]["loraRank"], 16);
        assert_eq!(simulation.condition("bot", "Published").0, "True");
    });
}

#[test]
fn nothing_is_written_while_nothing_changes() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| Life::running().then(2 * HOUR, Turn::End(Word::Done))));
        simulation.submit("bot", &json!({}));
        let trains = |simulation: &Simulation| {
            simulation.condition("bot", "Running").1 == "PodRunning" && !simulation.pods("bot-train").is_empty()
        };
        simulation.until("it trains", 60, trains).await;
        simulation.pass(60).await;
        let from = simulation.server.noted().len();
        simulation.pass(HOUR).await;
        let requests = simulation.requests(from);
        let but_watches: Vec<String> =
            requests.iter().filter(|noted| noted.call.verb != Verb::Watch).map(ToString::to_string).collect();
        assert!(but_watches.len() <= 12, "{} requests in an hour: {but_watches:#?}", but_watches.len());
        let writes: Vec<&String> =
            but_watches.iter().filter(|told| !told.contains(" get ") && !told.contains(" list ")).collect();
        assert_eq!(writes, Vec::<&String>::new());
        assert_eq!(simulation.end("bot", 2 * HOUR).await, complete());
        let from = simulation.server.noted().len();
        simulation.pass(HOUR).await;
        let requests = simulation.requests(from);
        assert!(
            requests.iter().all(|noted| noted.call.verb == Verb::Watch),
            "a job that has ended is left alone: {requests:#?}"
        );
    });
}

#[test]
fn a_job_whose_time_to_live_is_over_goes_and_stays_away() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &json!({"ttlSecondsAfterFinished": 600}));
        assert_eq!(simulation.end("bot", 120).await, complete());
        simulation.until("it is deleted", 660, |simulation| simulation.job("bot").is_null()).await;
        simulation.pass(600).await;
        assert_eq!(
            simulation.server.list(Kind::Job).len() + simulation.server.list(Kind::Pod).len(),
            0,
            "{}",
            simulation.account()
        );
    });
}

#[test]
fn a_job_of_another_manager_is_left_alone() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &json!({"managedBy": "kueue.x-k8s.io/multikueue"}));
        simulation.pass(HOUR).await;
        assert_eq!(simulation.writes(), Vec::<String>::new());
    });
}

#[test]
fn a_held_job_has_no_pod_and_goes_on_when_it_is_let() {
    simulate(async || {
        let first = |attempt| if attempt == 1 { 10_000 } else { 30 };
        let simulation = Simulation::start(train(move |about| {
            Life::running().then(20, Turn::Checkpoint(50)).then(first(about.attempt), Turn::End(Word::Done))
        }));
        simulation.submit("bot", &json!({}));
        simulation
            .until("it trains", 60, |simulation| {
                simulation.reason("bot", "Running") == "PodRunning" && simulation.pods("bot-train").len() == 1
            })
            .await;
        simulation.pass(30).await;
        simulation.edit("bot", |spec| spec["suspend"] = json!(true));
        simulation
            .until("it is held", 60, |simulation| {
                simulation.condition("bot", "Suspended").0 == "True" && simulation.pods("bot-train").is_empty()
            })
            .await;
        simulation.pass(HOUR).await;
        assert!(simulation.pods("bot-train").is_empty());
        simulation.edit("bot", |spec| spec["suspend"] = json!(false));
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        assert_eq!(simulation.job("bot")["status"]["attempts"]["failed"], 0);
    });
}
