//! What each endpoint does. Nothing here waits.

use axum::body::Body;
use axum::http::Response;
use serde_json::{Value, json};

use super::ApiServer;
use super::call::Call;
use super::event;
use super::fault::Verb;
use super::kind::Kind;
use super::schema::Schema;
use super::selector::Selector;
use super::store::{Author, Key, Preconditions, Refusal};

/// An answer that is complete.
pub struct Answer {
    /// HTTP code.
    pub code: u16,
    /// The body.
    pub body: Value,
}

impl Answer {
    /// A `Status` of the API.
    pub fn status(refusal: &Refusal) -> Self {
        let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": refusal.reason,
                          "message": refusal.message, "code": refusal.code});
        Self { code: refusal.code, body }
    }

    /// As it goes over the wire.
    pub fn response(&self) -> Response<Body> {
        let response = Response::builder().status(self.code).header("content-type", "application/json");
        response.body(Body::from(self.body.to_string())).expect("an answer")
    }
}

/// What is answered where nothing is served.
pub fn not_served() -> Response<Body> {
    let response = Response::builder().status(404).header("content-type", "text/plain");
    response.body(Body::from("404 page not found\n")).expect("an answer")
}

/// Does what is asked, and answers.
pub fn answer(server: &ApiServer, call: &Call) -> Answer {
    let done = match call.verb {
        Verb::Get => get(server, call).map(|found| (200, found)),
        Verb::List => Ok((200, list(server, call))),
        Verb::Create => create(server, call).map(|made| (201, made)),
        Verb::Update => update(server, call).map(|made| (200, made)),
        Verb::Patch => patch(server, call).map(|made| (200, made)),
        Verb::Delete => delete(server, call).map(|status| (200, status)),
        Verb::Watch => unreachable!("a watch is answered by a stream"),
    };
    match done {
        Ok((code, object)) => Answer { code, body: object },
        Err(refusal) => {
            let is_status = call.place.resource() == "finetunejobs/status";
            if is_status && refusal.code != 404 && refusal.code != 409 {
                server.state().invariants.breach(format!("a status that no API server takes: {}", refusal.message));
            }
            Answer::status(&refusal)
        }
    }
}

fn key(call: &Call) -> Key {
    Key::new(call.place.kind, call.place.namespace.as_deref().unwrap_or_default(), call.name())
}

fn get(server: &ApiServer, call: &Call) -> Result<Value, Refusal> {
    let key = key(call);
    let state = server.state();
    let found = state.store.get(&key).ok_or_else(|| Refusal::not_found(&key))?;
    Ok(event::show(found, &call.place))
}

fn list(server: &ApiServer, call: &Call) -> Value {
    let selector = Selector::new(call.parameter("labelSelector"), call.parameter("fieldSelector"));
    let limit = call.parameter("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
    let after = call.parameter("continue").unwrap_or_default();
    let state = server.state();
    let mut items = Vec::new();
    let mut last = String::new();
    let mut go_on = String::new();
    for (key, object) in state.store.list(call.place.kind, call.place.namespace.as_deref()) {
        let place = format!("{}/{}", key.namespace, key.name);
        let shown = event::show(object, &call.place);
        if place.as_str() <= after && !after.is_empty() || !selector.selects(&shown) {
            continue;
        }
        if items.len() == limit {
            go_on.clone_from(&last);
            break;
        }
        last = place;
        items.push(shown);
    }
    let kind = format!("{}List", call.place.kind.name());
    let metadata = json!({"resourceVersion": state.store.version().to_string(), "continue": go_on});
    json!({"kind": kind, "apiVersion": call.place.api_version(), "metadata": metadata, "items": items})
}

fn create(server: &ApiServer, call: &Call) -> Result<Value, Refusal> {
    let object = event::keep(&call.body, &call.place);
    let mut key = key(call);
    if let (true, Some(prefix)) = (key.name.is_empty(), object["metadata"]["generateName"].as_str()) {
        key.name = format!("{prefix}{:05}", server.state().store.version());
    }
    let object = server.admitted(key.kind, object)?;
    let made = server.write(|store, now| store.create(&key, object, Author::Operator, now))?;
    Ok(event::show(&made, &call.place))
}

fn update(server: &ApiServer, call: &Call) -> Result<Value, Refusal> {
    let object = event::keep(&call.body, &call.place);
    let version = object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
    store_changed(server, call, object, version.as_deref())
}

fn patch(server: &ApiServer, call: &Call) -> Result<Value, Refusal> {
    let key = key(call);
    let patch = event::keep(&call.body, &call.place);
    let found = server.state().store.get(&key).cloned();
    let version = patch["metadata"]["resourceVersion"].as_str().map(str::to_owned);
    let is_applied = call.content_type.starts_with("application/apply-patch");
    let Some(found) = found else {
        // Applying makes what is not there, but no status of it.
        return if is_applied && call.place.subresource.is_none() {
            create(server, call)
        } else {
            Err(Refusal::not_found(&key))
        };
    };
    let object = if is_applied && call.place.subresource.is_some() {
        // One manager owns all of a status: what it does not apply any more is gone.
        let mut object = found;
        object["status"] = patch["status"].clone();
        object
    } else {
        let mut object = found;
        merge(&mut object, &patch);
        object
    };
    store_changed(server, call, object, version.as_deref())
}

/// Keeps an object, or its status alone, as the endpoint has it.
fn store_changed(server: &ApiServer, call: &Call, mut object: Value, version: Option<&str>) -> Result<Value, Refusal> {
    let key = key(call);
    if key.kind == Kind::FineTuneJob {
        Schema::get().prune(&mut object);
        Schema::get().check(&object)?;
    }
    let before = server.state().store.version();
    let status = call.place.subresource.as_deref() == Some("status");
    let made = server.write(|store, _| {
        if status {
            store.replace_status(&key, object["status"].clone(), version, Author::Operator)
        } else {
            store.replace(&key, object, version, Author::Operator)
        }
    })?;
    let mut state = server.state();
    if status && key.kind == Kind::FineTuneJob && state.store.version() == before {
        state.invariants.breach(format!("the status of {key} was written as it was"));
    }
    drop(state);
    Ok(event::show(&made, &call.place))
}

/// JSON merge patch.
fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    let entries = object.as_object_mut().expect("it was made one");
    for (name, change) in changes {
        if change.is_null() {
            entries.remove(name);
        } else {
            merge(entries.entry(name).or_insert(Value::Null), change);
        }
    }
}

fn delete(server: &ApiServer, call: &Call) -> Result<Value, Refusal> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let wanted = Preconditions {
        uid: text(&call.body["preconditions"]["uid"]),
        version: text(&call.body["preconditions"]["resourceVersion"]),
    };
    // Without a word of it the pods of a Job are orphaned; for other kinds the garbage collector comes.
    let policy = call.body["propagationPolicy"].as_str();
    let with_children = policy.map_or(call.place.kind != Kind::Job, |policy| policy != "Orphan");
    let key = key(call);
    server.write(|store, now| store.delete(&key, &wanted, with_children, Author::Operator, now))?;
    Ok(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 200}))
}
