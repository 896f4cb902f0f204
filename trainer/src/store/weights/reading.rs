//! A weight file read from end to end: for its digest, and to see that its numbers are finite.

use std::fs::File;
use std::io::Read;
use std::sync::mpsc::sync_channel;
use std::thread;

use safetensors::Dtype;

use super::{Error, MappedFile};

/// Bytes that are read at once where a file is read from end to end.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Pieces that wait to be looked at: they stay in the cache.
const PIECES_AHEAD: usize = 2;

/// Some bytes of a file.
struct Piece {
    length: usize,
    /// Name and dtype of the weight that they are of.
    weight: Option<(String, Dtype)>,
}

impl MappedFile {
    /// Reads the file from end to end and shows it to `see` piece by piece. A tensor for which `is_weight` and that holds NaN or
    /// infinity is refused: one reading for a digest and this. A thread reads ahead, for a digest takes three times as long as
    /// a reading; not through the map, where storage that fails would be a signal instead of an error.
    pub fn read_through(&self, is_weight: &dyn Fn(&str) -> bool, see: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
        let read = |source| Error::Read { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(read)?;
        let pieces = self.pieces(is_weight);
        thread::scope(|scope| {
            let (sender, ahead) = sync_channel(PIECES_AHEAD);
            scope.spawn(|| {
                let sender = sender;
                for piece in &pieces {
                    let mut bytes = Vec::with_capacity(piece.length);
                    let result = Read::by_ref(&mut file).take(piece.length as u64).read_to_end(&mut bytes);
                    if sender.send(result.map(|_| bytes)).is_err() {
                        return;
                    }
                }
            });
            for piece in &pieces {
                let bytes = ahead.recv().expect("each piece is sent, or why not").map_err(read)?;
                if bytes.len() < piece.length {
                    return Err(Error::Malformed {
                        path: self.path.clone(),
                        message: "it has shrunk since it was opened".into(),
                    });
                }
                match &piece.weight {
                    Some((name, dtype)) if !is_finite(*dtype, &bytes) => {
                        return Err(Error::NonFinite { path: self.path.clone(), name: name.clone() });
                    }
                    _ => see(&bytes),
                }
            }
            Ok(())
        })?;
        match file.read(&mut [0]).map_err(read)? {
            0 => Ok(()),
            _ => Err(Error::Malformed { path: self.path.clone(), message: "it has grown since it was opened".into() }),
        }
    }

    /// The whole file in pieces that are read at once.
    fn pieces(&self, is_weight: &dyn Fn(&str) -> bool) -> Vec<Piece> {
        let mut pieces = vec![Piece { length: self.data_start, weight: None }];
        // The header was refused if its tensors were not the rest of the file, without gaps.
        for name in self.metadata.offset_keys() {
            let info = self.metadata.info(&name).expect("it lists its own tensors");
            let weight = is_weight(&name).then_some((name, info.dtype));
            let (start, end) = info.data_offsets;
            pieces.extend(
                (start..end)
                    .step_by(PIECE_BYTES)
                    .map(|at| Piece { length: (end - at).min(PIECE_BYTES), weight: weight.clone() }),
            );
        }
        pieces
    }
}

/// Whether no element has the exponent of infinity and NaN, all ones. Elements of other dtypes than weights have are finite.
fn is_finite(dtype: Dtype, little_endian: &[u8]) -> bool {
    let halves = |exponent: u16| {
        let (elements, _) = little_endian.as_chunks();
        // Without an early end the loop is one of vector instructions.
        elements.iter().fold(true, |finite, &bytes| finite & (u16::from_le_bytes(bytes) & exponent != exponent))
    };
    match dtype {
        Dtype::BF16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        Dtype::F32 => {
            let (elements, _) = little_endian.as_chunks();
            elements.iter().fold(true, |finite, &bytes| finite & f32::from_le_bytes(bytes).is_finite())
        }
        _ => true,
    }
}
