//! `list` and `cost`. Pure.

use crds::FineTuneJob;
use crds::run::PodStage;
use crds::status::{duration, is_trouble, seconds_between};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde_json::json;

use crate::cluster::Scope;
use crate::text::{Align, clean, decimal, table};

/// One line a job.
pub fn list(jobs: &[FineTuneJob], scope: Scope, now: Timestamp) -> String {
    let mut columns = vec![
        ("NAMESPACE", Align::Left),
        ("NAME", Align::Left),
        ("METHOD", Align::Left),
        ("PHASE", Align::Left),
        ("STEP", Align::Right),
        ("LOSS", Align::Right),
        ("EVAL", Align::Right),
        ("ETA", Align::Right),
        ("AGE", Align::Right),
        ("VERDICT", Align::Left),
    ];
    let mut rows: Vec<Vec<String>> = jobs.iter().map(|job| row(job, now)).collect();
    if scope == Scope::Namespace {
        columns.remove(0);
        for row in &mut rows {
            row.remove(0);
        }
    }
    lines(&table(&columns, &rows))
}

fn row(job: &FineTuneJob, now: Timestamp) -> Vec<String> {
    let status = job.status.clone().unwrap_or_default();
    let progress = status.progress.as_ref();
    let phase = status.phase.map_or("-".to_owned(), |phase| format!("{phase:?}"));
    let age = job.metadata.creation_timestamp.as_ref().map(|created| duration(seconds_between(created.0, now)));
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    vec![
        job.namespace().unwrap_or_default(),
        job.name_any(),
        format!("{:?}", job.spec.method.method_type),
        phase,
        or_dash(progress.map(|progress| clean(&progress.summary))),
        or_dash(metric(job, "trainLoss")),
        or_dash(metric(job, "evalLoss")),
        or_dash(progress.and_then(|progress| progress.estimated_remaining_seconds).map(duration)),
        or_dash(age),
        or_dash(verdict(job)),
    ]
}

/// The newest value of a metric.
pub fn metric(job: &FineTuneJob, name: &str) -> Option<String> {
    let metrics = &job.status.as_ref()?.metrics;
    metrics.iter().find(|metric| metric.name == name).map(|metric| decimal(&metric.value))
}

/// The verdict; where there is none, what keeps the job from one.
fn verdict(job: &FineTuneJob) -> Option<String> {
    let status = job.status.as_ref()?;
    if let Some(verdict) = status.validation.as_ref().and_then(|validation| validation.verdict.as_ref()) {
        return Some(clean(verdict));
    }
    let why = status.conditions.iter().find(|found| is_trouble(found));
    why.map(|found| clean(&found.reason))
}

/// What jobs used, and the sum.
pub fn cost(jobs: &[FineTuneJob]) -> String {
    let columns = [
        ("NAME", Align::Left),
        ("PHASE", Align::Left),
        ("TRAINED", Align::Right),
        ("GPU HOURS", Align::Right),
        ("COST", Align::Right),
    ];
    let mut rows: Vec<Vec<String>> = jobs
        .iter()
        .map(|job| {
            let used = used(job);
            let phase = job.status.as_ref().and_then(|status| status.phase);
            cost_row(job.name_any(), phase.map_or("-".into(), |phase| format!("{phase:?}")), used)
        })
        .collect();
    let sum = jobs.iter().map(used).fold(Used::default(), |sum, used| Used {
        train_seconds: sum.train_seconds + used.train_seconds,
        gpu_seconds: sum.gpu_seconds + used.gpu_seconds,
        cost: sum.cost.map_or(used.cost, |cost| Some(cost + used.cost.unwrap_or(0.0))),
    });
    rows.push(cost_row("all".into(), String::new(), sum));
    let mut text = lines(&table(&columns, &rows));
    if jobs.iter().any(trains) {
        text += "attempts that still run are counted when they end\n";
    }
    if jobs.iter().any(|job| used(job).cost.is_none() && used(job).train_seconds > 0) {
        text += "a job without a cost has a profile without pricePerHour\n";
    }
    text
}

fn cost_row(name: String, phase: String, used: Used) -> Vec<String> {
    let cost = used.cost.map_or("-".into(), |cost| format!("{cost:.2}"));
    vec![name, phase, duration(used.train_seconds), format!("{:.2}", used.gpu_seconds as f64 / 3600.0), cost]
}

/// `cost` for programs.
pub fn cost_value(jobs: &[FineTuneJob]) -> serde_json::Value {
    let items: Vec<serde_json::Value> = jobs
        .iter()
        .map(|job| {
            let used = used(job);
            json!({
                "namespace": job.namespace(), "name": job.name_any(), "trainSeconds": used.train_seconds,
                "gpuSeconds": used.gpu_seconds, "cost": used.cost,
            })
        })
        .collect();
    json!({ "items": items })
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Used {
    train_seconds: i64,
    gpu_seconds: i64,
    cost: Option<f64>,
}

fn used(job: &FineTuneJob) -> Used {
    let usage = job.status.as_ref().and_then(|status| status.usage.clone()).unwrap_or_default();
    let cost = usage.cost.as_ref().and_then(|cost| cost.parse().ok());
    Used { train_seconds: usage.train_seconds, gpu_seconds: usage.gpu_seconds, cost }
}

/// Whether a training attempt has not ended.
fn trains(job: &FineTuneJob) -> bool {
    let attempts = job.status.iter().flat_map(|status| &status.job_refs);
    attempts.into_iter().any(|attempt| attempt.stage == PodStage::Train && attempt.outcome.is_none())
}

fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{finished, job, now, training};

    #[test]
    fn a_list_shows_every_job_on_one_line() {
        let stuck = job(
            "{method: {type: Full}}",
            "{phase: Pending, conditions: [{type: Running, status: 'False', reason: Unschedulable, message: no GPU, \
             lastTransitionTime: '2026-01-01T00:00:00Z'}]}",
        );
        let new = job("{}", "{}");
        let jobs = [training(), finished(), stuck, new];
        assert_eq!(
            list(&jobs, Scope::Namespace, now()),
            "\
NAME         METHOD  PHASE       STEP    LOSS    EVAL    ETA   AGE  VERDICT
support-bot  LoRA    Training   12/40  1.9134   1.881  1h30m  2h5m  -
support-bot  LoRA    Succeeded  40/40  0.4123  0.3981      -  2h5m  Better
support-bot  Full    Pending        -       -       -      -  2h5m  Unschedulable
support-bot  LoRA    -              -       -       -      -  2h5m  -
"
        );
        let all = list(&jobs[..1], Scope::All, now());
        assert!(all.starts_with("NAMESPACE  NAME ") && all.contains("\nteam-a     support-bot"), "{all}");
    }

    #[test]
    fn costs_are_summed_and_what_is_missing_is_said() {
        let free = job("{}", "{usage: {trainSeconds: 60, gpuSeconds: 0}}");
        assert_eq!(
            cost(&[training(), finished(), free]),
            "\
NAME         PHASE      TRAINED  GPU HOURS  COST
support-bot  Training     6m40s       0.11     -
support-bot  Succeeded   55m33s       0.93  1.94
support-bot  -               1m       0.00     -
all                        1h3m       1.04  1.94
attempts that still run are counted when they end
a job without a cost has a profile without pricePerHour
"
        );
        assert_eq!(
            cost_value(&[finished()]),
            json!({"items": [{"namespace": "team-a", "name": "support-bot", "trainSeconds": 3333, "gpuSeconds": 3333, "cost": 1.944}]})
        );
    }
}
