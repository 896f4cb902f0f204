//! An operator that was away while jobs went on.

use harness::apiserver::{Life, Simulation, Turn, Word};
use serde_json::{Value, json};

use super::{complete, failed, outcomes, simulate, train};

/// The operator is down for ten minutes: from when the training pod was made, or from when it was told to run.
async fn away_while_it_trains(simulation: &Simulation, fields: &Value, was_seen_to_run: bool) {
    simulation.submit("bot", fields);
    let begins = |simulation: &Simulation| {
        let runs =
            simulation.reason("bot", "Running") == "PodRunning" && simulation.condition("bot", "Running").0 == "True";
        !simulation.pods("bot-train").is_empty() && (runs || !was_seen_to_run)
    };
    simulation.until("its training pod is there", 60, begins).await;
    simulation.operator.stop();
    simulation.pass(600).await;
}

fn deadlines() -> [Value; 2] {
    [json!({"startDeadlineSeconds": 120}), json!({"activeDeadlineSeconds": 120})]
}

#[test]
fn what_ended_while_nobody_looked_has_ended_before_any_deadline() {
    for (deadline, was_seen_to_run) in
        deadlines().into_iter().flat_map(|deadline| [(deadline.clone(), false), (deadline, true)])
    {
        for pod_is_gone in [false, true] {
            simulate(async || {
                let simulation = Simulation::start(Life::of);
                away_while_it_trains(&simulation, &deadline, was_seen_to_run).await;
                if pod_is_gone {
                    let pods = simulation.pods("bot-train");
                    simulation.cluster.confirm_gone(pods[0]["metadata"]["name"].as_str().expect("a name"));
                }
                simulation.operator.resume();
                let told = format!("{deadline}, seen to run: {was_seen_to_run}, pod gone: {pod_is_gone}");
                assert_eq!(simulation.end("bot", 120).await, complete(), "{told}\n{}", simulation.account());
            });
        }
    }
}

#[test]
fn what_failed_while_nobody_looked_is_told_as_what_it_was() {
    for pod_is_gone in [false, true] {
        simulate(async || {
            let bad = || Word::Failed(crds::exit::ExitCode::BadData, "row 7 has no answer".into());
            let simulation = Simulation::start(train(move |_| Life::running().then(30, Turn::End(bad()))));
            let deadlines = json!({"activeDeadlineSeconds": 120, "startDeadlineSeconds": 120});
            away_while_it_trains(&simulation, &deadlines, false).await;
            if pod_is_gone {
                simulation.delete_child("bot-train-1");
                simulation.until("its pod is gone", 60, |simulation| simulation.pods("bot-train").is_empty()).await;
            }
            simulation.operator.resume();
            assert_eq!(simulation.end("bot", 120).await, failed("BadData"), "{pod_is_gone}\n{}", simulation.account());
            assert!(simulation.condition("bot", "Failed").2.contains("row 7 has no answer"));
        });
    }
}

/// Deadlines are the user's all the same, where nothing ended.
#[test]
fn a_deadline_that_went_by_while_nobody_looked_bites() {
    for (deadline, reason) in [
        (json!({"activeDeadlineSeconds": 120}), "DeadlineExceeded"),
        (json!({"startDeadlineSeconds": 120}), "StartDeadlineExceeded"),
    ] {
        simulate(async || {
            let starts = deadline["startDeadlineSeconds"].is_null();
            let life = move |_: &_| if starts { Life::running() } else { Life::new() };
            let simulation = Simulation::start(train(life));
            away_while_it_trains(&simulation, &deadline, false).await;
            simulation.operator.resume();
            assert_eq!(simulation.end("bot", 120).await, failed(reason), "{}", simulation.account());
            simulation
                .until("nothing of it is left", 400, |simulation| simulation.pods("bot-train-1-0").is_empty())
                .await;
        });
    }
}

/// A whole attempt came and went, with its pod and its Job.
#[test]
fn what_went_without_a_trace_is_asked_of_the_volume() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        away_while_it_trains(&simulation, &json!({}), false).await;
        simulation.delete_child("bot-train-1");
        simulation.until("its pod is gone", 120, |simulation| simulation.pods("bot-train").is_empty()).await;
        simulation.operator.resume();
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Done"]);
    });
}
