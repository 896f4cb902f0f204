//! Leader election on a coordination.k8s.io Lease. There is no strict fencing in Kubernetes: a leader stops issuing writes
//! before its lease can be taken, and every status write names the version of the job that it was computed from.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::{Instant, sleep, timeout};

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

/// A lease that we try to hold.
#[derive(Debug)]
pub struct Elector {
    leases: Api<Lease>,
    settings: Settings,
    /// The last version that was seen, and since when.
    seen: Option<(String, Instant)>,
}

impl Elector {
    /// Holds nothing yet.
    pub fn new(client: Client, settings: Settings) -> Self {
        Self { leases: Api::namespaced(client, &settings.namespace), settings, seen: None }
    }

    /// Returns when the lease is ours.
    pub async fn acquire(&mut self) {
        loop {
            match timeout(self.settings.renew_deadline, self.try_hold()).await {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!("cannot take the lease {}: {error}", self.settings.name),
                Err(_) => tracing::warn!("the API server does not answer about the lease {}", self.settings.name),
            }
            sleep(self.settings.retry_period).await;
        }
    }

    /// Renews the lease; returns when it is lost, or could not be renewed in time.
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        loop {
            let left = self.settings.renew_deadline.saturating_sub(renewed.elapsed());
            sleep(self.settings.retry_period.min(left)).await;
            // Others count from the write, which may be long before its answer.
            let asked = Instant::now();
            let left = self.settings.renew_deadline.saturating_sub(renewed.elapsed());
            match timeout(left, self.try_hold()).await {
                Ok(Ok(true)) => renewed = asked,
                Ok(Ok(false)) => {
                    tracing::warn!("somebody else took the lease {}", self.settings.name);
                    return;
                }
                Ok(Err(error)) => tracing::warn!("cannot renew the lease {}: {error}", self.settings.name),
                Err(_) => {
                    tracing::warn!("the lease {} could not be renewed in time", self.settings.name);
                    return;
                }
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

    /// Whether the lease is ours now.
    async fn try_hold(&mut self) -> Result<bool, kube::Error> {
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
            Decision::Wait => Ok(false),
            Decision::Acquire | Decision::Renew => self.write(Some(lease)).await,
        }
    }

    async fn write(&mut self, lease: Option<Lease>) -> Result<bool, kube::Error> {
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
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(false),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_when_nobody_renews_it() {
        let held_by =
            |holder: Option<&str>| LeaseSpec { holder_identity: holder.map(str::to_owned), ..LeaseSpec::default() };
        let duration = Duration::from_secs(15);
        for (holder, unchanged, expected) in [
            (None, 0, Decision::Acquire),
            (Some(""), 0, Decision::Acquire),
            (Some("us"), 100, Decision::Renew),
            (Some("them"), 14, Decision::Wait),
            (Some("them"), 15, Decision::Acquire),
        ] {
            let found = decide(&held_by(holder), "us", Duration::from_secs(unchanged), duration);
            assert_eq!(found, expected, "{holder:?} unchanged for {unchanged} s");
        }
    }
}
