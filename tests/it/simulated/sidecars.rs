//! Containers that somebody else puts beside the trainer, or before it.

use std::time::Duration;

use crds::exit::ExitCode;
use crds::run::PodStage;
use harness::apiserver::{About, Leaving, Life, Simulation, Turn, Word};
use serde_json::json;

use super::{complete, failed, outcomes, simulate, train};

fn in_a_mesh(about: &About) -> Life {
    Life::of(about).with_sidecar("istio-proxy").leaving(Leaving::After(Duration::from_secs(5), Word::Silent(143)))
}

#[test]
fn the_trainers_end_is_the_end_of_its_attempt() {
    simulate(async || {
        let simulation = Simulation::start(in_a_mesh);
        simulation.submit("bot", &json!({"output": {"uri": "pvc://published/bot"}}));
        assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        assert_eq!(
            simulation.outcomes("bot").iter().map(|(_, outcome)| outcome.as_str()).collect::<Vec<_>>(),
            ["Done"; 3]
        );
        simulation
            .until("no pod is left running", 120, |simulation| {
                simulation.pods("bot-").iter().all(|pod| pod["status"]["phase"] != "Running")
            })
            .await;
    });
}

#[test]
fn the_trainers_failure_is_the_failure_of_its_attempt() {
    simulate(async || {
        let simulation = Simulation::start(|about| match about.stage {
            PodStage::Train => {
                let word = Word::Failed(ExitCode::NonFinite, "the loss is not finite at step 7".into());
                Life::running().then(10, Turn::End(word)).with_sidecar("istio-proxy")
            }
            _ => in_a_mesh(about),
        });
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 300).await, failed("NonFinite"), "{}", simulation.account());
        simulation
            .until("its pod is taken away", 120, |simulation| {
                simulation.pods("bot-train").iter().all(|pod| pod["status"]["phase"] != "Running")
            })
            .await;
    });
}

#[test]
fn a_failing_init_container_is_told_by_its_name_and_words() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| {
            Life::new()
                .then(1, Turn::Schedule)
                .then(1, Turn::RunInit("istio-init".into()))
                .then(3, Turn::EndInit("istio-init".into(), 2, "iptables: permission denied".into()))
        }));
        simulation.submit("bot", &json!({"failurePolicy": {"maxRetries": 1}}));
        assert_eq!(simulation.end("bot", 900).await, failed("BackoffLimitExceeded"), "{}", simulation.account());
        let message = simulation.condition("bot", "Failed").2;
        for words in ["istio-init", "exit code 2", "iptables: permission denied"] {
            assert!(message.contains(words), "no {words:?} in {message:?}");
        }
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Failed"; 2]);
        let listed = simulation.job("bot")["status"]["jobRefs"].clone();
        assert!(
            listed.as_array().expect("a list").iter().any(|attempt| attempt["reason"] == "InitContainerFailed"),
            "{listed:#}"
        );
    });
}

#[test]
fn an_init_container_that_cannot_start_is_told_by_its_name() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| {
            let wait =
                Turn::WaitInit("istio-init".into(), "CreateContainerError".into(), "context deadline exceeded".into());
            Life::new().then(1, Turn::Schedule).then(1, wait)
        }));
        simulation.submit("bot", &json!({}));
        let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "InitContainerFailed";
        simulation.until("it is told", 60, told).await;
        let message = simulation.condition("bot", "Running").2;
        assert!(message.contains("istio-init") && message.contains("context deadline exceeded"), "{message}");
    });
}

/// Deadlines bite whatever a pod does.
#[test]
fn deadlines_bite_whatever_containers_do() {
    let waits = |about: &About| match about.stage {
        PodStage::Train => Life::new().then(1, Turn::Schedule).then(1, Turn::RunInit("istio-init".into())),
        _ => in_a_mesh(about),
    };
    let hangs = |about: &About| match about.stage {
        PodStage::Train => Life::running().with_sidecar("istio-proxy"),
        _ => in_a_mesh(about),
    };
    let lives: [(fn(&About) -> Life, _, _); 2] = [
        (waits, json!({"startDeadlineSeconds": 120}), "StartDeadlineExceeded"),
        (hangs, json!({"activeDeadlineSeconds": 120}), "DeadlineExceeded"),
    ];
    for (life, deadline, reason) in lives {
        simulate(async || {
            let simulation = Simulation::start(life);
            simulation.submit("bot", &deadline);
            assert_eq!(simulation.end("bot", 200).await, failed(reason), "{}", simulation.account());
            // A pod that reads the volume has a deadline of its own.
            simulation
                .until("no pod of it runs", 400, |simulation| {
                    simulation.pods("bot-train").iter().all(|pod| pod["status"]["phase"] != "Running")
                })
                .await;
        });
    }
}
