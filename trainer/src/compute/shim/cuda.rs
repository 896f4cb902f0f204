//! Our kernels for bf16 on CUDA (`cuda/pointwise.cu`; dropout's for fp32 too), which the binary carries as machine code for several
//! GPUs and as PTX for later ones. The driver loads them, without CUDA's runtime and without a compiler. [`fits`] says whether they
//! can be used; where arguments do not belong together they panic.
//!
//! They run in the context and on the stream that libtorch uses: the device's primary context, and the legacy default
//! stream, which the trainer never changes. So libtorch's own operations before and after are in order with them, and memory
//! that its allocator hands on is free by then.

mod driver;

use std::ffi::{CStr, CString, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use super::DropoutMask;

pub use self::driver::{ComputeCapability, DRIVER, Error, Properties, library, properties, read_properties};
use self::driver::{Driver, Handle, ORDINAL};
use super::recorded;

/// Of the first GPUs that multiply in bf16. Our kernels and flash attention are compiled for these and later ones.
const FIRST_WITH_BF16: ComputeCapability = (8, 0);
/// What the kernels need of a row: whole vectors of 16 bytes.
pub const ROW_WIDTH: i64 = 8;
/// What [`Kernels::rotate`] needs of a head's size: its halves are whole vectors.
pub const HEAD_WIDTH: i64 = 16;

/// The compiled kernels, where the driver finds numbers of eight bytes.
#[repr(C, align(8))]
struct Image<T: ?Sized>(T);
static IMAGE: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The image that [`Kernels::load`] gives to the driver.
pub fn image() -> &'static [u8] {
    &IMAGE.0
}

/// Names of the kernels in the image, in the order of `Kernel`.
pub const NAMES: [&str; 8] = [
    "finetune_swiglu",
    "finetune_swiglu_backward",
    "finetune_rms_norm",
    "finetune_rms_norm_backward",
    "finetune_rotate",
    "finetune_cross_entropy",
    "finetune_dropout",
    "finetune_dropout_fp32",
];

/// What the profiler calls a launch of each: the names of their counterparts on the CPU.
const OPERATIONS: [&CStr; NAMES.len()] = [
    c"finetune::swiglu",
    c"finetune::swiglu_backward",
    c"finetune::rms_norm",
    c"finetune::rms_norm_backward",
    c"finetune::rotate",
    c"finetune::cross_entropy",
    c"finetune::dropout",
    c"finetune::dropout",
];

#[derive(Clone, Copy, Debug)]
enum Kernel {
    Swiglu,
    SwigluBackward,
    RmsNorm,
    RmsNormBackward,
    Rotate,
    CrossEntropy,
    Dropout,
    DropoutFp32,
}

/// The kernels on one device.
pub struct Kernels {
    driver: Driver,
    context: Handle,
    functions: [Handle; NAMES.len()],
}

// SAFETY: contexts and functions are handles that any thread may use, and they live as long as the process.
unsafe impl Send for Kernels {}
// SAFETY: as above; the driver locks what it changes.
unsafe impl Sync for Kernels {}

/// Loads the kernels once.
pub fn load() -> Result<&'static Kernels, &'static Error> {
    static LOADED: OnceLock<Result<Kernels, Error>> = OnceLock::new();
    LOADED.get_or_init(|| Kernels::load(&library(DRIVER))).as_ref()
}

/// Whether a GPU multiplies in bf16; one whose compute capability is not known is a new one.
pub fn multiplies_bf16(capability: Option<ComputeCapability>) -> bool {
    capability.is_none_or(|capability| capability >= FIRST_WITH_BF16)
}

/// The kernels, if they take these tensors: bf16 on the device, contiguous, the last dimension a multiple of `width`.
pub fn fits(tensors: &[&Tensor], width: i64) -> Option<&'static Kernels> {
    let fits = tensors.iter().all(|tensor| is_ours(tensor.device()) && has_rows(tensor, width));
    fits.then(load)?.ok()
}

/// The kernels, if this is the device that they are loaded on.
pub fn on(device: Device) -> Option<&'static Kernels> {
    is_ours(device).then(load)?.ok()
}

fn is_ours(device: Device) -> bool {
    device == Device::Cuda(ORDINAL as usize)
}

/// Whether a kernel can read a tensor row by row.
fn has_rows(tensor: &Tensor, width: i64) -> bool {
    tensor.kind() == Kind::BFloat16
        && tensor.is_contiguous()
        && tensor.size().last().is_some_and(|size| size % width == 0)
        && (tensor.data_ptr() as usize).is_multiple_of(16)
}

