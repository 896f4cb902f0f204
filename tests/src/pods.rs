//! A job whose stages run in processes of their own, as in pods: the volumes are folders, the configuration is what an
//! operator writes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crds::report::{Report, TERMINATION_MESSAGE_BYTES};
use crds::run::{PodStage, RunConfig, StorageConfig, ValidationRows};

use crate::{Job, Outcome};

/// A job and its volumes: `claims/inputs` with model and rows, `claims/outputs`, and the run's own.
#[derive(Debug)]
pub struct Pods {
    /// The folder that everything lies in.
    pub job: Job,
}

/// How a pod ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code and output.
    pub outcome: Outcome,
    /// Its termination message.
    pub report: Report,
}

impl Pods {
    /// `metadata.uid` of the job.
    pub const UID: &str = "0b8e1c9e-0d5c-4f7e-9a53-3a2b7b1f0a11";

    /// The stages of `job`, whose local sources become sources in a claim.
    pub fn new(job: Job) -> Self {
        let pods = Self { job };
        for folder in ["claims/inputs/model", "claims/outputs", "data"] {
            fs::create_dir_all(pods.job.path(folder)).expect("writable");
        }
        for entry in fs::read_dir(pods.job.path("model")).expect("there").flatten() {
            fs::copy(entry.path(), pods.job.path("claims/inputs/model").join(entry.file_name())).expect("writable");
        }
        for name in ["train.jsonl", "test.jsonl"] {
            fs::copy(pods.job.path(name), pods.job.path("claims/inputs").join(name)).expect("writable");
        }
        pods.write_config(|_| ());
        pods
    }

    /// Writes run.yaml from job.yaml, changed by `change`.
    pub fn write_config(&self, change: impl FnOnce(&mut RunConfig)) {
        let text = fs::read_to_string(self.job.path("job.yaml")).expect("readable");
        let checked = crds::check::check(&text, crds::check::Scope::Local).expect("a valid job");
        let claims = std::collections::BTreeMap::new();
        let target = crds::resolve::Target::Local { folder: self.job.folder(), claims: &claims };
        let resolved = crds::resolve::resolve(&checked.job, &crds::profile::built_in(), target).expect("supported");
        let mut config = resolved.config;
        let folder = format!("file://{}/", self.job.folder().display());
        let in_claim = |uri: &mut String| *uri = uri.replace(&folder, "pvc://inputs/");
        in_claim(&mut config.model.uri);
        in_claim(&mut config.dataset.train.uri);
        if let ValidationRows::Source(source) = &mut config.dataset.validation {
            in_claim(&mut source.uri);
        }
        config.job.uid = Self::UID.into();
        config.job.namespace = Some("team".into());
        let claim = |name: &str| (name.to_owned(), self.job.path("claims").join(name).display().to_string());
        config.storage = Some(StorageConfig {
            directory: self.job.path("data").display().to_string(),
            uri: "pvc://tiny-0b8e1c9e".into(),
            claims: [claim("inputs"), claim("outputs")].into(),
        });
        change(&mut config);
        self.job.write("run.yaml", config.to_yaml());
    }

    fn message_path(&self, stage: PodStage, attempt: i32) -> PathBuf {
        self.job.path(&format!("message-{}-{attempt}", stage.name()))
    }

