//! The last word of an attempt: said once, by whoever ends the process. It goes to the termination message, which lies on
//! the node, and to the volume: `reports/<stage>.json` for the stage's own, `report.json` for the newest.

mod volume;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crds::exit::ExitCode;
use crds::report::{Failure, Report, Stage};
use crds::run::PodStage;

pub use self::volume::read_volume;
use crate::store::files::write_atomically;
use crate::tell::record::{Event, Observer};

/// How long a process that must end waits for a volume that may hang.
const VOLUME_PATIENCE: Duration = Duration::from_millis(500);

/// The report of this process as far as it is known. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LastWord(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    report: Mutex<Report>,
    run: Mutex<Option<PathBuf>>,
    termination_message: Option<PathBuf>,
    said: AtomicBool,
}

impl LastWord {
    /// Begins with what is known; `run` is the run directory.
    pub fn new(report: Report, run: Option<PathBuf>, termination_message: Option<PathBuf>) -> Self {
        Self(Arc::new(Shared { report: report.into(), run: run.into(), termination_message, said: false.into() }))
    }

    /// Changes what is known.
    pub fn update<T>(&self, change: impl FnOnce(&mut Report) -> T) -> T {
        change(&mut self.0.report.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is known.
    pub fn report(&self) -> Report {
        self.update(|report| report.clone())
    }

    /// Takes over what an earlier stage found: its result is this one's too.
    pub fn continue_from(&self, earlier: &Report) {
        self.update(|report| {
            let own = std::mem::replace(report, earlier.clone());
            report.pod_stage = own.pod_stage;
            report.attempt = own.attempt;
            report.pod_uid = own.pod_uid;
            report.stage = own.stage;
        });
    }

    /// The run directory, once it is known.
    pub fn set_run(&self, run: Option<PathBuf>) {
        *self.0.run.lock().unwrap_or_else(PoisonError::into_inner) = run;
    }

    /// Leaves the volume's reports to their owner: another attempt, or another job.
    pub fn leave_volume(&self) {
        self.set_run(None);
    }

    /// Says how the attempt ended, unless that was said. An error is the volume's.
    pub fn say(&self, failure: Option<Failure>) -> io::Result<()> {
        if self.0.said.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let run = self.0.run.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let write = |report: &Report| run.as_ref().map_or(Ok(()), |run| write(run, report));
        let succeeded = failure.is_none();
        let mut report = self.end(failure);
        // A result counts once it lies on the volume; a failure is told even if the volume hangs.
        let written = if succeeded { write(&report) } else { Ok(()) };
        if let Err(error) = &written {
            let message = format!("the report cannot be written ({error}); free space on the volume");
            report = self.end(Some(Failure::new(ExitCode::CannotWrite, message)));
        }
        self.tell_node(&report);
        if succeeded { written } else { write(&report) }
    }

    fn end(&self, failure: Option<Failure>) -> Report {
        self.update(|report| {
            let yielded = |failure: &Failure| failure.exit_code == i32::from(ExitCode::Preempted.code());
            match &failure {
                None => report.stage = Stage::Succeeded,
                Some(failure) if yielded(failure) => {}
                Some(_) => report.stage = Stage::Failed,
            }
            report.failure = failure;
            report.clone()
        })
    }

    /// Hands on another pod's report as this one's last word.
    pub fn hand_on(&self, report: &Report) {
        self.0.said.store(true, Ordering::SeqCst);
        self.tell_node(report);
    }

    /// Says that the attempt failed and ends the process, whatever hangs.
    pub fn leave(&self, exit: ExitCode, message: &str) -> ! {
        // Nobody may be left to read it; the exit code says the same.
        let _ = writeln!(io::stderr(), "error: {message}");
        let (done, wait) = std::sync::mpsc::channel();
        let (word, failure) = (self.clone(), Failure::new(exit, message));
        let spawned = std::thread::Builder::new().name("last word".into()).spawn(move || {
            // The volume may be what hangs or is full.
            let _ = word.say(Some(failure));
            let _ = done.send(());
        });
        if spawned.is_ok() {
            let _ = wait.recv_timeout(VOLUME_PATIENCE);
        }
        signal_hook::low_level::exit(i32::from(exit.code()))
    }

    fn tell_node(&self, report: &Report) {
        let Some(path) = &self.0.termination_message else { return };
        // The file is a mount of its own: it is written in place, and cannot be renamed.
        if let Err(error) = fs::write(path, report.termination_message()) {
            let _ = writeln!(io::stderr(), "warning: {}: cannot be written ({error})", path.display());
        }
    }
}

/// Takes note of what happens, for whoever has to say the last word.
impl Observer for LastWord {
    fn observe(&mut self, event: &Event) -> io::Result<()> {
        self.update(|report| match event {
            Event::Stage(stage) => report.stage = *stage,
            Event::Data(data) => report.data = Some((**data).clone()),
            Event::Plan(plan) => {
                report.total_steps = plan.total_steps;
                report.plan = Some((**plan).clone());
            }
            Event::Attempt { number, step } => (report.attempt, report.step) = (*number, *step),
            Event::Resumed { step, .. } => {
                report.resumed_from_step = Some(*step);
                report.last_checkpoint_step = Some(*step);
            }
            Event::Step(record) => report.step = record.step,
            Event::Validated(validation) => report.validation = Some((**validation).clone()),
            Event::Note(note) => report.notes.push(note.clone()),
            Event::Derived { .. }
            | Event::Sample { .. }
            | Event::Answered { .. }
            | Event::Evaluation(_)
            | Event::Committing { .. }
            | Event::Checkpoint(_)
            | Event::CheckpointFailed { .. }
            | Event::Trained(_)
            | Event::Warning(_) => {}
        });
        Ok(())
    }
}

fn path_of(run: &Path, stage: PodStage) -> PathBuf {
    run.join("reports").join(format!("{}.json", stage.name()))
}

fn write(run: &Path, report: &Report) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(report).expect("a report is JSON");
    if let Some(stage) = report.pod_stage {
        fs::create_dir_all(run.join("reports"))?;
        write_atomically(&path_of(run, stage), &text)?;
    }
    write_atomically(&run.join("report.json"), &text)
}

/// There is no report that could be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was never written, or cannot be read.
    #[error("{}: no report of the {stage} stage ({message})", path.display(), stage = stage.name())]
    Absent {
        /// The file.
        path: PathBuf,
        /// Whose report.
        stage: PodStage,
        /// What was found.
        message: String,
    },
    /// Another job wrote it.
    #[error("{}: the report is of job {found}, this is job {expected}; the run directory belongs to another job", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// In the report.
        found: String,
        /// This job.
        expected: String,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Absent { .. } => ExitCode::InputNotFound,
            Self::Foreign { .. } => ExitCode::ForeignCheckpoint,
        }
    }
}

