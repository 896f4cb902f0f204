//! Nodes that die, come back empty, or cannot be found.

use std::time::Duration;

use harness::apiserver::{Kind, Leaving, Life, Simulation, Turn, Word};
use serde_json::{Value, json};

use super::{complete, outcomes, simulate, train};

#[test]
fn a_node_that_comes_back_empty_takes_an_attempt_and_no_retry() {
    simulate(async || {
        let simulation = Simulation::start(train(|about| match about.attempt {
            1 => Life::running().then(20, Turn::Checkpoint(10)).then(20, Turn::ForgetContainer),
            _ => Life::of(about),
        }));
        simulation.submit("bot", &json!({"failurePolicy": {"maxRetries": 0}}));
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Preempted", "Done"]);
    });
}

/// Nobody knows whether the pod of a dead node still writes: nothing is started beside it, and its user is told what to do.
#[test]
fn a_dead_node_is_told_with_advice_and_waited_for() {
    simulate(async || {
        let simulation = Simulation::start(train(|about| match about.attempt {
            1 => Life::running().then(20, Turn::Checkpoint(10)).then(20, Turn::LoseNode),
            _ => Life::of(about),
        }));
        simulation.submit("bot", &json!({}));
        simulation
            .until("its node is told to be lost", 400, |simulation| simulation.reason("bot", "Running") == "NodeLost")
            .await;
        let message = simulation.condition("bot", "Running").2;
        for words in ["node-1", "node.kubernetes.io/out-of-service", "kubectl delete node"] {
            assert!(message.contains(words), "no {words:?} in {message:?}");
        }
        simulation.pass(7200).await;
        let pods = simulation.pods("bot-train");
        assert_eq!(pods.len(), 1, "{}", simulation.account());
        simulation.cluster.confirm_gone(pods[0]["metadata"]["name"].as_str().expect("a name"));
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Preempted", "Done"]);
    });
}

#[test]
fn no_node_is_told_in_the_schedulers_words() {
    simulate(async || {
        let sentence = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.";
        let simulation = Simulation::start(train(move |_| {
            let life = Life::new().then(0, Turn::Unschedulable(sentence.into()));
            life.then(600, Turn::Schedule).then(1, Turn::Run).then(20, Turn::End(Word::Done))
        }));
        simulation.submit("bot", &json!({}));
        let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "Unschedulable";
        simulation.until("it is told", 60, told).await;
        assert!(simulation.condition("bot", "Running").2.contains(sentence));
        assert_eq!(simulation.job("bot")["status"]["phase"], "Pending");
        assert_eq!(simulation.end("bot", 900).await, complete());
    });
}

/// A pod of a deleted job is still leaving, and the kubelet goes on serving the immutable ConfigMap that it reads.
#[test]
fn a_job_that_is_applied_again_under_its_name_reads_its_own_configuration() {
    let map_of = |pod: &Value| {
        let volumes = pod["spec"]["volumes"].as_array().expect("volumes").iter();
        let sources = volumes.flat_map(|volume| volume["projected"]["sources"].as_array().into_iter().flatten());
        let mut maps = sources.filter(|source| source["configMap"]["items"][0]["key"] == "run.yaml");
        maps.next().expect("run.yaml is mounted")["configMap"]["name"].as_str().expect("a name").to_owned()
    };
    simulate(async || {
        let simulation = Simulation::start(|about| {
            Life::of(about).leaving(Leaving::After(Duration::from_mins(2), Word::Silent(143)))
        });
        simulation.submit("bot", &json!({}));
        let runs =
            |simulation: &Simulation| simulation.pods("bot-").iter().any(|pod| pod["status"]["phase"] == "Running");
        simulation.until("its first pod runs", 60, runs).await;
        let old = map_of(&simulation.pods("bot-")[0]);
        simulation.delete("bot");
        simulation.submit("bot", &json!({"hyperparameters": {"epochs": "2"}}));
        let another = |simulation: &Simulation| simulation.server.list(Kind::Pod).len() == 2;
        simulation.until("the new job's pod is made while the old one leaves", 100, another).await;
        let new = map_of(&simulation.pods("bot-")[1]);
        assert_ne!(old, new);
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
    });
}
