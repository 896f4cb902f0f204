//! Compiles the C++ shim against the staged libtorch and leaves the library's folder in the binary's run path; compiles the
//! CUDA kernels into one image for all GPUs, which the binary carries.

use std::path::{Path, PathBuf};
use std::process::Command;

/// GPUs that get machine code: Ampere and Ada, Hopper, Blackwell's data centre. The driver compiles the PTX for all later ones.
const ARCHITECTURES: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_100,code=[sm_100,compute_100]"];

fn main() {
    compile_shim();
    if let Err(problem) = compile_kernels() {
        println!("cargo::error={problem}");
    }
}

fn compile_shim() {
    let lib =
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency and names its library folder");
    let include = Path::new(&lib).parent().expect("the library folder has a parent").join("include");
    let files = [
        "cpp/shim.cpp",
        "cpp/kernels.cpp",
        "cpp/profiler.cpp",
        "cpp/attention.cpp",
        "cpp/pointwise.cpp",
        "cpp/decode.cpp",
        "cpp/linear.cpp",
        "cpp/dropout.cpp",
    ];
    let optimizer = "cpp/optimizer.cpp";
    let headers = ["cpp/guard.h", "cpp/kernels.h", "cpp/avx512.h", "cpp/product.h", "cpp/philox.h"];
    for file in files.into_iter().chain([optimizer]).chain(headers) {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).define("_GLIBCXX_USE_CXX11_ABI", "1");
    // Without it at::parallel_for is a loop of one thread.
    build.flag("-fopenmp");
    // Warnings are of our code: libtorch's headers have their own, and gcc's for AVX-512 leave what is not used unset.
    build.flag_if_supported("-Wno-uninitialized").flag_if_supported("-Wno-maybe-uninitialized");
    for folder in [include.join("torch/csrc/api/include"), include] {
        build.flag("-isystem").flag(folder);
    }
    // Rounds after each operation, as torch does; nobody reads errno after a root.
    build.clone().flag("-ffp-contract=off").flag("-fno-math-errno").file(optimizer).compile("ftoptim");
    build.files(files).compile("ftshim");
    println!("cargo:rustc-link-search=native={lib}");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    // libtorch's own: a second one would have other threads, and another number of them.
    println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}

fn compile_kernels() -> Result<(), String> {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-changed=cuda/pointwise.cu");
    let toolkit = std::env::var_os("CUDA_HOME").filter(|folder| !folder.is_empty()).ok_or(
        "CUDA_HOME is not set; it names a CUDA toolkit 13.0, which compiles the CUDA kernels and needs no GPU: \
         `export CUDA_HOME=$(tools/stage-nvcc.sh)` stages one, and `make build` does that by itself",
    )?;
    let nvcc = PathBuf::from(toolkit).join("bin/nvcc");
    let image = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it")).join("kernels.fatbin");
    let mut command = Command::new(&nvcc);
    // Uncompressed, so that a test can read it; it is small.
    command.args(["-fatbin", "--no-compress", "-std=c++17", "cuda/pointwise.cu", "-o"]).arg(&image);
    command.args(ARCHITECTURES.iter().flat_map(|architecture| ["-gencode", architecture]));
    let output = command.output().map_err(|error| {
        format!(
            "{}: {error}; CUDA_HOME must name a CUDA toolkit 13.0, as tools/stage-nvcc.sh stages one",
            nvcc.display()
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    Err(format!("{} could not compile cuda/pointwise.cu; what it said stands below", nvcc.display()))
}
