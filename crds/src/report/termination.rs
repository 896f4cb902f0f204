//! The report as a termination message: what fits into one.

use super::{Report, Usage};

/// The longest termination message that a kubelet keeps.
pub const TERMINATION_MESSAGE_BYTES: usize = 4096;

impl Report {
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
const SHORTENINGS: [fn(&mut Report); 15] = [
    |report| report.checkpoints.clear(),
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
    use crate::exit::ExitCode;
    use crate::report::{
        Artifact, CheckpointInfo, DataReport, Failure, ForgettingResult, GateResult, Generated, Generation,
        MetricValue, PlanReport, Scores, SourceDigest, Stage, ValidationReport, Verdict,
    };
    use crate::run::{Baseline, Gate, Metric, OutputFormat, PodStage};

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
            from_volume: random.random_bool(0.5),
            checkpoints: several(random, |random| CheckpointInfo {
                step: random.random(),
                time: text(random),
                eval_loss: Some(number(random)),
                best: true,
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
            let decides =
                |report: &Report| (report.pod_stage, report.attempt, report.stage, report.step, report.from_volume);
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
