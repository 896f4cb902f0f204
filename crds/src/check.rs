//! From YAML text to a checked [`FineTuneJob`], by the rules of the CRD itself: text → value → JSON schema → unknown fields
//! → defaults and CEL → type. The API server and a local run come to the same verdict, with two differences that
//! [`Scope`] names.

use kube::CustomResourceExt;
use serde_json::{Map, Value};

use crate::FineTuneJob;
use crate::finetunejob::{CLUSTER_URI_PATTERN, LOCAL_URI_PATTERN, QUANTITY_PATTERN};
use crate::yaml::Document;

/// Whose rules apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// As the API server decides.
    Cluster,
    /// As a local run decides: `file://` sources are accepted too.
    Local,
}

/// Something that must be changed before the job can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, for example `spec.hyperparameters.learningRate`.
    pub field: String,
    /// Counted from 1.
    pub line: u64,
    /// Counted from 1.
    pub column: u64,
    /// What was found, what is expected, what to do.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:{}: ", self.line, self.column)?;
        if !self.field.is_empty() {
            write!(formatter, "{}: ", self.field)?;
        }
        formatter.write_str(&self.message)
    }
}

/// A checked job and the document that it was read from, for later messages about its fields.
#[derive(Debug)]
pub struct Checked {
    /// The job, defaults applied.
    pub job: FineTuneJob,
    document: Document,
}

impl Checked {
    /// A problem with a field, at the place where the field stands.
    pub fn problem(&self, field: &str, message: impl Into<String>) -> Problem {
        problem(&self.document, &pointer_of(field), message)
    }
}

/// Checks `text`; all problems that were found are returned, in the order of their places.
pub fn check(text: &str, scope: Scope) -> Result<Checked, Vec<Problem>> {
    let document = Document::parse(text).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |location| (location.line(), location.column()));
        let message = error.without_snippet().to_string();
        let message = message.lines().next().unwrap_or_default().to_owned();
        vec![Problem { field: String::new(), line, column, message: format!("not valid YAML: {message}") }]
    })?;
    let mut problems = check_kind(&document);
    if problems.is_empty() {
        let schema = schema(scope);
        problems.extend(unknown_fields(&document, &schema, &document.value, ""));
        problems.extend(check_schema(&document, &schema, text));
    }
    if !problems.is_empty() {
        problems.sort_by_key(|problem| (problem.line, problem.column));
        problems.dedup();
        return Err(problems);
    }
    let job: FineTuneJob = serde_json::from_value(document.value.clone())
        .map_err(|error| vec![problem(&document, "", format!("not a FineTuneJob: {error}"))])?;
    if let Err(errors) = job.validate_cel() {
        return Err(errors
            .as_slice()
            .iter()
            .map(|error| problem(&document, &pointer_of(&error.field_path), &error.message))
            .collect());
    }
    Ok(Checked { job, document })
}

fn problem(document: &Document, pointer: &str, message: impl Into<String>) -> Problem {
    let (line, column) = document.position(pointer);
    Problem { field: field_of(pointer), line, column, message: message.into() }
}

/// The JSON pointer of a field as the API server writes it: `spec.validation.gates[0].by`,
/// `spec.resources.limits[nvidia.com/gpu]`.
fn pointer_of(field: &str) -> String {
    let mut pointer = String::new();
    let mut rest = field;
    while !rest.is_empty() {
        let (segment, after) = match rest.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            Some((segment, after)) => (segment.trim_matches('"'), after),
            None => rest.split_at(rest.find(['.', '[']).unwrap_or(rest.len())),
        };
        pointer += &format!("/{}", segment.replace('~', "~0").replace('/', "~1"));
        rest = after.strip_prefix('.').unwrap_or(after);
    }
    pointer
}

fn field_of(pointer: &str) -> String {
    let mut field = String::new();
    for segment in pointer.split('/').skip(1) {
        let segment = segment.replace("~1", "/").replace("~0", "~");
        if segment.contains(['.', '/']) || segment.chars().all(|c| c.is_ascii_digit()) {
            field += &format!("[{segment}]");
        } else {
            field += if field.is_empty() { "" } else { "." };
            field += &segment;
        }
    }
    field
}

/// The API server asks for these before any schema.
fn check_kind(document: &Document) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, expected) in [("apiVersion", "finetune.dev/v1alpha1"), ("kind", "FineTuneJob")] {
        let found = &document.value[name];
        if found != expected {
            problems.push(problem(document, &format!("/{name}"), format!("found {found}, expected {expected}")));
        }
    }
    let name = document.value["metadata"]["name"].as_str().unwrap_or_default();
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if name.is_empty() || !name.chars().all(label) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        let message =
            format!("found {name:?}, expected a name of lower-case letters, digits and '-', for example support-bot");
        problems.push(problem(document, "/metadata/name", message));
    }
    problems
}

/// The CRD's own schema as JSON Schema.
fn schema(scope: Scope) -> Value {
    let crd = serde_json::to_value(FineTuneJob::crd()).expect("the CRD is JSON");
    let mut schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
    translate(&mut schema, scope);
    schema
}

