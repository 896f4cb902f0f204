//! One refusal for every rule, and what each says.

use super::*;

const MINIMAL: &str = "apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot}
spec:
  model: {uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}
  dataset: {train: {uri: s3://acme/support/train.jsonl}}
  method: {type: LoRA}
";

fn problems(text: &str, scope: Scope) -> Vec<String> {
    check(text, scope).map_or_else(|problems| problems.iter().map(ToString::to_string).collect(), |_| Vec::new())
}

#[test]
fn five_lines_are_enough() {
    let checked = check(MINIMAL, Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}"));
    assert_eq!(checked.job.spec.nodes, 1);
}

#[test]
fn every_example_is_valid() {
    let mut seen = 0;
    for entry in std::fs::read_dir("examples").expect("there").flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("readable");
        if path.file_name().is_some_and(|name| name == "profiles.yaml") {
            let profiles = crate::profile::parse(&text).unwrap_or_else(|error| panic!("{error}"));
            assert!(profiles.contains_key(crate::profile::DEFAULT));
            continue;
        }
        let scope = if text.contains("file://") { Scope::Local } else { Scope::Cluster };
        assert_eq!(problems(&text, scope), Vec::<String>::new(), "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 6, "{seen} examples");
}

/// One refusal for every rule and bound that a user can break; the message is the API server's too.
#[test]
fn every_rule_refuses() {
    let spec = "  model: {uri: hf://a/b}\n  dataset: {train: {uri: hf://datasets/a/b/c}}\n  method: {type: LoRA}\n";
    for (from, to, expected) in [
        ("{type: LoRA}", "{type: Full, lora: {rank: 4}}", "lora is not valid for type Full"),
        ("{type: LoRA}", "{type: LoRA, quantization: {type: NF4}}", "quantization is only valid for type QLoRA"),
        (
            "{type: LoRA}",
            "{type: LoRA, full: {optimizerInBackward: true}}",
            "spec.method.full: full is only valid for type Full",
        ),
        (
            "{type: LoRA}",
            "{type: Full, full: {optimizerInBackward: true}}",
            "spec.hyperparameters.maxGradNorm: method.full.optimizerInBackward never has all gradients at once to clip \
             them: set hyperparameters.maxGradNorm: \"0\"",
        ),
        (
            "{type: LoRA}",
            "{type: Full, full: {optimizerInBackward: true}}\n  hyperparameters: {maxGradNorm: \"1\"}",
            "8:34: spec.hyperparameters.maxGradNorm: method.full.optimizerInBackward never has all gradients",
        ),
        (
            "{type: LoRA}",
            "{type: Full, full: {optimizerInBackward: true}}\n  hyperparameters: {maxGradNorm: \"0\", microBatchTokens: 64}",
            "8:57: spec.hyperparameters.microBatchTokens: method.full.optimizerInBackward computes the whole step at \
             once: remove hyperparameters.microBatchTokens",
        ),
        ("{type: LoRA}", "{type: DoRA}", "found \"DoRA\", expected one of LoRA, QLoRA, Full"),
        ("{type: LoRA}", "{type: LoRA, lora: {rank: 0}}", "0 is less than the minimum of 1"),
        ("{type: LoRA}", "{type: LoRA, lora: {rank: 513}}", "513 is greater than the maximum of 512"),
        ("{type: LoRA}", "{type: LoRA, lora: {dropout: \"1.0\"}}", "must be less than 1"),
        ("{type: LoRA}", "{type: Full}\n  output: {format: Adapter}", "full fine-tuning has no adapter"),
        (
            "c}}",
            "c}, splitPercent: 5, validation: {uri: hf://datasets/a/b/d}}",
            "set validation or splitPercent, not both",
        ),
        ("c}}", "c}, splitPercent: 51}", "51 is greater than the maximum of 50"),
        ("hf://a/b", "hf://user:secret@host/b", "found a source with hf"),
        ("hf://a/b", "ftp://a/b", "found a source with ftp"),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  hyperparameters: {epochs: \"1\", maxSteps: 5}",
            "set epochs or maxSteps, not both",
        ),
        ("{type: LoRA}", "{type: LoRA}\n  hyperparameters: {maxSteps: 0}", "0 is less than the minimum of 1"),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  checkpoint: {storage: {claim: c, size: 5Gi}}",
            "set {claim, path} for an existing volume",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  validation: {gates: [{metric: evalLoss, operator: AtMost, value: \"1\"}]}",
            "validation.gates needs dataset.validation",
        ),
        (
            "c}}",
            "c}, splitPercent: 5}\n  validation: {gates: [{metric: evalLoss, operator: AtMost, by: \"1\"}]}",
            "AtMost and AtLeast take value",
        ),
        ("{type: LoRA}", "{type: LoRA}\n  earlyStopping: {patience: 3}", "earlyStopping needs dataset.validation"),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  validation: {everySteps: 5}",
            "validation.everySteps, metric, evaluate and baselines need dataset.validation",
        ),
        ("{type: LoRA}", "{type: LoRA}\n  validation: {metric: exactMatch}", "metric, evaluate and baselines need"),
        ("{type: LoRA}", "{type: LoRA}\n  validation: {evaluate: Last}", "metric, evaluate and baselines need"),
        ("{type: LoRA}", "{type: LoRA}\n  validation: {baselines: {}}", "metric, evaluate and baselines need"),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  hyperparameters: {warmupRatio: \"5\"}",
            "spec.hyperparameters.warmupRatio: must be at most 1",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  hyperparameters: {epochs: \"10001\"}",
            "spec.hyperparameters.epochs: must be at most 10000",
        ),
        ("{type: LoRA}", "{type: LoRA}\n  hyperparameters: {epochs: \"0\"}", "must be greater than 0"),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  hyperparameters: {weightDecay: \"1e999\"}",
            "found \"1e999\", expected a decimal such as \"0.05\" or \"2e-4\", with an exponent of at most two digits",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  resources: {limits: {memory: lots}}",
            "spec.resources.limits.memory: found \"lots\", expected a quantity such as",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  resources: {requests: {nvidia.com/gpu: 0.5}}",
            "spec.resources.requests[nvidia.com/gpu]: found the number 0.5, expected a quoted decimal: write nvidia.com/gpu: \"0.5\"",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  checkpoint: {storage: {size: big}}",
            "found \"big\", expected a quantity such as",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  nodes: 2\n  resources: {limits: {nvidia.com/mig-1g.10gb: \"1\"}}",
            "MIG slices cannot span nodes",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  scheduling: {priorityClassName: system-node-critical}",
            "system priority classes are not for jobs",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  scheduling: {workloadPriorityClassName: high}",
            "workloadPriorityClassName needs queueName",
        ),
        (
            "{type: LoRA}",
            "{type: LoRA}\n  scheduling: {tolerations: [{operator: Exists}]}",
            "a toleration must name a key",
        ),
        (
            "name: bot",
            "name: a-name-that-goes-on-and-on-until-it-is-longer-than-fifty-two",
            "metadata.name must be at most 52 characters",
        ),
    ] {
        let text =
            format!("apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: bot}}\nspec:\n{spec}");
        assert!(text.contains(from), "{from}");
        let found = problems(&text.replacen(from, to, 1), Scope::Cluster);
        assert!(found.iter().any(|problem| problem.contains(expected)), "{to}: {found:?}");
    }
}

#[test]
fn what_may_not_change_is_refused() {
    let job = |text: &str| check(text, Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}")).job;
    let old = job(MINIMAL);
    for (added, expected) in [
        ("  hyperparameters: {seed: 1}\n", Some("training inputs are immutable")),
        ("  managedBy: other\n", Some("managedBy is immutable")),
        ("  profile: a100\n", Some("profile is immutable")),
        ("  suspend: true\n", None),
    ] {
        let errors = job(&format!("{MINIMAL}{added}")).validate_cel_update(&old).err();
        let text = errors.map(|errors| format!("{:?}", errors.as_slice()));
        match expected {
            Some(expected) => {
                assert!(text.as_ref().is_some_and(|text| text.contains(expected)), "{added}: {text:?}");
            }
            None => assert_eq!(text, None, "{added}"),
        }
    }
    let stopped = job(&format!("{MINIMAL}  stopRequested: true\n"));
    assert!(old.validate_cel_update(&stopped).is_err(), "stopRequested cannot be taken back");
}

#[test]
fn files_are_local() {
    let text = MINIMAL.replace("s3://acme/support/train.jsonl", "file://data/train.jsonl");
    assert_eq!(problems(&text, Scope::Local), Vec::<String>::new());
    assert_eq!(
        problems(&text, Scope::Cluster),
        [
            "6:26: spec.dataset.train.uri: found a source with file, expected hf://owner/name, s3://, gs://, az://, https:// or pvc://"
        ]
    );
}

#[test]
fn problems_name_line_column_field_and_remedy() {
    for (added, expected) in [
        (
            "  hyperparameters: {learningRate: 2e-4}\n",
            "8:35: spec.hyperparameters.learningRate: found the number 2e-4, expected a quoted decimal: write learningRate: \"2e-4\"",
        ),
        (
            "  hyperparameters: {learninRate: \"1\"}\n",
            "8:34: spec.hyperparameters.learninRate: unknown field; did you mean learningRate?",
        ),
        (
            "  hyperparameters: {learningRate: \"0\"}\n",
            "8:35: spec.hyperparameters.learningRate: must be greater than 0",
        ),
        (
            "  hyperparameters: {learningRate: fast}\n",
            "8:35: spec.hyperparameters.learningRate: found \"fast\", expected a decimal such as \"0.05\" or \"2e-4\"",
        ),
        (
            "  hyperparameters: {scheduler: Spline}\n",
            "8:32: spec.hyperparameters.scheduler: found \"Spline\", expected one of Constant, Linear, Cosine, CosineWithMinLr, InverseSqrt",
        ),
        (
            "  checkpoint: {everySteps: 1, everySeconds: 1}\n",
            "8:3: spec.checkpoint: set everySteps or everySeconds, not both",
        ),
        ("  suspend: maybe\n", "8:12: spec.suspend: \"maybe\" is not of type \"boolean\""),
        ("  - x\n", "not valid YAML"),
    ] {
        let found = problems(&format!("{MINIMAL}{added}"), Scope::Cluster);
        assert!(found.len() == 1 && found[0].contains(expected), "{added}: {found:#?}");
    }
}

#[test]
fn a_field_and_its_pointer_say_the_same() {
    for (field, pointer) in [
        ("spec.nodes", "/spec/nodes"),
        ("spec.validation.gates[0].by", "/spec/validation/gates/0/by"),
        ("spec.resources.limits[nvidia.com/gpu]", "/spec/resources/limits/nvidia.com~1gpu"),
        ("", ""),
    ] {
        assert_eq!(pointer_of(field), pointer);
        assert_eq!(field_of(pointer), field);
    }
    let added = "  resources: {limits: {memory: 1Gi,\n    nvidia.com/gpu: \"2\"}}\n";
    let checked = check(&format!("{MINIMAL}{added}"), Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}"));
    let problem = checked.problem("spec.resources.limits[nvidia.com/gpu]", "too many");
    assert_eq!(problem.to_string(), "9:21: spec.resources.limits[nvidia.com/gpu]: too many");
}

/// A decimal that is infinite would pass `double(self) > 0.0` and never train.
#[test]
fn every_decimal_is_finite() {
    let validator = jsonschema::validator_for(&serde_json::json!({"pattern": crate::finetunejob::DECIMAL_PATTERN}))
        .expect("a schema");
    let largest = format!("{}e99", "9".repeat(29));
    assert!(validator.is_valid(&Value::from(largest.as_str())), "{largest}");
    assert!(largest.parse::<f64>().is_ok_and(f64::is_finite), "{largest}");
    for text in ["1e100", "1e999", "1E+0309", "inf", "NaN"] {
        assert!(!validator.is_valid(&Value::from(text)), "{text}");
    }
}

#[test]
fn the_kind_is_asked_for_first() {
    let found = problems("kind: Pod\nmetadata: {name: x}\n", Scope::Local);
    assert_eq!(
        found,
        [
            "1:1: apiVersion: found null, expected finetune.dev/v1alpha1",
            "1:7: kind: found \"Pod\", expected FineTuneJob"
        ]
    );
}

fn name(text: &str) -> String {
    check(text, Scope::Local).unwrap_or_else(|problems| panic!("{problems:?}")).job.metadata.name.expect("a name")
}

/// The same command goes on with the same run; another file never does.
#[test]
fn a_generated_name_follows_from_what_the_file_says() {
    let generated = MINIMAL.replace("{name: support-bot}", "{generateName: support-bot-}");
    // In letters: a run on disk must be found by the next version too.
    assert_eq!(name(&generated), "support-bot-r8sq8");
    let laid_out = generated.replace("{type: LoRA}", "\n    type: LoRA # the small one");
    assert_eq!(name(&laid_out), name(&generated), "comments and layout say nothing");
    let other = name(&format!("{generated}  hyperparameters: {{seed: 1}}\n"));
    assert!(other != name(&generated) && other.starts_with("support-bot-"), "{other}");
    assert_eq!(name(&generated.replace("generateName", "name: given, generateName")), "given", "a name wins");
    assert!(name(&generated.replace("generateName", "name: \"\", generateName")).starts_with("support-bot-"));
    let longest = name(&generated.replace("support-bot-", &"b".repeat(47)));
    assert_eq!(longest.len(), 52, "as long as a name may be");
}

#[test]
fn names_are_what_the_api_server_takes() {
    let expected = "lower-case letters, digits and '-'";
    for (metadata, found) in [
        ("{name: Bot}", expected),
        ("{name: bot-}", expected),
        ("{name: a..b}", expected),
        ("{name: 7}", "metadata.name: found 7, "),
        ("{}", "metadata.name: found \"\", "),
        ("{generateName: Bot-}", "metadata.generateName: found \"Bot-\", expected a prefix of"),
        ("{generateName: \"-\"}", expected),
        ("{generateName: bot.}", expected),
        (
            "{generateName: a-prefix-that-is-so-long-that-nothing-fits-behind}",
            "expected at most 47: 5 more are appended",
        ),
    ] {
        let text = MINIMAL.replace("{name: support-bot}", metadata);
        let told = problems(&text, Scope::Cluster);
        assert!(told.len() == 1 && told[0].contains(found), "{metadata}: {told:?}");
    }
}
