//! The board and the turns by themselves, and trainers of all kinds behind real sockets.

mod trainers;

use crds::report::{CheckpointInfo, MetricValue, Stage};
use crds::run::PodStage;

use self::trainers::{Trainer, Trainers};
use super::turns::Standing;
use super::*;

fn progress(attempt: i32, step: i64) -> Progress {
    Progress {
        job_uid: "u".into(),
        pod_uid: format!("pod-{attempt}"),
        pod_stage: Some(PodStage::Train),
        attempt,
        step,
        stage: Stage::Training,
        ..Progress::default()
    }
}

#[test]
fn progress_does_not_go_back_and_is_written_seldom() {
    let board = ProgressBoard::default();
    let (hour, now) = (Duration::from_hours(1), Instant::now());
    assert!(board.note(progress(1, 5), hour, now), "the first one is news");
    assert!(!board.note(progress(1, 6), hour, now), "the next one can wait");
    assert_eq!(board.get("pod-1", "u").map(|progress| progress.step), Some(6));
    assert_eq!(board.get("pod-1", "v"), None, "the pod of one job tells nothing of another");
    assert!(!board.note(progress(1, 4), Duration::ZERO, now), "an answer that was under way for long");
    assert_eq!(board.get("pod-1", "u").map(|progress| progress.step), Some(6));
    assert!(board.note(progress(2, 4), Duration::ZERO, now), "the next attempt begins before where this one ended");
    let evaluating = Progress { stage: Stage::Evaluating, ..progress(2, 4) };
    assert!(board.note(evaluating, hour, now), "another stage is news");
    board.retain(|_| false);
    assert_eq!(board.get("pod-2", "u"), None);
}

#[test]
fn a_silence_that_lasts_is_news_once_and_an_answer_ends_it() {
    let board = ProgressBoard::default();
    let (hour, start) = (Duration::from_hours(1), Instant::now());
    let at = |seconds| start + Duration::from_secs(seconds);
    let why = || board.silence("pod-1").map(|silence| silence.why);
    assert!(board.note(progress(1, 5), hour, start) && why().is_none());
    board.note_silence("pod-1", "connection refused".into(), at(15));
    let since = board.silence("pod-1").expect("silent").since;
    assert!(board.newly_silent(at(74)).is_empty(), "not yet for a minute");
    assert_eq!(board.newly_silent(at(75)), ["pod-1"]);
    assert!(board.newly_silent(at(600)).is_empty(), "and it is told once");
    for (seconds, told, expected) in [
        (90, "connection timed out", "connection refused"),
        // Causes that take turns are not told in turns.
        (105, "connection refused", "connection refused"),
        (120, "connection timed out", "connection refused"),
        (135, "connection timed out", "connection timed out"),
    ] {
        board.note_silence("pod-1", told.into(), at(seconds));
        assert_eq!(why().as_deref(), Some(expected), "after {seconds} s");
    }
    assert_eq!(board.silence("pod-1").expect("still").since, since, "it is one silence");
    assert_eq!(board.newly_silent(at(136)), ["pod-1"], "another cause is news");
    assert!(board.note(progress(1, 5), hour, at(150)), "and so is its end, though the step is the same");
    assert_eq!(why(), None);
    board.note_silence("pod-1", "connection refused".into(), at(165));
    assert!(!board.note(progress(1, 6), hour, at(180)), "what passes before it is told is no news");
    board.note_silence("never-heard", "connection timed out".into(), at(200));
    assert_eq!(board.newly_silent(at(300)), ["never-heard"]);
}

fn pod(uid: &str) -> Asked {
    Asked {
        job: ObjectRef::new(uid).within("team"),
        job_uid: "u".into(),
        pod_uid: uid.into(),
        address: SocketAddr::from(([127, 0, 0, 1], 1)),
    }
}

