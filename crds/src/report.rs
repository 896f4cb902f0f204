//! What the trainer tells: `Progress` while it runs, `Report` as its last word.
//!
//! The trainer writes both; the operator copies them into the status. Decimals are `f64` here and strings in the status.
//! A value that was not measured is absent. A value that is NaN or infinite is never serialised: whoever builds a report
//! turns it into a failure or leaves it out.

use serde::{Deserialize, Serialize};

use crate::exit::ExitCode;
use crate::run::{Gate, Metric, PodStage};

/// What the trainer is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// Fetches, checks and tokenises.
    #[default]
    Preparing,
    /// Optimizer steps.
    Training,
    /// Baselines, forgetting and the final evaluation.
    Evaluating,
    /// Writes the output.
    Publishing,
    /// Finished.
    Succeeded,
    /// Ended without a result.
    Failed,
}

/// The answer to `GET /status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// `metadata.uid` of the job.
    pub job_uid: String,
    /// `metadata.uid` of the pod; empty in local runs.
    pub pod_uid: String,
    /// What the pod does; absent in local runs, which do everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_stage: Option<PodStage>,
    /// Attempt number, counted in each stage.
    pub attempt: i32,
    /// Step of the checkpoint that this attempt continued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<i64>,
    /// What the trainer is doing.
    pub stage: Stage,
    /// Completed optimizer steps.
    pub step: i64,
    /// Planned optimizer steps.
    pub total_steps: i64,
    /// Completed share of the training rows' passes.
    pub epoch: f64,
    /// Tokens that the loss was taken on.
    pub trained_tokens: i64,
    /// All tokens that went through the model.
    pub input_tokens: i64,
    /// Input tokens per second of step time, over the last steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Seconds until the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_remaining_seconds: Option<i64>,
    /// RFC 3339 time of this report.
    pub last_report_time: String,
    /// Newest values by name: `trainLoss`, `evalLoss`, `learningRate`, `gradientNorm`.
    pub metrics: Vec<MetricValue>,
    /// Committed checkpoints, newest last.
    pub checkpoints: Vec<CheckpointInfo>,
}

/// One named number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MetricValue {
    /// For example `evalLoss`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointInfo {
    /// Completed optimizer steps.
    pub step: i64,
    /// RFC 3339 time of the commit.
    pub time: String,
    /// Validation loss at this step, if it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Whether it is the best so far.
    pub best: bool,
}

/// What the metrics of one set of weights are on the validation rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Scores {
    /// Mean negative log-likelihood, nats per trained token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// `exp(evalLoss)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Share of trained tokens predicted right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_accuracy: Option<f64>,
    /// Share of rows answered exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<f64>,
}

impl Scores {
    /// The value of one metric, if it was measured.
    pub const fn get(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::EvalLoss => self.eval_loss,
            Metric::Perplexity => self.perplexity,
            Metric::TokenAccuracy => self.token_accuracy,
            Metric::ExactMatch => self.exact_match,
        }
    }
}

/// The loss on general text, before and after.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForgettingResult {
    /// The base model's mean loss.
    pub base_loss: f64,
    /// The tuned model's mean loss.
    pub tuned_loss: f64,
    /// Largest tolerated increase.
    pub max_loss_increase: f64,
    /// Whether the increase is tolerated.
    pub passed: bool,
}

/// A gate and what was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GateResult {
    /// The gate as written.
    pub gate: Gate,
    /// The tuned model's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed: Option<f64>,
    /// The baseline's value, for `ImprovesOn`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// Whether it holds.
    pub passed: bool,
}

/// Whether the result is worth using.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// All gates hold, and it is better than each baseline that was measured, by more than chance.
    Better,
    /// No gate failed, but a baseline is better, or not worse by more than chance: fine-tuning did not pay.
    NotWorthIt,
    /// A gate failed.
    GateFailed,
    /// Nothing was measured to decide by.
    NotValidated,
}

/// Answers that were generated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Generated {
    /// New tokens of all answers, tokens that end one included, padding not.
    pub tokens: i64,
    /// Seconds that they took, prompts included.
    pub seconds: f64,
}

/// The answers of everyone who was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Generation {
    /// The tuned model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuned: Option<Generated>,
    /// The base model's without examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<Generated>,
    /// The base model's with examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<Generated>,
}

