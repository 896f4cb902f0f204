//! `finetune-trainer`: arguments, environment, signals, one panic boundary, exit code.

use std::process::ExitCode;

use trainer::cli::{Environment, execute, parse_arguments};

fn main() -> ExitCode {
    trainer::device::set_library_defaults();
    // Before any other libtorch call: the answer to "is there CUDA" is cached by the first question.
    let cuda = trainer::device::load_cuda(std::env::var_os("TRAINER_TORCH_LIB").as_deref().map(std::path::Path::new));
    trainer::shim::keep_large_allocations();
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let environment = Environment { hub: trainer::source::HubSettings::read(variable), cuda };
    // The message of a panic is told once, below, with what to do about it.
    std::panic::set_hook(Box::new(|_| ()));
    let code = std::panic::catch_unwind(|| match parse_arguments(std::env::args_os()) {
        Ok(arguments) => execute(&arguments, &environment),
        Err(code) => code,
    });
    let code = code.unwrap_or_else(|payload| trainer::cli::report_panic(payload.as_ref()));
    ExitCode::from(code.code())
}
