//! The trained tensors and AdamW, in flat buffers: one norm, one clip, few fused updates, one thing to save.
//!
//! `p *= 1 - lr*wd; m += (1-b1)(g-m); v = b2*v + (1-b2)g^2; p -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)`,
//! as in torch. With bf16 training the fp32 buffer is the master and the model computes with a bf16 copy, refreshed with
//! each update.

mod blockwise;
mod gradients;
mod step;

use crds::run::Optimizer;
use tch::{Device, Kind, Tensor};

use self::blockwise::{BLOCK, Blockwise, Rates, num_blocks};
pub use self::gradients::Gradient;
use self::gradients::{Gradients, Layout, Place};
pub use self::step::{BackwardPass, Step, StepConstants, Update};
use crate::compute::shim::{self, AdamwStep};

/// Decay of the first and second moment, and the term added to its root: torch's defaults.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// A trained tensor before it has a place.
#[derive(Debug)]
pub struct ParameterInit {
    /// Hugging Face or PEFT tensor name.
    pub name: String,
    /// Initial value, any float dtype, any device.
    pub value: Tensor,
    /// Whose gradients are there at the same time: layer N's alone are group N + 1, those that are there all the time 0.
    pub group: usize,
}

/// A trained tensor's place in the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Hugging Face or PEFT tensor name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// First element in the flat buffers.
    pub offset: i64,
    gradient: Place,
}

impl Slot {
    /// Number of elements.
    pub fn len(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// This tensor's view of a flat buffer.
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.len()).view(self.shape.as_slice())
    }
}

/// How the trained tensors are updated.
#[derive(Clone, Copy, Debug, Default)]
pub struct OptimizerConfig {
    /// Which optimizer.
    pub optimizer: Optimizer,
    /// Each layer is updated as soon as its backward pass is done.
    pub in_backward: bool,
}

/// Tensors of a group that are neighbours and are updated in one go.
#[derive(Debug)]
struct Run {
    offset: i64,
    /// Of its first tensor.
    gradient: Place,
    length: i64,
    is_decayed: bool,
    /// Of the moments' blocks.
    first_block: i64,
}

#[derive(Debug)]
enum Moments {
    Float { exp_avg: Tensor, exp_avg_sq: Tensor },
    Blockwise(Blockwise),
}

/// The trained tensors: masters, gradients, moments, and the copy that the model computes with.
#[derive(Debug)]
pub struct Parameters {
    slots: Vec<Slot>,
    runs: Vec<Run>,
    in_backward: bool,
    /// Whether the step that is made has begun to move weights.
    is_moving: bool,
    master: Tensor,
    working: Tensor,
    gradients: Gradients,
    moments: Moments,
    /// Number of updates that moved the weights; an fp32 scalar on the device, as the fused kernel wants it.
    updates: Tensor,
}

/// Whether weight decay applies, by transformers' rule: not to norms and biases.
pub fn is_decayed(name: &str) -> bool {
    !name.split('.').any(|part| part == "bias" || part == "norm" || part.ends_with("norm"))
}

/// Joins neighbours of one group that are decayed alike. Where moments have blocks, no block reaches into the next tensor.
fn runs(slots: &[Slot], optimizer: Optimizer) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut blocks = 0;
    for slot in slots {
        let is_decayed = is_decayed(&slot.name);
        match runs.last_mut() {
            Some(run)
                if run.is_decayed == is_decayed
                    && Place { offset: run.gradient.offset + run.length, ..run.gradient } == slot.gradient
                    && (optimizer == Optimizer::AdamW || run.length % BLOCK == 0) =>
            {
                blocks -= num_blocks(run.length);
                run.length += slot.len();
                blocks += num_blocks(run.length);
            }
            _ => {
                let (offset, gradient, length) = (slot.offset, slot.gradient, slot.len());
                runs.push(Run { offset, gradient, length, is_decayed, first_block: blocks });
                blocks += num_blocks(length);
            }
        }
    }
    runs
}

