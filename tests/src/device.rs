//! The device that tests compute on. `FINETUNE_TEST_DEVICE=cuda` takes the first GPU, with libtorch's CUDA half from
//! `TRAINER_TORCH_LIB`; the trainer's own processes choose it by themselves.

use std::path::Path;
use std::sync::LazyLock;

use tch::{Cuda, Device, Tensor};

/// The device, the CPU unless it is said otherwise. A test that takes it asks before its first tensor.
pub fn device() -> Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| {
        if !is_on_gpu() {
            return Device::Cpu;
        }
        let folder = std::env::var_os("TRAINER_TORCH_LIB");
        trainer::compute::device::load_cuda(folder.as_deref().map(Path::new))
            .unwrap_or_else(|error| panic!("no CUDA: {error}"));
        assert!(Cuda::is_available(), "libtorch's CUDA half is loaded, but the driver reports no device");
        trainer::compute::shim::set_deterministic().unwrap_or_else(|error| panic!("{error}"));
        trainer::compute::shim::cuda::load().unwrap_or_else(|error| panic!("our kernels are not there: {error}"));
        Device::Cuda(0)
    });
    *DEVICE
}

/// Whether tests compute on a GPU.
pub fn is_on_gpu() -> bool {
    match std::env::var("FINETUNE_TEST_DEVICE").as_deref() {
        Ok("cuda") => true,
        Ok("cpu" | "") | Err(_) => false,
        Ok(other) => panic!("FINETUNE_TEST_DEVICE is {other:?}, expected cpu or cuda"),
    }
}

/// A tensor where the test can read it.
pub fn on_host(tensor: &Tensor) -> Tensor {
    tensor.to_device(Device::Cpu)
}
