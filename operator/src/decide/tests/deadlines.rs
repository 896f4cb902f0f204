//! Deadlines, and what is left to do after the end.

use super::*;

#[test]
fn deadlines_end_a_job_and_take_its_pod_away() {
    let mut world = training(&json!({"activeDeadlineSeconds": 100}));
    world.wait(101);
    world.pass();
    assert_eq!(world.made.last().map(String::as_str), Some("-bot-train-1"));
    assert!(!is_terminal(&world.status()), "what it did is read first");
    world.pass();
    world.read_volume(Some(failed(ExitCode::Preempted)));
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "DeadlineExceeded");

    let mut world = World::new(&json!({"startDeadlineSeconds": 60}));
    world.start();
    world.wait(61);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "StartDeadlineExceeded");
}

#[test]
fn a_deadline_does_not_end_what_is_trained_and_counts_what_it_ends() {
    let mut world = training(&json!({"activeDeadlineSeconds": 100}));
    world.wait(100);
    world.end(0, Some(validated(Verdict::Better)));
    world.attempt().pods[0].running = false;
    world.start();
    assert_eq!(world.status().phase, Some(Phase::Publishing));
    world.wait(1000);
    world.pass();
    assert_eq!(world.status().phase, Some(Phase::Publishing), "publishing is no training");

    let mut world = training(&json!({"activeDeadlineSeconds": 100}));
    world.wait(120);
    world.pass();
    world.pass();
    world.read_volume(None);
    world.pass();
    assert_eq!(world.status().usage.map(|usage| usage.gpu_seconds), Some(120));
    assert_eq!(world.current().outcome, Some(AttemptOutcome::Final));
}

#[test]
fn a_start_deadline_counts_from_the_resumption_and_for_jobs_that_are_not_accepted() {
    let mut world = World::new(&json!({"suspend": true, "startDeadlineSeconds": 600}));
    world.pass();
    world.wait(3600);
    world.job.spec.suspend = false;
    world.pass();
    assert!(!is_terminal(&world.status()), "{:?}", world.status());
    world.wait(599);
    world.pass();
    assert!(!is_terminal(&world.status()), "{:?}", world.status());
    world.wait(1);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "StartDeadlineExceeded");
    let mut world = World::new(&json!({"profile": "h100", "startDeadlineSeconds": 600}));
    assert_eq!(world.pass().wake, Some(Duration::from_secs(599)));
    world.wait(600);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "StartDeadlineExceeded");
}

#[test]
fn a_finished_job_is_deleted_when_its_time_is_over() {
    let mut world = World::new(&json!({"ttlSecondsAfterFinished": 60}));
    world.start();
    world.end(65, None);
    assert_eq!(world.pass().wake, Some(Duration::from_mins(1)));
    world.wait(61);
    assert_eq!(world.pass().wake, Some(Duration::ZERO));
}
