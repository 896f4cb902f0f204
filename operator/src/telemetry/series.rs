//! The series of jobs, as text. They are written straight from the cache: thousands of jobs have a hundred thousand samples, and
//! no scrape should hold them twice.

use std::fmt::Write as _;

use crds::FineTuneJob;
use crds::condition::ConditionStatus::{False, True, Unknown};
use crds::condition::{self, reason};
use crds::finetunejob::{FineTuneJobStatus, Phase};
use crds::run::PodStage;
use crds::status::{found, is_terminal};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use crate::build::MANAGER;

/// A gauge of every job.
struct Family {
    name: &'static str,
    help: &'static str,
    /// Labels besides the job's own.
    labels: &'static [&'static str],
    /// Hands over values of those labels, and the sample.
    samples: fn(&FineTuneJob, &mut dyn FnMut(&[&str], f64)),
}

const FAMILIES: [Family; 11] = [
    Family {
        name: "info",
        help: "1, with what is trained as labels",
        labels: &["method", "base_model", "profile", "queue"],
        samples: |job, tell| {
            let spec = &job.spec;
            let scheduling = spec.scheduling.as_ref();
            let queue = scheduling.and_then(|scheduling| scheduling.queue_name.as_deref()).unwrap_or_default();
            let method = format!("{:?}", spec.method.method_type);
            // A query may be a presigned one, and is nobody's label.
            let model = spec.model.uri.0.split('?').next().unwrap_or_default();
            tell(&[&method, model, spec.profile.as_deref().unwrap_or(crds::profile::DEFAULT), queue], 1.0);
        },
    },
    Family {
        name: "status_phase",
        help: "1 for the phase that a job is in",
        labels: &["phase"],
        samples: |job, tell| {
            let Some(status) = &job.status else { return };
            for phase in Phase::ALL {
                tell(&[&format!("{phase:?}")], f64::from(u8::from(status.phase == Some(phase))));
            }
        },
    },
    Family {
        name: "status_condition",
        help: "1 for the status of a condition",
        labels: &["condition", "status"],
        samples: |job, tell| {
            let conditions = job.status.iter().flat_map(|status| &status.conditions);
            for found in conditions.filter(|found| condition::TYPES.contains(&found.type_.as_str())) {
                for value in ["True", "False", "Unknown"] {
                    tell(&[&found.type_, value], f64::from(u8::from(found.status == value)));
                }
            }
        },
    },
    Family {
        name: "status_progress_ratio",
        help: "Completed share of the optimizer steps",
        labels: &[],
        samples: |job, tell| {
            let progress = job.status.as_ref().and_then(|status| status.progress.as_ref());
            if let Some(progress) = progress.filter(|progress| progress.total_steps > 0) {
                tell(&[], progress.step as f64 / progress.total_steps as f64);
            }
        },
    },
    Family {
        name: "status_train_loss",
        help: "Mean loss per trained token, nats",
        labels: &[],
        samples: |job, tell| {
            let mut metrics = job.status.iter().flat_map(|status| &status.metrics);
            if let Some(loss) = metrics.find(|metric| metric.name == "trainLoss").and_then(|one| one.value.parse().ok())
            {
                tell(&[], loss);
            }
        },
    },
    Family {
        name: "status_attempts",
        help: "Attempts by kind",
        labels: &["kind"],
        samples: |job, tell| {
            let Some(status) = &job.status else { return };
            let count = status.attempts.as_ref().map_or((0, 0, 0), |all| (all.total, all.failed, all.preempted));
            tell(&["total"], f64::from(count.0));
            tell(&["failed"], f64::from(count.1));
            tell(&["preempted"], f64::from(count.2));
        },
    },
    Family {
        name: "created_timestamp_seconds",
        help: "When the job was created",
        labels: &[],
        samples: |job, tell| tell_time(job.metadata.creation_timestamp.as_ref(), tell),
    },
    Family {
        name: "start_timestamp_seconds",
        help: "When its first pod ran",
        labels: &[],
        samples: |job, tell| tell_time(time(job, |status| status.start_time.as_ref()), tell),
    },
    Family {
        name: "completion_timestamp_seconds",
        help: "When it ended",
        labels: &[],
        samples: |job, tell| tell_time(time(job, |status| status.completion_time.as_ref()), tell),
    },
    Family {
        name: "waiting_since_timestamp_seconds",
        help: "Since when a job waits, with what it waits for",
        labels: &["reason"],
        samples: |job, tell| {
            if let Some((reason, since)) = waits(job) {
                tell(&[reason], since.0.as_second() as f64);
            }
        },
    },
    Family {
        name: "last_report_timestamp_seconds",
        help: "When a training pod that runs was last heard of, or else began to run",
        labels: &[],
        samples: |job, tell| tell_time(time(job, last_report), tell),
    },
];

