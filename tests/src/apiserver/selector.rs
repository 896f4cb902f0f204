//! Label and field selectors, as far as anybody here uses them: one that is not understood fails the test that sent it.

use serde_json::Value;

/// Conditions that all must hold.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    Is(String, String),
    IsNot(String, String),
    Exists(String),
    Lacks(String),
    OneOf(String, Vec<String>),
}

impl Selector {
    /// From `labelSelector` and `fieldSelector` of a query.
    pub fn new(labels: Option<&str>, fields: Option<&str>) -> Self {
        let parse = |text: Option<&str>| text.map(requirements).unwrap_or_default();
        Self { labels: parse(labels), fields: parse(fields) }
    }

    /// Whether an object is selected.
    pub fn selects(&self, object: &Value) -> bool {
        let label = |name: &str| object["metadata"]["labels"].get(name).and_then(Value::as_str).map(str::to_owned);
        let field = |path: &str| {
            let found = path.split('.').fold(object, |value, name| &value[name]);
            // A field that is not set is empty.
            Some(
                found
                    .as_str()
                    .map_or_else(|| if found.is_null() { String::new() } else { found.to_string() }, str::to_owned),
            )
        };
        self.labels.iter().all(|one| one.holds(&label)) && self.fields.iter().all(|one| one.holds(&field))
    }
}

impl Requirement {
    fn holds(&self, value_of: &dyn Fn(&str) -> Option<String>) -> bool {
        match self {
            Self::Is(name, value) => value_of(name).as_ref() == Some(value),
            Self::IsNot(name, value) => value_of(name).as_ref() != Some(value),
            Self::Exists(name) => value_of(name).is_some(),
            Self::Lacks(name) => value_of(name).is_none(),
            Self::OneOf(name, values) => value_of(name).is_some_and(|value| values.contains(&value)),
        }
    }
}

fn requirements(text: &str) -> Vec<Requirement> {
    let mut found = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        // The commas of `in (a,b)` part nothing.
        let inside = rest.find('(').filter(|open| rest.find(',').is_none_or(|comma| *open < comma));
        let from = inside.and_then(|open| rest[open..].find(')').map(|close| open + close)).unwrap_or(0);
        let end = rest[from..].find(',').map_or(rest.len(), |comma| from + comma);
        found.push(requirement(rest[..end].trim()));
        rest = rest[end..].trim_start_matches(',').trim();
    }
    found
}

fn requirement(text: &str) -> Requirement {
    let own = |(name, value): (&str, &str)| (name.trim().to_owned(), value.trim().to_owned());
    if let Some((name, value)) = text.split_once("!=").map(own) {
        return Requirement::IsNot(name, value);
    }
    if let Some((name, value)) = text.split_once("==").or_else(|| text.split_once('=')).map(own) {
        return Requirement::Is(name, value);
    }
    if let Some((name, values)) = text.split_once(" in ") {
        let values = values.trim().trim_matches(['(', ')']).split(',').map(|value| value.trim().to_owned());
        return Requirement::OneOf(name.trim().to_owned(), values.collect());
    }
    assert!(!text.contains([' ', '(']), "the fake API server does not know the selector {text:?}");
    text.strip_prefix('!')
        .map_or_else(|| Requirement::Exists(text.to_owned()), |name| Requirement::Lacks(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_are_selected_by_labels_and_fields() {
        let pod = json!({"metadata": {"name": "p", "labels": {"app": "trainer", "tier": ""}}, "status": {"phase": "Running"}});
        for (labels, fields, expected) in [
            ("app=trainer", "", true),
            ("app==trainer,tier", "status.phase=Running", true),
            ("app in (trainer, other),tier", "metadata.name=p", true),
            ("app in (other)", "", false),
            ("!app", "", false),
            ("app!=trainer", "", false),
            ("", "spec.nodeName=", true),
            ("", "status.phase!=Running", false),
        ] {
            assert_eq!(Selector::new(Some(labels), Some(fields)).selects(&pod), expected, "{labels} {fields}");
        }
    }
}
