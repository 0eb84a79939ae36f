//! `tidepool serve`: pools and their disks in the foreground, until a signal ends it.
//!
//! ```text
//! ending: waits for the signal, from the beginning
//! start:  disks --bases: threads--> Server       tell: prints, whoever reads or does not
//! ```

mod bases;
mod ending;
mod sockets;
mod start;
mod tell;

use super::failure::Failure;
use super::open;
use super::output::{Output, Reply};
use super::panics;
use crate::pool::reclaim::Background;
use crate::pool::{Pool, Return};
use crate::sync::{Arc, spawn_named};
use crate::sys::fd;
use crate::sys::signal::Endings;
use crate::vhost_blk::{QUEUES_MAX, Server, ServerOptions, WORKERS_MAX};
use clap::{Args, ValueEnum};
use ending::Ending;
use nix::errno::Errno;
use serde_json::json;
use sockets::Sockets;
use start::Start;
use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Duration;
use tell::Teller;

/// Events that may wait to be told; more are counted.
const EVENTS_WAITING_MAX: usize = 64;
/// Queues of a disk, where nothing is said: as many as most guests have CPUs.
const QUEUES_DEFAULT: u16 = 16;

pub(super) const EXAMPLES: &str = "\
Examples:
  tidepool serve vms.pool --sockets /run/tidepool
  tidepool serve fast.pool slow.pool --workers 4 --return eager

  qemu-system-x86_64 ... \\
    -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem \\
    -chardev socket,id=vm1,path=/run/tidepool/vm1.sock,reconnect=1 \\
    -device vhost-user-blk-pci,chardev=vm1

  cloud-hypervisor --memory size=1G,shared=on --disk vhost_user=true,socket=/run/tidepool/vm1.sock ...

Each disk has a socket, DISK.sock, each snapshot a read-only one, DISK@SNAPSHOT.sock. With several
pools their names go before: vms.vm1.sock. A name too long for a socket is cut, as is printed. What
cannot be served is said, and the rest is served. Ctrl-C, SIGTERM or SIGHUP finishes what guests have begun and
closes the pools; a second one ends at once.";

/// `tidepool serve`
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Paths of the pools.
    #[arg(required = true, value_name = "POOL")]
    pools: Vec<PathBuf>,
    /// Directory for the sockets; POOL.sockets beside the first pool if left out, or in /run/tidepool if
    /// that is a device.
    #[arg(long, value_name = "DIR")]
    sockets: Option<PathBuf>,
    /// Worker threads that all queues are spread over.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// How long a write waits for space in a full pool before its guest gets an error.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    no_space_timeout: u32,
    /// Most queues of a disk.
    #[arg(long, default_value_t = QUEUES_DEFAULT, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Longest time a worker looks for more requests before it sleeps, where that has paid lately;
    /// 0 to sleep at once.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = POLLING_US_DEFAULT,
        value_parser = clap::value_parser!(u32).range(0..=1000))]
    polling: u32,
    /// Serve everything read-only, and leave the pools as they are.
    #[arg(long)]
    read_only: bool,
    /// Take guest memory in files of any kind, not only in memory: if the storage of such a file
    /// hangs, the disks that are served with it do too.
    #[arg(long)]
    any_memory: bool,
    /// When freed space goes back to the host.
    #[arg(long = "return", value_enum, default_value_t, value_name = "WHEN")]
    returning: ReturnArg,
}

/// As long as QEMU's own event loop looks about.
const POLLING_US_DEFAULT: u32 = 32;

const _: () = assert!(QUEUES_MAX == 256 && WORKERS_MAX == 64, "the ranges above");

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum ReturnArg {
    /// At once.
    Eager,
    /// When nothing happens, and above a high-water mark.
    #[default]
    Idle,
    /// At `tidepool pool trim` only.
    Never,
}

impl From<ReturnArg> for Return {
    fn from(returning: ReturnArg) -> Self {
        match returning {
            ReturnArg::Eager => Return::Eager,
            ReturnArg::Idle => Return::Idle,
            ReturnArg::Never => Return::Never,
        }
    }
}

/// An open pool and its thread.
struct Owned {
    path: PathBuf,
    pool: Arc<Pool>,
    /// None for a pool open for reading only.
    background: Option<Background>,
}

/// Serves until a signal comes, then closes what it opened.
pub(super) fn execute(args: &Serve, output: Output) -> Result<Reply, Failure> {
    panics::abort();
    check_stems(&args.pools)?;
    // Before any thread is made, so that none of them takes the signals.
    let signals = Endings::hold();
    let signals =
        signals.map_err(|e| Failure::new("io", "signals", format!("cannot hold them: {e}")))?;
    let ending = Ending::watch(signals).map_err(|e| no_thread("the server", &e))?;
    let teller = Teller::start(output).map_err(|e| no_thread("the server", &e))?;
    // Each client takes some for itself, its memory and its queues. If it fails there are fewer.
    let _descriptors = fd::raise_limit();
    let sockets = Sockets::open(args)?;
    let mut pools = Vec::new();
    let result = open_all(args, &sockets, &ending, &mut pools)
        .and_then(|()| run(args, &sockets, &pools, &ending, &teller));
    let mut closed = Ok(());
    for owned in pools {
        drop(owned.background);
        let result = owned.pool.close();
        let result = result.map_err(|e| Failure::pool(owned.path.display(), &e));
        closed = closed.and(result);
    }
    let stopped = result.and(closed);
    if stopped.is_ok() {
        teller.say(&json!({ "event": "stopped" }), "stopped");
    }
    teller.finish();
    ending.finish();
    stopped.map(|()| Reply::silent())
}

