//! Exhausted memory, which libtorch reports by an exception and tch by a panic.

/// The text of a panic, where it has one.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> Option<&str> {
    payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied())
}

/// Whether a panic's text is libtorch's report of exhausted memory, on CPU or CUDA.
pub fn is_out_of_memory(message: &str) -> bool {
    ["out of memory", "can't allocate memory", "not enough memory"].iter().any(|text| message.contains(text))
}

/// Runs `work`; exhausted memory, which tch reports as a panic, becomes an error. Any other panic goes on.
pub fn guard_memory<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|payload| {
        match panic_text(payload.as_ref()).filter(|text| is_out_of_memory(text)) {
            Some(text) => text.lines().next().unwrap_or_default().to_owned(),
            None => std::panic::resume_unwind(payload),
        }
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::compute::shim::{cpu, decode};

    #[test]
    fn exhausted_memory_is_known_from_all_who_allocate() {
        for text in [
            "CUDA out of memory. Tried to allocate 2.00 GiB.",
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
            "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        ] {
            assert!(is_out_of_memory(text), "{text}");
        }
        assert!(!is_out_of_memory("label 16 of 16"));
        if !cpu::kernels_run_here() {
            return;
        }
        // A cache of no bytes has more slots than the kernel can list.
        let nothing = || Tensor::zeros([1 << 60, 1, 0, 0, 1], (Kind::Float, Device::Cpu));
        let (cache, token) = ((nothing(), nothing()), Tensor::zeros([1, 1, 0], (Kind::Float, Device::Cpu)));
        let rows = Tensor::from_slice(&[0, 1, 0, 0]).view([1, 4]);
        let refused = guard_memory(|| decode::cached_attention([&token; 3], &rows, &cache, None, 1.0));
        assert_eq!(refused.expect_err("there is not that much"), "libtorch: out of memory");
    }
}
