//! Chat templates as transformers renders them, on minijinja: the same bytes, without running anybody's code.
//!
//! Three places where minijinja differs from Jinja2 in what templates rely on are mended here: `tojson` writes Python's
//! layout and escapes nothing, `iterable` is false for none, and `{% generation %}` marks the assistant's spans. Templates
//! come with a model and are not trusted: fuel, output and recursion are bounded.

use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde_json::Value as Json;
use serde_json::ser::Formatter;

use crate::tokenizer::{self, read_json};

/// Instructions that one rendering may take.
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may produce.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Nested calls that one rendering may make.
const MAX_RECURSION: usize = 100;
/// Private code points that stand for the beginning and the end of a generated span while rendering.
const SPAN_START: char = '\u{E000}';
const SPAN_END: char = '\u{E001}';

/// A template could not be loaded or rendered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model has no template.
    #[error("{}: no chat template here (chat_template.jinja, or chat_template in tokenizer_config.json); use prompt and completion rows, or an instruction-tuned model", folder.display())]
    Missing {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A file beside the template cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The template is not valid.
    #[error("the chat template is not valid: {0}")]
    Syntax(String),
    /// The template refused the conversation, or went beyond its bounds.
    #[error("the chat template refuses this conversation: {0}")]
    Render(String),
    /// The conversation holds a code point that is used for marking.
    #[error("the text holds the private code point U+{0:04X}, which marks answers here; remove it")]
    PrivateCodePoint(u32),
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    /// Whether the template marks what the assistant says.
    pub marks_generation: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ChatTemplate").field("marks_generation", &self.marks_generation).finish_non_exhaustive()
    }
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges that the template marks as generated.
    pub generated: Vec<Range<usize>>,
}

/// Reads the template of a model folder: `chat_template.jinja`, else `tokenizer_config.json`, where a list of named
/// templates has `default`.
pub fn read_source(folder: &Path) -> Result<String, Error> {
    if let Ok(text) = std::fs::read_to_string(folder.join("chat_template.jinja")) {
        return Ok(text);
    }
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let named = |name: &str| {
        let entry = config["chat_template"].as_array()?.iter().find(|entry| entry["name"] == name)?;
        entry["template"].as_str()
    };
    config["chat_template"]
        .as_str()
        .or_else(|| named("default"))
        .map(str::to_owned)
        .ok_or_else(|| Error::Missing { folder: folder.into() })
}

impl ChatTemplate {
    /// `date` is what `strftime_now` formats: fixed per run, or a resume on another day would tokenise differently.
    pub fn new(source: &str, special_tokens: &[(String, String)], date: jiff::civil::DateTime) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| Error::Syntax(error.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.add_filter("tojson", python_json);
        environment.add_test("iterable", |value: &Value| {
            matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::String)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| -> Result<String, minijinja::Error> {
            jiff::fmt::strtime::format(format, date)
                .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        let syntax_error = |error: minijinja::Error| Error::Syntax(describe(&error));
        environment.add_template_owned("__gs", SPAN_START.to_string()).map_err(syntax_error)?;
        environment.add_template_owned("__ge", SPAN_END.to_string()).map_err(syntax_error)?;
        // Jinja2 reads every line ending as a newline.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let (source, marks_generation) = rewrite_generation(&source);
        environment.add_template_owned("chat", source).map_err(syntax_error)?;
        Ok(Self { environment, special_tokens: special_tokens.to_vec(), marks_generation })
    }

    /// Renders a conversation. Messages that carry `reasoning` or `thinking` get the names that templates look for.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, Error> {
        let messages: Vec<Json> = messages.iter().map(with_reasoning).collect();
        let mut context = serde_json::Map::new();
        for (name, text) in &self.special_tokens {
            context.insert(name.clone(), Json::String(text.clone()));
        }
        context.insert("messages".into(), Json::Array(messages));
        context.insert("tools".into(), tools.cloned().unwrap_or(Json::Null));
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), Json::Bool(add_generation_prompt));
        let context = Json::Object(context);
        refuse_private_code_points(&context)?;
        let template = self.environment.get_template("chat").map_err(|error| Error::Syntax(describe(&error)))?;
        let text = template.render(Serde(&context)).map_err(|error| Error::Render(describe(&error)))?;
        if text.len() > MAX_OUTPUT_BYTES {
            return Err(Error::Render(format!(
                "{} bytes of output, at most {MAX_OUTPUT_BYTES} are accepted",
                text.len()
            )));
        }
        Ok(take_spans(&text))
    }
}

