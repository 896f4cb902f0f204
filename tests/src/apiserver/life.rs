//! What a pod goes through, by script, and what its trainer says last.

use std::time::Duration;

use crds::exit::ExitCode;
use crds::report::{Artifact, CheckpointInfo, Failure, MetricValue, Report, Stage};
use crds::run::{OutputFormat, PodStage};

/// Which pod it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// `metadata.name` of the FineTuneJob.
    pub job: String,
    /// `metadata.uid` of the FineTuneJob.
    pub job_uid: String,
    /// What the pod does.
    pub stage: PodStage,
    /// Whose last word it reads, for the stage `report`.
    pub of: Option<PodStage>,
    /// Attempt of the stage.
    pub attempt: i32,
    /// Pods that the same Job had before.
    pub earlier: usize,
}

/// Something that happens to a pod.
#[derive(Clone, Debug)]
pub enum Turn {
    /// The scheduler finds no node, and says so.
    Unschedulable(String),
    /// The scheduler finds one.
    Schedule,
    /// A container cannot start: its name, the kubelet's reason and sentence.
    Wait(String, String, String),
    /// Something tells of the pod: reason and sentence of a warning event, from now on every minute.
    Warn(String, String),
    /// An init container cannot start: its name, the kubelet's reason and sentence.
    WaitInit(String, String, String),
    /// An init container runs.
    RunInit(String),
    /// An init container ends: exit code and termination message. Any code but 0 ends the pod.
    EndInit(String, i32, String),
    /// The trainer and whatever is beside it run.
    Run,
    /// A checkpoint lies on the volume.
    Checkpoint(i64),
    /// The trainer ends.
    End(Word),
    /// Something asks the pod to end, and says so in its condition `DisruptionTarget`: the condition's reason.
    Disrupt(String),
    /// The kubelet evicts the pod at once: its sentence.
    Evict(String),
    /// The node does not answer any more: its pod stays as it is, asked to end.
    LoseNode,
    /// The node comes back and knows nothing of the container.
    ForgetContainer,
    /// The object is gone, as after `kubectl delete --force`.
    Vanish,
}

/// How a trainer ends.
#[derive(Clone, Debug)]
pub enum Word {
    /// Well, with the usual report of its stage.
    Done,
    /// Badly, and says why.
    Failed(ExitCode, String),
    /// With this code and without a word.
    Silent(i32),
    /// With this code, and a report that the script has changed.
    Told(i32, fn(&mut Report)),
    /// With this code and termination message, which the volume knows nothing of.
    Message(i32, String),
}

/// What the trainer does when it is asked to end.
#[derive(Clone, Debug)]
pub enum Leaving {
    /// It takes so long, and ends so.
    After(Duration, Word),
    /// It is never heard of again.
    Never,
}

/// What a pod goes through.
#[derive(Clone, Debug)]
pub struct Life {
    /// What happens, each so long after the one before.
    pub turns: Vec<(Duration, Turn)>,
    /// When it is asked to end.
    pub leaving: Leaving,
    /// Containers that somebody puts beside the trainer; they end when the pod is asked to end, or never.
    pub sidecars: Vec<String>,
}

impl Life {
    /// It waits for a node for ever.
    pub fn new() -> Self {
        let word = Word::Failed(ExitCode::Preempted, "a checkpoint was written, and the pod gave way".into());
        Self { turns: Vec::new(), leaving: Leaving::After(Duration::from_secs(2), word), sidecars: Vec::new() }
    }

    /// What becomes of a pod that nothing happens to.
    pub fn of(about: &About) -> Self {
        match about.stage {
            PodStage::Prepare => Self::running().then(5, Turn::End(Word::Done)),
            PodStage::Train => Self::running().then(20, Turn::Checkpoint(100)).then(20, Turn::End(Word::Done)),
            PodStage::Publish => Self::running().then(3, Turn::End(Word::Done)),
            PodStage::Report => Self::running().then(1, Turn::End(Word::Done)),
        }
    }

    /// It runs until it is asked to end.
    pub fn running() -> Self {
        Self::new().then(1, Turn::Schedule).then(1, Turn::Run)
    }

