//! What a job is called: `metadata.name`, or what `metadata.generateName` makes. The API server appends five characters to such a
//! prefix, other ones at each `kubectl create`. Here they follow from the document, so that the same file is the same run and
//! goes on where it stopped, and another one is another run.

use serde_json::Value;

/// Characters that are appended.
const SUFFIX: usize = 5;
/// Of a prefix: the CRD allows 52 characters for a name.
const MAX_PREFIX: usize = 52 - SUFFIX;
/// Kubernetes' own choice: no vowels, which make words, and nothing that looks like something else.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// The name of a document's job, or the pointer of the field that is wrong and what is wrong with it.
pub(super) fn name_of(document: &Value) -> Result<String, (&'static str, String)> {
    let metadata = &document["metadata"];
    let (name, prefix) = (&metadata["name"], &metadata["generateName"]);
    let given = |value: &Value| !value.is_null() && value != "";
    if !given(name) && given(prefix) {
        let Some(text) = prefix.as_str().filter(|text| is_prefix(text)) else {
            let expected = "expected a prefix of lower-case letters, digits and '-', for example support-bot-";
            return Err(("/metadata/generateName", format!("found {prefix}, {expected}")));
        };
        if text.len() > MAX_PREFIX {
            let expected = format!("expected at most {MAX_PREFIX}: {SUFFIX} more are appended");
            return Err(("/metadata/generateName", format!("found {} characters, {expected}", text.len())));
        }
        return Ok(format!("{text}{}", suffix(document)));
    }
    if let Some(text) = name.as_str().filter(|text| is_subdomain(text)) {
        return Ok(text.to_owned());
    }
    let found = if name.is_null() { "\"\"".to_owned() } else { name.to_string() };
    let expected = "expected a name of lower-case letters, digits and '-', for example support-bot";
    Err(("/metadata/name", format!("found {found}, {expected}")))
}

/// What the API server asks of a name: the form of a host name.
fn is_subdomain(name: &str) -> bool {
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.split('.')
        .all(|label| label.starts_with(edge) && label.ends_with(edge) && label.chars().all(|c| edge(c) || c == '-'))
}

/// A prefix may end where a name may not.
fn is_prefix(prefix: &str) -> bool {
    !prefix.ends_with('.') && is_subdomain(&format!("{prefix}a"))
}

/// Five characters of what a document says; comments and layout are no part of that.
fn suffix(document: &Value) -> String {
    // FNV-1a: the names of runs on disk must not change with the compiler, as std's own hash may.
    let mut hash = document
        .to_string()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut next = || {
        let letter = ALPHABET[(hash % ALPHABET.len() as u64) as usize];
        hash /= ALPHABET.len() as u64;
        char::from(letter)
    };
    (0..SUFFIX).map(|_| next()).collect()
}
