//! Lives of jobs, pass by pass, without any cluster: a scripted one answers what the acts of a pass ask for.

use crds::finetunejob::FineTuneJob;
use crds::profile::{self, Profiles};
use crds::report::{Failure, Report, ValidationReport, Verdict};
use serde_json::{Value, json};

use super::*;
use crate::apply::{Act, acts};
use crate::observe::{AttemptSeen, Terminated};
use crate::validate::validate;

const UID: &str = "0b8e1c9e-0d5c-4f7e-9a53-3a2b7b1f0a11";
const TIMING: Timing = Timing { first_backoff: Duration::from_secs(10) };

fn profiles() -> Profiles {
    profile::parse(
        "default: {image: 'registry.example/trainer@sha256:1', resources: {limits: {nvidia.com/gpu: '1'}}, pricePerHour: 2.0}",
    )
    .expect("valid")
}

/// A job and what the scripted cluster holds of it.
struct World {
    job: FineTuneJob,
    observed: Observed,
    now: Timestamp,
    made: Vec<String>,
}

impl World {
    fn new(spec: &Value) -> Self {
        let mut job = json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": "bot", "namespace": "team", "uid": UID, "generation": 1,
                         "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"model": {"uri": "hf://a/b"}, "dataset": {"train": {"uri": "pvc://rows/train.jsonl"}},
                     "method": {"type": "LoRA"}},
        });
        job["spec"].as_object_mut().expect("a map").extend(spec.as_object().expect("a map").clone());
        Self {
            job: serde_json::from_value(job).expect("a job"),
            observed: Observed::default(),
            now: "2026-01-01T00:00:01Z".parse().expect("a time"),
            made: Vec::new(),
        }
    }

    fn status(&self) -> FineTuneJobStatus {
        self.job.status.clone().unwrap_or_default()
    }

    fn current(&self) -> JobReference {
        self.status().job_refs.last().cloned().expect("an attempt")
    }

    fn condition(&self, name: &str) -> (String, String, String) {
        let status = self.status();
        let found =
            status.conditions.iter().find(|condition| condition.type_ == name).expect("every condition is there");
        (found.status.clone(), found.reason.clone(), found.message.clone())
    }

    fn wait(&mut self, seconds: i64) {
        self.now += k8s_openapi::jiff::SignedDuration::from_secs(seconds);
    }

    /// One pass; what it makes is there for the next one.
    fn pass(&mut self) -> Next {
        let plan = validate(&self.job, &profiles());
        let (mut applied, mut recorded) = (Applied::default(), None);
        for act in acts(&self.job, plan.as_ref().ok(), &self.observed) {
            match act {
                Act::StageJob(job) => {
                    let name = job.metadata.name.clone().expect("a name");
                    applied.created_uid = Some(format!("uid-{name}"));
                    self.made.push(name);
                }
                Act::ReportJob(job) => self.made.push(job.metadata.name.clone().expect("a name")),
                Act::DeleteJob { name, .. } => {
                    self.made.push(format!("-{name}"));
                    self.attempt().job = JobSeen::Missing;
                    self.attempt().pods.iter_mut().for_each(|pod| pod.live = false);
                }
                Act::ConfigMap(_) => recorded = plan.as_ref().ok().cloned(),
                Act::Control(_) | Act::Claim(_) => {}
            }
        }
        let next = next_status(&self.job, plan.as_ref(), &self.observed, &applied, TIMING, self.now);
        let listed = next.status.job_refs.last().map(|attempt| attempt.name.clone());
        let had = self.status().job_refs.last().map(|attempt| attempt.name.clone());
        self.job.status = Some(next.status.clone());
        self.observed.plan = recorded.or(self.observed.plan.take());
        if listed != had {
            self.observed.report_job = None;
            self.observed.attempt = Some(AttemptSeen::default());
        }
        if let Some(uid) = applied.created_uid {
            self.attempt().job = present(&uid, false);
        }
        next
    }

    fn attempt(&mut self) -> &mut AttemptSeen {
        self.observed.attempt.get_or_insert_with(AttemptSeen::default)
    }

    /// Lists and makes the next attempt, and lets its pod run.
    fn start(&mut self) {
        for _ in 0..4 {
            self.pass();
            if self.attempt().pods.is_empty() && matches!(self.attempt().job, JobSeen::Present { finished: false, .. })
            {
                break;
            }
        }
        let started = Some(Time(self.now));
        self.attempt().pods =
            vec![PodSeen { name: "pod".into(), live: true, running: true, started, ..PodSeen::default() }];
        self.pass();
    }

    /// The container ends so.
    fn end(&mut self, exit_code: i32, report: Option<Report>) {
        let current = self.current();
        let message = report.map(|report| {
            let of = Report { job_uid: UID.into(), pod_stage: Some(current.stage), attempt: current.attempt, ..report };
            of.termination_message()
        });
        let finished = Some(Time(self.now));
        self.attempt().job = present(&current.uid.unwrap_or_default(), true);
        let pod = self.attempt().pods.last_mut().expect("a pod");
        (pod.live, pod.running) = (false, false);
        pod.terminated = Some(Terminated { exit_code, message, finished, oom_killed: false });
    }
}

