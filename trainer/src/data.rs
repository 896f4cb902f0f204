//! From files of rows to tokens: formats, chat templates, answer masks, checks, order, packing. No tensor here, and nothing
//! is fetched here.

pub mod chat_template;
pub mod check;
pub mod example;
mod file;
pub mod format;
pub mod generation;
pub mod mask;
pub mod order;
pub mod pack;
#[cfg(test)]
mod tests;
pub mod tokenizer;

use std::path::{Path, PathBuf};

use crds::report::DataReport;
use crds::run::{ProblemAction, RunConfig, ValidationRows};
use rayon::prelude::*;

use self::chat_template::ChatTemplate;
use self::check::{RowHash, SpecialTexts};
use self::example::Example;
use self::file::{File, Fitted};
use self::format::{Content, Row};
use self::generation::GenerationRow;
use self::mask::Tokeniser;
use crate::data::tokenizer::Tokenizer;
use crate::ground::stop::Stop;

/// Fewer rows than this are learnt by heart.
const FEW_ROWS: usize = 10;

/// Rows could not be turned into tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read as rows.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// The model's tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] crate::data::tokenizer::Error),
    /// The model's template cannot be used.
    #[error(transparent)]
    Template(#[from] chat_template::Error),
    /// A row cannot be tokenised.
    #[error("{}:{line}: {source}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        source: mask::Error,
    },
    /// A finding that `onProblem` does not tolerate.
    #[error("{}:{line}: {message}", path.display())]
    Problem {
        /// The file.
        path: PathBuf,
        /// The first row that has it, counted from 1.
        line: usize,
        /// What was found, how often, and what to do.
        message: String,
    },
    /// Nothing is left to train on.
    #[error("{}: {message}", path.display())]
    NothingToTrain {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A stop was asked for.
    #[error("stopped while preparing")]
    Stopped,
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::Format(error) => error.exit(),
            Self::Tokenizer(error) => error.exit(),
            Self::Stopped => ExitCode::Preempted,
            Self::Template(_) | Self::Row { .. } | Self::Problem { .. } | Self::NothingToTrain { .. } => {
                ExitCode::BadData
            }
        }
    }
}

/// What is tokenised.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// Training rows.
    pub train: &'a Path,
    /// Validation rows with a file of their own.
    pub validation: Option<&'a Path>,
    /// General text.
    pub forgetting: Option<&'a Path>,
    /// Folder of tokenizer and template.
    pub model: &'a Path,
    /// Positions that the model has.
    pub max_context: i64,
    /// What `strftime_now` in templates says.
    pub date: jiff::civil::DateTime,
    /// Polled between files.
    pub stop: &'a Stop,
}

/// Rows as tokens, and what was found.
#[derive(Debug)]
pub struct Tokenized {
    /// Training examples.
    pub train: Vec<Example>,
    /// Validation examples.
    pub validation: Vec<Example>,
    /// General text.
    pub forgetting: Vec<Example>,
    /// Validation rows to be answered.
    pub generation: Vec<GenerationRow>,
    /// The first validation examples after the few-shot prompt's examples; empty where one does not fit.
    pub few_shot: Vec<Example>,
    /// What was found.
    pub report: DataReport,
    /// One training example with its trained tokens marked.
    pub sample: String,
}

