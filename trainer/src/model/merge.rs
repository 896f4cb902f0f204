//! The whole model with what was trained, made a piece at a time while it is written: merging takes megabytes, however large the
//! model is.

use std::io::{self, Write};
use std::path::Path;

use crds::run::Lora;
use safetensors::Dtype;
use tch::{Kind, Tensor};

use super::load::{adapter_scale, kind_of, mapped};
use super::{Error, Spec};
use crate::compute::shim::tensor_bytes;
use crate::ground::stop::Stop;
use crate::store::weights::{Mapped, MappedFile, StreamedTensor, WeightFiles};

/// Numbers of a tensor that are computed at once.
const PIECE: usize = 1 << 22;

/// What becomes of a tensor of the base.
enum Change<'a> {
    /// It stays.
    None,
    /// Full fine-tuning's fp32 master takes its place.
    Replaced { by: Mapped<'a> },
    /// `scale * B A` is added, A `[r, in]` and B `[out, r]` in fp32.
    Added { a: Tensor, b: Tensor, scale: f64 },
}

/// The tensors of the whole model: masters of full fine-tuning, or `W + scale * B A` computed in fp32; in the dtype of the base
/// model's files. Tied heads stay tied: they are not among them. `trained` is a checkpoint's file with the masters by name.
/// Writing one ends with [`io::ErrorKind::Interrupted`] where a stop was asked for.
pub fn merged<'a>(
    folder: &Path,
    files: &'a WeightFiles,
    trained: &'a MappedFile,
    lora: Option<&Lora>,
    stop: &'a Stop,
) -> Result<Vec<StreamedTensor<'a>>, Error> {
    let tensor = |(name, shape): (String, Vec<i64>)| {
        let base = mapped(folder, files, &name, &shape)?;
        let module = name.trim_end_matches(".weight");
        let adapter = |part: &str| trained.tensor(&format!("{module}.{part}.weight")).map(|mapped| fp32(&mapped));
        let change = match (trained.tensor(&name), adapter("lora_A").zip(adapter("lora_B")).zip(lora)) {
            (Some(by), _) => Change::Replaced { by },
            (None, Some(((a, b), lora))) => Change::Added { a, b, scale: adapter_scale(lora) },
            (None, None) => Change::None,
        };
        let (dtype, shape) = (base.dtype, base.shape.clone());
        let written = name.clone();
        let write = move |sink: &mut dyn Write| {
            write_changed(sink, &base, &change, stop)?;
            // Reading it again reads the file.
            files.release(&written);
            if let Change::Replaced { by } = &change {
                trained.release(by.data);
            }
            Ok(())
        };
        Ok(StreamedTensor { name, dtype, shape, write: Box::new(write) })
    };
    Spec::read(folder)?.tensors().into_iter().map(tensor).collect()
}

/// A whole tensor of a checkpoint.
fn fp32(mapped: &Mapped) -> Tensor {
    let shape: Vec<i64> = mapped.shape.iter().map(|&size| size as i64).collect();
    Tensor::from_data_size(mapped.data, &shape, Kind::Float)
}

