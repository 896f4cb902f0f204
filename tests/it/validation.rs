//! How a result is measured: answers of many prompts at once, examples in the prompt, what cannot be measured.

use std::fs;

use crds::report::Verdict;
use crds::run::Optimizer;
use harness::{Job, device, golden};
use serde_json::json;
use tch::Kind;
use trainer::compute::linear::Adapters;
use trainer::data::tokenizer::Tokenizer;
use trainer::ground::stop::Stop;
use trainer::judge::generate::{Answer, Limits, StopText, generate};
use trainer::model::{Built, Decoder, Source, build};

fn tiny_model(max_positions: i64) -> Decoder {
    let device = device();
    tch::set_num_threads(1);
    let folder = golden("tiny-llama");
    let source = Source {
        folder: &folder,
        method: None,
        optimizer: Optimizer::AdamW,
        kind: Kind::Float,
        device,
        seed: 1,
        max_positions,
    };
    let Built { model, .. } = build(&source).unwrap_or_else(|error| panic!("{error}"));
    model
}

/// Prompts of these lengths, every one of its own.
fn prompts(lengths: &[u32]) -> Vec<Vec<u32>> {
    lengths.iter().map(|&length| (0..length).map(|index| (index * 7 + length * 13) % 250).collect()).collect()
}

fn limits(max_new_tokens: i64, end_tokens: Vec<u32>) -> Limits<'static> {
    Limits { max_new_tokens, end_tokens, stop_text: None, cache_tokens: 100_000 }
}

fn answers(model: &Decoder, prompts: &[Vec<u32>], limits: &Limits) -> Vec<Answer> {
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    generate(model, &prompts, Adapters::Off, limits, &Stop::default(), &mut |_| ()).expect("no stop")
}

#[test]
fn answers_that_end_leave_the_batch_and_change_no_other() {
    let model = tiny_model(512);
    let prompts = prompts(&[5, 9, 9, 14, 21, 22, 30, 41, 3]);
    let free = answers(&model, &prompts, &limits(24, Vec::new()));
    // Ends that some rows meet early, some late, some never.
    let ends = vec![free[0].tokens[1], free[3].tokens[6], free[5].tokens[12]];
    let alone: Vec<Answer> = prompts
        .iter()
        .map(|prompt| answers(&model, std::slice::from_ref(prompt), &limits(24, ends.clone())).remove(0))
        .collect();
    // A cache for each prompt, two slots for those that are nearly as long, four, and one for each.
    for cache_tokens in [1, 110, 220, 100_000] {
        let limits = Limits { cache_tokens, ..limits(24, ends.clone()) };
        assert_eq!(answers(&model, &prompts, &limits), alone, "{cache_tokens}");
    }
    let ended = alone.iter().filter(|answer| answer.ended).count();
    assert!((1..prompts.len()).contains(&ended), "{alone:?}");
    for (answer, free) in alone.iter().zip(&free) {
        assert!(free.tokens.starts_with(&answer.tokens), "{answer:?} {free:?}");
        assert_eq!(answer.generated, answer.tokens.len() + usize::from(answer.ended));
    }
}

#[test]
fn a_short_prompt_is_answered_at_length_beside_one_that_fills_the_context() {
    let model = tiny_model(64);
    let prompts = prompts(&[4, 60, 63, 64]);
    for cache_tokens in [1, 100_000] {
        let limits = Limits { cache_tokens, ..limits(40, Vec::new()) };
        let together = answers(&model, &prompts, &limits);
        assert_eq!(together.iter().map(|answer| answer.tokens.len()).collect::<Vec<_>>(), [40, 4, 1, 0]);
        assert!(together.iter().all(|answer| !answer.ended));
        assert_eq!(together[0], answers(&model, &prompts[..1], &limits)[0]);
    }
    assert_eq!(answers(&model, &prompts[3..], &limits(40, Vec::new())), [Answer::default()]);
}

/// Two of them are more than goes through the model at once, and so is the last by itself.
#[test]
fn long_prompts_begin_one_after_another() {
    let model = tiny_model(4096);
    let prompts = prompts(&[1100, 1200, 1300, 2100]);
    let alone =
        prompts.iter().map(|prompt| answers(&model, std::slice::from_ref(prompt), &limits(6, Vec::new())).remove(0));
    let alone: Vec<Answer> = alone.collect();
    assert_eq!(answers(&model, &prompts, &limits(6, Vec::new())), alone);
}

