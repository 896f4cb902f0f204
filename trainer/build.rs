//! Compiles the C++ shim against the staged libtorch and leaves the library's folder in the binary's run path.

fn main() {
    let lib =
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency and names its library folder");
    let include = std::path::Path::new(&lib).parent().expect("the library folder has a parent").join("include");
    let files = ["cpp/shim.cpp", "cpp/profiler.cpp", "cpp/attention.cpp", "cpp/pointwise.cpp", "cpp/decode.cpp"];
    for file in files.into_iter().chain(["cpp/guard.h", "cpp/avx512.h"]) {
        println!("cargo:rerun-if-changed={file}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(3)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .files(files)
        .compile("ftshim");
    println!("cargo:rustc-link-search=native={lib}");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
