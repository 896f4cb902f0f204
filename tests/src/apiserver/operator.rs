//! The operator under test: started, killed at any point, and started anew on the same server.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Request;
use kube::Client;
use operator::controller::{Shared, run};
use operator::facts::Timing;
use operator::observe::progress::Intervals;
use operator::recorder::Recorder;
use operator::telemetry::Telemetry;
use tokio::sync::watch;

use super::ApiServer;

/// Longest time that the API server may take to begin an answer, as in the real process.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// From one life to the next.
const RESTART: Duration = Duration::from_secs(1);

/// One life of an operator. What it asks for after its end reaches nobody.
#[derive(Clone, Debug)]
pub struct Incarnation(Arc<watch::Sender<bool>>);

impl Incarnation {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new(true)))
    }

    /// Never returns to a dead one.
    pub async fn must_live(&self) {
        if !*self.0.borrow() {
            std::future::pending::<()>().await;
        }
    }

    /// The process ends here.
    pub async fn die(&self) {
        self.0.send_replace(false);
        std::future::pending::<()>().await;
    }

    async fn ended(&self) {
        let mut lives = self.0.subscribe();
        lives.wait_for(|lives| !lives).await.expect("it is held here");
    }
}

/// An operator that is started again whenever it ends, as a Deployment does.
#[derive(Debug)]
pub struct Operator {
    /// Whether it is to run.
    wanted: Arc<watch::Sender<bool>>,
    /// How often it was started.
    starts: Arc<watch::Sender<usize>>,
    task: tokio::task::JoinHandle<()>,
}

impl Operator {
    /// Starts it with a file of profiles.
    pub fn start(server: &ApiServer, profiles: &str) -> Self {
        let profiles = crds::profile::parse(profiles).expect("a file of profiles");
        let (wanted, starts) = (Arc::new(watch::Sender::new(true)), Arc::new(watch::Sender::new(0)));
        let (server, is_wanted, counted) = (server.clone(), Arc::clone(&wanted), Arc::clone(&starts));
        let task = tokio::spawn(async move {
            let mut is_wanted = is_wanted.subscribe();
            loop {
                is_wanted.wait_for(|wanted| *wanted).await.expect("it is held by the operator");
                counted.send_modify(|starts| *starts += 1);
                let incarnation = Incarnation::new();
                tokio::select! {
                    () = run(shared(&server, &incarnation, &profiles), None) => {}
                    () = incarnation.ended() => {}
                    _ = is_wanted.wait_for(|wanted| !wanted) => {}
                }
                // Passes that were under way are tasks of their own: their requests reach nobody.
                incarnation.0.send_replace(false);
                tokio::time::sleep(RESTART).await;
            }
        });
        Self { wanted, starts, task }
    }

    /// Kills it, and keeps it down.
    pub fn stop(&self) {
        self.wanted.send_replace(false);
    }

    /// Lets it run again.
    pub fn resume(&self) {
        self.wanted.send_replace(true);
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        *self.starts.borrow()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn shared(server: &ApiServer, incarnation: &Incarnation, profiles: &crds::profile::Profiles) -> Shared {
    let client = client(server, incarnation);
    let clock = server.clock().clone();
    Shared {
        recorder: Recorder::new(client.clone(), "finetune-operator-0".into()),
        client,
        profiles: profiles.clone(),
        timing: Timing { first_backoff: Duration::from_secs(10) },
        intervals: Intervals { poll: Duration::from_secs(15), write: Duration::from_secs(30) },
        telemetry: Telemetry::new().expect("series"),
        clock: Arc::new(move || clock.now()),
    }
}

fn client(server: &ApiServer, incarnation: &Incarnation) -> Client {
    let (server, incarnation) = (server.clone(), incarnation.clone());
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        server.clone().serve(incarnation.clone(), request)
    });
    Client::new(tower::timeout::Timeout::new(service, CALL_DEADLINE), "default")
}
