//! What the API server, the Job controller and the kubelet do not take is told in their own words within twenty seconds, and the
//! job goes on when it is mended.

use crds::run::PodStage;
use harness::apiserver::{About, Calls, Fault, Kind, Life, Simulation, Turn, Verb, Word};
use serde_json::json;

use super::{complete, outcomes, simulate, train};

/// From the trouble to its condition.
const TOLD_WITHIN: u64 = 20;
/// A webhook that nobody answers.
const WEBHOOK: &str = "Internal error occurred: failed calling webhook \"policy.example\": dial tcp 10.0.0.1:443: connect: connection refused";

/// A training pod that vanishes once: its report is read from the volume.
fn vanishing(about: &About) -> Life {
    match (about.stage, about.attempt) {
        (PodStage::Train, 1) => Life::running().then(10, Turn::Checkpoint(10)).then(1, Turn::Vanish),
        _ => Life::of(about),
    }
}

#[test]
fn a_child_that_is_refused_is_told_and_made_when_it_can_be() {
    let cases = [
        (Kind::ConfigMap, "bot"),
        (Kind::PersistentVolumeClaim, "bot"),
        (Kind::Job, "bot-prepare-1"),
        (Kind::Job, "bot-train-1"),
        (Kind::Job, "bot-train-1-report"),
        (Kind::Job, "bot-publish-1"),
    ];
    let refusals = [
        (500, WEBHOOK),
        (403, "exceeded quota: team, requested: count/jobs.batch=1, used: 10, limited: 10"),
        (422, "is invalid: spec.template.spec.priorityClassName: no PriorityClass with name high was found"),
        (504, "Timeout: request did not complete within requested timeout"),
    ];
    for (kind, name) in cases {
        for (code, sentence) in refusals {
            simulate(async || {
                let simulation = Simulation::start(vanishing);
                simulation
                    .server
                    .inject(Calls::to(Verb::Create, kind).named(name).always(), Fault::Refused(code, sentence.into()));
                simulation.submit("bot", &json!({}));
                let refused =
                    |simulation: &Simulation| simulation.server.noted().iter().any(|noted| noted.code == Some(code));
                simulation.until("it is refused", 300, refused).await;
                let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "ChildCreationFailed";
                simulation.until(&format!("{code} for {name} is told"), TOLD_WITHIN, told).await;
                let message = simulation.condition("bot", "Running").2;
                for words in ["cannot create", kind.name(), name, sentence] {
                    assert!(message.contains(words), "no {words:?} in {message:?}");
                }
                simulation.pass(600).await;
                assert!(!simulation.has_ended("bot"), "{}", simulation.account());
                simulation.server.heal();
                assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
            });
        }
    }
}

#[test]
fn pods_that_are_refused_are_told_by_the_job_controllers_event() {
    for sentence in [
        "pods \"bot-train-1-\" is forbidden: exceeded quota: gpu, requested: requests.nvidia.com/gpu=1, used: 4, limited: 4",
        WEBHOOK,
        "pods \"bot-train-1-\" is forbidden: violates PodSecurity \"restricted:latest\": runAsUser=0",
    ] {
        simulate(async || {
            let simulation = Simulation::start(Life::of);
            simulation.submit("bot", &json!({}));
            let prepared = |simulation: &Simulation| {
                simulation.outcomes("bot").iter().any(|(name, outcome)| name == "bot-prepare-1" && outcome == "Done")
            };
            simulation.until("it has prepared", 60, prepared).await;
            simulation.cluster.refuse_pods(Some(sentence));
            let told = |simulation: &Simulation| simulation.condition("bot", "Running").2.contains(sentence);
            simulation.until("it is told", TOLD_WITHIN, told).await;
            assert_eq!(simulation.reason("bot", "Running"), "ChildCreationFailed");
            simulation.pass(1800).await;
            assert!(simulation.condition("bot", "Running").2.contains(sentence), "{}", simulation.account());
            simulation.cluster.refuse_pods(None);
            assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        });
    }
}