/// Panics where tensors have another shape or lie elsewhere, or a kernel cannot read them row by row.
fn expect(tensors: &[&Tensor], shape: &[i64], width: i64, device: Device) {
    for tensor in tensors {
        assert_eq!((tensor.size().as_slice(), tensor.device()), (shape, device));
        assert!(has_rows(tensor, width), "{tensor:?} must be contiguous and aligned bf16, a multiple of {width} wide");
    }
}

/// Blocks are whole warps.
const WARP: i64 = 32;
/// Threads of a block where each has one vector.
const THREADS: i64 = 256;
/// Most threads for a row of a hidden size, and of a vocabulary.
const MOST_FOR_NORM: i64 = 256;
const MOST_FOR_LOGITS: i64 = 1024;

fn pointer(tensor: &Tensor) -> u64 {
    tensor.data_ptr() as u64
}

fn integer(value: i64) -> u64 {
    value as u64
}

fn real(value: f64) -> u64 {
    u64::from((value as f32).to_bits())
}

fn rows(tensor: &Tensor) -> (i64, i64) {
    let columns = *tensor.size().last().expect("a row has columns");
    (tensor.numel() as i64 / columns, columns)
}

/// Threads of a block that works on one row: a vector for each, in whole warps, `most` at most.
fn threads_of_row(columns: i64, most: i64) -> i64 {
    ((columns / ROW_WIDTH).clamp(1, most) + WARP - 1) / WARP * WARP
}