fn present(uid: &str, finished: bool) -> JobSeen {
    JobSeen::Present { uid: uid.into(), created: None, suspended: false, finished, failure: None }
}

fn failed(exit: ExitCode) -> Report {
    Report { failure: Some(Failure::new(exit, "train.jsonl:3: not JSON")), ..Report::default() }
}

fn validated(verdict: Verdict) -> Report {
    let gate = json!({"gate": {"operator": "atMost", "metric": "evalLoss", "value": 1.5}, "observed": 1.9,
                      "passed": verdict != Verdict::GateFailed});
    let report: ValidationReport = serde_json::from_value(json!({
        "rows": 9, "step": 4, "tuned": {"evalLoss": 1.9}, "gates": [gate], "verdict": verdict, "summary": "evalLoss 1.9",
    }))
    .expect("a report");
    Report { validation: Some(report), step: 10, total_steps: 10, ..Report::default() }
}

#[test]
fn a_job_goes_through_its_stages_and_succeeds() {
    let gate = json!({"metric": "evalLoss", "operator": "AtMost", "value": "2"});
    let mut world = World::new(&json!({"validation": {"gates": [gate]}}));
    world.pass();
    assert_eq!(world.made, Vec::<String>::new(), "listed before it is made");
    assert_eq!((world.current().name.as_str(), world.current().uid), ("bot-prepare-1", None));
    world.start();
    assert_eq!(
        (world.made.as_slice(), world.status().phase),
        (["bot-prepare-1".to_owned()].as_slice(), Some(Phase::Preparing))
    );
    assert_eq!(world.condition(condition::RUNNING).0, "True");
    world.end(0, Some(Report { dataset_digest: Some("sha256:d".into()), ..Report::default() }));
    world.start();
    assert_eq!(world.status().phase, Some(Phase::Training));
    assert_eq!(world.status().resolved.and_then(|resolved| resolved.dataset_digest).as_deref(), Some("sha256:d"));
    world.wait(3600);
    world.end(0, Some(validated(Verdict::Better)));
    world.start();
    assert_eq!(world.status().phase, Some(Phase::Publishing));
    assert_eq!(world.condition(condition::VALIDATION_PASSED).1, "GatesPassed");
    world.end(0, Some(Report::default()));
    let next = world.pass();
    let status = world.status();
    assert_eq!((status.phase, next.wake), (Some(Phase::Succeeded), None));
    assert_eq!(world.made, ["bot-prepare-1", "bot-train-1", "bot-publish-1"]);
    let usage = status.usage.expect("usage");
    assert_eq!((usage.gpu_seconds, usage.cost.as_deref()), (3600, Some("2")));
    let terminal = world.job.status.clone();
    world.observed = Observed::default();
    world.wait(100_000);
    world.pass();
    assert_eq!((world.job.status, world.made.len()), (terminal, 3), "its children are gone, and it stays finished");
}

