//! Rows that are answered to measure exact match: the prompt as it is, the prompt after a few examples, the right answer.

use std::path::Path;

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
/// the same for every row.
pub fn rows(
    tokeniser: &Tokeniser,
    train: &[Row],
    path: &Path,
    validation: &[Row],
    config: &RunConfig,
) -> Result<Vec<GenerationRow>, Error> {
    let mut order: Vec<usize> = (0..train.len()).collect();
    order.shuffle(&mut generator(config.hyperparameters.seed, "few-shot", &[]));
    let wanted = config.validation.few_shot_examples.max(0) as usize;
    let shots: Vec<&Content> = order.iter().take(wanted).map(|&index| &train[index].content).collect();
    let mut rows = Vec::new();
    for row in validation.iter().take(MAX_ROWS) {
        let failed = |source| Error::Row { path: path.into(), line: row.line, source };
        rows.extend(generation_row(tokeniser, &shots, &row.content).map_err(failed)?);
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
            let encode = |text: &str| tokeniser.tokenizer.encode(text).map(|encoded| encoded.ids);
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
