//! What the trainers of a job write, from their pods, as long as there are any.

use crds::FineTuneJob;
use crds::labels::{ATTEMPT_LABEL, CONTAINER, JOB_UID_LABEL, STAGE_LABEL};
use crds::run::PodStage;
use futures::AsyncBufReadExt;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{ListParams, LogParams};
use kube::runtime::wait::await_condition;

use crate::cluster::Cluster;
use crate::error::{Error, causes, explain};
use crate::text::{print, tell};

/// Which pod.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chosen {
    /// `None`: any that does the job's own work.
    pub stage: Option<PodStage>,
    /// `None`: the newest.
    pub attempt: Option<i32>,
}

/// The pods of a job, oldest first.
pub async fn pods_of(cluster: &Cluster, job: &FineTuneJob, chosen: Chosen) -> Result<Vec<Pod>, Error> {
    let found = cluster.pods().list(&ListParams::default().labels(&selector(job, chosen))).await;
    let mut pods = found.map_err(|error| explain(&error, &cluster.asked("list", "pods")))?.items;
    pods.retain(|pod| chosen.stage.is_some() || pod.labels().get(STAGE_LABEL).map(String::as_str) != Some("report"));
    pods.sort_by_key(|pod| (pod.creation_timestamp().map(|created| created.0), pod.name_any()));
    Ok(pods)
}

fn selector(job: &FineTuneJob, chosen: Chosen) -> String {
    let stage = chosen.stage.map(|stage| format!(",{STAGE_LABEL}={}", stage.name())).unwrap_or_default();
    let attempt = chosen.attempt.map(|attempt| format!(",{ATTEMPT_LABEL}={attempt}")).unwrap_or_default();
    format!("{JOB_UID_LABEL}={}{stage}{attempt}", job.uid().unwrap_or_default())
}

/// All that a pod wrote so far.
pub async fn text(cluster: &Cluster, pod: &Pod) -> Result<String, Error> {
    let parameters = LogParams { container: Some(CONTAINER.into()), ..LogParams::default() };
    let read = cluster.pods().logs(&pod.name_any(), &parameters).await;
    read.map_err(|error| explain(&error, &cluster.asked("get", "pods/log")))
}

/// Whether to go on reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// What is there.
    Once,
    /// Until the pod ends.
    Follow,
}

/// Copies the newest pod's log to standard output.
pub async fn logs(
    cluster: &Cluster,
    job: &FineTuneJob,
    chosen: Chosen,
    reading: Reading,
    tail: Option<i64>,
) -> Result<(), Error> {
    let Some(pod) = pods_of(cluster, job, chosen).await?.pop() else { return Err(Error::Nothing(no_pod(job, chosen))) };
    let name = pod.name_any();
    if !has_started(Some(&pod)) {
        if reading == Reading::Once {
            return Err(Error::Nothing(format!(
                "the pod {name} has not begun to run; -f waits for it, and kubectl finetune status {} -n {} says why",
                job.name_any(),
                cluster.namespace
            )));
        }
        tell(&format!("waiting for the pod {name}"));
        let started =
            await_condition(cluster.pods(), &name, |pod: Option<&Pod>| pod.is_none() || has_started(pod)).await;
        if started.map_err(|error| Error::Broken(format!("waiting for the pod {name}: {}", causes(&error))))?.is_none()
        {
            return Err(Error::Nothing(format!("the pod {name} was taken away before it ran")));
        }
    }
    let parameters = LogParams {
        container: Some(CONTAINER.into()),
        follow: reading == Reading::Follow,
        tail_lines: tail,
        ..LogParams::default()
    };
    let pods = cluster.pods();
    let stream = pods.log_stream(&name, &parameters).await;
    let mut stream = std::pin::pin!(stream.map_err(|error| explain(&error, &cluster.asked("get", "pods/log")))?);
    loop {
        let read = stream.fill_buf().await;
        let chunk = read.map_err(|error| Error::Broken(format!("the log of the pod {name} broke off: {error}")))?;
        if chunk.is_empty() {
            return Ok(());
        }
        print(chunk)?;
        let length = chunk.len();
        stream.consume_unpin(length);
    }
}

