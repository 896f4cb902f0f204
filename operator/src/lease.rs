//! Leader election on a coordination.k8s.io Lease. There is no strict fencing in Kubernetes: a leader stops issuing writes
//! before its lease can be taken, and every status write names the version of the job that it was computed from.

#[cfg(test)]
mod tests;

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How the lease is held.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Who we are: the pod's name.
    pub identity: String,
    /// Others wait so long after the last renewal that they saw.
    pub lease_duration: Duration,
    /// We give up so long after our last renewal. Shorter than `lease_duration`.
    pub renew_deadline: Duration,
    /// Between two attempts.
    pub retry_period: Duration,
}

/// What to do about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nobody holds it: write ourselves in.
    Acquire,
    /// It is ours: renew it.
    Renew,
    /// Somebody else holds it.
    Wait,
}

/// Decides by the lease as it is, and by how long it has been so by our own clock: other clocks are not trusted.
pub fn decide(spec: &LeaseSpec, identity: &str, unchanged_for: Duration, lease_duration: Duration) -> Decision {
    match spec.holder_identity.as_deref() {
        None | Some("") => Decision::Acquire,
        Some(holder) if holder == identity => Decision::Renew,
        Some(_) if unchanged_for >= lease_duration => Decision::Acquire,
        Some(_) => Decision::Wait,
    }
}

/// What became of an attempt to hold a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// It is ours.
    Ours,
    /// Somebody else holds it.
    Theirs,
    /// Somebody wrote between our look and our write.
    Unclear,
}

/// A lease that we try to hold.
#[derive(Debug)]
pub struct Elector {
    leases: Api<Lease>,
    settings: Settings,
    /// The last version that was seen, and since when.
    seen: Option<(String, Instant)>,
    /// When the last write was begun that made it ours.
    renewed: Instant,
}

impl Elector {
    /// Holds nothing yet.
    pub fn new(client: Client, settings: Settings) -> Self {
        Self { leases: Api::namespaced(client, &settings.namespace), settings, seen: None, renewed: Instant::now() }
    }

    /// Returns when the lease is ours.
    pub async fn acquire(&mut self) {
        let patience = (self.settings.renew_deadline / 3).max(self.settings.retry_period);
        loop {
            // Others count from the write, which may be long before its answer.
            self.renewed = Instant::now();
            match timeout(patience, self.try_hold()).await {
                Ok(Ok(Held::Ours)) => return,
                Ok(Ok(Held::Theirs | Held::Unclear)) => {}
                Ok(Err(error)) => tracing::warn!("cannot take the lease {}: {error}", self.settings.name),
                Err(_) => tracing::warn!("the API server does not answer about the lease {}", self.settings.name),
            }
            sleep(self.settings.retry_period).await;
        }
    }

    /// Renews the lease; returns when it is lost, or could not be renewed in time.
    pub async fn keep(&mut self) {
        let mut asked = self.renewed;
        loop {
            let give_up = self.renewed + self.settings.renew_deadline;
            sleep_until(give_up.min(asked + self.settings.retry_period)).await;
            asked = Instant::now();
            let left = give_up.saturating_duration_since(asked);
            if left.is_zero() {
                tracing::warn!("the lease {} could not be renewed in time", self.settings.name);
                return;
            }
            // One request that hangs, at a server or a balancer that is gone, leaves time for others.
            let patience = (left / 3).max(self.settings.retry_period).min(left);
            match timeout(patience, self.try_hold()).await {
                Ok(Ok(Held::Ours)) => self.renewed = asked,
                Ok(Ok(Held::Theirs)) => {
                    tracing::warn!("somebody else took the lease {}", self.settings.name);
                    return;
                }
                // The next look says who wrote: it may be a try of ours that was given up.
                Ok(Ok(Held::Unclear)) => {}
                Ok(Err(error)) => tracing::warn!("cannot renew the lease {}: {error}", self.settings.name),
                Err(_) => tracing::warn!("the API server does not answer about the lease {}", self.settings.name),
            }
        }
    }

    /// Gives the lease back, so that the next leader need not wait. Work has stopped before.
    pub async fn release(&mut self) {
        let given_back = async {
            let mut lease = self.leases.get(&self.settings.name).await?;
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.settings.identity) {
                spec.holder_identity = Some(String::new());
                self.leases.replace(&self.settings.name, &PostParams::default(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        match timeout(self.settings.retry_period, given_back).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the lease was not given back: {error}"),
            Err(_) => tracing::warn!("the lease was not given back: the API server does not answer"),
        }
    }

    /// Takes or renews the lease if it may.
    async fn try_hold(&mut self) -> Result<Held, kube::Error> {
        let Some(mut lease) = self.leases.get_opt(&self.settings.name).await? else {
            return self.write(None).await;
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != version) {
            self.seen = Some((version, Instant::now()));
        }
        let unchanged_for = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
        let spec = lease.spec.get_or_insert_default();
        match decide(spec, &self.settings.identity, unchanged_for, self.settings.lease_duration) {
            Decision::Wait => Ok(Held::Theirs),
            Decision::Acquire | Decision::Renew => self.write(Some(lease)).await,
        }
    }

    async fn write(&mut self, lease: Option<Lease>) -> Result<Held, kube::Error> {
        let parameters = PostParams::default();
        let written = match lease {
            None => {
                let metadata = ObjectMeta { name: Some(self.settings.name.clone()), ..ObjectMeta::default() };
                let lease = Lease { metadata, spec: Some(self.held(None)) };
                self.leases.create(&parameters, &lease).await
            }
            Some(mut lease) => {
                // The version goes along: whoever wrote in between wins.
                lease.spec = Some(self.held(lease.spec.as_ref()));
                self.leases.replace(&self.settings.name, &parameters, &lease).await
            }
        };
        match written {
            Ok(_) => Ok(Held::Ours),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(Held::Unclear),
            Err(error) => Err(error),
        }
    }

    fn held(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let ours = before.is_some_and(|spec| spec.holder_identity.as_deref() == Some(&self.settings.identity));
        LeaseSpec {
            holder_identity: Some(self.settings.identity.clone()),
            lease_duration_seconds: i32::try_from(self.settings.lease_duration.as_secs()).ok(),
            acquire_time: before.filter(|_| ours).map_or(Some(now.clone()), |spec| spec.acquire_time.clone()),
            renew_time: Some(now),
            lease_transitions: Some(
                before.and_then(|spec| spec.lease_transitions).unwrap_or(0) + i32::from(before.is_some() && !ours),
            ),
            ..LeaseSpec::default()
        }
    }
}
