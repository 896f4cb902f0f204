//! A run that is interrupted anywhere ends with the bytes of one that was not.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use harness::{Job, signal, terminate, untimed_validation, wait_for};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Kill -9 this often.
const KILLS: usize = 20;

#[test]
fn kill_9_at_random_moments_changes_no_byte() {
    let undisturbed = Job::new();
    let outcome = undisturbed.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let expected = undisturbed.adapter_digest();

    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut kills = 0;
    while kills < KILLS {
        let job = Job::new();
        loop {
            let mut child = job.start();
            let already = job.logged_steps();
            let inside_a_save = random.random_bool(0.4);
            let steps: usize = random.random_range(1..12);
            let temporary = || job.checkpoints().iter().any(|path| path.to_string_lossy().contains(".tmp-step"));
            let killed = if inside_a_save {
                wait_for(&mut child, temporary)
            } else {
                wait_for(&mut child, || job.logged_steps() > already + steps)
            };
            if killed {
                child.kill().expect("a child of ours");
                kills += 1;
            }
            let status = child.wait().expect("a child of ours");
            if status.success() {
                break;
            }
            assert!(killed, "the trainer failed by itself: {status}");
        }
        assert_eq!(job.adapter_digest(), expected, "after {kills} kills");
    }
}

#[test]
fn a_crash_in_native_code_leaves_a_word_and_the_same_command_continues() {
    let undisturbed = Job::new();
    assert_eq!(undisturbed.run().code, Some(0));
    let job = Job::new();
    for (crash, name) in [("ILL", "SIGILL (an instruction that the processor does not have)"), ("ABRT", "SIGABRT")] {
        let already = job.logged_steps();
        let mut child = job.start();
        assert!(wait_for(&mut child, || job.logged_steps() > already + 5));
        signal(&child, crash);
        assert_eq!(child.wait().expect("a child of ours").code(), Some(70));
        let report = job.report();
        let failure = report.failure.expect("a last word");
        assert_eq!((failure.reason.as_str(), failure.exit_code), ("InternalError", 70));
        for words in
            [name, "while training, after step", "a bug", "the same command, goes on from the newest checkpoint"]
        {
            assert!(failure.message.contains(words), "no {words:?} in {}", failure.message);
        }
    }
    let outcome = job.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("resumed at step"), "{}", outcome.stderr);
    assert_eq!(job.adapter_digest(), undisturbed.adapter_digest());
}

#[test]
fn sigterm_commits_and_exits_75_and_the_same_command_continues() {
    let undisturbed = Job::new();
    assert_eq!(undisturbed.run().code, Some(0));
    let job = Job::new();
    // No checkpoint is due by itself: what is there afterwards was committed because of the signal.
    job.edit("everySteps: 4", "everySeconds: 3600");
    let mut child = job.start();
    assert!(wait_for(&mut child, || job.logged_steps() > 5));
    let asked = Instant::now();
    let status =
        std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill runs");
    assert!(status.success());
    assert_eq!(child.wait().expect("a child of ours").code(), Some(75));
    assert!(asked.elapsed() < Duration::from_secs(10));
    assert_eq!(job.checkpoints().len(), 1, "{:?}", job.checkpoints());
    let outcome = job.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("resumed at step") && outcome.stderr.contains("the same bytes"),
        "{}",
        outcome.stderr
    );
    assert_eq!(job.adapter_digest(), undisturbed.adapter_digest());
    let again = job.run();
    assert_eq!(again.code, Some(0));
    assert!(again.stdout.starts_with("tiny is finished, nothing to do"), "{}", again.stdout);
}

