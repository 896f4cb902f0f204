//! An operator that dies before and after each write, answers that never come, and statuses that somebody else wrote in between.

use std::time::Duration;

use crds::run::PodStage;
use harness::apiserver::{About, Calls, Fault, Kind, Leaving, Life, Simulation, Turn, Word};
use serde_json::json;

use super::{complete, simulate, train};
/// Longer than any of these jobs takes, however often it is disturbed.
const LONG: u64 = 1800;

/// A job that is disturbed in its own way, and how many attempts it has in the end.
struct Path {
    lives: fn(&About) -> Life,
    attempts: usize,
}

/// Prepare, train, publish.
const UNDISTURBED: Path = Path { lives: Life::of, attempts: 3 };
/// The first training pod is drained, the second one disappears without a word.
const DISTURBED: Path = Path { lives: disturbed, attempts: 5 };

fn disturbed(about: &About) -> Life {
    match (about.stage, about.attempt) {
        (PodStage::Train, 1) => {
            Life::running().then(10, Turn::Checkpoint(10)).then(10, Turn::Disrupt("EvictionByEvictionAPI".into()))
        }
        (PodStage::Train, 2) => Life::running().then(10, Turn::Checkpoint(20)).then(10, Turn::Vanish),
        _ => Life::of(about),
    }
}

/// Runs a path with a fault, and returns how many writes there were.
fn run(path: &Path, fault: Option<(Calls, Fault)>) -> usize {
    let mut writes = 0;
    simulate(async || {
        let told = format!("{fault:?}");
        let simulation = Simulation::start(path.lives);
        let crashes = fault.as_ref().is_some_and(|(_, fault)| matches!(fault, Fault::CrashBefore | Fault::CrashAfter));
        if let Some((calls, fault)) = fault {
            simulation.server.inject(calls, fault);
        }
        simulation.submit("bot", &json!({"output": {"uri": "pvc://published/bot"}}));
        assert_eq!(simulation.end("bot", LONG).await, complete(), "{told}\n{}", simulation.account());
        // Whatever was under way ends.
        simulation.pass(60).await;
        let noted = simulation.server.noted();
        writes = noted.iter().filter(|noted| noted.call.verb.is_write()).count();
        assert_eq!(crashes, simulation.operator.starts() > 1, "{told}");
        // Whose last word nobody heard, has a pod beside that reads it.
        let pods = simulation.server.made(Kind::Pod).into_iter().filter(|pod| !pod.contains("report"));
        assert_eq!(pods.count(), path.attempts, "{told}\n{}", simulation.account());
    });
    writes
}

fn check_crashes(path: &Path, times: usize) {
    let writes = run(path, None);
    assert!(writes > 12, "{writes}");
    for write in 0..writes {
        for fault in [Fault::CrashBefore, Fault::CrashAfter] {
            run(path, Some((Calls::writes().after(write).times(times), fault)));
        }
    }
}

#[test]
fn an_operator_that_dies_at_any_write_comes_to_the_same_end() {
    check_crashes(&UNDISTURBED, 1);
}

#[test]
fn an_operator_that_dies_three_times_in_a_row_comes_to_the_same_end() {
    check_crashes(&UNDISTURBED, 3);
}

#[test]
fn an_operator_that_dies_while_pods_come_and_go_comes_to_the_same_end() {
    check_crashes(&DISTURBED, 1);
}

#[test]
fn answers_that_are_lost_or_wrong_change_no_end() {
    let unavailable = "the server is currently unable to handle the request";
    let writes = run(&UNDISTURBED, None);
    for write in 0..writes {
        for fault in [
            Fault::Refused(500, "etcdserver: request timed out".into()),
            Fault::Refused(429, "too many requests".into()),
            Fault::Refused(503, unavailable.into()),
            Fault::DoneAndRefused(504),
            Fault::Lost,
            Fault::DoneAndLost,
            Fault::Hangs,
            Fault::DoneAndHangs,
        ] {
            run(&UNDISTURBED, Some((Calls::writes().after(write), fault)));
        }
    }
}

#[test]
fn a_status_that_somebody_wrote_in_between_is_looked_at_again() {
    let conflict = "Operation cannot be fulfilled: the object has been modified";
    for write in 0..10 {
        run(&UNDISTURBED, Some((Calls::to_status().after(write).times(2), Fault::Refused(409, conflict.into()))));
    }
}

/// Two that both take themselves for the leader, as after a pause that outlasts a lease.
#[test]
fn two_operators_at_once_come_to_the_same_end() {
    for path in [&UNDISTURBED, &DISTURBED] {
        simulate(async || {
            let simulation = Simulation::start(path.lives);
            let second = simulation.another_operator();
            simulation.submit("bot", &json!({"output": {"uri": "pvc://published/bot"}}));
            assert_eq!(simulation.end("bot", LONG).await, complete(), "{}", simulation.account());
            simulation.pass(60).await;
            let pods = simulation.server.made(Kind::Pod).into_iter().filter(|pod| !pod.contains("report"));
            assert_eq!(pods.count(), path.attempts, "{}", simulation.account());
            drop(second);
        });
    }
}

/// The Job of an attempt is made, the operator dies before its status says so, and somebody deletes the Job, whose pod takes two
/// minutes to leave.
#[test]
fn a_job_that_was_deleted_unnoticed_is_not_made_again_beside_its_pod() {
    simulate(async || {
        let slow = Leaving::After(Duration::from_mins(2), Word::Silent(143));
        let simulation = Simulation::start(move |about| {
            let life = if about.stage == PodStage::Prepare {
                Life::running().then(200, Turn::End(Word::Done))
            } else {
                Life::of(about)
            };
            life.leaving(slow.clone())
        });
        simulation.server.inject(Calls::to_status().after(1).always(), Fault::Hangs);
        simulation.submit("bot", &json!({}));
        let runs = |simulation: &Simulation| {
            simulation.pods("bot-prepare").iter().any(|pod| pod["status"]["phase"] == "Running")
        };
        simulation.until("its pod runs", 60, runs).await;
        simulation.operator.stop();
        simulation.server.heal();
        assert!(simulation.job("bot")["status"]["jobRefs"][0]["uid"].is_null(), "the status must not know of the Job");
        simulation.delete_child("bot-prepare-1");
        simulation.operator.resume();
        assert_eq!(simulation.end("bot", LONG).await, complete(), "{}", simulation.account());
    });
}

/// The same where the status knows of the Job: what was deleted is an attempt that ended.
#[test]
fn a_job_that_was_deleted_is_followed_by_the_next_attempt_when_its_pod_is_gone() {
    simulate(async || {
        let slow = Leaving::After(Duration::from_mins(2), Word::Silent(143));
        let simulation = Simulation::start(train(move |about| Life::of(about).leaving(slow.clone())));
        simulation.submit("bot", &json!({}));
        let runs = |simulation: &Simulation| {
            simulation.pods("bot-train").iter().any(|pod| pod["status"]["phase"] == "Running")
        };
        simulation.until("it trains", 60, runs).await;
        simulation.pass(5).await;
        simulation.delete_child("bot-train-1");
        assert_eq!(simulation.end("bot", LONG).await, complete(), "{}", simulation.account());
        assert_eq!(simulation.job("bot")["status"]["attempts"]["total"], 2);
    });
}