#[test]
fn an_unchanged_world_writes_nothing() {
    let mut world = World::new(&json!({}));
    world.start();
    for _ in 0..3 {
        let before = world.job.status.clone();
        world.wait(100);
        world.pass();
        assert_eq!(world.job.status, before);
    }
}

#[test]
fn bad_data_ends_the_job_before_any_accelerator_is_taken() {
    let mut world = World::new(&json!({}));
    world.start();
    world.end(65, Some(failed(ExitCode::BadData)));
    world.pass();
    let (status, reason, message) = world.condition(condition::FAILED);
    assert_eq!((status.as_str(), reason.as_str(), message.as_str()), ("True", "BadData", "train.jsonl:3: not JSON"));
    assert_eq!(world.made, ["bot-prepare-1"]);
    assert_eq!(world.status().last_failure.and_then(|failure| failure.exit_code), Some(65));
}

/// Takes a world to its first training pod.
fn training(spec: &Value) -> World {
    let mut world = World::new(spec);
    world.start();
    world.end(0, Some(Report::default()));
    world.start();
    world
}

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
    assert_eq!(world.condition(condition::FAILED).1, "BackoffLimitExceeded");
}

#[test]
fn three_lives_without_a_checkpoint_end_a_job() {
    let mut world = training(&json!({}));
    for _ in 0..2 {
        world.end(137, None);
        world.pass();
        world.wait(60);
        world.start();
    }
    world.end(137, None);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "NoProgress");
}

#[test]
fn the_next_attempt_waits_until_no_pod_of_the_last_is_left() {
    let mut world = training(&json!({}));
    let uid = world.current().uid.expect("made");
    // A lost node: the Job controller gave up, the pod is Terminating and may still write.
    world.attempt().job = present(&uid, true);
    world.attempt().pods[0].terminating = true;
    world.attempt().pods[0].disrupted = Some("DeletionByTaintManager".into());
    world.wait(1000);
    world.pass();
    assert_eq!(world.current().name, "bot-train-1");
    assert_eq!(world.condition(condition::RUNNING).1, "Preempted");
    world.attempt().pods.clear();
    world.observed.report_job = None;
    world.attempt().job = JobSeen::Present {
        uid,
        created: None,
        suspended: false,
        finished: true,
        failure: Some(("PodFailurePolicy".into(), "Pod team/x has condition DisruptionTarget matching".into())),
    };
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
    let report =
        Report { job_uid: UID.into(), pod_stage: Some(PodStage::Train), attempt: 1, ..validated(Verdict::Better) };
    let terminated = Terminated { message: Some(report.termination_message()), ..Terminated::default() };
    let pod = PodSeen { terminated: Some(terminated), ..PodSeen::default() };
    world.observed.report_job = Some(AttemptSeen { job: present("r", true), pods: vec![pod] });
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

#[test]
fn a_failed_gate_fails_the_job_or_completes_it() {
    for (spec, phase, reason, published) in [
        (json!({}), Phase::Failed, "ValidationFailed", "GateFailed"),
        (json!({"validation": {"onFailure": "Complete"}}), Phase::Succeeded, "Completed", "GateFailed"),
    ] {
        let mut world = training(&spec);
        world.end(0, Some(validated(Verdict::GateFailed)));
        world.pass();
        let name = if phase == Phase::Failed { condition::FAILED } else { condition::COMPLETE };
        assert_eq!(world.status().phase, Some(phase));
        assert_eq!(world.condition(name).1, reason);
        assert_eq!(world.condition(condition::VALIDATION_PASSED).0, "False");
        assert_eq!(world.condition(condition::PUBLISHED).1, published);
        assert_eq!(world.made.last().map(String::as_str), Some("bot-train-1"), "nothing is published");
    }
    let mut world = training(&json!({"output": {"publishWhen": "Always"}}));
    world.end(0, Some(validated(Verdict::GateFailed)));
    world.start();
    assert_eq!(world.made.last().map(String::as_str), Some("bot-publish-1"));
    world.end(0, Some(Report::default()));
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "ValidationFailed");
}