/// A thousand pods that use up every question's deadline, and pods that answer within 50 ms: by the clock of the test.
#[test]
fn a_thousand_silent_pods_delay_nobody_who_answers() {
    const INTERVAL: Duration = Duration::from_secs(15);
    let start = Instant::now();
    let mut turns = Turns::new(INTERVAL);
    let good: Vec<Asked> = (0..500).map(|number| pod(&format!("good-{number}"))).collect();
    let bad: Vec<Asked> = (0..1000).map(|number| pod(&format!("bad-{number}"))).collect();
    let all: Vec<Asked> = good.iter().chain(&bad).cloned().collect();
    let takes = |turn: &turns::Turn| {
        if turn.asked.pod_uid.starts_with("good") { Duration::from_millis(50) } else { question::DEADLINE }
    };
    let mut heard: HashMap<String, Instant> = HashMap::new();
    let mut under_way: Vec<(Instant, turns::Turn)> = Vec::new();
    let most = Standing::Prompt.places() + Standing::New.places() + Standing::Slow.places();
    let mut now = start;
    turns.follow(good.clone(), now);
    let mut are_all_there = false;
    while now < start + Duration::from_mins(5) {
        // The others come when these are known.
        if !are_all_there && now > start + Duration::from_secs(20) {
            turns.follow(all.clone(), now);
            are_all_there = true;
        }
        while let Some(turn) = turns.next(now) {
            under_way.push((now + takes(&turn), turn));
        }
        assert!(under_way.len() <= most, "{} questions at once", under_way.len());
        let next = under_way.iter().map(|(ends, _)| *ends).chain(turns.wake()).min().expect("something is to come");
        now = next.max(now);
        for (_, turn) in under_way.extract_if(.., |(ends, _)| *ends <= now) {
            let uid = turn.asked.pod_uid.clone();
            let is_good = uid.starts_with("good");
            turns.ended(&turn, is_good, now);
            if is_good && let Some(before) = heard.insert(uid.clone(), now) {
                let gap = now.duration_since(before);
                assert!(gap <= INTERVAL + Duration::from_millis(500), "{uid} was not heard for {gap:?}");
            }
        }
    }
    assert_eq!(heard.len(), 500);
    turns.follow(Vec::new(), now);
    for (_, turn) in under_way {
        turns.ended(&turn, false, now);
    }
    assert_eq!((turns.len(), turns.wake()), (0, None), "whatever ran and was asked is forgotten");
}

#[tokio::test]
async fn what_is_not_the_trainers_answer_has_a_short_reason_in_time() {
    let good = || serde_json::to_string(&progress(1, 5)).expect("JSON");
    let cases = [
        (Trainer::NeverAnswers, "connected, and no whole answer within 2 s"),
        (Trainer::Drips, "connected, and no whole answer within 2 s"),
        (Trainer::Endless, "an answer of more than 64 KiB"),
        (Trainer::EndlessHead, "an answer of more than 64 KiB"),
        (Trainer::Says { status: "200 OK", body: " ".repeat(1 << 20) }, "an answer of more than 64 KiB"),
        (Trainer::Refuses, "connection refused"),
        (Trainer::Says { status: "404 Not Found", body: good() }, "answered 404"),
        (Trainer::Says { status: "302 Found", body: String::new() }, "answered 302"),
        (Trainer::Says { status: "200 OK", body: "hello".into() }, "not the trainer's answer"),
        (Trainer::Says { status: "200 OK", body: "[".repeat(60_000) }, "not the trainer's answer"),
        (Trainer::Raw("SSH-2.0-OpenSSH_9.2\r\n"), "not the trainer's answer"),
        (Trainer::Raw("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"), "not the trainer's answer"),
        (Trainer::Raw(""), "not the trainer's answer"),
        (Trainer::Says { status: "200 OK", body: good().replace("pod-1", "pod-2") }, "the trainer of another pod"),
        (Trainer::Says { status: "200 OK", body: good() }, ""),
    ];
    let mut trainers = Trainers::default();
    let mut questions = Vec::new();
    for (trainer, expected) in cases {
        let told = format!("{trainer:?}").chars().take(80).collect::<String>();
        let asked = Asked { address: trainers.start(trainer).await, ..pod("pod-1") };
        questions.push(async move {
            let began = Instant::now();
            let why = question::ask(&asked).await.err().unwrap_or_default();
            (told, why, expected, began.elapsed())
        });
    }
    for (told, why, expected, took) in futures::future::join_all(questions).await {
        assert_eq!(why, expected, "{told}");
        assert!(took < question::DEADLINE + Duration::from_secs(2), "{told}: after {took:?}");
    }
}

