//! A job whose stages run in processes of their own: together they make what one process makes, each says how it ended, and
//! none needs more than what the one before left.

mod last_word;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};
use std::time::Duration;

use crds::report::{Progress, Stage, Verdict};
use crds::run::PodStage::{self, Prepare, Publish, Train};
use harness::{Ended, Hub, Job, Pods, hang, terminate, untimed_validation, wait_for};

/// A job of fewer steps.
fn short() -> Job {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 12");
    job
}

fn refused(pods: &Pods, stage: PodStage, attempt: i32, code: i32, words: &[&str]) {
    let Ended { outcome, report } = pods.run(stage, attempt);
    let message = report.failure.as_ref().map_or("", |failure| failure.message.as_str());
    assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
    for word in words {
        assert!(message.contains(word) && outcome.stderr.contains(word), "no {word:?} in {message:?}");
    }
    assert_eq!((report.job_uid.as_str(), report.pod_stage), (Pods::UID, Some(stage)));
}

#[test]
fn three_pods_make_the_bytes_that_one_process_makes() {
    for (method, format, weights) in [
        ("LoRA, lora: {rank: 4}", "Adapter", "adapter_model.safetensors"),
        ("LoRA, lora: {rank: 4}", "Merged", "model.safetensors"),
        ("Full", "Merged", "model.safetensors"),
    ] {
        let job = short();
        job.edit("type: LoRA, lora: {rank: 4}", &format!("type: {method}"));
        job.edit("  checkpoint:", &format!("  output: {{format: {format}}}\n  checkpoint:"));
        assert_eq!(job.run().code, Some(0));
        let pods = Pods::new(job);
        let prepared = pods.succeed(Prepare, 1);
        assert!(prepared.data.is_some_and(|data| data.rows == 24 && data.validation_rows == 6));
        assert!(prepared.plan.is_some_and(|plan| plan.total_steps == 12 && plan.memory.total > 0));
        assert!(!pods.job.path("data/checkpoints").exists(), "nothing was trained");
        let trained = pods.succeed(Train, 1);
        assert_eq!((trained.step, trained.last_checkpoint_step), (12, Some(12)));
        let local = pods.job.report();
        assert_eq!(untimed_validation(&trained), untimed_validation(&local));
        assert_eq!(
            (&trained.dataset_digest, &trained.dataset_digest),
            (&prepared.dataset_digest, &local.dataset_digest)
        );
        assert!(trained.checkpoint_digest.is_some() && trained.artifact.is_none());
        assert!(!pods.job.path("data/output").exists(), "nothing was published");
        let published = pods.succeed(Publish, 1);
        let artifact = published.artifact.expect("published");
        assert_eq!(artifact.digest, local.artifact.expect("an output").digest, "{method} {format}");
        assert_eq!(artifact.digest, pods.digest(&format!("data/output/{weights}")));
        assert_eq!(artifact.uri, "pvc://tiny-0b8e1c9e/output");
        assert_eq!(published.validation, trained.validation, "the last report tells everything");
        assert_eq!(pods.report(Train).step, 12);
        let newest = fs::read_to_string(pods.job.path("data/report.json")).expect("there");
        assert!(newest.contains("\"podStage\": \"publish\""), "{newest}");
    }
}

/// The profile tells the card's memory, so that what does not fit takes none.
#[test]
fn a_job_that_does_not_fit_the_accelerator_is_refused_before_one_is_taken() {
    let pods = Pods::new(short());
    let with = |memory| {
        pods.write_config(|config| {
            config.resources.accelerator = true;
            config.resources.accelerator_memory_bytes = memory;
        });
    };
    with(Some(1 << 20));
    refused(&pods, Prepare, 1, 71, &["the run needs", "1.0 MiB are there"]);
    with(Some(80 << 30));
    let Ended { outcome, report } = pods.run(Prepare, 2);
    assert_eq!((outcome.code, report.failure), (Some(0), None), "{}", outcome.stderr);
    assert_eq!(report.plan.expect("a plan").memory_available, 80 << 30);
    assert!(!outcome.stderr.contains("nobody tells"), "{}", outcome.stderr);
    with(None);
    let Ended { outcome, .. } = pods.run(Prepare, 3);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("warning: nobody tells how much memory the accelerator has"), "{}", outcome.stderr);
}

