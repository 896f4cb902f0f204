//! Where the model is computed and in which dtype, and what the machine offers: threads, memory, energy.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crds::run::Precision;
use tch::{Cuda, Device, Kind, Tensor};

use crate::compute::gpu::Gpus;
use crate::compute::shim::cpu::{self, Instructions};
use crate::compute::shim::cuda::{ComputeCapability, DRIVER, library, multiplies_bf16, properties};

/// What was chosen and why.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Where the model is computed.
    pub device: Device,
    /// For example `AMD EPYC (avx512_bf16)`, or `NVIDIA H100 80GB HBM3, driver 580.82`: results are bit-equal on the same only.
    pub device_name: String,
    /// Why this device.
    pub device_reason: String,
    /// Of the GPU, where there is one that tells.
    pub compute_capability: Option<ComputeCapability>,
    /// Dtype of weights and activations.
    pub kind: Kind,
    /// Why this dtype.
    pub kind_reason: String,
    /// Threads of CPU operations.
    pub threads: i64,
    /// Why so many.
    pub threads_reason: String,
    /// What is slower than it could be or not known, and why.
    pub warnings: Vec<String>,
}

/// Settings that libtorch's libraries read from the environment when they are loaded, where the user made none; `variable` gives
/// the value of one. Must run before [`load_cuda`], in a process of one thread.
pub fn set_library_defaults(variable: impl Fn(&str) -> Option<String>) {
    const ONE_DNN: [&str; 2] = ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"];
    // Where libtorch's kernels may not use all of the processor, its libraries for products may not either.
    let limits: &[(&[&str], &str)] = match variable("ATEN_CPU_CAPABILITY").as_deref() {
        Some("default") => &[(&ONE_DNN, "SSE41"), (&["MKL_ENABLE_INSTRUCTIONS"], "SSE4_2")],
        Some("avx2") => &[(&ONE_DNN, "AVX2"), (&["MKL_ENABLE_INSTRUCTIONS"], "AVX2")],
        _ => &[],
    };
    let defaults = [
        // cuBLAS is deterministic with workspaces of its own only.
        (&["CUBLAS_WORKSPACE_CONFIG"][..], ":4096:8"),
        // Packed rows have a new length every step: segments that grow leave no gaps behind that fit nothing. libtorch takes
        // either name.
        (&["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"], "expandable_segments:True"),
        // oneDNN keeps a primitive for each shape, nearly a megabyte each, and packed rows have a new length every step:
        // room for the shapes of one step is enough, and less than that makes every layer compile them anew. The default is
        // 1024.
        (&["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], "128"),
        // What a driver compiles for a card that is newer than the kernels lies in the home folder, which in a pod is a small
        // temporary one: the driver's own limit is all of it.
        (&["CUDA_CACHE_MAXSIZE"], "268435456"),
        // MKL takes as many threads as it is told, always: `set_num_threads` sees to it, and is not called everywhere.
        (&["MKL_DYNAMIC"], "FALSE"),
    ];
    for (names, value) in defaults.iter().chain(limits) {
        if !names.iter().any(|name| variable(name).is_some()) {
            // SAFETY: no other thread reads the environment yet.
            unsafe { std::env::set_var(names[0], value) };
        }
    }
}

/// Refuses a value of `ATEN_CPU_CAPABILITY` that lets kernels use what the processor lacks: libtorch believes it.
pub fn check_capability(value: Option<&str>) -> Result<(), String> {
    let asked = match value {
        Some("avx512") => Instructions::Avx512,
        Some("avx2") => Instructions::Avx2,
        _ => return Ok(()),
    };
    let has = cpu::processor();
    if asked <= has {
        return Ok(());
    }
    Err(format!(
        "ATEN_CPU_CAPABILITY is {}, and this processor has {has:?} at most; leave it unset, and libtorch chooses by the processor",
        value.unwrap_or_default()
    ))
}

/// Loads libtorch's CUDA half, if it is there, so that one binary serves both. Must run before any other libtorch call:
/// the answer to "is there CUDA" is cached by the first question. Returns why there is no CUDA otherwise.
pub fn load_cuda(folder: Option<&Path>) -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
    let path = folder.map_or_else(|| PathBuf::from("libtorch_cuda.so"), |folder| folder.join("libtorch_cuda.so"));
    // SAFETY: the driver's library, and libtorch's own of the same version, whose initialisers only register kernels.
    let load = |path: &Path| unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_GLOBAL) };
    let driver = library(DRIVER);
    if driver.is_absolute() {
        // CUDA's runtime asks for the driver by its name, and then finds what is loaded already. Without it there is no device,
        // which is told where one is looked for.
        let _ = load(&driver).map(std::mem::forget);
    }
    // It stays loaded until the process ends: kernels are called through it.
    load(&path).map(std::mem::forget).map_err(|error| error.to_string())
}

