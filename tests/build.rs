//! Leaves libtorch's folder in the run path of the test binaries: a link argument reaches only targets of its own package.
//! Compiles the CUDA kernels for the CPU, with a driver that runs them.

use std::path::PathBuf;

fn main() {
    let lib =
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency and names its library folder");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    // Where it is not set, the trainer's build script says what to do.
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if let Some(toolkit) = std::env::var_os("CUDA_HOME").filter(|folder| !folder.is_empty()) {
        compile_driver(&PathBuf::from(toolkit).join("include"));
    }
}

fn compile_driver(include: &std::path::Path) {
    let driver = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it")).join("libcuda-on-cpu.so");
    for file in ["cuda/driver.cpp", "../trainer/cuda/pointwise.cu", "../trainer/cpp/philox.h"] {
        println!("cargo:rerun-if-changed={file}");
    }
    let compiler = cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(2)
        // Kernels see rows as vectors of 16 bytes.
        .flag("-fno-strict-aliasing")
        .include(include)
        .include(include.join("cccl"))
        .include("../trainer/cuda")
        .get_compiler();
    let status = compiler.to_command().args(["-shared", "-fPIC", "cuda/driver.cpp", "-o"]).arg(&driver).status();
    assert!(status.is_ok_and(|status| status.success()), "cuda/driver.cpp could not be compiled");
    println!("cargo:rustc-env=CUDA_ON_CPU={}", driver.display());
}
