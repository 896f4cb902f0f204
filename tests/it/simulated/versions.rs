//! Watches that break, and an etcd that was restored: versions are lower than those that were seen.

use harness::apiserver::{Calls, Fault, Kind, Life, Simulation, Turn, Verb, Word};
use serde_json::json;

use super::{complete, simulate, train};

#[test]
fn watches_that_are_told_to_begin_anew_lose_nothing() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &json!({}));
        for _ in 0..30 {
            simulation.pass(3).await;
            simulation.server.expire_watches();
        }
        assert_eq!(simulation.end("bot", 120).await, complete(), "{}", simulation.account());
    });
}

#[test]
fn watches_that_cannot_begin_are_begun_later() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        for kind in [Kind::FineTuneJob, Kind::Job, Kind::Pod] {
            simulation
                .server
                .inject(Calls::to(Verb::Watch, kind).times(3), Fault::Refused(500, "etcdserver: no leader".into()));
            simulation.server.inject(Calls::to(Verb::List, kind).times(2), Fault::Lost);
        }
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 900).await, complete(), "{}", simulation.account());
    });
}

#[test]
fn a_job_goes_on_after_an_etcd_was_restored() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| {
            Life::running().then(120, Turn::Checkpoint(100)).then(5, Turn::End(Word::Done))
        }));
        simulation.submit("bot", &json!({}));
        let trains = |simulation: &Simulation| {
            simulation.pods("bot-train").iter().any(|pod| pod["status"]["phase"] == "Running")
        };
        simulation.until("it trains", 60, trains).await;
        simulation.pass(5).await;
        let backup = simulation.server.backup();
        simulation.edit("bot", |spec| spec["ttlSecondsAfterFinished"] = json!(86_400));
        simulation
            .until("the operator has written", 60, |simulation| {
                simulation.job("bot")["status"]["observedGeneration"] == 2
            })
            .await;
        simulation.server.restore(backup);
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
    });
}
