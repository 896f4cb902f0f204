//! An operator that was away while jobs went on.

use harness::apiserver::{Life, Simulation, Turn, Word};
use serde_json::{Value, json};

use super::{complete, failed, outcomes, simulate, train};

/// The operator is down from the making of the training pod for ten minutes.
async fn away_while_it_trains(simulation: &Simulation, deadline: &Value) {
    simulation.submit("bot", deadline);
    simulation.until("its training pod is made", 60, |simulation| !simulation.pods("bot-train").is_empty()).await;
    simulation.operator.stop();
    simulation.pass(600).await;
    simulation.operator.resume();
}

#[test]
fn what_ended_while_nobody_looked_has_ended_before_any_deadline() {
    for deadline in [json!({"startDeadlineSeconds": 120}), json!({"activeDeadlineSeconds": 120})] {
        simulate(async || {
            let simulation = Simulation::start(Life::of);
            away_while_it_trains(&simulation, &deadline).await;
            assert_eq!(simulation.end("bot", 120).await, complete(), "{deadline}\n{}", simulation.account());
        });
    }
}

#[test]
fn what_failed_while_nobody_looked_is_told_as_what_it_was() {
    simulate(async || {
        let bad = || Word::Failed(crds::exit::ExitCode::BadData, "row 7 has no answer".into());
        let simulation = Simulation::start(train(move |_| Life::running().then(30, Turn::End(bad()))));
        away_while_it_trains(&simulation, &json!({"activeDeadlineSeconds": 120, "startDeadlineSeconds": 120})).await;
        assert_eq!(simulation.end("bot", 120).await, failed("BadData"), "{}", simulation.account());
        assert!(simulation.condition("bot", "Failed").2.contains("row 7 has no answer"));
    });
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
            away_while_it_trains(&simulation, &deadline).await;
            assert_eq!(simulation.end("bot", 120).await, failed(reason), "{}", simulation.account());
            simulation.until("nothing of it is left", 120, |simulation| simulation.pods("bot-train").is_empty()).await;
        });
    }
}

/// A whole attempt came and went, with its pod and its Job.
#[test]
fn what_went_without_a_trace_is_asked_of_the_volume() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        away_while_it_trains(&simulation, &json!({})).await;
        simulation.operator.stop();
        simulation.delete_child("bot-train-1");
        simulation.until("its pod is gone", 120, |simulation| simulation.pods("bot-train").is_empty()).await;
        simulation.operator.resume();
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Done"]);
    });
}
