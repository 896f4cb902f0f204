use std::sync::LazyLock;

use crds::finetunejob::HyperparametersSpec;
use crds::report::{Artifact, DataReport, Failure, MemoryEstimate, PlanReport, Stage, Verdict};
use crds::run::{Baseline, Metric, OutputFormat};
use serde_json::Value;

use super::*;

#[test]
fn decimals_are_short_and_durations_are_for_people() {
    for (value, expected) in [
        (1.913_427_9, "1.91343"),
        (2e-4, "0.0002"),
        (0.0, "0"),
        (123_456_789.0, "123457000"),
        (1e40, "1e40"),
        (1e-40, "1e-40"),
    ] {
        assert_eq!(decimal(value), expected);
    }
    for (seconds, expected) in [(0, "0s"), (59, "59s"), (60, "1m"), (5400, "1h30m"), (360_000, "4d")] {
        assert_eq!(duration(seconds), expected);
    }
}

#[test]
fn a_message_is_one_line_that_a_person_reads() {
    for (text, expected) in [
        ("as it is", "as it is"),
        ("", ""),
        (" \n\t ", ""),
        ("two\nlines,\r\n and\ta tab ", "two lines, and a tab"),
        ("\u{1b}[31mred\u{7}\0", "[31mred"),
        ("left\u{202e}right\u{200b}there\u{feff}", "left right there"),
        ("über «alles» 日本語", "über «alles» 日本語"),
    ] {
        assert_eq!(message(text), expected, "{text:?}");
    }
    for endless in ["é".repeat(1 << 20), "word ".repeat(1 << 18), "日".repeat(342) + "日", "\n".repeat(1 << 20) + "end"]
    {
        let told = message(&endless);
        assert!(told.len() <= 1024 && (told.ends_with('…') || told == "end"), "{} bytes: {told}", told.len());
        assert_eq!(message(&told), told, "what is told once is told the same again");
    }
    let fits = "x".repeat(1024);
    assert_eq!(message(&fits), fits);
}

#[test]
fn what_counts_down_is_no_other_message() {
    let needed = |count: &str| {
        format!(
            "couldn't assign flavors to pod set main: insufficient quota for nvidia.com/gpu in flavor a100, {count} more needed"
        )
    };
    for (one, other, expected) in [
        (needed("3"), needed("12"), true),
        (needed("3"), needed("3").replace("a100", "h100"), false),
        (
            "0/5 nodes are available: 3 Insufficient cpu.".into(),
            "0/6 nodes are available: 4 Insufficient cpu.".into(),
            true,
        ),
        (
            "0/5 nodes are available: 3 Insufficient cpu.".into(),
            "0/5 nodes are available: 3 Insufficient memory.".into(),
            false,
        ),
        ("(1500Mi more needed)".into(), "(2Gi more needed)".into(), true),
        ("waits".into(), "waits longer".into(), false),
        (String::new(), String::new(), true),
    ] {
        assert_eq!(have_same_meaning(&one, &other), expected, "{one} and {other}");
    }
}

/// The schema of a status in the committed CRD, and what checks it.
static SCHEMA: LazyLock<(Value, jsonschema::Validator)> = LazyLock::new(|| {
    let crd = include_str!("../../../../crds/finetunejobs.yaml");
    let crd: Value = serde_saphyr::from_str(crd).expect("the committed CRD is YAML");
    let schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"].clone();
    let validator = jsonschema::validator_for(&schema).expect("a JSON Schema");
    (schema, validator)
});

/// Why the API server would refuse a status, or a person would rather not have it.
fn refused(status: &FineTuneJobStatus) -> Vec<String> {
    let (schema, validator) = &*SCHEMA;
    let value = serde_json::to_value(status).expect("a status is JSON");
    let mut problems: Vec<String> =
        validator.iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path())).collect();
    beyond_the_schema(&value, schema, "status", &mut problems);
    let bytes = value.to_string().len();
    if bytes > 16 * 1024 {
        problems.push(format!("{bytes} bytes"));
    }
    problems
}

/// What the API server checks and a JSON Schema does not: keys of lists, times. And what nobody should have to read.
fn beyond_the_schema(value: &Value, schema: &Value, path: &str, problems: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                beyond_the_schema(value, &schema["properties"][name], &format!("{path}.{name}"), problems);
            }
        }
        Value::Array(items) => {
            if let Some(keys) = schema["x-kubernetes-list-map-keys"].as_array() {
                let key =
                    |item: &Value| keys.iter().map(|key| item[key.as_str().unwrap_or_default()].clone()).collect();
                let mut keys: Vec<Vec<Value>> = items.iter().map(key).collect();
                keys.sort_by_key(|key| format!("{key:?}"));
                keys.dedup();
                if keys.len() < items.len() {
                    problems.push(format!("{path}: a key twice"));
                }
            }
            for item in items {
                beyond_the_schema(item, &schema["items"], path, problems);
            }
        }
        Value::String(text) => {
            let is_time = text.len() == 20 && text.starts_with("20") && text.ends_with('Z');
            if schema["format"] == "date-time" && !is_time {
                problems.push(format!("{path}: {text:?} is no time"));
            }
            if text.len() > 1024 || text.chars().any(is_gap_that_is_no_space) {
                problems.push(format!("{path}: {text:?}"));
            }
        }
        Value::Number(number) => {
            if number.as_i64().is_none_or(|number| !(0..=MAX_COUNT).contains(&number)) {
                problems.push(format!("{path}: {number}"));
            }
        }
        Value::Bool(_) | Value::Null => {}
    }
}

