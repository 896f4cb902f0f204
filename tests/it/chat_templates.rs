//! Chat templates render to the bytes that transformers renders, and the bytes that are trained are those that it marks
//! (`tests/golden/chat_templates.py`).

use std::collections::BTreeMap;

use harness::{read_golden, repository};
use serde::Deserialize;
use serde_json::{Value, json};
use trainer::data::chat_template::ChatTemplate;
use trainer::data::example::Example;
use trainer::data::format::Content;
use trainer::data::mask::{self, Tokeniser};
use trainer::data::tokenizer::Tokenizer;
use trainer::store::files::digest_of;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Conversation {
    name: String,
    messages: Vec<Value>,
    tools: Option<Value>,
    #[serde(default)]
    generation_prompt: bool,
}

#[derive(Deserialize)]
struct Golden {
    date: jiff::civil::DateTime,
    special: BTreeMap<String, String>,
    conversations: Vec<Conversation>,
    templates: BTreeMap<String, Vec<String>>,
    /// End-of-turn tokens by template.
    stops: BTreeMap<String, Vec<String>>,
    /// Trained byte spans by template, for each conversation with an answer.
    masks: BTreeMap<String, Vec<String>>,
}

#[test]
fn every_template_renders_to_the_same_bytes() {
    let golden: Golden = read_golden("chat_templates.json");
    let folder = repository().join(".test-data/chat_templates");
    assert!(folder.exists(), "{} is missing: run `make test-data`", folder.display());
    let special: Vec<(String, String)> = golden.special.into_iter().collect();
    let mut differences = Vec::new();
    let mut renderings = 0;
    for (name, expected) in &golden.templates {
        let source = std::fs::read_to_string(folder.join(name)).expect("a template of the wheel");
        let template = ChatTemplate::new(&source, &special, golden.date);
        for (conversation, expected) in golden.conversations.iter().zip(expected) {
            renderings += 1;
            let rendered = template.as_ref().map_err(ToString::to_string).and_then(|template| {
                let tools = conversation.tools.as_ref();
                template
                    .render(&conversation.messages, tools, conversation.generation_prompt)
                    .map_err(|error| error.to_string())
            });
            let same = match &rendered {
                Ok(rendered) => digest_of(rendered.text.as_bytes()) == format!("sha256:{expected}"),
                Err(_) => expected == "raises",
            };
            if !same {
                let found = rendered.map_or_else(|error| error, |rendered| rendered.text);
                differences.push(format!("{name}, {}: expected {expected}, found {found:?}", conversation.name));
            }
        }
    }
    assert!(differences.is_empty(), "{} of {renderings} differ:\n{}", differences.len(), differences.join("\n"));
    assert!(renderings >= 360, "{renderings} renderings");
}

/// A tokenizer of single bytes, but for the special tokens and `stops`, which end turns.
fn byte_tokenizer(special: &BTreeMap<String, String>, stops: &[String]) -> (tempfile::TempDir, Tokenizer) {
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocabulary: serde_json::Map<String, Value> =
        alphabet.iter().enumerate().map(|(id, symbol)| (symbol.to_string(), id.into())).collect();
    let mut added = Vec::new();
    for content in special.values().chain(stops.iter().filter(|stop| !special.values().any(|text| text == *stop))) {
        let id = vocabulary.len();
        vocabulary.insert(content.clone(), id.into());
        added.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    }
    let ends: Vec<&Value> = stops.iter().map(|stop| &vocabulary[stop]).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []}
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write =
        |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).expect("writable");
    write("tokenizer.json", &tokenizer);
    write("tokenizer_config.json", &json!({"bos_token": special["bos_token"]}));
    write("generation_config.json", &json!({"eos_token_id": ends}));
    let tokenizer = Tokenizer::open(folder.path()).expect("valid");
    (folder, tokenizer)
}

/// The byte spans of trained tokens, as the golden file writes them.
fn spans(example: &Example, tokenizer: &Tokenizer) -> String {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    let mut start = 0;
    for (token, trained) in example.tokens.iter().zip(&example.trained) {
        // The alphabet's ids come first, one for each byte.
        let length = if *token < 256 { 1 } else { tokenizer.decode_with_special(&[*token]).expect("a token").len() };
        let end = start + length;
        match spans.last_mut().filter(|last| *trained && last.1 == start) {
            Some(last) => last.1 = end,
            None => spans.extend(trained.then_some((start, end))),
        }
        start = end;
    }
    spans.iter().map(|(start, end)| format!("{start}-{end}")).collect::<Vec<_>>().join(",")
}

#[test]
fn every_template_trains_the_same_bytes() {
    let golden: Golden = read_golden("chat_templates.json");
    let folder = repository().join(".test-data/chat_templates");
    assert!(folder.exists(), "{} is missing: run `make test-data`", folder.display());
    let special: Vec<(String, String)> = golden.special.clone().into_iter().collect();
    let answered: Vec<&Conversation> =
        golden.conversations.iter().filter(|conversation| !conversation.generation_prompt).collect();
    let mut differences = Vec::new();
    let (mut masks, mut agreeing) = (0, BTreeMap::new());
    for (name, expected) in &golden.masks {
        let source = std::fs::read_to_string(folder.join(name)).expect("a template of the wheel");
        let template = ChatTemplate::new(&source, &special, golden.date).expect("valid");
        let (_folder, tokenizer) = byte_tokenizer(&golden.special, &golden.stops[name]);
        let tokeniser = Tokeniser { tokenizer: &tokenizer, template: Some(&template) };
        for (conversation, expected) in answered.iter().zip(expected) {
            masks += 1;
            let messages = conversation.messages.clone();
            let trained = messages.iter().map(|message| message["role"] == "assistant").collect();
            let content = Content::Messages { messages, tools: conversation.tools.clone(), trained };
            let result = tokeniser.example(&content);
            let found = match &result {
                Ok(example) => spans(example, &tokenizer),
                Err(mask::Error::Template(_)) => "raises".to_owned(),
                Err(_) => "refused".to_owned(),
            };
            if found != *expected {
                let reason = result.err().map(|error| error.to_string()).unwrap_or_default();
                differences.push(format!("{name}, {}: expected {expected}, found {found} {reason}", conversation.name));
            } else if result.is_ok() {
                *agreeing.entry(name).or_insert(0) += 1;
            }
        }
    }
    assert!(differences.is_empty(), "{} of {masks} differ:\n{}", differences.len(), differences.join("\n"));
    assert!(agreeing.len() >= 50, "only {} templates have a mask", agreeing.len());
}