/// Chooses device, dtype and threads; `cpus` is what the job may use of them.
pub fn choose(precision: Precision, cpus: Option<f64>, cuda: &Result<(), String>) -> Chosen {
    let (threads, threads_reason) = cpu_threads(cpus);
    set_threads(threads);
    let mut warnings = Vec::new();
    let (device, device_name, device_reason) = if cuda.is_ok() && Cuda::is_available() {
        let deterministic = match crate::compute::shim::set_deterministic() {
            Ok(()) => String::new(),
            Err(error) => format!("; deterministic kernels could not be asked for: {error}"),
        };
        let mut name = cuda_name();
        if let Err(error) = crate::compute::shim::cuda::load() {
            warnings.push(format!("libtorch's kernels stand in for the trainer's own on {name}: {error}"));
            // They round elsewhere, so a run that is resumed with the others is not bit-equal.
            name += ", libtorch's kernels";
        }
        (Device::Cuda(0), name, format!("{} CUDA device(s) found{deterministic}", Cuda::device_count()))
    } else {
        let reason = match cuda {
            Ok(()) => "libtorch's CUDA half is loaded, but the driver reports no device".to_owned(),
            Err(error) => format!("no CUDA: {error}"),
        };
        (Device::Cpu, cpu_name(), reason)
    };
    let compute_capability = if device.is_cuda() { properties().map(|gpu| gpu.compute_capability) } else { None };
    let (kind, kind_reason) = match precision {
        Precision::BF16 => {
            if device == Device::Cpu && !cpu::multiplies_bf16() {
                warnings.push(slow_bf16());
            }
            (Kind::BFloat16, "hyperparameters.precision".to_owned())
        }
        Precision::FP32 => (Kind::Float, "hyperparameters.precision".to_owned()),
        Precision::Auto if device.is_cuda() => gpu_kind(compute_capability),
        Precision::Auto if cpu::multiplies_bf16() => {
            (Kind::BFloat16, "the CPU multiplies in it (avx512_bf16 or amx)".to_owned())
        }
        Precision::Auto if cpu::instructions() < cpu::processor() => {
            (Kind::Float, "ATEN_CPU_CAPABILITY keeps kernels from the CPU's bf16 arithmetic, if it has any".to_owned())
        }
        Precision::Auto => (Kind::Float, "the CPU has no bf16 arithmetic".to_owned()),
    };
    Chosen {
        device,
        device_name,
        device_reason,
        compute_capability,
        kind,
        kind_reason,
        threads,
        threads_reason,
        warnings,
    }
}

/// What bf16 costs on a CPU that does not multiply in it.
fn slow_bf16() -> String {
    let rate = |kind| matmul_rate([512; 3], (kind, Device::Cpu), Duration::from_millis(10));
    format!(
        "precision BF16: this CPU has no bf16 arithmetic, a matrix product takes {:.0} times as long as in fp32; Auto and FP32 \
         compute in fp32",
        rate(Kind::Float) / rate(Kind::BFloat16)
    )
}

/// A product that is expected to take longer than this is not measured.
const LONGEST_PRODUCT: f64 = 1.0;
/// Rows, inner sizes and columns that a measurement begins with; it ends with those that were asked for.
const SIZES: [i64; 3] = [128, 512, i64::MAX];

/// FLOP/s of products `[rows, inner] x [inner, columns]`, over as many as `measured` has room for. Where products are slow it is
/// that of smaller ones: what this takes is bounded on every machine.
pub fn matmul_rate(shape: [i64; 3], options: (Kind, Device), measured: Duration) -> f64 {
    let mut rate = f64::INFINITY;
    for most in SIZES {
        let some = shape.map(|size| size.min(most));
        let flops = 2.0 * some.iter().map(|size| *size as f64).product::<f64>();
        if flops / rate > LONGEST_PRODUCT {
            break;
        }
        let is_last = some == shape;
        rate = flops / seconds_per_product(some, options, if is_last { measured } else { Duration::ZERO });
        if is_last {
            break;
        }
    }
    rate
}

