//! Where gradients are summed: fp32 buffers for each group of tensors, which need not be there all the time.
//!
//! Group 0 is there from the beginning of a step to its end: embedding, head and final norm, and adapters. In full
//! fine-tuning each decoder layer is a group of its own. Its buffers appear when its backward pass begins, at which the
//! activations of the layers above are gone: both together take no more memory than the larger of them. For that to be so in a
//! heap, a buffer has to fit where an activation was; one for all of a layer found no place between them. A single tensor may still
//! be larger than an activation of few tokens is; then the heap grows by it. Where a layer
//! is updated as soon as its backward pass is done, all layers share their buffers.

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

/// Elements of a layer's buffer, unless one tensor has more.
pub(super) const MOST_ELEMENTS: i64 = 1 << 20;

/// Where a tensor's gradient is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its group.
    pub group: usize,
    /// The buffer in the group.
    pub buffer: usize,
    /// First element in the buffer.
    pub offset: i64,
}

/// Lengths of the buffers of each group, as tensors are placed one after the other.
#[derive(Debug)]
pub(super) struct Layout(Vec<Vec<i64>>);

impl Layout {
    /// No tensor has a place yet.
    pub fn new(groups: usize) -> Self {
        Self(vec![Vec::new(); groups])
    }

    /// The place of the group's next tensor. What is there all the time is one buffer.
    pub fn place(&mut self, group: usize, length: i64) -> Place {
        let buffers = &mut self.0[group];
        if buffers.last().is_none_or(|taken| group > 0 && taken + length > MOST_ELEMENTS) {
            buffers.push(0);
        }
        let buffer = buffers.len() - 1;
        let offset = buffers[buffer];
        buffers[buffer] += length;
        Place { group, buffer, offset }
    }
}

/// The buffers of all groups.
#[derive(Debug)]
pub struct Gradients {
    buffers: Vec<Vec<Buffer>>,
    lengths: Vec<Vec<i64>>,
    shared_by_layers: bool,
    device: Device,
}

impl Gradients {
    /// Buffers for the tensors that have a place; group 0 comes first.
    pub(super) fn new(Layout(lengths): Layout, shared_by_layers: bool, device: Device) -> Self {
        let most = lengths.iter().map(Vec::len).max().unwrap_or(0);
        let shared: Vec<Buffer> = (0..most).map(|_| Buffer::default()).collect();
        let of_group = |(group, lengths): (usize, &Vec<i64>)| -> Vec<Buffer> {
            let buffer = |index: usize| {
                if group > 0 && shared_by_layers { Arc::clone(&shared[index]) } else { Buffer::default() }
            };
            (0..lengths.len()).map(buffer).collect()
        };
        let buffers = lengths.iter().enumerate().map(of_group).collect();
        let gradients = Self { buffers, lengths, shared_by_layers, device };
        gradients.begin_step();
        gradients
    }

    /// Number of groups.
    pub fn num_groups(&self) -> usize {
        self.lengths.len()
    }

    /// The gradient at a place.
    pub(super) fn at(&self, place: Place, shape: &[i64]) -> Gradient {
        let buffer = Arc::clone(&self.buffers[place.group][place.buffer]);
        Gradient { buffer, offset: place.offset, shape: shape.to_vec() }
    }

    /// All gradients of a group, a flat tensor for each buffer.
    pub fn of(&self, group: usize) -> Vec<Tensor> {
        let whole = |(buffer, &length): (usize, &i64)| self.at(Place { group, buffer, offset: 0 }, &[length]).view();
        self.lengths[group].iter().enumerate().map(whole).collect()
    }

    /// Nothing is summed yet; what layers had is given back.
    pub fn begin_step(&self) {
        self.appear_as_zeros(0);
        if !self.shared_by_layers {
            self.buffers.iter().skip(1).flatten().for_each(|buffer| *locked(buffer) = None);
        }
    }

    /// The backward pass of a layer begins, for the first time in this step or for another micro-batch of it.
    pub fn begin_layer(&self, layer: usize) {
        let group = layer + 1;
        let is_there = |group: &Vec<Buffer>| group.iter().all(|buffer| locked(buffer).is_some());
        if self.shared_by_layers || self.buffers.get(group).is_some_and(|group| !is_there(group)) {
            self.appear_as_zeros(group);
        }
    }

    fn appear_as_zeros(&self, group: usize) {
        for (index, buffer) in self.buffers[group].iter().enumerate() {
            let of_layers = || self.lengths.iter().skip(1).filter_map(|lengths| lengths.get(index)).max();
            let largest = (group > 0 && self.shared_by_layers).then(of_layers).flatten();
            let length = largest.copied().unwrap_or(self.lengths[group][index]);
            let zeros = || Tensor::zeros([length], (Kind::Float, self.device));
            let _ = locked(buffer).get_or_insert_with(zeros).zero_();
        }
    }
}
