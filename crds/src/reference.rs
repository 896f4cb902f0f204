//! `docs/reference.md`: every field of the resource, written from the CRD.

use kube::CustomResourceExt;
use serde_json::Value;

/// The text of the reference.
fn reference() -> String {
    let crd = serde_json::to_value(crate::FineTuneJob::crd()).expect("the CRD is JSON");
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut text = String::from(
        "# Reference: FineTuneJob\n\n\
         `finetune.dev/v1alpha1`, short name `ftj`. Written from the CRD by\n\
         `UPDATE=1 cargo test --release -p finetune-crds reference_is_current`; `kubectl explain finetunejob.spec` says the same.\n\
         Decimals are quoted strings. A field that is not required is chosen for you, and what was chosen is in `status.resolved`.\n",
    );
    for part in ["spec", "status"] {
        text += &format!("\n## {part}\n\n| field | type | meaning |\n|---|---|---|\n");
        rows(&schema["properties"][part], part, &mut text);
        let rules = rules(&schema["properties"][part], part);
        if !rules.is_empty() {
            text += &format!("\n### Rules of {part}\n\n{}", rules.concat());
        }
    }
    text + VOLUME
}

/// What is not in the resource: it would make a status long.
const VOLUME: &str = "\n## On the volume\n\n| file | meaning |\n|---|---|\n\
    | `report.json` | The last word of the run. What is in no status: `validation.generation`, for `tuned`, `zeroShot` (the base \
    model) and `fewShot` (the base model with examples in the prompt) the new `tokens` of all answers, end tokens included, and the \
    `seconds` that they took, prompts included. |\n\
    | `answers.jsonl` | A line for each validation row that was answered, at most 256: its `line` in the file that it is from, the right answer (`reference`), and of \
    `tuned`, `zeroShot` and `fewShot` the `text`, whether the model `ended` it itself, and whether it is `right`. |\n";

/// One row for each field below `schema`.
fn rows(schema: &Value, path: &str, text: &mut String) {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let mark = if required.contains(&name.as_str()) { " **required**" } else { "" };
        let meaning =
            field["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
        let meaning = meaning.replace('|', "\\|");
        *text += &format!("| `{path}` | {}{mark} | {meaning} |\n", kind(field));
        rows(field, &path, text);
        if field["items"]["properties"].is_object() {
            rows(&field["items"], &format!("{path}[]"), text);
        }
    }
}

/// The type of a field and its bounds.
fn kind(field: &Value) -> String {
    let mut kind = match field["type"].as_str() {
        _ if field["x-kubernetes-int-or-string"] == true => "quantity".to_owned(),
        Some("array") => format!("list of {}", kind(&field["items"])),
        Some("object") if field["additionalProperties"].is_object() => {
            format!("map to {}", kind(&field["additionalProperties"]))
        }
        Some(name) => field["format"].as_str().filter(|format| *format == "date-time").unwrap_or(name).to_owned(),
        None => "any".to_owned(),
    };
    if let Some(words) = field["enum"].as_array() {
        let words: Vec<String> = words.iter().filter_map(Value::as_str).map(|word| format!("`{word}`")).collect();
        kind = words.join(" ");
    }
    if !field["default"].is_null() {
        kind += &format!(", default `{}`", field["default"]);
    }
    let bound = |name: &str| field[name].as_f64().map(|bound| bound.to_string());
    match (bound("minimum"), bound("maximum")) {
        (Some(least), Some(most)) => kind += &format!(", {least} to {most}"),
        (Some(least), None) => kind += &format!(", at least {least}"),
        (None, Some(most)) => kind += &format!(", at most {most}"),
        (None, None) => {}
    }
    kind
}

/// What the API server checks beyond types: one line for each rule at or below `schema`.
fn rules(schema: &Value, path: &str) -> Vec<String> {
    let own = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    let mut lines: Vec<String> =
        own.filter_map(|rule| rule["message"].as_str()).map(|message| format!("* `{path}`: {message}\n")).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        lines.extend(rules(field, &format!("{path}.{name}")));
        lines.extend(rules(&field["items"], &format!("{path}.{name}[]")));
    }
    lines
}

#[test]
fn reference_is_current() {
    let path = "../docs/reference.md";
    let generated = reference();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &generated).expect("docs is writable");
    }
    assert!(
        std::fs::read_to_string(path).unwrap_or_default() == generated,
        "docs/reference.md is not what the types say; run `UPDATE=1 cargo test --release -p finetune-crds reference_is_current`"
    );
}
