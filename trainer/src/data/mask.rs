//! From a row to tokens and the mask of trained ones. The mask is taken by position, never by token id, and a row whose
//! template contradicts itself is refused: a wrong mask trains without an error and spoils the model.

use std::ops::Range;

use serde_json::Value;

use super::chat_template::{self, ChatTemplate};
use super::example::Example;
use super::format::Content;
use crate::tokenizer::{self, Encoded, Tokenizer};

/// A row could not be tokenised.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The template failed.
    #[error(transparent)]
    Template(#[from] chat_template::Error),
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// Rows are conversations and the model has no template.
    #[error(
        "the rows are conversations and the model has no chat template; use prompt and completion rows, or an instruction-tuned model"
    )]
    NoTemplate,
    /// The answer cannot be found in the rendering.
    #[error(
        "messages[{message}]: {reason}; the chat template cannot be used to train this answer: give the model a template whose \
         {{% generation %}} tags mark what is trained, or set weight: 0 on the answer"
    )]
    Contradiction {
        /// Index of the assistant's message.
        message: usize,
        /// What was found.
        reason: String,
    },
    /// The template's tags do not say which answer they mark.
    #[error(
        "the chat template marks {tagged} part(s) with {{% generation %}} where the row has {answers} assistant message(s); \
         expected one for each: mend the template or remove its tags"
    )]
    Tags {
        /// Spans that are marked and do not touch.
        tagged: usize,
        /// Messages of the assistant.
        answers: usize,
    },
    /// The row begins with two beginning-of-sequence tokens.
    #[error(
        "the row begins with two {0} tokens; expected one: remove it from the row, or from the chat template if that writes both"
    )]
    DoubleBos(String),
}

/// Turns rows into tokens.
#[derive(Debug)]
pub struct Tokeniser<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's template, if it has one.
    pub template: Option<&'a ChatTemplate>,
}