fn seconds_per_product([rows, inner, columns]: [i64; 3], options: (Kind, Device), measured: Duration) -> f64 {
    let (a, b) = (Tensor::ones([rows, inner], options), Tensor::ones([columns, inner], options));
    let product = |times: i32| {
        let started = Instant::now();
        for _ in 1..times {
            let _ = a.matmul(&b.tr());
        }
        // Reading one value waits for an asynchronous device.
        let _ = a.matmul(&b.tr()).get(0).get(0).to_kind(Kind::Float).double_value(&[]);
        started.elapsed().as_secs_f64() / f64::from(times)
    };
    // The first one of a shape takes longer.
    product(1);
    let once = product(1);
    let times = (measured.as_secs_f64() / once) as i32;
    if times > 1 { product(times.min(2000)) } else { once }
}

/// The dtype that a GPU computes in, and why.
fn gpu_kind(capability: Option<ComputeCapability>) -> (Kind, String) {
    match capability {
        Some((major, minor)) if !multiplies_bf16(capability) => {
            (Kind::Float, format!("a GPU of compute capability {major}.{minor} has no bf16 arithmetic"))
        }
        _ => (Kind::BFloat16, "the device computes in it".to_owned()),
    }
}

/// As many threads as [`choose`] takes, for what is computed without a device: libtorch by itself counts the machine's
/// cores, whatever the cgroup allows.
pub fn limit_threads(cpus: Option<f64>) {
    set_threads(cpu_threads(cpus).0);
}

/// Not where the number is right already, as it is without a CPU limit: to be told it, libtorch starts a second pool of threads,
/// for its mobile kernels, which spin for 50 ms beside what is computed first.
fn set_threads(threads: i64) {
    if i64::from(tch::get_num_threads()) != threads {
        tch::set_num_threads(threads as i32);
    }
}

/// What is planned with for an accelerator of another machine.
pub fn expect_accelerator(precision: Precision) -> Chosen {
    let (kind, kind_reason) = match precision {
        Precision::FP32 => (Kind::Float, "hyperparameters.precision"),
        Precision::BF16 => (Kind::BFloat16, "hyperparameters.precision"),
        Precision::Auto => (Kind::BFloat16, "all but old accelerators compute in it"),
    };
    let (threads, threads_reason) = cpu_threads(None);
    Chosen {
        device: Device::Cpu,
        device_name: "accelerator".to_owned(),
        device_reason: "spec.resources asks for one; this stage runs without it".to_owned(),
        compute_capability: None,
        kind,
        kind_reason: kind_reason.to_owned(),
        threads,
        threads_reason,
        warnings: Vec::new(),
    }
}

/// The value of the first line `name : value` of a file of the kernel's.
fn kernel_value(path: &Path, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// The instruction sets that kernels are chosen by, as the kernel of the operating system calls them.
fn cpu_instruction_sets() -> Vec<&'static str> {
    let sets =
        [(Instructions::Avx2, "avx2"), (Instructions::Avx512, "avx512f"), (Instructions::Avx512Bf16, "avx512_bf16")];
    let has = cpu::instructions();
    let mut names: Vec<_> = sets.into_iter().filter(|(set, _)| has >= *set).map(|(_, name)| name).collect();
    names.extend(cpu::has_tiles().then_some("amx_bf16"));
    names
}

fn cpu_name() -> String {
    let model = kernel_value(Path::new("/proc/cpuinfo"), "model name").unwrap_or_else(|| "CPU".to_owned());
    format!("{model} ({})", cpu_instruction_sets().join(", "))
}

/// Model and driver of the first GPU, as the driver tells; libtorch has no word for it that is the same on every build.
fn cuda_name() -> String {
    let model = std::fs::read_dir("/proc/driver/nvidia/gpus")
        .ok()
        .and_then(|mut gpus| kernel_value(&gpus.next()?.ok()?.path().join("information"), "Model"));
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(|text| {
        let numbers = text.lines().next()?.split_whitespace().find(|word| word.contains('.'))?;
        Some(format!(", driver {numbers}"))
    });
    format!("{}{}", model.unwrap_or_else(|| "cuda:0".to_owned()), driver.unwrap_or_default())
}

