//! `tidepool serve`: pools and their disks in the foreground, until a signal ends it.

use super::failure::Failure;
use super::human;
use super::open;
use super::output::{self, Format, Output, Reply};
use crate::cowdisk::{Disk, DiskErrorKind};
use crate::format::units::bytes_of;
use crate::pool::reclaim::Background;
use crate::pool::{Pool, Return};
use crate::sync::{Arc, spawn_named};
use crate::sys::fd;
use crate::sys::signal::Endings;
use crate::vhost_blk::{
    Event, EventKind, QUEUES_MAX, ServeError, Server, ServerOptions, WORKERS_MAX,
};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::borrow::Cow;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

/// Events that may wait to be printed; more are counted.
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
pools their names go before: vms.vm1.sock. Ctrl-C, SIGTERM or SIGHUP finishes what guests have begun and
closes the pools; a second one ends at once.";

/// `tidepool serve`
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Paths of the pools.
    #[arg(required = true, value_name = "POOL")]
    pools: Vec<PathBuf>,
    /// Directory for the sockets; POOL.sockets beside the first pool if left out.
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
    check_stems(&args.pools)?;
    // Before any thread is made, so that none of them takes the signals.
    let signals = Endings::hold();
    let signals =
        signals.map_err(|e| Failure::new("io", "signals", format!("cannot hold them: {e}")))?;
    // Each client takes some for itself, its memory and its queues. If it fails there are fewer.
    let _descriptors = fd::raise_limit();
    let sockets = socket_dir(args)?;
    let mut pools = Vec::new();
    let result = open_all(args, &sockets, &mut pools)
        .and_then(|()| run(args, &sockets, &pools, signals, output));
    let mut closed = Ok(());
    for owned in pools {
        drop(owned.background);
        let result = owned.pool.close();
        let result = result.map_err(|e| Failure::pool(owned.path.display(), &e));
        closed = closed.and(result);
    }
    let reply = result?;
    closed?;
    Ok(reply)
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

fn socket_dir(args: &Serve) -> Result<PathBuf, Failure> {
    let dir = args.sockets.clone().unwrap_or_else(|| {
        let mut name = args.pools[0].clone().into_os_string();
        name.push(".sockets");
        PathBuf::from(name)
    });
    // A socket is a disk: not for everybody.
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => Ok(dir),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(dir),
        Err(e) => Err(Failure::io(&dir, "make the directory for sockets", &e)),
    }
}

fn open_all(args: &Serve, sockets: &Path, pools: &mut Vec<Owned>) -> Result<(), Failure> {
    let shown = sockets
        .canonicalize()
        .unwrap_or_else(|_| sockets.to_owned());
    let doing = format!("serving {}, started by tidepool serve", shown.display());
    for path in &args.pools {
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
                return Err(Failure::new(
                    "io",
                    path.display(),
                    format!("cannot start a thread: {e}"),
                ));
            }
        }
    }
    Ok(())
}

fn run(
    args: &Serve,
    sockets: &Path,
    pools: &[Owned],
    signals: Endings,
    output: Output,
) -> Result<Reply, Failure> {
    let mut options = ServerOptions {
        no_space_timeout: Duration::from_secs(args.no_space_timeout.into()),
        polling_us: args.polling,
        ..ServerOptions::default()
    };
    if let Some(workers) = args.workers {
        options.workers = workers.into();
    }
    let (to, events) = sync_channel(EVENTS_WAITING_MAX);
    // It ends when the server, which has the other end, is gone.
    let telling = spawn_named("tidepool-events", move || tell(&events, output))
        .map_err(|e| Failure::new("io", "the server", format!("cannot start a thread: {e}")))?;
    let server = Server::start_reporting(options, to).map_err(|e| {
        Failure::new("io", "the server", format!("cannot start: {e}"))
            .hint("io_uring must be allowed here: see the sysctl kernel.io_uring_disabled")
    })?;
    let mut served = 0;
    for owned in pools {
        served += serve_pool(args, sockets, owned, pools.len() > 1, &server, output)?;
    }
    if served == 0 {
        return Err(Failure::new(
            "not_found",
            args.pools[0].display(),
            "there is no disk to serve",
        )
        .hint("`tidepool disk create POOL:NAME --size 10G` makes one"));
    }
    say(
        output,
        &json!({ "event": "ready", "disks": served }),
        "ready",
    );
    let waited = signals.wait();
    let stop = server.shutdown();
    // What happened last is told before the end is. A panic there was printed.
    drop(telling.join());
    waited.map_err(|e| Failure::new("io", "signals", format!("cannot wait for them: {e}")))?;
    stop.map_err(|e| failed_to_serve(&e))?;
    Ok(Reply::new(json!({ "event": "stopped" }), "stopped\n"))
}