impl Tokeniser<'_> {
    /// Tokens of a row and which of them are trained.
    pub fn example(&self, content: &Content) -> Result<Example, Error> {
        match content {
            Content::Messages { messages, tools, trained } => self.conversation(messages, tools.as_ref(), trained),
            Content::PromptCompletion { prompt, completion } => {
                // Tokenised as one text: the boundary may lie inside a token.
                let text = format!("{prompt}{completion}");
                self.plain(&text, prompt.len()..text.len())
            }
            Content::Text(text) => self.plain(text, 0..text.len()),
        }
    }

    fn plain(&self, text: &str, trained: Range<usize>) -> Result<Example, Error> {
        let mut example = Self::mark(self.tokenizer.encode_plain(text)?, &[trained]);
        self.check_bos(&example)?;
        if example.tokens.last().is_none_or(|last| !self.tokenizer.end_tokens().contains(last)) {
            example.tokens.push(self.tokenizer.eos());
            example.trained.push(true);
        }
        Ok(example)
    }

    /// A token is trained if its bytes meet a span.
    fn mark(encoded: Encoded, spans: &[Range<usize>]) -> Example {
        let meets = |&(start, end): &(usize, usize)| spans.iter().any(|span| start < span.end && span.start < end);
        let trained = encoded.offsets.iter().map(meets).collect();
        Example { tokens: encoded.ids, trained }
    }

    fn check_bos(&self, example: &Example) -> Result<(), Error> {
        match (self.tokenizer.bos(), example.tokens.as_slice()) {
            (Some(bos), [first, second, ..]) if bos == *first && bos == *second => {
                Err(Error::DoubleBos(self.tokenizer.special_tokens()["bos_token"].clone()))
            }
            _ => Ok(()),
        }
    }

    fn template(&self) -> Result<&ChatTemplate, Error> {
        self.template.ok_or(Error::NoTemplate)
    }

    fn conversation(&self, messages: &[Value], tools: Option<&Value>, trained: &[bool]) -> Result<Example, Error> {
        let template = self.template()?;
        let whole = template.render(messages, tools, false)?;
        let answers: Vec<usize> = (0..messages.len()).filter(|&index| messages[index]["role"] == "assistant").collect();
        let tags = template.marks_generation(tools).then(|| joined(&whole.generated));
        if let Some(tags) = tags.as_ref().filter(|tags| tags.len() != answers.len()) {
            return Err(Error::Tags { tagged: tags.len(), answers: answers.len() });
        }
        let mut spans = Vec::new();
        for (order, &index) in answers.iter().enumerate().filter(|&(_, &index)| trained[index]) {
            let contradiction = |reason: String| Error::Contradiction { message: index, reason };
            let answer = Answer { template, messages, tools, index, whole: &whole.text };
            let span = if let Some(tags) = &tags {
                let tag = self.up_to_stop_token(&whole.text, tags[order].clone()).map_err(contradiction)?;
                self.compare(&tag, &answer).map_err(contradiction)?;
                tag
            } else {
                let span = answer.incremental_span()?.map_err(contradiction)?;
                self.up_to_stop_token(&whole.text, span).map_err(contradiction)?
            };
            if let Some(part) = missing_part(&messages[index], &whole.text[span.clone()]) {
                return Err(contradiction(format!(
                    "{part:?} of the answer is not in what the chat template makes of it"
                )));
            }
            spans.push(span);
        }
        let example = Self::mark(self.tokenizer.encode(&whole.text)?, &spans);
        self.check_bos(&example)?;
        Ok(example)
    }

    /// Cuts a span after its last end-of-turn token: what the template writes behind it belongs to the next turn.
    fn up_to_stop_token(&self, text: &str, span: Range<usize>) -> Result<Range<usize>, String> {
        let ids = self.tokenizer.end_tokens();
        let stops: Vec<String> = ids
            .iter()
            .filter_map(|&id| self.tokenizer.decode_with_special(&[id]).ok())
            // An id that the tokenizer does not have decodes to nothing, and nothing is found everywhere.
            .filter(|stop| !stop.is_empty())
            .collect();
        let inside = |stop: &String| text[span.clone()].rfind(stop.as_str()).map(|at| span.start + at + stop.len());
        // Generation tags may close right before the stop token: it is trained all the same.
        let behind = |stop: &String| {
            let rest = &text[span.end..];
            let blank = rest.len() - rest.trim_start().len();
            rest[blank..].starts_with(stop.as_str()).then_some(span.end + blank + stop.len())
        };
        let end = stops.iter().filter_map(inside).max().or_else(|| stops.iter().filter_map(behind).max());
        end.map(|end| span.start..end).ok_or_else(|| {
            let expected = if stops.is_empty() { format!("one of the ids {ids:?}") } else { stops.join(", ") };
            format!("no end-of-turn token ({expected}) follows the answer, so it would never be learnt")
        })
    }

    /// Compares what the template marks with what it adds for the answer, where it can be rendered in parts. The mark may
    /// begin within the generation prompt, as in templates that open the reasoning there.
    fn compare(&self, tag: &Range<usize>, answer: &Answer) -> Result<(), String> {
        let text = answer.whole;
        let Ok(Ok(added)) = answer.incremental_span() else { return Ok(()) };
        let added = self.up_to_stop_token(text, added.clone()).unwrap_or(added);
        let (tag, added) = (without_blanks(text, tag), without_blanks(text, &added));
        let starts_alike = tag.start == added.start
            || (tag.start < added.start && answer.turn_start().is_some_and(|start| start <= tag.start));
        if starts_alike && tag.end == added.end {
            return Ok(());
        }
        Err(format!(
            "the template marks {} as the answer, and adds {} to its own prompt for it",
            quoted(&text[tag]),
            quoted(&text[added])
        ))
    }

    /// Tokens of the prompt that asks for message `index`.
    pub fn prompt(&self, messages: &[Value], tools: Option<&Value>) -> Result<Vec<u32>, Error> {
        let text = self.template()?.render(messages, tools, true)?.text;
        Ok(self.tokenizer.encode(&text)?.ids)
    }

    /// Tokens of a prompt that no template has written.
    pub fn plain_prompt(&self, prompt: &str) -> Result<Vec<u32>, Error> {
        Ok(self.tokenizer.encode_plain(prompt)?.ids)
    }
}

/// An assistant's message in its conversation.
struct Answer<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Value],
    tools: Option<&'a Value>,
    index: usize,
    whole: &'a str,
}

