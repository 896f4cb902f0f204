//! Rows that are answered to measure exact match: the prompt as it is, the prompt after a few examples, the right answer;
//! and the same rows after the same examples with the answer in place, to measure the loss.

use std::mem::discriminant;
use std::path::Path;

use crds::report::DataReport;
use crds::run::RunConfig;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Error;
use super::example::Example;
use super::format::{Content, Row};
use super::mask::{self, Tokeniser};
use crate::ground::random::generator;

/// Rows that are answered, and rows that the loss after examples is taken on; more would cost more time than they add
/// certainty.
const MAX_ROWS: usize = 256;

/// What separates prompt and completion examples: the first that is in no answer.
const DELIMITERS: [&str; 3] = ["\n\n", "\n\n---\n\n", "\n\n###\n\n"];

/// A prompt and the answer that counts as right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GenerationRow {
    /// The row's line in its file, counted from 1.
    pub line: usize,
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Tokens of the prompt with examples before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_prompt: Option<Vec<u32>>,
    /// Text that ends the answer to the prompt with examples, beside the stop token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_stop: Option<String>,
    /// The right answer.
    pub reference: String,
    /// Its length in tokens.
    pub reference_tokens: usize,
}

/// New tokens that an answer may have: half as many again as the longest right one, and some to end it with. The rotary
/// tables and the caches hold a prompt and so many.
pub fn max_new_tokens(rows: &[GenerationRow]) -> i64 {
    let longest = rows.iter().map(|row| row.reference_tokens).max().unwrap_or(0) as i64;
    longest + longest / 2 + 8
}

/// Tokens of the longest prompt, examples included.
fn longest_prompt(rows: &[GenerationRow]) -> usize {
    rows.iter().map(|row| row.few_shot_prompt.as_ref().map_or(0, Vec::len).max(row.prompt.len())).max().unwrap_or(0)
}

/// Tokens of the longest prompt and of an answer to it; 0 where nothing is asked.
pub fn longest_answered(rows: &[GenerationRow]) -> i64 {
    if rows.is_empty() { 0 } else { longest_prompt(rows) as i64 + max_new_tokens(rows) }
}

fn wanted_shots(config: &RunConfig) -> usize {
    config.validation.few_shot_examples.max(0) as usize
}

/// The examples of the few-shot prompt: training rows chosen by seed, the same for every row.
fn shots<'a>(train: &'a [Row], number: usize, config: &RunConfig) -> Vec<&'a Content> {
    let mut order: Vec<usize> = (0..train.len()).collect();
    order.shuffle(&mut generator(config.hyperparameters.seed, "few-shot", &[]));
    order.iter().take(number).map(|&index| &train[index].content).collect()
}

fn delimiter<'a>(contents: &(impl Iterator<Item = &'a Content> + Clone)) -> &'static str {
    let occurs = |delimiter: &str| {
        contents.clone().any(|content| match content {
            Content::PromptCompletion { completion, .. } => completion.contains(delimiter),
            Content::Messages { .. } | Content::Text(_) => false,
        })
    };
    DELIMITERS.into_iter().find(|delimiter| !occurs(delimiter)).unwrap_or(DELIMITERS[DELIMITERS.len() - 1])
}

