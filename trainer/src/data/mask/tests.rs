//! Masks by position, with templates that agree with themselves and those that do not.

use serde_json::json;

use super::*;

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
    let expected = "messages[1]: the template marks \"no<|im_end|>\" as the answer, and adds \"yes no<|im_end|>\" to";
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
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [1, 900]}"#).expect("writable");
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
