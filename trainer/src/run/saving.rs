//! Checkpoints of the loop's state: what is in them, and the thread that writes them while training goes on.

use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tch::{Device, Tensor};

use super::Error;
use crate::compute::optim::{Parameters, Slot};
use crate::compute::shim::tensor_bytes;
use crate::ground::stop::Stop;
use crate::run::export::dtype;
use crate::store::checkpoint::{self, Content, Store, Stored};
use crate::store::weights::{MappedFile, StreamedTensor, stream_safetensors};
use crate::tell::record::CheckpointRecord;
use crate::tell::report::LastWord;
use crate::train::TrainState;

pub const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// Bytes of a file that are copied at a time; a multiple of every element's size.
const PIECE_BYTES: usize = 16 << 20;

/// Whose memory a snapshot's tensors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// The parameters': it holds until the next update. Of a device they are brought to the host while they are written.
    Shared,
    /// Its own, in host memory.
    Copied,
}

/// The state of a run between two steps.
pub struct Snapshot {
    state: TrainState,
    weights: Vec<(String, Tensor)>,
    optimizer: Vec<(String, Tensor)>,
}

impl Snapshot {
    pub fn of(state: TrainState, parameters: &Parameters, hold: Hold) -> Self {
        let master = |slot: &Slot| (slot.name.clone(), held(&parameters.master(slot), hold));
        let weights = parameters.slots().iter().map(master).collect();
        let moment = |(name, tensor): (&str, &Tensor)| (name.to_owned(), held(tensor, hold));
        Self { state, weights, optimizer: parameters.state().into_iter().map(moment).collect() }
    }

    fn commit(&self, store: &mut Store) -> Result<CheckpointRecord, checkpoint::Error> {
        let started = Instant::now();
        let state = &self.state;
        let best = state.best.is_some_and(|best| best.step == state.step);
        let write_state = |sink: &mut dyn Write| serde_json::to_writer_pretty(sink, state).map_err(Into::into);
        let write_weights = |sink: &mut dyn Write| stream_safetensors(sink, &[], &streamed(&self.weights));
        let write_optimizer = |sink: &mut dyn Write| stream_safetensors(sink, &[], &streamed(&self.optimizer));
        let stored = store.commit(
            state.step,
            best,
            &[
                Content { name: WEIGHTS, write: &write_weights },
                Content { name: OPTIMIZER, write: &write_optimizer },
                Content { name: STATE, write: &write_state },
            ],
        )?;
        Ok(CheckpointRecord {
            step: state.step,
            bytes: stored.bytes(),
            seconds: started.elapsed().as_secs_f64(),
            waited_seconds: 0.0,
            eval_loss: state.eval_loss.filter(|_| state.evaluated_step == state.step),
            best,
        })
    }
}

/// How many checkpoints stay.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    pub latest: i64,
    pub best: i64,
}

/// What became of a commit.
pub struct Written {
    /// Completed steps.
    pub step: i64,
    pub result: Result<CheckpointRecord, checkpoint::Error>,
    /// Why older checkpoints could not be removed.
    pub leftover: Option<checkpoint::Error>,
}

/// A thread that writes one checkpoint at a time.
pub struct Writer {
    store: Arc<Mutex<Store>>,
    snapshots: Sender<Snapshot>,
    written: Receiver<Written>,
    is_writing: bool,
}

impl Writer {
    /// `last_word` is told of a commit as soon as it stands: the loop, which hears of it later, may hang until the end.
    pub fn start(store: Store, retention: Retention, last_word: LastWord) -> io::Result<Self> {
        let store = Arc::new(Mutex::new(store));
        let (snapshots, taken) = mpsc::channel::<Snapshot>();
        let (tell, written) = mpsc::channel();
        let shared = store.clone();
        std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            for snapshot in taken {
                let mut store = shared.lock().unwrap_or_else(PoisonError::into_inner);
                let written = write(&mut store, &snapshot, retention, &last_word);
                drop(store);
                if tell.send(written).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { store, snapshots, written, is_writing: false })
    }

    /// The store; waits while a checkpoint is being written.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a commit; the one before has been waited for.
    pub fn begin(&mut self, snapshot: Snapshot) {
        debug_assert!(!self.is_writing, "one checkpoint at a time");
        self.is_writing = true;
        self.snapshots.send(snapshot).expect("the thread that writes checkpoints lives");
    }

    /// What became of the commit that was begun, if one was and is done.
    pub fn poll(&mut self) -> Option<Written> {
        let written = self.written.try_recv().ok()?;
        self.is_writing = false;
        Some(written)
    }

    /// What became of the commit that was begun, if one was; waits until it is done.
    pub fn wait(&mut self) -> Option<Written> {
        if !std::mem::take(&mut self.is_writing) {
            return None;
        }
        Some(self.written.recv().expect("the thread that writes checkpoints lives"))
    }
}

fn write(store: &mut Store, snapshot: &Snapshot, retention: Retention, last_word: &LastWord) -> Written {
    let result = snapshot.commit(store);
    if let Ok(record) = &result {
        last_word.update(|report| report.last_checkpoint_step = Some(record.step));
    }
    let leftover = result.is_ok().then(|| store.retain(retention.latest, retention.best)).and_then(Result::err);
    Written { step: snapshot.state.step, result, leftover }
}