    /// The process of a stage, with nothing of this machine's own hub settings and nobody to ask.
    pub fn command(&self, stage: PodStage, attempt: i32) -> Command {
        let message = self.message_path(stage, attempt);
        let (attempt, message) = (attempt.to_string(), message.display().to_string());
        let mut command = self.job.command(&["run", "--config", "run.yaml", "--stage", stage.name()]);
        command.args(["--attempt", &attempt, "--control", "control.yaml", "--termination-message", &message]);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_")) {
            command.env_remove(name);
        }
        command
            .env("POD_UID", format!("pod-{}-{attempt}", stage.name()))
            .env("HF_HOME", self.job.path("data/.huggingface"));
        command.env("HF_ENDPOINT", "http://127.0.0.1:1").env("NO_PROXY", "127.0.0.1").env("FINETUNE_HUB_PATIENCE", "0");
        // /tmp of a pod is small, and filling it is the pod's end: nothing may need it.
        command.env("TMPDIR", self.job.path("no-such-folder")).env("HOME", self.job.path("no-such-folder"));
        command
    }

    /// Starts a stage; its output goes nowhere, so that nobody has to read it.
    pub fn start(&self, stage: PodStage, attempt: i32) -> Child {
        self.command(stage, attempt).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the trainer starts")
    }

    /// Runs a stage to its end.
    pub fn run(&self, stage: PodStage, attempt: i32) -> Ended {
        self.end(self.command(stage, attempt), stage, attempt)
    }

    /// Runs a stage that must succeed.
    pub fn succeed(&self, stage: PodStage, attempt: i32) -> Report {
        let Ended { outcome, report } = self.run(stage, attempt);
        assert_eq!(outcome.code, Some(0), "{}: {}", stage.name(), outcome.stderr);
        assert_eq!((report.pod_stage, report.attempt, report.failure.as_ref()), (Some(stage), attempt, None));
        assert_eq!((report.job_uid.as_str(), report.stage), (Self::UID, crds::report::Stage::Succeeded));
        report
    }

    /// Hands on the last word of a stage.
    pub fn hand_on(&self, of: PodStage, attempt: i32) -> Ended {
        let mut command = self.command(PodStage::Report, attempt);
        command.args(["--of", of.name()]);
        self.end(command, PodStage::Report, attempt)
    }

    /// Runs a command to its end and reads its last word.
    pub fn end(&self, mut command: Command, stage: PodStage, attempt: i32) -> Ended {
        let output = command.output().expect("the trainer starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let outcome = Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        let report = self.message(stage, attempt);
        if stage != PodStage::Report {
            let exit = report.failure.as_ref().map_or(0, |failure| failure.exit_code);
            assert_eq!(Some(exit), outcome.code, "{}", outcome.stderr);
        }
        Ended { outcome, report }
    }

    /// The termination message of a pod that ended.
    pub fn message(&self, stage: PodStage, attempt: i32) -> Report {
        let message = fs::read_to_string(self.message_path(stage, attempt)).expect("a termination message");
        assert!(message.len() <= TERMINATION_MESSAGE_BYTES, "{} bytes", message.len());
        serde_json::from_str(&message).unwrap_or_else(|error| panic!("{error}: {message}"))
    }

    /// The report that lies on the volume.
    pub fn report(&self, stage: PodStage) -> Report {
        let path = self.job.path("data/reports").join(format!("{}.json", stage.name()));
        serde_json::from_slice(&fs::read(path).expect("a report")).expect("JSON")
    }

    /// SHA-256 of a weights file below the folder.
    pub fn digest(&self, path: &str) -> String {
        trainer::store::files::digest_file(&self.job.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Steps that were recorded.
    pub fn logged_steps(&self) -> usize {
        fs::read_to_string(self.job.path("data/metrics.jsonl")).map_or(0, |text| text.matches("\"loss\"").count())
    }
}

/// Waits until `condition` holds or the process ends; whether the condition held.
pub fn wait_for(child: &mut Child, condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_mins(2);
    loop {
        if condition() {
            return true;
        }
        if child.try_wait().expect("a child of ours").is_some() {
            return false;
        }
        assert!(Instant::now() < deadline, "the trainer neither ends nor gets there");
        std::thread::yield_now();
    }
}

/// Asks a process to stop, as a kubelet does, and waits for its end.
pub fn terminate(child: &mut Child) -> (Option<i32>, Duration) {
    let asked = Instant::now();
    signal(child, "TERM");
    (child.wait().expect("a child of ours").code(), asked.elapsed())
}

/// Sends a signal by its name without SIG.
pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().expect("kill runs");
    assert!(status.success());
}

/// Puts a pipe that nobody writes to in the place of a file: reading it never ends.
pub fn hang(path: &Path) {
    let aside = path.with_extension("pipe");
    assert!(Command::new("mkfifo").arg(&aside).status().expect("mkfifo runs").success());
    fs::rename(aside, path).expect("writable");
}
