//! What the whole of data preparation finds and says.

use std::path::Path;

use crds::check::{Scope, check};
use crds::resolve::{Target, resolve};

use super::mask::tests::{CHATML, tokenizer};
use super::*;

/// Tokenises rows for a FineTuneJob with `rest` below `spec`, on a model with `max_context` positions.
fn prepare(train: &str, validation: &str, rest: &str, max_context: i64) -> Result<Tokenized, String> {
    let (model, _) = tokenizer();
    let folder = model.path();
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).expect("writable");
    write("chat_template.jinja", CHATML);
    write("train.jsonl", train);
    write("test.jsonl", validation);
    let job = format!(
        "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: rows}}\nspec:\n  model: {{uri: file://.}}\n  \
         dataset: {{train: {{uri: file://train.jsonl}}, validation: {{uri: file://test.jsonl}}}}\n  method: {{type: LoRA}}\n{rest}"
    );
    let checked = check(&job, Scope::Local).expect("a valid job");
    let resolved = resolve(
        &checked.job,
        &crds::profile::built_in(),
        Target::Local { folder, claims: &std::collections::BTreeMap::new() },
    );
    let config = resolved.expect("resolves").config;
    let inputs = Inputs {
        config: &config,
        train: &folder.join("train.jsonl"),
        validation: Some(&folder.join("test.jsonl")),
        forgetting: None,
        model: folder,
        max_context,
        date: jiff::civil::date(2026, 1, 2).at(3, 4, 5, 0),
        stop: &Stop::default(),
    };
    let without_folder = |text: &str| text.replace(&format!("{}/", Path::display(folder)), "");
    let mut tokenized = tokenize(&inputs).map_err(|error| without_folder(&error.to_string()))?;
    tokenized.report.warnings.iter_mut().for_each(|warning| *warning = without_folder(warning));
    Ok(tokenized)
}

fn row(question: &str, answer: &str) -> String {
    let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
    serde_json::json!({"messages": [message("user", question), message("assistant", answer)]}).to_string() + "\n"
}

/// Twelve different short rows.
fn short_rows() -> String {
    let words = ["hi", "there", "one", "two", "three", "4"];
    words.iter().flat_map(|word| [row(word, "yes"), row(word, "no")]).collect()
}

/// Asserts that a warning begins so.
fn assert_warned(tokenized: &Tokenized, expected: &str) {
    let warnings = &tokenized.report.warnings;
    assert!(warnings.iter().any(|warning| warning.starts_with(expected)), "{expected}\nis not among {warnings:#?}");
}

const NO_SHOTS: &str = "  validation: {baselines: {fewShot: {examples: 0}}}\n";

#[test]
fn cut_and_dropped_validation_rows_are_counted_and_named() {
    let long = "one two three one two three one two three";
    let validation = row("yes", "hi") + &row("yes", long) + &row(long, "hi");
    let whole = prepare(&short_rows(), &validation, NO_SHOTS, 128).expect("tokens").report;
    assert_eq!((whole.held_out_truncated, whole.validation_rows), (0, 3), "longer than what is trained, and not cut");
    let limit = whole.longest;
    let rest = format!("{NO_SHOTS}  hyperparameters: {{maxSequenceLength: {limit}}}\n");
    let tokenized = prepare(&short_rows(), &validation, &rest, 128).expect("tokens");
    let report = &tokenized.report;
    assert_eq!((report.held_out_truncated, report.held_out_untrained, report.validation_rows), (2, 1, 2));
    assert_warned(
        &tokenized,
        &format!(
            "test.jsonl:2: 2 validation row(s) lose answer tokens to the sequence length of {limit}, this is the first"
        ),
    );
    assert_warned(&tokenized, "test.jsonl:3: 1 validation row(s) left out, this is the first: none of their tokens");
    assert_eq!((report.truncated, report.untrained), (0, 0));
}

#[test]
fn a_sequence_length_beyond_the_context_is_said() {
    let rest = format!("{NO_SHOTS}  hyperparameters: {{maxSequenceLength: 4096}}\n");
    let tokenized = prepare(&short_rows(), &row("yes", "hi"), &rest, 128).expect("tokens");
    assert_eq!(tokenized.report.max_sequence_length, 128);
    assert_warned(
        &tokenized,
        "hyperparameters.maxSequenceLength: 4096 asked for, 128 used: that is the model's context",
    );
}

#[test]
fn special_tokens_in_messages_are_counted_and_named() {
    let train = short_rows() + &row("hi <|im_end|> there", "yes") + &row("two", "yes <|im_start|>");
    let tokenized = prepare(&train, &row("yes", "hi"), NO_SHOTS, 128).expect("tokens");
    assert_eq!(tokenized.report.special_texts, 2);
    assert_warned(
        &tokenized,
        "train.jsonl:13: 2 row(s) spell out a special token in a message, this is the first (<|im_end|>)",
    );
}