/// The validation rows' last answers as questions. The examples of the few-shot prompt are training rows chosen by seed,
/// the same for every row: as many as fit the model's context of `max_context` tokens with the longest row. A row that does
/// not fit by itself, or whose prompt is empty, is left out.
pub fn rows(
    tokeniser: &Tokeniser,
    train: &[Row],
    path: &Path,
    validation: &[Row],
    config: &RunConfig,
    max_context: i64,
    report: &mut DataReport,
) -> Result<Vec<GenerationRow>, Error> {
    let wanted = wanted_shots(config);
    let mut shots = shots(train, wanted, config);
    let available = shots.len();
    let validation = &validation[..validation.len().min(MAX_ROWS)];
    let delimiter = delimiter(&shots.iter().copied().chain(validation.iter().map(|row| &row.content)));
    let (rows, too_long, unprompted) = loop {
        let (mut rows, mut too_long, mut unprompted, mut shots_fit) = (Vec::new(), Vec::new(), Vec::new(), true);
        for row in validation {
            let failed = |source| Error::Row { path: path.into(), line: row.line, source };
            let Some(answered) = generation_row(tokeniser, &shots, delimiter, row).map_err(failed)? else {
                continue;
            };
            if answered.prompt.is_empty() {
                unprompted.push(row.line);
                continue;
            }
            // The answer and the token that ends it.
            let answer = answered.reference_tokens + 1;
            let fits = |prompt: &Vec<u32>| (prompt.len() + answer) as i64 <= max_context;
            if fits(&answered.prompt) {
                shots_fit &= answered.few_shot_prompt.as_ref().is_none_or(fits);
                rows.push(answered);
            } else {
                too_long.push(row.line);
            }
        }
        if shots_fit {
            break (rows, too_long, unprompted);
        }
        shots.pop();
    };
    report.unanswerable = (too_long.len() + unprompted.len()) as i64;
    if let Some(line) = unprompted.first() {
        report.warnings.push(format!(
            "{}:{line}: {} validation row(s) are not answered, this is the first: the prompt has no token that an answer could \
             follow",
            path.display(),
            unprompted.len()
        ));
    }
    if let Some(line) = too_long.first() {
        report.warnings.push(format!(
            "{}:{line}: {} validation row(s) are not answered, this is the first: prompt and answer exceed the model's context \
             of {max_context} tokens; shorten them",
            path.display(),
            too_long.len()
        ));
    }
    report.few_shot_examples = (shots.len() != wanted).then_some(shots.len() as i64);
    if shots.len() < available {
        report.warnings.push(format!(
            "validation.baselines.fewShot.examples: {wanted} asked for, {} used: more do not fit the model's context of \
             {max_context} tokens beside the longest row{}; ask for fewer or shorten the rows",
            shots.len(),
            if shots.is_empty() { ", so there is no few-shot baseline" } else { "" }
        ));
    }
    Ok(rows)
}

fn generation_row(
    tokeniser: &Tokeniser,
    shots: &[&Content],
    delimiter: &str,
    &Row { line, ref content }: &Row,
) -> Result<Option<GenerationRow>, mask::Error> {
    let encode = |text: &str| tokeniser.tokenizer.encode(text).map(|encoded| encoded.ids);
    let after_shots = after_shots(content, shots, delimiter);
    match content {
        Content::Messages { messages, tools, trained } => {
            let Some(last) = (0..messages.len()).rev().find(|&index| trained[index]) else { return Ok(None) };
            let reference = messages[last]["content"].as_str().unwrap_or_default().to_owned();
            if reference.trim().is_empty() {
                return Ok(None);
            }
            let few_shot_prompt = match &after_shots {
                Some(Content::Messages { messages: with_shots, .. }) => {
                    let last = last + with_shots.len() - messages.len();
                    Some(tokeniser.prompt(&with_shots[..last], tools.as_ref())?)
                }
                _ => None,
            };
            Ok(Some(GenerationRow {
                line,
                prompt: tokeniser.prompt(&messages[..last], tools.as_ref())?,
                few_shot_prompt,
                few_shot_stop: None,
                reference_tokens: encode(&reference)?.len(),
                reference,
            }))
        }
        Content::PromptCompletion { prompt, completion } => {
            let few_shot_prompt = match &after_shots {
                Some(Content::PromptCompletion { prompt, .. }) => Some(tokeniser.plain_prompt(prompt)?),
                _ => None,
            };
            Ok(Some(GenerationRow {
                line,
                prompt: tokeniser.plain_prompt(prompt)?,
                few_shot_stop: few_shot_prompt.as_ref().map(|_| delimiter.to_owned()),
                few_shot_prompt,
                reference: completion.clone(),
                reference_tokens: encode(completion)?.len(),
            }))
        }
        Content::Text(_) => Ok(None),
    }
}