#[test]
fn full_fine_tuning_with_early_stopping_judges_the_same_checkpoint_after_kills() {
    let spec = "  hyperparameters: {maxSteps: 60, batchSize: 8, learningRate: \"3e-3\", precision: FP32}\n  \
                checkpoint: {everySteps: 3}\n  validation: {everySteps: 4}\n  earlyStopping: {patience: 3, minDelta: \"0.02\"}\n";
    let job = || {
        let job = Job::new();
        job.write_spec(spec);
        job.edit("type: LoRA, lora: {rank: 4}", "type: Full");
        job
    };
    let record = |job: &Job| -> Vec<serde_json::Value> {
        let text = fs::read_to_string(job.path("runs/tiny/metrics.jsonl")).expect("a record");
        let entries = text.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        let without_time = |mut entry: serde_json::Value| {
            entry.as_object_mut().expect("an object").remove("seconds");
            entry
        };
        entries.map(without_time).collect()
    };
    let undisturbed = job();
    assert_eq!(undisturbed.run().code, Some(0));
    let (expected, expected_report) = (record(&undisturbed), undisturbed.report());
    let disturbed = job();
    for steps in [3, 9, 14] {
        let mut child = disturbed.start();
        assert!(wait_for(&mut child, || disturbed.logged_steps() > steps), "it ended before {steps} steps");
        child.kill().expect("a child of ours");
        assert_eq!(child.wait().expect("a child of ours").code(), None, "it ended by itself");
    }
    let outcome = disturbed.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("resumed at step"), "{}", outcome.stderr);
    assert_eq!(record(&disturbed), expected, "no step and no evaluation is there twice or missing");
    let report = disturbed.report();
    assert_eq!(untimed_validation(&report), untimed_validation(&expected_report));
    assert_eq!(
        report.artifact.map(|artifact| artifact.digest),
        expected_report.artifact.map(|artifact| artifact.digest)
    );
}

/// The forms of full fine-tuning: `method.full`, and what `hyperparameters` says.
const FORMS: [(&str, &str); 4] = [
    ("", "optimizer: AdamW"),
    ("", "optimizer: AdamW8Bit"),
    (", full: {optimizerInBackward: true}", "maxGradNorm: \"0\""),
    (", full: {optimizerInBackward: true}", "maxGradNorm: \"0\", optimizer: AdamW8Bit"),
];

/// Sixty steps of full fine-tuning in bf16 with weight decay.
fn full_job((full, hyperparameters): (&str, &str)) -> Job {
    let job = Job::new();
    job.edit("type: LoRA, lora: {rank: 4}", &format!("type: Full{full}"));
    let all = format!("learningRate: \"3e-3\", weightDecay: \"0.1\", precision: BF16, {hyperparameters}");
    job.edit("learningRate: \"1e-2\", precision: FP32", &all);
    job
}

/// Digests of all that a run of [`full_job`] left: masters, moments, output.
fn everything(job: &Job) -> Vec<String> {
    let is_last = |path: &PathBuf| path.to_string_lossy().contains("step-0000060");
    let checkpoint = job.checkpoints().into_iter().find(is_last).expect("the last step's checkpoint");
    let files = ["weights.safetensors", "optimizer.safetensors"].map(|name| checkpoint.join(name));
    let output = job.path("runs/tiny/output/model.safetensors");
    let digest =
        |path| trainer::store::files::digest_file(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    files.iter().chain([&output]).map(|path| digest(path.as_path())).collect()
}

#[test]
fn kill_9_and_sigterm_change_no_byte_of_full_fine_tuning_in_any_form() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let mut all = std::collections::BTreeSet::new();
    // A GPU takes seconds to start: less often there.
    let steps = if harness::is_on_gpu() { 10..18 } else { 2..14 };
    // The first and the last differ in all that the others differ in.
    let forms = if harness::is_on_gpu() { vec![FORMS[0], FORMS[3]] } else { FORMS.to_vec() };
    for &form in &forms {
        let undisturbed = full_job(form);
        let outcome = undisturbed.run();
        assert_eq!(outcome.code, Some(0), "{form:?}: {}", outcome.stderr);
        let expected = everything(&undisturbed);
        let disturbed = full_job(form);
        let mut kills = 0;
        loop {
            let mut child = disturbed.start();
            let until = disturbed.logged_steps() + random.random_range(steps.clone());
            if wait_for(&mut child, || disturbed.logged_steps() >= until) {
                if kills % 3 == 2 {
                    terminate(&mut child);
                } else {
                    child.kill().expect("a child of ours");
                }
                kills += 1;
            }
            let status = child.wait().expect("a child of ours");
            if status.success() {
                break;
            }
            assert!(matches!(status.code(), None | Some(75)), "{form:?}: the trainer failed by itself: {status}");
        }
        assert!(kills >= 3, "{form:?}: {kills} kills");
        assert_eq!(everything(&disturbed), expected, "{form:?} after {kills} kills");
        all.insert(expected);
    }
    assert_eq!(all.len(), forms.len(), "the forms are not the same training");
}

