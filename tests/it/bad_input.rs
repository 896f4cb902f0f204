//! What bad input gets: the exit code and the first line of every case.

use std::fs;

use harness::Job;

/// Runs a job after `spoil`, and compares exit code and first error line.
fn check(name: &str, spoil: impl Fn(&Job), code: i32, expected: &str) {
    let job = Job::new();
    spoil(&job);
    let outcome = job.run();
    let first = outcome.first_error(job.folder());
    assert!(
        outcome.code == Some(code) && first.starts_with(expected),
        "{name}:\n  found    {:?} {first}\n  expected {code} {expected}\n{}",
        outcome.code,
        outcome.stderr
    );
    assert!(!outcome.stderr.contains("panicked"), "{name}: {}", outcome.stderr);
}

const ROW: &str = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;

#[test]
fn the_file() {
    check(
        "missing file",
        |job| fs::remove_file(job.path("job.yaml")).expect("removable"),
        66,
        "job.yaml: cannot be read",
    );
    check(
        "unknown field",
        |job| job.edit("batchSize", "batchsize"),
        64,
        "job.yaml:10:46: spec.hyperparameters.batchsize: unknown field; did you mean batchSize?",
    );
    check(
        "unquoted decimal",
        |job| job.edit("\"1e-2\"", "2e-4"),
        64,
        "job.yaml:10:63: spec.hyperparameters.learningRate: found the number 2e-4, expected a quoted decimal: write learningRate: \"2e-4\"",
    );
    check(
        "not supported yet",
        |job| job.edit("type: LoRA", "type: QLoRA"),
        64,
        "job.yaml:7:18: spec.method.type: not supported yet: QLoRA; use LoRA",
    );
    check(
        "unknown target",
        |job| job.edit("rank: 4", "rank: 4, targetModules: [w_proj]"),
        64,
        "method.lora.targetModules: w_proj is no linear layer of the model; expected some of q_proj, k_proj",
    );
}

