//! The objects, one version counter over all of them, and every change since the beginning. What writes mean is decided here, for
//! the operator, for the cluster and for users alike; who may ask how is the business of the endpoints.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::kind::Kind;

/// Where an object is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Empty for objects of the cluster.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    /// A place.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        Self { kind, namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}/{}", self.kind.plural(), self.namespace, self.name)
    }
}

/// Who writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Author {
    /// What is tested.
    Operator,
    /// Job controller, kubelet, garbage collector, scheduler.
    Cluster,
    /// Somebody with rights in the namespace.
    User,
}

/// What changed at one version.
#[derive(Clone, Debug)]
pub struct Change {
    /// The version that the change made.
    pub version: u64,
    /// What changed.
    pub key: Key,
    /// Absent: it was created.
    pub before: Option<Value>,
    /// Absent: it was deleted.
    pub after: Option<Value>,
    /// By whom.
    pub author: Author,
}

/// A request that is not done, as the API server says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP code.
    pub code: u16,
    /// `reason` of the Status.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    /// There is no such object.
    pub fn not_found(key: &Key) -> Self {
        Self::new(404, "NotFound", format!("{} {:?} not found", key.kind.plural(), key.name))
    }

    fn conflict(key: &Key, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {:?}: {why}", key.kind.plural(), key.name);
        Self::new(409, "Conflict", message)
    }
}

/// What a deletion asks for beside the name.
#[derive(Clone, Debug, Default)]
pub struct Preconditions {
    /// Only the object with this UID.
    pub uid: Option<String>,
    /// Only the object at this version.
    pub version: Option<String>,
}

/// All objects. A copy of it is what a backup of etcd is.
#[derive(Clone, Debug, Default)]
pub struct Store {
    /// As many as there are changes.
    version: u64,
    made: u64,
    objects: BTreeMap<Key, Value>,
    changes: Vec<Change>,
    /// Watches from before this version are told that it is gone.
    compacted: u64,
}

impl Store {
    /// The newest version.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The oldest version from which a watch can go on.
    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Forgets how things came to be as they are.
    pub fn compact(&mut self) {
        self.compacted = self.version;
    }

    /// What changed after a version.
    pub fn since(&self, version: u64) -> &[Change] {
        let seen = usize::try_from(version).unwrap_or(usize::MAX).min(self.changes.len());
        &self.changes[seen..]
    }

    /// An object.
    pub fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    /// Objects of a kind, in a namespace or in all.
    pub fn list(&self, kind: Kind, namespace: Option<&str>) -> impl Iterator<Item = (&Key, &Value)> {
        let namespace = namespace.map(str::to_owned);
        self.objects
            .iter()
            .filter(move |(key, _)| key.kind == kind && namespace.as_ref().is_none_or(|name| *name == key.namespace))
    }

    /// The object with a UID.
    pub fn by_uid(&self, uid: &str) -> Option<(&Key, &Value)> {
        self.objects.iter().find(|(_, object)| object["metadata"]["uid"] == uid)
    }

    /// Makes an object.
    pub fn create(&mut self, key: &Key, mut object: Value, author: Author, now: Timestamp) -> Result<Value, Refusal> {
        if self.objects.contains_key(key) {
            let message = format!("{} {:?} already exists", key.kind.plural(), key.name);
            return Err(Refusal::new(409, "AlreadyExists", message));
        }
        self.made += 1;
        if author != Author::Cluster && key.kind.has_status() && key.kind != Kind::Node {
            remove(&mut object, "status");
        }
        let metadata = entries(&mut object, "metadata");
        metadata.insert("name".into(), json!(key.name));
        if key.kind.is_namespaced() {
            metadata.insert("namespace".into(), json!(key.namespace));
        }
        metadata.insert("uid".into(), json!(format!("{:08x}-0000-4000-8000-000000000000", self.made)));
        metadata.insert("creationTimestamp".into(), json!(seconds(now)));
        metadata.insert("generation".into(), json!(1));
        Ok(self.put(key, object, author))
    }

    /// Replaces everything of an object but its status. `version`: what it was computed from.
    pub fn replace(
        &mut self,
        key: &Key,
        mut object: Value,
        version: Option<&str>,
        author: Author,
    ) -> Result<Value, Refusal> {
        let before = self.at_version(key, version)?;
        let status = before.get("status").cloned();
        if key.kind.has_status() {
            match status {
                Some(status) => entries_of(&mut object).insert("status".into(), status),
                None => entries_of(&mut object).remove("status"),
            };
        }
        let changed = object.get("spec") != before.get("spec");
        let metadata = entries(&mut object, "metadata");
        for name in ["uid", "creationTimestamp", "resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds"] {
            match before["metadata"].get(name) {
                Some(value) => metadata.insert(name.into(), value.clone()),
                None => metadata.remove(name),
            };
        }
        let generation = before["metadata"]["generation"].as_i64().unwrap_or(1) + i64::from(changed);
        metadata.insert("generation".into(), json!(generation));
        Ok(self.put_if_changed(key, object, author))
    }