impl Answer<'_> {
    /// What the message adds to the rendering of everything before it, or why that cannot be said.
    fn incremental_span(&self) -> Result<Result<Range<usize>, String>, chat_template::Error> {
        let before = self.template.render(&self.messages[..self.index], self.tools, true)?.text;
        let with = self.template.render(&self.messages[..=self.index], self.tools, false)?.text;
        if !with.starts_with(&before) {
            return Ok(Err("the generation prompt is not how the rendered answer begins".into()));
        }
        if !self.whole.starts_with(&with) {
            return Ok(Err("the answer is rendered differently once further messages follow it".into()));
        }
        Ok(Ok(before.len()..with.len()))
    }

    /// Where the generation prompt begins.
    fn turn_start(&self) -> Option<usize> {
        let before = self.template.render(&self.messages[..self.index], self.tools, false).ok()?.text;
        self.whole.starts_with(&before).then_some(before.len())
    }
}

/// Joins marked spans that touch: templates may mark an answer and its end one by one.
fn joined(generated: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for span in generated {
        match joined.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            _ => joined.push(span.clone()),
        }
    }
    joined
}

/// What of an answer its rendering lacks. Templates strip white space and move the reasoning, so that the last line and the
/// names of called tools are looked for.
fn missing_part<'a>(message: &'a Value, rendered: &str) -> Option<&'a str> {
    let content = message["content"].as_str().unwrap_or_default();
    let said = content.rsplit("</think>").next().and_then(|said| said.trim().lines().next_back()).map(str::trim);
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let names = calls.filter_map(|call| call["function"]["name"].as_str().or_else(|| call["name"].as_str()));
    said.into_iter().chain(names).find(|part| !rendered.contains(part))
}

fn without_blanks(text: &str, span: &Range<usize>) -> Range<usize> {
    let inside = &text[span.clone()];
    let start = span.start + inside.len() - inside.trim_start().len();
    start..start + inside.trim().len()
}

/// A text for a message, without its middle if it is long.
fn quoted(text: &str) -> String {
    let count = text.chars().count();
    if count <= 60 {
        return format!("{text:?}");
    }
    let head: String = text.chars().take(30).collect();
    let tail: String = text.chars().skip(count - 30).collect();
    format!("{:?}", format!("{head}…{tail}"))
}

