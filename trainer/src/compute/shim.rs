//! The few libtorch calls that tch does not bind, through `cpp/shim.cpp`. All `unsafe` around libtorch lives here.

pub mod cpu;
pub mod cuda;
pub mod decode;
pub mod fused;

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::Tensor;

unsafe extern "C" {
    fn ft_last_error() -> *const c_char;
    fn ft_fused_adamw(
        parameter: *mut c_void,
        gradient: *mut c_void,
        exp_avg: *mut c_void,
        exp_avg_sq: *mut c_void,
        step: *mut c_void,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        found_inf: *mut c_void,
    ) -> c_int;
    fn ft_flash_attention(
        q: *mut c_void,
        k: *mut c_void,
        v: *mut c_void,
        cu_seqlens: *mut c_void,
        max_length: i64,
        scale: f64,
        out: *mut *mut c_void,
        logsumexp: *mut *mut c_void,
        rng_state: *mut *mut c_void,
        unused: *mut *mut c_void,
    ) -> c_int;
    fn ft_upload(host: *mut c_void, device: c_int, out: *mut *mut c_void) -> c_int;
    fn ft_libtorch_version() -> *const c_char;
    fn ft_device_total_bytes(device: c_int, bytes: *mut i64) -> c_int;
    fn ft_set_deterministic() -> c_int;
    fn ft_device_peak_bytes(device: c_int, bytes: *mut i64) -> c_int;
    fn ft_profile_start(cuda: c_int) -> c_int;
    fn ft_profile_stop(trace: *const c_char, tell: Tell, context: *mut c_void) -> c_int;
    fn ft_record_start(
        name: *const c_char,
        inputs: *const *mut c_void,
        count: usize,
        record: *mut *mut c_void,
    ) -> c_int;
    fn ft_record_end(record: *mut c_void);
}

type Tell = extern "C" fn(*mut c_void, *const c_char, u64, u64, c_int, i64, *const c_char);

/// A libtorch call failed; the text is the first line of libtorch's own message.
#[derive(Debug, thiserror::Error)]
#[error("libtorch: {0}")]
pub struct Error(String);

fn check(status: c_int) -> Result<(), Error> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the shim returns a pointer to a thread-local string that lives until its next failure on this thread.
    let text = unsafe { CStr::from_ptr(ft_last_error()) };
    Err(Error(text.to_string_lossy().into_owned()))
}

/// Panics where a call failed, as tch's own functions do.
fn done(status: c_int) {
    check(status).unwrap_or_else(|error| panic!("{error}"));
}

fn handle(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast()
}

/// A mask of dropout that is about to be made, `[t, columns]`: 0 where a column's random word is below `threshold`, `kept`
/// elsewhere. `dropout.rs` says which word is a column's.
#[derive(Clone, Copy, Debug)]
pub struct DropoutMask<'a> {
    /// The generator's key for each token, int64 `[t]`.
    pub keys: &'a Tensor,
    /// Position of each token within its example, int64 `[t]`.
    pub positions: &'a Tensor,
    /// Columns of the mask.
    pub columns: i64,
    /// Its dtype.
    pub kind: tch::Kind,
    /// Which of the masks of a token this is.
    pub site: u32,
    /// Of 2^32 words so many drop a column.
    pub threshold: u32,
    /// A number of that dtype.
    pub kept: f64,
}

impl DropoutMask<'_> {
    /// The mask's place, not written yet.
    fn empty(&self) -> Tensor {
        Tensor::empty([self.keys.size()[0], self.columns], (self.kind, self.keys.device()))
    }
}

/// Constants of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// One AdamW step over flat fp32 buffers of equal length. `step` (fp32 scalar) already counts this step; where
/// `found_inf` (fp32 scalar) is 1 nothing moves.
pub fn fused_adamw(
    parameter: &Tensor,
    gradient: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    step: &Tensor,
    found_inf: &Tensor,
    constants: AdamwStep,
) -> Result<(), Error> {
    // SAFETY: the handles are live tensors for the whole call; libtorch checks shapes and dtypes.
    check(unsafe {
        ft_fused_adamw(
            handle(parameter),
            handle(gradient),
            handle(exp_avg),
            handle(exp_avg_sq),
            handle(step),
            constants.learning_rate,
            constants.beta1,
            constants.beta2,
            constants.weight_decay,
            constants.eps,
            handle(found_inf),
        )
    })
}

