//! The series of jobs, as text. They are written straight from the cache: thousands of jobs have a hundred thousand samples, and
//! no scrape should hold them twice.

use std::fmt::Write as _;

use crds::FineTuneJob;
use crds::condition;
use crds::finetunejob::{FineTuneJobStatus, Phase};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

/// A gauge of every job.
struct Family {
    name: &'static str,
    help: &'static str,
    /// Labels besides the job's own.
    labels: &'static [&'static str],
    /// Hands over values of those labels, and the sample.
    samples: fn(&FineTuneJob, &mut dyn FnMut(&[&str], f64)),
}

const FAMILIES: [Family; 9] = [
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
];

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

    #[test]
    fn what_a_user_wrote_stays_within_its_quotes() {
        let mut text = String::new();
        escape(&mut text, "a\"b\\c\nd");
        assert_eq!(text, r#"a\"b\\c\nd"#);
    }
}
