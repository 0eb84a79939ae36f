//! The command line tool.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidepool::cli::run(std::env::args_os())
}
