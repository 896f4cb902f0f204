//! One time for everybody in a simulation: tokio's, which a test can pause, counted from the start.

use std::sync::Arc;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

/// Clones tell the same time.
#[derive(Clone, Debug)]
pub struct Clock(Arc<(Timestamp, Instant)>);

impl Clock {
    /// Begins now.
    pub fn new() -> Self {
        Self(Arc::new((Timestamp::now(), Instant::now())))
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        let (began, instant) = *self.0;
        began + SignedDuration::try_from(instant.elapsed()).expect("no simulation lasts for ever")
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}