/// What flash attention returns: the output `[t, heads, d]`, and what its backward needs.
#[derive(Debug)]
pub struct FlashAttention {
    /// `[t, heads, d]`
    pub out: Tensor,
    /// `[heads, t]`, fp32
    pub logsumexp: Tensor,
    /// Philox state; unused without dropout.
    pub rng_state: Tensor,
    /// A placeholder of libtorch's signature.
    pub unused: Tensor,
}

/// Causal attention over packed examples on CUDA: q `[t, heads, d]`, k and v `[t, kv_heads, d]` in bf16 or fp16,
/// `cu_seqlens` int32 `[n + 1]` on the device, `max_length` the longest example.
pub fn flash_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &Tensor,
    max_length: i64,
    scale: f64,
) -> Result<FlashAttention, Error> {
    let mut outputs = [std::ptr::null_mut(); 4];
    let [out, logsumexp, rng_state, unused] = &mut outputs;
    // SAFETY: the handles are live tensors; the outputs are written before success is returned.
    check(unsafe {
        ft_flash_attention(
            handle(q),
            handle(k),
            handle(v),
            handle(cu_seqlens),
            max_length,
            scale,
            out,
            logsumexp,
            rng_state,
            unused,
        )
    })?;
    // SAFETY: each pointer is a tensor that the shim allocated for us; ownership passes here.
    let [out, logsumexp, rng_state, unused] = outputs.map(|pointer| unsafe { Tensor::from_ptr(pointer.cast()) });
    Ok(FlashAttention { out, logsumexp, rng_state, unused })
}

/// Values of the host on a device. To a CUDA device they go through pinned memory, and nobody waits for them here.
pub fn upload<T: tch::kind::Element>(values: &[T], device: tch::Device) -> Tensor {
    let host = Tensor::from_slice(values);
    let tch::Device::Cuda(index) = device else { return host.to_device(device) };
    let mut out = std::ptr::null_mut();
    // SAFETY: the host's tensor lives during the call; the output is written before success is returned.
    done(unsafe { ft_upload(handle(&host), index as c_int, &raw mut out) });
    // SAFETY: a tensor that the shim allocated for us; ownership passes here.
    unsafe { Tensor::from_ptr(out.cast()) }
}

/// The version of the libtorch that this binary was compiled against, for example `2.11.0`.
pub fn libtorch_version() -> String {
    // SAFETY: the shim returns a string literal.
    unsafe { CStr::from_ptr(ft_libtorch_version()) }.to_string_lossy().into_owned()
}

/// Bytes of memory of accelerator `device`, free or not.
pub fn device_total_bytes(device: i32) -> Result<i64, Error> {
    let mut bytes = 0;
    // SAFETY: `bytes` outlives the call.
    check(unsafe { ft_device_total_bytes(device, &raw mut bytes) })?;
    Ok(bytes)
}

/// Makes libtorch refuse operations that have no deterministic form.
pub fn set_deterministic() -> Result<(), Error> {
    // SAFETY: no arguments.
    check(unsafe { ft_set_deterministic() })
}

/// Peak bytes allocated on accelerator `device` since the process began.
pub fn device_peak_bytes(device: i32) -> Result<i64, Error> {
    let mut bytes = 0;
    // SAFETY: `bytes` outlives the call.
    check(unsafe { ft_device_peak_bytes(device, &raw mut bytes) })?;
    Ok(bytes)
}

/// One call of libtorch, or one kernel on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// For example `aten::mm`.
    pub name: String,
    /// When it began, ns.
    pub start: u64,
    /// How long it took, what it called included, ns.
    pub duration: u64,
    /// A kernel, not the call that launched it.
    pub on_device: bool,
    /// Of a kernel the innermost call that launched it, as an index into the same list; `None` where the profiler saw no call.
    pub launched_by: Option<usize>,
    /// C++ dtype and shape of each argument that is a tensor, for example `c10::BFloat16 4 5;float 5`.
    pub inputs: String,
}