fn is_gap_that_is_no_space(character: char) -> bool {
    character != ' ' && is_gap(character)
}

/// The status of a job that trains, before anything hostile is said about it.
fn trains() -> FineTuneJobStatus {
    let resolved =
        ResolvedStatus { hyperparameters: Some(HyperparametersSpec::default()), ..ResolvedStatus::default() };
    FineTuneJobStatus { resolved: Some(resolved), ..FineTuneJobStatus::default() }
}

fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> =
        ["", "trainLoss", "a b", "1st", "naïve", "\0", "\u{1b}]0;title\u{7}", "\u{202e}evil", "a\r\nb: c"]
            .map(str::to_owned)
            .into();
    for (piece, times) in
        [("x", 63), ("x", 64), ("x", 1025), ("é", 1 << 16), ("\n", 1 << 16), ("😀", 400), ("word ", 1 << 14)]
    {
        texts.push(piece.repeat(times));
    }
    for time in [
        "2026-01-01T00:00:00.123456789+14:00",
        "1969-07-20T20:17:40Z",
        "-009999-06-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "2026-13-01",
    ] {
        texts.push(time.into());
    }
    texts
}

const HOSTILE_COUNTS: [i64; 8] = [0, 1, -1, 7, i64::MIN, i64::MAX, i64::MAX / 100 + 1, i32::MAX as i64 + 1];
const HOSTILE_NUMBERS: [f64; 10] =
    [0.0, -0.0, 1.5, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324];

/// Picks of the hostile values, one after the other: every field meets every one of its kind.
struct Picks {
    texts: Vec<String>,
    turn: usize,
}

impl Picks {
    fn next<T: Clone>(&mut self, values: &[T]) -> T {
        self.turn = self.turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        values[(self.turn >> 33) % values.len()].clone()
    }

    fn text(&mut self) -> String {
        let texts = std::mem::take(&mut self.texts);
        let text = self.next(&texts);
        self.texts = texts;
        text
    }

    fn count(&mut self) -> i64 {
        self.next(&HOSTILE_COUNTS)
    }

    fn number(&mut self) -> f64 {
        self.next(&HOSTILE_NUMBERS)
    }

    fn metrics(&mut self) -> Vec<MetricValue> {
        let many = self.next(&[0, 1, 33, 10_000]);
        (0..many).map(|_| MetricValue { name: self.text(), value: self.number() }).collect()
    }

    fn progress(&mut self) -> Progress {
        let many = self.next(&[0, 1, 17, 1000]);
        Progress {
            job_uid: self.text(),
            pod_uid: self.text(),
            pod_stage: Some(PodStage::Train),
            attempt: self.next(&[0, -1, i32::MIN, i32::MAX]),
            resumed_from_step: Some(self.count()),
            stage: Stage::Training,
            step: self.count(),
            total_steps: self.count(),
            epoch: self.number(),
            trained_tokens: self.count(),
            input_tokens: self.count(),
            tokens_per_second: Some(self.number()),
            estimated_remaining_seconds: Some(self.count()),
            last_report_time: self.text(),
            metrics: self.metrics(),
            checkpoints: (0..many)
                .map(|_| CheckpointInfo {
                    step: self.count(),
                    time: self.text(),
                    eval_loss: Some(self.number()),
                    best: self.next(&[true, false]),
                })
                .collect(),
        }
    }

    fn scores(&mut self) -> Scores {
        Scores {
            eval_loss: Some(self.number()),
            perplexity: Some(self.number()),
            token_accuracy: Some(self.number()),
            exact_match: Some(self.number()),
        }
    }

    fn gate(&mut self) -> GateResult {
        let (metric, value) = (Metric::ExactMatch, self.number());
        let gates = [
            Gate::AtMost { metric, value },
            Gate::AtLeast { metric, value },
            Gate::ImprovesOn { metric, baseline: Baseline::FewShot, by: value },
        ];
        GateResult {
            gate: self.next(&gates),
            observed: Some(self.number()),
            baseline: Some(self.number()),
            passed: true,
        }
    }

