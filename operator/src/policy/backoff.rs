//! How long to wait before the next attempt.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use crds::finetunejob::AttemptOutcome;

/// The longest wait after a failure.
const LONGEST: Duration = Duration::from_mins(5);
/// Preempted attempts come back at once, spread a little: whatever took them away took others too.
const SPREAD: Duration = Duration::from_secs(10);

/// The wait after an attempt that ended so, when `repeated` attempts have. `first` is the wait after the first of them; each
/// further one doubles it. `seed` names the attempt, so that the same question has the same answer.
pub fn backoff(outcome: AttemptOutcome, repeated: i32, first: Duration, seed: &str) -> Duration {
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    let share = hasher.finish() as f64 / u64::MAX as f64;
    match outcome {
        AttemptOutcome::Preempted => SPREAD.min(first).mul_f64(share),
        AttemptOutcome::Failed | AttemptOutcome::Unavailable => {
            let doublings = u32::try_from(repeated - 1).unwrap_or(0).min(16);
            first.saturating_mul(1 << doublings).min(LONGEST).mul_f64(0.75 + share / 2.0)
        }
        AttemptOutcome::Done | AttemptOutcome::Final | AttemptOutcome::Suspended => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_wait_longer_each_time_and_preemptions_hardly() {
        let first = Duration::from_secs(10);
        let mut before = Duration::ZERO;
        for failed in 1..6 {
            let wait = backoff(AttemptOutcome::Failed, failed, first, "a");
            let middle = first * (1 << (failed - 1));
            assert!(wait >= middle.mul_f64(0.75) && wait <= middle.mul_f64(1.25), "{failed}: {wait:?}");
            assert!(wait > before);
            before = wait;
        }
        assert!(backoff(AttemptOutcome::Failed, 1000, first, "a") <= LONGEST.mul_f64(1.25));
        let spread: Vec<Duration> =
            (0..50).map(|n| backoff(AttemptOutcome::Preempted, 3, first, &format!("job-{n}"))).collect();
        assert!(spread.iter().all(|wait| *wait <= SPREAD));
        assert!(spread.iter().max().zip(spread.iter().min()).is_some_and(|(most, least)| *most > *least + SPREAD / 2));
        assert_eq!(
            spread[7],
            backoff(AttemptOutcome::Preempted, 3, first, "job-7"),
            "the same question, the same answer"
        );
    }
}
