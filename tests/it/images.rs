//! What images say of themselves, as far as no image has to be made for it.

use std::fs;
use std::process::Command;

use harness::repository;
use serde_json::Value;

/// Variables of the trainer's image, made of small files in the place of libtorch and of CUDA's libraries.
fn environment(with_cuda: bool) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    for name in ["release", "libtorch/lib", "cuda"] {
        fs::create_dir_all(path(name)).expect("writable");
    }
    fs::copy("/bin/true", path("release/finetune-trainer")).expect("a small program");
    fs::write(path("libtorch/lib/libtorch_cpu.so"), "").expect("writable");
    fs::write(path("cuda/libtorch_cuda.so"), "").expect("writable");
    let mut command = Command::new(repository().join("images/build.sh"));
    command.arg(path("out")).arg("trainer").env("CARGO_TARGET_DIR", folder.path()).env("LIBTORCH", path("libtorch"));
    command.env("VERSION", "0").env_remove("CUDA");
    if with_cuda {
        command.env("CUDA", path("cuda"));
    }
    let output = command.output().expect("images/build.sh runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    let archive = stdout.split('\t').next().expect("a file").to_owned();
    let read = |member: &str| -> Value {
        let output = Command::new("tar").args(["-xOf", &archive, member]).output().expect("tar runs");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{member}: {error}"))
    };
    let config = read("manifest.json")[0]["Config"].as_str().expect("a configuration").to_owned();
    let variables = read(&config)["config"]["Env"].clone();
    serde_json::from_value(variables).expect("a list of variables")
}

/// Google's device plugin mounts the driver there and nothing tells the loader: without it a pod on GKE finds no GPU.
#[test]
fn the_loader_of_the_cuda_image_looks_where_the_driver_is_mounted() {
    let with_cuda = environment(true);
    for variable in ["LD_LIBRARY_PATH=/usr/local/nvidia/lib64", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"] {
        assert!(with_cuda.iter().any(|found| found == variable), "no {variable} in {with_cuda:?}");
    }
    let without = environment(false);
    assert!(!without.iter().any(|found| found.starts_with("LD_LIBRARY_PATH=")), "{without:?}");
}
