//! Chat templates render to the bytes that transformers renders (`tests/golden/chat_templates.py`).

use std::collections::BTreeMap;

use harness::{read_golden, repository};
use serde::Deserialize;
use serde_json::Value;
use trainer::checkpoint::digest_of;
use trainer::data::chat_template::ChatTemplate;

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