/// The message of an error without the template's source.
fn describe(error: &minijinja::Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)
}

/// Rewrites generation tags to what minijinja knows, keeping each tag's whitespace control.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length + 2;
        let inside = &rest[start + 2..end - 2];
        let left = inside.chars().next().filter(|c| matches!(c, '-' | '+')).map(String::from).unwrap_or_default();
        let right = inside.chars().last().filter(|c| matches!(c, '-' | '+')).map(String::from).unwrap_or_default();
        let name = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        output.push_str(&rest[..start]);
        match name {
            "generation" => {
                found = true;
                output.push_str(&format!("{{%{left} include '__gs' %}}{{% with {right}%}}"));
            }
            "endgeneration" => {
                output.push_str(&format!("{{%{left} endwith %}}{{% include '__ge' {right}%}}"));
            }
            _ => output.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    output.push_str(rest);
    (output, found)
}

/// Strips the marks from a rendered text and returns what lay between them.
fn take_spans(marked: &str) -> Rendered {
    let mut rendered = Rendered::default();
    let mut start = None;
    for character in marked.chars() {
        match character {
            SPAN_START => start = Some(rendered.text.len()),
            SPAN_END => rendered.generated.extend(start.take().map(|start| start..rendered.text.len())),
            other => rendered.text.push(other),
        }
    }
    rendered
}

fn refuse_private_code_points(value: &Json) -> Result<(), Error> {
    match value {
        Json::String(text) => match text.chars().find(|&c| c == SPAN_START || c == SPAN_END) {
            Some(found) => Err(Error::PrivateCodePoint(found as u32)),
            None => Ok(()),
        },
        Json::Array(items) => items.iter().try_for_each(refuse_private_code_points),
        Json::Object(entries) => entries.values().try_for_each(refuse_private_code_points),
        _ => Ok(()),
    }
}

/// The first of `reasoning_content`, `thinking` and `reasoning` is copied to `reasoning_content`, and to `thinking`.
fn with_reasoning(message: &Json) -> Json {
    let mut message = message.clone();
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| message.get(name).filter(|value| !value.is_null()).cloned());
    if let (Some(reasoning), Json::Object(entries)) = (reasoning, &mut message) {
        entries.insert("reasoning_content".into(), reasoning.clone());
        if entries.get("thinking").is_none_or(Json::is_null) {
            entries.insert("thinking".into(), reasoning);
        }
    }
    message
}

/// `json.dumps` of Python: `", "` and `": "`, nothing escaped for HTML, non-ASCII kept; `indent`, `sort_keys` and
/// `separators` honoured.
#[expect(clippy::needless_pass_by_value, reason = "minijinja's filters take their arguments by value")]
fn python_json(value: &Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent").ok().flatten();
    let sort_keys: bool = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let invalid = |error: serde_json::Error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string());
    let mut json = serde_json::to_value(value).map_err(invalid)?;
    if sort_keys {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let mut bytes = Vec::new();
    let formatter = PythonFormatter { item, key, indent, depth: 0, has_value: false };
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    serde::Serialize::serialize(&json, &mut serializer).map_err(invalid)?;
    Ok(String::from_utf8(bytes).expect("serde_json writes UTF-8"))
}

struct PythonFormatter {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl PythonFormatter {
    fn begin<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, open: u8) -> std::io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(&[open])
    }

    fn end<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, close: u8) -> std::io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(writer)?;
        }
        writer.write_all(&[close])
    }

    fn separate<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{}", " ".repeat(width * self.depth)),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonFormatter {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, b'[')
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, b']')
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(writer, first)
    }

    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, b'{')
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, b'}')
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}
