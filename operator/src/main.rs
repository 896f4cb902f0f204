//! `finetune-operator`: arguments, environment, exit code.

use std::process::ExitCode;

use clap::Parser;
use operator::run::{Arguments, Environment, run};

fn main() -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let environment = Environment { pod_name: variable("POD_NAME"), pod_namespace: variable("POD_NAMESPACE") };
    match run(Arguments::parse(), environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