fn held(tensor: &Tensor, hold: Hold) -> Tensor {
    match hold {
        Hold::Shared => tensor.shallow_clone(),
        Hold::Copied => tensor.to_device_(Device::Cpu, tensor.kind(), false, true),
    }
    .contiguous()
}

/// Named tensors as a file has them.
fn streamed(tensors: &[(String, Tensor)]) -> Vec<StreamedTensor<'_>> {
    let one = |(name, tensor): &'_ (String, Tensor)| StreamedTensor {
        name: name.clone(),
        dtype: dtype(tensor.kind()),
        shape: tensor.size().iter().map(|&size| size as usize).collect(),
        write: {
            let tensor = tensor.shallow_clone();
            Box::new(move |sink| match tensor.device() {
                Device::Cpu => sink.write_all(tensor_bytes(&tensor)),
                device => {
                    let piece = piece_elements(&tensor).min(tensor.numel() as i64).max(1);
                    let buffer = Tensor::empty([piece], (tensor.kind(), Device::Cpu));
                    // Pinned memory takes a copy from the device at the rate of the bus.
                    write_through(&buffer.pin_memory(device), &tensor, sink)
                }
            })
        },
    };
    tensors.iter().map(one).collect()
}

fn piece_elements(tensor: &Tensor) -> i64 {
    (PIECE_BYTES / tensor.kind().elt_size_in_bytes()) as i64
}

/// Writes a tensor's bytes through a buffer on the host, as much of it at a time as the buffer holds.
fn write_through(buffer: &Tensor, tensor: &Tensor, sink: &mut dyn Write) -> io::Result<()> {
    let (flat, most) = (tensor.view([-1]), buffer.numel() as i64);
    let all = flat.numel() as i64;
    for start in (0..all).step_by(most as usize) {
        let length = most.min(all - start);
        let mut piece = buffer.narrow(0, 0, length);
        piece.copy_(&flat.narrow(0, start, length));
        sink.write_all(tensor_bytes(&piece))?;
    }
    Ok(())
}

/// Copies the tensor `name` of a checkpoint's file to where it belongs. What was copied of the file is let go of: a state beside
/// its copy would take more memory than training does.
fn restore_tensor(file: &MappedFile, stored: &Stored, name: &str, place: &Tensor) -> Result<(), Error> {
    let (shape, kind) = (place.size(), place.kind());
    let malformed = || {
        Error::Weights(crate::store::weights::Error::Malformed {
            path: stored.folder.clone(),
            message: format!("the checkpoint verifies and has no {kind:?} tensor {name} of shape {shape:?}"),
        })
    };
    let mapped = file.tensor(name).ok_or_else(malformed)?;
    if mapped.dtype != dtype(kind) || mapped.shape.iter().map(|&size| size as i64).ne(shape.iter().copied()) {
        return Err(malformed());
    }
    let flat = place.view([-1]);
    let mut start = 0;
    for piece in mapped.data.chunks(PIECE_BYTES) {
        let length = (piece.len() / kind.elt_size_in_bytes()) as i64;
        flat.narrow(0, start, length).copy_(&Tensor::from_data_size(piece, &[length], kind));
        file.release(piece);
        start += length;
    }
    Ok(())
}

/// Puts a checkpoint's weights in place, and leaves the moments.
pub fn restore_weights(stored: &Stored, parameters: &mut Parameters, stop: &Stop) -> Result<(), Error> {
    let file = MappedFile::open(&stored.folder.join(WEIGHTS))?;
    parameters.set_masters(|slot, master| {
        stop.alive();
        restore_tensor(&file, stored, &slot.name, master)
    })
}

/// Puts a checkpoint's weights and moments in place and returns the loop's state.
pub fn restore(stored: &Stored, parameters: &mut Parameters, stop: &Stop) -> Result<TrainState, Error> {
    let path = stored.folder.join(STATE);
    let read = |source| crate::store::checkpoint::Error::Read { path: path.clone(), source };
    let state = std::fs::read(&path).map_err(read)?;
    let state: TrainState = serde_json::from_slice(&state).map_err(|error| read(error.into()))?;
    restore_weights(stored, parameters, stop)?;
    let file = MappedFile::open(&stored.folder.join(OPTIMIZER))?;
    for (name, place) in parameters.state() {
        stop.alive();
        restore_tensor(&file, stored, name, place)?;
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn a_tensor_goes_through_a_smaller_buffer_whole() {
        let tensor = Tensor::arange(10, (Kind::Int, Device::Cpu)).view([2, 5]);
        for elements in [1, 3, 10, 16] {
            let (buffer, mut sink) = (Tensor::empty([elements], (Kind::Int, Device::Cpu)), Vec::new());
            write_through(&buffer, &tensor, &mut sink).expect("a vector takes everything");
            assert_eq!(sink, tensor_bytes(&tensor), "{elements}");
        }
        let mut sink = Vec::new();
        let none = Tensor::empty([0], (Kind::Float, Device::Cpu));
        write_through(&Tensor::empty([4], (Kind::Float, Device::Cpu)), &none, &mut sink).expect("nothing to write");
        assert!(sink.is_empty());
    }
}
