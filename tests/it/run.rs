//! Whole runs on a tiny model: what is written, judged and served.

use std::fs;
use std::io::{Read, Write};

use crds::report::{Progress, Stage, Verdict};
use harness::{Job, Outcome, untimed_validation, wait_for};

const STEPS: &str = "  hyperparameters: {maxSteps: 40, batchSize: 8, learningRate: \"1e-2\", precision: FP32}\n";

fn succeed(job: &Job, arguments: &[&str]) -> Outcome {
    let outcome = job.trainer(arguments);
    assert_eq!(outcome.code, Some(0), "{arguments:?}\n{}", outcome.stderr);
    outcome
}

/// The questions of the training rows with answers that these teach away.
fn taught_away() -> String {
    let row = |number: u32| {
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"say {number} backwards\"}},{{\"role\":\"assistant\",\"content\":\"qqqqqqqq\"}}]}}\n"
        )
    };
    (500..510).map(row).collect()
}

#[test]
fn an_adapter_a_merged_model_and_full_fine_tuning_answer_alike_after_export() {
    for (method, format) in [("LoRA", "Adapter"), ("LoRA", "Merged"), ("Full", "Merged")] {
        let job = Job::new();
        job.write_spec(&format!("{STEPS}  output: {{format: {format}}}\n"));
        job.edit("type: LoRA, lora: {rank: 4}", &format!("type: {method}"));
        job.edit("\"1e-2\"", if method == "Full" { "\"3e-3\"" } else { "\"1e-2\"" });
        let outcome = succeed(&job, &["run", "job.yaml"]);
        for line in ["exact match", "loss", "perplexity", "memory", "training time", "used", "output"] {
            assert!(outcome.stdout.contains(line), "{line}\n{}", outcome.stdout);
        }
        let output = job.path("runs/tiny/output");
        let weights = if format == "Adapter" { "adapter_model.safetensors" } else { "model.safetensors" };
        for name in [weights, "README.md", "loss.svg", "tokenizer.json", "chat_template.jinja"] {
            assert!(output.join(name).exists(), "{method} {format}: no {name}");
        }
        let report = job.report();
        assert_eq!(report.stage, Stage::Succeeded);
        assert!(report.metrics.iter().any(|metric| metric.name == "trainLoss"), "{:?}", report.metrics);
        let artifact = report.artifact.expect("an output");
        let digest = trainer::store::files::digest_file(&output.join(weights)).expect("readable");
        assert_eq!(artifact.digest, digest);
        // The model card and the folder of the run are ways to the same answer.
        let answers = ["runs/tiny/output", "runs/tiny"].map(|folder| {
            succeed(&job, &["generate", folder, "say 7 backwards", "--max-new-tokens", "8", "--precision", "fp32"])
                .stdout
        });
        assert_eq!(answers[0], answers[1]);
        let events = fs::read_dir(job.path("runs/tiny")).expect("a run").flatten();
        assert!(events.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("events.out.tfevents")));
    }
}

#[test]
fn a_merged_adapter_is_the_adapter_on_its_base() {
    let job = Job::new();
    job.write_spec(STEPS);
    succeed(&job, &["run", "job.yaml", "--dir", "adapter"]);
    job.write_spec(&format!("{STEPS}  output: {{format: Merged}}\n"));
    succeed(&job, &["run", "job.yaml", "--dir", "merged"]);
    for prompt in ["say 3 backwards", "say 41 backwards", "hello"] {
        let answer = |folder: &str| {
            succeed(&job, &["generate", folder, prompt, "--max-new-tokens", "12", "--precision", "fp32"]).stdout
        };
        assert_eq!(answer("adapter"), answer("merged"), "{prompt}");
    }
}

#[test]
fn gates_decide_what_is_published_and_a_failed_one_is_a_finished_run() {
    let gate = "gates: [{metric: exactMatch, operator: AtLeast, value: \"1.0\"}]";
    for (validation, publish, published) in [
        (gate, "ValidationPassed", false),
        (gate, "Always", true),
        ("gates: [{metric: evalLoss, operator: AtMost, value: \"100\"}]", "ValidationPassed", true),
    ] {
        let job = Job::new();
        job.write_spec(&format!(
            "{STEPS}  validation: {{{validation}, onFailure: Complete}}\n  output: {{publishWhen: {publish}}}\n"
        ));
        let outcome = succeed(&job, &["run", "job.yaml"]);
        let report = job.report();
        let validation = report.validation.expect("validated");
        assert_eq!(report.stage, Stage::Succeeded, "what validation found is not a failure of the run");
        assert_eq!(report.artifact.is_some(), published, "{}", outcome.stdout);
        assert_eq!(job.path("runs/tiny/output").exists(), published);
        assert_eq!(validation.verdict == Verdict::GateFailed, !validation.gates[0].passed);
        let again = succeed(&job, &["run", "job.yaml"]);
        assert!(again.stdout.starts_with("tiny is finished, nothing to do"), "{}", again.stdout);
    }
    let job = Job::new();
    job.write_spec(&format!("{STEPS}  validation: {{{gate}}}\n"));
    let outcome = succeed(&job, &["run", "job.yaml"]);
    assert!(outcome.stderr.contains("error: validation failed"), "{}", outcome.stderr);
}

