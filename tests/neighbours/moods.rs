//! Every way to misbehave, on every kind of pool: a guest that checks every answer beside one that
//! never flushes, only discards, fills the pool, vanishes with requests in flight, changes its memory
//! under them, or has rings that are none; on one worker and two, clusters small and large, files
//! driven in each way. What the daemon takes stays bounded, and it ends when it is told to.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::units::ClusterSize;
use tidepool::pool::check::check;
use tidepool::pool::reclaim::Background;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Caching, FileStorage, Storage};
use tidepool::sys::clock;
use tidepool::vhost_blk::{Server, ServerOptions};

use crate::client::seed;
use crate::random::Random;
use crate::stranger::{MOODS, Mood, Stranger};
use crate::user::{Latencies, User};

/// Requests of the well-behaved guest beside each mood; a hundredth of the reads are beyond p99.
const REQUESTS: usize = 3000;
/// Reads beside anything take at most so many times what they take beside ordinary reads (p99).
const RATIO_MAX: u32 = 4;
/// What the scheduler and a build that was not optimised add: no ratio.
const SLACK: Duration = Duration::from_micros(if cfg!(debug_assertions) { 30_000 } else { 500 });
/// As long as any read or write may take.
const WORST_MAX: Duration = Duration::from_millis(if cfg!(debug_assertions) { 150 } else { 20 });
/// As long as a flush may take: it shares commits with whatever was written before it began.
const FLUSH_MAX: Duration = Duration::from_secs(1);
/// Memory of the process beyond what the guests and the file systems in memory have, bytes.
const GROWTH_MAX: u64 = 256 << 20;
/// Descriptors beyond those before.
const DESCRIPTORS_MAX: usize = 64;
/// As long as shutting down may take.
const SHUTDOWN_MAX: Duration = Duration::from_secs(12);

/// The disks' sizes. The stranger's does not fit in the pool.
const USER_SIZE: u64 = 16 << 20;
const STRANGER_SIZE: u64 = 1 << 30;
const POOL_SIZE: u64 = 256 << 20;

/// How the two are served.
#[derive(Debug, Clone, Copy)]
struct Setting {
    workers: usize,
    cluster: u64,
    /// The pool's file is in memory, or on a disk.
    is_memory: bool,
}

/// The pool, with a disk for each.
struct Place {
    dir: TempDir,
    pool: Arc<Pool>,
    background: Background,
}

fn place(setting: Setting) -> Place {
    let shm = Path::new("/dev/shm");
    let dir = if setting.is_memory {
        TempDir::new_in(shm)
    } else {
        TempDir::new()
    };
    let dir = dir.expect("a directory");
    let path = dir.path().join("pool");
    let file = FileStorage::create_new_with(&path, POOL_SIZE, Caching::Auto).expect("a file");
    let options = CreateOptions {
        cluster_size: ClusterSize::from_bytes(setting.cluster).expect("a cluster size"),
        ..CreateOptions::new(POOL_SIZE)
    };
    let file: Arc<dyn Storage> = Arc::new(file);
    open::create(&*file, &options).expect("a pool");
    let pool = Pool::open(file, &OpenOptions::default()).expect("opens");
    for (name, size) in [("user", USER_SIZE), ("stranger", STRANGER_SIZE)] {
        cowdisk::create(&pool, &NewDisk::empty(name, size)).expect("a disk");
    }
    let background = pool.start_background().expect("a thread");
    Place {
        dir,
        pool,
        background,
    }
}

/// Bytes of a line of /proc/self/status.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with(name));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.expect("a line").parse::<u64>().expect("KiB") << 10
}

/// Memory of this process that is not shared with guests or files.
fn private_memory() -> u64 {
    status("RssAnon:")
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux").count()
}

/// Works beside a stranger in `mood`.
fn beside(user: &mut User, socket: &Path, mood: Mood, seed: u64) -> Latencies {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stranger = Stranger::new(socket, STRANGER_SIZE, mood, seed);
        let running = scope.spawn(|| stranger.run(&stop));
        // Until it has filled its queue once.
        user.work(REQUESTS / 10);
        let latencies = user.work(REQUESTS);
        stop.store(true, Ordering::Relaxed);
        running.join().expect("the stranger's own checks hold");
        latencies
    })
}

