//! Tokenised rows, and the memory-mapped file that holds them.

use std::io::Write;
use std::path::Path;

use safetensors::Dtype;
use sha2::{Digest, Sha256};

use crate::store::files::hex;
use crate::store::weights::{self, MappedFile, TensorView, write_safetensors};

/// A tokenised row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether the loss is taken on predicting the token at the same place. The first token has nothing before it.
    pub trained: Vec<bool>,
}

impl Example {
    /// Number of tokens that the loss is taken on.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }
}

/// The examples of one file, mapped: `tokens` u32 `[N]`, `trained` u8 `[N]`, `offsets` i64 `[n + 1]`.
#[derive(Debug)]
pub struct Examples {
    file: MappedFile,
    offsets: Vec<usize>,
    digest: String,
}

impl Examples {
    /// Writes `examples` in the layout that [`Self::open`] reads.
    pub fn write(sink: &mut dyn Write, examples: &[Example]) -> std::io::Result<()> {
        let mut offsets = vec![0i64];
        let (mut tokens, mut trained) = (Vec::new(), Vec::new());
        for example in examples {
            tokens.extend(example.tokens.iter().flat_map(|token| token.to_le_bytes()));
            trained.extend(example.trained.iter().map(|&trained| u8::from(trained)));
            offsets.push(trained.len() as i64);
        }
        let num_tokens = trained.len();
        let num_offsets = offsets.len();
        let offsets: Vec<u8> = offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let view = |name: &str, dtype, length, data| TensorView { name: name.into(), dtype, shape: vec![length], data };
        write_safetensors(
            sink,
            &[],
            &[
                view("tokens", Dtype::U32, num_tokens, &tokens),
                view("trained", Dtype::U8, num_tokens, &trained),
                view("offsets", Dtype::I64, num_offsets, &offsets),
            ],
        )
    }

    /// Maps a file that [`Self::write`] made and checks that it is whole.
    pub fn open(path: &Path) -> Result<Self, weights::Error> {
        let file = MappedFile::open(path)?;
        let malformed = |message: &str| weights::Error::Malformed { path: path.into(), message: message.into() };
        let column = |name: &str, dtype| {
            file.tensor(name)
                .filter(|tensor| tensor.dtype == dtype && tensor.shape.len() == 1)
                .ok_or_else(|| malformed(&format!("no column {name} of prepared examples")))
        };
        let (tokens, trained) = (column("tokens", Dtype::U32)?, column("trained", Dtype::U8)?);
        let offsets: Vec<usize> = column("offsets", Dtype::I64)?
            .data
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("chunks of eight")) as usize)
            .collect();
        let covers = offsets.first() == Some(&0) && offsets.last() == Some(&trained.shape[0]);
        if !covers || tokens.shape != trained.shape || !offsets.is_sorted() {
            return Err(malformed("the offsets of the prepared examples do not match their tokens"));
        }
        let mut hash = Sha256::new();
        for part in [tokens.data, trained.data] {
            hash.update(part);
        }
        for offset in &offsets {
            hash.update((*offset as u64).to_le_bytes());
        }
        let digest = format!("sha256:{}", hex(&hash.finalize()));
        Ok(Self { file, offsets, digest })
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// SHA-256 over the content.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    fn column(&self, name: &str) -> &[u8] {
        self.file.tensor(name).expect("checked when the file was opened").data
    }

    /// Number of tokens of one example.
    pub fn num_tokens(&self, example: usize) -> usize {
        self.offsets[example + 1] - self.offsets[example]
    }

    /// Token ids of one example.
    pub fn tokens(&self, example: usize) -> impl ExactSizeIterator<Item = u32> {
        let (start, end) = (self.offsets[example] * 4, self.offsets[example + 1] * 4);
        self.column("tokens")[start..end]
            .chunks_exact(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().expect("chunks of four")))
    }

    /// 1 where the loss is taken on predicting the token.
    pub fn trained(&self, example: usize) -> &[u8] {
        &self.column("trained")[self.offsets[example]..self.offsets[example + 1]]
    }

    /// Number of tokens of one example that the loss is taken on.
    pub fn num_trained(&self, example: usize) -> usize {
        self.trained(example).iter().skip(1).filter(|&&trained| trained == 1).count()
    }

    /// Length of the longest example in tokens.
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|example| self.num_tokens(example)).max().unwrap_or(0)
    }

    /// All tokens.
    pub fn total_tokens(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_come_back_as_they_were() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("train.safetensors");
        let examples = [
            Example { tokens: vec![1, 70_000, 3], trained: vec![false, true, true] },
            Example { tokens: vec![9], trained: vec![true] },
        ];
        Examples::write(&mut std::fs::File::create(&path).expect("writable"), &examples).expect("written");
        let read = Examples::open(&path).expect("whole");
        assert_eq!((read.len(), read.longest(), read.total_tokens()), (2, 3, 4));
        assert_eq!(read.tokens(0).collect::<Vec<_>>(), [1, 70_000, 3]);
        assert_eq!((read.trained(1), read.num_trained(0), read.num_trained(1)), (&[1u8][..], 2, 0));
        let bytes = std::fs::read(&path).expect("readable");
        std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("writable");
        assert!(Examples::open(&path).is_err());
    }
}