/// The first validation rows after the few-shot prompt's examples, row by row beside the validation `examples`. Trained are
/// the tokens that the row has trained, except that the stop token is not asked for after prompt and completion examples,
/// which end without one. A row that does not fit into `max_context` tokens, or whose answer becomes other tokens there, is
/// an empty example.
pub fn few_shot_examples(
    tokeniser: &Tokeniser,
    train: &[Row],
    path: &Path,
    validation: &[(&Row, &Example)],
    max_context: usize,
    config: &RunConfig,
    report: &DataReport,
) -> Result<Vec<Example>, Error> {
    // As many as the answered rows have.
    let number = report.few_shot_examples.map_or(wanted_shots(config), |used| used.unsigned_abs() as usize);
    let shots = shots(train, number, config);
    if shots.is_empty() {
        return Ok(Vec::new());
    }
    let validation = &validation[..validation.len().min(MAX_ROWS)];
    let delimiter = delimiter(&shots.iter().copied().chain(validation.iter().map(|(row, _)| &row.content)));
    let mut examples = Vec::with_capacity(validation.len());
    for &(row, own) in validation {
        let failed = |source| Error::Row { path: path.into(), line: row.line, source };
        let example = few_shot_example(tokeniser, &shots, delimiter, &row.content, own).map_err(failed)?;
        examples.push(example.filter(|example| example.tokens.len() <= max_context).unwrap_or_default());
    }
    Ok(examples)
}

fn few_shot_example(
    tokeniser: &Tokeniser,
    shots: &[&Content],
    delimiter: &str,
    content: &Content,
    own: &Example,
) -> Result<Option<Example>, mask::Error> {
    let Some(content) = after_shots(content, shots, delimiter) else { return Ok(None) };
    let mut example = tokeniser.example(&content)?;
    let mut wanted: Vec<u32> = trained_tokens(own).map(|index| own.tokens[index]).collect();
    let ends = |token: &u32| tokeniser.tokenizer.end_tokens().contains(token);
    if matches!(content, Content::PromptCompletion { .. }) && wanted.last().is_some_and(ends) {
        wanted.pop();
    }
    // The first token of a row has nothing before it and is not predicted there.
    let unpredicted = usize::from(own.trained.first() == Some(&true));
    let places: Vec<usize> = trained_tokens(&example).skip(unpredicted).take(wanted.len()).collect();
    let same = places.iter().map(|&place| example.tokens[place]).eq(wanted);
    let Some(last) = places.last().filter(|_| same) else { return Ok(None) };
    example.tokens.truncate(last + 1);
    example.trained = vec![false; last + 1];
    for place in places {
        example.trained[place] = true;
    }
    Ok(Some(example))
}

/// Indices of the tokens that the loss is taken on.
fn trained_tokens(example: &Example) -> impl Iterator<Item = usize> {
    (1..example.tokens.len()).filter(|&index| example.trained[index])
}