/// Reads, checks and tokenises all rows. The same inputs give the same result.
pub fn tokenize(inputs: &Inputs) -> Result<Tokenized, Error> {
    let config = inputs.config;
    let tokenizer = Tokenizer::open(inputs.model)?;
    let train = File::read(inputs.train, config.dataset.train.format)?;
    let (train, validation) = match (&config.dataset.validation, inputs.validation) {
        (ValidationRows::Source(source), Some(path)) => (train, Some(File::read(path, source.format)?)),
        (ValidationRows::SplitPercent(percent), _) => {
            let chosen = |hash: &RowHash| check::in_validation(config.hyperparameters.seed, hash, *percent);
            (train.part(|hash| !chosen(hash)), Some(train.part(chosen)))
        }
        _ => (train, None),
    };
    let forgetting = match (&config.validation.forgetting, inputs.forgetting) {
        (Some(forgetting), Some(path)) => Some(File::read(path, forgetting.dataset.format)?),
        _ => None,
    };
    if inputs.stop.requested() {
        return Err(Error::Stopped);
    }
    let files = [Some(&train), validation.as_ref(), forgetting.as_ref()];
    let mut rows = files.iter().flatten().flat_map(|file| &file.rows);
    let conversations = rows.any(|row| matches!(row.content, Content::Messages { .. }));
    let template = conversations.then(|| load_template(&tokenizer, inputs.date)).transpose()?;
    let tokeniser = Tokeniser { tokenizer: &tokenizer, template: template.as_ref() };

    let mut report = DataReport::default();
    check_rows(config, &train, validation.as_ref(), forgetting.as_ref(), &mut report)?;
    let special_texts = SpecialTexts::new(tokenizer.special_texts());
    for file in files.into_iter().flatten() {
        check_special_texts(file, &special_texts, &mut report)?;
    }
    let mut examples = train.examples(&tokeniser)?;
    truncate(inputs, &train, &mut examples, &mut report)?;
    if inputs.stop.requested() {
        return Err(Error::Stopped);
    }
    if let Some(bos) = tokenizer.added_bos().filter(|_| conversations)
        && examples.iter().any(|example| example.tokens[0] != bos)
    {
        report.warnings.push(format!(
            "the chat template does not begin with {}, which the tokenizer puts before other texts; conversations are \
             trained and asked without it, as transformers and vLLM do",
            tokenizer.special_tokens()["bos_token"]
        ));
    }
    // What is measured may be longer than what is trained, unless a length was asked for.
    let wanted = config.hyperparameters.max_sequence_length.unwrap_or(inputs.max_context);
    let limit = wanted.min(inputs.max_context);
    let (validation_examples, validation_rows) =
        held_out(validation.as_ref(), "validation", &tokeniser, limit, &mut report)?;
    let (forgetting_examples, _) = held_out(forgetting.as_ref(), "general", &tokeniser, limit, &mut report)?;
    let generation = match &validation {
        Some(file) => {
            let context = inputs.max_context;
            generation::rows(&tokeniser, &train.rows, file.path, &file.rows, config, context, &mut report)?
        }
        None => Vec::new(),
    };
    let few_shot = match &validation {
        Some(file) => {
            let rows: Vec<(&Row, &Example)> =
                validation_rows.iter().map(|&row| &file.rows[row]).zip(&validation_examples).collect();
            let max_context = inputs.max_context as usize;
            generation::few_shot_examples(&tokeniser, &train.rows, file.path, &rows, max_context, config, &report)?
        }
        None => Vec::new(),
    };
    let sample = mask::marked_sample(&tokenizer, &examples[0])?;
    report.validation_rows = validation_examples.len() as i64;
    Ok(Tokenized {
        train: examples,
        validation: validation_examples,
        forgetting: forgetting_examples,
        generation,
        few_shot,
        report,
        sample,
    })
}

