//! Events have two forms: `events.k8s.io/v1`, in which they are kept, and the older one of the core.

use serde_json::Value;

use super::kind::{Kind, Place};

/// Fields that have another name in the core.
const NAMES: [(&str, &str); 6] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedCount", "count"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
];

/// An object as it is told at a place.
pub fn show(object: &Value, place: &Place) -> Value {
    translate(object, place, |names| names)
}

/// An object as it is kept that was sent to a place.
pub fn keep(object: &Value, place: &Place) -> Value {
    translate(object, place, |(ours, core)| (core, ours))
}

fn translate(
    object: &Value,
    place: &Place,
    direction: fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Value {
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
    object
}
