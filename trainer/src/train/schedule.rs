//! Learning-rate schedules: `learning_rate(step)` is a pure function, Hugging Face's formulas by Hugging Face's names.

use crds::run::Scheduler;

/// The floor of `CosineWithMinLr`, as a share of the peak.
pub const MIN_LEARNING_RATE_RATIO: f64 = 0.1;

/// A schedule over a planned number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape after warm-up.
    pub scheduler: Scheduler,
    /// Learning rate at the end of warm-up.
    pub peak: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: i64,
    /// Planned steps.
    pub total_steps: i64,
}

impl Schedule {
    /// Warm-up of `ceil(ratio * total_steps)` steps.
    pub fn new(scheduler: Scheduler, peak: f64, warmup_ratio: f64, total_steps: i64) -> Self {
        Self { scheduler, peak, warmup_steps: (warmup_ratio * total_steps as f64).ceil() as i64, total_steps }
    }

    /// The learning rate of the step after `completed` steps. With warm-up the first step's is 0, as in transformers.
    pub fn learning_rate(&self, completed: i64) -> f64 {
        let (step, warmup) = (completed as f64, self.warmup_steps as f64);
        if completed < self.warmup_steps {
            return self.peak * step / warmup.max(1.0);
        }
        let progress = (step - warmup) / (self.total_steps as f64 - warmup).max(1.0);
        let cosine = (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0);
        let factor = match self.scheduler {
            Scheduler::Constant => 1.0,
            Scheduler::Linear => (1.0 - progress).max(0.0),
            Scheduler::Cosine => cosine,
            Scheduler::CosineWithMinLr => cosine * (1.0 - MIN_LEARNING_RATE_RATIO) + MIN_LEARNING_RATE_RATIO,
            Scheduler::InverseSqrt => {
                let timescale = if self.warmup_steps > 0 { warmup } else { 10_000.0 };
                1.0 / ((step + timescale - warmup) / timescale).sqrt()
            }
        };
        self.peak * factor
    }
}
