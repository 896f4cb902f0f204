//! Rows as users write them: JSON lines of messages, prompt and completion, or text. Every refusal names file, line and
//! column, what was found and what was expected.

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use crds::run::DataFormat;
use serde_json::{Map, Value};

/// A dataset could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: cannot be read ({source})", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file holds no row.
    #[error("{}: no rows; expected one JSON object per line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A row is not acceptable.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// What was found and what was expected.
        message: String,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => ExitCode::InputNotFound,
            Self::Read { .. } | Self::Empty { .. } | Self::Row { .. } => ExitCode::BadData,
        }
    }
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A conversation, in the shape that chat templates take.
    Messages {
        /// Objects with `role` and `content`.
        messages: Vec<Value>,
        /// Tools, if the row has some.
        tools: Option<Value>,
        /// Whether the loss is taken on each message.
        trained: Vec<bool>,
    },
    /// A text that is continued by another.
    PromptCompletion {
        /// Not trained.
        prompt: String,
        /// Trained.
        completion: String,
    },
    /// A text that is trained whole.
    Text(String),
}

/// A row and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Counted from 1.
    pub line: usize,
    /// What it says.
    pub content: Content,
}

/// Reads a file of JSON lines. `format` says what the rows are, whatever other keys they have; with `Auto` their keys
/// decide, and every row must say the same.
pub fn read_rows(path: &Path, format: DataFormat) -> Result<Vec<Row>, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let refuse = |line, column, message| Error::Row { path: path.into(), line, column, message };
    if bytes.starts_with(b"\xef\xbb\xbf") {
        let message = "a byte order mark begins the file; expected plain UTF-8: save it without BOM".into();
        return Err(refuse(1, 1, message));
    }
    let mut rows = Vec::new();
    let mut shape = None;
    for (index, bytes) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let line = index + 1;
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let column = error.valid_up_to() + 1;
            refuse(line, column, "not valid UTF-8 at this byte; expected UTF-8 text: convert the file".into())
        })?;
        if text.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(text).map_err(|error| {
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            refuse(line, error.column(), format!("not valid JSON: {reason}; expected one JSON object per line"))
        })?;
        let refuse = |message| refuse(line, 1, message);
        let Value::Object(object) = value else {
            return Err(refuse(format!("found {}, expected a JSON object", kind_of(&value))));
        };
        let found = if format == DataFormat::Auto { detect(&object) } else { asked_for(&object, format) };
        let found = found.map_err(refuse)?;
        let &mut (expected, first) = shape.get_or_insert((found, line));
        if expected != found {
            return Err(refuse(format!(
                "the row has format {found:?}, line {first} has format {expected:?}; one file holds one format"
            )));
        }
        let content = content(object, found).map_err(refuse)?;
        rows.push(Row { line, content });
    }
    if rows.is_empty() { Err(Error::Empty { path: path.into() }) } else { Ok(rows) }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// `format`, if the row has its keys.
fn asked_for(row: &Map<String, Value>, format: DataFormat) -> Result<DataFormat, String> {
    let keys: &[&str] = match format {
        DataFormat::Messages => &["messages"],
        DataFormat::PromptCompletion => &["prompt", "completion"],
        DataFormat::Auto | DataFormat::Text => &["text"],
        DataFormat::ShareGPT | DataFormat::Alpaca => return Err(unsupported(format)),
    };
    let has = row.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    match keys.iter().find(|key| !row.contains_key(**key)) {
        Some(missing) => Err(format!(
            "the row has no `{missing}` (its keys: {has}); expected one, as dataset format {format:?} was asked for: mend the \
             row or the format"
        )),
        None => Ok(format),
    }
}

fn unsupported(format: DataFormat) -> String {
    format!("not supported yet: dataset format {format:?}; convert the rows to messages")
}