/// One setting: every mood, compared with ordinary reads before and after it.
fn round(setting: Setting, seed: u64, end: Instant) -> Vec<String> {
    let Place {
        dir,
        pool,
        background,
    } = place(setting);
    let options = ServerOptions {
        workers: setting.workers,
        no_space_timeout: Duration::from_secs(3600),
        ..ServerOptions::default()
    };
    let server = Server::start(options).expect("a server");
    let socket = |name: &str| dir.path().join(format!("{name}.sock"));
    for name in ["user", "stranger"] {
        let disk = Disk::open(&pool, name).expect("opens");
        server.add(disk, &socket(name), 4).expect("served");
    }
    let mut random = Random(seed);
    let mut user = User::boot(&socket("user"), random.next());
    let mut faults = Vec::new();
    let (memory, open) = (private_memory(), descriptors());
    let mut moods = MOODS.to_vec();
    while !moods.is_empty() && (clock::now() < end || moods.len() == MOODS.len()) {
        let at = usize::try_from(random.below(moods.len() as u64)).expect("small");
        let mood = moods.swap_remove(at);
        let stranger = socket("stranger");
        let mut ordinary = beside(&mut user, &stranger, Mood::Ordinary, random.next());
        let found = beside(&mut user, &stranger, mood, random.next());
        ordinary.add(beside(&mut user, &stranger, Mood::Ordinary, random.next()));
        judge(setting, mood, &ordinary, &found, &mut faults);
        let (grown, more) = (
            private_memory().saturating_sub(memory),
            descriptors().saturating_sub(open),
        );
        if grown > GROWTH_MAX || more > DESCRIPTORS_MAX {
            faults.push(format!(
                "{setting:?} {mood:?}: {} MiB and {more} descriptors more",
                grown >> 20
            ));
        }
    }
    user.check();
    let began = clock::now();
    server.shutdown().expect("a good end");
    let took = began.elapsed();
    if took > SHUTDOWN_MAX {
        faults.push(format!("{setting:?}: shutting down took {took:?}"));
    }
    drop(user);
    drop(background);
    pool.close().expect("closes");
    let report = check(&**pool.storage()).expect("reads");
    assert!(report.faults.is_empty(), "{setting:?}: {:?}", report.faults);
    faults
}

/// Compares what was seen beside a stranger with what is seen beside an ordinary guest.
fn judge(
    setting: Setting,
    mood: Mood,
    ordinary: &Latencies,
    found: &Latencies,
    faults: &mut Vec<String>,
) {
    let (usual, p99) = (ordinary.read_p99(), found.read_p99());
    let (worst, flush) = (found.worst(), found.worst_flush());
    let mut line = format!(
        "{} workers, {} KiB, {}: {mood:?}: p99 {p99:?} (ordinary {usual:?}), worst {worst:?} \
         (ordinary {:?}), flush {flush:?} (ordinary {:?})",
        setting.workers,
        setting.cluster >> 10,
        if setting.is_memory { "memory" } else { "disk" },
        ordinary.worst(),
        ordinary.worst_flush(),
    );
    let too_slow = [
        ("p99", p99 > usual * RATIO_MAX + SLACK),
        ("worst", worst > WORST_MAX.max(ordinary.worst() * RATIO_MAX)),
        (
            "flush",
            flush > FLUSH_MAX.max(ordinary.worst_flush() * RATIO_MAX),
        ),
    ];
    for (what, is_too_slow) in too_slow {
        if is_too_slow {
            write!(line, " TOO SLOW: {what}").expect("a string");
        }
    }
    if too_slow.iter().any(|(_, is_too_slow)| *is_too_slow) {
        faults.push(line.clone());
    }
    #[expect(clippy::print_stdout, reason = "the figures are the point")]
    {
        println!("NEIGHBOUR: {line}");
    }
}

#[test]
fn however_one_guest_misbehaves_another_is_served() {
    let seconds = std::env::var("TIDEPOOL_SECONDS").ok();
    let seconds: u64 = seconds.and_then(|text| text.parse().ok()).unwrap_or(60);
    let end = clock::now() + Duration::from_secs(seconds / 3);
    let mut random = Random(seed());
    let mut faults = Vec::new();
    while faults.is_empty() {
        let setting = Setting {
            workers: 1 + usize::try_from(random.below(2)).expect("small"),
            cluster: [16 << 10, 64 << 10, 1 << 20]
                [usize::try_from(random.below(3)).expect("small")],
            is_memory: random.below(3) > 0,
        };
        faults = round(setting, random.next(), end);
        if clock::now() >= end {
            break;
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