/// What validation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ValidationReport {
    /// Rows that the loss was measured on.
    pub rows: i64,
    /// Rows that were answered for `exactMatch`; fewer than `rows` where there are many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated_rows: Option<i64>,
    /// How many tokens these answers have and how long they took; absent where no row was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Step of the judged checkpoint.
    pub step: i64,
    /// The tuned model.
    pub tuned: Scores,
    /// The base model without examples in the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<Scores>,
    /// The base model with examples in the prompt. Its loss is taken on `few_shot_rows`; after prompt and completion rows
    /// without their stop token, which the examples do not show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<Scores>,
    /// Rows that the loss with examples in the prompt was measured on: the first ones, those that the context holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub few_shot_rows: Option<i64>,
    /// Examples in the few-shot prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_examples: Option<i64>,
    /// General ability.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<ForgettingResult>,
    /// The gates.
    pub gates: Vec<GateResult>,
    /// Whether the result is worth using.
    pub verdict: Verdict,
    /// The verdict in one plain sentence.
    pub summary: String,
}

/// What the data check found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DataReport {
    /// Training rows after the split.
    pub rows: i64,
    /// Validation rows after the split.
    pub validation_rows: i64,
    /// Tokens of the training rows.
    pub tokens: i64,
    /// Of these, tokens that the loss is taken on.
    pub trained_tokens: i64,
    /// Training rows that repeat an earlier one exactly (after normalising white space).
    pub duplicates: i64,
    /// Training rows that nearly repeat an earlier one.
    pub near_duplicates: i64,
    /// Training rows that are in the validation rows too.
    pub leaked: i64,
    /// Training rows that lost answer tokens to the sequence length.
    pub truncated: i64,
    /// Rows left out because none of their tokens is trained.
    pub untrained: i64,
    /// Validation and general rows that lost answer tokens to the sequence length.
    pub held_out_truncated: i64,
    /// Validation and general rows left out because none of their tokens is trained.
    pub held_out_untrained: i64,
    /// Conversations whose text holds a special token of the model, in all files.
    pub special_texts: i64,
    /// Validation rows that are not answered: prompt and answer exceed the model's context, or the prompt is empty.
    pub unanswerable: i64,
    /// Examples in the few-shot prompt, where that is not what was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_examples: Option<i64>,
    /// Number of examples by length in tokens: (upper bound, examples).
    pub length_histogram: Vec<(i64, i64)>,
    /// Longest training row in tokens.
    pub longest: i64,
    /// Sequence length that was used.
    pub max_sequence_length: i64,
    /// SHA-256 of the training examples as tokenised, and their order key.
    pub dataset_digest: String,
    /// SHA-256 of each source file.
    pub sources: Vec<SourceDigest>,
    /// Findings that did not end the run, in sentences.
    pub warnings: Vec<String>,
}

/// A source file and its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceDigest {
    /// URI without any query.
    pub uri: String,
    /// Commit of a hub repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `sha256:…`
    pub digest: String,
    /// Size in bytes.
    pub bytes: i64,
}

/// Memory in bytes, by what holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryEstimate {
    /// Base weights as they are held.
    pub weights: i64,
    /// Trained parameters: masters and working copies.
    pub parameters: i64,
    /// Gradients and moments.
    pub optimizer: i64,
    /// Activations of the largest micro-batch.
    pub activations: i64,
    /// What allocators hold beyond that, and the runtime.
    pub workspace: i64,
    /// The sum.
    pub total: i64,
}

/// What was derived before the first step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PlanReport {
    /// Device that computes.
    pub device: String,
    /// Dtype of weights and activations.
    pub precision: String,
    /// Predicted peak memory.
    pub memory: MemoryEstimate,
    /// What there is.
    pub memory_available: i64,
    /// Peak resident (or device) memory as measured; 0 before the end.
    pub measured_peak: i64,
    /// Tokens computed at once.
    pub micro_batch_tokens: i64,
    /// Optimizer steps.
    pub total_steps: i64,
    /// Trained parameters.
    pub trainable_parameters: i64,
    /// All parameters.
    pub total_parameters: i64,
    /// Estimated seconds of training.
    pub estimated_seconds: f64,
    /// Measured seconds of training; 0 before the end.
    pub measured_seconds: f64,
}

