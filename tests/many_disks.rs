//! Goal: what is done to one of many disks takes no time for the others: removing all of them one by
//! one, or serving them, takes time by their number, not by its square.
//!
//! Method: the same with N disks and with 4N, and the ratio of the CPU time it took: about four where
//! time goes by number, sixteen where it goes by the square.

mod cli;
mod common;

use cli::Shell;
use common::CLUSTER;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk::{self, NewDisk};
use tidepool::format::units::ClusterSize;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{SimStorage, Storage};

/// Disks of the smaller pool.
const REMOVED: u32 = 3000;
/// Bytes of a pool: its journal has 32 MiB a half, so that most of the removals are replayed.
const LEN: u64 = 16 << 30;
/// Between four times and sixteen times.
const RATIO_MAX: f64 = 8.0;

/// CPU time this thread has used so far.
fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("known to every kernel");
    let time = |part: TimeVal| {
        let micros = u64::try_from(part.num_microseconds()).expect("time goes forward");
        Duration::from_micros(micros)
    };
    time(usage.user_time()) + time(usage.system_time())
}

/// Pool of a disk `g` and `n` forks of it in a chain or beside one another.
fn pool_of(n: u32, is_chain: bool) -> (Arc<SimStorage>, Arc<Pool>, Vec<String>) {
    let storage = Arc::new(SimStorage::new(LEN));
    let options = CreateOptions {
        cluster_size: ClusterSize::from_bytes(CLUSTER).expect("in range"),
        ..CreateOptions::new(LEN)
    };
    open::create(&*storage, &options).expect("an empty pool");
    let pool = opened(&storage, false);
    cowdisk::create(&pool, &NewDisk::empty("g", 1 << 30)).expect("creates");
    let names: Vec<String> = (0..n).map(|k| format!("f{k}")).collect();
    if is_chain {
        let mut source = "g";
        for name in &names {
            cowdisk::fork(&pool, source, std::slice::from_ref(name)).expect("forks");
            source = name;
        }
    } else {
        cowdisk::fork(&pool, "g", &names).expect("forks");
    }
    (storage, pool, names)
}

fn opened(storage: &Arc<SimStorage>, is_read_only: bool) -> Arc<Pool> {
    let options = OpenOptions {
        is_read_only,
        ..OpenOptions::default()
    };
    Pool::open(Arc::clone(storage) as Arc<dyn Storage>, &options).expect("the pool opens")
}

/// CPU time to remove `n` forks one by one, and to open what that leaves.
fn removal(n: u32, is_chain: bool) -> Duration {
    let (storage, pool, names) = pool_of(n, is_chain);
    let began = cpu_time();
    for name in &names {
        cowdisk::remove(&pool, name, false).expect("removes");
    }
    let again = opened(&storage, true);
    let used = cpu_time() - began;
    assert_eq!((pool.items().len(), again.items().len()), (1, 1));
    used
}

/// The time with `4 * n` disks by that with `n`: the less of two, for others run here too.
fn ratio(n: u32, time: impl Fn(u32) -> Duration) -> f64 {
    let least = |n: u32| (0..2).map(|_| time(n)).min().expect("two");
    let (once, four_times) = (least(n), least(4 * n));
    four_times.as_secs_f64() / once.as_secs_f64().max(1e-3)
}

#[test]
fn removing_one_of_many_takes_no_time_for_the_others() {
    for is_chain in [false, true] {
        let ratio = ratio(REMOVED, |n| removal(n, is_chain));
        assert!(ratio < RATIO_MAX, "chain: {is_chain}, ratio {ratio}");
    }
}

/// Ticks of CPU time until a server with `n` forks is ready.
fn ticks_until_ready(n: u32) -> u64 {
    let shell = Shell::new();
    shell.ok(&["pool", "create", "p", "--size", "1G"]);
    shell.ok(&["disk", "create", "p:g", "--size", "1G"]);
    shell.ok(&["disk", "fork", "p:g", "f", "-n", &n.to_string()]);
    // As /run is: elsewhere what a socket's file takes may be most of it, and differs widely.
    let sockets = tempfile::tempdir_in("/dev/shm").expect("memory that is mounted");
    symlink(sockets.path(), shell.path("run")).expect("a link");
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    let ticks = server.cpu_ticks();
    assert_eq!(server.stop(), Some(0));
    ticks
}

#[test]
fn serving_one_of_many_takes_no_time_for_the_others() {
    let least = |n| (0..2).map(|_| ticks_until_ready(n)).min().expect("two");
    let (once, four_times) = (least(1000), least(4000));
    // Ticks are coarse: one more or less is no fault.
    assert!(
        four_times < 8 * (once + 1),
        "{once} ticks, then {four_times}"
    );
}
