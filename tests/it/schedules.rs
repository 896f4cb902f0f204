//! Learning rates against those of transformers (`tests/golden/make_golden.py`).

use crds::run::Scheduler;
use harness::read_golden;
use serde::Deserialize;
use trainer::train::schedule::Schedule;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GoldenSchedule {
    scheduler: Scheduler,
    total_steps: i64,
    warmup_steps: i64,
    peak: f64,
    rates: Vec<f64>,
}

#[test]
fn schedules_equal_transformers() {
    for golden in read_golden::<Vec<GoldenSchedule>>("schedules.json") {
        let GoldenSchedule { scheduler, total_steps, warmup_steps, peak, rates } = golden;
        let schedule = Schedule { scheduler, peak, warmup_steps, total_steps };
        for (step, expected) in rates.into_iter().enumerate() {
            let ours = schedule.learning_rate(step as i64);
            assert!((ours - expected).abs() < 1e-9, "{scheduler:?} step {step}: {ours} against {expected}");
        }
    }
}
