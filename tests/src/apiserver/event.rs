//! Events have two forms: `events.k8s.io/v1`, in which they are kept, and the older one of the core.

use serde_json::{Value, json};

use super::kind::{Kind, Place};

/// A field's name in either form.
type Names = (&'static str, &'static str);

/// Fields that have another name in the core.
const NAMES: [Names; 6] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedCount", "count"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
];

/// An object as it is told at a place.
pub fn show(object: &Value, place: &Place) -> Value {
    translate(object, place, "v1", |names| names)
}

/// An object as it is kept that was sent to a place.
pub fn keep(object: &Value, place: &Place) -> Value {
    translate(object, place, "events.k8s.io/v1", |(ours, core)| (core, ours))
}

fn translate(object: &Value, place: &Place, version: &str, direction: fn(Names) -> Names) -> Value {
    let mut object = object.clone();
    if place.kind != Kind::Event || !place.group.is_empty() {
        return object;
    }
    let entries = object.as_object_mut().expect("an object of the API is a map");
    for (from, to) in NAMES.map(direction) {
        if let Some(value) = entries.remove(from) {
            entries.insert(to.into(), value);
        }
    }
    entries.insert("apiVersion".into(), json!(version));
    object
}