/// Why and since when a job that has not ended does not run: by the first condition, in the order of a job's life, that holds
/// it. A condition's time moves with its status, so that the wait goes on where only the reason changes.
fn waits(job: &FineTuneJob) -> Option<(&str, &Time)> {
    if job.spec.managed_by.as_deref().is_some_and(|manager| manager != MANAGER) {
        return None;
    }
    let Some(status) = job.status.as_ref().filter(|status| !status.conditions.is_empty()) else {
        return Some((reason::PENDING, job.metadata.creation_timestamp.as_ref()?));
    };
    if is_terminal(status) {
        return None;
    }
    let held = found(status, condition::SUSPENDED, True)
        .or_else(|| found(status, condition::ACCEPTED, False))
        .or_else(|| found(status, condition::ADMITTED, False))
        .or_else(|| found(status, condition::RUNNING, False))
        .or_else(|| found(status, condition::RUNNING, Unknown))?;
    Some((&held.reason, &held.last_transition_time))
}

fn last_report(status: &FineTuneJobStatus) -> Option<&Time> {
    let running = found(status, condition::RUNNING, True)?;
    let told = status.progress.as_ref().and_then(|progress| progress.last_report_time.as_ref());
    (status.stage == Some(PodStage::Train))
        .then(|| told.map_or(&running.last_transition_time, |told| told.max(&running.last_transition_time)))
}

fn time(job: &FineTuneJob, of: impl FnOnce(&FineTuneJobStatus) -> Option<&Time>) -> Option<&Time> {
    job.status.as_ref().and_then(of)
}

fn tell_time(time: Option<&Time>, tell: &mut dyn FnMut(&[&str], f64)) {
    if let Some(time) = time {
        tell(&[], time.0.as_second() as f64);
    }
}

/// Appends every series of `jobs` in Prometheus' text format.
pub fn write(text: &mut String, jobs: &[&FineTuneJob]) {
    for family in &FAMILIES {
        let start = text.len();
        let name = family.name;
        let _ = writeln!(text, "# HELP finetunejob_{name} {}\n# TYPE finetunejob_{name} gauge", family.help);
        let head = text.len();
        for job in jobs {
            let own = [job.namespace().unwrap_or_default(), job.name_any()];
            (family.samples)(job, &mut |labels, value| {
                let _ = write!(text, "finetunejob_{name}{{namespace=\"{}\",finetunejob=\"{}\"", own[0], own[1]);
                for (label, value) in family.labels.iter().zip(labels) {
                    let _ = write!(text, ",{label}=\"");
                    escape(text, value);
                    text.push('"');
                }
                let _ = writeln!(text, "}} {value}");
            });
        }
        if text.len() == head {
            text.truncate(start);
        }
    }
}

