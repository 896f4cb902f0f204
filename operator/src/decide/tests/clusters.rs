//! What the clusters that people have do to a job.

use super::*;
use crate::facts::{FailedInit, Silence, Stranger, Waiting, Warning};

#[test]
fn lives_that_nobody_heard_of_are_looked_up_before_they_are_spent() {
    let mut world = training(&json!({}));
    for life in 1..=4 {
        world.wait(3600);
        world.lose_the_node();
        world.pass();
        assert_eq!(world.condition(condition::RUNNING).1, "ReadingVolume");
        world.read_volume(Some(Report {
            from_volume: true,
            last_checkpoint_step: Some(100 * life),
            ..Report::default()
        }));
        world.pass();
        let attempts = world.status().attempts.expect("attempts");
        assert_eq!((attempts.preempted, attempts.without_checkpoint), (i32::try_from(life).expect("few"), 0));
        assert!(!is_terminal(&world.status()), "{:?}", world.condition(condition::FAILED));
        world.wait(11);
        world.start();
    }
    assert_eq!(world.current().name, "bot-train-5");
}

#[test]
fn a_volume_that_cannot_be_read_costs_no_life() {
    let mut world = training(&json!({}));
    for _ in 0..5 {
        world.lose_the_node();
        world.pass();
        world.read_volume(None);
        world.pass();
        world.wait(11);
        world.start();
    }
    let attempts = world.status().attempts.expect("attempts");
    assert_eq!((attempts.preempted, attempts.without_checkpoint), (5, 0));
    assert_eq!(world.status().phase, Some(Phase::Training));
}

#[test]
fn what_is_on_the_volume_is_no_last_word() {
    let mut world = training(&json!({}));
    world.attempt().job = JobSeen::Missing;
    world.attempt().pods.clear();
    world.pass();
    world.read_volume(Some(Report { from_volume: true, last_checkpoint_step: Some(7), ..Report::default() }));
    world.pass();
    assert_eq!(
        world.current().reason.as_deref(),
        Some("JobDeleted"),
        "that there is a checkpoint does not say how it ended"
    );
    assert_eq!(world.status().attempts.and_then(|attempts| attempts.checkpoint_step), Some(7));
}

#[test]
fn a_trainer_that_does_not_answer_is_told_of_and_goes_on() {
    let mut world = training(&json!({}));
    world.observed.silence = Some(Silence { since: world.now, why: "connection timed out".into() });
    world.wait(30);
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).2, "", "half a minute is nothing");
    world.wait(30);
    world.pass();
    let (status, reason, message) = world.condition(condition::RUNNING);
    assert_eq!((status.as_str(), reason.as_str()), ("True", "PodRunning"));
    assert!(message.contains("connection timed out") && message.contains("NetworkPolicy"), "{message}");
    let before = world.job.status.clone();
    world.wait(600);
    world.pass();
    assert_eq!(world.job.status, before, "the same silence is the same sentence");
}

#[test]
fn a_pod_of_a_job_that_is_gone_is_waited_for_before_its_attempt_is_made_again() {
    let mut world = World::new(&json!({}));
    world.pass();
    // Made, not noted, deleted by somebody: its pod has two minutes to go.
    let pod = PodSeen { name: "bot-prepare-1-x".into(), live: true, ..PodSeen::default() };
    world.attempt().strangers = vec![Stranger { pod, ..Stranger::default() }];
    world.pass();
    world.wait(60);
    world.pass();
    assert!(world.made.is_empty(), "{:?}", world.made);
    assert!(world.condition(condition::RUNNING).2.contains("bot-prepare-1-x"));
    world.attempt().strangers.clear();
    world.pass();
    assert_eq!(world.made, ["bot-prepare-1"]);
}