fn has_started(pod: Option<&Pod>) -> bool {
    let statuses = pod.and_then(|pod| pod.status.as_ref()?.container_statuses.as_ref());
    statuses.into_iter().flatten().any(|status| {
        status.name == CONTAINER
            && status.state.as_ref().is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    })
}

fn no_pod(job: &FineTuneJob, chosen: Chosen) -> String {
    let name = job.name_any();
    let what = match (chosen.stage, chosen.attempt) {
        (None, None) => String::new(),
        (Some(stage), None) => format!(" of stage {}", stage.name()),
        (None, Some(attempt)) => format!(" of attempt {attempt}"),
        (Some(stage), Some(attempt)) => format!(" of stage {}, attempt {attempt}", stage.name()),
    };
    let attempts = job.status.iter().flat_map(|status| &status.job_refs);
    let attempts: Vec<String> =
        attempts.into_iter().map(|attempt| format!("{} {}", attempt.stage.name(), attempt.attempt)).collect();
    let known = if attempts.is_empty() {
        "no attempt was begun yet".to_owned()
    } else {
        format!("attempts so far: {}; pods of old ones are gone", attempts.join(", "))
    };
    format!("{name} has no pod{what}; {known}\n{}", record_place(job))
}

/// Where the record of a run lies after its pods are gone.
pub fn record_place(job: &FineTuneJob) -> String {
    let status = job.status.as_ref();
    let Some(claim) = status.and_then(|status| status.resolved.as_ref()?.claim.clone()) else {
        return "there is no volume yet that could hold metrics.jsonl".into();
    };
    let path = job.spec.checkpoint.as_ref().and_then(|checkpoint| checkpoint.storage.as_ref()?.path.clone());
    let path = path.map_or(String::new(), |path| format!("{}/", path.trim_matches('/')));
    format!("every step is in {path}metrics.jsonl and {path}loss.svg on the claim {claim}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{job, training};

    #[test]
    fn pods_are_found_by_the_labels_that_they_are_given() {
        let chosen = Chosen { stage: Some(PodStage::Train), attempt: Some(2) };
        assert_eq!(
            selector(&training(), chosen),
            "finetune.dev/job-uid=u-1,app.kubernetes.io/component=train,finetune.dev/attempt=2"
        );
        assert_eq!(selector(&training(), Chosen::default()), "finetune.dev/job-uid=u-1");
    }

    #[test]
    fn a_pod_that_is_gone_is_said_to_be() {
        assert_eq!(
            no_pod(&training(), Chosen { stage: Some(PodStage::Train), attempt: Some(1) }),
            "support-bot has no pod of stage train, attempt 1; attempts so far: prepare 1, train 1, train 2; \
             pods of old ones are gone\n\
             every step is in metrics.jsonl and loss.svg on the claim support-bot-data"
        );
        let own = job("{checkpoint: {storage: {claim: shared, path: runs/bot}}}", "{resolved: {claim: shared}}");
        assert_eq!(
            record_place(&own),
            "every step is in runs/bot/metrics.jsonl and runs/bot/loss.svg on the claim shared"
        );
        assert_eq!(
            no_pod(&job("{}", "{}"), Chosen::default()),
            "support-bot has no pod; no attempt was begun yet\nthere is no volume yet that could hold metrics.jsonl"
        );
    }

    #[test]
    fn a_container_that_waits_has_no_log() {
        for (state, expected) in [
            (serde_json::json!({"waiting": {"reason": "ContainerCreating"}}), false),
            (serde_json::json!({"running": {}}), true),
            (serde_json::json!({"terminated": {"exitCode": 0}}), true),
        ] {
            let pod: Pod = serde_json::from_value(serde_json::json!({
                "metadata": {"name": "p"},
                "status": {"containerStatuses": [{
                    "name": CONTAINER, "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state,
                }]},
            }))
            .expect("a Pod");
            assert_eq!(has_started(Some(&pod)), expected);
        }
        assert!(!has_started(None));
    }
}
