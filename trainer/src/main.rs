//! `finetune-trainer`: arguments, environment, signals, one panic boundary, exit code.

use std::io::Write;

use trainer::cli::{Arguments, execute, parse_arguments};
use trainer::run::Environment;

fn main() {
    trainer::compute::device::set_library_defaults(|name| {
        std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
    });
    if let Err(error) = trainer::run::crash::watch() {
        let _ = writeln!(std::io::stderr(), "warning: a crash in native code would leave no word: {error}");
    }
    // The message of a panic is told once, below, with what to do about it.
    std::panic::set_hook(Box::new(|_| ()));
    let code = std::panic::catch_unwind(|| match parse_arguments(std::env::args_os()) {
        Ok(arguments) => execute(&arguments, &environment(&arguments)),
        Err(code) => code,
    });
    let code = code.unwrap_or_else(|payload| trainer::cli::report_panic(payload.as_ref()));
    // Libraries' destructors would run beside their threads, and everything is on disk and told: a crash in one would be the
    // end of a run that is done.
    let _ = std::io::stdout().flush();
    signal_hook::low_level::exit(code.code().into())
}

fn environment(arguments: &Arguments) -> Environment {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    // Before any other libtorch call: the answer to "is there CUDA" is cached by the first question.
    let cuda = if arguments.computes() {
        trainer::compute::device::load_cuda(variable("TRAINER_TORCH_LIB").as_deref().map(std::path::Path::new))
    } else {
        Err("it is not needed here".to_owned())
    };
    trainer::compute::shim::keep_large_allocations();
    let hub = trainer::source::HubSettings::read(variable);
    let cpu_capability = variable("ATEN_CPU_CAPABILITY");
    Environment { hub, cuda, cpu_capability, pod_uid: variable("POD_UID").unwrap_or_default() }
}