/// The format that the row's keys say; a row that fits two or none is refused.
fn detect(row: &Map<String, Value>) -> Result<DataFormat, String> {
    let has = |key: &str| row.contains_key(key);
    let candidates = [
        (DataFormat::Messages, has("messages")),
        (DataFormat::PromptCompletion, has("prompt") && has("completion")),
        (DataFormat::Text, has("text")),
        (DataFormat::ShareGPT, has("conversations")),
        (DataFormat::Alpaca, has("instruction") && has("output")),
    ];
    let fitting: Vec<DataFormat> = candidates.iter().filter(|(_, fits)| *fits).map(|(format, _)| *format).collect();
    match fitting[..] {
        [format @ (DataFormat::ShareGPT | DataFormat::Alpaca)] => Err(unsupported(format)),
        [format] => Ok(format),
        [] => Err(format!(
            "the keys {} fit no format; expected `messages`, `prompt` and `completion`, or `text`",
            row.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
        )),
        _ => Err(format!(
            "the row fits two formats at once ({fitting:?}); keep the keys of one, or say which in dataset format"
        )),
    }
}

fn content(mut row: Map<String, Value>, format: DataFormat) -> Result<Content, String> {
    let tools = row.remove("tools").filter(|tools| !tools.is_null());
    let is_answered = |messages: &[Value]| messages.iter().any(|message| message["role"] == "assistant");
    match format {
        DataFormat::Messages => {
            let messages = row.remove("messages").unwrap_or_default();
            let (messages, trained) = conversation("messages", messages)?;
            if !is_answered(&messages) {
                return Err("no message has role assistant; expected at least one answer to learn".into());
            }
            Ok(Content::Messages { messages, tools, trained })
        }
        DataFormat::PromptCompletion => {
            let (prompt, completion) =
                (row.remove("prompt").unwrap_or_default(), row.remove("completion").unwrap_or_default());
            match (prompt, completion) {
                (Value::String(prompt), Value::String(completion)) => {
                    if completion.trim().is_empty() {
                        return Err("`completion` is empty; expected the text to learn".into());
                    }
                    Ok(Content::PromptCompletion { prompt, completion })
                }
                (Value::Array(prompt), Value::Array(completion)) => {
                    let (mut messages, _) = conversation("prompt", Value::Array(prompt))?;
                    let mut trained = vec![false; messages.len()];
                    let (answers, weights) = conversation("completion", Value::Array(completion))?;
                    if !is_answered(&answers) {
                        let message =
                            "no message of `completion` has role assistant; expected at least one answer to learn";
                        return Err(message.into());
                    }
                    messages.extend(answers);
                    trained.extend(weights);
                    Ok(Content::Messages { messages, tools, trained })
                }
                (prompt, completion) => Err(format!(
                    "`prompt` is {} and `completion` is {}; expected two strings or two lists of messages",
                    kind_of(&prompt),
                    kind_of(&completion)
                )),
            }
        }
        _ => match row.remove("text") {
            Some(Value::String(text)) if !text.trim().is_empty() => Ok(Content::Text(text)),
            Some(Value::String(_)) => Err("`text` is empty; expected the text to learn".into()),
            other => Err(format!("`text` is {}; expected a string", kind_of(&other.unwrap_or_default()))),
        },
    }
}

/// Messages under `key` in the shape that templates take, and which of them are trained.
fn conversation(key: &str, messages: Value) -> Result<(Vec<Value>, Vec<bool>), String> {
    let Value::Array(messages) = messages else {
        return Err(format!("`{key}` is {}; expected a list", kind_of(&messages)));
    };
    if messages.is_empty() {
        return Err(format!("`{key}` is empty; expected at least one message"));
    }
    let mut trained = Vec::with_capacity(messages.len());
    let mut shaped = Vec::with_capacity(messages.len());
    for (index, message) in messages.into_iter().enumerate() {
        let (message, is_trained) = shape_message(message).map_err(|text| format!("{key}[{index}]: {text}"))?;
        shaped.push(message);
        trained.push(is_trained);
    }
    Ok((shaped, trained))
}