/// Runs `work` under libtorch's profiler: its result, what it called on this thread, and a Chrome trace at `trace`.
pub fn profile<T>(cuda: bool, trace: &std::path::Path, work: impl FnOnce() -> T) -> Result<(T, Vec<Operation>), Error> {
    extern "C" fn note(
        context: *mut c_void,
        name: *const c_char,
        start: u64,
        duration: u64,
        on_device: c_int,
        launched_by: i64,
        inputs: *const c_char,
    ) {
        // SAFETY: the context is the list below, and both texts live during the call.
        let (list, name, inputs) =
            unsafe { (&mut *context.cast::<Vec<Operation>>(), CStr::from_ptr(name), CStr::from_ptr(inputs)) };
        let text = |text: &CStr| text.to_string_lossy().into_owned();
        list.push(Operation {
            name: text(name),
            start,
            duration,
            on_device: on_device != 0,
            launched_by: usize::try_from(launched_by).ok(),
            inputs: text(inputs),
        });
    }
    let path = std::ffi::CString::new(trace.as_os_str().as_encoded_bytes())
        .map_err(|_| Error(format!("{}: a path cannot hold a zero byte", trace.display())))?;
    // SAFETY: a flag only.
    check(unsafe { ft_profile_start(c_int::from(cuda)) })?;
    let result = work();
    let mut operations = Vec::new();
    // SAFETY: path and list outlive the call, which is over when `note` is called no more.
    check(unsafe { ft_profile_stop(path.as_ptr(), note, (&raw mut operations).cast()) })?;
    Ok((result, operations))
}

/// An operation for the profiler, as long as it lives. Kernels that are started meanwhile are put down to it.
#[must_use]
struct Recorded(*mut c_void);

/// Begins an operation that libtorch does not know of. Where no profiler runs that costs next to nothing.
fn recorded(name: &'static CStr, inputs: &[&Tensor]) -> Recorded {
    let inputs: Vec<*mut c_void> = inputs.iter().map(|input| handle(input)).collect();
    let mut record = std::ptr::null_mut();
    // SAFETY: the name lives for ever, the tensors during the call, after which the shim keeps none of them.
    done(unsafe { ft_record_start(name.as_ptr(), inputs.as_ptr(), inputs.len(), &raw mut record) });
    Recorded(record)
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: the shim's own record or null, ended once.
        unsafe { ft_record_end(self.0) }
    }
}

/// A tensor over memory that somebody else owns, without a copy. Panics where the memory is not as long as the tensor.
///
/// # Safety
/// `data` must stay mapped and unchanged as long as the tensor or any view of it lives.
pub unsafe fn borrow_bytes(data: &[u8], shape: &[i64], kind: tch::Kind) -> Tensor {
    let mut strides = vec![1; shape.len()];
    for dim in (0..shape.len().saturating_sub(1)).rev() {
        strides[dim] = strides[dim + 1] * shape[dim + 1];
    }
    let elements = usize::try_from(shape.iter().product::<i64>()).expect("sizes are not negative");
    assert_eq!(data.len(), elements * kind.elt_size_in_bytes(), "bytes of a {kind:?} tensor {shape:?}");
    // SAFETY: the caller keeps `data` alive, and it is as long as the tensor.
    unsafe { Tensor::from_blob(data.as_ptr(), shape, &strides, kind, tch::Device::Cpu) }
}

/// The bytes of a contiguous CPU tensor, borrowed.
pub fn tensor_bytes(tensor: &Tensor) -> &[u8] {
    assert!(
        tensor.is_contiguous() && tensor.device() == tch::Device::Cpu,
        "bytes are taken from contiguous CPU tensors"
    );
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    // SAFETY: a contiguous CPU tensor holds exactly this many bytes at its data pointer, and it is borrowed meanwhile.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length) }
}

/// Gives free memory inside the heap back to the kernel; using it again costs a page fault each.
pub fn release_free_memory() {
    // SAFETY: malloc_trim only touches memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps large tensors on the heap between steps: glibc would map and unmap each one above 32 MB on every use.
pub fn keep_large_allocations() {
    // SAFETY: mallopt only sets allocator parameters.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