#[test]
fn rows_that_exceed_the_context_are_not_answered() {
    let long = "one two three one two three one two three";
    let validation = row("yes", "hi") + &row(long, "hi") + &row(long, "no");
    let tokenized = prepare(&short_rows(), &validation, NO_SHOTS, 24).expect("tokens");
    assert_eq!((tokenized.generation.len(), tokenized.report.unanswerable), (1, 2));
    assert_warned(
        &tokenized,
        "test.jsonl:2: 2 validation row(s) are not answered, this is the first: prompt and answer exceed the model's context of 24",
    );
}

#[test]
fn a_row_without_a_prompt_is_not_answered() {
    let pair = |prompt: &str| format!("{{\"prompt\":\"{prompt}\",\"completion\":\"yes\"}}\n");
    let tokenized = prepare(&short_rows(), &(pair("hi ") + &pair("")), NO_SHOTS, 128).expect("tokens");
    assert_eq!((tokenized.report.validation_rows, tokenized.report.unanswerable), (2, 1));
    assert_eq!(tokenized.generation.len(), 1);
    assert_warned(
        &tokenized,
        "test.jsonl:2: 1 validation row(s) are not answered, this is the first: the prompt has no token",
    );
}

#[test]
fn every_row_gets_as_many_examples_as_fit_the_longest() {
    let validation = row("yes", "hi") + &row("one two three one two three", "hi");
    let shots = |max_context| {
        let rest = "  validation: {baselines: {fewShot: {examples: 4}}}\n";
        prepare(&short_rows(), &validation, rest, max_context).expect("tokens")
    };
    let lengths = |tokenized: &Tokenized| -> Vec<Option<usize>> {
        let added = |row: &GenerationRow| Some(row.few_shot_prompt.as_ref()?.len() - row.prompt.len());
        tokenized.generation.iter().map(added).collect()
    };
    let all = shots(128);
    assert_eq!((all.report.few_shot_examples, lengths(&all)[0]), (None, lengths(&all)[1]));
    let each = lengths(&all)[0].expect("four examples") / 4;
    let longest = all.generation[1].prompt.len();
    let two = shots((longest + 2 * each + 2) as i64);
    assert_eq!((two.report.few_shot_examples, lengths(&two)), (Some(2), vec![Some(2 * each); 2]));
    assert_warned(
        &two,
        "validation.baselines.fewShot.examples: 4 asked for, 2 used: more do not fit the model's context",
    );
    let none = shots((longest + each + 1) as i64);
    assert_eq!((none.report.few_shot_examples, lengths(&none)), (Some(0), vec![None; 2]));
    assert_warned(&none, "validation.baselines.fewShot.examples: 4 asked for, 0 used");
}

#[test]
fn a_conversation_anywhere_in_the_file_needs_the_template() {
    let strings = "{\"prompt\":\"hi \",\"completion\":\"yes\"}\n";
    let lists = "{\"prompt\":[{\"role\":\"user\",\"content\":\"hi\"}],\"completion\":[{\"role\":\"assistant\",\"content\":\"yes\"}]}\n";
    let tokenized = prepare(&format!("{strings}{lists}"), &row("yes", "hi"), NO_SHOTS, 128).expect("tokens");
    assert_eq!(tokenized.report.rows, 2);
    let error = prepare(lists, strings, NO_SHOTS, 128).map(|tokenized| tokenized.report.rows);
    assert_eq!(error, Ok(1));
}

#[test]
fn a_token_that_the_model_has_no_row_for_is_refused_with_its_line() {
    let (folder, _) = tokenizer();
    let path = folder.path().join("config.json");
    std::fs::write(&path, r#"{"vocab_size": 10}"#).expect("writable");
    let tokenizer = Tokenizer::open(folder.path()).expect("valid");
    let error = tokenizer.encode("hi three").expect_err("three has id 13").to_string();
    let expected = "the tokenizer gives token id 13 (\"three\"), config.json says vocab_size 10: tokenizer and model do not belong";
    assert!(error.starts_with(expected), "{error}");
    std::fs::write(&path, r#"{"vocab_size": 1}"#).expect("writable");
    assert!(Tokenizer::open(folder.path()).is_err(), "the end token is beyond the vocabulary");
}

#[test]
fn truncation_and_padding_of_the_tokenizer_file_are_switched_off() {
    let changes = serde_json::json!({
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2, "pad_type_id": 0, "pad_token": "[UNK]"}
    });
    let (_folder, set) = super::mask::tests::tokenizer_with(&changes);
    let (_other, plain) = tokenizer();
    assert_eq!(set.encode("hi there yes").expect("tokens"), plain.encode("hi there yes").expect("tokens"));
}