/// A label's value: text of a user, between quotes.
fn escape(text: &mut String, value: &str) {
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, status: serde_json::Value) -> FineTuneJob {
        let mut job: FineTuneJob = serde_json::from_value(serde_json::json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": "team", "uid": "u"},
            "spec": {"model": {"uri": "https://host/m?token=1"}, "dataset": {"train": {"uri": "hf://a/b"}},
                     "method": {"type": "LoRA"}},
        }))
        .expect("a job");
        job.status = serde_json::from_value(status).expect("a status");
        job
    }

    #[test]
    fn a_family_is_told_once_with_every_job() {
        let told = serde_json::json!({
            "phase": "Training", "attempts": {"total": 3, "failed": 1, "preempted": 1},
            "progress": {"step": 5, "totalSteps": 20, "summary": "5/20"},
            "metrics": [{"name": "trainLoss", "value": "1.5"}],
        });
        let jobs = [job("bot", told), job("new", serde_json::Value::Null)];
        let mut text = String::new();
        write(&mut text, &[&jobs[0], &jobs[1]]);
        for line in [
            "finetunejob_status_phase{namespace=\"team\",finetunejob=\"bot\",phase=\"Training\"} 1\n",
            "finetunejob_status_phase{namespace=\"team\",finetunejob=\"bot\",phase=\"Failed\"} 0\n",
            "finetunejob_status_attempts{namespace=\"team\",finetunejob=\"bot\",kind=\"failed\"} 1\n",
            "finetunejob_status_progress_ratio{namespace=\"team\",finetunejob=\"bot\"} 0.25\n",
            "finetunejob_status_train_loss{namespace=\"team\",finetunejob=\"bot\"} 1.5\n",
            "finetunejob=\"new\",method=\"LoRA\",base_model=\"https://host/m\",profile=\"default\",queue=\"\"} 1\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert_eq!(text.matches("# TYPE finetunejob_info gauge\n").count(), 1);
        assert!(!text.contains("completion_timestamp"), "a family without samples is none");
    }

    fn samples(job: &FineTuneJob, family: &str) -> String {
        let mut text = String::new();
        write(&mut text, &[job]);
        let of_family = text.lines().filter(|line| line.starts_with(&format!("finetunejob_{family}{{")));
        let labels_and_value =
            of_family.filter_map(|line| line.split_once("finetunejob=\"bot\"")).map(|(_, rest)| rest);
        labels_and_value.collect::<Vec<_>>().join("; ")
    }

    /// Conditions as `type=status/reason`, each a second after the one before.
    fn with_conditions(conditions: &[&str], more: serde_json::Value) -> FineTuneJob {
        let conditions = conditions.iter().enumerate().map(|(second, text)| {
            let (name, rest) = text.split_once('=').expect("a condition");
            let (status, reason) = rest.split_once('/').expect("a reason");
            let time = format!("1970-01-01T00:00:0{}Z", second + 1);
            serde_json::json!({"type": name, "status": status, "reason": reason, "message": "", "lastTransitionTime": time})
        });
        let mut status = more;
        status["conditions"] = conditions.collect();
        job("bot", status)
    }

    #[test]
    fn a_job_waits_for_what_holds_it_first_and_since_that_held_it() {
        for (conditions, expected) in [
            (&["Accepted=False/ProfileNotFound", "Running=Unknown/Pending"][..], "ProfileNotFound\"} 1"),
            (
                &["Accepted=True/Resolved", "Admitted=False/WaitingForQuota", "Running=False/Pending"],
                "WaitingForQuota\"} 2",
            ),
            (&["Accepted=True/Resolved", "Admitted=True/NoQueue", "Running=False/Unschedulable"], "Unschedulable\"} 3"),
            (&["Accepted=True/Resolved", "Running=Unknown/NodeLost"], "NodeLost\"} 2"),
            (
                &["Accepted=True/Resolved", "Suspended=True/SuspendedByUser", "Running=False/SuspendedByUser"],
                "SuspendedByUser\"} 2",
            ),
        ] {
            let told = samples(&with_conditions(conditions, serde_json::json!({})), "waiting_since_timestamp_seconds");
            assert_eq!(told, format!(",reason=\"{expected}"), "{conditions:?}");
        }
        for conditions in [
            &["Accepted=True/Resolved", "Running=True/PodRunning"][..],
            &["Accepted=False/PlanLost", "Failed=True/PlanLost"],
            &["Running=False/Pending", "Complete=True/Published"],
        ] {
            let told = samples(&with_conditions(conditions, serde_json::json!({})), "waiting_since_timestamp_seconds");
            assert_eq!(told, "", "{conditions:?}");
        }
        let mut new = job("bot", serde_json::Value::Null);
        new.metadata.creation_timestamp =
            serde_json::from_value(serde_json::json!("1970-01-01T00:00:07Z")).expect("a time");
        assert_eq!(
            samples(&new, "waiting_since_timestamp_seconds"),
            ",reason=\"Pending\"} 7",
            "nobody has looked at it yet"
        );
        new.spec.managed_by = Some("kueue.x-k8s.io/multikueue".into());
        assert_eq!(samples(&new, "waiting_since_timestamp_seconds"), "", "it waits for somebody else");
    }

    #[test]
    fn the_last_word_of_a_training_pod_is_its_own() {
        let runs = ["Running=True/PodRunning"];
        for (conditions, stage, told, expected) in [
            (&runs[..], "train", Some("1970-01-01T00:00:09Z"), "} 9"),
            (&runs, "train", None, "} 1"),
            // What an earlier attempt told.
            (&["Accepted=True/Resolved", runs[0]], "train", Some("1970-01-01T00:00:01Z"), "} 2"),
            (&runs, "publish", Some("1970-01-01T00:00:09Z"), ""),
            (&["Running=False/Preempted"], "train", Some("1970-01-01T00:00:09Z"), ""),
        ] {
            let progress = serde_json::json!({"step": 1, "totalSteps": 2, "summary": "1/2", "lastReportTime": told});
            let job = with_conditions(conditions, serde_json::json!({"stage": stage, "progress": progress}));
            assert_eq!(samples(&job, "last_report_timestamp_seconds"), expected, "{conditions:?} {stage} {told:?}");
        }
    }

    #[test]
    fn what_a_user_wrote_stays_within_its_quotes() {
        let mut text = String::new();
        escape(&mut text, "a\"b\\c\nd");
        assert_eq!(text, r#"a\"b\\c\nd"#);
    }
}
