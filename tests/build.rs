//! Leaves libtorch's folder in the run path of the test binaries: a link argument reaches only targets of its own package.

fn main() {
    let lib =
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency and names its library folder");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
