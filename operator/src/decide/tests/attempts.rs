//! How attempts end, what they are counted as, and when the next one begins.

use super::*;

#[test]
fn fifty_preemptions_are_no_failures() {
    let mut world = training(&json!({"failurePolicy": {"maxRetries": 0, "maxPreemptions": 50}}));
    for step in 1..=50 {
        world.end(75, Some(Report { last_checkpoint_step: Some(step), ..failed(ExitCode::Preempted) }));
        world.pass();
        world.wait(11);
        world.start();
    }
    let attempts = world.status().attempts.expect("attempts");
    assert_eq!((attempts.total, attempts.failed, attempts.preempted), (51, 0, 50));
    assert_eq!(world.status().job_refs.len(), LISTED_ATTEMPTS);
    assert_eq!(world.current().name, "bot-train-51");
    world.end(75, Some(Report { last_checkpoint_step: Some(51), ..failed(ExitCode::Preempted) }));
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "PreemptionLimitExceeded");
}

#[test]
fn failures_are_counted_and_waited_for() {
    let mut world = training(&json!({"failurePolicy": {"maxRetries": 2}}));
    for (failure, step) in [(1, 5), (2, 6)] {
        world.end(70, Some(Report { last_checkpoint_step: Some(step), ..failed(ExitCode::InternalError) }));
        let next = world.pass();
        assert!(next.wake.is_some_and(|wake| wake > Duration::from_secs(5)), "{:?}", next.wake);
        assert_eq!(world.status().attempts.map(|attempts| attempts.failed), Some(failure));
        assert!(world.current().outcome.is_some(), "the next attempt waits");
        world.wait(60);
        world.start();
    }
    assert_eq!(world.made.last().map(String::as_str), Some("bot-train-3"));
    world.end(70, None);
    world.pass();
    world.read_volume(None);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "BackoffLimitExceeded");
}

#[test]
fn three_lives_without_a_checkpoint_end_a_job() {
    let mut world = training(&json!({}));
    for life in 1..=3 {
        world.end(137, None);
        world.pass();
        assert_eq!(world.current().outcome, None, "the volume is asked before a life is spent");
        world.read_volume(Some(Report { from_volume: true, ..Report::default() }));
        world.pass();
        if life < 3 {
            world.wait(60);
            world.start();
        }
    }
    assert_eq!(world.condition(condition::FAILED).1, "NoProgress");
}

#[test]
fn killed_attempts_that_left_checkpoints_are_progress() {
    let mut world = training(&json!({"failurePolicy": {"maxRetries": 9}}));
    for step in 1..=5 {
        // Told while it ran; nothing is left of the trainer when it is read.
        world.job.status.as_mut().expect("a status").checkpoints =
            vec![crds::finetunejob::CheckpointStatus { step, time: None, eval_loss: None, best: false }];
        world.end(137, None);
        world.pass();
        world.wait(400);
        world.start();
    }
    assert_eq!(world.current().name, "bot-train-6");
    assert_eq!(world.status().attempts.map(|attempts| attempts.without_checkpoint), Some(0));
}

#[test]
fn a_life_counts_when_a_trainer_ran() {
    let mut world = training(&json!({}));
    for number in 1..=4 {
        let taken = PodSeen {
            ends_by: Some(Time(world.now)),
            disrupted: Some("EvictionByEvictionAPI".into()),
            ..PodSeen::default()
        };
        let uid = world.current().uid.expect("made");
        world.attempt().job = present(&uid, true);
        world.attempt().pods = vec![taken];
        world.observed.report_job = Some(AttemptSeen { job: present("report", true), ..AttemptSeen::default() });
        world.pass();
        assert_eq!(world.status().attempts.map(|attempts| attempts.preempted), Some(number));
        assert!(!is_terminal(&world.status()), "{:?}", world.status());
        world.wait(60);
        world.pass();
        world.pass();
    }
}

#[test]
fn the_next_attempt_waits_until_no_pod_of_the_last_is_left() {
    let mut world = training(&json!({}));
    let uid = world.current().uid.expect("made");
    // A lost node: the Job controller gave up, the pod is Terminating and may still write.
    world.attempt().job = present(&uid, true);
    world.attempt().pods[0].ends_by = Some(Time(world.now));
    world.attempt().pods[0].disrupted = Some("DeletionByTaintManager".into());
    world.attempt().pods[0].node = Some("gpu-7".into());
    world.wait(10);
    assert!(world.pass().wake.is_some_and(|wake| wake <= Duration::from_secs(30)));
    assert_eq!(world.condition(condition::RUNNING).1, "Preempted");
    world.wait(1000);
    world.pass();
    assert_eq!(world.current().name, "bot-train-1");
    let (_, reason, message) = world.condition(condition::RUNNING);
    assert_eq!(reason, "NodeLost");
    for advice in [
        "kubectl taint nodes gpu-7 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
        "kubectl delete node gpu-7",
    ] {
        assert!(message.contains(advice), "{message}");
    }
    world.lose_the_node();
    world.pass();
    world.read_volume(Some(Report { from_volume: true, ..Report::default() }));
    world.pass();
    world.wait(11);
    world.start();
    assert_eq!(world.current().name, "bot-train-2");
    assert_eq!(world.status().attempts.map(|attempts| attempts.preempted), Some(1));
}

#[test]
fn a_pod_that_is_gone_is_read_from_the_volume() {
    let mut world = training(&json!({}));
    let current = world.current();
    world.attempt().job = JobSeen::Missing;
    world.attempt().pods.clear();
    world.pass();
    assert_eq!(world.made.last().map(String::as_str), Some("bot-train-1-report"));
    world.read_volume(Some(validated(Verdict::Better)));
    world.pass();
    assert_eq!(
        world.status().job_refs.iter().find(|a| a.name == current.name).and_then(|a| a.outcome),
        Some(AttemptOutcome::Done)
    );
}

#[test]
fn a_report_of_another_attempt_is_not_accepted() {
    let mut world = training(&json!({}));
    let foreign = Report { job_uid: UID.into(), pod_stage: Some(PodStage::Train), attempt: 7, ..Report::default() };
    for message in [foreign.termination_message(), "{\"jobUid\":".into(), "panic at line 3".into()] {
        world.end(0, None);
        world.attempt().pods[0].terminated.as_mut().expect("ended").message = Some(message);
        world.pass();
        assert_eq!(world.current().outcome, None);
    }
    assert_eq!(world.made.last().map(String::as_str), Some("bot-train-1-report"));
}