#[test]
fn what_all_prompts_begin_with_is_not_answered_twice() {
    let model = tiny_model(512);
    let common = prompts(&[33]).remove(0);
    let prompts: Vec<Vec<u32>> = prompts(&[1, 2, 5, 9]).into_iter().map(|own| [common.clone(), own].concat()).collect();
    let alone: Vec<Answer> = prompts
        .iter()
        .map(|prompt| answers(&model, std::slice::from_ref(prompt), &limits(12, Vec::new())).remove(0))
        .collect();
    for cache_tokens in [1, 64, 100_000] {
        let limits = Limits { cache_tokens, ..limits(12, Vec::new()) };
        assert_eq!(answers(&model, &prompts, &limits), alone, "{cache_tokens}");
        // Prompts that are equal have one token each of their own.
        let twice = [prompts[3].clone(), prompts[3].clone()];
        assert_eq!(answers(&model, &twice, &limits), [alone[3].clone(), alone[3].clone()]);
    }
}

#[test]
fn an_answer_ends_at_a_stop_text_as_well() {
    let job = Job::new();
    let tokenizer = Tokenizer::open(&job.path("model")).expect("a tokenizer");
    let model = tiny_model(512);
    let prompts = prompts(&[5, 9]);
    let free = answers(&model, &prompts, &limits(24, Vec::new()));
    let decode = |answer: &Answer| tokenizer.decode(&answer.tokens).expect("decodes");
    let text = decode(&free[0]);
    let stop: String = text.chars().skip(4).take(2).collect();
    let stop_text = Some(StopText { text: &stop, tokenizer: &tokenizer });
    let stopped = answers(&model, &prompts[..1], &Limits { stop_text, ..limits(24, Vec::new()) });
    assert!(stopped[0].ended && decode(&stopped[0]).ends_with(&stop), "{text:?} {stop:?} {stopped:?}");
    assert!(stopped[0].tokens.len() < 24 && free[0].tokens.starts_with(&stopped[0].tokens));
}

/// Rows that spell numbers backwards, as prompt and completion.
fn write_pairs(job: &Job, name: &str, numbers: std::ops::Range<u32>) {
    let row = |number: u32| {
        let answer: String = number.to_string().chars().rev().collect();
        json!({"prompt": format!("say {number} backwards: "), "completion": answer}).to_string() + "\n"
    };
    job.write(name, numbers.map(row).collect::<String>());
}

#[test]
fn examples_in_the_prompt_are_measured_by_every_metric() {
    for pairs in [false, true] {
        let job = Job::new();
        if pairs {
            write_pairs(&job, "train.jsonl", 200..224);
            write_pairs(&job, "test.jsonl", 100..112);
        } else {
            job.write_rows("test.jsonl", 100..112);
        }
        job.edit(
            "{zeroShot: false, fewShot: {examples: 0}}",
            "{zeroShot: true, fewShot: {examples: 3}}, gates: [{metric: evalLoss, operator: ImprovesOn, baseline: FewShot, by: \"0.1\"}, \
             {metric: tokenAccuracy, operator: ImprovesOn, baseline: Base, by: \"0.1\"}]",
        );
        let outcome = job.run();
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let report = job.report().validation.expect("validated");
        let few_shot = report.few_shot.expect("measured");
        assert_eq!((report.rows, report.generated_rows, report.few_shot_rows), (12, Some(12), Some(12)));
        for value in [few_shot.eval_loss, few_shot.perplexity, few_shot.token_accuracy, few_shot.exact_match] {
            assert!(value.is_some_and(f64::is_finite), "{few_shot:?}");
        }
        let gate = &report.gates[0];
        assert_eq!((gate.passed, gate.baseline), (true, few_shot.eval_loss));
        let lines = fs::read_to_string(job.path("runs/tiny/answers.jsonl")).expect("answers");
        let answers: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(
            answers.iter().map(|answer| answer["line"].as_u64()).collect::<Vec<_>>(),
            (1..=12).map(Some).collect::<Vec<_>>()
        );
        let generation = report.generation.expect("answered");
        for (name, scores, generated) in [
            ("tuned", Some(report.tuned), generation.tuned),
            ("zeroShot", report.zero_shot, generation.zero_shot),
            ("fewShot", report.few_shot, generation.few_shot),
        ] {
            let right = answers.iter().filter(|answer| answer[name]["right"] == true).count();
            assert_eq!(scores.and_then(|scores| scores.exact_match), Some(right as f64 / 12.0), "{name}");
            assert!(generated.is_some_and(|generated| generated.tokens >= 12), "{name}: {generated:?}");
        }
        // The tuned model is compared on the tokens that it was asked for there, too: without its stop token.
        assert_eq!(gate.observed != report.tuned.eval_loss, pairs, "{report:?}");
        assert_eq!(report.verdict, Verdict::Better, "{}", report.summary);
        let loss_line = outcome.stdout.lines().find(|line| line.starts_with("loss ")).expect("a table");
        assert!(!loss_line.contains('–'), "{}", outcome.stdout);
    }
}

