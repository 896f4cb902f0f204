//! Rows that are answered to measure exact match: the prompt as it is, the prompt after a few examples, the right answer.

use std::path::Path;

use crds::report::DataReport;
use crds::run::RunConfig;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Error;
use super::format::{Content, Row};
use super::mask::{self, Tokeniser};
use crate::random::generator;

/// Rows that are answered; more would cost more time than they add certainty.
const MAX_ROWS: usize = 256;

/// A prompt and the answer that counts as right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GenerationRow {
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Tokens of the prompt with examples before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot_prompt: Option<Vec<u32>>,
    /// The right answer.
    pub reference: String,
}

/// The validation rows' last answers as questions. The examples of the few-shot prompt are training rows chosen by seed,
/// the same for every row: as many as fit the model's context of `max_context` tokens with the longest row. A row that does
/// not fit by itself is left out.
pub fn rows(
    tokeniser: &Tokeniser,
    train: &[Row],
    path: &Path,
    validation: &[Row],
    config: &RunConfig,
    max_context: i64,
    report: &mut DataReport,
) -> Result<Vec<GenerationRow>, Error> {
    let mut order: Vec<usize> = (0..train.len()).collect();
    order.shuffle(&mut generator(config.hyperparameters.seed, "few-shot", &[]));
    let wanted = config.validation.few_shot_examples.max(0) as usize;
    let mut shots: Vec<&Content> = order.iter().take(wanted).map(|&index| &train[index].content).collect();
    let available = shots.len();
    let (rows, too_long) = loop {
        let (mut rows, mut too_long, mut shots_fit) = (Vec::new(), Vec::new(), true);
        for row in validation.iter().take(MAX_ROWS) {
            let failed = |source| Error::Row { path: path.into(), line: row.line, source };
            let Some(answered) = generation_row(tokeniser, &shots, &row.content).map_err(failed)? else { continue };
            // The answer and the token that ends it.
            let answer = tokeniser.tokenizer.encode(&answered.reference)?.ids.len() + 1;
            let fits = |prompt: &Vec<u32>| (prompt.len() + answer) as i64 <= max_context;
            if fits(&answered.prompt) {
                shots_fit &= answered.few_shot_prompt.as_ref().is_none_or(fits);
                rows.push(answered);
            } else {
                too_long.push(row.line);
            }
        }
        if shots_fit {
            break (rows, too_long);
        }
        shots.pop();
    };
    report.unanswerable = too_long.len() as i64;
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
    content: &Content,
) -> Result<Option<GenerationRow>, mask::Error> {
    match content {
        Content::Messages { messages, tools, trained } => {
            let Some(last) = (0..messages.len()).rev().find(|&index| trained[index]) else { return Ok(None) };
            let reference = messages[last]["content"].as_str().unwrap_or_default().to_owned();
            if reference.trim().is_empty() {
                return Ok(None);
            }
            let asked = &messages[..last];
            let prompt = tokeniser.prompt(asked, tools.as_ref())?;
            let few_shot_prompt = if shots.is_empty() {
                None
            } else {
                Some(tokeniser.prompt(&with_shots(asked, shots), tools.as_ref())?)
            };
            Ok(Some(GenerationRow { prompt, few_shot_prompt, reference }))
        }
        Content::PromptCompletion { prompt, completion } => {
            let examples: String = shots
                .iter()
                .filter_map(|shot| match shot {
                    Content::PromptCompletion { prompt, completion } => Some(format!("{prompt}{completion}\n\n")),
                    _ => None,
                })
                .collect();
            let encode = |text: &str| tokeniser.plain_prompt(text);
            Ok(Some(GenerationRow {
                prompt: encode(prompt)?,
                few_shot_prompt: if shots.is_empty() { None } else { Some(encode(&format!("{examples}{prompt}"))?) },
                reference: completion.clone(),
            }))
        }
        Content::Text(_) => Ok(None),
    }
}

/// The conversation with the examples' turns between its system message and its own first turn.
fn with_shots(asked: &[Value], shots: &[&Content]) -> Vec<Value> {
    let is_system = |message: &&Value| message["role"] == "system" || message["role"] == "developer";
    let system = asked.iter().take_while(is_system).count();
    let mut messages = asked[..system].to_vec();
    for shot in shots {
        if let Content::Messages { messages: turns, .. } = shot {
            messages.extend(turns.iter().filter(|message| !is_system(message)).cloned());
        }
    }
    messages.extend_from_slice(&asked[system..]);
    messages
}
