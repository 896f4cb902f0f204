//! A queue that holds Jobs and takes their pods away.

use super::*;

#[test]
fn a_queue_holds_evicts_and_takes_back_the_same_job() {
    let mut world = queued(json!({}));
    let held = |world: &mut World, queue| {
        world.hold(queue);
        world.attempt().pods.clear();
        world.pass();
    };
    assert_eq!(world.condition(condition::ADMITTED).1, "NoQueue", "the prepare Job, which has none, says nothing");
    held(&mut world, QueueSeen::ControllerMissing);
    assert_eq!(world.condition(condition::ADMITTED).1, "QueueControllerMissing");
    held(&mut world, QueueSeen::Waiting("no quota".into()));
    assert_eq!(
        (world.status().phase, world.condition(condition::ADMITTED).1),
        (Some(Phase::Queued), "WaitingForQuota".into())
    );
    let uid = world.current().uid.expect("made");
    world.attempt().job = present(&uid, false);
    world.observed.queue = None;
    let started = Some(Time(world.now));
    world.attempt().pods = vec![PodSeen { live: true, running: true, started, ..PodSeen::default() }];
    world.pass();
    assert_eq!(world.condition(condition::ADMITTED), ("True".into(), "QuotaReserved".into(), String::new()));
    world.wait(100);
    held(&mut world, QueueSeen::Evicted("Preempted: by another".into()));
    world.wait(1000);
    held(&mut world, QueueSeen::Evicted("Preempted: by another".into()));
    assert_eq!(world.condition(condition::ADMITTED).1, "Evicted");
    let attempts = world.status().attempts.expect("attempts");
    assert_eq!((attempts.total, attempts.preempted), (1, 1), "one eviction, and the same attempt goes on");
    world.attempt().job = present(&uid, false);
    world.observed.queue = None;
    let started = Some(Time(world.now));
    world.attempt().pods = vec![PodSeen { live: true, running: true, started, ..PodSeen::default() }];
    world.pass();
    world.wait(50);
    held(&mut world, QueueSeen::Evicted("Preempted: by another".into()));
    let usage = world.status().usage.expect("usage");
    assert_eq!(usage.train_seconds, 150, "what it waited is not counted");
}

#[test]
fn evictions_are_bounded_like_other_preemptions() {
    let mut world = queued(json!({"failurePolicy": {"maxPreemptions": 1}}));
    for number in 1..=2 {
        let uid = world.current().uid.expect("made");
        world.attempt().job = present(&uid, false);
        world.observed.queue = None;
        // Its pod of before may still be on its way out: what it ran was counted.
        let (started, leaving) = (Some(Time(world.now)), world.now);
        world.attempt().pods = vec![PodSeen { live: true, running: true, started, ..PodSeen::default() }];
        world.pass();
        world.wait(10);
        world.hold(QueueSeen::Evicted("Preempted: by another".into()));
        world.pass();
        assert_eq!(world.status().usage.map(|usage| usage.train_seconds), Some(10 * number));
        let uid = world.current().uid.expect("made");
        world.attempt().job = present(&uid, false);
        world.observed.queue = None;
        let started = Some(Time(leaving));
        world.attempt().pods =
            vec![PodSeen { live: true, ends_by: Some(Time(leaving)), started, ..PodSeen::default() }];
        world.pass();
    }
    assert_eq!(world.status().phase, Some(Phase::Failed));
    assert_eq!(world.condition(condition::FAILED).1, "PreemptionLimitExceeded");
}
