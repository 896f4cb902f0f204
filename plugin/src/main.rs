//! `kubectl finetune`: arguments, environment, exit code.

use std::process::ExitCode;

use clap::Parser;
use plugin::{Arguments, ERROR_EXIT, Environment, run};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // A reader that has gone away ends nothing. Clap's own code for wrong arguments means a failed validation here.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(ERROR_EXIT) } else { ExitCode::SUCCESS };
        }
    };
    let environment = Environment { no_color: std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) };
    match run(arguments, environment) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is_closed_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(ERROR_EXIT)
        }
    }
}