/// What the run used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Usage {
    /// Wall time over all attempts, seconds.
    pub wall_seconds: f64,
    /// Of these, seconds in optimizer steps.
    pub train_seconds: f64,
    /// Tokens that went through the model in training.
    pub input_tokens: i64,
    /// Tokens that the loss was taken on.
    pub trained_tokens: i64,
    /// Energy in joules where the machine tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy_joules: Option<f64>,
    /// Cost at the profile's price.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// Estimated cost of the same steps as full fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_fine_tuning_cost: Option<f64>,
}

/// What the run left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Where it is.
    pub uri: String,
    /// SHA-256 of the weights file.
    pub digest: String,
    /// `Adapter` or `Merged`.
    pub kind: crate::run::OutputFormat,
    /// Rank of the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<i64>,
    /// URI of the base model.
    pub base_model: String,
}

/// Why an attempt ended without a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The exit code's reason.
    pub reason: String,
    /// The exit code.
    pub exit_code: i32,
    /// One sentence: what was found where, what was expected, what to do.
    pub message: String,
}

impl Failure {
    /// A failure with the reason and number of `exit`.
    pub fn new(exit: ExitCode, message: impl Into<String>) -> Self {
        Self { reason: exit.reason().to_owned(), exit_code: i32::from(exit.code()), message: message.into() }
    }
}

/// The longest termination message that a kubelet keeps.
pub const TERMINATION_MESSAGE_BYTES: usize = 4096;

/// The last word of an attempt: `reports/<stage>.json` and `report.json` on the volume, and the termination message on a
/// cluster, see [`Report::termination_message`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// `metadata.uid` of the job.
    pub job_uid: String,
    /// What the pod did; absent in local runs, which do everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_stage: Option<PodStage>,
    /// Attempt number, counted in each stage.
    pub attempt: i32,
    /// `metadata.uid` of the pod; empty in local runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_uid: String,
    /// What ended: `Succeeded`, `Failed`, or what an attempt that gave way was doing.
    pub stage: Stage,
    /// Absent when the stage is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What should be known beside, in sentences: `stopped early by request …`, `not published: …`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Completed optimizer steps.
    pub step: i64,
    /// Planned optimizer steps.
    pub total_steps: i64,
    /// Step of the checkpoint that this attempt continued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<i64>,
    /// Step of the newest committed checkpoint that this attempt knows of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint_step: Option<i64>,
    /// SHA-256 of the judged checkpoint's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_digest: Option<String>,
    /// SHA-256 of the effective run configuration.
    pub config_digest: String,
    /// SHA-256 of the tokenised dataset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_digest: Option<String>,
    /// Commit of the base model's repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_revision: Option<String>,
    /// What the data check found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<DataReport>,
    /// Predicted beside measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanReport>,
    /// Newest values by name.
    #[serde(default)]
    pub metrics: Vec<MetricValue>,
    /// What validation found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationReport>,
    /// What the run used.
    #[serde(default)]
    pub usage: Usage,
    /// What the run left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
}

impl Report {
    /// Whether this is the last word of `attempt` at `stage` of the job.
    pub fn is_of(&self, job_uid: &str, stage: PodStage, attempt: i32) -> bool {
        self.job_uid == job_uid && self.pod_stage == Some(stage) && self.attempt == attempt
    }

    /// The report as compact JSON that a kubelet keeps whole and that parses back. What does not fit is left out, what
    /// decides nothing first; all of it stays in the file on the volume.
    pub fn termination_message(&self) -> String {
        let mut report = self.clone();
        for shorten in SHORTENINGS {
            if let Some(text) = fitting(&report) {
                return text;
            }
            shorten(&mut report);
        }
        fitting(&report).expect("a report of a few short strings fits")
    }
}

fn fitting(report: &Report) -> Option<String> {
    let text = serde_json::to_string(report).ok()?;
    // A number that is not finite becomes null, which reads back as nothing.
    (text.len() <= TERMINATION_MESSAGE_BYTES && serde_json::from_str::<Report>(&text).is_ok()).then_some(text)
}

