//! Attempts: what counts as a life, what a volume knows of it, and sources that are away for an hour.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crds::exit::ExitCode;
use crds::run::PodStage;
use harness::apiserver::{Leaving, Life, Simulation, Turn, Word};
use serde_json::json;
use tokio::time::Instant;

use super::{complete, failed, outcomes, simulate, train};

const HOUR: u64 = 3600;

/// A spot machine that goes after an hour: its pod is killed and says nothing.
fn spot(checkpoint: Option<i64>) -> Life {
    let life = checkpoint.map_or(Life::running(), |step| Life::running().then(HOUR / 2, Turn::Checkpoint(step)));
    life.then(HOUR / 2, Turn::Disrupt("DeletionByPodGC".into()))
        .leaving(Leaving::After(Duration::from_secs(30), Word::Silent(137)))
}

/// Where `/status` cannot be reached the volume is the only one who knows of checkpoints.
#[test]
fn lives_with_checkpoints_that_nobody_heard_of_are_no_lives_without_progress() {
    simulate(async || {
        let simulation = Simulation::start(train(|about| match about.attempt {
            attempt @ 1..=5 => spot(Some(i64::from(attempt) * 100)),
            _ => Life::of(about),
        }));
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 10 * HOUR).await, complete(), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), [&["Preempted"; 5][..], &["Done"]].concat());
        let attempts = &simulation.job("bot")["status"]["attempts"];
        assert_eq!((attempts["preempted"].as_i64(), attempts["failed"].as_i64()), (Some(5), Some(0)));
        let found = simulation.account();
        assert!(attempts["withoutCheckpoint"] == 0, "{found}");
    });
}

#[test]
fn three_lives_without_a_checkpoint_end_a_job() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| spot(None)));
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 10 * HOUR).await, failed("NoProgress"), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Preempted"; 3]);
    });
}

/// Runs a job whose source of `stage` is down for so many hours.
fn check_outage(stage: PodStage, hours: u64) {
    simulate(async || {
        let began: Arc<OnceLock<Instant>> = Arc::default();
        let simulation = Simulation::start(move |about| {
            let down =
                about.stage == stage && began.get_or_init(Instant::now).elapsed() < Duration::from_secs(hours * HOUR);
            let word = Word::Failed(ExitCode::SourceUnavailable, "https://huggingface.co: connection refused".into());
            if down { Life::running().then(30, Turn::End(word)) } else { Life::of(about) }
        });
        simulation
            .submit("bot", &json!({"output": {"uri": "pvc://published/bot"}, "failurePolicy": {"maxRetries": 0}}));
        let told = |simulation: &Simulation| simulation.reason("bot", "Running") == "SourceUnavailable";
        simulation.until("the outage is told", 600, told).await;
        assert_eq!(simulation.end("bot", 100 * HOUR).await, complete(), "{}", simulation.account());
        let job = simulation.job("bot");
        let listed = outcomes(simulation.outcomes("bot"), stage.name());
        assert!(listed.iter().any(|outcome| outcome == "Unavailable"), "{listed:?}");
        assert!(job["status"]["attempts"]["failed"].as_i64().unwrap_or(0) == 0, "{job:#}");
    });
}

#[test]
fn sources_may_be_away_for_an_hour() {
    check_outage(PodStage::Prepare, 1);
    check_outage(PodStage::Publish, 1);
}

#[test]
fn a_failure_is_told_by_its_own_sentence() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| {
            Life::running()
                .then(10, Turn::End(Word::Failed(ExitCode::BadData, "train.jsonl: line 7: no answer".into())))
        }));
        simulation.submit("bot", &json!({}));
        assert_eq!(simulation.end("bot", 120).await, failed("BadData"));
        assert!(simulation.condition("bot", "Failed").2.contains("train.jsonl: line 7: no answer"));
        assert_eq!(simulation.job("bot")["status"]["phase"], "Failed");
    });
}

/// A trainer that filled its own disk or memory would do so again elsewhere.
#[test]
fn an_eviction_that_a_job_caused_itself_is_a_failure_with_its_cause() {
    simulate(async || {
        let sentence = "Usage of EmptyDir volume \"tmp\" exceeds the limit \"1Gi\". ";
        let simulation = Simulation::start(train(move |_| Life::running().then(30, Turn::Evict(sentence.into()))));
        simulation.submit("bot", &json!({"failurePolicy": {"maxRetries": 1}}));
        let (kind, reason) = simulation.end("bot", HOUR).await;
        assert_eq!((kind.as_str(), reason.as_str()), ("Failed", "BackoffLimitExceeded"), "{}", simulation.account());
        assert_eq!(outcomes(simulation.outcomes("bot"), "train"), ["Failed"; 2]);
        let message = simulation.condition("bot", "Failed").2;
        assert!(message.contains("EmptyDir volume \"tmp\" exceeds the limit"), "{message}");
    });
}