    /// Replaces the status of an object and nothing else.
    pub fn replace_status(
        &mut self,
        key: &Key,
        status: Value,
        version: Option<&str>,
        author: Author,
    ) -> Result<Value, Refusal> {
        let mut object = self.at_version(key, version)?;
        entries_of(&mut object).insert("status".into(), status);
        Ok(self.put_if_changed(key, object, author))
    }

    /// Deletes an object. Pods stay until their node lets go of them, which [`Store::remove`] tells. What an object owned goes with
    /// it where `with_children` says so, and is nobody's otherwise.
    pub fn delete(
        &mut self,
        key: &Key,
        wanted: &Preconditions,
        with_children: bool,
        author: Author,
        now: Timestamp,
    ) -> Result<Value, Refusal> {
        let before = self.at_version(key, wanted.version.as_deref())?;
        let uid = before["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        if let Some(wanted) = wanted.uid.as_ref().filter(|wanted| **wanted != uid) {
            let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}");
            return Err(Refusal::conflict(key, &why));
        }
        if key.kind == Kind::Pod && is_on_node(&before) {
            return Ok(self.ask_to_end(key, before, author, now));
        }
        self.remove(key, author);
        if with_children {
            self.collect(&uid, now);
        } else {
            self.orphan(&uid);
        }
        Ok(before)
    }

    /// An object is gone.
    pub fn remove(&mut self, key: &Key, author: Author) {
        if let Some(before) = self.objects.remove(key) {
            self.note(key, Some(before), None, author);
        }
    }

    fn ask_to_end(&mut self, key: &Key, mut pod: Value, author: Author, now: Timestamp) -> Value {
        if pod["metadata"]["deletionTimestamp"].is_string() {
            return pod;
        }
        let grace = pod["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
        let ends = now + k8s_openapi::jiff::SignedDuration::from_secs(grace);
        let metadata = entries(&mut pod, "metadata");
        metadata.insert("deletionTimestamp".into(), json!(seconds(ends)));
        metadata.insert("deletionGracePeriodSeconds".into(), json!(grace));
        self.put(key, pod, author)
    }

    fn owned_by(&self, owner: &str) -> Vec<Key> {
        let owned = self.objects.iter().filter(|(_, object)| owners(object).any(|uid| uid == owner));
        owned.map(|(key, _)| key.clone()).collect()
    }

    /// What the garbage collector does when an owner is gone.
    fn collect(&mut self, owner: &str, now: Timestamp) {
        for key in self.owned_by(owner) {
            self.delete(&key, &Preconditions::default(), true, Author::Cluster, now).expect("it was listed");
        }
    }

    fn orphan(&mut self, owner: &str) {
        for key in self.owned_by(owner) {
            let mut object = self.objects[&key].clone();
            let references = object["metadata"]["ownerReferences"].as_array_mut().expect("it has owners");
            references.retain(|reference| reference["uid"] != owner);
            self.put(&key, object, Author::Cluster);
        }
    }

    fn at_version(&self, key: &Key, version: Option<&str>) -> Result<Value, Refusal> {
        let found = self.objects.get(key).ok_or_else(|| Refusal::not_found(key))?;
        if version.is_some_and(|version| found["metadata"]["resourceVersion"] != version) {
            return Err(Refusal::conflict(
                key,
                "the object has been modified; please apply your changes to the latest version and try again",
            ));
        }
        Ok(found.clone())
    }

    fn put_if_changed(&mut self, key: &Key, object: Value, author: Author) -> Value {
        if self.objects.get(key) == Some(&object) { object } else { self.put(key, object, author) }
    }

    fn put(&mut self, key: &Key, mut object: Value, author: Author) -> Value {
        let version = self.version + 1;
        entries(&mut object, "metadata").insert("resourceVersion".into(), json!(version.to_string()));
        let before = self.objects.insert(key.clone(), object.clone());
        self.note(key, before, Some(object.clone()), author);
        object
    }

    fn note(&mut self, key: &Key, before: Option<Value>, after: Option<Value>, author: Author) {
        self.version += 1;
        self.changes.push(Change { version: self.version, key: key.clone(), before, after, author });
    }
}

/// As `metadata` has times: without fractions of a second.
pub fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn owners(object: &Value) -> impl Iterator<Item = &str> {
    let references = object["metadata"]["ownerReferences"].as_array();
    references.into_iter().flatten().filter_map(|reference| reference["uid"].as_str())
}

fn is_on_node(pod: &Value) -> bool {
    pod["spec"]["nodeName"].is_string() && !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

fn remove(object: &mut Value, name: &str) {
    entries_of(object).remove(name);
}

fn entries_of(object: &mut Value) -> &mut Map<String, Value> {
    object.as_object_mut().expect("an object of the API is a map")
}

fn entries<'a>(object: &'a mut Value, name: &str) -> &'a mut Map<String, Value> {
    let value = entries_of(object).entry(name).or_insert_with(|| json!({}));
    value.as_object_mut().expect("an object of the API has maps at its top")
}