#[test]
fn every_row_is_asked_after_as_many_examples_as_fit_the_longest() {
    let job = Job::new();
    // The context is 512 bytes: three examples and the second row are longer.
    let turn =
        |user: &str| json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "ok"}]});
    let train: String = (0..24).map(|row| format!("{}\n", turn(&format!("row {row} {}", "a".repeat(30))))).collect();
    let long = "b".repeat(400);
    job.write("train.jsonl", train + &format!("{}\n", turn(&format!("c{long}"))));
    job.write("test.jsonl", format!("{}\n{}\n", turn("short"), turn(&long)));
    job.edit("{zeroShot: false, fewShot: {examples: 0}}", "{fewShot: {examples: 3}}");
    let outcome = job.run();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let report = job.report().validation.expect("validated");
    assert_eq!((report.rows, report.generated_rows, report.few_shot_rows), (2, Some(2), Some(2)));
    let used = report.few_shot_examples.expect("measured");
    assert!((1..3).contains(&used), "{used}");
    assert!(outcome.stdout.contains(&format!("base+{used}")), "{}", outcome.stdout);
    assert!(outcome.stderr.contains(&format!("3 asked for, {used} used")), "{}", outcome.stderr);
}

#[test]
fn full_fine_tuning_writes_the_judged_weights_after_the_base_was_measured() {
    let weights = |baselines: &str| {
        let job = Job::new();
        job.edit("type: LoRA, lora: {rank: 4}", "type: Full");
        job.edit("baselines: {zeroShot: false, fewShot: {examples: 0}}", baselines);
        let outcome = job.run();
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let digest = trainer::store::files::digest_file(&job.path("runs/tiny/output/model.safetensors"));
        (digest.expect("an output"), job.report().validation.expect("validated"))
    };
    let (expected, _) = weights("baselines: {zeroShot: false, fewShot: {examples: 0}}");
    let (digest, report) = weights("baselines: {zeroShot: true, fewShot: {examples: 1}}");
    assert_eq!(digest, expected);
    assert!(report.zero_shot.expect("measured").eval_loss > report.tuned.eval_loss, "{report:?}");
}

/// A job whose `spec.validation` cannot be measured is refused before training.
fn check_refused(spoil: impl Fn(&Job), expected: &str) {
    let job = Job::new();
    spoil(&job);
    let outcome = job.run();
    assert_eq!(outcome.code, Some(64), "{}", outcome.stderr);
    let first = outcome.first_error(job.folder());
    assert!(first.starts_with(expected), "{first}");
    assert_eq!(job.logged_steps(), 0);
}

#[test]
fn what_cannot_be_measured_is_refused_before_training() {
    let long = || {
        let user = "q".repeat(200);
        json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "a"}]}).to_string()
    };
    check_refused(
        |job| {
            job.write("test.jsonl", long());
            job.edit("batchSize", "maxSequenceLength: 60, batchSize");
        },
        "spec.validation: no validation row has an answer token within the sequence length of",
    );
    check_refused(
        |job| {
            fs::write(job.path("general.jsonl"), long()).expect("writable");
            job.edit("baselines:", "forgetting: {dataset: {uri: file://general.jsonl}}, baselines:");
            job.edit("batchSize", "maxSequenceLength: 60, batchSize");
        },
        "spec.validation: no row of forgetting.dataset has a token to measure within the sequence length of",
    );
    let gate = |baseline: &str| {
        format!("gates: [{{metric: evalLoss, operator: ImprovesOn, baseline: {baseline}, by: \"0.1\"}}], baselines:")
    };
    check_refused(
        |job| job.edit("baselines:", &gate("Base")),
        "spec.validation: a gate compares evalLoss with the base model, which is not measured; set baselines.zeroShot: true",
    );
    check_refused(
        |job| job.edit("baselines:", &gate("FewShot")),
        "spec.validation: a gate compares evalLoss with examples in the prompt, which is not measured; set baselines.fewShot.examples",
    );
    check_refused(
        |job| {
            job.edit("baselines:", &gate("FewShot"));
            job.edit("{examples: 0}", "{examples: 20}");
            // An example beside which no row fits into the context of 512 bytes.
            let row = |number: u32| {
                let user = format!("{number} {}", "q".repeat(460));
                json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "a"}]})
                    .to_string()
            };
            fs::write(job.path("train.jsonl"), (0..24).map(row).collect::<Vec<_>>().join("\n")).expect("writable");
        },
        "spec.validation: a gate compares evalLoss with examples in the prompt, and no validation row can be measured so: with 20 examples",
    );
}