#[tokio::test]
async fn no_more_is_kept_of_a_pod_than_a_status_has_room_for() {
    let metric = |number: usize| MetricValue { name: format!("{number:0>40}"), value: 1.0 };
    let checkpoint = |step| CheckpointInfo { step, time: "2026-01-01T00:00:00Z".into(), eval_loss: None, best: false };
    let mut told = progress(1, 5);
    told.metrics = (0..400).map(metric).collect();
    told.metrics.insert(0, MetricValue { name: "n".repeat(65), value: 1.0 });
    told.checkpoints = (0..400).map(checkpoint).collect();
    told.last_report_time = "t".repeat(1000);
    let body = serde_json::to_string(&told).expect("JSON");
    let mut trainers = Trainers::default();
    let address = trainers.start(Trainer::Says { status: "200 OK", body }).await;
    let kept = question::ask(&Asked { address, ..pod("pod-1") }).await.expect("an answer");
    assert_eq!((kept.metrics.len(), kept.checkpoints.len()), (64, 64));
    let heard: Timestamp = kept.last_report_time.parse().expect("a time");
    assert!(Timestamp::now().duration_since(heard).as_secs() < 60, "by this clock: {heard}");
    assert_eq!((kept.metrics[0].name.len(), kept.checkpoints[63].step), (40, 399), "the newest checkpoints");
}

/// Among many good ones: one that never answers, one that drips, one endless, one huge.
#[tokio::test]
async fn trainers_are_heard_in_their_interval_whatever_others_do() {
    const GOOD: usize = 150;
    const ROUNDS: usize = 4;
    let interval = Duration::from_secs(1);
    let mut trainers = Trainers::default();
    let mut running = Vec::new();
    for trainer in [
        Trainer::NeverAnswers,
        Trainer::Drips,
        Trainer::Endless,
        Trainer::Says { status: "200 OK", body: " ".repeat(1 << 20) },
    ] {
        let uid = format!("{trainer:?}").chars().take(6).collect::<String>();
        running.push(Asked { address: trainers.start(trainer).await, ..pod(&uid) });
    }
    for number in 0..GOOD {
        let uid = format!("good-{number}");
        let body = serde_json::to_string(&Progress { pod_uid: uid.clone(), ..progress(1, 5) }).expect("JSON");
        running.push(Asked { address: trainers.start(Trainer::Says { status: "200 OK", body }).await, ..pod(&uid) });
    }
    let board = ProgressBoard::default();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (good, bad) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let count = |ok| if ok { good.set(good.get() + 1) } else { bad.set(bad.get() + 1) };
    let asking = ask_in_turn(|| running.clone(), &board, Intervals { poll: interval, write: interval }, &tell, count);
    let began = Instant::now();
    let all_were_asked = trainers.until(|asked| asked.iter().skip(4).all(|times| *times >= ROUNDS));
    tokio::select! {
        () = asking => panic!("it ended"),
        () = all_were_asked => {}
    }
    // One round at once, three after an interval each. Where the slow ones are waited for, each takes two seconds more.
    let took = began.elapsed();
    assert!(took < interval * 3 + Duration::from_millis(2500), "{ROUNDS} rounds took {took:?}");
    for number in 0..GOOD {
        let uid = format!("good-{number}");
        assert!(board.get(&uid, "u").is_some() && board.silence(&uid).is_none(), "{uid}");
    }
    assert_eq!(
        board.silence("Drips").map(|silence| silence.why).as_deref(),
        Some("connected, and no whole answer within 2 s")
    );
    assert!(good.get() >= GOOD * (ROUNDS - 1) && bad.get() >= 4, "{} answers, {} failures", good.get(), bad.get());
    let mut jobs = HashSet::new();
    while let Ok(job) = told.try_recv() {
        jobs.insert(job);
    }
    assert!(jobs.len() == GOOD, "{} jobs were told of", jobs.len());
    let most = Standing::Prompt.places() + Standing::New.places() + Standing::Slow.places();
    assert!(trainers.most_open() <= most, "{} connections at once", trainers.most_open());
    // Nobody asks any more, and these servers close nothing by themselves.
    trainers.until_none_is_open().await;
}