    /// Something more happens, so many seconds later.
    #[must_use]
    pub fn then(mut self, seconds: u64, turn: Turn) -> Self {
        self.turns.push((Duration::from_secs(seconds), turn));
        self
    }

    /// How it leaves when it is asked to end.
    #[must_use]
    pub fn leaving(self, leaving: Leaving) -> Self {
        Self { leaving, ..self }
    }

    /// With a container beside the trainer.
    #[must_use]
    pub fn with_sidecar(mut self, name: &str) -> Self {
        self.sidecars.push(name.to_owned());
        self
    }
}

impl Default for Life {
    fn default() -> Self {
        Self::new()
    }
}

/// What an attempt, or those before it, left on the volume of a job.
#[derive(Clone, Debug, Default)]
pub struct Volume {
    /// The last word of each stage; a later attempt's replaces it.
    pub reports: Vec<Report>,
    /// Step of the newest checkpoint.
    pub checkpoint: Option<i64>,
}

impl Volume {
    /// The exit code and the termination message of a pod whose trainer ends so. What it says is on the volume as well.
    pub fn end(&mut self, about: &About, pod_uid: &str, resumed: Option<i64>, word: &Word) -> (i32, String) {
        if about.stage == PodStage::Report && matches!(word, Word::Done) {
            return (0, self.handed_on(about).termination_message());
        }
        let mut report = self.report(about, pod_uid, resumed);
        let code = match word {
            Word::Done => 0,
            Word::Failed(exit, message) => {
                report.failure = Some(Failure::new(*exit, message.clone()));
                report.stage = Stage::Failed;
                i32::from(exit.code())
            }
            Word::Told(code, change) => {
                change(&mut report);
                *code
            }
            Word::Silent(code) => return (*code, String::new()),
            Word::Message(code, message) => return (*code, message.clone()),
        };
        self.reports.retain(|earlier| earlier.pod_stage != Some(about.stage));
        self.reports.push(report.clone());
        (code, report.termination_message())
    }

    /// What the report stage says: the attempt's own word, or what the volume holds.
    fn handed_on(&self, about: &About) -> Report {
        let of = about.of.unwrap_or(PodStage::Train);
        if let Some(report) = self.reports.iter().find(|report| report.is_of(&about.job_uid, of, about.attempt)) {
            return report.clone();
        }
        let checkpoint =
            |step| CheckpointInfo { step, time: "2026-01-01T00:00:00Z".into(), eval_loss: None, best: false };
        Report {
            job_uid: about.job_uid.clone(),
            pod_stage: Some(of),
            attempt: about.attempt,
            stage: Stage::Failed,
            failure: Some(Failure::untold("the attempt left no word")),
            last_checkpoint_step: self.checkpoint,
            from_volume: true,
            checkpoints: self.checkpoint.map(checkpoint).into_iter().collect(),
            ..Report::default()
        }
    }

    fn report(&self, about: &About, pod_uid: &str, resumed: Option<i64>) -> Report {
        let trains = about.stage == PodStage::Train;
        let artifact = Artifact {
            uri: "pvc://bot/output".into(),
            digest: format!("sha256:{}", "a".repeat(64)),
            kind: OutputFormat::Adapter,
            lora_rank: Some(16),
            base_model: "hf://acme/model".into(),
        };
        Report {
            job_uid: about.job_uid.clone(),
            pod_stage: Some(about.stage),
            attempt: about.attempt,
            pod_uid: pod_uid.to_owned(),
            stage: Stage::Succeeded,
            step: self.checkpoint.filter(|_| trains).unwrap_or(0),
            total_steps: 100,
            resumed_from_step: resumed,
            last_checkpoint_step: self.checkpoint.filter(|_| trains),
            config_digest: format!("sha256:{}", "c".repeat(64)),
            metrics: if trains { vec![MetricValue { name: "trainLoss".into(), value: 1.25 }] } else { Vec::new() },
            artifact: (about.stage == PodStage::Publish).then_some(artifact),
            ..Report::default()
        }
    }
}
