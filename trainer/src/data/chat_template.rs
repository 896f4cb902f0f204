//! Chat templates as transformers renders them, on minijinja: the same bytes, without running anybody's code.
//!
//! Three places where minijinja differs from Jinja2 in what templates rely on are mended here: `tojson` writes Python's
//! layout and escapes nothing, `iterable` is false for none, and `{% generation %}` marks the assistant's spans. Templates
//! come with a model and are not trusted: fuel, output and recursion are bounded.

mod python_json;

use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde_json::Value as Json;

use self::python_json::python_json;
use crate::data::tokenizer::{self, read_json};

/// Instructions that one rendering may take.
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may produce.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Nested calls that one rendering may make.
const MAX_RECURSION: usize = 100;
/// Names of the templates, as transformers has them.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
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
    /// Names of the templates that mark what the assistant says.
    marking: Vec<&'static str>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ChatTemplate").field("marking", &self.marking).finish_non_exhaustive()
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

/// The templates of a model folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// For every conversation, or for those without tools.
    pub default: String,
    /// For conversations with tools.
    pub tool_use: Option<String>,
}

/// Reads the templates of a model folder: `chat_template.jinja` and `additional_chat_templates/tool_use.jinja`, else
/// `chat_template` of `tokenizer_config.json`, which is one template or a list of named ones.
pub fn read_sources(folder: &Path) -> Result<Sources, Error> {
    let read = |name: &str| match std::fs::read_to_string(folder.join(name)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(tokenizer::Error::Read { path: folder.join(name), source }),
    };
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let named = |name: &str| {
        let entry = config["chat_template"].as_array()?.iter().find(|entry| entry["name"] == name)?;
        entry["template"].as_str().map(str::to_owned)
    };
    let tool_use = read("additional_chat_templates/tool_use.jinja")?;
    if let Some(default) = read("chat_template.jinja")? {
        return Ok(Sources { default, tool_use });
    }
    let single = config["chat_template"].as_str().map(str::to_owned);
    let default = single.or_else(|| named(DEFAULT)).ok_or_else(|| Error::Missing { folder: folder.into() })?;
    Ok(Sources { default, tool_use: tool_use.or_else(|| named(TOOL_USE)) })
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
        let mut template = Self { environment, special_tokens: special_tokens.to_vec(), marking: Vec::new() };
        template.add(DEFAULT, source)?;
        Ok(template)
    }

    /// With a template of its own for conversations with tools.
    pub fn with_tool_use(mut self, source: &str) -> Result<Self, Error> {
        self.add(TOOL_USE, source)?;
        Ok(self)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), Error> {
        // Jinja2 reads every line ending as a newline.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let (source, marks_generation) = rewrite_generation(&source);
        self.environment.add_template_owned(name, source).map_err(|error| Error::Syntax(describe(&error)))?;
        if marks_generation {
            self.marking.push(name);
        }
        Ok(())
    }

    /// The template for a conversation; it is chosen as transformers does.
    fn choose(&self, tools: Option<&Json>) -> &'static str {
        if tools.is_some() && self.environment.get_template(TOOL_USE).is_ok() { TOOL_USE } else { DEFAULT }
    }

    /// Whether the template for a conversation marks what the assistant says.
    pub fn marks_generation(&self, tools: Option<&Json>) -> bool {
        self.marking.contains(&self.choose(tools))
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
        let template =
            self.environment.get_template(self.choose(tools)).map_err(|error| Error::Syntax(describe(&error)))?;
        let mut output = Bounded(Vec::new());
        match template.render_captured_to(Serde(&context), &mut output) {
            Ok(_) => Ok(take_spans(&String::from_utf8_lossy(&output.0))),
            Err(error) if error.kind() == ErrorKind::WriteFailure => {
                Err(Error::Render(format!("its output is longer than {MAX_OUTPUT_BYTES} bytes")))
            }
            Err(error) => Err(Error::Render(describe(&error))),
        }
    }
}

/// Takes as much as a rendering may produce.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
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
        // The opening's own percent sign does not close it: `{%}` is an unclosed tag.
        let Some(length) = rest[start + 2..].find("%}") else { break };
        let end = start + 2 + length + 2;
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> Result<ChatTemplate, Error> {
        ChatTemplate::new(source, &[], jiff::civil::date(2026, 1, 2).at(3, 4, 5, 0))
    }

    fn render(source: &str) -> Result<String, String> {
        let message = json!({"role": "user", "content": "hi"});
        let rendered = template(source).and_then(|template| template.render(&[message], None, false));
        rendered.map(|rendered| rendered.text).map_err(|error| error.to_string())
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        for source in
            ["{%}", "{% }", "{%-%}", "{%", "x{%}%}", "{%+}{% generation %}", "{{", "{#", "{% endgeneration %}"]
        {
            assert!(render(source).is_err(), "{source}");
        }
        let error = render("{{ messages | tojson(indent=999999999999) }}").expect_err("too wide");
        assert!(error.contains("at most 64"), "{error}");
        let long = "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}";
        let error = render(long).expect_err("too long");
        assert!(error.contains("longer than 16777216 bytes"), "{error}");
    }

    #[test]
    fn conversations_with_tools_get_the_template_for_tools() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("writable");
        let named = json!({"chat_template": [
            {"name": "tool_use", "template": "{% generation %}tools{% endgeneration %}"},
            {"name": "default", "template": "plain"}
        ]});
        write("tokenizer_config.json", &named.to_string());
        let load = || {
            let sources = read_sources(folder.path()).expect("templates");
            template(&sources.default)
                .and_then(|template| template.with_tool_use(&sources.tool_use.expect("named")))
                .expect("valid")
        };
        let text =
            |template: &ChatTemplate, tools: Option<&Json>| template.render(&[], tools, false).expect("renders").text;
        let tools = json!([{"type": "function"}]);
        let loaded = load();
        assert_eq!((text(&loaded, None), text(&loaded, Some(&tools))), ("plain".into(), "tools".into()));
        assert_eq!((loaded.marks_generation(None), loaded.marks_generation(Some(&tools))), (false, true));
        write("chat_template.jinja", "from a file");
        std::fs::create_dir(folder.path().join("additional_chat_templates")).expect("writable");
        write("additional_chat_templates/tool_use.jinja", "tools from a file");
        let loaded = load();
        assert_eq!(text(&loaded, None), "from a file");
        assert_eq!(text(&loaded, Some(&tools)), "tools from a file");
    }
}
