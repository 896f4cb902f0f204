//! What GitOps tools make of a job in each phase: Flux and Helm by the kstatus library, Argo CD by the health check that
//! `docs/argocd-health.lua` has for it. Both are asked themselves (`tests/kstatus/main.go`).

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use crds::FineTuneJob;
use crds::exit::ExitCode;
use crds::finetunejob::Phase;
use crds::run::PodStage;
use harness::apiserver::{About, Key, Kind, Life, Simulation, Turn, Word};
use harness::{repository, skipped};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::simulated::simulate;

const HEALTH_CHECK: &str = "docs/argocd-health.lua";

/// A job, and what is to be made of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    #[serde(skip)]
    name: String,
    kstatus: String,
    argocd: String,
    object: Value,
}

/// What the library and the check say of an object.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    kstatus: String,
    kstatus_message: String,
    argocd: String,
    argocd_message: String,
}

/// A job in each phase, and in the situations between them.
fn jobs() -> Vec<Expected> {
    let folder = repository().join("tests/kstatus/phases");
    let mut jobs: Vec<Expected> = fs::read_dir(folder)
        .expect("the phases")
        .flatten()
        .map(|entry| {
            let text = fs::read_to_string(entry.path()).expect("readable");
            let read: Result<Expected, _> = serde_saphyr::from_str(&text);
            let read = read.unwrap_or_else(|error| panic!("{}: {error}", entry.path().display()));
            Expected { name: entry.file_name().to_string_lossy().into_owned(), ..read }
        })
        .collect();
    jobs.sort_by(|a, b| a.name.cmp(&b.name));
    jobs
}