/// As many threads as the process may use: the affinity mask, the cgroup's CPU limit or the job's, whichever is lowest.
fn cpu_threads(cpus: Option<f64>) -> (i64, String) {
    // It honours the cgroup's quota by rounding down; a container must not read it as the machine's size.
    let visible = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as i64;
    match cpus.map(|cpus| (cpus as i64).max(1)).filter(|&limit| limit < visible) {
        Some(limit) => (limit, format!("spec.resources.limits.cpu, of {visible} CPUs")),
        None => (visible, format!("{visible} CPUs are available to this process (affinity and cgroup limit)")),
    }
}

/// Bytes of memory that the run may use: the accelerator's, or on the CPU the cgroup's limit or the machine's memory.
/// `None` where nobody tells.
pub fn memory_limit(device: Device) -> Option<i64> {
    if let Device::Cuda(index) = device {
        return crate::compute::shim::device_total_bytes(index as i32).ok();
    }
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let total = system.total_memory() as i64;
    Some(system.cgroup_limits().map_or(total, |limits| (limits.total_memory as i64).min(total)))
}

/// Resident bytes of this process; `None` where the machine does not tell.
pub fn resident_memory() -> Option<i64> {
    let kib = kernel_value(Path::new("/proc/self/status"), "VmRSS")?.split_whitespace().next()?.parse::<i64>().ok()?;
    Some(kib * 1024)
}

/// Peak resident bytes of this process, or peak allocated bytes on the accelerator.
pub fn peak_memory(device: Device) -> i64 {
    if let Device::Cuda(index) = device
        && let Ok(bytes) = crate::compute::shim::device_peak_bytes(index as i32)
    {
        return bytes;
    }
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<i64>().ok()
        })
        .map_or(0, |kib| kib * 1024)
}

/// Reads the energy counters of the CPU packages (RAPL) and of the GPUs where the machine shows them.
#[derive(Debug)]
pub struct EnergyMeter {
    packages: Vec<(PathBuf, u64, u64)>,
    /// GPUs, and their energy at the start.
    gpus: Option<(Gpus, f64)>,
}

impl EnergyMeter {
    /// Starts a measurement; `None` where no counter can be read.
    pub fn start() -> Option<Self> {
        let gpus = Gpus::open().and_then(|gpus| gpus.joules().map(|joules| (gpus, joules)));
        let packages = packages();
        (!packages.is_empty() || gpus.is_some()).then_some(Self { packages, gpus })
    }

    /// Joules since the start; a package's counter that wrapped once is corrected.
    pub fn joules(&self) -> f64 {
        let microjoules: u64 = self
            .packages
            .iter()
            .filter_map(|(path, start, range)| {
                let now = std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()?;
                Some(if now >= *start { now - start } else { now + range - start })
            })
            .sum();
        let gpus = self.gpus.as_ref().and_then(|(gpus, start)| Some(gpus.joules()? - start));
        microjoules as f64 / 1e6 + gpus.unwrap_or(0.0)
    }
}

/// The counter of each CPU package, its value, and where it wraps.
fn packages() -> Vec<(PathBuf, u64, u64)> {
    let read = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let entries = std::fs::read_dir("/sys/class/powercap").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            // `intel-rapl:0` is a package; `intel-rapl:0:0` is a part of it and would count twice.
            let name = entry.file_name().into_string().ok()?;
            (name.starts_with("intel-rapl:") && name.matches(':').count() == 1).then_some(())?;
            let folder = entry.path();
            let counter = folder.join("energy_uj");
            Some((counter.clone(), read(counter)?, read(folder.join("max_energy_range_uj"))?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_without_bf16_arithmetic_compute_in_fp32() {
        let kinds = [(7, 0), (7, 5), (8, 0), (9, 0), (12, 0)].map(|capability| gpu_kind(Some(capability)).0);
        assert_eq!(kinds, [Kind::Float, Kind::Float, Kind::BFloat16, Kind::BFloat16, Kind::BFloat16]);
        assert_eq!(gpu_kind(None).0, Kind::BFloat16);
        assert_eq!(gpu_kind(Some((7, 5))).1, "a GPU of compute capability 7.5 has no bf16 arithmetic");
    }
}