#[test]
fn a_suspended_job_is_held_and_goes_on() {
    let mut world = World::new(&json!({"suspend": true}));
    world.pass();
    world.pass();
    assert_eq!((world.status().phase, world.status().job_refs.len()), (Some(Phase::Suspended), 0));
    world.job.spec.suspend = false;
    world.start();
    world.end(0, Some(Report::default()));
    world.start();
    world.job.spec.suspend = true;
    world.pass();
    assert_eq!(world.made.last().map(String::as_str), Some("-bot-train-1"));
    world.pass();
    assert_eq!(world.current().outcome, Some(AttemptOutcome::Suspended));
    world.wait(5000);
    world.pass();
    assert_eq!(world.status().phase, Some(Phase::Suspended));
    world.job.spec.suspend = false;
    world.start();
    assert_eq!(world.made.last().map(String::as_str), Some("bot-train-2"));
    let attempts = world.status().attempts.expect("attempts");
    assert_eq!((attempts.failed, attempts.preempted), (0, 0), "being held is neither");
    assert_eq!(world.condition(condition::SUSPENDED).1, "Resumed");
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
    assert_eq!(world.status().usage.map(|usage| usage.gpu_seconds), Some(120));
    assert_eq!(world.current().outcome, Some(AttemptOutcome::Final));
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
    let (plan, job) = (validate(&world.job, &profiles()).expect("valid"), world.job.clone());
    let next = |plan: Result<&Plan, &Invalid>, job: &FineTuneJob| {
        next_status(job, plan, &world.observed, &Applied::default(), TIMING, world.now).status
    };
    let unreadable = Invalid { reason: reason::PLAN_UNREADABLE, message: "unknown field".into() };
    let held = next(Err(&unreadable), &job);
    assert!(!is_terminal(&held), "{held:?}");
    assert_eq!(held.job_refs, world.status().job_refs);
    let accepted = held.conditions.iter().find(|condition| condition.type_ == condition::ACCEPTED).expect("there");
    assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", "PlanUnreadable"));
    world.job.status = Some(held);
    let next = next_status(&world.job, Ok(&plan), &world.observed, &Applied::default(), TIMING, world.now).status;
    assert_eq!(next.phase, Some(Phase::Training));
}

#[test]
fn deadlines_end_a_job_and_take_its_pod_away() {
    let mut world = training(&json!({"activeDeadlineSeconds": 100}));
    world.wait(101);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "DeadlineExceeded");
    world.pass();
    assert_eq!(world.made.last().map(String::as_str), Some("-bot-train-1"));

    let mut world = World::new(&json!({"startDeadlineSeconds": 60}));
    world.start();
    world.wait(61);
    world.pass();
    assert_eq!(world.condition(condition::FAILED).1, "StartDeadlineExceeded");
}

#[test]
fn what_the_profile_does_not_allow_is_not_accepted_and_makes_nothing() {
    let mut world = World::new(&json!({"profile": "h100"}));
    let next = world.pass();
    world.pass();
    let (status, reason, message) = world.condition(condition::ACCEPTED);
    assert_eq!((status.as_str(), reason.as_str()), ("False", "ProfileNotFound"));
    assert!(message.starts_with("spec.profile: no profile h100, expected one of default"), "{message}");
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
fn what_stands_in_the_way_of_a_pod_is_told_in_the_words_of_who_sees_it() {
    let mut world = World::new(&json!({}));
    world.start();
    let sentence = "0/1 nodes are available: persistentvolumeclaim \"rows\" not found.";
    world.attempt().pods[0] = PodSeen { live: true, unschedulable: Some(sentence.into()), ..PodSeen::default() };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING), ("False".into(), "Unschedulable".into(), sentence.into()));
    assert_eq!(world.status().phase, Some(Phase::Pending));
    let waiting = Some(("ImagePullBackOff".to_owned(), "Back-off pulling image".to_owned()));
    world.attempt().pods[0] = PodSeen { live: true, waiting, ..PodSeen::default() };
    world.pass();
    assert_eq!(world.condition(condition::RUNNING).1, "ImagePullFailed");
    let failed = Some(("ErrImagePull".to_owned(), "401 unauthorized".to_owned()));
    world.attempt().pods[0] = PodSeen { live: true, waiting: failed, ..PodSeen::default() };
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