fn shape_message(message: Value) -> Result<(Value, bool), String> {
    let Value::Object(mut message) = message else {
        return Err(format!("found {}, expected an object with role and content", kind_of(&message)));
    };
    let role = message.get("role").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !["system", "developer", "user", "assistant", "tool"].contains(&role.as_str()) {
        let found = message.get("role").map_or_else(|| "no role".to_owned(), |role| format!("role {role}"));
        return Err(format!("{found}; expected system, developer, user, assistant or tool"));
    }
    // Files that went through a table have every key, with null for what the row does not say.
    let weight = message.shift_remove("weight").filter(|weight| !weight.is_null());
    let is_trained = match (role.as_str(), weight) {
        ("assistant", None) => true,
        ("assistant", Some(weight)) if weight == 1 => true,
        ("assistant", Some(weight)) if weight == 0 => false,
        ("assistant", Some(weight)) => return Err(format!("weight {weight}; expected 0 or 1")),
        (_, None) => false,
        (_, Some(_)) => return Err(format!("weight on a {role} message; only assistant messages have one")),
    };
    let calls_tools = match message.get_mut("tool_calls") {
        Some(Value::Array(calls)) if !calls.is_empty() => {
            for (index, call) in calls.iter_mut().enumerate() {
                parse_arguments(call).map_err(|text| format!("tool_calls[{index}]: {text}"))?;
            }
            true
        }
        None => false,
        Some(Value::Null | Value::Array(_)) => {
            message.shift_remove("tool_calls");
            false
        }
        Some(other) => return Err(format!("tool_calls is {}; expected a list", kind_of(other))),
    };
    match message.remove("content") {
        Some(Value::Array(parts)) => {
            message.insert("content".into(), Value::String(join_parts(parts)?));
        }
        Some(Value::String(content)) => {
            message.insert("content".into(), Value::String(content));
        }
        None | Some(Value::Null) if calls_tools => {
            message.insert("content".into(), Value::String(String::new()));
        }
        other => return Err(format!("content is {}; expected a string", kind_of(&other.unwrap_or_default()))),
    }
    let empty = message["content"].as_str().is_none_or(|content| content.trim().is_empty());
    if role == "assistant" && is_trained && empty && !calls_tools {
        return Err("the answer is empty; expected text to learn, or weight: 0".into());
    }
    Ok((Value::Object(message), is_trained))
}

/// Joins text parts; images and the like are refused.
fn join_parts(parts: Vec<Value>) -> Result<String, String> {
    parts
        .into_iter()
        .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => Ok(text.to_owned()),
            _ => Err(format!("content part of type {}; expected text", part["type"])),
        })
        .collect()
}

/// OpenAI writes a call's arguments as a JSON string, templates want an object. A call without `function` has name and
/// arguments itself.
fn parse_arguments(call: &mut Value) -> Result<(), String> {
    let kind = kind_of(call);
    let Value::Object(call) = call else {
        return Err(format!("found {kind}, expected an object with function"));
    };
    let function = match call.get_mut("function") {
        None => call,
        Some(Value::Object(function)) => function,
        Some(other) => {
            return Err(format!("function is {}; expected an object with name and arguments", kind_of(other)));
        }
    };
    if !function.get("name").is_some_and(Value::is_string) {
        return Err("the call has no name; expected the function's name as a string".into());
    }
    let Some(arguments) = function.get_mut("arguments") else { return Ok(()) };
    if let Value::String(text) = arguments {
        *arguments = serde_json::from_str(text)
            .map_err(|error| format!("arguments are not valid JSON ({error}): {text:?}; expected a JSON object"))?;
    }
    match arguments {
        Value::Object(_) | Value::Null => Ok(()),
        other => Err(format!("arguments are {}; expected a JSON object", kind_of(other))),
    }
}