/// What helps depends on what was refused: not every error of a ring is a ban of rings.
fn cannot_start(error: &io::Error) -> Failure {
    let failure = Failure::new("io", "the server", format!("cannot start: {error}"));
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE) => failure.hint(
            "it needs more descriptors: raise `ulimit -n`, or LimitNOFILE= of the systemd unit",
        ),
        Some(Errno::ENOMEM | Errno::EAGAIN) => failure.hint(
            "it needs more memory, or may lock too little: raise `ulimit -l`, or LimitMEMLOCK= of \
             the systemd unit, or take fewer --workers",
        ),
        Some(Errno::EPERM | Errno::EACCES | Errno::ENOSYS) => {
            failure.hint("io_uring must be allowed here: see the sysctl kernel.io_uring_disabled")
        }
        Some(_) | None => failure,
    }
}

fn no_thread(object: impl std::fmt::Display, error: &io::Error) -> Failure {
    Failure::new("io", object, format!("cannot start a thread: {error}"))
}

/// What the names of a pool's sockets begin with, where there are several pools.
fn stem(pool: &Path) -> Cow<'_, str> {
    pool.file_stem().unwrap_or_default().to_string_lossy()
}

fn check_stems(pools: &[PathBuf]) -> Result<(), Failure> {
    for (at, second) in pools.iter().enumerate() {
        let Some(first) = pools[..at].iter().find(|first| stem(first) == stem(second)) else {
            continue;
        };
        let (first, stem, second) = (first.display(), stem(second), second.display());
        let what = format!("{first} and {second} would both be served as {stem}.*.sock");
        let hint = "name each pool once, and serve pools of one name by servers of their own, each \
                    with its own --sockets DIR";
        return Err(Failure::usage(what).hint(hint));
    }
    Ok(())
}

fn open_all(
    args: &Serve,
    sockets: &Sockets,
    ending: &Ending,
    pools: &mut Vec<Owned>,
) -> Result<(), Failure> {
    let dir = sockets.dir();
    let shown = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let doing = format!("serving {}, started by tidepool serve", shown.display());
    for path in &args.pools {
        if ending.is_told() {
            return Ok(());
        }
        let path = path.clone();
        if args.read_only {
            let pool = open::open_to_read(&path)?;
            let background = None;
            pools.push(Owned {
                path,
                pool,
                background,
            });
            continue;
        }
        let pool = open::open_for(&path, &doing, args.returning.into())?;
        let background = pool.start_background();
        let owned = |background| Owned {
            path: path.clone(),
            pool: Arc::clone(&pool),
            background,
        };
        match background {
            Ok(background) => pools.push(owned(Some(background))),
            Err(e) => {
                pools.push(owned(None));
                return Err(no_thread(path.display(), &e));
            }
        }
    }
    Ok(())
}

/// Serves the disks of `pools` until a signal comes.
fn run(
    args: &Serve,
    sockets: &Sockets,
    pools: &[Owned],
    ending: &Ending,
    teller: &Teller,
) -> Result<(), Failure> {
    let mut options = ServerOptions {
        no_space_timeout: Duration::from_secs(args.no_space_timeout.into()),
        polling_us: args.polling,
        any_memory: args.any_memory,
        ..ServerOptions::default()
    };
    if let Some(workers) = args.workers {
        options.workers = workers.into();
    }
    let (to, events) = sync_channel(EVENTS_WAITING_MAX);
    let tells = teller.clone();
    // It ends when the server, which has the other end, is gone.
    let telling = spawn_named("tidepool-events", move || tells.tell(&events))
        .map_err(|e| no_thread("the server", &e))?;
    let server = Server::start_reporting(options, to).map_err(|e| cannot_start(&e))?;
    let started = Start::new(args, sockets, &server, teller, ending).run(pools)?;
    if !ending.is_told() {
        let (disks, refused) = (started.served, started.refused);
        let ready = json!({ "event": "ready", "disks": disks, "refused": refused });
        teller.say(&ready, "ready");
    }
    let waited = ending.wait();
    let stop = server.shutdown();
    teller.end();
    // What happened last is told before the end is. A panic there was printed.
    drop(telling.join());
    waited.map_err(|e| Failure::new("io", "signals", format!("cannot wait for them: {e}")))?;
    stop.map_err(|e| start::failed_to_end(&e))
}
