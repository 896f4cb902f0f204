//! Following one job through the API's watch, until it ends or enough time went by.

use std::time::Duration;

use crds::FineTuneJob;
use crds::finetunejob::Phase;
use crds::status::{duration, is_trouble};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use kube::ResourceExt;
use kube::runtime::{WatchStreamExt, watcher};

use crate::cluster::Cluster;
use crate::error::{Error, explain, is_final};
use crate::outcome::{Outcome, has_reached, outcome};
use crate::table::metric;
use crate::text::{clean, print, tell};

/// When following ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// With the job.
    End,
    /// In a phase, or with the job.
    Phase(Phase),
}

/// Where what happens is shown.
pub enum Shown {
    /// A bar that is drawn again and again.
    Bar(Box<ProgressBar>),
    /// One line a change.
    Lines,
    /// Nowhere.
    Nothing,
}

impl Shown {
    /// A bar on a terminal, lines elsewhere.
    pub fn on(terminal: bool) -> Self {
        if !terminal {
            return Self::Lines;
        }
        Self::Bar(Box::new(ProgressBar::new(0).with_style(bar_style(0))))
    }
}

/// Until the steps are planned there is nothing to fill a bar with.
fn bar_style(total_steps: i64) -> ProgressStyle {
    let template = if total_steps > 0 { "step {pos}/{len} [{bar:30}] {msg}" } else { "{msg}" };
    ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> ")
}

/// Follows a job that was just read; returns how that ended, and the job as it was then.
pub async fn follow(
    cluster: &Cluster,
    job: FineTuneJob,
    until: Until,
    timeout: Option<Duration>,
    shown: Shown,
) -> Result<(Outcome, FineTuneJob), Error> {
    let name = job.name_any();
    let mut show = Show { shown, last: String::new(), job: job.clone() };
    let following = watch(cluster, job, until, &mut show);
    let followed = tokio::select! {
        followed = following => followed,
        () = elapsed(timeout) => Ok(Outcome::TimedOut),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.map_err(|error| Error::Broken(format!("no signals: {error}")))?;
            Ok(Outcome::Interrupted)
        }
    };
    if let Shown::Bar(bar) = &show.shown {
        bar.finish_and_clear();
    }
    let namespace = &cluster.namespace;
    match &followed {
        Ok(Outcome::Interrupted) => tell(&format!(
            "no longer following; the job goes on\n  \
             end it and keep what was learned: kubectl finetune stop {name} -n {namespace}\n  \
             remove it:                        kubectl delete finetunejob {name} -n {namespace}"
        )),
        Ok(Outcome::TimedOut) => {
            tell(&format!("{name} has not ended after {}", duration(timeout.unwrap_or_default().as_secs() as i64)));
        }
        Ok(Outcome::Deleted) => tell(&format!("{name} was deleted")),
        _ => {}
    }
    followed.map(|outcome| (outcome, show.job))
}

async fn elapsed(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

async fn watch(cluster: &Cluster, job: FineTuneJob, until: Until, show: &mut Show) -> Result<Outcome, Error> {
    let (name, uid) = (job.name_any(), job.uid());
    if let Some(end) = look(&job, until, show)? {
        return Ok(end);
    }
    let mut changes = std::pin::pin!(watcher::watch_object(cluster.jobs(), &name).default_backoff());
    let mut connected = true;
    while let Some(change) = changes.next().await {
        match change {
            Ok(Some(job)) if job.uid() == uid => {
                connected = true;
                if let Some(end) = look(&job, until, show)? {
                    return Ok(end);
                }
            }
            // Gone, or another one of the same name.
            Ok(_) => return Ok(Outcome::Deleted),
            Err(
                watcher::Error::InitialListFailed(error)
                | watcher::Error::WatchStartFailed(error)
                | watcher::Error::WatchFailed(error),
            ) => {
                if is_final(&error) {
                    return Err(explain(&error, &cluster.asked("watch", "finetunejobs")));
                }
                if std::mem::take(&mut connected) {
                    let said = explain(&error, &cluster.asked("watch", "finetunejobs"));
                    show.beside(&format!("{said}; trying again until it answers"));
                }
            }
            // An old resource version: the watch begins anew by itself.
            Err(watcher::Error::WatchError(_)) => {}
            Err(error @ watcher::Error::NoResourceVersion) => return Err(Error::Broken(error.to_string())),
        }
    }
    Err(Error::Broken("the watch ended".into()))
}

fn look(job: &FineTuneJob, until: Until, show: &mut Show) -> Result<Option<Outcome>, Error> {
    show.show(job)?;
    match until {
        Until::Phase(phase) if has_reached(job, phase) => Ok(Some(Outcome::Succeeded)),
        Until::Phase(_) | Until::End => Ok(outcome(job)),
    }
}

struct Show {
    shown: Shown,
    last: String,
    job: FineTuneJob,
}

impl Show {
    fn show(&mut self, job: &FineTuneJob) -> Result<(), Error> {
        let line = line(job);
        match &self.shown {
            Shown::Nothing => {}
            Shown::Lines => {
                if line != self.last {
                    print(format!("{line}\n"))?;
                }
            }
            Shown::Bar(bar) => {
                let progress = job.status.as_ref().and_then(|status| status.progress.as_ref());
                let (step, total) = progress.map_or((0, 0), |progress| (progress.step, progress.total_steps));
                if bar.length() != Some(total.unsigned_abs()) {
                    bar.set_style(bar_style(total));
                    bar.set_length(total.unsigned_abs());
                }
                bar.set_position(step.unsigned_abs());
                bar.set_message(state(job));
            }
        }
        self.last = line;
        self.job = job.clone();
        Ok(())
    }

    fn beside(&self, text: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(|| tell(text)),
            Shown::Lines | Shown::Nothing => tell(text),
        }
    }
}