#[test]
fn a_queue_holds_evicts_and_takes_back_the_same_job() {
    let mut world = World::new(&json!({"scheduling": {"queueName": "gpu"}}));
    world.start();
    world.end(0, Some(Report::default()));
    world.pass();
    world.pass();
    let held = |world: &mut World, queue| {
        let uid = world.current().uid.expect("made");
        world.attempt().job = JobSeen::Present { uid, created: None, suspended: true, finished: false, failure: None };
        world.attempt().pods.clear();
        world.observed.queue = Some(queue);
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
    let mut world = World::new(&json!({"scheduling": {"queueName": "gpu"}, "failurePolicy": {"maxPreemptions": 1}}));
    world.start();
    world.end(0, Some(Report::default()));
    world.pass();
    world.pass();
    for number in 1..=2 {
        let uid = world.current().uid.expect("made");
        world.attempt().job = present(&uid, false);
        world.observed.queue = None;
        // Its pod of before may still be on its way out: what it ran was counted.
        let (started, leaving) = (Some(Time(world.now)), world.now);
        world.attempt().pods = vec![PodSeen { live: true, running: true, started, ..PodSeen::default() }];
        world.pass();
        world.wait(10);
        world.attempt().job = JobSeen::Present { uid, created: None, suspended: true, finished: false, failure: None };
        world.observed.queue = Some(QueueSeen::Evicted("Preempted: by another".into()));
        world.pass();
        assert_eq!(world.status().usage.map(|usage| usage.train_seconds), Some(10 * number));
        let uid = world.current().uid.expect("made");
        world.attempt().job = present(&uid, false);
        world.observed.queue = None;
        let started = Some(Time(leaving));
        world.attempt().pods = vec![PodSeen { live: true, terminating: true, started, ..PodSeen::default() }];
        world.pass();
    }
    assert_eq!(world.status().phase, Some(Phase::Failed));
    assert_eq!(world.condition(condition::FAILED).1, "PreemptionLimitExceeded");
}

#[test]
fn a_life_counts_when_a_trainer_ran() {
    let mut world = training(&json!({}));
    for number in 1..=4 {
        let taken =
            PodSeen { terminating: true, disrupted: Some("EvictionByEvictionAPI".into()), ..PodSeen::default() };
        let uid = world.current().uid.expect("made");
        world.attempt().job = present(&uid, true);
        world.attempt().pods = vec![taken];
        world.observed.report_job = Some(AttemptSeen { job: present("report", true), pods: Vec::new() });
        world.pass();
        assert_eq!(world.status().attempts.map(|attempts| attempts.preempted), Some(number));
        assert!(!is_terminal(&world.status()), "{:?}", world.status());
        world.wait(60);
        world.pass();
        world.pass();
    }
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
fn what_is_in_the_way_of_a_word_to_stop_stops_nothing_else() {
    let world = training(&json!({"activeDeadlineSeconds": 100}));
    let plan = validate(&world.job, &profiles()).expect("valid");
    let applied = Applied { name_taken: Some("ConfigMap bot-control".into()), ..Applied::default() };
    let next = |seconds| {
        let now = world.now + k8s_openapi::jiff::SignedDuration::from_secs(seconds);
        next_status(&world.job, Ok(&plan), &world.observed, &applied, TIMING, now).status
    };
    assert_eq!(next(1).phase, Some(Phase::Training));
    assert!(next(1).conditions.iter().any(|one| one.type_ == condition::ACCEPTED && one.reason == "ChildNameTaken"));
    assert_eq!(next(200).phase, Some(Phase::Failed), "its deadline holds");
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
