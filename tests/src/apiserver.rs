//! A Kubernetes API server and the rest of a cluster in one process, without sockets: the real controller runs against it through
//! a `kube::Client`. Requests can be refused, lost and left hanging by script, and the operator can die before and after each write.
//! It holds what a real one holds the operator to (versions, preconditions, the CRD's schema, owners), and what it answers can be
//! read in `answer.rs`; rights, admission by policy and conversion are for the real cluster of `tests/cluster`.

mod answer;
mod call;
mod clock;
pub mod cluster;
mod defaults;
mod event;
pub mod fault;
pub mod invariant;
mod kind;
mod life;
pub mod operator;
mod schema;
mod selector;
mod simulation;
mod store;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

pub use call::{Call, Noted};
pub use clock::Clock;
pub use fault::{Calls, Fault, Verb};
pub use kind::{Kind, Place};
pub use life::{About, Leaving, Life, Turn, Word};
pub use simulation::Simulation;
pub use store::{Author, Key, Preconditions, Refusal, Store};

use self::answer::{Answer, answer, not_served};
use self::fault::Faults;
use self::invariant::Invariants;
use self::operator::Incarnation;
use self::schema::Schema;

/// What went wrong on the way to the API server, or back.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The API server. Clones are the same one.
#[derive(Clone, Debug)]
pub struct ApiServer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    versions: tokio::sync::watch::Sender<u64>,
    clock: Clock,
}

/// Everything that it holds.
#[derive(Debug)]
struct State {
    store: Store,
    faults: Faults,
    invariants: Invariants,
    noted: Vec<Noted>,
    /// Versions of Kueue's API that are served.
    kueue: Vec<String>,
    webhooks: Vec<(Kind, fn(&mut Value))>,
    /// How often all watches were broken.
    epoch: u64,
}

impl ApiServer {
    /// An empty one.
    pub fn new(clock: Clock) -> Self {
        let state = State {
            store: Store::default(),
            faults: Faults::default(),
            invariants: Invariants::default(),
            noted: Vec::new(),
            kueue: Vec::new(),
            webhooks: Vec::new(),
            epoch: 0,
        };
        Self(Arc::new(Inner { state: Mutex::new(state), versions: tokio::sync::watch::Sender::new(0), clock }))
    }

    /// What time it is here.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Something goes wrong from now on.
    pub fn inject(&self, calls: Calls, fault: Fault) {
        self.state().faults.add(calls, fault);
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// From now on a webhook changes objects of a kind when they are made.
    pub fn admit(&self, kind: Kind, webhook: fn(&mut Value)) {
        self.state().webhooks.push((kind, webhook));
    }

    /// Serves these versions of Kueue's API; without them there is no such kind.
    pub fn serve_kueue(&self, versions: &[&str]) {
        self.state().kueue = versions.iter().map(|version| (*version).to_owned()).collect();
    }

    /// Ends all watches: whoever listened has to list anew.
    pub fn expire_watches(&self) {
        let mut state = self.state();
        state.epoch += 1;
        state.store.compact();
        self.0.versions.send_modify(|_| {});
    }

    /// All objects as they are now, as a backup of etcd has them.
    pub fn backup(&self) -> Store {
        self.state().store.clone()
    }

    /// All objects as they were: versions go on from there, and no watch does.
    pub fn restore(&self, backup: Store) {
        let mut state = self.state();
        state.store = backup;
        state.epoch += 1;
        self.0.versions.send_modify(|_| {});
    }

    /// An object.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.state().store.get(&Key::new(kind, namespace, name)).cloned()
    }

    /// All objects of a kind.
    pub fn list(&self, kind: Kind) -> Vec<Value> {
        self.state().store.list(kind, None).map(|(_, object)| object.clone()).collect()
    }

    /// Every state that objects of a place have had, oldest first.
    pub fn history(&self, key: &Key) -> Vec<Value> {
        let state = self.state();
        state
            .store
            .since(0)
            .iter()
            .filter(|change| change.key == *key)
            .filter_map(|change| change.after.clone())
            .collect()
    }

    /// Names of all objects of a kind that were ever made, oldest first.
    pub fn made(&self, kind: Kind) -> Vec<String> {
        let state = self.state();
        let made = state.store.since(0).iter().filter(|change| change.key.kind == kind && change.before.is_none());
        made.map(|change| change.key.name.clone()).collect()
    }

    /// Whether an object of these kinds changed after a version, or nobody can tell.
    pub fn changed_since(&self, version: u64, kinds: &[Kind]) -> bool {
        let state = self.state();
        version > state.store.version()
            || state.store.since(version).iter().any(|change| kinds.contains(&change.key.kind))
    }

    /// Somebody makes an object.
    pub fn create(&self, kind: Kind, object: Value, author: Author) -> Result<Value, Refusal> {
        let object = self.admitted(kind, object)?;
        let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
        let key = Key::new(kind, &text("namespace"), &text("name"));
        self.write(|store, now| store.create(&key, object, author, now))
    }

