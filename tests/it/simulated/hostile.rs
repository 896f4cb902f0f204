//! Whatever a pod, the scheduler or the kubelet says, the status of its job can be written and the job comes to its end.

use crds::exit::ExitCode;
use crds::report::{CheckpointInfo, MetricValue, Report};
use harness::apiserver::{Life, Simulation, Turn, Word};
use serde_json::json;

use super::{complete, simulate, train};

fn metric(name: &str, value: f64) -> MetricValue {
    MetricValue { name: name.to_owned(), value }
}

#[test]
fn what_a_report_says_never_makes_a_status_unwritable() {
    let reports: [(&str, fn(&mut Report)); 8] = [
        ("a long name", |report| report.metrics.push(metric(&"m".repeat(64), 1.0))),
        ("a name of many bytes", |report| report.metrics.push(metric(&"ü".repeat(40), 1.0))),
        ("no name", |report| report.metrics.push(metric("", 1.0))),
        ("a name twice", |report| report.metrics.extend([metric("trainLoss", 1.0), metric("trainLoss", 2.0)])),
        ("many names", |report| report.metrics.extend((0..60).map(|index| metric(&format!("m{index}"), 1.0)))),
        ("control characters", |report| report.metrics.push(metric("loss\u{1b}[31m\n", 1.0))),
        ("numbers of any size", |report| {
            report.metrics.push(metric("huge", f64::MAX));
            report.metrics.push(metric("tiny", f64::MIN_POSITIVE));
            (report.step, report.total_steps) = (i64::MAX, i64::MIN);
            report.usage.train_seconds = f64::MAX;
        }),
        ("checkpoints of any number", |report| {
            let checkpoint =
                |step| CheckpointInfo { step, time: "yesterday".into(), eval_loss: Some(f64::MAX), best: true };
            report.checkpoints = (0..20).map(checkpoint).collect();
            report.model_revision = Some("r".repeat(1000));
        }),
    ];
    for (what, change) in reports {
        simulate(async || {
            let simulation =
                Simulation::start(train(move |_| Life::running().then(10, Turn::End(Word::Told(0, change)))));
            simulation.submit("bot", &json!({}));
            assert_eq!(simulation.end("bot", 300).await, complete(), "{what}\n{}", simulation.account());
        });
    }
}

/// What is no report of this attempt is none at all.
#[test]
fn last_words_that_are_none_are_not_repeated() {
    for word in ["not json", "{}", "{\"jobUid\": \"another\"}", "\u{1b}[2J\u{0}"] {
        simulate(async || {
            let last = word.to_owned();
            let simulation =
                Simulation::start(train(move |_| Life::running().then(10, Turn::End(Word::Message(70, last.clone())))));
            simulation.submit("bot", &json!({"failurePolicy": {"maxRetries": 0}}));
            let (kind, reason) = simulation.end("bot", 600).await;
            assert_eq!(
                (kind.as_str(), reason.as_str()),
                ("Failed", "BackoffLimitExceeded"),
                "{word:?}\n{}",
                simulation.account()
            );
            let status = simulation.job("bot")["status"].to_string();
            assert!(!status.contains("not json") && !status.contains("\\u001b"), "{status}");
        });
    }
}

#[test]
fn sentences_of_any_length_and_form_are_told_in_part() {
    let long = "0/5000 nodes are available: ".to_owned() + &"untolerated taint {x}, ".repeat(4000);
    let odd = format!("\u{1b}[31m{}\u{0}\n\n", "ü".repeat(20_000));
    for sentence in [long, odd] {
        for turn in [
            Turn::Unschedulable(sentence.clone()),
            Turn::Wait("trainer".into(), "ErrImagePull".into(), sentence.clone()),
            Turn::Evict(sentence.clone()),
            Turn::Disrupt(sentence.chars().take(40).collect()),
        ] {
            simulate(async || {
                let turn = turn.clone();
                let simulation = Simulation::start(train(move |about| {
                    let troubled = Life::new().then(1, turn.clone());
                    if about.attempt == 1 { troubled.then(60, Turn::Vanish) } else { Life::of(about) }
                }));
                simulation.submit("bot", &json!({}));
                simulation
                    .until("it has ended, or is told", 900, |simulation| {
                        simulation.has_ended("bot") || simulation.outcomes("bot").len() > 2
                    })
                    .await;
                let status = simulation.job("bot")["status"].to_string();
                assert!(status.len() < 16_384, "{} bytes", status.len());
            });
        }
    }
}

/// A failure's message is a trainer's, and trainers quote files.
#[test]
fn a_failure_that_quotes_a_file_is_told_in_part() {
    simulate(async || {
        let simulation = Simulation::start(train(|_| {
            let quote = format!("train.jsonl: line 7: {}\u{1b}[31m", "\"ü\" ".repeat(3000));
            Life::running().then(10, Turn::End(Word::Failed(ExitCode::BadData, quote)))
        }));
        simulation.submit("bot", &json!({}));
        let (kind, reason) = simulation.end("bot", 300).await;
        assert_eq!((kind.as_str(), reason.as_str()), ("Failed", "BadData"), "{}", simulation.account());
        assert!(simulation.condition("bot", "Failed").2.contains("train.jsonl: line 7"));
        let status = simulation.job("bot")["status"].to_string();
        assert!(status.len() < 16_384 && !status.contains("\\u001b"), "{} bytes", status.len());
    });
}