impl Parameters {
    /// Places `tensors` on `device`. `working_kind` is the dtype that the model computes in.
    pub fn new(tensors: Vec<ParameterInit>, working_kind: Kind, device: Device, config: OptimizerConfig) -> Self {
        let (decayed_tensors, others): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|init| is_decayed(&init.name));
        let total = decayed_tensors.iter().chain(&others).map(|init| init.value.numel() as i64).sum::<i64>();
        let groups = decayed_tensors.iter().chain(&others).map(|init| init.group + 1).max().unwrap_or(1);
        let master = Tensor::zeros([total], (Kind::Float, device));
        let (mut slots, mut offset, mut layout) = (Vec::new(), 0, Layout::new(groups));
        for init in decayed_tensors.into_iter().chain(others) {
            let ParameterInit { name, value, group } = init;
            let gradient = layout.place(group, value.numel() as i64);
            let slot = Slot { name, shape: value.size(), offset, gradient };
            slot.view(&master).copy_(&value);
            offset += slot.len();
            slots.push(slot);
        }
        let runs = runs(&slots, config.optimizer);
        let zeros = || Tensor::zeros([total], (Kind::Float, device));
        let moments = match config.optimizer {
            Optimizer::AdamW => Moments::Float { exp_avg: zeros(), exp_avg_sq: zeros() },
            Optimizer::AdamW8Bit => {
                let blocks = runs.iter().map(|run| num_blocks(run.length)).sum();
                Moments::Blockwise(Blockwise::new(total, blocks, device))
            }
        };
        let working = if working_kind == Kind::Float { master.shallow_clone() } else { master.to_kind(working_kind) };
        let gradients = Gradients::new(layout, config.in_backward, device);
        let updates = Tensor::zeros([], (Kind::Float, device));
        Self {
            slots,
            runs,
            in_backward: config.in_backward,
            is_moving: false,
            master,
            working,
            gradients,
            moments,
            updates,
        }
    }

    /// The trained tensors' places.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Number of trained elements.
    pub fn num_elements(&self) -> i64 {
        self.master.numel() as i64
    }

    /// A view of the copy that the model computes with; it stays valid through updates.
    pub fn working(&self, slot: &Slot) -> Tensor {
        slot.view(&self.working)
    }

    /// Where the backward pass sums the fp32 gradient. Those of layers are there from their backward pass to the next step; with
    /// updates in the backward pass all layers share one place.
    pub fn gradient(&self, slot: &Slot) -> Gradient {
        self.gradients.at(slot.gradient, &slot.shape)
    }

    /// A view of the fp32 master.
    pub fn master(&self, slot: &Slot) -> Tensor {
        slot.view(&self.master)
    }

    /// The optimizer's state by name, flat, for a checkpoint: what is restored is copied into these.
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = match &self.moments {
            Moments::Float { exp_avg, exp_avg_sq } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            Moments::Blockwise(moments) => moments.state().into(),
        };
        state.push(("updates", &self.updates));
        state
    }

    /// Bytes of what a checkpoint holds: masters and the optimizer's state.
    pub fn state_bytes(&self) -> u64 {
        let held = self.state().into_iter().map(|(_, tensor)| tensor).chain([&self.master]);
        held.map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// The whole fp32 master buffer.
    pub fn flat_master(&self) -> &Tensor {
        &self.master
    }

    /// Replaces the masters and leaves the moments: for judging another checkpoint's weights.
    pub fn set_master(&mut self, master: &Tensor) {
        self.master.copy_(master);
        self.refresh_working();
    }

    /// Replaces the masters one tensor at a time, each by what `write` puts into its view, and leaves the moments: no second copy of
    /// all of them exists meanwhile.
    pub fn set_masters<E>(&mut self, mut write: impl FnMut(&Slot, &Tensor) -> Result<(), E>) -> Result<(), E> {
        for slot in &self.slots {
            write(slot, &slot.view(&self.master))?;
        }
        self.refresh_working();
        Ok(())
    }

    /// Whether the step that was begun last has moved weights, so that it cannot be made again.
    pub fn is_moving(&self) -> bool {
        self.is_moving
    }

    /// Forgets the gradients of the last step; those of layers give their memory back.
    pub fn forget_gradients(&mut self) {
        self.gradients.begin_step();
    }

    fn refresh_working(&mut self) {
        if self.working.kind() != Kind::Float {
            self.working.copy_(&self.master);
        }
    }

    /// One AdamW step of a group's tensors from its gradients; where `found_inf` is 1 nothing moves. `updates` already counts
    /// this step.
    fn update_group(&mut self, group: usize, found_inf: &Tensor, constants: &StepConstants) -> Result<(), shim::Error> {
        self.is_moving = true;
        for run in self.runs.iter().filter(|run| run.gradient.group == group) {
            let part = |flat: &Tensor| flat.narrow(0, run.offset, run.length);
            let gradient = self.gradients.at(run.gradient, &[run.length]).view();
            let weight_decay = if run.is_decayed { constants.weight_decay } else { 0.0 };
            let learning_rate = constants.learning_rate;
            let master = part(&self.master);
            match &self.moments {
                Moments::Float { exp_avg, exp_avg_sq } => shim::fused_adamw(
                    &master,
                    &gradient,
                    &part(exp_avg),
                    &part(exp_avg_sq),
                    &self.updates,
                    found_inf,
                    AdamwStep { learning_rate, beta1: BETA1, beta2: BETA2, weight_decay, eps: EPS },
                )?,
                Moments::Blockwise(moments) => {
                    let decay = 1.0 - learning_rate * weight_decay;
                    let rates = Rates { corrected: &self.rates(learning_rate), found_inf, decay };
                    moments.update(&master, &gradient, run.offset, run.first_block, &rates)?;
                }
            }
            if self.working.kind() != Kind::Float {
                part(&self.working).copy_(&master);
            }
        }
        Ok(())
    }

    /// `lr / (1 - b1^t)` and `sqrt(1 - b2^t)`, computed in fp64.
    fn rates(&self, learning_rate: f64) -> Tensor {
        let correction = |beta: f64| -> Tensor { 1.0 - Tensor::pow_scalar(beta, &self.updates.to_kind(Kind::Double)) };
        Tensor::stack(&[correction(BETA1).reciprocal() * learning_rate, correction(BETA2).sqrt()], 0)
            .to_kind(Kind::Float)
    }
}

#[cfg(test)]
mod tests;