/// The report that `stage` left in `run`, of `attempt` or, without one, of its last attempt.
pub fn read(run: &Path, job_uid: &str, stage: PodStage, attempt: Option<i32>) -> Result<Report, Error> {
    let path = path_of(run, stage);
    let absent = |message: String| Error::Absent { path: path.clone(), stage, message };
    let bytes = fs::read(&path).map_err(|error| absent(error.to_string()))?;
    let report: Report = serde_json::from_slice(&bytes).map_err(|error| absent(format!("it is damaged: {error}")))?;
    if report.job_uid != job_uid {
        return Err(Error::Foreign { path, found: report.job_uid, expected: job_uid.to_owned() });
    }
    let number = attempt.unwrap_or(report.attempt);
    if !report.is_of(job_uid, stage, number) {
        return Err(absent(format!("what is there is of attempt {}, not of attempt {number}", report.attempt)));
    }
    Ok(report)
}

/// The report of a stage that must be done before this one can begin.
pub fn read_done(run: &Path, job_uid: &str, stage: PodStage) -> Result<Report, Error> {
    let report = read(run, job_uid, stage, None)?;
    match &report.failure {
        None => Ok(report),
        Some(failure) => {
            let message = format!("its attempt {} ended with {}", report.attempt, failure.reason);
            Err(Error::Absent { path: path_of(run, stage), stage, message })
        }
    }
}
