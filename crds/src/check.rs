//! From YAML text to a checked [`FineTuneJob`], by the rules of the CRD itself: text → value → JSON schema → unknown fields
//! → defaults and CEL → type. The API server and a local run come to the same verdict, with two differences that
//! [`Scope`] names.

mod name;
#[cfg(test)]
mod tests;

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
    /// The job, defaults applied. One with `metadata.generateName` has a name too: the prefix, and five characters that follow
    /// from the document.
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
    let name = name::name_of(&document.value);
    problems.extend(name.as_ref().err().map(|(pointer, message)| problem(&document, pointer, message)));
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
    let mut job: FineTuneJob = serde_json::from_value(document.value.clone())
        .map_err(|error| vec![problem(&document, "", format!("not a FineTuneJob: {error}"))])?;
    job.metadata.name = name.ok();
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
    problems
}

/// The CRD's own schema as JSON Schema. It is read from the committed CRD: to generate it takes four times as long.
pub fn schema(scope: Scope) -> Value {
    let crd: Value = serde_saphyr::from_str(include_str!("../finetunejobs.yaml")).expect("the committed CRD is YAML");
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