#[test]
fn the_rows() {
    let train = |content: &'static str| move |job: &Job| job.write("train.jsonl", content);
    check(
        "missing",
        |job| fs::remove_file(job.path("train.jsonl")).expect("removable"),
        66,
        "spec.dataset.train.uri: train.jsonl does not exist",
    );
    check("broken line", train("{\"text\":\"a\"}\n{\"text\":\n"), 65, "train.jsonl:2:8: not valid JSON");
    check(
        "unknown role",
        train(r#"{"messages":[{"role":"robot","content":"q"}]}"#),
        65,
        "train.jsonl:1:1: messages[0]: role \"robot\"; expected system, developer, user, assistant or tool",
    );
    check(
        "empty answer",
        train(r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":""}]}"#),
        65,
        "train.jsonl:1:1: messages[1]: the answer is empty",
    );
    check(
        "two formats",
        train(r#"{"text":"a","messages":[]}"#),
        65,
        "train.jsonl:1:1: the row fits two formats at once",
    );
    check(
        "invalid UTF-8",
        |job| job.write("train.jsonl", b"{\"text\":\"\xff\"}"),
        65,
        "train.jsonl:1:10: not valid UTF-8",
    );
    check(
        "all answers truncated",
        |job| job.edit("batchSize", "maxSequenceLength: 8, batchSize"),
        65,
        "train.jsonl:1: all training rows lose answer tokens to the sequence length of 8",
    );
    check(
        "leaked rows",
        |job| {
            let rows = fs::read_to_string(job.path("train.jsonl")).expect("readable") + ROW;
            job.write("train.jsonl", rows);
            job.write("test.jsonl", ROW);
        },
        65,
        "train.jsonl:25: 1 training row(s) are in the validation rows too",
    );
    check(
        "a template that raises",
        |job| job.write("model/chat_template.jinja", "{{ raise_exception('no system role here') }}"),
        65,
        "train.jsonl:1: the chat template refuses this conversation: no system role here",
    );
    check(
        "odd tool calls",
        train(r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","tool_calls":["x"]}]}"#),
        65,
        "train.jsonl:1:1: messages[1]: tool_calls[0]: found a string, expected an object with function",
    );
    check(
        "an unclosed template",
        |job| job.write("model/chat_template.jinja", "{%}"),
        65,
        "the chat template is not valid: ",
    );
    check(
        "a template without the answer",
        |job| {
            let text = fs::read_to_string(job.path("model/chat_template.jinja")).expect("readable");
            job.write("model/chat_template.jinja", text.replace("{{ m.content }}", ""));
        },
        65,
        "train.jsonl:1: messages[1]: \"0\" of the answer is not in what the chat template makes of it",
    );
    check(
        "a template that tags no answer",
        |job| {
            let text = fs::read_to_string(job.path("model/chat_template.jinja")).expect("readable");
            job.write(
                "model/chat_template.jinja",
                text + "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            );
        },
        65,
        "train.jsonl:1: the chat template marks 0 part(s) with {% generation %} where the row has 1 assistant message(s)",
    );
    check(
        "the tokenizer of another model",
        |job| {
            let text = fs::read_to_string(job.path("model/config.json")).expect("readable");
            let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            config["vocab_size"] = 200.into();
            job.write("model/config.json", config.to_string());
        },
        65,
        "the tokenizer gives token id 255 (\"<|im_end|>\"), config.json says vocab_size 200: tokenizer and model do not belong",
    );
    check(
        "a template that loops",
        |job| {
            job.write(
                "model/chat_template.jinja",
                "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
            );
        },
        65,
        "train.jsonl:1: the chat template refuses this conversation: ",
    );
}

/// Rewrites the tiny model's weights with one tensor changed.
fn spoil_tensor(job: &Job, change: impl Fn(&mut Vec<trainer::store::weights::TensorView<'_>>)) {
    let path = job.path("model/model.safetensors");
    let bytes = fs::read(&path).expect("readable");
    let parsed = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
    let mut tensors: Vec<trainer::store::weights::TensorView> = parsed
        .tensors()
        .into_iter()
        .map(|(name, view)| trainer::store::weights::TensorView {
            name,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: &bytes[view.data().as_ptr() as usize - bytes.as_ptr() as usize..][..view.data().len()],
        })
        .collect();
    change(&mut tensors);
    let mut output = Vec::new();
    trainer::store::weights::write_safetensors(&mut output, &[], &tensors).expect("a Vec takes everything");
    fs::write(path, output).expect("writable");
}

const NORM: &str = "model.norm.weight";

/// A run that was refused once is refused again, and so is whoever asks the model.
#[test]
fn weights_that_are_no_numbers() {
    let job = Job::new();
    let nan: &'static [u8] = Box::leak([f32::NAN.to_le_bytes(); 64].concat().into_boxed_slice());
    spoil_tensor(&job, |tensors| {
        tensors.iter_mut().filter(|tensor| tensor.name == NORM).for_each(|tensor| tensor.data = nan);
    });
    for arguments in [&["run", "job.yaml"][..], &["run", "job.yaml"], &["generate", "model", "7"]] {
        let outcome = job.trainer(arguments);
        let first = outcome.first_error(job.folder());
        let expected = "model/model.safetensors: tensor model.norm.weight holds NaN or infinite values";
        assert!(outcome.code == Some(65) && first.starts_with(expected), "{arguments:?}: {first}\n{}", outcome.stderr);
    }
}

/// Half of a tensor's numbers are not there.
fn halve_norm(job: &Job) {
    spoil_tensor(job, |tensors| {
        for tensor in tensors.iter_mut().filter(|tensor| tensor.name == NORM) {
            (tensor.shape, tensor.data) = (vec![32], &tensor.data[..tensor.data.len() / 2]);
        }
    });
}

/// What was trained is merged into a base whose tensors are those of its `config.json`, though it was read before.
#[test]
fn the_base_that_is_merged_into() {
    let job = Job::new();
    halve_norm(&job);
    let stop = trainer::ground::stop::Stop::default();
    let files = trainer::store::weights::WeightFiles::open(&job.path("model")).expect("a file");
    let merged = trainer::model::merged(&job.path("model"), &files, &files.files()[0], None, &stop);
    let error = merged.err().expect("misshapen").to_string();
    assert!(error.contains("tensor model.norm.weight has shape [32], config.json says [64]"), "{error}");
}

#[test]
fn the_weights() {
    check(
        "missing tensor",
        |job| spoil_tensor(job, |tensors| tensors.retain(|tensor| tensor.name != NORM)),
        65,
        "model: tensor model.norm.weight is missing",
    );
    check("misshapen tensor", halve_norm, 65, "model: tensor model.norm.weight has shape [32], config.json says [64]");
    check(
        "weights of another family",
        |job| {
            let bias: &'static [u8] = &[0; 4 * 64];
            spoil_tensor(job, |tensors| {
                let name = "model.layers.0.self_attn.q_proj.bias".to_owned();
                tensors.push(trainer::store::weights::TensorView {
                    name,
                    dtype: safetensors::Dtype::F32,
                    shape: vec![64],
                    data: bias,
                });
            });
        },
        65,
        "model: the files have model.layers.0.self_attn.q_proj.bias, which a model as config.json describes it has not",
    );
    check(
        "truncated file",
        |job| {
            let bytes = fs::read(job.path("model/model.safetensors")).expect("readable");
            job.write("model/model.safetensors", &bytes[..bytes.len() / 2]);
        },
        65,
        "model/model.safetensors: not a valid safetensors file",
    );
    check(
        "hostile header",
        |job| job.write("model/model.safetensors", [0xff; 64]),
        65,
        "model/model.safetensors: the header says 18446744073709551615 bytes",
    );
    check(
        "no heads",
        |job| {
            let text = fs::read_to_string(job.path("model/config.json")).expect("readable");
            let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            config["num_attention_heads"] = 0.into();
            job.write("model/config.json", config.to_string());
        },
        64,
        "model/config.json: num_attention_heads is 0; expected a number between 1 and 65536",
    );
    check(
        "another architecture",
        |job| {
            let text = fs::read_to_string(job.path("model/config.json")).expect("readable");
            job.write("model/config.json", text.replace("LlamaForCausalLM", "GPT2LMHeadModel"));
        },
        64,
        "model/config.json: not supported yet: architecture GPT2LMHeadModel",
    );
}

#[test]
fn numbers_and_memory() {
    check("NaN loss", |job| job.edit("\"1e-2\"", "\"1e30\""), 79, "step ");
    check(
        "an accelerator that is not there",
        |job| job.edit("  checkpoint:", "  resources: {limits: {nvidia.com/gpu: \"1\"}}\n  checkpoint:"),
        64,
        "spec.resources asks for an accelerator and none can be used here (no CUDA: ",
    );
    check(
        "it cannot fit",
        |job| job.edit("  checkpoint:", "  resources: {limits: {memory: 1Mi}}\n  checkpoint:"),
        71,
        "the run needs ",
    );
}

#[test]
fn updates_in_the_backward_pass_say_what_they_cannot_go_with() {
    let in_backward = |hyperparameters: &'static str| {
        move |job: &Job| {
            job.edit("type: LoRA, lora: {rank: 4}", "type: Full, full: {optimizerInBackward: true}");
            job.edit("precision: FP32", &format!("precision: FP32{hyperparameters}"));
        }
    };
    let clipped = "spec.hyperparameters.maxGradNorm: method.full.optimizerInBackward never has all gradients at once to clip them";
    check("clipping by default", in_backward(""), 64, &format!("job.yaml:10:3: {clipped}"));
    check("clipping", in_backward(", maxGradNorm: \"1\""), 64, &format!("job.yaml:10:101: {clipped}"));
    check(
        "several micro-batches",
        in_backward(", maxGradNorm: \"0\", microBatchTokens: 64"),
        64,
        "job.yaml:10:124: spec.hyperparameters.microBatchTokens: method.full.optimizerInBackward computes the whole step at once",
    );
    check(
        "adapters",
        |job| job.edit("rank: 4}", "rank: 4}, full: {optimizerInBackward: true}"),
        64,
        "job.yaml:7:41: spec.method.full: full is only valid for type Full",
    );
    let not_finite = Job::new();
    in_backward(", maxGradNorm: \"0\"")(&not_finite);
    not_finite.edit("\"1e-2\"", "\"1e30\"");
    let outcome = not_finite.run();
    let moved = "layers above the first gradient that was not finite were moved by them, and none was saved";
    assert!(outcome.code == Some(79) && outcome.stderr.contains(moved), "{outcome:?}");

    // A step that does not fit is not cut into micro-batches: what fits is a smaller one.
    let large = Job::new();
    in_backward(", maxGradNorm: \"0\"")(&large);
    large.write_rows("train.jsonl", 200..600);
    large.edit("batchSize: 8", "batchSize: 400");
    large.edit("  checkpoint:", "  resources: {limits: {memory: 1Mi}}\n  checkpoint:");
    let needed = |outcome: &harness::Outcome| -> f64 {
        let (_, after) = outcome.stderr.split_once("the run needs ").unwrap_or_else(|| panic!("{outcome:?}"));
        after.split_once(" MiB").and_then(|(number, _)| number.parse().ok()).unwrap_or_else(|| panic!("{outcome:?}"))
    };
    let limit = needed(&large.trainer(&["plan", "job.yaml"])) as u64 - 2;
    large.edit("memory: 1Mi", &format!("memory: {limit}Mi"));
    let outcome = large.trainer(&["plan", "job.yaml"]);
    let remedy = "the cheapest change that fits is hyperparameters.batchSize: 200: ";
    assert!(outcome.code == Some(71) && outcome.stderr.contains(remedy), "{outcome:?}");
    large.edit("batchSize: 400", "batchSize: 200");
    let outcome = large.trainer(&["plan", "job.yaml"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

#[test]
fn a_full_disk_keeps_what_is_there_and_the_run_goes_on_once_there_is_space() {
    let undisturbed = Job::new();
    assert_eq!(undisturbed.run().code, Some(0));
    let job = Job::new();
    let mut child = job.start();
    let committed = || {
        let is_whole = |path: &std::path::PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"))
        };
        job.checkpoints().into_iter().filter(is_whole).collect::<Vec<_>>()
    };
    while committed().is_empty() {
        assert!(child.try_wait().expect("a child of ours").is_none(), "it ended before its first checkpoint");
        std::thread::yield_now();
    }
    child.kill().expect("a child of ours");
    child.wait().expect("a child of ours");
    let before = committed();
    let moments = fs::metadata(before[0].join("optimizer.safetensors")).expect("there").len();
    // A limit on the size of files makes the write beyond it fail, as a full disk would: here the moments' last KiB.
    let script = format!(
        "ulimit -f {}; trap '' XFSZ; exec taskset -c 0 {} run job.yaml",
        moments / 1024 - 1,
        harness::trainer_binary().display()
    );
    let output =
        std::process::Command::new("bash").args(["-c", &script]).current_dir(job.folder()).output().expect("bash runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(73), "{stderr}");
    assert!(stderr.contains("cannot be written") && stderr.contains("older checkpoints are untouched"), "{stderr}");
    let failures = stderr.matches("warning: no checkpoint at step").count();
    assert_eq!(failures, 4, "it goes on for three intervals and ends with the next\n{stderr}");
    assert_eq!(committed(), before);
    assert_eq!(job.run().code, Some(0));
    assert_eq!(job.adapter_digest(), undisturbed.adapter_digest());
}