#[test]
fn training_and_publishing_need_no_network() {
    let job = short();
    job.edit("file://model", "hf://acme/tiny");
    job.edit("file://train.jsonl", "hf://datasets/acme/rows/train.jsonl");
    job.edit("file://test.jsonl", "hf://datasets/acme/rows/test.jsonl");
    let rows = job.path("rows");
    fs::create_dir(&rows).expect("writable");
    for name in ["train.jsonl", "test.jsonl"] {
        fs::copy(job.path(name), rows.join(name)).expect("writable");
    }
    let hub = Hub::start();
    hub.publish("models/acme/tiny", "main", &job.path("model"));
    hub.publish("datasets/acme/rows", "main", &rows);
    let pods = Pods::new(job);
    let mut prepare = pods.command(Prepare, 1);
    prepare.env("HF_ENDPOINT", hub.endpoint());
    let Ended { outcome, report } = pods.end(prepare, Prepare, 1);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(report.model_revision.is_some());
    hub.take_received();
    for stage in [Train, Publish] {
        let mut command = pods.command(stage, 1);
        command.env("HF_ENDPOINT", hub.endpoint());
        let Ended { outcome, report: ended } = pods.end(command, stage, 1);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert_eq!(ended.model_revision, report.model_revision);
    }
    assert_eq!(hub.take_received(), [], "they ask nobody");
    fs::remove_dir_all(pods.job.path("data/.huggingface/hub/datasets--acme--rows")).expect("removable");
    refused(&pods, Train, 2, 66, &["hf://datasets/acme/rows/train.jsonl", "not on the volume as it was prepared"]);
}

#[test]
fn the_next_attempt_of_a_killed_pod_ends_with_the_same_bytes() {
    let job = Job::new();
    assert_eq!(job.run().code, Some(0));
    let expected = job.adapter_digest();
    let pods = Pods::new(job);
    pods.succeed(Prepare, 1);
    let mut attempt = 1;
    for steps in [7, 21, 38] {
        let mut child = pods.start(Train, attempt);
        if wait_for(&mut child, || pods.logged_steps() > steps) {
            child.kill().expect("a child of ours");
        }
        child.wait().expect("a child of ours");
        attempt += 1;
    }
    let trained = pods.succeed(Train, attempt);
    assert!(trained.resumed_from_step.is_some_and(|step| step >= 20), "{trained:?}");
    let claim = fs::read_to_string(pods.job.path("data/attempts/000004.json")).expect("a claim");
    assert!(claim.contains("\"podUid\":\"pod-train-4\""), "{claim}");
    // An attempt that was overtaken leaves without a trace.
    let before = pods.report(Train);
    let Ended { outcome, report } = pods.run(Train, 1);
    assert_eq!((outcome.code, report.attempt), (Some(75), 1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("overtaken by attempt 4 (pod pod-train-4)"), "{}", outcome.stderr);
    assert_eq!(pods.report(Train), before);
    pods.succeed(Publish, 1);
    assert_eq!(pods.digest("data/output/adapter_model.safetensors"), expected);
    // What was judged is published, or nothing.
    let judged = fs::read_dir(pods.job.path("data/checkpoints")).expect("there").flatten();
    for folder in judged {
        fs::write(folder.path().join("weights.safetensors"), "damaged").expect("writable");
    }
    refused(&pods, Publish, 2, 78, &["no checkpoint with digest sha256:", "weights.safetensors is damaged"]);
}

/// As when a queue takes an attempt's pod away and gives it another.
#[test]
fn a_later_pod_of_the_same_attempt_takes_over_and_ends_with_the_same_bytes() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 400");
    assert_eq!(job.run().code, Some(0));
    let expected = job.adapter_digest();
    let pods = Pods::new(job);
    pods.succeed(Prepare, 1);
    let mut first = pods.start(Train, 1);
    assert!(wait_for(&mut first, || pods.logged_steps() > 20));
    let mut later = pods.command(Train, 1);
    later.env("POD_UID", "pod-later");
    // The first one still runs: it notices at its next commit.
    let Ended { outcome, report } = pods.end(later, Train, 1);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!((report.attempt, report.step), (1, 400));
    assert!(report.resumed_from_step.is_some_and(|step| step >= 4), "{report:?}");
    assert_eq!(first.wait().expect("a child of ours").code(), Some(75));
    let claim = fs::read_to_string(pods.job.path("data/attempts/000002.json")).expect("a claim");
    assert!(claim.contains("\"attempt\":1,") && claim.contains("\"podUid\":\"pod-later\""), "{claim}");
    assert_eq!(pods.report(Train), report, "the first one leaves without a word");
    pods.succeed(Publish, 1);
    assert_eq!(pods.digest("data/output/adapter_model.safetensors"), expected);
}

