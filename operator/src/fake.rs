//! An API server that a test scripts: one function from request to answer, which may take its time.

use std::sync::Arc;

use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// What was asked.
#[derive(Clone, Debug)]
pub struct Request {
    /// For example `GET`.
    pub method: String,
    /// Without the query.
    pub path: String,
    /// Parameters, or nothing.
    pub query: String,
    /// What was sent, or null.
    pub body: Value,
}

impl Request {
    /// A watch, which goes on while its answer does.
    pub fn is_watch(&self) -> bool {
        self.query.contains("watch=true")
    }
}

/// A client of an API server that answers with a code and a text.
pub fn client<F>(answer: impl Fn(Request) -> F + Send + Sync + 'static) -> Client
where
    F: Future<Output = (u16, String)> + Send,
{
    let answer = Arc::new(answer);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let answer = Arc::clone(&answer);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
            let (code, text) = answer(Request {
                method: head.method.to_string(),
                path: head.uri.path().to_owned(),
                query: head.uri.query().unwrap_or_default().to_owned(),
                body: serde_json::from_slice(&body).unwrap_or_default(),
            })
            .await;
            let response = http::Response::builder().status(code).body(Body::from(text.into_bytes()));
            response.map_err(|error| error.to_string())
        }
    });
    Client::new(service, "team")
}

/// An answer that says no.
pub fn refusal(code: u16, reason: &str) -> (u16, String) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                        "message": format!("no: {reason}")});
    (code, status.to_string())
}