/// `None` where the program cannot be had.
fn ask(objects: &[&Value]) -> Option<Vec<Answer>> {
    let script = repository().join("tools/stage-kstatus.sh");
    let staged = Command::new(script).stderr(Stdio::inherit()).output().expect("the script runs");
    if staged.status.code() == Some(3) {
        skipped("Go");
        return None;
    }
    assert!(staged.status.success(), "tools/stage-kstatus.sh failed");
    let program = String::from_utf8(staged.stdout).expect("a path");
    let mut asked = Command::new(program.trim())
        .args(["-argocd".as_ref(), repository().join(HEALTH_CHECK).as_os_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let text: String = objects.iter().map(|object| format!("{object}\n")).collect();
    // It reads one, answers one: what it says fits into the pipe.
    asked.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
    let output = asked.wait_with_output().expect("it ends");
    assert!(output.status.success(), "the program failed");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let answers: Vec<Answer> = text.lines().map(|line| serde_json::from_str(line).expect("an answer")).collect();
    assert_eq!(answers.len(), objects.len());
    Some(answers)
}

#[test]
fn a_job_in_each_phase_is_what_its_user_would_say() {
    let jobs = jobs();
    let mut phases = BTreeSet::new();
    for job in &jobs {
        let read: FineTuneJob =
            serde_json::from_value(job.object.clone()).unwrap_or_else(|error| panic!("{}: {error}", job.name));
        phases.extend(read.status.and_then(|status| status.phase).map(|phase| format!("{phase:?}")));
    }
    let all: BTreeSet<String> = Phase::ALL.iter().map(|phase| format!("{phase:?}")).collect();
    assert_eq!(phases, all, "each phase has a file in tests/kstatus/phases");
    let Some(answers) = ask(&jobs.iter().map(|job| &job.object).collect::<Vec<_>>()) else { return };
    for (job, answer) in jobs.iter().zip(&answers) {
        let found = (&answer.kstatus, &answer.argocd);
        assert_eq!(found, (&job.kstatus, &job.argocd), "{}: {answer:?}", job.name);
    }
    let failed = &answers[jobs.iter().position(|job| job.name == "failed.yaml").expect("one")];
    assert_eq!(failed.kstatus_message, "train.jsonl:7: a row without an answer");
    assert_eq!(failed.argocd_message, "BadData: train.jsonl:7: a row without an answer");
}

/// What the operator writes, in every state that a job has on its way, and not what the files above say that it does.
#[test]
fn every_state_that_the_operator_writes_is_read_as_its_phase_says() {
    let states: Arc<Mutex<Vec<Value>>> = Arc::default();
    let fails = |about: &About| match about.stage {
        PodStage::Train => {
            Life::running().then(30, Turn::End(Word::Failed(ExitCode::BadData, "line 7: no answer".into())))
        }
        _ => Life::of(about),
    };
    let lives: [fn(&About) -> Life; 2] = [Life::of, fails];
    for life in lives {
        let states = Arc::clone(&states);
        simulate(async || {
            let simulation = Simulation::start(life);
            simulation.submit("bot", &json!({"output": {"uri": "pvc://published/bot"}}));
            simulation.until("it trains", 100, |simulation| !simulation.pods("bot-train").is_empty()).await;
            simulation.edit("bot", |spec| spec["suspend"] = json!(true));
            simulation.pass(60).await;
            simulation.edit("bot", |spec| spec["suspend"] = json!(false));
            simulation.end("bot", 600).await;
            let history = simulation.server.history(&Key::new(Kind::FineTuneJob, "team", "bot"));
            let written = history.into_iter().filter(|state| state["status"].is_object());
            states.lock().expect("no test panics with it").extend(written);
        });
    }
    let states = states.lock().expect("no test panics with it").clone();
    let Some(answers) = ask(&states.iter().collect::<Vec<_>>()) else { return };
    let mut phases = BTreeSet::new();
    for (state, answer) in states.iter().zip(&answers) {
        let phase = state["status"]["phase"].as_str().unwrap_or_default().to_owned();
        // An edit is in progress until it was seen.
        let is_seen = state["status"]["observedGeneration"] == state["metadata"]["generation"];
        let expected = match phase.as_str() {
            "Succeeded" if is_seen => ("Current", "Healthy"),
            "Failed" if is_seen => ("Failed", "Degraded"),
            "Suspended" if is_seen => ("InProgress", "Suspended"),
            _ => ("InProgress", "Progressing"),
        };
        assert_eq!((answer.kstatus.as_str(), answer.argocd.as_str()), expected, "{answer:?} of {state:#}");
        phases.insert(phase);
    }
    for phase in ["Pending", "Preparing", "Training", "Suspended", "Publishing", "Succeeded", "Failed"] {
        assert!(phases.contains(phase), "no job was {phase}: {phases:?}");
    }
}

/// kstatus takes an object without conditions for done, so a job would be done until the operator has seen it. The default of
/// the CRD, which the API server gives to every object that has no status, is of a generation that no job has.
#[test]
fn a_job_that_nobody_has_looked_at_is_not_done() {
    let crd = fs::read_to_string(repository().join("crds/finetunejobs.yaml")).expect("readable");
    let crd: Value = serde_saphyr::from_str(&crd).expect("YAML");
    let status = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["default"];
    let new = jobs().into_iter().find(|job| job.name == "new.yaml").expect("a new job");
    assert_eq!(&new.object["status"], status, "tests/kstatus/phases/new.yaml is what the API server would show");
    let mut bare = new.object.clone();
    bare.as_object_mut().expect("a map").remove("status");
    let Some(answers) = ask(&[&new.object, &bare]) else { return };
    let words: Vec<&str> = answers.iter().map(|answer| answer.kstatus.as_str()).collect();
    assert_eq!(words, ["InProgress", "Current"], "{answers:?}");
    assert_eq!(answers[1].argocd, "Progressing", "Argo CD's check needs no default");
}

/// The page has the check as it is tried here.
#[test]
fn the_page_shows_the_health_check_that_is_shipped() {
    let page = fs::read_to_string(repository().join("docs/gitops.md")).expect("readable");
    let check = fs::read_to_string(repository().join(HEALTH_CHECK)).expect("readable");
    let indented: String = check.lines().map(|line| format!("    {line}\n")).collect();
    assert!(page.contains(&indented), "docs/gitops.md does not have {HEALTH_CHECK}, indented by four spaces");
}