impl Kernels {
    /// Loads the kernels with the driver at `path`.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let driver = Driver::start(path)?;
        let device = driver.device()?;
        let (mut context, mut module) = (null_mut(), null_mut());
        let mut functions = [null_mut(); NAMES.len()];
        // SAFETY: the driver writes one handle through each pointer and reads the image by the sizes in it.
        unsafe {
            driver.check((driver.retain_primary_context)(&raw mut context, device), "cuDevicePrimaryCtxRetain")?;
            driver.check((driver.set_context)(context), "cuCtxSetCurrent")?;
            driver.check((driver.load_module)(&raw mut module, image().as_ptr().cast()), "cuModuleLoadData")?;
            for (function, name) in functions.iter_mut().zip(NAMES) {
                let text = CString::new(name).expect("names have no zero byte");
                let found = (driver.get_function)(function, module, text.as_ptr());
                driver.check(found, format!("cuModuleGetFunction of {name}"))?;
            }
        }
        Ok(Self { driver, context, functions })
    }

    /// Starts a kernel. Each argument lies in the low bytes of its word; `inputs` are for the profiler. Like tch's own functions it
    /// panics where the device refuses.
    fn launch(&self, kernel: Kernel, blocks: i64, threads: i64, inputs: &[&Tensor], mut arguments: Vec<u64>) {
        if blocks == 0 {
            return;
        }
        let _recorded = recorded(OPERATIONS[kernel as usize], inputs);
        let name = NAMES[kernel as usize];
        let blocks = c_uint::try_from(blocks).unwrap_or_else(|_| panic!("{name} cannot have {blocks} blocks"));
        let mut parameters: Vec<*mut c_void> =
            arguments.iter_mut().map(|argument| std::ptr::from_mut(argument).cast()).collect();
        let (function, parameters) = (self.functions[kernel as usize], parameters.as_mut_ptr());
        // SAFETY: the parameters point at words that outlive the call, in the order and number of the kernel's own
        // (tests/it/cuda.rs); the tensors' memory is used in the order of the stream, after which libtorch hands it on.
        let launched = unsafe {
            self.driver.check((self.driver.set_context)(self.context), "cuCtxSetCurrent").and_then(|()| {
                let threads = threads as c_uint;
                let code =
                    (self.driver.launch)(function, blocks, 1, 1, threads, 1, 1, 0, null_mut(), parameters, null_mut());
                self.driver.check(code, format!("cuLaunchKernel of {name}"))
            })
        };
        launched.unwrap_or_else(|error| panic!("{error}"));
    }

    fn launch_by_vector(&self, kernel: Kernel, vectors: i64, inputs: &[&Tensor], arguments: Vec<u64>) {
        self.launch(kernel, (vectors + THREADS - 1) / THREADS, THREADS, inputs, arguments);
    }

    /// `silu(gate) * up`
    pub fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        expect(&[gate, up], &gate.size(), ROW_WIDTH, gate.device());
        let (out, count) = (gate.empty_like(), gate.numel() as i64);
        let arguments = vec![pointer(gate), pointer(up), pointer(&out), integer(count)];
        self.launch_by_vector(Kernel::Swiglu, count / ROW_WIDTH, &[gate, up], arguments);
        out
    }

    /// The gradients of [`Kernels::swiglu`] with respect to `gate` and `up`.
    pub fn swiglu_backward(&self, gradient: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
        expect(&[gate, up, gradient], &gate.size(), ROW_WIDTH, gate.device());
        let (d_gate, d_up, count) = (gate.empty_like(), up.empty_like(), gate.numel() as i64);
        let mut arguments: Vec<u64> = [gradient, gate, up, &d_gate, &d_up].map(pointer).into();
        arguments.push(integer(count));
        self.launch_by_vector(Kernel::SwigluBackward, count / ROW_WIDTH, &[gradient, gate, up], arguments);
        (d_gate, d_up)
    }

    /// RMSNorm of rows.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let (out, (rows, columns)) = (x.empty_like(), rows(x));
        expect(&[x], &x.size(), ROW_WIDTH, x.device());
        expect(&[weight], &[columns], ROW_WIDTH, x.device());
        let arguments = vec![pointer(x), pointer(weight), pointer(&out), integer(columns), real(eps)];
        self.launch(Kernel::RmsNorm, rows, threads_of_row(columns, MOST_FOR_NORM), &[x, weight], arguments);
        out
    }

    /// `residual` plus the gradient of [`Kernels::rms_norm`] with respect to `x`.
    pub fn rms_norm_backward(
        &self,
        gradient: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f64,
        residual: &Tensor,
    ) -> Tensor {
        let (out, (rows, columns)) = (x.empty_like(), rows(x));
        expect(&[x, gradient, residual], &x.size(), ROW_WIDTH, x.device());
        expect(&[weight], &[columns], ROW_WIDTH, x.device());
        let mut arguments: Vec<u64> = [gradient, x, weight, residual, &out].map(pointer).into();
        arguments.extend([integer(columns), real(eps)]);
        let inputs = [gradient, x, weight, residual];
        self.launch(Kernel::RmsNormBackward, rows, threads_of_row(columns, MOST_FOR_NORM), &inputs, arguments);
        out
    }

    /// `x * cos + sign * swap_halves(x) * sin` of x `[t, n, d]`, cos and sin `[t, 1, d]`.
    pub fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Tensor {
        let (tokens, heads, size) = x.size3().unwrap_or_else(|error| panic!("{error}"));
        expect(&[x], &[tokens, heads, size], HEAD_WIDTH, x.device());
        expect(&[cos, sin], &[tokens, 1, size], HEAD_WIDTH, x.device());
        let (out, vectors) = (x.empty_like(), x.numel() as i64 / 2 / ROW_WIDTH);
        assert!(u32::try_from(vectors).is_ok(), "{x:?} is more than one rotation counts");
        let mut arguments: Vec<u64> = [x, cos, sin, &out].map(pointer).into();
        arguments.extend([integer(vectors), integer(heads), integer(size), real(sign)]);
        self.launch_by_vector(Kernel::Rotate, vectors, &[x, cos, sin], arguments);
        out
    }

    /// Negative log-likelihoods of `labels` (int64 `[n]`), fp32 `[n]`. The logits `[n, v]` become `scale * (softmax - onehot)`.
    pub fn cross_entropy(&self, logits: &Tensor, labels: &Tensor, scale: f64) -> Tensor {
        let (rows, columns) = rows(logits);
        expect(&[logits], &logits.size(), 1, logits.device());
        let found = (labels.kind(), labels.size(), labels.device(), labels.is_contiguous());
        assert_eq!(found, (Kind::Int64, vec![rows], logits.device(), true), "labels");
        let losses = Tensor::empty([rows], (Kind::Float, logits.device()));
        let mut arguments: Vec<u64> = [logits, labels, &losses].map(pointer).into();
        arguments.extend([integer(columns), real(scale)]);
        self.launch(Kernel::CrossEntropy, rows, threads_of_row(columns, MOST_FOR_LOGITS), &[logits, labels], arguments);
        losses
    }

    /// A mask of dropout in bf16 or fp32.
    pub fn dropout(&self, mask: &DropoutMask) -> Tensor {
        let out = mask.empty();
        for tensor in [mask.keys, mask.positions] {
            let found = (tensor.kind(), tensor.size(), tensor.device(), tensor.is_contiguous());
            assert_eq!(found, (Kind::Int64, vec![out.size()[0]], out.device(), true), "keys and positions");
        }
        let kernel = match mask.kind {
            Kind::BFloat16 => Kernel::Dropout,
            Kind::Float => Kernel::DropoutFp32,
            other => panic!("a mask of dropout in {other:?}"),
        };
        let counters = out.size()[0] * ((mask.columns + 3) / 4);
        assert!(u32::try_from(counters).is_ok(), "{out:?} is more than one mask counts");
        let mut arguments: Vec<u64> = [mask.keys, mask.positions, &out].map(pointer).into();
        arguments.extend([counters, mask.columns, mask.site.into(), mask.threshold.into()].map(integer));
        arguments.push(real(mask.kept));
        self.launch_by_vector(kernel, counters, &[mask.keys, &out], arguments);
        out
    }
}
