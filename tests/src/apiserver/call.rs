//! A request as it was understood, and what is noted of it.

use std::collections::HashMap;

use axum::body::Bytes;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::fault::Verb;
use super::kind::Place;

/// A request.
#[derive(Clone, Debug)]
pub struct Call {
    /// What is asked for.
    pub verb: Verb,
    /// Of what.
    pub place: Place,
    /// The query of the URL.
    pub query: HashMap<String, String>,
    /// Media type of the body.
    pub content_type: String,
    /// The body; null if there is none.
    pub body: Value,
}

impl Call {
    /// From a request; none if nothing is served at its path.
    pub fn parse(parts: &axum::http::request::Parts, body: &Bytes) -> Option<Self> {
        let place = Place::parse(parts.uri.path())?;
        let query = query_of(parts.uri.query().unwrap_or_default());
        let watches = query.get("watch").is_some_and(|value| value == "true" || value == "1");
        let verb = match (parts.method.as_str(), &place.name) {
            ("GET", Some(_)) => Verb::Get,
            ("GET", None) if watches => Verb::Watch,
            ("GET", None) => Verb::List,
            ("POST", _) => Verb::Create,
            ("PUT", Some(_)) => Verb::Update,
            ("PATCH", Some(_)) => Verb::Patch,
            ("DELETE", Some(_)) => Verb::Delete,
            (method, _) => panic!("the fake API server does not know {method} {}", parts.uri),
        };
        let content_type = parts.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(body).expect("clients send JSON") };
        Some(Self { verb, place, query, content_type: content_type.to_owned(), body })
    }

    /// Name of the object that is asked for, or is to be made.
    pub fn name(&self) -> &str {
        self.place.name.as_deref().or_else(|| self.body["metadata"]["name"].as_str()).unwrap_or_default()
    }

    /// A parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.verb.name(), self.place.resource())?;
        if self.name().is_empty() { Ok(()) } else { write!(formatter, " {}", self.name()) }
    }
}

/// What became of a request of the operator.
#[derive(Clone, Debug)]
pub struct Noted {
    /// When.
    pub at: Timestamp,
    /// Which.
    pub call: Call,
    /// The answer's code; absent where none was given.
    pub code: Option<u16>,
    /// Whether something changed.
    pub changed: bool,
}

impl std::fmt::Display for Noted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let code = self.code.map_or_else(|| "no answer".to_owned(), |code| code.to_string());
        write!(formatter, "{:.1} {} -> {code}", self.at, self.call)
    }
}

fn query_of(text: &str) -> HashMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decode(name), decode(value))).collect()
}

/// Undoes the encoding of forms.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let hexadecimal = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match (first, hexadecimal.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(*first),
        }
        rest = after;
    }
    String::from_utf8(bytes).expect("clients send UTF-8")
}
