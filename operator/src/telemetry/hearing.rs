//! What the API server answers to lists and watches: the only place where a watch that is silent for good can be told from one
//! that has nothing to say, and a namespace that is gone from one that is merely late.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::StatusCode;
use k8s_openapi::jiff::Timestamp;
use prometheus::GaugeVec;

use super::Telemetry;

/// Kinds that are watched; each has to be heard of.
const WATCHED: [&str; 3] = ["finetunejobs", "jobs", "pods"];

/// A kind, and the namespace in which it is watched; `None` for all.
type Watched = (&'static str, Option<String>);

/// What is known of one watch.
#[derive(Clone, Copy, Debug, Default)]
struct Answers {
    /// When a list or watch last began well.
    well: Option<Instant>,
    /// The last one was forbidden. A role goes with its namespace, so this is how one that is gone answers.
    refused: bool,
}

/// What was heard of every watch.
pub(super) struct Ear {
    heard: GaugeVec,
    refused: GaugeVec,
    answers: Mutex<HashMap<Watched, Answers>>,
}

impl Ear {
    /// Tells by two gauges: when each kind was last heard of, and which namespaces are refused.
    pub fn new(heard: GaugeVec, refused: GaugeVec) -> Self {
        Self { heard, refused, answers: Mutex::default() }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Watched, Answers>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A namespace, or all, is watched from now on.
    pub fn listen_to(&self, namespace: Option<&str>) {
        let is_refused = is_refused(&self.answers(), namespace);
        self.refused.with_label_values(&[namespace.unwrap_or_default()]).set(f64::from(u8::from(is_refused)));
    }

    /// Nothing is watched any more.
    pub fn forget(&self) {
        self.answers().clear();
        self.refused.reset();
    }

    /// Takes the answer to a list or watch.
    pub fn note(&self, watched: Watched, answer: StatusCode) {
        let namespace = watched.1.clone();
        let mut answers = self.answers();
        let was_refused = is_refused(&answers, namespace.as_deref());
        if answer.is_success() {
            let labels = [watched.0, namespace.as_deref().unwrap_or_default()];
            self.heard.with_label_values(&labels).set(Timestamp::now().as_second() as f64);
            answers.insert(watched, Answers { well: Some(Instant::now()), refused: false });
        } else if answer == StatusCode::FORBIDDEN {
            answers.entry(watched).or_default().refused = true;
        }
        let Some(namespace) = namespace else { return };
        let is_refused = is_refused(&answers, Some(&namespace));
        if is_refused == was_refused {
            return;
        }
        self.refused.with_label_values(&[&namespace]).set(f64::from(u8::from(is_refused)));
        if is_refused {
            tracing::warn!(
                "the namespace {namespace} is not served: the API server refuses every list, so it is gone or the operator's \
                 Role in it is; take it out of the namespaces to watch, or make it again and upgrade the release"
            );
        } else {
            tracing::info!("the namespace {namespace} is served again");
        }
    }

    /// The longest silence of what is watched and not refused.
    pub fn silence(&self) -> Duration {
        let answers = self.answers();
        let silences = answers
            .iter()
            .filter(|((_, namespace), _)| !is_refused(&answers, namespace.as_deref()))
            .filter_map(|(_, answers)| answers.well.as_ref().map(Instant::elapsed));
        silences.max().unwrap_or_default()
    }

    /// Whether every kind was heard of in every one of `namespaces` that is not refused, and there is such a one.
    pub fn has_heard_all<'a>(&self, namespaces: impl Iterator<Item = &'a Option<String>>) -> bool {
        let answers = self.answers();
        let is_heard = |namespace: &Option<String>| {
            let heard = |kind| answers.get(&(kind, namespace.clone())).is_some_and(|answers| answers.well.is_some());
            WATCHED.into_iter().all(heard)
        };
        let mut served = namespaces.filter(|namespace| !is_refused(&answers, namespace.as_deref())).peekable();
        served.peek().is_some() && served.all(is_heard)
    }
}

/// Whether all of a namespace is refused. Of one that misses a single right, some would be acted on and some not seen: that one
/// is not left out, and the operator is not ready.
fn is_refused(answers: &HashMap<Watched, Answers>, namespace: Option<&str>) -> bool {
    namespace.is_some_and(|namespace| {
        let refused =
            |kind| answers.get(&(kind, Some(namespace.to_owned()))).is_some_and(|answers: &Answers| answers.refused);
        WATCHED.into_iter().all(refused)
    })
}

/// Notes the answers to all lists and watches of a client.
#[derive(Clone)]
pub struct HearingLayer(pub Arc<Telemetry>);

impl<S> tower::Layer<S> for HearingLayer {
    type Service = Hearing<S>;

    fn layer(&self, inner: S) -> Hearing<S> {
        Hearing { inner, telemetry: Arc::clone(&self.0) }
    }
}

/// See [`HearingLayer`].
#[derive(Clone)]
pub struct Hearing<S> {
    inner: S,
    telemetry: Arc<Telemetry>,
}

impl<S, A, B> tower::Service<http::Request<A>> for Hearing<S>
where
    S: tower::Service<http::Request<A>, Response = http::Response<B>>,
    S::Future: Send + 'static,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<A>) -> Self::Future {
        let watched = watched(request.uri().path()).filter(|_| request.method() == http::Method::GET);
        let (telemetry, answer) = (Arc::clone(&self.telemetry), self.inner.call(request));
        Box::pin(async move {
            let answer = answer.await?;
            if let Some(watched) = watched {
                telemetry.ear.note(watched, answer.status());
            }
            Ok(answer)
        })
    }
}

