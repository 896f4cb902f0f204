//! Changes as a stream of lines, until the client's time-out.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures::stream;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::ApiServer;
use super::call::Call;
use super::kind::Place;
use super::selector::Selector;
use super::store::Change;

/// Where a client does not say how long it listens.
const TIMEOUT: Duration = Duration::from_mins(5);

struct Watch {
    server: ApiServer,
    place: Place,
    selector: Selector,
    /// The newest version that was told.
    position: u64,
    /// When all watches were broken last.
    epoch: u64,
    until: Instant,
    ended: bool,
}

/// The body of the answer to a watch.
pub fn body(server: &ApiServer, call: &Call) -> Body {
    let seconds = call.parameter("timeoutSeconds").and_then(|seconds| seconds.parse().ok());
    let asked = call.parameter("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let state = server.state();
    let watch = Watch {
        server: server.clone(),
        place: call.place.clone(),
        selector: Selector::new(call.parameter("labelSelector"), call.parameter("fieldSelector")),
        // What was compacted, or is not there yet, can only be read anew.
        position: if asked < state.store.compacted() || asked > state.store.version() { u64::MAX } else { asked },
        epoch: state.epoch,
        until: Instant::now() + seconds.map_or(TIMEOUT, Duration::from_secs),
        ended: false,
    };
    drop(state);
    Body::from_stream(stream::unfold(watch, async |watch| watch.next().await))
}

impl Watch {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        if self.ended {
            return None;
        }
        let mut versions = self.server.versions();
        loop {
            versions.borrow_and_update();
            let lines = self.lines();
            if !lines.is_empty() {
                return Some((Ok(Bytes::from(lines)), self));
            }
            tokio::select! {
                changed = versions.changed() => changed.expect("the server lives as long as its watches"),
                () = tokio::time::sleep_until(self.until) => {
                    self.ended = true;
                    let version = self.position.to_string();
                    let kind = self.place.kind.name();
                    let object = json!({"kind": kind, "apiVersion": self.place.api_version(), "metadata": {"resourceVersion": version}});
                    return Some((Ok(Bytes::from(line("BOOKMARK", &object))), self));
                }
            }
        }
    }

    fn lines(&mut self) -> String {
        let state = self.server.state();
        if self.position == u64::MAX || state.epoch != self.epoch {
            self.ended = true;
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired",
                                "message": "too old resource version", "code": 410});
            return line("ERROR", &status);
        }
        let changes = state.store.since(self.position);
        let lines = changes.iter().filter_map(|change| self.told(change)).collect();
        self.position = state.store.version();
        lines
    }

    fn told(&self, change: &Change) -> Option<String> {
        let here = self.place.namespace.as_ref().is_none_or(|namespace| *namespace == change.key.namespace);
        if change.key.kind != self.place.kind || !here {
            return None;
        }
        let shown = |object: &Option<Value>| {
            let object = super::event::show(object.as_ref()?, &self.place);
            self.selector.selects(&object).then_some(object)
        };
        match (shown(&change.before), shown(&change.after)) {
            (None, Some(after)) => Some(line("ADDED", &after)),
            (Some(_), Some(after)) => Some(line("MODIFIED", &after)),
            (Some(mut before), None) => {
                before["metadata"]["resourceVersion"] = json!(change.version.to_string());
                Some(line("DELETED", &before))
            }
            (None, None) => None,
        }
    }
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}