/// What is left out of a report that is too long, in this order.
const SHORTENINGS: [fn(&mut Report); 14] = [
    |report| with(&mut report.data, |data| data.length_histogram.clear()),
    |report| with(&mut report.data, |data| data.warnings.clear()),
    |report| with(&mut report.data, |data| data.sources.clear()),
    |report| report.metrics.clear(),
    |report| report.notes.iter_mut().for_each(|note| shorten(note, 200)),
    |report| with(&mut report.validation, |validation| shorten(&mut validation.summary, 300)),
    |report| with(&mut report.failure, |failure| shorten(&mut failure.message, 1500)),
    |report| report.notes.truncate(2),
    |report| report.data = None,
    |report| report.plan = None,
    |report| report.usage = Usage::default(),
    |report| with(&mut report.validation, |validation| validation.gates.retain(|gate| !gate.passed)),
    |report| {
        with(&mut report.validation, |validation| validation.gates.truncate(4));
        with(&mut report.artifact, |artifact| {
            shorten(&mut artifact.base_model, 300);
            shorten(&mut artifact.uri, 600);
        });
    },
    // What is left is of a bounded length unless somebody else wrote it.
    |report| {
        report.validation = None;
        report.artifact = None;
        report.notes.clear();
        with(&mut report.failure, |failure| {
            shorten(&mut failure.message, 1000);
            shorten(&mut failure.reason, 100);
        });
        for text in [&mut report.job_uid, &mut report.pod_uid, &mut report.config_digest] {
            shorten(text, 200);
        }
        for text in [&mut report.checkpoint_digest, &mut report.dataset_digest, &mut report.model_revision] {
            with(text, |text| shorten(text, 200));
        }
    },
];

fn with<T>(value: &mut Option<T>, change: impl FnOnce(&mut T)) {
    if let Some(value) = value {
        change(value);
    }
}

/// Cuts a text to so many bytes of JSON, between two characters.
fn shorten(text: &mut String, bytes: usize) {
    const MARK: &str = "…";
    let in_json = |character: char| match character {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        control if control < ' ' => 6,
        other => other.len_utf8(),
    };
    if text.chars().map(in_json).sum::<usize>() <= bytes {
        return;
    }
    let mut left = bytes - MARK.len();
    let fits = |character: &char| {
        left.checked_sub(in_json(*character)).is_some_and(|rest| {
            left = rest;
            true
        })
    };
    *text = text.chars().take_while(fits).chain(MARK.chars()).collect();
}

#[cfg(test)]
mod tests {
    use rand::RngExt;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::run::{Baseline, OutputFormat};

    /// Texts up to 6000 characters, of one to four bytes each, escapes among them.
    fn text(random: &mut ChaCha8Rng) -> String {
        const CHARACTERS: [char; 10] = ['a', 'é', '字', '🦀', '"', '\\', '\n', '\u{1}', '\u{7f}', '\u{2028}'];
        let longest = [3, 40, 600, 6000][random.random_range(0..4)];
        (0..random.random_range(0..=longest)).map(|_| CHARACTERS[random.random_range(0..CHARACTERS.len())]).collect()
    }

    fn some<T>(random: &mut ChaCha8Rng, make: impl FnOnce(&mut ChaCha8Rng) -> T) -> Option<T> {
        random.random_bool(0.7).then(|| make(random))
    }

    fn several<T>(random: &mut ChaCha8Rng, make: impl Fn(&mut ChaCha8Rng) -> T) -> Vec<T> {
        (0..random.random_range(0..30)).map(|_| make(random)).collect()
    }

    fn number(random: &mut ChaCha8Rng) -> f64 {
        [0.1, -1e300, 1.0 / 3.0, 5e-324, f64::NAN, f64::INFINITY][random.random_range(0..6)]
    }

