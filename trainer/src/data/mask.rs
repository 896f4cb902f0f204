//! From a row to tokens and the mask of trained ones. The mask is taken by position, never by token id, and a row whose
//! template contradicts itself is refused: a wrong mask trains without an error and spoils the model.

use std::ops::Range;

use serde_json::Value;

use super::chat_template::{self, ChatTemplate, Rendered};
use super::example::Example;
use super::format::Content;
use crate::tokenizer::{self, Tokenizer};

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
    #[error("messages[{message}]: {reason}; the chat template cannot be used for training as it is")]
    Contradiction {
        /// Index of the assistant's message.
        message: usize,
        /// What was found.
        reason: String,
    },
    /// The conversation begins with two beginning-of-sequence tokens.
    #[error("the conversation begins with two {0} tokens; the template and the tokenizer both add one")]
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
        let mut example = self.mark(text, &[trained])?;
        if example.tokens.last().is_none_or(|last| !self.tokenizer.end_tokens().contains(last)) {
            example.tokens.push(self.tokenizer.eos());
            example.trained.push(true);
        }
        Ok(example)
    }

    /// A token is trained if its bytes meet a span.
    fn mark(&self, text: &str, spans: &[Range<usize>]) -> Result<Example, Error> {
        let encoded = self.tokenizer.encode(text)?;
        let meets = |&(start, end): &(usize, usize)| spans.iter().any(|span| start < span.end && span.start < end);
        let trained = encoded.offsets.iter().map(meets).collect();
        Ok(Example { tokens: encoded.ids, trained })
    }

    fn template(&self) -> Result<&ChatTemplate, Error> {
        self.template.ok_or(Error::NoTemplate)
    }

    fn conversation(&self, messages: &[Value], tools: Option<&Value>, trained: &[bool]) -> Result<Example, Error> {
        let template = self.template()?;
        let whole = template.render(messages, tools, false)?;
        let answers: Vec<usize> = (0..messages.len()).filter(|&index| messages[index]["role"] == "assistant").collect();
        let tagged = template.marks_generation && whole.generated.len() == answers.len();
        let mut spans = Vec::new();
        for (order, &index) in answers.iter().enumerate().filter(|&(_, &index)| trained[index]) {
            let contradiction = |reason: String| Error::Contradiction { message: index, reason };
            let span = if tagged {
                whole.generated[order].clone()
            } else {
                incremental_span(template, messages, tools, index, &whole)?
            };
            spans.push(self.up_to_stop_token(&whole.text, span).map_err(contradiction)?);
        }
        let example = self.mark(&whole.text, &spans)?;
        if let (Some(bos), [first, second, ..]) = (self.tokenizer.bos(), example.tokens.as_slice())
            && bos == *first
            && bos == *second
        {
            return Err(Error::DoubleBos(self.tokenizer.special_tokens()["bos_token"].clone()));
        }
        Ok(example)
    }

    /// Cuts a span after its last end-of-turn token: what the template writes behind it belongs to the next turn.
    fn up_to_stop_token(&self, text: &str, span: Range<usize>) -> Result<Range<usize>, String> {
        let encoded_ends = self.tokenizer.end_tokens();
        let stops: Vec<String> =
            encoded_ends.iter().filter_map(|&id| self.tokenizer.decode_with_special(&[id]).ok()).collect();
        // Generation tags may close right before the stop token: it is trained all the same.
        let rest = &text[span.start..];
        let limit = span.end - span.start;
        let end = stops
            .iter()
            .filter_map(|stop| {
                let inside = rest[..limit].rfind(stop.as_str());
                let at = inside.or_else(|| {
                    rest[limit..]
                        .trim_start()
                        .starts_with(stop.as_str())
                        .then(|| limit + rest[limit..].find(stop.as_str()).unwrap_or(0))
                })?;
                Some(span.start + at + stop.len())
            })
            .max();
        end.map(|end| span.start..end).ok_or_else(|| {
            format!("no end-of-turn token ({}) follows the answer, so it would never be learnt", stops.join(", "))
        })
    }

    /// Tokens of the prompt that asks for message `index`.
    pub fn prompt(&self, messages: &[Value], tools: Option<&Value>) -> Result<Vec<u32>, Error> {
        let text = self.template()?.render(messages, tools, true)?.text;
        Ok(self.tokenizer.encode(&text)?.ids)
    }
}

/// What the message adds to the rendering of everything before it.
fn incremental_span(
    template: &ChatTemplate,
    messages: &[Value],
    tools: Option<&Value>,
    index: usize,
    whole: &Rendered,
) -> Result<Range<usize>, Error> {
    let contradiction = |reason: &str| Error::Contradiction { message: index, reason: reason.into() };
    let before = template.render(&messages[..index], tools, true)?.text;
    let with = template.render(&messages[..=index], tools, false)?.text;
    if !with.starts_with(&before) {
        return Err(contradiction("the generation prompt is not how the rendered answer begins"));
    }
    if !whole.text.starts_with(&with) {
        return Err(contradiction("the answer is rendered differently once further messages follow it"));
    }
    Ok(before.len()..with.len())
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
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<|im_start|>"), special(1, "<|im_end|>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\n| "}, "behavior": "Isolated", "invert": false},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
        });
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
}
