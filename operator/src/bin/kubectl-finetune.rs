//! `kubectl finetune`: arguments, exit code.

use std::process::ExitCode;

use clap::Parser;
use operator::plugin::{Arguments, ERROR_EXIT, run};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // A reader that has gone away ends nothing. Clap's own code for wrong arguments means a failed validation here.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(ERROR_EXIT) } else { ExitCode::SUCCESS };
        }
    };
    match run(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is_closed_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(ERROR_EXIT)
        }
    }
}