    /// An object as it is stored: with defaults, and with what webhooks made of it.
    fn admitted(&self, kind: Kind, mut object: Value) -> Result<Value, Refusal> {
        if kind == Kind::FineTuneJob {
            object = Schema::get().admit(&object)?;
        }
        defaults::fill(kind, &mut object);
        let webhooks = self.state().webhooks.clone();
        webhooks.into_iter().filter(|(of, _)| *of == kind).for_each(|(_, webhook)| webhook(&mut object));
        Ok(object)
    }

    /// Somebody edits an object: everything but its status.
    pub fn edit(&self, key: &Key, author: Author, edit: impl FnOnce(&mut Value)) -> Result<Value, Refusal> {
        self.write(|store, _| {
            let mut object = store.get(key).cloned().ok_or_else(|| Refusal::not_found(key))?;
            edit(&mut object);
            store.replace(key, object, None, author)
        })
    }

    /// Somebody edits the status of an object.
    pub fn edit_status(&self, key: &Key, author: Author, edit: impl FnOnce(&mut Value)) -> Result<Value, Refusal> {
        self.write(|store, _| {
            let mut object = store.get(key).cloned().ok_or_else(|| Refusal::not_found(key))?;
            edit(&mut object["status"]);
            store.replace_status(key, object["status"].clone(), None, author)
        })
    }

    /// Somebody deletes an object, and what it owns with it.
    pub fn delete(&self, key: &Key, author: Author) -> Result<Value, Refusal> {
        self.write(|store, now| store.delete(key, &Preconditions::default(), true, author, now))
    }

    /// What the operator asked for, in its order.
    pub fn noted(&self) -> Vec<Noted> {
        self.state().noted.clone()
    }

    /// What must hold and did not.
    pub fn broken(&self) -> Vec<String> {
        self.state().invariants.broken().to_vec()
    }

    /// Tells of every change.
    pub fn versions(&self) -> tokio::sync::watch::Receiver<u64> {
        self.0.versions.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes objects, looks at what must hold, and tells whoever listens.
    fn write<T>(&self, change: impl FnOnce(&mut Store, Timestamp) -> T) -> T {
        let mut state = self.state();
        let before = state.store.version();
        let result = change(&mut state.store, self.0.clock.now());
        let State { store, invariants, .. } = &mut *state;
        for change in store.since(before) {
            invariants.look_at(change, store);
        }
        if store.version() != before {
            let version = store.version();
            self.0.versions.send_replace(version);
        }
        result
    }

    /// Answers one request of an operator.
    async fn serve(
        self,
        incarnation: Incarnation,
        request: Request<kube::client::Body>,
    ) -> Result<Response<Body>, BoxError> {
        let (parts, body) = request.into_parts();
        let body: Bytes = body.collect_bytes().await?;
        incarnation.must_live().await;
        let Some(call) = Call::parse(&parts, &body).filter(|call| self.is_served(call)) else {
            return Ok(not_served());
        };
        let fault = self.state().faults.befall(&call);
        let before = self.state().store.version();
        let answered = match &fault {
            Some(fault) if !fault.is_done() => None,
            _ if call.verb == Verb::Watch => None,
            _ => Some(answer(&self, &call)),
        };
        let changed = self.state().store.version() != before;
        let refused = |code: u16, message: &str| Answer::status(&Refusal::new(code, reason_of(code), message));
        let told = match &fault {
            None => answered,
            Some(Fault::Refused(code, message)) => Some(refused(*code, message)),
            Some(Fault::DoneAndRefused(code)) => {
                Some(refused(*code, "the server was unable to return a response in the time allotted"))
            }
            Some(_) => None,
        };
        let code = told.as_ref().map(|answer| answer.code);
        let watched = fault.is_none() && call.verb == Verb::Watch;
        let noted =
            Noted { at: self.0.clock.now(), code: if watched { Some(200) } else { code }, changed, call: call.clone() };
        self.state().noted.push(noted);
        match fault {
            Some(Fault::Lost | Fault::DoneAndLost) => return Err("connection reset by peer".into()),
            Some(Fault::Hangs | Fault::DoneAndHangs) => std::future::pending().await,
            Some(Fault::CrashBefore | Fault::CrashAfter) => incarnation.die().await,
            None | Some(Fault::Refused(..) | Fault::DoneAndRefused(_)) => {}
        }
        Ok(match told {
            Some(answer) => answer.response(),
            None => Response::new(watch::body(&self, &call)),
        })
    }

    fn is_served(&self, call: &Call) -> bool {
        call.place.kind != Kind::Workload || self.state().kueue.contains(&call.place.version)
    }
}

fn reason_of(code: u16) -> &'static str {
    match code {
        400 => "BadRequest",
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        422 => "Invalid",
        429 => "TooManyRequests",
        504 => "Timeout",
        _ => "InternalError",
    }
}
