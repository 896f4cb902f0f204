//! NVIDIA's driver: where its library is, the functions of it that are called, and what it says of the device.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

/// The driver's name, as containers get it.
pub const DRIVER: &str = "libcuda.so.1";
/// Where clusters put the driver's libraries that the loader does not find by itself: Google's device plugin mounts the node's there.
/// Amazon's, and others with NVIDIA's container toolkit, put them where the loader looks.
const FOLDERS: [&str; 1] = ["/usr/local/nvidia/lib64"];
/// The device that the trainer computes on.
pub(super) const ORDINAL: c_int = 0;

/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`, and of `COMPUTE_CAPABILITY` `_MAJOR` and `_MINOR`.
const ATTRIBUTES: [c_int; 3] = [16, 75, 76];

/// Major and minor.
pub type ComputeCapability = (c_int, c_int);

/// What the driver says of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Its compute capability.
    pub compute_capability: ComputeCapability,
    /// Its multiprocessors.
    pub multiprocessors: c_int,
}

/// A library of the driver's: its name where the loader finds it, or its path in a folder where clusters put it.
pub fn library(name: &str) -> PathBuf {
    library_in(name, &FOLDERS.map(Path::new))
}

fn library_in(name: &str, folders: &[&Path]) -> PathBuf {
    // SAFETY: the driver's own library; its initialisers do nothing that could be too early.
    if unsafe { Library::new(name) }.is_ok() {
        return name.into();
    }
    folders.iter().map(|folder| folder.join(name)).find(|path| path.exists()).unwrap_or_else(|| name.into())
}

/// Of the device, asked for once; `None` where there is none.
pub fn properties() -> Option<Properties> {
    static PROPERTIES: OnceLock<Option<Properties>> = OnceLock::new();
    *PROPERTIES.get_or_init(|| read_properties(&library(DRIVER)).ok())
}

/// What the driver at `path` says of the device.
pub fn read_properties(path: &Path) -> Result<Properties, Error> {
    let driver = Driver::start(path)?;
    let device = driver.device()?;
    let read = |attribute| {
        let mut value = 0;
        // SAFETY: the driver writes one number.
        let code = unsafe { (driver.device_attribute)(&raw mut value, attribute, device) };
        driver.check(code, format!("cuDeviceGetAttribute of {attribute}")).map(|()| value)
    };
    let [multiprocessors, major, minor] = ATTRIBUTES;
    let compute_capability = (read(major)?, read(minor)?);
    Ok(Properties { compute_capability, multiprocessors: read(multiprocessors)? })
}

/// Why there are no kernels, or a launch failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No driver, or one that lacks a function.
    #[error("{}: {source}", path.display())]
    Driver {
        /// Its path.
        path: PathBuf,
        /// What the loader says.
        source: libloading::Error,
    },
    /// The driver refused.
    #[error("{call}: {message} (CUDA error {code})")]
    Call {
        /// The driver's function, and what it was called for.
        call: String,
        /// The driver's own text.
        message: String,
        /// `CUresult`
        code: c_int,
    },
}

/// A `CUcontext`, `CUmodule`, `CUfunction` or `CUstream`.
pub(super) type Handle = *mut c_void;

/// The functions of the driver that are called here, by `CUresult` what they return.
pub(super) struct Driver {
    pub init: unsafe extern "C" fn(c_uint) -> c_int,
    pub error_string: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    pub device_get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    /// Value, attribute, device.
    pub device_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    pub retain_primary_context: unsafe extern "C" fn(*mut Handle, c_int) -> c_int,
    pub set_context: unsafe extern "C" fn(Handle) -> c_int,
    pub load_module: unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int,
    pub get_function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int,
    /// Function, grid, block, shared memory, stream, parameters, extra.
    pub launch: unsafe extern "C" fn(
        Handle,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_int,
    /// Behind all of them.
    _library: Library,
}

impl Driver {
    /// The driver at `path`, ready to be called.
    pub fn start(path: &Path) -> Result<Self, Error> {
        let driver = Self::open(path).map_err(|source| Error::Driver { path: path.to_path_buf(), source })?;
        // SAFETY: it takes a number.
        driver.check(unsafe { (driver.init)(0) }, "cuInit")?;
        Ok(driver)
    }

    fn open(path: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: the driver's library, or one that stands for it; the types are those of cuda.h, which the tests' own driver
        // is compiled with.
        unsafe {
            let library = Library::new(path)?;
            Ok(Self {
                init: *library.get(b"cuInit\0")?,
                error_string: *library.get(b"cuGetErrorString\0")?,
                device_get: *library.get(b"cuDeviceGet\0")?,
                device_attribute: *library.get(b"cuDeviceGetAttribute\0")?,
                retain_primary_context: *library.get(b"cuDevicePrimaryCtxRetain\0")?,
                set_context: *library.get(b"cuCtxSetCurrent\0")?,
                load_module: *library.get(b"cuModuleLoadData\0")?,
                get_function: *library.get(b"cuModuleGetFunction\0")?,
                launch: *library.get(b"cuLaunchKernel\0")?,
                _library: library,
            })
        }
    }

    /// The device that the trainer computes on.
    pub fn device(&self) -> Result<c_int, Error> {
        let mut device = 0;
        // SAFETY: the driver writes one number.
        self.check(unsafe { (self.device_get)(&raw mut device, ORDINAL) }, "cuDeviceGet")?;
        Ok(device)
    }

    pub fn check(&self, code: c_int, call: impl Into<String>) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: the driver writes a pointer to a text of its own, or null for a code that it does not know.
        let message = unsafe {
            (self.error_string)(code, &raw mut text);
            if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        Err(Error::Call { call: call.into(), message: message.into_owned(), code })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_found_where_the_loader_or_the_cluster_has_it() {
        let folder = tempfile::tempdir().expect("writable");
        let missing = "libnot-there.so.1";
        assert_eq!(library_in(missing, &[folder.path()]), Path::new(missing), "its name is what an error tells");
        std::fs::write(folder.path().join(missing), "").expect("writable");
        assert_eq!(library_in(missing, &[Path::new("/nowhere"), folder.path()]), folder.path().join(missing));
        std::fs::write(folder.path().join("libc.so.6"), "").expect("writable");
        assert_eq!(library_in("libc.so.6", &[folder.path()]), Path::new("libc.so.6"), "the loader comes first");
    }
}
