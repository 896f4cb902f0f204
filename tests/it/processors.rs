//! One tiny job of each method and optimizer, from its rows to an answer: what `make test` runs a second time on an emulated
//! processor, so that an instruction which a plainer one lacks ends a test and not a user's job. And what is told of processors.

use harness::{Job, Outcome};

/// Rows are answered too, by the base model and by what was trained.
const SPEC: &str = "  validation: {baselines: {zeroShot: true, fewShot: {examples: 1}}}\n  \
                    hyperparameters: {maxSteps: 3, batchSize: 4, learningRate: \"1e-3\"}\n";

fn check(method: &str, hyperparameters: &str) {
    let job = Job::new();
    job.write_rows("test.jsonl", 100..102);
    job.write_spec(SPEC);
    job.edit("type: LoRA, lora: {rank: 4}", method);
    job.edit("maxSteps: 3", &format!("maxSteps: 3{hyperparameters}"));
    let outcome = job.run();
    assert_eq!(outcome.code, Some(0), "{method}{hyperparameters}\n{}", outcome.stderr);
    if let Ok(expected) = std::env::var("FINETUNE_TEST_INSTRUCTIONS") {
        assert!(device(&outcome).contains(&format!("({expected})")), "{}", device(&outcome));
    }
    if harness::is_on_gpu() {
        let device = device(&outcome);
        assert!(device.contains("CUDA device(s) found") && !device.contains("libtorch's kernels"), "{device}");
    }
    assert_eq!(job.report().step, 3);
    let answer = job.trainer(&["generate", "runs/tiny", "say 7 backwards", "--max-new-tokens", "4"]);
    assert_eq!(answer.code, Some(0), "{method}{hyperparameters}\n{}", answer.stderr);
}

#[test]
fn lora() {
    check("type: LoRA, lora: {rank: 4, dropout: \"0.1\"}", "");
}

#[test]
fn full() {
    check("type: Full", "");
}

#[test]
fn full_with_moments_in_8_bits() {
    check("type: Full", ", optimizer: AdamW8Bit");
}

#[test]
fn full_with_updates_in_the_backward_pass() {
    check("type: Full, full: {optimizerInBackward: true}", ", maxGradNorm: \"0\"");
}

#[test]
fn full_with_both() {
    check("type: Full, full: {optimizerInBackward: true}", ", optimizer: AdamW8Bit, maxGradNorm: \"0\"");
}

/// The line that names the device.
fn device(outcome: &Outcome) -> &str {
    outcome.stderr.lines().find(|line| line.starts_with("device: ")).unwrap_or_else(|| panic!("{}", outcome.stderr))
}

/// As on a processor that has AVX2 and nothing above it.
fn on_avx2(job: &Job, arguments: &[&str]) -> Outcome {
    let mut command = job.command(arguments);
    job.outcome(command.env("ATEN_CPU_CAPABILITY", "avx2"))
}

#[test]
fn what_kernels_may_use_can_be_limited_and_precision_follows() {
    let job = Job::new();
    job.write_spec(SPEC);
    let outcome = on_avx2(&job, &["run", "job.yaml"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(device(&outcome).contains("(avx2)"), "{}", outcome.stderr);
    let precision = outcome.stderr.lines().find(|line| line.starts_with("precision: Float (")).expect("fp32");
    // On a processor that has no more the variable changes nothing.
    assert!(precision.contains("ATEN_CPU_CAPABILITY") || precision.contains("no bf16 arithmetic"), "{precision}");
}

/// libtorch would believe it, and end with the first instruction that is not there.
#[test]
fn kernels_may_not_be_let_use_what_the_processor_lacks() {
    let job = Job::new();
    let outcome = job.outcome(job.command(&["run", "job.yaml"]).env("ATEN_CPU_CAPABILITY", "avx512"));
    if trainer::compute::shim::cpu::processor() >= trainer::compute::shim::cpu::Instructions::Avx512
        && std::env::var("FINETUNE_EMULATOR").is_err()
    {
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    } else {
        assert_eq!(outcome.code, Some(64), "{}", outcome.stderr);
        assert!(
            outcome.stderr.contains("ATEN_CPU_CAPABILITY is avx512, and this processor has Avx2 at most"),
            "{}",
            outcome.stderr
        );
    }
}

#[test]
fn bf16_where_the_processor_has_none_is_warned_about_and_measured_only_where_it_is_used() {
    let job = Job::new();
    job.write_spec(SPEC);
    job.edit("maxSteps: 3", "maxSteps: 3, precision: BF16");
    let outcome = on_avx2(&job, &["profile", "job.yaml"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let warning = "warning: precision BF16: this CPU has no bf16 arithmetic, a matrix product takes ";
    assert!(outcome.stderr.contains(warning), "{}", outcome.stderr);
    assert!(outcome.stdout.contains(" GFLOP/s in bf16, "), "{}", outcome.stdout);
    job.edit("precision: BF16", "precision: FP32");
    let outcome = on_avx2(&job, &["profile", "job.yaml"]);
    assert!(!outcome.stderr.contains("warning: precision"), "{}", outcome.stderr);
    assert!(!outcome.stdout.contains("in bf16"), "{}", outcome.stdout);
}
