//! Safetensors in and out: model folders are memory-mapped, files are streamed from borrowed bytes. No tensor library
//! here, no pickle, no archive.
//!
//! The header is capped and checked before it is trusted; every message names the file and what to do.

mod reading;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors};

/// Largest header that is read.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Most tensors in one file.
const MAX_TENSORS: usize = 100_000;

/// Weights could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder holds no safetensors file.
    #[error("{}: no model.safetensors or model.safetensors.index.json here{found}; only safetensors weights are read", folder.display())]
    NoWeights {
        /// The model's folder.
        folder: PathBuf,
        /// What there is instead.
        found: String,
    },
    /// A file cannot be opened or mapped.
    #[error("{}: cannot be read ({source})", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {message}; download the model again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was found and what is expected.
        message: String,
    },
    /// A tensor holds NaN or infinity.
    #[error("{}: tensor {name} holds NaN or infinite values; download the model again or choose another revision", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// Which tensor.
        name: String,
    },
    /// A tensor is not there.
    #[error("{}: tensor {name} is missing{similar}; the model is incomplete or of another architecture", folder.display())]
    MissingTensor {
        /// The model's folder.
        folder: PathBuf,
        /// Its name.
        name: String,
        /// Names that come close.
        similar: String,
    },
    /// A tensor has a dtype that weights may not have.
    #[error("{}: tensor {name} has dtype {found}; expected F32, BF16 or F16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// Its dtype.
        found: String,
    },
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::NoWeights { .. } => ExitCode::InputNotFound,
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::InputNotFound,
            Self::Read { .. }
            | Self::Malformed { .. }
            | Self::NonFinite { .. }
            | Self::MissingTensor { .. }
            | Self::Dtype { .. } => ExitCode::BadData,
        }
    }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its contiguous little-endian bytes.
    pub data: &'a [u8],
}

impl safetensors::View for &TensorView<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.data.into()
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// A tensor whose bytes are made when it is their turn, a piece at a time: a file may be larger than memory.
pub struct StreamedTensor<'a> {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Writes its contiguous little-endian bytes, as many as dtype and shape say.
    pub write: Box<dyn Fn(&mut dyn Write) -> io::Result<()> + 'a>,
}

impl StreamedTensor<'_> {
    /// Bytes that it has in a file.
    pub fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

impl<'a> From<&TensorView<'a>> for StreamedTensor<'a> {
    fn from(view: &TensorView<'a>) -> Self {
        let data = view.data;
        let write = Box::new(move |sink: &mut dyn Write| sink.write_all(data));
        Self { name: view.name.clone(), dtype: view.dtype, shape: view.shape.clone(), write }
    }
}

/// [`stream_safetensors`] of tensors that are in memory. Nothing is copied.
pub fn write_safetensors(
    sink: &mut dyn Write,
    metadata: &[(&str, &str)],
    tensors: &[TensorView<'_>],
) -> io::Result<()> {
    let tensors: Vec<StreamedTensor> = tensors.iter().map(Into::into).collect();
    stream_safetensors(sink, metadata, &tensors)
}

/// Writes `tensors` as one safetensors file: 8 bytes of header length, the JSON header padded to 8 bytes, then the data
/// in the order of name within alignment, as the format's own library writes it.
pub fn stream_safetensors(
    sink: &mut dyn Write,
    metadata: &[(&str, &str)],
    tensors: &[StreamedTensor<'_>],
) -> io::Result<()> {
    let mut sorted: Vec<&StreamedTensor> = tensors.iter().collect();
    // Larger elements first, then by name: every tensor is aligned to its element.
    sorted.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        header.insert("__metadata__".into(), serde_json::Value::Object(entries));
    }
    let mut offset = 0;
    for tensor in &sorted {
        let end = offset + tensor.num_bytes();
        let entry = serde_json::json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut bytes = serde_json::to_vec(&header).map_err(io::Error::other)?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    sink.write_all(&(bytes.len() as u64).to_le_bytes())?;
    sink.write_all(&bytes)?;
    sorted.iter().try_for_each(|tensor| {
        let mut counted = Counted { sink: &mut *sink, bytes: 0 };
        (tensor.write)(&mut counted)?;
        assert_eq!(counted.bytes, tensor.num_bytes(), "bytes of {}", tensor.name);
        Ok(())
    })
}

/// Counts what is written.
struct Counted<'a> {
    sink: &'a mut dyn Write,
    bytes: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(data)?;
        self.bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// A tensor inside a mapped file.
#[derive(Clone, Debug)]
pub struct Mapped<'a> {
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub data: &'a [u8],
}

/// One mapped safetensors file whose header was checked.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

impl MappedFile {
    /// Maps `path` and checks its header: sizes, counts, dtypes, offsets.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_path_buf(), source };
        let malformed = |message| Error::Malformed { path: path.to_path_buf(), message };
        let file = File::open(path).map_err(read)?;
        // SAFETY: the file is mapped read-only; the documentation asks users not to change a model while it is in use.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let prefix: [u8; 8] = map.get(..8).and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| {
            malformed(format!("the file has {} bytes, less than the 8 of a safetensors header length", map.len()))
        })?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > map.len() as u64 - 8 {
            return Err(malformed(format!(
                "the header says {header_bytes} bytes, the file has {} and at most {MAX_HEADER_BYTES} are accepted: \
                 it is truncated or not safetensors",
                map.len()
            )));
        }
        let (_, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| malformed(format!("not a valid safetensors file ({error}): truncated or damaged")))?;
        if metadata.tensors().len() > MAX_TENSORS {
            return Err(malformed(format!("{} tensors, at most {MAX_TENSORS} are accepted", metadata.tensors().len())));
        }
        Ok(Self { path: path.to_path_buf(), data_start: 8 + header_bytes as usize, map, metadata })
    }

    /// Names of its tensors.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// One tensor, of any dtype.
    pub fn tensor(&self, name: &str) -> Option<Mapped<'_>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let data = &self.map[self.data_start + start..self.data_start + end];
        Some(Mapped { dtype: info.dtype, shape: info.shape.clone(), data })
    }

    /// The file, to say where something was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets go of the memory that some bytes of a tensor take since they were read; whoever reads them again reads the file.
    pub fn release(&self, data: &[u8]) {
        let start = data.as_ptr().addr() - self.map.as_ptr().addr();
        // SAFETY: pages of a read-only map of a file come back with the same bytes. Refused or not, they stay readable.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, data.len()) };
    }
}

