//! `hf://` sources against a server that speaks the hub's protocol: what is asked for, what is recorded, who sees the
//! token, and what people read when it does not work.

mod authorities;
mod exchanged;
mod fetching;
mod outages;
mod refusals;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Hub, Job, Outcome};

/// A hub with a model and a dataset, and a job that names them.
struct Setup {
    hub: Hub,
    job: Job,
    /// Commits of `models/acme/tiny` and `datasets/acme/rows`.
    model: String,
    rows: String,
}

impl Setup {
    fn new() -> Self {
        let job = Job::new();
        job.edit("file://model", "hf://acme/tiny");
        job.edit("file://train.jsonl", "hf://datasets/acme/rows/data/train.jsonl");
        job.edit("file://test.jsonl", "hf://datasets/acme/rows/data/test.jsonl");
        job.edit("maxSteps: 60", "maxSteps: 2");
        // What a trainer must leave where it is: pickles, code, the same weights for other programs.
        for name in ["pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "onnx/model.safetensors"] {
            let path = job.path("model").join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
            fs::write(path, "left where it is").expect("writable");
        }
        fs::create_dir_all(job.path("rows/data")).expect("writable");
        for name in ["train.jsonl", "test.jsonl"] {
            fs::rename(job.path(name), job.path("rows/data").join(name)).expect("writable");
        }
        let hub = Hub::start();
        let model = hub.publish("models/acme/tiny", "main", &job.path("model"));
        let rows = hub.publish("datasets/acme/rows", "main", &job.path("rows"));
        Self { hub, job, model, rows }
    }

    /// The trainer with nothing of this machine's own hub settings.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.job.command(arguments);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_") || name.ends_with("_HUB_CACHE")) {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", self.hub.endpoint()).env("HF_HUB_CACHE", self.job.path("cache"));
        command.env("HF_HOME", self.job.path("home")).env("NO_PROXY", "127.0.0.1");
        // What does not pass at once is told at once, and large files need no folder for temporary ones.
        command.env("FINETUNE_HUB_PATIENCE", "0").env("TMPDIR", self.job.path("no-such-folder"));
        command
    }

    /// Runs a command to its end, and looks for tokens in everything that it said or wrote.
    fn outcome(&self, mut command: Command) -> Outcome {
        let output = command.output().expect("the trainer starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let outcome = Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        for secret in [Hub::TOKEN, Hub::TOKEN_WITHOUT_ACCESS, WRONG_TOKEN] {
            assert!(!outcome.stdout.contains(secret) && !outcome.stderr.contains(secret), "{outcome:?}");
            for folder in
                fs::read_dir(self.job.folder()).expect("a folder").map(|entry| entry.expect("readable").path())
            {
                // A test may store a token here; the trainer may not anywhere.
                if !folder.ends_with("login") {
                    assert_eq!(file_with(&folder, secret), None, "a token was written");
                }
            }
        }
        outcome
    }

    /// `plan`, which fetches and prepares as `run` does, into `dir`.
    fn plan(&self, dir: &str, variables: &[(&str, &str)]) -> Outcome {
        let mut command = self.command(&["plan", "job.yaml", "--dir", dir]);
        command.envs(variables.iter().copied());
        self.outcome(command)
    }

    /// Commits of the rows' files as they were prepared in `dir`.
    fn prepared_commits(&self, dir: &str) -> Vec<String> {
        let report = fs::read(self.job.path(dir).join("prepared/data_report.json")).expect("prepared");
        let report: crds::report::DataReport = serde_json::from_slice(&report).expect("JSON");
        report.sources.into_iter().map(|source| source.revision.expect("a commit")).collect()
    }
}

const WRONG_TOKEN: &str = "hf_TokenThatNobodyKnowsAndNobodyMayPrint";

/// A file at or below `path` that holds `text`.
fn file_with(path: &Path, text: &str) -> Option<PathBuf> {
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("readable").map(|entry| entry.expect("readable").path());
        return entries.into_iter().find_map(|entry| file_with(&entry, text));
    }
    let bytes = fs::read(path).ok()?;
    bytes.windows(text.len()).any(|window| window == text.as_bytes()).then(|| path.to_owned())
}
