//! Rows as users write them, and what each wrong one is refused with.

use super::*;

fn read(text: impl AsRef<[u8]>) -> Result<Vec<Row>, String> {
    read_as(text, DataFormat::Auto)
}

fn read_as(text: impl AsRef<[u8]>, format: DataFormat) -> Result<Vec<Row>, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, text).expect("writable");
    read_rows(&path, format).map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

#[test]
fn openai_rows_are_read_unchanged() {
    let row = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"b\":1,\"a\":2}"}}]},{"role":"tool","tool_call_id":"1","content":"3"},{"role":"assistant","content":"x","weight":0},{"role":"assistant","content":"done"}],"tools":[{"type":"function"}]}"#;
    let rows = read(format!("\n{row}\n")).expect("valid");
    let Content::Messages { messages, tools, trained } = &rows[0].content else { panic!("messages") };
    assert_eq!((rows[0].line, trained.as_slice()), (2, &[false, true, false, false, true][..]));
    assert_eq!(messages[0]["content"], "hi");
    assert_eq!(messages[1]["tool_calls"][0]["function"]["arguments"].to_string(), r#"{"b":1,"a":2}"#);
    assert!(messages[3].get("weight").is_none() && tools.is_some());
}

const ANSWERED: &str = r#"{"role":"user","content":"q"},{"role":"assistant","content":"a"}"#;

#[test]
fn the_format_that_is_asked_for_chooses() {
    let row = format!(r#"{{"text":"whole","messages":[{ANSWERED}]}}"#);
    assert!(read(&row).expect_err("two formats").contains("fits two formats at once ([Messages, Text])"));
    let chosen = read_as(&row, DataFormat::Messages).expect("messages");
    assert!(matches!(chosen[0].content, Content::Messages { .. }));
    let chosen = read_as(&row, DataFormat::Text).expect("text");
    assert_eq!(chosen[0].content, Content::Text("whole".into()));
    assert_eq!(
        read_as(&row, DataFormat::PromptCompletion).expect_err("no prompt"),
        "rows.jsonl:1:1: the row has no `prompt` (its keys: `text`, `messages`); expected one, as dataset format \
         PromptCompletion was asked for: mend the row or the format"
    );
    assert!(read_as(&row, DataFormat::Alpaca).expect_err("later").contains("not supported yet"));
}

#[test]
fn tools_of_prompt_and_completion_lists_are_kept() {
    let row = r#"{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"a"}],"tools":[{"type":"function"}]}"#;
    let rows = read(row).expect("valid");
    let Content::Messages { tools, trained, .. } = &rows[0].content else { panic!("messages") };
    assert_eq!((tools.is_some(), trained.as_slice()), (true, &[false, true][..]));
}

#[test]
fn null_and_empty_are_as_absent() {
    let message = |more: &str| {
        format!(r#"{{"messages":[{{"role":"user","content":"q","weight":null}},{{"role":"assistant",{more}}}]}}"#)
    };
    let rows = read(message(r#""content":"a","weight":null,"tool_calls":[]"#)).expect("valid");
    let Content::Messages { messages, trained, .. } = &rows[0].content else { panic!("messages") };
    assert_eq!(trained, &[false, true]);
    assert_eq!(messages[1].to_string(), r#"{"role":"assistant","content":"a"}"#);
    for calls in ["[]", "null"] {
        let empty = message(&format!(r#""content":"","tool_calls":{calls}"#));
        assert!(read(&empty).expect_err("nothing to learn").contains("messages[1]: the answer is empty"));
    }
}

#[test]
fn odd_tool_calls_are_refused_and_never_panic() {
    for (calls, expected) in [
        (r#"["x"]"#, "tool_calls[0]: found a string, expected an object with function"),
        (r#"[{"function":"f"}]"#, "tool_calls[0]: function is a string; expected an object with name and arguments"),
        (r#"[{"function":{"arguments":{}}}]"#, "tool_calls[0]: the call has no name; expected the function's name"),
        (r#"[{"name":"f","arguments":"[1]"}]"#, "tool_calls[0]: arguments are a list; expected a JSON object"),
        (r#"[{"function":{"name":"f","arguments":"{"}}]"#, "tool_calls[0]: arguments are not valid JSON (EOF"),
        (r#""x""#, "tool_calls is a string; expected a list"),
    ] {
        let row = format!(
            r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":"a","tool_calls":{calls}}}]}}"#
        );
        let error = read(&row).expect_err(calls);
        assert!(error.starts_with(&format!("rows.jsonl:1:1: messages[1]: {expected}")), "{error}");
    }
    let row = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"name":"f","arguments":"{\"a\":1}"}]}]}"#;
    let rows = read(row).expect("a call without function");
    let Content::Messages { messages, .. } = &rows[0].content else { panic!("messages") };
    assert_eq!(messages[1]["tool_calls"][0].to_string(), r#"{"name":"f","arguments":{"a":1}}"#);
}

#[test]
fn refusals_name_line_column_and_remedy() {
    let message = |content: &str| format!(r#"{{"messages":[{{"role":"user","content":"q"}},{content}]}}"#);
    for (text, expected) in [
        (
            "{\"text\":\"a\"}\n{\"text\": }\n".to_owned(),
            "rows.jsonl:2:10: not valid JSON: expected value; expected one JSON object per line",
        ),
        (
            message(r#"{"role":"robot","content":"x"}"#),
            "rows.jsonl:1:1: messages[1]: role \"robot\"; expected system, developer, user, assistant or tool",
        ),
        (
            message(r#"{"role":"assistant","content":" "}"#),
            "rows.jsonl:1:1: messages[1]: the answer is empty; expected text to learn, or weight: 0",
        ),
        (
            message(r#"{"role":"user","content":"x","weight":1}"#),
            "rows.jsonl:1:1: messages[1]: weight on a user message; only assistant messages have one",
        ),
        (
            message(r#"{"role":"user","content":"x"}"#),
            "rows.jsonl:1:1: no message has role assistant; expected at least one answer to learn",
        ),
        (
            r#"{"text":"a","prompt":"b","completion":"c"}"#.to_owned(),
            "rows.jsonl:1:1: the row fits two formats at once ([PromptCompletion, Text]); keep the keys of one, or say which in dataset format",
        ),
        (
            r#"{"question":"a"}"#.to_owned(),
            "rows.jsonl:1:1: the keys `question` fit no format; expected `messages`, `prompt` and `completion`, or `text`",
        ),
        (
            "{\"text\":\"a\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}".to_owned(),
            "rows.jsonl:2:1: the row has format PromptCompletion, line 1 has format Text; one file holds one format",
        ),
        ("[1]".to_owned(), "rows.jsonl:1:1: found a list, expected a JSON object"),
        (
            r#"{"conversations":[]}"#.to_owned(),
            "rows.jsonl:1:1: not supported yet: dataset format ShareGPT; convert the rows to messages",
        ),
        ("\n".to_owned(), "rows.jsonl: no rows; expected one JSON object per line"),
    ] {
        assert_eq!(read(&text).expect_err(&text), expected);
    }
    assert!(read(b"{\"text\":\"\xff\"}").expect_err("UTF-8").starts_with("rows.jsonl:1:10: not valid UTF-8"));
    assert!(read(b"\xef\xbb\xbf{}").expect_err("BOM").starts_with("rows.jsonl:1:1: a byte order mark"));
}