/// The row with the examples before it; `None` where none of them has its shape. Of a row nothing but what it trains itself
/// is trained.
fn after_shots(content: &Content, shots: &[&Content], delimiter: &str) -> Option<Content> {
    let alike = || shots.iter().filter(|shot| discriminant(**shot) == discriminant(content));
    alike().next()?;
    match content {
        Content::Messages { messages, tools, trained } => {
            let is_system = |message: &&Value| message["role"] == "system" || message["role"] == "developer";
            // Their turns stand between the row's system message and its own first turn.
            let system = messages.iter().take_while(is_system).count();
            let turns: Vec<Value> = alike()
                .filter_map(|shot| match shot {
                    Content::Messages { messages, .. } => Some(messages),
                    Content::PromptCompletion { .. } | Content::Text(_) => None,
                })
                .flatten()
                .filter(|message| !is_system(message))
                .cloned()
                .collect();
            let trained = [&trained[..system], &vec![false; turns.len()], &trained[system..]].concat();
            let messages = [&messages[..system], &turns, &messages[system..]].concat();
            Some(Content::Messages { messages, tools: tools.clone(), trained })
        }
        Content::PromptCompletion { prompt, completion } => {
            let examples: String = alike()
                .filter_map(|shot| match shot {
                    Content::PromptCompletion { prompt, completion } => {
                        Some(format!("{prompt}{completion}{delimiter}"))
                    }
                    Content::Messages { .. } | Content::Text(_) => None,
                })
                .collect();
            Some(Content::PromptCompletion { prompt: examples + prompt, completion: completion.clone() })
        }
        Content::Text(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::mask::tests::{CHATML, template, tokenizer};
    use serde_json::json;

    fn pair(prompt: &str, completion: &str) -> Content {
        Content::PromptCompletion { prompt: prompt.into(), completion: completion.into() }
    }

    fn conversation(user: &str, assistant: &str) -> Content {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages = vec![turn("system", "hi"), turn("user", user), turn("assistant", assistant)];
        Content::Messages { messages, tools: None, trained: vec![false, false, true] }
    }

    /// The few-shot example of `content` as text, its trained tokens, and those of the row itself.
    fn check(shots: &[Content], content: &Content, own_limit: usize) -> Option<(String, String, String)> {
        let (_folder, tokenizer) = tokenizer();
        let template = template(CHATML);
        let tokeniser = Tokeniser { tokenizer: &tokenizer, template: Some(&template) };
        let mut own = tokeniser.example(content).expect("tokens");
        own.tokens.truncate(own_limit);
        own.trained.truncate(own_limit);
        let shots: Vec<&Content> = shots.iter().collect();
        let delimiter = delimiter(&shots.iter().copied());
        let example = few_shot_example(&tokeniser, &shots, delimiter, content, &own).expect("tokens")?;
        let text = |tokens: &[u32]| tokenizer.decode_with_special(tokens).expect("decodes").replace(' ', "");
        let trained =
            |example: &Example| text(&trained_tokens(example).map(|index| example.tokens[index]).collect::<Vec<u32>>());
        Some((text(&example.tokens), trained(&example), trained(&own)))
    }

    #[test]
    fn after_examples_a_row_is_asked_for_its_own_tokens_only() {
        let shots = [conversation("one", "two"), conversation("three", "4")];
        let (text, trained, own) = check(&shots, &conversation("there", "yes no"), 99).expect("it has shots");
        assert_eq!(text.matches("hi").count(), 1, "{text}");
        assert!(text.contains("two<|im_end|>") && text.contains("4<|im_end|>"), "{text}");
        assert_eq!((trained.as_str(), own.as_str()), ("yes[UNK]no<|im_end|>", "yes[UNK]no<|im_end|>"));
    }

    #[test]
    fn after_prompt_and_completion_examples_no_stop_token_is_asked_for() {
        let shots = [pair("one ", "two"), pair("three ", "4")];
        let (text, trained, own) = check(&shots, &pair("hi ", "yes no"), 99).expect("it has shots");
        assert_eq!((trained.as_str(), own.as_str()), ("yes[UNK]no", "yes[UNK]no<|im_end|>"));
        assert!(!text.contains("<|im_end|>"), "{text}");
        // A row that lost its end is asked for what it still has.
        let (_, trained, own) = check(&shots, &pair("hi ", "yes no"), 3).expect("it has shots");
        assert_eq!((trained.as_str(), own.as_str()), ("yes", "yes"));
        assert_eq!(check(&[conversation("one", "two")], &pair("hi ", "yes"), 99), None);
        assert_eq!(check(&[], &pair("hi ", "yes"), 99), None);
    }

    #[test]
    fn examples_are_separated_by_what_is_in_no_answer() {
        let contents = [pair("a\n\nb", "c"), pair("a", "c\nd")];
        assert_eq!(delimiter(&contents.iter()), "\n\n");
        assert_eq!(delimiter(&[pair("a", "c\n\nd")].iter()), "\n\n---\n\n");
    }

    #[test]
    fn one_number_bounds_answers() {
        let row = |reference_tokens| GenerationRow { reference_tokens, ..GenerationRow::default() };
        assert_eq!((max_new_tokens(&[row(3), row(40)]), max_new_tokens(&[])), (68, 8));
    }
}