/// OpenAPI's `nullable` and Kubernetes' `int-or-string` become types; in a local run the pattern of sources admits files.
fn translate(schema: &mut Value, scope: Scope) {
    match schema {
        Value::Object(map) => {
            if map.get("nullable") == Some(&Value::Bool(true))
                && let Some(kind) = map.get("type").cloned()
            {
                map.insert("type".into(), serde_json::json!([kind, "null"]));
            }
            if map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
                map.insert("type".into(), serde_json::json!(["integer", "string"]));
            }
            for value in map.values_mut() {
                translate(value, scope);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| translate(item, scope)),
        Value::String(text) if scope == Scope::Local && text == CLUSTER_URI_PATTERN => {
            *text = LOCAL_URI_PATTERN.into();
        }
        _ => {}
    }
}

/// Fields that the schema does not know; the API server's strict validation refuses them too.
fn unknown_fields(document: &Document, schema: &Value, value: &Value, pointer: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    match value {
        Value::Object(entries) => {
            let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return problems };
            for (key, value) in entries {
                let below = format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"));
                match properties.get(key) {
                    Some(schema) => problems.extend(unknown_fields(document, schema, value, &below)),
                    // The CRD leaves these to the API server.
                    None if pointer.is_empty() && ["apiVersion", "kind", "metadata"].contains(&key.as_str()) => {}
                    None => problems.push(problem(document, &below, unknown_field(key, properties))),
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                problems.extend(unknown_fields(document, &schema["items"], item, &format!("{pointer}/{index}")));
            }
        }
        _ => {}
    }
    problems
}

fn unknown_field(key: &str, properties: &Map<String, Value>) -> String {
    let nearest = properties.keys().min_by_key(|name| edit_distance(name, key));
    if let Some(name) = nearest.filter(|name| edit_distance(name, key) <= 3) {
        format!("unknown field; did you mean {name}?")
    } else {
        let names: Vec<&str> = properties.keys().map(String::as_str).collect();
        format!("unknown field; expected one of {}", names.join(", "))
    }
}

/// Levenshtein distance, ignoring case.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_lowercase(), b.to_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.chars().count()]
}

fn check_schema(document: &Document, schema: &Value, text: &str) -> Vec<Problem> {
    let validator = jsonschema::validator_for(schema).expect("the CRD's schema is a JSON Schema");
    validator
        .iter_errors(&document.value)
        .map(|error| {
            let pointer = error.instance_path().to_string();
            let message = schema_message(document, &error, &pointer, text);
            problem(document, &pointer, message)
        })
        .collect()
}

fn schema_message(document: &Document, error: &jsonschema::ValidationError, pointer: &str, text: &str) -> String {
    use jsonschema::error::ValidationErrorKind as Kind;
    let found = error.instance();
    match error.kind() {
        Kind::Required { property } => format!("{} is missing", property.as_str().unwrap_or_default()),
        Kind::Type { .. } if found.is_number() && expects_string(error) => {
            let written = written_at(text, document.position(pointer));
            let name = pointer.rsplit('/').next().unwrap_or_default().replace("~1", "/").replace("~0", "~");
            format!("found the number {written}, expected a quoted decimal: write {name}: \"{written}\"")
        }
        Kind::Enum { options } => {
            let names: Vec<&str> = options.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            format!("found {found}, expected one of {}", names.join(", "))
        }
        Kind::Pattern { pattern } if *pattern == CLUSTER_URI_PATTERN || *pattern == LOCAL_URI_PATTERN => {
            let scheme = found.as_str().and_then(|uri| uri.split_once("://")).map_or("no scheme", |(scheme, _)| scheme);
            let local = if *pattern == LOCAL_URI_PATTERN { ", file://path" } else { "" };
            format!(
                "found a source with {scheme}, expected hf://owner/name, s3://, gs://, az://, https:// or pvc://{local}"
            )
        }
        Kind::Pattern { pattern } if pattern == QUANTITY_PATTERN => {
            format!("found {found}, expected a quantity such as \"16Gi\" or \"500m\"")
        }
        Kind::Pattern { .. } => format!(
            "found {found}, expected a decimal such as \"0.05\" or \"2e-4\", with an exponent of at most two digits"
        ),
        _ => error.to_string(),
    }
}

fn expects_string(error: &jsonschema::ValidationError) -> bool {
    error.to_string().contains("\"string\"")
}

/// The scalar as the user wrote it.
fn written_at(text: &str, (line, column): (u64, u64)) -> String {
    let line = text.lines().nth(line.saturating_sub(1) as usize).unwrap_or_default();
    line.chars()
        .skip(column.saturating_sub(1) as usize)
        .take_while(|c| !c.is_whitespace() && !matches!(c, ',' | '}' | ']' | '#'))
        .collect()
}

#[cfg(test)]
mod tests {
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
        let checked =
            check(&format!("{MINIMAL}{added}"), Scope::Cluster).unwrap_or_else(|problems| panic!("{problems:?}"));
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
}