    fn report(random: &mut ChaCha8Rng) -> Report {
        let scores = Scores { eval_loss: Some(number(random)), exact_match: Some(1.0 / 7.0), ..Scores::default() };
        let gate = |random: &mut ChaCha8Rng| GateResult {
            gate: Gate::ImprovesOn { metric: Metric::TokenAccuracy, baseline: Baseline::FewShot, by: 1.0 / 3.0 },
            observed: Some(number(random)),
            baseline: Some(2.0 / 3.0),
            passed: random.random_bool(0.5),
        };
        Report {
            job_uid: text(random),
            pod_stage: some(random, |_| PodStage::Train),
            attempt: 7,
            pod_uid: text(random),
            stage: Stage::Failed,
            failure: some(random, |random| Failure::new(ExitCode::BadData, text(random))),
            notes: several(random, text),
            step: i64::MAX,
            total_steps: i64::MIN,
            resumed_from_step: Some(3),
            last_checkpoint_step: Some(4),
            checkpoint_digest: some(random, text),
            config_digest: text(random),
            dataset_digest: some(random, text),
            model_revision: some(random, text),
            data: some(random, |random| DataReport {
                length_histogram: several(random, |random| (random.random(), random.random())),
                sources: several(random, |random| SourceDigest {
                    uri: text(random),
                    revision: some(random, text),
                    digest: text(random),
                    bytes: random.random(),
                }),
                warnings: several(random, text),
                dataset_digest: text(random),
                ..DataReport::default()
            }),
            plan: some(random, |random| PlanReport {
                device: text(random),
                estimated_seconds: number(random),
                ..PlanReport::default()
            }),
            metrics: several(random, |random| MetricValue { name: text(random), value: number(random) }),
            validation: some(random, |random| ValidationReport {
                rows: 5,
                generated_rows: Some(5),
                generation: some(random, |random| Generation {
                    tuned: Some(Generated { tokens: i64::MAX, seconds: number(random) }),
                    ..Generation::default()
                }),
                step: 9,
                tuned: scores,
                zero_shot: Some(scores),
                few_shot: Some(scores),
                few_shot_rows: Some(5),
                few_shot_examples: Some(4),
                forgetting: some(random, |random| ForgettingResult {
                    base_loss: number(random),
                    tuned_loss: number(random),
                    max_loss_increase: 0.1,
                    passed: true,
                }),
                gates: several(random, gate),
                verdict: Verdict::GateFailed,
                summary: text(random),
            }),
            usage: Usage { wall_seconds: number(random), ..Usage::default() },
            artifact: some(random, |random| Artifact {
                uri: text(random),
                digest: text(random),
                kind: OutputFormat::Adapter,
                lora_rank: Some(16),
                base_model: text(random),
            }),
        }
    }

    #[test]
    fn a_termination_message_fits_and_parses_whatever_is_reported() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..300 {
            let report = report(&mut random);
            let message = report.termination_message();
            assert!(message.len() <= TERMINATION_MESSAGE_BYTES, "{} bytes", message.len());
            let parsed: Report = serde_json::from_str(&message).expect("it parses");
            let decides = |report: &Report| (report.pod_stage, report.attempt, report.stage, report.step);
            assert_eq!(decides(&parsed), decides(&report));
            assert_eq!(parsed.failure.as_ref().map(|f| f.exit_code), report.failure.as_ref().map(|f| f.exit_code));
            assert_eq!(parsed.last_checkpoint_step, Some(4));
            if report.job_uid.chars().count() <= 36 {
                assert_eq!(parsed.job_uid, report.job_uid);
            }
        }
    }

    #[test]
    fn what_decides_nothing_goes_first() {
        let mut report = Report {
            data: Some(DataReport { length_histogram: vec![(1, 1)], rows: 3, ..DataReport::default() }),
            metrics: vec![MetricValue { name: "evalLoss".into(), value: 1.5 }],
            ..Report::default()
        };
        assert_eq!(serde_json::from_str::<Report>(&report.termination_message()).expect("it parses"), report);
        report.data.as_mut().expect("set").warnings = vec!["é".repeat(3000)];
        let parsed: Report = serde_json::from_str(&report.termination_message()).expect("it parses");
        let data = parsed.data.expect("kept");
        assert_eq!((data.rows, data.warnings.len(), data.length_histogram.len()), (3, 0, 0));
        assert_eq!(parsed.metrics, report.metrics);
        report.failure = Some(Failure::new(ExitCode::BadData, format!("train.jsonl:7: {}", "é".repeat(9000))));
        let parsed: Report = serde_json::from_str(&report.termination_message()).expect("it parses");
        let message = parsed.failure.expect("kept").message;
        assert!(message.starts_with("train.jsonl:7: é") && message.ends_with("é…"), "{message}");
        assert!(parsed.data.is_some_and(|data| data.rows == 3));
    }
}