#[test]
fn a_job_that_ended_while_nobody_looked_is_not_late() {
    for spec in [json!({"startDeadlineSeconds": 60}), json!({"activeDeadlineSeconds": 60})] {
        let mut world = training(&spec);
        // The operator was down: it has not even seen that the trainer began.
        world.job.status.as_mut().and_then(|status| status.job_refs.last_mut()).expect("an attempt").start_time = None;
        world.wait(50);
        world.end(0, Some(validated(Verdict::Better)));
        world.wait(3600);
        world.pass();
        assert!(!is_terminal(&world.status()), "{spec}: {:?}", world.condition(condition::FAILED));
        world.start();
        world.end(0, Some(Report::default()));
        world.pass();
        assert_eq!(world.status().phase, Some(Phase::Succeeded), "{spec}");
    }
}

#[test]
fn a_job_that_a_queue_let_in_late_is_not_refused() {
    let mut world = World::new(&json!({}));
    world.pass();
    world.pass();
    let uid = world.current().uid.expect("made");
    world.wait(3600);
    let released = Some(Time(world.now));
    world.attempt().job = JobSeen::Present { uid, released, suspended: false, finished: false, failure: None };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "Pending", "it was let in this very second");
    world.wait(6);
    world.observed.warning =
        Some(Warning { reason: "FailedCreate".into(), message: "pods \"x\" is forbidden: exceeded quota: gpu".into() });
    world.pass();
    let (_, reason, message) = world.condition(condition::RUNNING);
    assert_eq!(reason, "ChildCreationFailed");
    assert!(message.contains("exceeded quota: gpu"), "{message}");
}

#[test]
fn a_volume_that_does_not_mount_is_told_in_the_kubelets_words() {
    let mut world = World::new(&json!({}));
    world.start();
    world.attempt().pods[0] = PodSeen { live: true, scheduled: true, ..PodSeen::default() };
    let sentence = "Multi-Attach error for volume \"pv\" Volume is already used by pod(s) x";
    world.observed.warning = Some(Warning { reason: "FailedAttachVolume".into(), message: sentence.into() });
    let next = world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "MountFailed");
    assert!(world.condition(condition::RUNNING).2.contains(sentence));
    assert!(next.wake.is_some_and(|wake| wake <= Duration::from_secs(20)), "{:?}", next.wake);
}

#[test]
fn the_trainers_exit_ends_an_attempt_whatever_runs_beside_it() {
    let mut world = World::new(&json!({}));
    world.start();
    let uid = world.current().uid.expect("made");
    world.end(0, Some(Report::default()));
    world.attempt().job = present(&uid, false);
    let pod = world.attempt().pods.last_mut().expect("a pod");
    (pod.live, pod.sidecars) = (true, vec!["istio-proxy".into()]);
    world.pass();
    assert_eq!(world.current().outcome, Some(AttemptOutcome::Done));
    assert_eq!(world.made.last().map(String::as_str), Some("-bot-prepare-1"), "nobody else ends the sidecar");
    world.start();
    assert_eq!(world.made.last().map(String::as_str), Some("bot-train-1"));
}

#[test]
fn a_deadline_bites_whatever_a_pod_does() {
    let mut world = training(&json!({"activeDeadlineSeconds": 100}));
    world.wait(101);
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "Stopping");
    // Its node is gone: the pod stays for ever.
    let pod = world.attempt().pods.last_mut().expect("a pod");
    (pod.live, pod.running) = (true, true);
    world.wait(1000);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "DeadlineExceeded");
}

#[test]
fn init_containers_of_others_are_told_by_name() {
    let mut world = World::new(&json!({}));
    world.start();
    let waiting =
        Waiting { container: "istio-init".into(), reason: "CrashLoopBackOff".into(), message: "back-off 10s".into() };
    world.attempt().pods[0] = PodSeen { live: true, waiting: Some(waiting), ..PodSeen::default() };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "InitContainerFailed");
    assert!(world.condition(condition::RUNNING).2.contains("istio-init"));
    world.attempt().pods[0] = PodSeen { live: true, running_init: Some("wait-for-db".into()), ..PodSeen::default() };
    world.pass();
    assert!(world.condition(condition::RUNNING).2.contains("wait-for-db"));
    let failed_init =
        FailedInit { container: "istio-init".into(), exit_code: 1, message: "iptables: Permission denied".into() };
    let uid = world.current().uid.expect("made");
    world.attempt().job = present(&uid, true);
    world.attempt().pods[0] = PodSeen { failed_init: Some(failed_init), ..PodSeen::default() };
    world.pass();
    let failure = world.status().last_failure.expect("it failed");
    assert_eq!(failure.reason, "InitContainerFailed");
    assert!(failure.message.contains("istio-init") && failure.message.contains("Permission denied"), "{failure:?}");
}