/// Writes what becomes of `base`, some whole rows at a time.
fn write_changed(sink: &mut dyn Write, base: &Mapped, change: &Change, stop: &Stop) -> io::Result<()> {
    let rows = base.shape.first().copied().unwrap_or(1).max(1);
    let columns = base.shape.iter().product::<usize>() / rows;
    let step = (PIECE / columns.max(1)).max(1);
    let kind = kind_of(base.dtype);
    for first in (0..rows).step_by(step) {
        if stop.requested() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "a stop was asked for"));
        }
        let some = step.min(rows - first);
        let numbers = first * columns..(first + some) * columns;
        let of = |mapped: &Mapped, dtype: Dtype| {
            let (kind, size) = (kind_of(dtype), kind_of(dtype).elt_size_in_bytes());
            let bytes = &mapped.data[numbers.start * size..numbers.end * size];
            Tensor::from_data_size(bytes, &[some as i64, columns as i64], kind)
        };
        let piece = match change {
            Change::None => of(base, base.dtype),
            Change::Replaced { by } => of(by, Dtype::F32),
            Change::Added { a, b, scale } => {
                of(base, base.dtype).to_kind(Kind::Float) + b.narrow(0, first as i64, some as i64).matmul(a) * *scale
            }
        };
        sink.write_all(tensor_bytes(&piece.to_kind(kind).contiguous()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::weights::{TensorView, write_safetensors};

    /// Keeps what is written, and how much of it at once at most.
    #[derive(Default)]
    struct Pieces {
        bytes: Vec<u8>,
        largest: usize,
    }

    impl Write for Pieces {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.bytes.extend_from_slice(data);
            self.largest = self.largest.max(data.len());
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn numbers(tensor: &Tensor, kind: Kind) -> Vec<u8> {
        tensor_bytes(&tensor.to_kind(kind).contiguous()).to_vec()
    }

    /// More rows than a piece has, and a tensor of one dimension.
    #[test]
    fn pieces_make_the_whole() {
        tch::set_num_threads(1);
        let (rows, columns) = (PIECE / 2048 * 2 + 3, 2048);
        let shape = [rows as i64, columns as i64];
        let whole = Tensor::arange(shape[0] * shape[1], (Kind::Float, tch::Device::Cpu)).sin().view(shape);
        let (a, b) =
            (crate::compute::shim::cpu::noise(2, &[4, shape[1]]), crate::compute::shim::cpu::noise(3, &[shape[0], 4]));
        let (base, master) = (numbers(&whole, Kind::BFloat16), numbers(&(&whole * 2), Kind::Float));
        let mapped = Mapped { dtype: Dtype::BF16, shape: vec![rows, columns], data: &base };
        let by = Mapped { dtype: Dtype::F32, shape: vec![rows, columns], data: &master };
        let added = whole.to_kind(Kind::BFloat16).to_kind(Kind::Float) + b.matmul(&a) * 0.5;
        for (change, expected, is_exact) in [
            (Change::None, base.clone(), true),
            (Change::Replaced { by }, numbers(&(&whole * 2), Kind::BFloat16), true),
            (Change::Added { a, b, scale: 0.5 }, numbers(&added, Kind::BFloat16), false),
        ] {
            let mut sink = Pieces::default();
            write_changed(&mut sink, &mapped, &change, &Stop::default()).expect("a vector takes everything");
            // Products of other sizes may round their sums of four otherwise, and few bf16 are nearest to the other one then.
            let [found, exact] = [&sink.bytes, &expected]
                .map(|bytes| Tensor::from_data_size(bytes, &shape, Kind::BFloat16).to_kind(Kind::Float));
            let others = found.not_equal_tensor(&exact).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            let farthest = ((&found - &exact).abs() / (exact.abs() + 1e-30)).max().double_value(&[]);
            assert!(others < if is_exact { f64::MIN_POSITIVE } else { 1e-4 }, "{others:e}");
            assert!(farthest <= 2f64.powi(-7), "{farthest:e}");
            assert!(sink.largest <= 2 * PIECE && sink.largest < expected.len() / 2, "{}", sink.largest);
        }
        let norm = Mapped { dtype: Dtype::F32, shape: vec![columns], data: &master[..4 * columns] };
        let mut sink = Vec::new();
        write_changed(&mut sink, &norm, &Change::None, &Stop::default()).expect("a vector takes everything");
        assert!(sink == norm.data);
    }

    #[test]
    fn a_stop_ends_it() {
        let data = [0; 8];
        let mapped = Mapped { dtype: Dtype::F32, shape: vec![2], data: &data };
        let stop = Stop::default();
        stop.request();
        let error = write_changed(&mut Vec::new(), &mapped, &Change::None, &stop).expect_err("stopped");
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        // A file that is being written ends with it too.
        let view = TensorView { name: "x".into(), dtype: Dtype::F32, shape: vec![2], data: &data };
        let mut tensor: StreamedTensor = (&view).into();
        tensor.write = Box::new(|sink| write_changed(sink, &mapped, &Change::None, &stop));
        let written = crate::store::weights::stream_safetensors(&mut Vec::new(), &[], &[tensor]);
        assert_eq!(written.expect_err("stopped").kind(), io::ErrorKind::Interrupted);
        write_safetensors(&mut Vec::new(), &[], &[view]).expect("nothing stops what is in memory");
    }
}
