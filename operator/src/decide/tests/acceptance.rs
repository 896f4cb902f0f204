//! What a job is accepted by, and what is in its way.

use super::*;
use crate::facts::Waiting;

#[test]
fn what_the_profile_does_not_allow_is_not_accepted_and_makes_nothing() {
    let mut world = World::new(&json!({"profile": "h100"}));
    let next = world.pass();
    world.pass();
    let (status, reason, message) = world.condition(condition::ACCEPTED);
    assert_eq!((status.as_str(), reason.as_str()), ("False", "ProfileNotFound"));
    assert!(
        message.starts_with("spec.profile: no profile h100 for the namespace team, expected one of default"),
        "{message}"
    );
    assert_eq!((world.made.len(), next.wake), (0, None));

    let mut world =
        World::new(&json!({"scheduling": {"tolerations": [{"key": "control-plane"}], "priorityClassName": "top"}}));
    world.pass();
    let (_, reason, message) = world.condition(condition::ACCEPTED);
    assert_eq!(reason, "SchedulingNotAllowed");
    assert!(
        message.contains("spec.scheduling.tolerations[0].key: found control-plane, the profile allows none"),
        "{message}"
    );
    assert!(message.contains("spec.scheduling.priorityClassName: found top"), "{message}");
}

#[test]
fn what_nothing_was_made_of_follows_todays_profile() {
    let mut world = World::new(&json!({}));
    world.pass();
    let first = world.status().resolved.and_then(|resolved| resolved.plan_digest);
    world.job.status.as_mut().and_then(|status| status.resolved.as_mut()).expect("resolved").plan_digest =
        Some("old".into());
    world.pass();
    assert!(world.made.is_empty(), "what is made is recorded first: {:?}", world.made);
    assert_eq!(world.status().resolved.and_then(|resolved| resolved.plan_digest), first);
    world.pass();
    assert_eq!(world.made, ["bot-prepare-1"]);
}

/// It was listed and its objects were refused for a while, and an administrator changed the profile meanwhile.
#[test]
fn what_nothing_was_made_of_waits_for_an_edit_when_its_profile_goes() {
    let mut world = World::new(&json!({}));
    world.pass();
    world.job.spec.profile = Some("gone".into());
    world.pass();
    assert_eq!((world.status().phase, world.condition("Stalled").0.as_str()), (Some(Phase::Pending), "True"));
    world.job.spec.profile = None;
    world.pass();
    world.pass();
    assert_eq!(world.made, ["bot-prepare-1"]);
}

#[test]
fn a_job_whose_plan_is_lost_ends_and_takes_its_pod_away() {
    let mut world = training(&json!({}));
    world.job.spec.profile = Some("gone".into());
    world.observed.plan = None;
    world.pass();
    assert_eq!(world.status().phase, Some(Phase::Failed));
    world.pass();
    assert_eq!(world.made.last().map(String::as_str), Some("-bot-train-1"));
}

#[test]
fn a_plan_that_this_version_does_not_understand_holds_a_job_until_one_does() {
    let mut world = training(&json!({}));
    let plan = validate(&world.job, &profiles()).expect("valid");
    let unreadable = Invalid { reason: reason::PLAN_UNREADABLE, message: "unknown field".into() };
    let held = world.told(Err(&unreadable), &Applied::default(), world.now);
    assert!(!is_terminal(&held), "{held:?}");
    assert_eq!(held.job_refs, world.status().job_refs);
    let accepted = held.conditions.iter().find(|condition| condition.type_ == condition::ACCEPTED).expect("there");
    assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", "PlanUnreadable"));
    world.job.status = Some(held);
    let next = world.told(Ok(&plan), &Applied::default(), world.now);
    assert_eq!(next.phase, Some(Phase::Training));
}

#[test]
fn what_is_in_the_way_of_a_word_to_stop_stops_nothing_else() {
    let world = training(&json!({"activeDeadlineSeconds": 100}));
    let plan = validate(&world.job, &profiles()).expect("valid");
    let applied = Applied { name_taken: Some("ConfigMap bot-0b8e1c9e-control".into()), ..Applied::default() };
    let next = |seconds| {
        let now = world.now + k8s_openapi::jiff::SignedDuration::from_secs(seconds);
        world.told(Ok(&plan), &applied, now)
    };
    assert_eq!(next(1).phase, Some(Phase::Training));
    assert!(next(1).conditions.iter().any(|one| one.type_ == condition::ACCEPTED && one.reason == "ChildNameTaken"));
    assert!(next(400).conditions.iter().any(|one| one.reason == "Stopping"), "its deadline holds");
}

#[test]
fn what_stands_in_the_way_of_a_pod_is_told_in_the_words_of_who_sees_it() {
    let mut world = World::new(&json!({}));
    world.start();
    let sentence = "0/1 nodes are available: persistentvolumeclaim \"rows\" not found.";
    world.attempt().pods[0] = PodSeen { live: true, unschedulable: Some(sentence.into()), ..PodSeen::default() };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING), ("False".into(), "Unschedulable".into(), sentence.into()));
    assert_eq!(world.condition(condition::RECONCILING).2, sentence, "Flux and Argo CD show that condition alone");
    assert_eq!(world.status().phase, Some(Phase::Pending));
    let waiting = |reason: &str, message: &str| {
        Some(Waiting { container: "trainer".into(), reason: reason.into(), message: message.into() })
    };
    world.attempt().pods[0] =
        PodSeen { live: true, waiting: waiting("ImagePullBackOff", "Back-off pulling image"), ..PodSeen::default() };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "ImagePullFailed");
    world.attempt().pods[0] =
        PodSeen { live: true, waiting: waiting("ErrImagePull", "401 unauthorized"), ..PodSeen::default() };
    world.pass();
    assert_eq!(
        world.condition(condition::RUNNING).2,
        "ErrImagePull: 401 unauthorized",
        "a failure says more than a pause"
    );
    world.attempt().pods[0] = PodSeen { live: true, running: true, ..PodSeen::default() };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).0, "True", "and it goes on when it is mended");
}
