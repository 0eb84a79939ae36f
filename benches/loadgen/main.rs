//! A closed-loop load generator that speaks vhost-user-blk as a guest does: one queue, a fixed
//! number of requests in flight, shared memory, event-index notifications. It measures a backend it
//! knows nothing about, so the same program drives tidepool and qemu-storage-daemon.
//!
//! One run prints one JSON object: IOPS, bandwidth, latency percentiles, and what a request cost
//! the backend in CPU time. `scripts/bench` interleaves such runs and takes the medians.

mod drive;
#[expect(dead_code, reason = "some of it is for tests")]
mod guest;
mod measure;
#[path = "../../tests/common/random.rs"]
mod random;
mod workload;

use std::error::Error;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wait {
    /// Sleep on the call eventfd, as a guest sleeps until its interrupt.
    Block,
    /// Spin on the used ring: takes the client's own wake-up out of the latency.
    Spin,
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// Only reads.
    Read,
    /// Only writes.
    Write,
    /// Reads and writes, `--read-percent` of them reads.
    Mix,
}

/// In which order blocks are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    /// Uniformly at random, with repetition.
    Random,
    /// Ascending, wrapping round at the end.
    Sequential,
    /// Every block exactly once, in random order; the run ends after the last.
    Once,
    /// Every block exactly once, ascending; the run ends after the last.
    Fill,
}

/// Loads a vhost-user-blk backend and prints one JSON object.
#[derive(Parser, Debug, Clone)]
#[command(name = "loadgen", version)]
pub(crate) struct Args {
    /// Socket of the backend.
    #[arg(long)]
    pub(crate) socket: PathBuf,
    /// Reads, writes or both.
    #[arg(long, value_enum, default_value = "read")]
    pub(crate) rw: Direction,
    /// Share of reads with `--rw mix`, in per cent.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) read_percent: u8,
    /// Order of the blocks.
    #[arg(long, value_enum, default_value = "random")]
    pub(crate) order: Order,
    /// Bytes of a request: a multiple of 512, at most 1 MiB.
    #[arg(long, default_value_t = 4096)]
    pub(crate) block: u32,
    /// Requests in flight, at most 256.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) depth: u16,
    /// Bytes of the disk to use, from its start; the whole disk if left out.
    #[arg(long)]
    pub(crate) span: Option<u64>,
    /// Seconds to measure. With `--ops` or an order that ends, whichever comes first.
    #[arg(long, default_value_t = 5.0)]
    pub(crate) seconds: f64,
    /// Seconds to run before measuring.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) warmup: f64,
    /// Requests to make, warm-up included; no bound if left out.
    #[arg(long)]
    pub(crate) ops: Option<u64>,
    /// Send a flush after so many writes; never if 0.
    #[arg(long, default_value_t = 0)]
    pub(crate) flush_every: u64,
    /// Stamp every write and read everything written back at the end.
    #[arg(long)]
    pub(crate) verify: bool,
    /// How completions are noticed.
    #[arg(long, value_enum, default_value = "block")]
    pub(crate) wait: Wait,
    /// CPU to run on; anywhere if left out.
    #[arg(long)]
    pub(crate) cpu: Option<usize>,
    /// Process whose CPU time is charged to the requests.
    #[arg(long)]
    pub(crate) backend_pid: Option<u32>,
    /// Seed of the random order and of the data.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// Runs this thread on `cpu` only.
///
/// # Errors
/// There is no such CPU, or it is not ours to use.
fn pin_to(cpu: usize) -> Result<(), Box<dyn Error>> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    Ok(())
}

/// Connects, runs, reports.
///
/// # Errors
/// Bad arguments, no backend, or a backend that failed.
fn run(args: &Args) -> Result<serde_json::Value, Box<dyn Error>> {
    if args.block == 0 || !args.block.is_multiple_of(512) || args.block > 1 << 20 {
        return Err("--block must be a multiple of 512, at most 1 MiB".into());
    }
    if let Some(cpu) = args.cpu {
        pin_to(cpu)?;
    }
    let device = guest::Device::connect(&args.socket, args.depth, args.block)?;
    let capacity = device.capacity();
    let span = args.span.unwrap_or(capacity).min(capacity);
    let workload = workload::Workload::new(args, span)?;
    drive::Driver::new(args, device, workload).run()
}

fn main() -> ExitCode {
    // `cargo bench` and `cargo test` start every bench target, with no arguments of ours.
    let given: Vec<_> = std::env::args_os().filter(|a| a != "--bench").collect();
    let mut out = std::io::stdout().lock();
    if given.len() <= 1 {
        let said = writeln!(out, "loadgen: no --socket given; see scripts/bench");
        return ExitCode::from(u8::from(said.is_err()));
    }
    let args = Args::parse_from(given);
    match run(&args) {
        Ok(report) => {
            let said = writeln!(out, "{report}");
            ExitCode::from(u8::from(said.is_err()))
        }
        Err(error) => {
            let _said = writeln!(std::io::stderr(), "loadgen: {error}");
            ExitCode::FAILURE
        }
    }
}