#[test]
fn resume_never_begins_anew_and_keeps_what_was_there() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 12");
    assert_eq!(job.run().code, Some(0));
    let first = job.adapter_digest();
    // Another configuration: its checkpoint could not be continued, and the refusal names this way out.
    job.edit("\"1e-2\"", "\"2e-2\"");
    job.edit("everySteps: 4", "everySteps: 4, resume: Never");
    let outcome = job.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("earlier checkpoints were moved to"), "{}", outcome.stderr);
    let fresh = Job::new();
    fresh.edit("maxSteps: 60", "maxSteps: 12");
    fresh.edit("\"1e-2\"", "\"2e-2\"");
    assert_eq!(fresh.run().code, Some(0));
    assert_eq!(job.adapter_digest(), fresh.adapter_digest());
    assert_ne!(job.adapter_digest(), first);
    let aside = job.path("runs/tiny/checkpoints-before-claim-000002");
    assert!(fs::read_dir(aside).expect("set aside").count() >= 1);
}

#[test]
fn sigterm_ends_what_hangs_within_ten_seconds() {
    let job = Job::new();
    // A pipe that nobody writes to: reading it never ends.
    fs::remove_file(job.path("model/tokenizer.json")).expect("removable");
    let made =
        std::process::Command::new("mkfifo").arg(job.path("model/tokenizer.json")).status().expect("mkfifo runs");
    assert!(made.success());
    let mut child = job.start();
    assert!(wait_for(&mut child, || job.path("runs/tiny").exists()));
    let asked = Instant::now();
    let status =
        std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill runs");
    assert!(status.success());
    assert_eq!(child.wait().expect("a child of ours").code(), Some(75));
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
}

#[test]
fn two_runs_in_one_folder_do_not_meet() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 4000");
    let mut child = job.start();
    assert!(wait_for(&mut child, || job.logged_steps() > 2));
    let second = job.run();
    assert_eq!(second.code, Some(73), "{}", second.stderr);
    assert!(second.stderr.contains("another run is in progress in this folder"), "{}", second.stderr);
    child.kill().expect("a child of ours");
    child.wait().expect("a child of ours");
}

#[test]
fn a_damaged_checkpoint_falls_back_and_says_so() {
    for truncate in [true, false] {
        let job = Job::new();
        job.edit("maxSteps: 60", "maxSteps: 59");
        let mut child = job.start();
        assert!(wait_for(&mut child, || job.checkpoints().len() >= 2 && job.logged_steps() > 10));
        child.kill().expect("a child of ours");
        child.wait().expect("a child of ours");
        let committed =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"));
        let newest = job.checkpoints().into_iter().rfind(committed);
        let weights = newest.expect("a checkpoint").join("weights.safetensors");
        let mut bytes = fs::read(&weights).expect("readable");
        if truncate {
            bytes.truncate(100);
        } else {
            bytes[500] ^= 1;
        }
        fs::write(&weights, bytes).expect("writable");
        let outcome = job.run();
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("weights.safetensors is damaged"), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("falling back to the checkpoint before it"), "{}", outcome.stderr);
    }
}

#[test]
fn a_checkpoint_of_other_inputs_is_refused() {
    let changes: [(&str, fn(&Job)); 5] = [
        ("another dataset", |job| job.write_rows("test.jsonl", 200..206)),
        ("another configuration", |job| job.edit("learningRate: \"1e-2\"", "learningRate: \"2e-2\"")),
        ("another configuration", |job| job.edit("precision: FP32", "precision: FP32, optimizer: AdamW8Bit")),
        ("another dataset", |job| job.write_rows("train.jsonl", 1..25)),
        ("another job", |job| job.edit("name: tiny", "name: other")),
    ];
    for (expected, change) in changes {
        let job = Job::new();
        assert_eq!(job.run().code, Some(0));
        change(&job);
        let outcome = job.trainer(&["run", "job.yaml", "--dir", "runs/tiny"]);
        assert_eq!(outcome.code, Some(78), "{}", outcome.stderr);
        assert!(
            outcome.stderr.contains(expected) && outcome.stderr.contains("choose another --dir"),
            "{}",
            outcome.stderr
        );
    }
}