/// The example's text with its trained tokens between guillemets.
pub fn marked_sample(tokenizer: &Tokenizer, example: &Example) -> Result<String, tokenizer::Error> {
    let mut text = String::new();
    let mut start = 0;
    while start < example.tokens.len() {
        let trained = example.trained[start];
        let length = example.trained[start..].iter().take_while(|&&other| other == trained).count();
        let part = tokenizer.decode_with_special(&example.tokens[start..start + length])?;
        text.push_str(&if trained { format!("«{part}»") } else { part });
        start += length;
    }
    Ok(text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A tokenizer of words and ChatML marks, written to a folder as a model would bring it.
    pub(crate) fn tokenizer() -> (tempfile::TempDir, Tokenizer) {
        tokenizer_with(&json!({}))
    }

    /// The same with changes to tokenizer.json.
    pub(crate) fn tokenizer_with(changes: &Value) -> (tempfile::TempDir, Tokenizer) {
        let words = "user assistant system hi there yes no one two three 4 \u{00e9}t\u{00e9}";
        let mut vocabulary: serde_json::Map<String, Value> =
            [("<|im_start|>", 0), ("<|im_end|>", 1), ("[UNK]", 2), ("\n", 3)]
                .into_iter()
                .map(|(word, id)| (word.to_owned(), json!(id)))
                .collect();
        for (index, word) in words.split(' ').enumerate() {
            vocabulary.insert(word.to_owned(), json!(index + 4));
        }
        let special = |id: i32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        let mut file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<|im_start|>"), special(1, "<|im_end|>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\n| "}, "behavior": "Isolated", "invert": false},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
        });
        for (name, value) in changes.as_object().expect("changes by name") {
            file[name] = value.clone();
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).expect("writable");
        let config = json!({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"});
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).expect("writable");
        let tokenizer = Tokenizer::open(folder.path()).expect("valid");
        (folder, tokenizer)
    }

    pub(crate) const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    const TAGGED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\
                          {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n\
                          {% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    const FORGETFUL: &str = "{% for m in messages %}{% if loop.last or m.role == 'user' %}<|im_start|>{{ m.role }}\n\
                             {{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
                             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    pub(crate) fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, &[], jiff::civil::date(2026, 1, 2).at(3, 4, 5, 0)).expect("valid")
    }

    fn two_turns() -> Content {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        Content::Messages {
            messages: vec![
                turn("user", "hi there"),
                turn("assistant", "yes"),
                turn("user", "one"),
                turn("assistant", "été 4"),
            ],
            tools: None,
            trained: vec![false, false, false, true],
        }
    }

    #[test]
    fn the_stop_token_is_trained_and_untrained_answers_stay_visible() {
        let (_folder, tokenizer) = tokenizer();
        for source in [CHATML, TAGGED] {
            let template = template(source);
            let tokeniser = Tokeniser { tokenizer: &tokenizer, template: Some(&template) };
            let example = tokeniser.example(&two_turns()).expect("consistent");
            let sample = marked_sample(&tokenizer, &example).expect("decodes");
            let squeezed: String = sample.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(squeezed.contains("yes <|im_end|>"), "{squeezed}");
            assert_eq!(squeezed.matches('«').count(), 1, "{squeezed}");
            let marked = &squeezed[squeezed.find('«').expect("marked")..squeezed.find('»').expect("marked")];
            assert!(marked.contains("été") && marked.ends_with("<|im_end|>"), "{marked}");
        }
    }

    #[test]
    fn a_template_that_rewrites_earlier_answers_is_refused() {
        let (_folder, tokenizer) = tokenizer();
        let template = template(FORGETFUL);
        let tokeniser = Tokeniser { tokenizer: &tokenizer, template: Some(&template) };
        let Content::Messages { messages, .. } = two_turns() else { panic!("messages") };
        let content = Content::Messages { messages, tools: None, trained: vec![false, true, false, true] };
        let error = tokeniser.example(&content).expect_err("contradiction").to_string();
        assert!(
            error.starts_with("messages[1]: the answer is rendered differently once further messages follow"),
            "{error}"
        );
    }

    #[test]
    fn completions_and_texts_end_with_the_stop_token() {
        let (_folder, tokenizer) = tokenizer();
        let tokeniser = Tokeniser { tokenizer: &tokenizer, template: None };
        let completion = Content::PromptCompletion { prompt: "hi ".into(), completion: "yes".into() };
        let example = tokeniser.example(&completion).expect("tokens");
        assert_eq!(example.trained, [false, false, true, true]);
        assert_eq!(example.tokens.last(), Some(&1));
        let example = tokeniser.example(&Content::Text("yes<|im_end|>".into())).expect("tokens");
        assert_eq!((example.tokens.len(), example.num_trained()), (2, 1));
    }

    /// What a conversation gives with a template: the sample, or the error.
    fn outcome(tokenizer: &Tokenizer, source: &str, messages: &Value) -> Result<String, String> {
        let template = template(source);
        let tokeniser = Tokeniser { tokenizer, template: Some(&template) };
        let messages = messages.as_array().expect("a list").clone();
        let trained = messages.iter().map(|message| message["role"] == "assistant").collect();
        let example = tokeniser.example(&Content::Messages { messages, tools: None, trained });
        example.and_then(|example| Ok(marked_sample(tokenizer, &example)?)).map_err(|error| error.to_string())
    }

    const ONE_TURN: &str = r#"[{"role":"user","content":"hi"},{"role":"assistant","content":"yes no"}]"#;

    fn one_turn() -> Value {
        serde_json::from_str(ONE_TURN).expect("JSON")
    }

    #[test]
    fn tags_that_mark_something_else_than_the_answer_are_refused() {
        let (_folder, tokenizer) = tokenizer();
        let part = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\
                    yes {% generation %}no<|im_end|>{% endgeneration %}\n\
                    {% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let error = outcome(&tokenizer, part, &one_turn()).expect_err("half an answer");
        let expected =
            "messages[1]: the template marks \"no<|im_end|>\" as the answer, and adds \"yes no<|im_end|>\" to";
        assert!(error.starts_with(expected), "{error}");
        // The role belongs to the generation prompt, the question does not.
        let header = part.replace("yes {% generation %}no", "{% generation %}yes no").replace(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}",
            "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{% endif %}{% if m.role == 'assistant' %}\
             {% generation %}<|im_start|>assistant\n",
        );
        let sample = outcome(&tokenizer, &header, &one_turn()).expect("the header is trained too");
        assert!(sample.contains("«<|im_start|> assistant"), "{sample}");
        let (turns, prompt) = CHATML.split_at(CHATML.find("{% if add").expect("a generation prompt"));
        let question = format!(
            "{{% if messages | length == 2 %}}{{% generation %}}{turns}{{% endgeneration %}}{{% else %}}{turns}{{% endif %}}{prompt}"
        );
        let error = outcome(&tokenizer, &question, &one_turn()).expect_err("the question is no answer");
        assert!(error.starts_with("messages[1]: the template marks \"<|im_start|>user"), "{error}");
    }

    #[test]
    fn tags_that_do_not_match_the_answers_are_refused() {
        let (_folder, tokenizer) = tokenizer();
        let none = TAGGED.replace("m.role == 'assistant'", "m.role == 'nobody'");
        assert_eq!(
            outcome(&tokenizer, &none, &one_turn()).expect_err("no answer is marked"),
            "the chat template marks 0 part(s) with {% generation %} where the row has 1 assistant message(s); expected one \
             for each: mend the template or remove its tags"
        );
        let pieces = TAGGED.replace(
            "{{ m.content }}{% endgeneration %}<|im_end|>",
            "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}",
        );
        let sample = outcome(&tokenizer, &pieces, &one_turn()).expect("pieces that touch are one answer");
        assert_eq!(sample.matches('«').count(), 1, "{sample}");
    }

    #[test]
    fn an_answer_that_the_template_drops_is_refused() {
        let (_folder, tokenizer) = tokenizer();
        let call = json!([{"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "one", "arguments": {}}}]}]);
        let error = outcome(&tokenizer, CHATML, &call).expect_err("the call is not rendered");
        assert!(error.starts_with("messages[1]: \"one\" of the answer is not in what"), "{error}");
    }

    #[test]
    fn an_end_token_without_text_is_no_stop_token() {
        let (folder, _) = tokenizer();
        std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [1, 900]}"#)
            .expect("writable");
        let tokenizer = Tokenizer::open(folder.path()).expect("valid");
        let without = CHATML.replace("<|im_end|>", "");
        let error = outcome(&tokenizer, &without, &one_turn()).expect_err("no stop token");
        assert!(error.contains("no end-of-turn token (<|im_end|>) follows the answer"), "{error}");
    }

    #[test]
    fn plain_rows_begin_with_the_one_token_that_the_tokenizer_adds() {
        let bos = json!({"post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}}}});
        let (_folder, tokenizer) = tokenizer_with(&bos);
        let tokeniser = Tokeniser { tokenizer: &tokenizer, template: None };
        let tokens = |text: &str| tokeniser.example(&Content::Text(text.into())).map(|example| example.tokens);
        assert_eq!(tokens("yes").expect("tokens"), tokens("<|im_start|>yes").expect("tokens"));
        assert_eq!(tokens("yes").expect("tokens").iter().filter(|&&token| token == 0).count(), 1);
        let error = tokens("<|im_start|><|im_start|>yes").expect_err("two").to_string();
        assert!(error.starts_with("the row begins with two <|im_start|> tokens; expected one"), "{error}");
        let row = Content::PromptCompletion { prompt: "hi ".into(), completion: "yes".into() };
        let example = tokeniser.example(&row).expect("tokens");
        assert_eq!((example.tokens[0], &example.trained[..]), (0, &[false, false, false, true, true][..]));
        assert_eq!(tokeniser.plain_prompt("hi ").expect("tokens"), example.tokens[..3]);
        // Templates write their own.
        let rendered = outcome(&tokenizer, CHATML, &one_turn()).expect("one");
        assert!(rendered.starts_with("<|im_start|> user"), "{rendered}");
    }
}