#[test]
fn a_source_that_is_down_is_waited_for_without_counting() {
    let mut world = World::new(&json!({"failurePolicy": {"maxRetries": 0}}));
    world.start();
    let mut waited = 0;
    for _ in 0..12 {
        world.end(69, Some(failed(ExitCode::SourceUnavailable)));
        world.pass();
        let (_, reason, _) = world.condition(condition::RUNNING);
        assert_eq!((reason.as_str(), is_terminal(&world.status())), ("SourceUnavailable", false));
        world.wait(400);
        waited += 400;
        world.start();
    }
    assert!(waited > 3600, "it outlasts an outage of an hour");
    assert_eq!(world.status().attempts.map(|attempts| (attempts.failed, attempts.preempted)), Some((0, 0)));
    world.end(0, Some(Report::default()));
    world.start();
    assert_eq!(world.status().phase, Some(Phase::Training));
    assert_eq!(world.status().attempts.and_then(|attempts| attempts.unavailable_since), None);
}

#[test]
fn a_source_that_stays_down_ends_the_job() {
    let mut world = World::new(&json!({}));
    world.start();
    while !is_terminal(&world.status()) {
        world.end(69, Some(failed(ExitCode::SourceUnavailable)));
        world.pass();
        world.wait(400);
        if !is_terminal(&world.status()) {
            world.start();
        }
        assert!(world.made.len() < 100, "it ends");
    }
    assert_eq!(world.condition(condition::FAILED).1, "SourceUnavailable");
}

#[test]
fn whatever_anybody_says_is_bounded_and_on_one_line() {
    let mut world = World::new(&json!({}));
    world.start();
    let sentence = "0/9000 nodes\n\u{1b}[31m".repeat(1000);
    world.attempt().pods[0] = PodSeen { live: true, unschedulable: Some(sentence), ..PodSeen::default() };
    world.pass();
    let (_, _, message) = world.condition(condition::RUNNING);
    assert!(message.len() <= 1024 && !message.chars().any(char::is_control), "{message:?}");
}