#[test]
fn a_finished_run_whose_output_is_gone_writes_it_again() {
    let job = Job::new();
    job.write_spec(STEPS);
    succeed(&job, &["run", "job.yaml"]);
    let digest = job.adapter_digest();
    fs::remove_dir_all(job.path("runs/tiny/output")).expect("removable");
    let again = succeed(&job, &["run", "job.yaml"]);
    assert!(!again.stdout.contains("nothing to do"), "{}", again.stdout);
    assert_eq!(job.adapter_digest(), digest);
}

/// A judgement takes what training measured of the same weights; made again alone it measures them itself.
#[test]
fn a_judgement_that_is_made_again_finds_the_same() {
    for (metric, judged) in [("evalLoss", "Best"), ("exactMatch", "Best"), ("evalLoss", "Last")] {
        let job = Job::new();
        // The longer it trains the worse.
        job.write("test.jsonl", taught_away());
        job.write_spec(&format!(
            "{STEPS}  validation: {{everySteps: 2, metric: {metric}, evaluate: {judged}}}\n  output: {{publishWhen: Always}}\n"
        ));
        succeed(&job, &["run", "job.yaml"]);
        let first = untimed_validation(&job.report()).expect("validated");
        assert_eq!(first.step < 40, judged == "Best", "{first:?}");
        fs::remove_dir_all(job.path("runs/tiny/output")).expect("removable");
        succeed(&job, &["run", "job.yaml"]);
        assert_eq!(untimed_validation(&job.report()), Some(first));
    }
}

#[test]
fn forgetting_is_measured_and_judged() {
    for (tolerated, passed) in [("100", true), ("0", false)] {
        let job = Job::new();
        job.write("general.jsonl", taught_away());
        job.write_spec(&format!(
            "{STEPS}  validation: {{forgetting: {{dataset: {{uri: file://general.jsonl}}, maxLossIncrease: \"{tolerated}\"}}}}\n"
        ));
        let outcome = succeed(&job, &["run", "job.yaml"]);
        let validation = job.report().validation.expect("validated");
        let forgetting = validation.forgetting.expect("measured");
        assert!(forgetting.tuned_loss > forgetting.base_loss, "{forgetting:?}");
        assert_eq!(forgetting.passed, passed);
        assert!(outcome.stdout.contains("forgetting"), "{}", outcome.stdout);
    }
}

#[test]
fn early_stopping_ends_a_run_that_no_longer_improves() {
    let job = Job::new();
    // The rate is zero after the first step, so no later evaluation is better than the first.
    job.write_spec(
        "  hyperparameters: {maxSteps: 400, batchSize: 8, learningRate: \"1e-2\", scheduler: InverseSqrt, warmupRatio: \"0\", precision: FP32}\n  \
         validation: {everySteps: 2}\n  earlyStopping: {patience: 2, minDelta: \"50\"}\n",
    );
    let outcome = succeed(&job, &["run", "job.yaml"]);
    let report = job.report();
    assert_eq!((report.step, report.total_steps), (6, 400), "{}", outcome.stderr);
}

/// `metadata.generateName`, which the API server takes: the same file is the same run, another file another one.
#[test]
fn a_run_whose_name_is_made_is_found_again() {
    let job = Job::new();
    job.edit("{name: tiny}", "{generateName: tiny-}");
    job.edit("maxSteps: 60", "maxSteps: 2");
    let first = succeed(&job, &["run", "job.yaml"]);
    let again = succeed(&job, &["run", "job.yaml"]);
    assert!(again.stdout.contains(" is finished, nothing to do"), "{}", again.stdout);
    job.edit("maxSteps: 2", "maxSteps: 3");
    let other = succeed(&job, &["run", "job.yaml"]);
    assert!(!other.stdout.contains("nothing to do"), "{}", other.stdout);
    let runs = fs::read_dir(job.path("runs")).expect("runs").flatten();
    let names: Vec<String> = runs.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(names.len() == 2 && names.iter().all(|name| name.starts_with("tiny-")), "{names:?}\n{}", first.stderr);
}

