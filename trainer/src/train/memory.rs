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