/// The tokens that ask a model for an answer to `prompt`: through its chat template, or as it is where it has none.
pub fn prompt_tokens(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, Error> {
    match load_template(tokenizer, jiff::Zoned::now().datetime()) {
        Ok(template) => {
            let message = serde_json::json!({"role": "user", "content": prompt});
            Ok(tokenizer.encode(&template.render(&[message], None, true)?.text)?.ids)
        }
        Err(Error::Template(chat_template::Error::Missing { .. })) => Ok(tokenizer.encode_plain(prompt)?.ids),
        Err(error) => Err(error),
    }
}

fn load_template(tokenizer: &Tokenizer, date: jiff::civil::DateTime) -> Result<ChatTemplate, Error> {
    let sources = chat_template::read_sources(tokenizer.folder())?;
    let special: Vec<(String, String)> =
        tokenizer.special_tokens().iter().map(|(name, text)| (name.clone(), text.clone())).collect();
    let template = ChatTemplate::new(&sources.default, &special, date)?;
    Ok(match sources.tool_use {
        Some(source) => template.with_tool_use(&source)?,
        None => template,
    })
}

/// Special tokens that users' texts spell out.
fn check_special_texts(file: &File, special_texts: &SpecialTexts, report: &mut DataReport) -> Result<(), Error> {
    let found: Vec<Option<&str>> = file.rows.par_iter().map(|row| special_texts.find(&row.content)).collect();
    let rows: Vec<usize> = (0..found.len()).filter(|&index| found[index].is_some()).collect();
    report.special_texts += rows.len() as i64;
    file.judge(&rows, ProblemAction::Warn, &mut report.warnings, |count| {
        let text = rows.first().and_then(|&first| found[first]).unwrap_or_default();
        format!(
            "{count} row(s) spell out a special token in a message, this is the first ({text}): the model reads it as the token, \
             which may end the turn there; remove it or write it differently"
        )
    })
}

/// Tokens of rows that are measured, not trained, and the index of the row that each example is made from.
fn held_out(
    file: Option<&File>,
    name: &str,
    tokeniser: &Tokeniser,
    limit: i64,
    report: &mut DataReport,
) -> Result<(Vec<Example>, Vec<usize>), Error> {
    let Some(file) = file else { return Ok((Vec::new(), Vec::new())) };
    let mut examples = file.examples(tokeniser)?;
    let Fitted { cut, dropped } = File::fit(&mut examples, limit as usize);
    report.held_out_truncated += cut.len() as i64;
    report.held_out_untrained += dropped.len() as i64;
    file.judge(&cut, ProblemAction::Warn, &mut report.warnings, |count| {
        format!(
            "{count} {name} row(s) lose answer tokens to the sequence length of {limit}, this is the first: they are measured on \
             what is left; raise hyperparameters.maxSequenceLength or shorten the rows"
        )
    })?;
    file.judge(&dropped, ProblemAction::Warn, &mut report.warnings, |count| {
        format!(
            "{count} {name} row(s) left out, this is the first: none of their tokens is trained within {limit} tokens"
        )
    })?;
    let rows = (0..file.rows.len()).filter(|row| !dropped.contains(row)).collect();
    Ok((examples, rows))
}

/// Duplicates and leakage.
fn check_rows(
    config: &RunConfig,
    train: &File,
    validation: Option<&File>,
    forgetting: Option<&File>,
    report: &mut DataReport,
) -> Result<(), Error> {
    let on_problem = config.dataset.on_problem;
    if train.rows.is_empty() {
        let message = "no training row is left after the validation split; lower dataset.splitPercent".into();
        return Err(Error::NothingToTrain { path: train.path.into(), message });
    }
    if let Some(validation) = validation.filter(|validation| validation.rows.is_empty()) {
        let message = "the split left no validation row; raise dataset.splitPercent or give dataset.validation".into();
        return Err(Error::NothingToTrain { path: validation.path.into(), message });
    }
    let repeated = check::duplicates(&train.hashes);
    report.duplicates = repeated.len() as i64;
    let texts: Vec<String> = train.rows.par_iter().map(|row| check::normalized_text(&row.content)).collect();
    report.near_duplicates = check::count_near_duplicates(&texts, &train.hashes) as i64;
    train.judge(&repeated, on_problem.duplicates, &mut report.warnings, |count| {
        format!("{count} training row(s) repeat an earlier one, this is the first; remove them or set dataset.onProblem.duplicates: Warn")
    })?;
    for (other, name) in [(validation, "validation"), (forgetting, "forgetting")] {
        let Some(other) = other else { continue };
        let leaked = check::leaked(&train.hashes, &other.hashes);
        report.leaked += leaked.len() as i64;
        train.judge(&leaked, on_problem.leakage, &mut report.warnings, |count| {
            format!(
                "{count} training row(s) are in the {name} rows too, this is the first: the result would look better than it \
                 is; remove them from one side or set dataset.onProblem.leakage: Warn"
            )
        })?;
    }
    if train.rows.len() < FEW_ROWS {
        report.warnings.push(format!("only {} training rows: expect them to be learnt by heart", train.rows.len()));
    }
    Ok(())
}

/// Cuts training examples to the sequence length, drops those without a trained token, and fills in the numbers.
fn truncate(inputs: &Inputs, train: &File, examples: &mut Vec<Example>, report: &mut DataReport) -> Result<(), Error> {
    let longest = examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0);
    let wanted = inputs.config.hyperparameters.max_sequence_length.unwrap_or(longest as i64);
    let limit = wanted.min(inputs.max_context) as usize;
    if inputs.config.hyperparameters.max_sequence_length.is_some() && wanted > inputs.max_context {
        report.warnings.push(format!(
            "hyperparameters.maxSequenceLength: {wanted} asked for, {limit} used: that is the model's context \
             (max_position_embeddings in config.json)"
        ));
    }
    let before = examples.len();
    let Fitted { cut, dropped } = File::fit(examples, limit);
    report.truncated = cut.len() as i64;
    let all_lost = cut.len() == before;
    let message = |count: usize| {
        let rows = if all_lost { "all training rows".to_owned() } else { format!("{count} training row(s)") };
        format!(
            "{rows} lose answer tokens to the sequence length of {limit}, this is the first (the longest row has {longest} \
             tokens); raise hyperparameters.maxSequenceLength, shorten the rows, or set dataset.onProblem.truncatedAnswers: Warn"
        )
    };
    train.judge(&cut, inputs.config.dataset.on_problem.truncated_answers, &mut report.warnings, message)?;
    report.untrained = dropped.len() as i64;
    if examples.is_empty() {
        let message =
            format!("none of {before} rows has a token to train within {limit} tokens; check weights and lengths");
        return Err(Error::NothingToTrain { path: train.path.into(), message });
    }
    train.judge(&dropped, ProblemAction::Warn, &mut report.warnings, |count| {
        format!(
            "{count} training row(s) left out, this is the first: none of their tokens is trained within {limit} tokens"
        )
    })?;
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    report.rows = examples.len() as i64;
    report.tokens = lengths.iter().sum::<usize>() as i64;
    report.trained_tokens = examples.iter().map(Example::num_trained).sum::<usize>() as i64;
    report.longest = lengths.iter().copied().max().unwrap_or(0) as i64;
    report.max_sequence_length = limit as i64;
    report.length_histogram = check::length_histogram(&lengths);
    Ok(())
}