#[test]
fn a_split_is_the_same_every_time_and_keeps_rows_apart() {
    let job = Job::new();
    job.write_rows("train.jsonl", 0..200);
    job.write_spec(STEPS);
    job.edit(", validation: {uri: file://test.jsonl}", ", splitPercent: 20");
    let data = ["a", "b"].map(|folder| {
        succeed(&job, &["plan", "job.yaml", "--dir", folder]);
        let text = fs::read_to_string(job.path(folder).join("prepared/data_report.json")).expect("a data report");
        serde_json::from_str::<crds::report::DataReport>(&text).expect("JSON")
    });
    assert_eq!(data[0].dataset_digest, data[1].dataset_digest);
    assert_eq!(data[0].rows + data[0].validation_rows, 200);
    assert!((20..60).contains(&data[0].validation_rows), "{}", data[0].validation_rows);
    assert_eq!(data[0].leaked, 0);
}

#[test]
fn the_plan_puts_both_methods_side_by_side_and_allocates_nothing() {
    let job = Job::new();
    job.write_spec(STEPS);
    let outcome = succeed(&job, &["plan", "job.yaml"]);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("LoRA") && lines[1].starts_with("Full"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("40 steps"), "{}", outcome.stdout);
    assert!(outcome.stderr.contains("learning rate: 1e-2"), "{}", outcome.stderr);
    assert!(job.checkpoints().is_empty() && !job.path("runs/tiny/report.json").exists());
}

/// One GET request, answered whole.
fn get(address: &str, path: &str) -> Option<String> {
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

#[test]
fn a_running_trainer_tells_how_far_it_is() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 4000");
    let mut child = job
        .command(&["run", "job.yaml", "--listen", "127.0.0.1:0"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the trainer starts");
    let stderr = child.stderr.take().expect("piped");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stderr)).map_while(Result::ok);
    let serving = lines.find(|line| line.starts_with("serving http://")).expect("it says where");
    let address = serving["serving http://".len()..].split('/').next().expect("an address").to_owned();
    // Somebody has to read what it prints, or it would wait for ever.
    let reader = std::thread::spawn(move || lines.count());
    let progress = loop {
        let body = get(&address, "/status").expect("it answers as long as it runs");
        let progress: Progress = serde_json::from_str(&body).expect("Progress");
        if progress.step > 10 && !progress.checkpoints.is_empty() {
            break progress;
        }
        std::thread::yield_now();
    };
    assert_eq!((progress.attempt, progress.total_steps, progress.stage), (1, 4000, Stage::Training));
    assert!(progress.tokens_per_second.is_some_and(|rate| rate > 0.0));
    let metrics = get(&address, "/metrics").expect("it answers");
    for series in
        ["finetune_train_loss{", "finetune_tokens_total{", "finetune_job_info{", "finetune_step_phase_seconds_bucket{"]
    {
        assert!(metrics.contains(series), "{series}\n{metrics}");
    }
    child.kill().expect("a child of ours");
    child.wait().expect("a child of ours");
    reader.join().expect("it read");
}

#[test]
fn dropout_and_noise_do_not_depend_on_packing_and_survive_a_kill() {
    let spec = |tokens: i64| {
        format!(
            "  checkpoint: {{everySteps: 4}}\n  hyperparameters: {{maxSteps: 60, batchSize: 8, microBatchTokens: {tokens}, neftuneAlpha: \"5\", learningRate: \"1e-3\", precision: FP32}}\n"
        )
    };
    let losses = |job: &Job| -> Vec<f64> {
        let text = fs::read_to_string(job.path("runs/tiny/metrics.jsonl")).expect("a record");
        let entries = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        entries.filter_map(|entry| entry["loss"].as_f64()).collect()
    };
    let job = |tokens: i64, dropout: &str| {
        let job = Job::new();
        job.write_spec(&spec(tokens));
        job.edit("lora: {rank: 4}", &format!("lora: {{rank: 4, dropout: \"{dropout}\"}}"));
        job
    };
    let run = |tokens: i64, dropout: &str| {
        let job = job(tokens, dropout);
        succeed(&job, &["run", "job.yaml"]);
        (losses(&job), job.adapter_digest())
    };
    let ((whole, digest), (split, _), (without, _)) = (run(4096, "0.3"), run(60, "0.3"), run(4096, "0"));
    assert_eq!(whole.len(), 60);
    for (step, (a, b)) in whole.iter().zip(&split).enumerate() {
        assert!((a - b).abs() / a < 1e-4, "step {step}: {a} in one micro-batch, {b} in several");
    }
    assert!(whole.iter().zip(&without).any(|(a, b)| (a - b).abs() / a > 1e-3), "dropout has no effect");
    let disturbed = job(4096, "0.3");
    for steps in [5, 11] {
        let mut child = disturbed.start();
        assert!(wait_for(&mut child, || disturbed.logged_steps() > steps), "it ended before {steps} steps");
        child.kill().expect("a child of ours");
        assert_eq!(child.wait().expect("a child of ours").code(), None, "it ended by itself");
    }
    let outcome = succeed(&disturbed, &["run", "job.yaml"]);
    assert!(outcome.stderr.contains("resumed at step"), "{}", outcome.stderr);
    assert_eq!((losses(&disturbed), disturbed.adapter_digest()), (whole, digest));
}