/// Prints what happens to clients, until nothing can any more.
fn tell(events: &Receiver<Event>, output: Output) {
    for event in events {
        let kind = match event.kind {
            EventKind::SessionRefused => "session_refused",
            EventKind::MemoryLost => "memory_lost",
            EventKind::QueueBroken => "queue_broken",
            EventKind::RequestFailed => "request_failed",
        };
        let line = json!({
            "event": kind,
            "name": event.disk,
            "reason": event.reason,
            "left_out": event.left_out,
        });
        say(output, &line, &event.to_string());
    }
}

/// Opens a socket for each disk of a pool; returns how many.
fn serve_pool(
    args: &Serve,
    sockets: &Path,
    owned: &Owned,
    has_prefix: bool,
    server: &Server,
    output: Output,
) -> Result<usize, Failure> {
    let prefix = if has_prefix {
        format!("{}.", stem(&owned.path))
    } else {
        String::new()
    };
    let mut served = 0;
    for item in owned.pool.items() {
        let name = &item.row.name;
        let object = format!("{}:{name}", owned.path.display());
        let disk = match Disk::open(&owned.pool, name) {
            Ok(disk) => disk,
            // The others need not wait for an image that is missing or was changed.
            Err(e) if e.kind() == DiskErrorKind::Base => {
                let reason = e.to_string();
                let event =
                    json!({"event": "refused", "pool": owned.path, "name": name, "reason": reason});
                say(output, &event, &format!("not served: {object}: {reason}"));
                continue;
            }
            Err(e) => return Err(Failure::disk(&object, &e)),
        };
        let (size, is_read_only) = (disk.size(), disk.is_read_only());
        let socket = sockets.join(format!("{prefix}{name}.sock"));
        let added = server.add(disk, &socket, args.queues);
        added.map_err(|e| failed_to_serve(&e))?;
        let event = json!({
            "event": "serving",
            "pool": owned.path,
            "name": name,
            "socket": socket,
            "size_bytes": size,
            "is_read_only": is_read_only,
        });
        let access = if is_read_only { ", read-only" } else { "" };
        let text = format!(
            "{}  {object}, {}{access}",
            socket.display(),
            human::bytes(size)
        );
        say(output, &event, &text);
        served += 1;
    }
    Ok(served)
}

fn failed_to_serve(error: &ServeError) -> Failure {
    match error {
        ServeError::Socket { path, source } => {
            let failure =
                Failure::new("socket", path.display(), format!("cannot listen: {source}"));
            let is_too_long = bytes_of(path.as_os_str().len()) > 107;
            match (is_too_long, source.kind() == io::ErrorKind::AddrInUse) {
                (true, _) => failure.hint("choose a directory with a shorter path: --sockets DIR"),
                (_, true) => {
                    failure.hint("another server listens there: choose another --sockets DIR")
                }
                (false, false) => failure,
            }
        }
        ServeError::Flush { name, source } => Failure::disk(name, source),
        ServeError::Duplicate(_)
        | ServeError::Unknown(_)
        | ServeError::Queues(_)
        | ServeError::NoFile(_)
        | ServeError::Thread(_) => Failure::new("serve", "", error),
    }
}

/// Prints one line now. A reader that has gone away is no reason to stop serving.
fn say(output: Output, event: &serde_json::Value, text: &str) {
    let line = match output.format {
        Format::Json => format!("{event}\n"),
        Format::Text => format!("{text}\n"),
    };
    drop(output::print(&line));
}