/// A job in one line.
pub fn line(job: &FineTuneJob) -> String {
    let progress = job.status.as_ref().and_then(|status| status.progress.as_ref());
    let step = progress.map_or(String::new(), |progress| format!("  step {}", clean(&progress.summary)));
    let state = state(job);
    match state.split_once("  ") {
        Some((phase, rest)) => format!("{phase}{step}  {rest}"),
        None => format!("{state}{step}"),
    }
}

/// Phase, numbers, and what is in the way.
fn state(job: &FineTuneJob) -> String {
    let Some(status) = &job.status else { return "Pending".into() };
    let mut parts = vec![status.phase.map_or("Pending".to_owned(), |phase| format!("{phase:?}"))];
    parts.extend(metric(job, "trainLoss").map(|loss| format!("loss {loss}")));
    parts.extend(metric(job, "evalLoss").map(|loss| format!("eval {loss}")));
    let left = status.progress.as_ref().and_then(|progress| progress.estimated_remaining_seconds);
    parts.extend(left.map(|left| format!("{} left", duration(left))));
    let trouble = status.conditions.iter().find(|found| is_trouble(found));
    parts.extend(trouble.map(|found| format!("{}: {}", found.reason, clean(&found.message))));
    parts.join("  ")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::{Value, json};

    use super::*;
    use crate::fixture::{client, condition, finished, job, training};

    /// Longer than any of these tests takes.
    const HOUR: Duration = Duration::from_hours(1);

    /// Follows the training job while the API server tells `events`, one a watch.
    async fn followed(events: Vec<(u16, Value)>, until: Until, timeout: Duration) -> Result<Outcome, Error> {
        let events = Mutex::new(events.into_iter());
        let cluster = Cluster::fake(client(move |request| {
            let query = request.uri().query().unwrap_or_default();
            assert!(query.contains("metadata.name%3Dsupport-bot"), "{query}");
            if !query.contains("watch=true") {
                let metadata = json!({"resourceVersion": "1"});
                let list = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJobList",
                                  "metadata": metadata, "items": [training()]});
                return (200, list.to_string());
            }
            let event = events.lock().expect("one thread").next();
            event.map_or((200, String::new()), |(code, event)| (code, format!("{event}\n")))
        }));
        let followed = follow(&cluster, training(), until, Some(timeout), Shown::Nothing);
        Box::pin(followed).await.map(|(outcome, _)| outcome)
    }

    fn event(kind: &str, mut job: FineTuneJob) -> (u16, Value) {
        job.metadata.resource_version = Some("2".into());
        (200, json!({"type": kind, "object": job}))
    }

    #[tokio::test]
    async fn following_ends_with_the_job() {
        let mut another = finished();
        another.metadata.uid = Some("u-2".into());
        let unavailable = (503, json!({"code": 503, "message": "not now"}));
        for (events, expected) in [
            (vec![event("MODIFIED", training()), event("MODIFIED", finished())], Outcome::Succeeded),
            (vec![unavailable, event("MODIFIED", finished())], Outcome::Succeeded),
            (vec![event("DELETED", training())], Outcome::Deleted),
            (vec![event("MODIFIED", another)], Outcome::Deleted),
        ] {
            let told = format!("{expected:?} after {} events", events.len());
            let outcome = followed(events, Until::End, HOUR).await.unwrap_or_else(|error| panic!("{told}: {error}"));
            assert_eq!(outcome, expected, "{told}");
        }
    }

    #[tokio::test]
    async fn following_ends_before_the_job_for_a_phase_a_timeout_or_a_right() {
        let reached = followed(vec![], Until::Phase(Phase::Preparing), HOUR).await.expect("it trains");
        assert_eq!(reached, Outcome::Succeeded, "no request is needed to see that");
        let late = followed(vec![], Until::End, Duration::ZERO).await.expect("time goes by");
        assert_eq!(late, Outcome::TimedOut);
        let forbidden = (403, json!({"code": 403, "message": "User cannot watch"}));
        let error = followed(vec![forbidden], Until::End, HOUR).await.expect_err("no right");
        assert!(error.to_string().starts_with("you may not watch finetunejobs in namespace team-a"), "{error}");
    }

    #[test]
    fn a_change_is_one_line() {
        let stuck = job(
            "{}",
            &format!(
                "{{phase: Pending, conditions: [{}]}}",
                condition("Running", "False", "Unschedulable", "0/3 nodes")
            ),
        );
        for (job, expected) in [
            (job("{}", "{}"), "Pending"),
            (stuck, "Pending  Unschedulable: 0/3 nodes"),
            (training(), "Training  step 12/40  loss 1.9134  eval 1.881  1h30m left"),
            (finished(), "Succeeded  step 40/40  loss 0.4123  eval 0.3981"),
        ] {
            assert_eq!(line(&job), expected);
        }
    }
}