#[test]
fn memory_that_runs_out_halves_the_micro_batch_and_the_result_stays() {
    let job = Job::new();
    job.write_rows("train.jsonl", 200..600);
    job.write_spec(
        "  hyperparameters: {maxSteps: 2, batchSize: 400, microBatchTokens: 65536, learningRate: \"1e-3\", precision: FP32}\n",
    );
    succeed(&job, &["run", "job.yaml", "--dir", "free"]);
    // The step needs a few hundred MiB of address space beyond what the program takes by itself.
    let limited = |kib: u64| {
        let script = format!(
            "ulimit -v {kib}; exec taskset -c 0 {} run job.yaml --dir limited-{kib}",
            harness::trainer_binary().display()
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &script])
            .current_dir(job.folder())
            .output()
            .expect("bash runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let losses = |folder: &str| -> Vec<f64> {
        let text = fs::read_to_string(job.path(folder).join("metrics.jsonl")).expect("a record");
        text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["loss"].as_f64()).collect()
    };
    // Between too little to begin with and enough for everything lies what makes it fall back.
    let (mut too_little, mut enough) = (500_000, 4_000_000);
    let kib = loop {
        assert!(enough - too_little > 20_000, "no limit between {too_little} and {enough} KiB made it fall back");
        let kib = u64::midpoint(too_little, enough);
        match limited(kib) {
            (Some(0), stderr) if stderr.contains("out of memory at") && stderr.contains("going on with") => break kib,
            (Some(0), _) => enough = kib,
            _ => too_little = kib,
        }
    };
    for (free, limited) in losses("free").iter().zip(losses(&format!("limited-{kib}"))) {
        assert!((free - limited).abs() / free < 1e-5, "{free} {limited}");
    }
}

#[test]
fn a_profile_tells_where_the_time_of_a_step_goes_and_leaves_no_run() {
    let job = Job::new();
    let outcome = succeed(&job, &["profile", "job.yaml"]);
    let first = outcome.stdout.lines().next().expect("a line");
    // a step of T tokens, N of them trained: S ms, R tokens/s (…)
    let numbers: Vec<f64> = first.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    let [tokens, trained, milliseconds, rate] = numbers[..] else { panic!("{first}") };
    assert!(0.0 < trained && trained < tokens && milliseconds > 0.0 && rate > 0.0, "{first}");
    for word in ["this machine:", "mm fp32", "outside of operations", "Chrome trace"] {
        assert!(outcome.stdout.contains(word), "{word}\n{}", outcome.stdout);
    }
    // Each row, and the step, is rounded to a tenth of a millisecond.
    let profiled: f64 = first.split(['(', ' ']).rev().nth(4).and_then(|word| word.parse().ok()).expect(first);
    let table = outcome.stdout.lines().skip_while(|line| !line.starts_with("operation ")).skip(1);
    // Milliseconds stand before the first percentage.
    let milliseconds = |line: &str| line.split('%').next()?.split_whitespace().nth_back(1)?.parse::<f64>().ok();
    let rows: Vec<f64> = table
        .take_while(|line| !line.is_empty())
        .map(|line| milliseconds(line).unwrap_or_else(|| panic!("{line}")))
        .collect();
    assert!((rows.iter().sum::<f64>() - profiled).abs() < 0.05 * (rows.len() + 1) as f64 + 1e-6, "{}", outcome.stdout);
    let trace = fs::read(job.path("runs/tiny/profile.json")).expect("a trace");
    let trace: serde_json::Value = serde_json::from_slice(&trace).expect("JSON");
    assert!(trace["traceEvents"].as_array().is_some_and(|events| !events.is_empty()));
    assert!(job.checkpoints().is_empty() && !job.path("runs/tiny/report.json").exists());
}
