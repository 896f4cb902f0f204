//! What happens in a run, as values: the training loop emits events, observers write, serve and display them.
//! The loop itself knows no file, socket or terminal.

use std::collections::VecDeque;

use crds::report::{DataReport, PlanReport, Report, Scores, Stage, ValidationReport};

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A stage began.
    Stage(Stage),
    /// A value that was derived before the first step, with the reason for it.
    Derived {
        /// For example `learning rate`.
        name: &'static str,
        /// For example `2e-4`.
        value: String,
        /// For example `chosen: LoRA default`.
        reason: String,
    },
    /// The data check is done.
    Data(Box<DataReport>),
    /// A training example as the model sees it.
    Sample {
        /// Its text, trained tokens between guillemets.
        text: String,
        /// The file that holds it.
        path: std::path::PathBuf,
    },
    /// Validation rows were answered, of so many.
    Answered {
        /// Whose answers: the tuned model, the base model, the base model with examples in the prompt.
        who: &'static str,
        /// Rows that are done.
        answered: usize,
        /// Rows that there are.
        rows: usize,
        /// New tokens so far.
        tokens: usize,
    },
    /// The plan is made.
    Plan(Box<PlanReport>),
    /// An attempt begins, with so many completed steps.
    Attempt {
        /// Counted from 1.
        number: i32,
        /// Completed steps.
        step: i64,
    },
    /// Training continues from a checkpoint.
    Resumed {
        /// Completed steps.
        step: i64,
        /// Whether the run will be bit-equal to an undisturbed one; if not, why.
        inexact_because: Option<String>,
    },
    /// An optimizer step is done.
    Step(StepRecord),
    /// The validation rows were evaluated.
    Evaluation(EvaluationRecord),
    /// A checkpoint is about to be written.
    Committing {
        /// Bytes of its files, about.
        bytes: u64,
    },
    /// A checkpoint was committed.
    Checkpoint(CheckpointRecord),
    /// A checkpoint could not be written, and the run goes on.
    CheckpointFailed {
        /// Completed steps.
        step: i64,
        /// Why.
        message: String,
    },
    /// Something that the user should know and that does not end the run.
    Warning(String),
    /// Something that belongs into the report, in a sentence.
    Note(String),
    /// The final validation is done.
    Validated(Box<ValidationReport>),
    /// Training was done before, by another pod, which left this report.
    Trained(Box<Report>),
}

/// One optimizer step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepRecord {
    /// Completed steps, this one included.
    pub step: i64,
    /// Planned steps.
    pub total_steps: i64,
    /// Completed passes over the training rows.
    pub epoch: f64,
    /// Mean loss per trained token of the step, nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub gradient_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Examples in the step.
    pub examples: i64,
    /// Tokens that went through the model in this step.
    pub input_tokens: i64,
    /// Tokens that the loss was taken on in this step.
    pub trained_tokens: i64,
    /// Input tokens since the beginning of the run.
    pub total_input_tokens: i64,
    /// Trained tokens since the beginning of the run.
    pub total_trained_tokens: i64,
    /// Wall seconds of the step.
    pub seconds: f64,
    /// Of these, seconds of packing rows.
    pub data_seconds: f64,
    /// Whether loss and gradient norm were finite; if not, no weight moved.
    pub finite: bool,
}

/// One evaluation of the validation rows.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationRecord {
    /// Completed steps.
    pub step: i64,
    /// Completed passes over the training rows.
    pub epoch: f64,
    /// What was measured.
    pub scores: Scores,
    /// Whether it is the best so far by the configured metric.
    pub best: bool,
    /// Wall seconds.
    pub seconds: f64,
}

/// One committed checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointRecord {
    /// Completed steps.
    pub step: i64,
    /// Bytes of its files.
    pub bytes: i64,
    /// Wall seconds of the commit.
    pub seconds: f64,
    /// Of these, seconds for which training waited.
    pub waited_seconds: f64,
    /// Validation loss at this step, if it was measured.
    pub eval_loss: Option<f64>,
    /// Whether it is the best so far.
    pub best: bool,
}

/// The last steps, for a steady rate and estimate.
#[derive(Debug, Default)]
pub struct RecentSteps(VecDeque<(f64, i64)>);

/// Steps that the rate is taken over.
const RECENT_STEPS: usize = 20;

impl RecentSteps {
    /// Adds a step; gives input tokens per second, and the seconds that the steps after it will take.
    pub fn add(&mut self, record: &StepRecord) -> (f64, f64) {
        self.0.push_back((record.seconds, record.input_tokens));
        if self.0.len() > RECENT_STEPS {
            self.0.pop_front();
        }
        let seconds: f64 = self.0.iter().map(|(seconds, _)| seconds).sum();
        let tokens: i64 = self.0.iter().map(|(_, tokens)| tokens).sum();
        let remaining = seconds / self.0.len() as f64 * (record.total_steps - record.step) as f64;
        (tokens as f64 / seconds.max(1e-9), remaining)
    }
}

/// Takes note of events.
pub trait Observer {
    /// Takes note of one event. An observer that cannot (a full disk) returns the error; the run decides.
    fn observe(&mut self, event: &Event) -> std::io::Result<()>;
}

/// Several observers as one; each sees every event, in order.
#[derive(Default)]
pub struct Observers<'a>(pub Vec<&'a mut dyn Observer>);

impl Observer for Observers<'_> {
    fn observe(&mut self, event: &Event) -> std::io::Result<()> {
        self.0.iter_mut().try_for_each(|observer| observer.observe(event))
    }
}