/// What a collection's path asks for: it ends in the kind, after the namespace if it is of one.
fn watched(path: &str) -> Option<Watched> {
    let mut parts = path.rsplit('/');
    let last = parts.next()?;
    let kind = WATCHED.into_iter().find(|kind| *kind == last)?;
    match (parts.next(), parts.next()) {
        // One namespace, of that name.
        (Some("namespaces"), _) => None,
        (Some(namespace), Some("namespaces")) => Some((kind, Some(namespace.to_owned()))),
        _ => Some((kind, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::STUCK_AFTER;
    use super::*;

    /// A replica that leads and watches these namespaces.
    fn leader(namespaces: &[&str]) -> Arc<Telemetry> {
        let telemetry = Telemetry::new().expect("series register");
        telemetry.set_leader(true);
        for namespace in namespaces {
            telemetry.add_store(Some((*namespace).to_owned()), kube::runtime::reflector::store().0);
        }
        telemetry
    }

    fn answer(telemetry: &Telemetry, namespace: &str, kinds: &[&'static str], answer: StatusCode) {
        for kind in kinds {
            telemetry.ear.note((kind, Some(namespace.to_owned())), answer);
        }
    }

    fn refused(telemetry: &Telemetry, namespace: &str) -> f64 {
        telemetry.ear.refused.with_label_values(&[namespace]).get()
    }

    #[test]
    fn health_is_hearing() {
        let standby = Telemetry::new().expect("series register");
        assert!(standby.is_ready(), "a standby waits");
        let telemetry = leader(&[]);
        assert!(!telemetry.is_ready(), "nothing is watched yet");
        let telemetry = leader(&["a", "b"]);
        for namespace in ["a", "b"] {
            assert!(!telemetry.is_ready());
            answer(&telemetry, namespace, &WATCHED, StatusCode::OK);
        }
        assert!(telemetry.is_ready() && telemetry.silence() < Duration::from_secs(5));
        let long_ago = Instant::now().checked_sub(Duration::from_mins(15)).expect("a machine that runs for longer");
        let of_a = ("pods", Some("a".to_owned()));
        telemetry.ear.answers().insert(of_a, Answers { well: Some(long_ago), refused: false });
        assert!(telemetry.silence() > STUCK_AFTER, "one kind that is silent in one namespace is enough");
        telemetry.set_leader(false);
        assert_eq!(telemetry.silence(), Duration::ZERO);
    }

    #[test]
    fn a_namespace_that_is_gone_keeps_no_other_unready() {
        let telemetry = leader(&["here", "gone"]);
        answer(&telemetry, "here", &WATCHED, StatusCode::OK);
        answer(&telemetry, "gone", &["finetunejobs", "jobs"], StatusCode::FORBIDDEN);
        assert!(!telemetry.is_ready(), "one kind may yet be heard of");
        answer(&telemetry, "gone", &["pods"], StatusCode::FORBIDDEN);
        assert!(telemetry.is_ready());
        assert_eq!((refused(&telemetry, "gone"), refused(&telemetry, "here")), (1.0, 0.0));

        // It is made again.
        answer(&telemetry, "gone", &["pods"], StatusCode::OK);
        assert!(!telemetry.is_ready() && refused(&telemetry, "gone") == 0.0);
        answer(&telemetry, "gone", &WATCHED, StatusCode::OK);
        assert!(telemetry.is_ready());
    }

    #[test]
    fn a_namespace_that_goes_while_it_is_served_is_no_silence() {
        let telemetry = leader(&["here", "gone"]);
        for namespace in ["here", "gone"] {
            answer(&telemetry, namespace, &WATCHED, StatusCode::OK);
        }
        let long_ago = Instant::now().checked_sub(Duration::from_mins(15)).expect("a machine that runs for longer");
        for kind in WATCHED {
            let old = Answers { well: Some(long_ago), refused: false };
            telemetry.ear.answers().insert((kind, Some("gone".to_owned())), old);
        }
        answer(&telemetry, "gone", &["jobs", "pods"], StatusCode::FORBIDDEN);
        assert!(telemetry.silence() > STUCK_AFTER, "a right that is missing is not a namespace that is gone");
        answer(&telemetry, "gone", &["finetunejobs"], StatusCode::FORBIDDEN);
        assert!(telemetry.silence() < Duration::from_secs(5) && telemetry.is_ready());
    }

    #[test]
    fn who_serves_nothing_is_not_ready() {
        let telemetry = leader(&["gone"]);
        answer(&telemetry, "gone", &WATCHED, StatusCode::FORBIDDEN);
        assert!(!telemetry.is_ready());
        // Of all namespaces no one can be gone: the right is missing. And a kind that is not found is a CRD that is.
        let telemetry = leader(&[]);
        telemetry.add_store(None, kube::runtime::reflector::store().0);
        for kind in WATCHED {
            telemetry.ear.note((kind, None), StatusCode::FORBIDDEN);
            telemetry.ear.note((kind, None), StatusCode::NOT_FOUND);
        }
        assert!(!telemetry.is_ready() && refused(&telemetry, "") == 0.0);
    }

    #[test]
    fn a_collection_is_told_by_its_path() {
        assert_eq!(watched("/api/v1/pods"), Some(("pods", None)));
        assert_eq!(watched("/apis/batch/v1/namespaces/team/jobs"), Some(("jobs", Some("team".to_owned()))));
        assert_eq!(watched("/apis/batch/v1/namespaces/team/jobs/bot-train-1"), None);
        assert_eq!(watched("/api/v1/namespaces/jobs"), None, "a namespace of that name is none");
    }
}
