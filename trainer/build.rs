//! Compiles the C++ shim against the staged libtorch and leaves the library's folder in the binary's run path.

fn main() {
    let lib =
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency and names its library folder");
    let include = std::path::Path::new(&lib).parent().expect("the library folder has a parent").join("include");
    let files = ["cpp/shim.cpp", "cpp/profiler.cpp", "cpp/attention.cpp", "cpp/pointwise.cpp", "cpp/decode.cpp"];
    let optimizer = "cpp/optimizer.cpp";
    for file in files.into_iter().chain([optimizer, "cpp/guard.h", "cpp/avx512.h"]) {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(3)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1");
    // Rounds after each operation, as torch does; nobody reads errno after a root.
    build.clone().flag("-ffp-contract=off").flag("-fno-math-errno").file(optimizer).compile("ftoptim");
    build.files(files).compile("ftshim");
    println!("cargo:rustc-link-search=native={lib}");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