#[test]
fn what_a_gate_refuses_is_not_published() {
    let job = short();
    job.edit("everySteps: 20, ", "everySteps: 20, gates: [{metric: exactMatch, operator: AtLeast, value: \"1.0\"}], ");
    let pods = Pods::new(job);
    pods.succeed(Prepare, 1);
    let trained = pods.succeed(Train, 1);
    assert!(trained.validation.is_some_and(|validation| validation.verdict == Verdict::GateFailed));
    let published = pods.succeed(Publish, 1);
    assert!(published.artifact.is_none() && !pods.job.path("data/output").exists());
    assert!(published.notes[0].starts_with("not published: validation failed"), "{:?}", published.notes);
}

#[test]
fn a_control_file_that_appears_ends_training_early() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 4000");
    let pods = Pods::new(job);
    pods.succeed(Prepare, 1);
    let mut child = pods.start(Train, 1);
    assert!(wait_for(&mut child, || pods.logged_steps() > 3));
    // As a kubelet swaps it: a link to a folder that another takes the place of.
    let put = |version: &str, content: &str| {
        pods.job.write(version, content);
        let link = pods.job.path("link");
        std::os::unix::fs::symlink(pods.job.path(version), &link).expect("writable");
        fs::rename(link, pods.job.path("control.yaml")).expect("writable");
    };
    put("first", "stopRequested: [");
    let steps = pods.logged_steps();
    assert!(wait_for(&mut child, || pods.logged_steps() > steps + 3), "what is malformed changes nothing");
    put("second", "stopRequested: true\n");
    assert_eq!(child.wait().expect("a child of ours").code(), Some(0));
    let report = pods.message(Train, 1);
    assert!(report.step > 6 && report.step < 4000 && report.total_steps == 4000, "{report:?}");
    let note = format!("stopped early by request at step {} of 4000", report.step);
    assert_eq!((report.notes.as_slice(), report.last_checkpoint_step), (&[note][..], Some(report.step)));
    assert!(report.validation.is_some());
    assert!(pods.succeed(Publish, 1).artifact.is_some());
}

