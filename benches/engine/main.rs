//! Measures the engine in process, without a guest or a socket: what a durable fork or snapshot
//! takes whatever the disk's size and depth, what a thousand forks cost, and how long a pool with a
//! large map takes to open. Also makes the chain of forks that `scripts/bench` serves.
//!
//! Prints one JSON object a line: name, p50, p90, max, n and unit. `scripts/bench` runs it.

mod args;
mod build;
mod forks;
mod open;
#[path = "../../tests/common/random.rs"]
mod random;
mod sample;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use args::Args;

/// What may go wrong here ends the program with a message.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "\
usage: engine COMMAND --pool FILE [--KEY VALUE]...   (sizes take K, M, G and T)
  chain    --from DISK --depth N --clusters K    forks DISK N deep in an existing pool: d1, d2 .. dN
  latency  --mapped BYTES --depth N --rounds N   forks and snapshots of disks of many sizes and depths
  many     --forks N                             forks of one disk at once and one by one; memory
  map      --mapped BYTES --order sequential|random --journal short|long   a pool with a large map
  open                                           opens a pool once; memory";

/// Runs one command.
///
/// # Errors
/// Bad arguments, or what the engine said.
fn run(arguments: &[String]) -> Result<()> {
    let (command, rest) = arguments.split_first().ok_or(USAGE)?;
    let args = Args::parse(rest)?;
    match command.as_str() {
        "chain" => build::chain(&args),
        "latency" => forks::latency(&args),
        "many" => forks::many(&args),
        "map" => open::map(&args),
        "open" => open::open(&args),
        _ => Err(USAGE.into()),
    }
}

fn main() -> ExitCode {
    // `cargo bench` and `cargo test` start every bench target, with no arguments of ours.
    let given: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    if given.is_empty() {
        let said = writeln!(
            std::io::stdout(),
            "engine: no command given; see scripts/bench"
        );
        return ExitCode::from(u8::from(said.is_err()));
    }
    match run(&given) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _said = writeln!(std::io::stderr(), "engine: {error}");
            ExitCode::FAILURE
        }
    }
}