/// The memory-mapped weight files of a model folder.
#[derive(Debug)]
pub struct WeightFiles {
    folder: PathBuf,
    files: Vec<MappedFile>,
    /// File of each tensor.
    index: HashMap<String, usize>,
}

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let single = folder.join("model.safetensors");
        let index_path = folder.join("model.safetensors.index.json");
        if single.exists() {
            let file = MappedFile::open(&single)?;
            let index = file.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Self { folder: folder.into(), files: vec![file], index });
        }
        if !index_path.exists() {
            return Err(Error::NoWeights { folder: folder.into(), found: pickled_files(folder) });
        }
        let malformed = |message: String| Error::Malformed { path: index_path.clone(), message };
        let text =
            std::fs::read_to_string(&index_path).map_err(|source| Error::Read { path: index_path.clone(), source })?;
        let shards: ShardIndex =
            serde_json::from_str(&text).map_err(|error| malformed(format!("not a shard index ({error})")))?;
        let mut names: Vec<&String> = shards.weight_map.values().collect();
        names.sort();
        names.dedup();
        let mut files = Vec::new();
        for name in &names {
            if Path::new(name.as_str()).file_name().is_none_or(|plain| plain != name.as_str()) {
                return Err(malformed(format!("shard {name:?} is not a plain file name")));
            }
            files.push(MappedFile::open(&folder.join(name.as_str()))?);
        }
        let mut index = HashMap::new();
        for (tensor, shard) in &shards.weight_map {
            let file = names.binary_search(&shard).expect("the names were taken from this map");
            if files[file].metadata.info(tensor).is_none() {
                return Err(malformed(format!("tensor {tensor} is listed in {shard} and is not there")));
            }
            index.insert(tensor.clone(), file);
        }
        Ok(Self { folder: folder.into(), files, index })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.index.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The mapped files.
    pub fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// One tensor in F32, BF16 or F16.
    pub fn tensor(&self, name: &str) -> Result<Mapped<'_>, Error> {
        let Some(&file) = self.index.get(name) else {
            return Err(Error::MissingTensor {
                folder: self.folder.clone(),
                name: name.into(),
                similar: self.similar(name),
            });
        };
        let file = &self.files[file];
        let mapped = file.tensor(name).expect("the index lists tensors of this file");
        if !matches!(mapped.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(Error::Dtype {
                path: file.path.clone(),
                name: name.into(),
                found: format!("{:?}", mapped.dtype),
            });
        }
        Ok(mapped)
    }

    /// Lets go of what was read of a tensor, as [`MappedFile::release`] does.
    pub fn release(&self, name: &str) {
        let file = self.index.get(name).map(|&file| &self.files[file]);
        if let Some((file, mapped)) = file.and_then(|file| Some((file, file.tensor(name)?))) {
            file.release(mapped.data);
        }
    }

    fn similar(&self, name: &str) -> String {
        let common = |other: &str| other.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
        let nearest = self.names().into_iter().max_by_key(|other| common(other));
        nearest.map_or_else(String::new, |nearest| format!(" (the nearest name there is {nearest})"))
    }
}

/// Names the weights in formats that are not read, for the error message.
fn pickled_files(folder: &Path) -> String {
    let names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| [".bin", ".pt", ".pth", ".gguf"].iter().any(|extension| name.ends_with(extension)))
        .collect();
    if names.is_empty() { String::new() } else { format!(", only {}", names.join(", ")) }
}

#[cfg(test)]
mod tests;
