//! A tiny job in a folder of its own, and the trainer's binary to run it with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crds::report::{Generation, ValidationReport};
use serde_json::{Value, json};

/// The trainer as it was built beside this test.
pub fn trainer_binary() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let folder = test.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
    let binary = folder.join("finetune-trainer");
    assert!(binary.exists(), "{} is missing: run `cargo build --release` first, as `make test` does", binary.display());
    binary
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// The first line that begins with `error: `, with `folder` taken out of its paths.
    pub fn first_error(&self, folder: &Path) -> String {
        let line = self.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        line.replace(&format!("{}/", folder.display()), "").replace("error: ", "")
    }
}

/// A folder with a tiny Llama, rows and a FineTuneJob.
#[derive(Debug)]
pub struct Job {
    folder: tempfile::TempDir,
}

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

impl Job {
    /// Twenty-four rows that repeat a letter, three steps' batch of eight, LoRA on a tiny random Llama, fp32.
    pub fn new() -> Self {
        let job = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        let model = job.path("model");
        fs::create_dir(&model).expect("writable");
        for name in ["config.json", "model.safetensors"] {
            fs::copy(crate::golden("tiny-llama").join(name), model.join(name)).expect("golden model");
        }
        fs::write(model.join("tokenizer.json"), byte_tokenizer().to_string()).expect("writable");
        let special = json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"});
        fs::write(model.join("tokenizer_config.json"), special.to_string()).expect("writable");
        fs::write(model.join("chat_template.jinja"), TEMPLATE).expect("writable");
        job.write_rows("train.jsonl", 0..24);
        job.write_rows("test.jsonl", 100..106);
        job.write_spec("  validation: {everySteps: 20, baselines: {zeroShot: false, fewShot: {examples: 0}}}\n  checkpoint: {everySteps: 4}\n  hyperparameters: {maxSteps: 60, batchSize: 8, learningRate: \"1e-2\", precision: FP32}\n");
        job
    }

    /// A path inside the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("writable");
    }

    /// Writes conversations numbered `numbers`.
    pub fn write_rows(&self, name: &str, numbers: std::ops::Range<u32>) {
        let row = |number: u32| {
            let user = format!("say {number} backwards");
            let answer: String = number.to_string().chars().rev().collect();
            json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
                .to_string()
                + "\n"
        };
        self.write(name, numbers.map(row).collect::<String>());
    }

    /// Writes job.yaml with `rest` below `spec`.
    pub fn write_spec(&self, rest: &str) {
        self.write(
            "job.yaml",
            format!(
                "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: tiny}}\nspec:\n  model: {{uri: file://model}}\n  \
                 dataset: {{train: {{uri: file://train.jsonl}}, validation: {{uri: file://test.jsonl}}}}\n  method: {{type: LoRA, lora: {{rank: 4}}}}\n{rest}"
            ),
        );
    }

    /// Changes job.yaml.
    pub fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.path("job.yaml")).expect("readable");
        assert!(text.contains(from), "job.yaml has no {from:?}");
        self.write("job.yaml", text.replace(from, to));
    }

    /// The trainer with these arguments, on one core: several tests run at once, and threads are part of what a run is. Where
    /// FINETUNE_EMULATOR has words, they come before it: another processor's emulation.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("taskset");
        let emulator = std::env::var("FINETUNE_EMULATOR").unwrap_or_default();
        command.args(["-c", &first_cpu()]).args(emulator.split_whitespace());
        command.arg(trainer_binary()).args(arguments).current_dir(self.folder());
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the trainer to its end.
    pub fn trainer(&self, arguments: &[&str]) -> Outcome {
        self.outcome(&mut self.command(arguments))
    }

    /// Runs a [`Job::command`] to its end.
    pub fn outcome(&self, command: &mut Command) -> Outcome {
        let output = command.output().expect("the trainer starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Runs job.yaml to its end.
    pub fn run(&self) -> Outcome {
        self.trainer(&["run", "job.yaml"])
    }

    /// Starts job.yaml; its output goes nowhere, so that nobody has to read it.
    pub fn start(&self) -> Child {
        self.command(&["run", "job.yaml"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the trainer starts")
    }

    /// SHA-256 of the adapter.
    pub fn adapter_digest(&self) -> String {
        trainer::store::files::digest_file(&self.path("runs/tiny/output/adapter_model.safetensors"))
            .expect("the run has an output")
    }

    /// `report.json`.
    pub fn report(&self) -> crds::report::Report {
        serde_json::from_slice(&fs::read(self.path("runs/tiny/report.json")).expect("a report")).expect("JSON")
    }

    /// Steps in `metrics.jsonl`.
    pub fn logged_steps(&self) -> usize {
        fs::read_to_string(self.path("runs/tiny/metrics.jsonl")).map_or(0, |text| text.matches("\"loss\"").count())
    }

    /// Folders under `checkpoints/`, sorted.
    pub fn checkpoints(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("runs/tiny/checkpoints")).into_iter().flatten().flatten();
        let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        folders.sort();
        folders
    }
}

/// The first CPU that this process may use.
fn first_cpu() -> String {
    let status = fs::read_to_string("/proc/self/status").expect("Linux tells");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("a list of CPUs");
    list.trim().split([',', '-']).next().expect("one at least").to_owned()
}

impl Default for Job {
    fn default() -> Self {
        Self::new()
    }
}

/// A byte-level tokenizer of 256 ids: most bytes have one, the last two ids are the chat marks.
fn byte_tokenizer() -> Value {
    // ByteLevel writes a printable byte as itself, a space as Ġ and a newline as Ċ.
    let mut vocabulary = serde_json::Map::new();
    let printable = (0x21u8..=0x7e).map(char::from);
    for (id, symbol) in printable.chain(['Ġ', 'Ċ']).enumerate() {
        vocabulary.insert(symbol.to_string(), id.into());
    }
    vocabulary.insert("<|im_start|>".into(), 254.into());
    vocabulary.insert("<|im_end|>".into(), 255.into());
    let special = |id: i32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(254, "<|im_start|>"), special(255, "<|im_end|>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []}
    })
}

/// What a report tells of validation, without how long the answers took.
pub fn untimed_validation(report: &crds::report::Report) -> Option<ValidationReport> {
    let mut validation = report.validation.clone()?;
    if let Some(Generation { tuned, zero_shot, few_shot }) = &mut validation.generation {
        for generated in [tuned, zero_shot, few_shot].into_iter().flatten() {
            generated.seconds = 0.0;
        }
    }
    Some(validation)
}
