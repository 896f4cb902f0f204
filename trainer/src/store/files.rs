//! Files that are there whole or not at all, and their digests.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The digest of some bytes in the form that manifests use.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// The digest of a file.
pub fn digest_file(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("sha256:{}", hex(&hash.finalize()))),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// Makes a rename or a new file in `folder` durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Writes a file to a sibling, syncs it and renames it into place.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // A temporary file is private by default; what it becomes is for everyone who may read the folder.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(folder)
}

/// Counts and digests what passes through it.
#[derive(Debug)]
pub struct HashingWriter<W> {
    /// Where the bytes go.
    pub inner: W,
    hash: Sha256,
    /// Bytes that went.
    pub bytes: u64,
}

impl<W> HashingWriter<W> {
    /// Nothing has gone to `inner` yet.
    pub fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// `sha256:…` of what went.
    pub fn digest(self) -> String {
        format!("sha256:{}", hex(&self.hash.finalize()))
    }
}
impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let length = self.inner.write(data)?;
        self.hash.update(&data[..length]);
        self.bytes += length as u64;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