#[test]
fn counters_in_the_words_of_a_queue_are_not_written() {
    let mut world = queued(json!({}));
    world.attempt().pods.clear();
    let mut seen = Vec::new();
    for needed in [3, 2, 17] {
        world.hold(QueueSeen::Waiting(format!("Pending: insufficient quota, {needed} more needed")));
        world.pass();
        seen.push(world.job.status.clone());
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:#?}");
    world.hold(QueueSeen::Waiting("Pending: the queue is stopped".into()));
    world.pass();
    assert!(world.condition(condition::ADMITTED).2.contains("stopped"));
}

/// Flux, Argo CD and Helm read these three of any resource.
#[test]
fn kstatus_reads_each_phase_as_a_user_would() {
    let told = |world: &World| ["Ready", "Reconciling", "Stalled"].map(|name| world.condition(name).0 == "True");
    let mut world = World::new(&json!({}));
    world.pass();
    assert_eq!(told(&world), [false, true, false], "pending");
    let mut world = training(&json!({}));
    assert_eq!(told(&world), [false, true, false], "training");
    world.end(0, Some(validated(Verdict::Better)));
    world.start();
    world.end(0, Some(Report::default()));
    world.pass();
    assert_eq!(told(&world), [true, false, false], "succeeded");
    let mut world = training(&json!({}));
    world.end(65, Some(failed(ExitCode::BadData)));
    world.pass();
    assert_eq!(told(&world), [false, false, true], "failed");
    let (_, reason, message) = world.condition("Stalled");
    assert_eq!((reason.as_str(), message.as_str()), ("BadData", "train.jsonl:3: not JSON"));
    // An operator ended it that knew nothing of these three.
    let ended = world.job.status.clone();
    let own = ["Ready", "Reconciling", "Stalled"];
    let status = world.job.status.as_mut().expect("a status");
    status.conditions.retain(|condition| !own.contains(&condition.type_.as_str()));
    world.pass();
    assert_eq!(world.job.status, ended);
    let mut world = World::new(&json!({"profile": "h100"}));
    world.pass();
    assert_eq!(told(&world), [false, false, true], "only an edit helps");
}

/// What keeps the pod that reads a volume is told as of any other pod.
#[test]
fn a_volume_that_cannot_be_read_yet_is_told_in_the_schedulers_words() {
    let mut world = training(&json!({}));
    world.lose_the_node();
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "ReadingVolume");
    let mut reader = AttemptSeen { job: present("r", false), ..AttemptSeen::default() };
    reader.pods =
        vec![PodSeen { live: true, unschedulable: Some("0/3 nodes are available".into()), ..PodSeen::default() }];
    world.observed.report_job = Some(reader);
    world.pass();
    let (_, reason, message) = world.condition(condition::RUNNING);
    assert_eq!(reason, "Unschedulable");
    assert!(message.ends_with("cannot be read yet: 0/3 nodes are available"), "{message}");
    let reader = world.observed.report_job.as_mut().expect("it is read");
    reader.pods = vec![PodSeen { live: true, scheduled: true, running: true, ..PodSeen::default() }];
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "ReadingVolume");
    // Containers of others keep its Job; it has read all the same, and is taken away.
    let reader = world.observed.report_job.as_mut().expect("it is read");
    let done = Terminated { message: Some("no report".into()), ..Terminated::default() };
    reader.pods[0] =
        PodSeen { live: true, terminated: Some(done), sidecars: vec!["proxy".into()], ..PodSeen::default() };
    world.pass();
    let name = format!("-{}-report", world.status().job_refs[1].name);
    assert!(world.made.contains(&name), "{:?}", world.made);
}

/// The scheduler counts nodes, and clusters come and go.
#[test]
fn counters_of_the_scheduler_write_no_status() {
    let mut world = World::new(&json!({}));
    world.start();
    let sees = |world: &mut World, nodes: usize| {
        let message = format!("0/{nodes} nodes are available: {nodes} Insufficient nvidia.com/gpu.");
        world.attempt().pods[0] = PodSeen { live: true, unschedulable: Some(message), ..PodSeen::default() };
        world.pass();
        world.status()
    };
    let told = sees(&mut world, 57);
    assert_eq!(sees(&mut world, 58), told);
    world.attempt().pods[0].unschedulable = Some("0/58 nodes are available: 58 had untolerated taint".into());
    world.pass();
    assert!(world.condition(condition::RUNNING).2.contains("taint"));
}

/// Advice to free a dead node is needed whoever has noticed first that the trainer ended.
#[test]
fn a_node_that_dies_under_a_sidecar_or_a_stranger_is_told() {
    let gone = |world: &World, name: &str| PodSeen {
        name: name.into(),
        node: Some("node7".into()),
        live: true,
        ends_by: Some(Time(world.now)),
        ..PodSeen::default()
    };
    let mut world = training(&json!({}));
    world.end(75, Some(failed(ExitCode::Preempted)));
    world.pass();
    world.attempt().pods = vec![gone(&world, "bot-train-1-x")];
    world.wait(60);
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "NodeLost");
    let mut world = World::new(&json!({}));
    world.pass();
    let pod = gone(&world, "bot-prepare-1-y");
    world.attempt().strangers = vec![Stranger { pod, ..Stranger::default() }];
    world.wait(60);
    world.pass();
    let (_, reason, message) = world.condition(condition::RUNNING);
    assert_eq!(reason, "NodeLost");
    assert!(message.contains("kubectl delete node node7"), "{message}");
}
