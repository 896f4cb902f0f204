//! Lives of jobs, pass by pass, without any cluster: a scripted one answers what the acts of a pass ask for.

mod acceptance;
mod attempts;
mod clusters;
mod deadlines;
mod queue;

use crds::exit::ExitCode;
use crds::finetunejob::{FineTuneJob, FineTuneJobStatus, Phase};
use crds::profile::{self, Profiles};
use crds::report::{Failure, Report, ValidationReport, Verdict};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::apply::{Change, changes};
use crate::build::Placement;
use crate::facts::{Observed, PodSeen, Terminated, Timing};
use crate::status::{Applied, Created, LISTED_ATTEMPTS, Next, render};
use crate::validate::{Invalid, validate};

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
        let facts =
            Facts { job: &self.job, plan: plan.as_ref(), observed: &self.observed, timing: TIMING, now: self.now };
        let decision = decide(&facts);
        let (mut applied, mut recorded, mut made, mut removed) = (Applied::default(), None, Vec::new(), false);
        for change in changes(&decision, &facts, &Placement::default()) {
            match change {
                Change::StageJob(job) => {
                    let name = job.metadata.name.clone().expect("a name");
                    applied.created =
                        Some(Created { uid: format!("uid-{name}"), pod_digest: format!("sha256:{:064}", 0) });
                    made.push(name);
                }
                Change::ReportJob(job) => made.push(job.metadata.name.clone().expect("a name")),
                Change::DeleteJob { name, .. } => {
                    made.push(format!("-{name}"));
                    removed = true;
                }
                Change::ConfigMap(_) => recorded = plan.as_ref().ok().cloned(),
                Change::Control(_) | Change::Claim(_) => {}
            }
        }
        let next = render(&decision, &facts, &applied);
        self.made.extend(made);
        if removed {
            self.attempt().job = JobSeen::Missing;
            self.attempt().pods.iter_mut().for_each(|pod| pod.live = false);
        }
        let listed = next.status.job_refs.last().map(|attempt| attempt.name.clone());
        let had = self.status().job_refs.last().map(|attempt| attempt.name.clone());
        self.job.status = Some(next.status.clone());
        self.observed.plan = recorded.or(self.observed.plan.take());
        if listed != had {
            self.observed.report_job = None;
            self.observed.attempt = Some(AttemptSeen::default());
        }
        if let Some(created) = applied.created {
            self.attempt().job = present(&created.uid, false);
        }
        next
    }

    /// What is told of the job as it is, without a pass.
    fn told(&self, plan: Result<&Plan, &Invalid>, applied: &Applied, now: Timestamp) -> FineTuneJobStatus {
        let facts = Facts { job: &self.job, plan, observed: &self.observed, timing: TIMING, now };
        render(&decide(&facts), &facts, applied).status
    }

    /// The volume is read: what is on it, or that nothing could be read.
    fn read_volume(&mut self, report: Option<Report>) {
        let current = self.current();
        assert_eq!(self.made.last(), Some(&format!("{}-report", current.name)), "the volume is asked");
        let pods = report.map(|report| {
            let of = Report { job_uid: UID.into(), pod_stage: Some(current.stage), attempt: current.attempt, ..report };
            let terminated = Terminated { message: Some(of.termination_message()), ..Terminated::default() };
            PodSeen { terminated: Some(terminated), ..PodSeen::default() }
        });
        let pods = pods.into_iter().collect();
        self.observed.report_job = Some(AttemptSeen { job: present("r", true), pods, ..AttemptSeen::default() });
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

    /// The node is gone, with the pod and everything that it said; the Job controller noted why.
    fn lose_the_node(&mut self) {
        let uid = self.current().uid.expect("made");
        self.attempt().job = JobSeen::Present {
            uid,
            released: None,
            suspended: false,
            finished: true,
            failure: Some(("PodFailurePolicy".into(), "Pod team/x has condition DisruptionTarget matching".into())),
        };
        self.attempt().pods.clear();
    }

    /// The queue holds the Job of the newest attempt.
    fn hold(&mut self, queue: QueueSeen) {
        let uid = self.current().uid.expect("made");
        self.attempt().job = JobSeen::Present { uid, released: None, suspended: true, finished: false, failure: None };
        self.observed.queue = Some(queue);
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
        pod.terminated = Some(Terminated { exit_code, message, finished, reason: "Error".into() });
    }
}

/// Takes a world to its first training Job, which is for the queue `gpu`.
fn queued(mut spec: Value) -> World {
    spec["scheduling"] = json!({"queueName": "gpu"});
    let mut world = World::new(&spec);
    world.start();
    world.end(0, Some(Report::default()));
    world.pass();
    world.pass();
    world
}

/// Takes a world to its first training pod.
fn training(spec: &Value) -> World {
    let mut world = World::new(spec);
    world.start();
    world.end(0, Some(Report::default()));
    world.start();
    world
}

fn present(uid: &str, finished: bool) -> JobSeen {
    JobSeen::Present { uid: uid.into(), released: None, suspended: false, finished, failure: None }
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