#[test]
fn volumes_that_do_not_mount_are_told_in_the_kubelets_words() {
    for (why, sentence) in [
        (
            "FailedMount",
            "MountVolume.SetUp failed for volume \"pv-1\" : rpc error: code = Internal desc = mount failed: exit status 32",
        ),
        (
            "FailedAttachVolume",
            "Multi-Attach error for volume \"pv-1\" Volume is already exclusively attached to one node",
        ),
    ] {
        simulate(async || {
            let warned = move |_: &About| {
                Life::new()
                    .then(1, Turn::Schedule)
                    .then(2, Turn::Warn(why.into(), sentence.into()))
                    .then(600, Turn::Run)
                    .then(20, Turn::End(Word::Done))
            };
            let simulation = Simulation::start(train(warned));
            simulation.submit("bot", &json!({}));
            simulation.until("its pod is made", 60, |simulation| !simulation.pods("bot-train").is_empty()).await;
            let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "MountFailed";
            simulation.until("it is told", TOLD_WITHIN + 3, told).await;
            assert!(simulation.condition("bot", "Running").2.contains(sentence));
            assert_eq!(simulation.end("bot", 900).await, complete(), "{}", simulation.account());
            assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Done"]);
        });
    }
}

#[test]
fn an_image_that_cannot_be_pulled_is_told_and_waited_for() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| {
            let wait = |reason: &str, message: &str| Turn::Wait("trainer".into(), reason.into(), message.into());
            Life::new()
                .then(1, Turn::Schedule)
                .then(1, wait("ErrImagePull", "manifest unknown"))
                .then(10, wait("ImagePullBackOff", "Back-off pulling image"))
                .then(300, Turn::Run)
                .then(10, Turn::End(Word::Done))
        }));
        simulation.submit("bot", &json!({}));
        let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "ImagePullFailed";
        simulation.until("it is told", 60, told).await;
        assert!(simulation.condition("bot", "Running").2.contains("manifest unknown"));
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
    });
}

/// What would only be told better is no reason to stand still.
#[test]
fn rights_that_are_missing_keep_no_job_from_its_way() {
    let rights = [
        (Verb::List, Kind::Event),
        (Verb::Create, Kind::Event),
        (Verb::List, Kind::Node),
        (Verb::List, Kind::StorageClass),
    ];
    for (verb, kind) in rights {
        simulate(async || {
            let simulation = Simulation::start(Life::of);
            let sentence = format!("{} is forbidden: User \"operator\" cannot {} it", kind.plural(), verb.name());
            simulation.server.inject(Calls::to(verb, kind).always(), Fault::Refused(403, sentence));
            simulation.submit("bot", &json!({}));
            assert_eq!(simulation.end("bot", 300).await, complete(), "{}", simulation.account());
        });
    }
}

/// Events only tell: a store of them that is down stops nobody, and deadlines bite.
#[test]
fn events_that_cannot_be_listed_stop_no_job() {
    let down = || Fault::Refused(500, "etcdserver: request timed out".into());
    for (what, fault) in [("down", down()), ("hung", Fault::Hangs)] {
        simulate(async || {
            let simulation = Simulation::start(Life::of);
            simulation.server.inject(Calls::to(Verb::List, Kind::Event).always(), fault);
            simulation.submit("bot", &json!({}));
            assert_eq!(simulation.end("bot", 600).await, complete(), "{what}\n{}", simulation.account());
        });
    }
}

/// The word to stop cannot be told, and training goes on until it can.
#[test]
fn a_word_to_stop_that_is_refused_disturbs_no_attempt() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| Life::running().then(300, Turn::End(Word::Done))));
        simulation.submit("bot", &json!({}));
        let trains = |simulation: &Simulation| {
            simulation.pods("bot-train").len() == 1 && simulation.reason("bot", "Running") == "PodRunning"
        };
        simulation.until("it trains", 60, trains).await;
        simulation
            .server
            .inject(Calls::to(Verb::Create, Kind::ConfigMap).always(), Fault::Refused(500, WEBHOOK.into()));
        simulation.edit("bot", |spec| spec["stopRequested"] = json!(true));
        simulation.pass(60).await;
        let (running, reason, message) = simulation.condition("bot", "Running");
        assert_eq!((running.as_str(), reason.as_str()), ("True", "PodRunning"), "it trains on");
        assert!(message.contains("it was not told to stop yet") && message.contains(WEBHOOK), "{message}");
        assert_eq!(simulation.job("bot")["status"]["phase"], "Training");
        simulation.server.heal();
        simulation
            .until("it is told to stop", 60, |simulation| simulation.server.list(Kind::ConfigMap).len() == 2)
            .await;
        assert_eq!(simulation.end("bot", 600).await, complete(), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Done"]);
    });
}