/// Starts a stage that serves its progress, and tells where.
fn start_served(pods: &Pods, stage: PodStage, attempt: i32) -> (Child, String) {
    let mut command = pods.command(stage, attempt);
    let mut child =
        command.args(["--listen", "127.0.0.1:0"]).stdout(Stdio::null()).spawn().expect("the trainer starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
    let serving = lines.find(|line| line.starts_with("serving http://")).expect("it says where");
    let address = serving["serving http://".len()..].split('/').next().expect("an address").to_owned();
    // Somebody has to read what it prints, or it would wait for ever.
    std::thread::spawn(move || lines.count());
    (child, address)
}

fn progress(address: &str) -> Progress {
    let mut stream = std::net::TcpStream::connect(address).expect("listening");
    write!(stream, "GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("Progress")
}

#[test]
fn sigterm_ends_every_stage_within_ten_seconds_even_where_it_hangs() {
    let job = Job::new();
    job.edit("everySteps: 4", "everySeconds: 3600");
    let pods = Pods::new(job);
    // A stage that hangs in `file` tells what it is doing, and leaves when it is asked to.
    let hanging = |stage: PodStage, file: &str, doing: Stage, step: i64| {
        let path = pods.job.path(file);
        let content = fs::read(&path).expect("readable");
        hang(&path);
        let (mut child, address) = start_served(&pods, stage, 1);
        assert!(wait_for(&mut child, || progress(&address).stage == doing && progress(&address).step == step));
        let found = progress(&address);
        assert_eq!((found.pod_stage, found.attempt, found.job_uid.as_str()), (Some(stage), 1, Pods::UID));
        assert_eq!(found.pod_uid, format!("pod-{}-1", stage.name()));
        let (code, elapsed) = terminate(&mut child);
        assert!(code == Some(75) && elapsed < Duration::from_secs(10), "{code:?} after {elapsed:?}");
        let report = pods.message(stage, 1);
        assert_eq!(report.failure.as_ref().map(|failure| failure.reason.as_str()), Some("Preempted"));
        assert_eq!((report.stage, pods.report(stage).failure), (doing, report.failure));
        fs::remove_file(&path).expect("removable");
        fs::write(&path, content).expect("writable");
    };
    hanging(Prepare, "claims/inputs/model/tokenizer.json", Stage::Preparing, 0);
    pods.succeed(Prepare, 2);

    let mut child = pods.start(Train, 1);
    assert!(wait_for(&mut child, || pods.logged_steps() > 5));
    let (code, elapsed) = terminate(&mut child);
    assert!(code == Some(75) && elapsed < Duration::from_secs(10), "{code:?} after {elapsed:?}");
    let report = pods.message(Train, 1);
    assert_eq!(report.last_checkpoint_step, Some(report.step));
    assert!(report.step > 5 && report.stage == Stage::Training, "{report:?}");
    // What gave way is no basis to publish on.
    refused(&pods, Publish, 9, 66, &["attempt 1 ended with Preempted"]);
    let resumed = pods.succeed(Train, 2);
    assert_eq!(resumed.resumed_from_step, Some(report.step));

    hanging(Publish, "data/loss.svg", Stage::Publishing, 60);
    pods.succeed(Publish, 2);
}

#[test]
fn a_stage_refuses_what_is_not_its_own() {
    let pods = Pods::new(short());
    refused(&pods, Train, 1, 66, &["no report of the prepare stage"]);
    let bad = fs::read_to_string(pods.job.path("claims/inputs/train.jsonl")).expect("readable") + "{\"messages\": 3}\n";
    let good = fs::read(pods.job.path("claims/inputs/train.jsonl")).expect("readable");
    fs::write(pods.job.path("claims/inputs/train.jsonl"), bad).expect("writable");
    refused(&pods, Prepare, 1, 65, &["train.jsonl:25"]);
    refused(&pods, Train, 1, 66, &["its attempt 1 ended with BadData"]);
    fs::write(pods.job.path("claims/inputs/train.jsonl"), &good).expect("writable");
    pods.succeed(Prepare, 2);
    // Rows that change between two stages are other rows.
    fs::write(pods.job.path("claims/inputs/train.jsonl"), &good[..good.len() / 2]).expect("writable");
    refused(&pods, Train, 1, 65, &["train.jsonl", "changed since it was prepared"]);
    fs::write(pods.job.path("claims/inputs/train.jsonl"), &good).expect("writable");
    pods.write_config(|config| config.hyperparameters.seed += 1);
    refused(&pods, Train, 1, 78, &["the prepare stage was made with another configuration"]);
    pods.write_config(|config| config.model.uri = "pvc://inputs/none".into());
    refused(&pods, Prepare, 3, 66, &["spec.model.uri", "pvc://inputs/none"]);
    pods.write_config(|config| config.model.uri = "pvc://inputs/../data".into());
    refused(&pods, Prepare, 4, 64, &["pvc://inputs/../data", "without . and .."]);
    // A job that is made again has another volume, or another path on it.
    pods.write_config(|config| config.job.uid = "another".into());
    let Ended { outcome, report } = pods.run(Prepare, 1);
    assert_eq!((outcome.code, report.job_uid.as_str()), (Some(78), "another"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("the run directory belongs to job 0b8e1c9e"), "{}", outcome.stderr);
    assert_eq!(pods.report(Prepare).job_uid, Pods::UID, "the other job's report is left alone");
}

#[test]
fn a_configuration_that_is_not_understood_is_refused_by_field() {
    let pods = Pods::new(short());
    let text = fs::read_to_string(pods.job.path("run.yaml")).expect("readable");
    for (from, to, words) in [
        ("seed: 42", "sead: 42", "run.yaml: line"),
        ("seed: 42", "sead: 42", "hyperparameters.sead: unknown field `sead`: this trainer (version"),
        ("seed: 42", "sead: 42", "is older than the operator that wrote the file; set image in the job's profile"),
        ("seed: 42", "seed: x", "hyperparameters.seed: invalid type: string \"x\", expected i64"),
        ("version: 1", "version: 7", "version: found 7, expected 1"),
    ] {
        assert!(text.contains(from), "{text}");
        pods.job.write("run.yaml", text.replace(from, to));
        refused(&pods, Prepare, 1, 64, &[words]);
    }
    pods.write_config(|config| config.storage = None);
    refused(&pods, Prepare, 1, 64, &["storage: missing"]);
}

#[test]
fn an_output_goes_to_its_claim_and_takes_nobody_elses_place() {
    let pods = Pods::new(short());
    let to = |uri: &str| {
        let uri = uri.to_owned();
        pods.write_config(|config| config.output.uri = Some(uri));
    };
    to("pvc://outputs/team/bot");
    pods.succeed(Prepare, 1);
    pods.succeed(Train, 1);
    let artifact = pods.succeed(Publish, 1).artifact.expect("published");
    assert_eq!(artifact.uri, "pvc://outputs/team/bot");
    for name in ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"] {
        assert_eq!(
            pods.digest(&format!("claims/outputs/team/bot/{name}")),
            pods.digest(&format!("data/output/{name}"))
        );
    }
    pods.succeed(Publish, 2);
    fs::remove_file(pods.job.path("claims/outputs/team/bot/.finetune-output.json")).expect("it is marked");
    refused(&pods, Publish, 3, 73, &["pvc://outputs/team/bot", "this job did not write"]);
}

#[test]
fn a_trainer_that_hangs_ends_by_itself() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 4000");
    job.edit("everySteps: 20, ", "everySteps: 40, metric: exactMatch, ");
    let pods = Pods::new(job);
    pods.succeed(Prepare, 1);
    let mut child = pods.start(Train, 1);
    assert!(wait_for(&mut child, || pods.logged_steps() > 3));
    // Each evaluation reads the tokenizer: a volume that hangs.
    hang(&pods.job.path("claims/inputs/model/tokenizer.json"));
    assert!(!wait_for(&mut child, || false), "the watchdog ends it");
    assert_eq!(child.wait().expect("a child of ours").code(), Some(80));
    let report = pods.message(Train, 1);
    let failure = report.failure.clone().expect("it says why");
    assert!(failure.reason == "Stalled" && failure.message.contains("nothing was computed for 60 s"), "{failure:?}");
    assert!(report.step > 0 && report.step % 40 == 0, "{report:?}");
    assert_eq!(report.last_checkpoint_step, Some(report.step - 4));
    assert_eq!(pods.report(Train).failure, report.failure);
}
