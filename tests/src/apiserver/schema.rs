//! What the API server holds a FineTuneJob to, whoever writes it: the CRD's schema, its keyed lists, and its rules.

use std::sync::LazyLock;

use crds::FineTuneJob;
use crds::check::{Scope, schema};
use serde_json::Value;

use super::store::Refusal;

/// That of the committed CRD: to read it takes longer than most simulations.
static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let schema = schema(Scope::Cluster);
    let validator = jsonschema::validator_for(&schema).expect("the CRD's schema is a JSON Schema");
    Schema { schema, validator }
});

/// The CRD's schema, ready to be asked.
#[derive(Debug)]
pub struct Schema {
    schema: Value,
    validator: jsonschema::Validator,
}

impl Schema {
    /// The only one.
    pub fn get() -> &'static Self {
        &SCHEMA
    }

    /// A new object: defaults are filled in, and what is wrong is refused.
    pub fn admit(&self, object: &Value) -> Result<Value, Refusal> {
        self.check(object)?;
        let name = &object["metadata"]["name"];
        let job: FineTuneJob =
            serde_json::from_value(object.clone()).map_err(|error| invalid(name, &error.to_string()))?;
        job.validate_cel().map_err(|errors| {
            let sentences: Vec<String> = errors.as_slice().iter().map(|error| error.message.clone()).collect();
            invalid(name, &sentences.join("; "))
        })?;
        let mut admitted = serde_json::to_value(job).expect("a job is JSON");
        // The type knows less of metadata than the API server.
        admitted["metadata"] = object["metadata"].clone();
        Ok(admitted)
    }

    /// Fields that the schema does not know are dropped without a word.
    pub fn prune(&self, object: &mut Value) {
        for name in ["spec", "status"] {
            if let Some(part) = object.get_mut(name) {
                prune(part, &self.schema["properties"][name]);
            }
        }
    }

    /// Whether an object may be stored so.
    pub fn check(&self, object: &Value) -> Result<(), Refusal> {
        let name = &object["metadata"]["name"];
        let mut problems: Vec<String> =
            self.validator.iter_errors(object).map(|error| format!("{}: {error}", error.instance_path())).collect();
        for part in ["spec", "status"] {
            doubled(&object[part], &self.schema["properties"][part], part, &mut problems);
        }
        if problems.is_empty() { Ok(()) } else { Err(invalid(name, &problems.join("; "))) }
    }
}

fn invalid(name: &Value, why: &str) -> Refusal {
    let message = format!("FineTuneJob.finetune.dev {name} is invalid: {why}");
    Refusal::new(422, "Invalid", message)
}

fn prune(value: &mut Value, schema: &Value) {
    match value {
        Value::Object(entries) => {
            let Some(properties) = schema["properties"].as_object() else {
                entries.values_mut().for_each(|value| prune(value, &schema["additionalProperties"]));
                return;
            };
            entries.retain(|name, _| properties.contains_key(name));
            for (name, value) in entries {
                prune(value, &properties[name]);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| prune(item, &schema["items"])),
        _ => {}
    }
}

/// Entries of lists that are keyed by name, of which there is a second one.
fn doubled(value: &Value, schema: &Value, path: &str, problems: &mut Vec<String>) {
    match value {
        Value::Object(entries) => {
            for (name, value) in entries {
                doubled(value, &schema["properties"][name], &format!("{path}.{name}"), problems);
            }
        }
        Value::Array(items) => {
            let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect();
            let mut seen: Vec<Vec<&Value>> = Vec::new();
            for (index, item) in items.iter().enumerate() {
                let key: Vec<&Value> = keys.iter().map(|key| &item[*key]).collect();
                if !keys.is_empty() && seen.contains(&key) {
                    problems.push(format!("{path}[{index}]: Duplicate value: {key:?}"));
                }
                seen.push(key);
                doubled(item, &schema["items"], &format!("{path}[{index}]"), problems);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check_status(status: &Value, expected: Option<&str>) {
        let spec = json!({"model": {"uri": "hf://a/b"}, "dataset": {"train": {"uri": "pvc://rows/a.jsonl"}}, "method": {"type": "LoRA"}});
        let job = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot"},
                         "spec": spec, "status": status});
        let found = Schema::get().check(&job).err().map(|refusal| refusal.message);
        assert_eq!(found.is_some(), expected.is_some(), "{found:?}");
        assert!(found.clone().unwrap_or_default().contains(expected.unwrap_or_default()), "{found:?}");
    }

    #[test]
    fn a_status_that_the_api_server_refuses_is_refused() {
        let metric = |name: &str| json!({"name": name, "value": "1"});
        check_status(&json!({"metrics": [metric("trainLoss"), metric("evalLoss")]}), None);
        check_status(&json!({"metrics": [metric(&"m".repeat(64))]}), Some("metrics"));
        check_status(&json!({"metrics": [metric("trainLoss"), metric("trainLoss")]}), Some("Duplicate"));
        check_status(&json!({"phase": "Dreaming"}), Some("phase"));
    }

    #[test]
    fn unknown_fields_are_dropped() {
        let mut job = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"profile": "p", "other": 1},
                             "status": {"phase": "Failed", "attempts": {"total": 1, "unheardOf": 2}}});
        Schema::get().prune(&mut job);
        assert_eq!(
            job,
            json!({"metadata": {"labels": {"a": "b"}}, "spec": {"profile": "p"},
                               "status": {"phase": "Failed", "attempts": {"total": 1}}})
        );
    }
}
