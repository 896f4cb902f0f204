//! Where gradients are summed: an fp32 buffer for each group of tensors, which need not be there all the time.
//!
//! Group 0 is there from the beginning of a step to its end: embedding, head and final norm, and adapters. In full
//! fine-tuning each decoder layer is a group of its own. Its buffer appears when its backward pass begins, at which the
//! activations of the layers above are gone: both together take no more memory than the larger of them. Where a layer is
//! updated as soon as its backward pass is done, all layers share one buffer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

type Buffer = Arc<Mutex<Option<Tensor>>>;

fn locked(buffer: &Buffer) -> MutexGuard<'_, Option<Tensor>> {
    // A tensor handle is whole or not there, whatever panicked.
    buffer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A trained tensor's place in a buffer.
#[derive(Clone, Debug)]
pub struct Gradient {
    buffer: Buffer,
    offset: i64,
    shape: Vec<i64>,
}

impl Gradient {
    /// What the backward pass adds to, fp32.
    ///
    /// # Panics
    /// Before the backward pass of the tensor's layer has begun.
    pub fn view(&self) -> Tensor {
        let length: i64 = self.shape.iter().product();
        let buffer = locked(&self.buffer);
        let buffer = buffer.as_ref().expect("gradients are there once the backward pass of their layer begins");
        buffer.narrow(0, self.offset, length).view(self.shape.as_slice())
    }
}

/// The buffers of all groups.
#[derive(Debug)]
pub struct Gradients {
    buffers: Vec<Buffer>,
    lengths: Vec<i64>,
    shared_by_layers: bool,
    device: Device,
}

impl Gradients {
    /// Buffers of these lengths; group 0 comes first.
    pub fn new(lengths: Vec<i64>, shared_by_layers: bool, device: Device) -> Self {
        let shared = Buffer::default();
        let buffer = |group| if group > 0 && shared_by_layers { Arc::clone(&shared) } else { Buffer::default() };
        let buffers = (0..lengths.len()).map(buffer).collect();
        let gradients = Self { buffers, lengths, shared_by_layers, device };
        gradients.begin_step();
        gradients
    }

    /// Number of groups.
    pub fn num_groups(&self) -> usize {
        self.lengths.len()
    }

    /// The place of a tensor that begins at `offset` of its group.
    pub fn place(&self, group: usize, offset: i64, shape: &[i64]) -> Gradient {
        Gradient { buffer: Arc::clone(&self.buffers[group]), offset, shape: shape.to_vec() }
    }

    /// All gradients of a group, flat.
    pub fn of(&self, group: usize) -> Tensor {
        Gradient { buffer: Arc::clone(&self.buffers[group]), offset: 0, shape: vec![self.lengths[group]] }.view()
    }

    /// Nothing is summed yet; what layers had is given back.
    pub fn begin_step(&self) {
        self.appear_as_zeros(0, self.lengths[0]);
        if !self.shared_by_layers {
            self.buffers.iter().skip(1).for_each(|buffer| *locked(buffer) = None);
        }
    }

    /// The backward pass of a layer begins, for the first time in this step or for another micro-batch of it.
    pub fn begin_layer(&self, layer: usize) {
        let group = layer + 1;
        if self.shared_by_layers {
            let largest = self.lengths.iter().skip(1).max().copied().unwrap_or(0);
            self.appear_as_zeros(group, largest);
        } else if group < self.num_groups() && locked(&self.buffers[group]).is_none() {
            self.appear_as_zeros(group, self.lengths[group]);
        }
    }

    fn appear_as_zeros(&self, group: usize, length: i64) {
        let zeros = || Tensor::zeros([length], (Kind::Float, self.device));
        let _ = locked(&self.buffers[group]).get_or_insert_with(zeros).zero_();
    }
}
