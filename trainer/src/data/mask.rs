//! From a row to tokens and the mask of trained ones. The mask is taken by position, never by token id, and a row whose
//! template contradicts itself is refused: a wrong mask trains without an error and spoils the model.

#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

use serde_json::Value;

use super::chat_template::{self, ChatTemplate};
use super::example::Example;
use super::format::Content;
use crate::data::tokenizer::{self, Encoded, Tokenizer};

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