    fn report(&mut self) -> Report {
        let gates = self.next(&[0, 1, 17, 500]);
        Report {
            job_uid: self.text(),
            pod_stage: Some(PodStage::Train),
            failure: Some(Failure {
                reason: self.text(),
                exit_code: self.next(&[i32::MIN, 0, i32::MAX]),
                message: self.text(),
            }),
            notes: vec![self.text()],
            step: self.count(),
            total_steps: self.count(),
            resumed_from_step: Some(self.count()),
            last_checkpoint_step: Some(self.count()),
            checkpoint_digest: Some(self.text()),
            config_digest: self.text(),
            dataset_digest: Some(self.text()),
            model_revision: Some(self.text()),
            data: Some(DataReport {
                rows: self.count(),
                validation_rows: self.count(),
                tokens: self.count(),
                trained_tokens: self.count(),
                duplicates: self.count(),
                leaked: self.count(),
                truncated: self.count(),
                ..DataReport::default()
            }),
            plan: Some(PlanReport {
                device: self.text(),
                precision: self.text(),
                memory: MemoryEstimate { total: self.count(), ..MemoryEstimate::default() },
                micro_batch_tokens: self.count(),
                trainable_parameters: self.count(),
                ..PlanReport::default()
            }),
            metrics: self.metrics(),
            validation: Some(ValidationReport {
                rows: self.count(),
                generated_rows: None,
                generation: None,
                step: self.count(),
                tuned: self.scores(),
                zero_shot: Some(self.scores()),
                few_shot: Some(self.scores()),
                few_shot_rows: None,
                few_shot_examples: None,
                forgetting: Some(ForgettingResult {
                    base_loss: self.number(),
                    tuned_loss: self.number(),
                    max_loss_increase: self.number(),
                    passed: true,
                }),
                gates: (0..gates).map(|_| self.gate()).collect(),
                verdict: Verdict::Better,
                summary: self.text(),
            }),
            artifact: Some(Artifact {
                uri: self.text(),
                digest: self.text(),
                kind: OutputFormat::Adapter,
                lora_rank: Some(self.count()),
                base_model: self.text(),
            }),
            ..Report::default()
        }
    }
}

#[test]
fn whatever_a_pod_says_its_status_can_be_written() {
    let mut picks = Picks { texts: hostile_texts(), turn: 14 };
    for round in 0..200 {
        let (progress, report) = (picks.progress(), picks.report());
        let mut status = trains();
        note_progress(&mut status, &progress);
        assert_eq!(refused(&status), Vec::<String>::new(), "round {round}: {status:#?}");
        note_report(&mut status, PodStage::Train, &report);
        assert_eq!(refused(&status), Vec::<String>::new(), "round {round}: {status:#?}");
    }
}

#[test]
fn what_tells_of_a_refused_status_can_see_one() {
    let named = |name: &str| MetricStatus { name: name.into(), value: "1".into() };
    let cases: [(&str, fn(&mut FineTuneJobStatus, &dyn Fn(&str) -> MetricStatus)); 5] = [
        ("a name of 64 characters", |status, named| status.metrics = vec![named(&"n".repeat(64))]),
        ("a name twice", |status, named| status.metrics = vec![named("loss"), named("loss")]),
        ("no tokens at once", |status, _| {
            let resolved = status.resolved.as_mut().and_then(|resolved| resolved.hyperparameters.as_mut());
            resolved.expect("there are some").micro_batch_tokens = Some(0);
        }),
        ("a year before Christ", |status, _| {
            status.start_time = "-000044-03-15T12:00:00Z".parse().ok().map(Time);
        }),
        ("a control character", |status, named| {
            status.metrics = vec![MetricStatus { value: "\u{7}".into(), ..named("loss") }];
        }),
    ];
    for (what, make) in cases {
        let mut status = trains();
        assert_eq!(refused(&status), Vec::<String>::new());
        make(&mut status, &named);
        assert!(!refused(&status).is_empty(), "{what}");
    }
}

#[test]
fn of_a_name_that_is_told_twice_the_newest_value_stands() {
    let told =
        [("trainLoss", 2.0), ("evalLoss", f64::NAN), ("trainLoss", 1.5), ("a b", 1.0), ("", 1.0), ("evalLoss", 3.0)];
    let told = told.map(|(name, value)| MetricValue { name: name.into(), value });
    let status = |name: &str, value: &str| MetricStatus { name: name.into(), value: value.into() };
    assert_eq!(metrics(&told), [status("trainLoss", "1.5"), status("evalLoss", "3")]);
}

#[test]
fn checkpoints_are_in_order_and_the_newest_of_them() {
    let told = |step| CheckpointInfo { step, time: "2026-01-01T00:00:00.7Z".into(), eval_loss: Some(2.0), best: false };
    let mut all: Vec<CheckpointInfo> = (1..=20).rev().map(|number| told(number * 100)).collect();
    all.push(CheckpointInfo { eval_loss: Some(1.0), best: true, ..told(2000) });
    all.push(told(-5));
    let found = checkpoints(&all);
    let steps: Vec<i64> = found.iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!(steps, (5..=20).map(|number| number * 100).collect::<Vec<i64>>());
    let last = found.last().expect("some");
    assert_eq!((last.best, last.eval_loss.as_deref()), (true, Some("1")), "what was told last of a step stands");
    assert_eq!(last.time, "2026-01-01T00:00:00Z".parse().ok().map(Time));
}
