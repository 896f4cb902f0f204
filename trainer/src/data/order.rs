//! Which examples make up which step: a pure function of seed, dataset and step. The position in the data is the step
//! number, so a resumed run, or one with another packing, sees the same examples.

use std::sync::Mutex;

use crds::run::Duration;
use rand::seq::SliceRandom;

use crate::ground::random::{generator, seed64};

/// The order of one run.
#[derive(Debug)]
pub struct Order {
    seed: i64,
    /// The dataset's part of the key.
    dataset: u64,
    num_examples: usize,
    batch_size: usize,
    /// The epoch that was last asked for, and its permutation.
    cached: Mutex<Option<(u64, Vec<usize>)>>,
}

impl Order {
    /// `batch_size` examples a step; the last step of an epoch holds the remainder.
    pub fn new(seed: i64, dataset_digest: &str, num_examples: usize, batch_size: usize) -> Self {
        assert!(num_examples > 0 && batch_size > 0, "an order needs examples and a batch size");
        let dataset = seed64(0, dataset_digest, &[]);
        Self { seed, dataset, num_examples, batch_size, cached: Mutex::new(None) }
    }

    /// Steps of one pass over the examples.
    pub fn steps_per_epoch(&self) -> i64 {
        self.num_examples.div_ceil(self.batch_size) as i64
    }

    /// Steps of the whole run; a fraction of an epoch is rounded up to a step.
    pub fn total_steps(&self, duration: Duration) -> i64 {
        match duration {
            Duration::MaxSteps(steps) => steps,
            Duration::Epochs(epochs) => ((epochs * self.steps_per_epoch() as f64).ceil() as i64).max(1),
        }
    }

    /// Completed passes after `step` steps.
    pub fn epoch(&self, step: i64) -> f64 {
        let (passes, rest) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        passes as f64 + (rest as usize * self.batch_size) as f64 / self.num_examples as f64
    }

    /// The examples of the step after `completed` steps.
    pub fn examples(&self, completed: i64) -> Vec<usize> {
        let epoch = (completed / self.steps_per_epoch()) as u64;
        let start = (completed % self.steps_per_epoch()) as usize * self.batch_size;
        let mut cached = self.cached.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if cached.as_ref().is_none_or(|(cached_epoch, _)| *cached_epoch != epoch) {
            let mut permutation: Vec<usize> = (0..self.num_examples).collect();
            permutation.shuffle(&mut generator(self.seed, "order", &[self.dataset, epoch]));
            *cached = Some((epoch, permutation));
        }
        let (_, permutation) = cached.as_ref().expect("set above");
        permutation[start..(start + self.batch_size).min(self.num_examples)].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_visits_every_example_once_and_any_step_can_be_asked_for() {
        let order = Order::new(7, "sha256:aa", 10, 4);
        assert_eq!((order.steps_per_epoch(), order.total_steps(Duration::Epochs(1.5))), (3, 5));
        let steps: Vec<_> = (0..6).map(|step| order.examples(step)).collect();
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2, 4, 4, 2]);
        for epoch in steps.chunks(3) {
            let mut seen = epoch.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(steps[..3], steps[3..]);
        for step in [5, 0, 3, 1, 4, 2] {
            assert_eq!(Order::new(7, "sha256:aa", 10, 4).examples(step), steps[step as usize]);
        }
        assert_ne!(Order::new(8, "sha256:aa", 10, 4).examples(0), steps[0]);
        assert_ne!(Order::new(7, "sha256:bb", 10, 4).examples(0), steps[0]);
        assert!((order.epoch(4) - 1.4).abs() < 1e-12);
    }
}
