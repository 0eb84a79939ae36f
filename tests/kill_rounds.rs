//! Goal: a daemon killed at any moment under load costs nothing that a flush had acknowledged, and
//! shows no disk what another wrote; nor does a daemon whose storage fills up or fails before.
//!
//! Method: each round starts `tidepool serve` on a pool that all rounds share, and drives several
//! disks at once through real vhost-user clients: writes of whole and half blocks stamped with
//! (disk, sector, version), and flushes. After 1 to 200 ms of load the daemon is killed with
//! SIGKILL. The pool must check clean, and each sector of each disk must hold one of its own stamps
//! with a version at least as new as the last one that was complete before an acknowledged flush
//! began. Between rounds disks are forked, deleted (clusters change hands) and discarded.
//!
//! The fault rounds do the same with a new pool each: in a file on ext4, xfs and btrfs that fill up;
//! in a file that must not grow further (RLIMIT_FSIZE); on a loop device whose own file system fills
//! up, which makes it a device of errors, for data, or for data and the journal. There the daemon is
//! killed 1 to 200 ms after the first failure. The daemon says that a request failed; once it says
//! that the pool is frozen, no flush may succeed any more.
//!
//! `TIDEPOOL_KILL_ROUNDS` (50) sets the rounds and `TIDEPOOL_FAULT_ROUNDS` (8) those of each fault,
//! made in `TIDEPOOL_FAULT_DIR` (/var/tmp); `TIDEPOOL_SEED` replays a seed. The moment of the kill depends on the machine, so a seed repeats
//! the load, not the instant.

mod common;
#[expect(
    dead_code,
    reason = "the load generator uses more of it than this test"
)]
#[path = "../benches/loadgen/guest.rs"]
mod guest;
mod kill {
    pub(crate) mod client;
    pub(crate) mod daemon;
    pub(crate) mod place;
}

use common::Random;
use kill::client::{DISK_LEN, Known, SECTOR, Shared, start};
use kill::daemon::{Daemon, open_pool};
use kill::place::{Loop, Mounted, fault_dir, run};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::{CreateOptions, Pool, open};
use tidepool::storage::{Access, FileStorage};
use tidepool::sync::atomic::{AtomicU64, Ordering};
use tidepool::sys::clock;

const CLIENTS: usize = 6;
const DISKS_MAX: usize = 9;
const POOL_LEN: u64 = 192 << 20;
const MIB: u64 = 1 << 20;

struct World {
    path: PathBuf,
    sockets: PathBuf,
    random: Random,
    disks: BTreeMap<String, Known>,
    next: u64,
    version: u64,
    /// Flushes that were acknowledged.
    flushed: u64,
}

impl World {
    fn round(&mut self) {
        let daemon = Daemon::start(&self.path, &self.sockets, &[], &[]);
        let mut names: Vec<String> = self.disks.keys().cloned().collect();
        while names.len() > CLIENTS {
            let at = usize::try_from(self.random.below(names.len() as u64)).expect("small");
            names.swap_remove(at);
        }
        self.version += 1 << 32;
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for name in names {
            let (socket, known) = (daemon.socket(&name), self.disks[&name].clone());
            let random = Random(self.random.next());
            let thread = start(&socket, known, random, self.version, &shared);
            threads.push((name, thread));
        }
        // The moment of death: this is the load's length, not a wait for a condition.
        sleep(Duration::from_millis(1 + self.random.below(200)));
        drop(daemon.kill());
        shared.is_dead.store(true, Ordering::SeqCst);
        for (name, thread) in threads {
            let known = thread.join().expect("a client survives its daemon");
            self.disks.insert(name, known);
        }
        self.flushed += shared.flushed.load(Ordering::SeqCst);
        let pool = open_pool(&self.path);
        for (name, known) in &mut self.disks {
            known.verify(&pool, name);
        }
        self.change_hands(&pool);
        pool.close().expect("closes");
    }

    /// A disk goes, or parts of one; another is forked or made: clusters change hands.
    fn change_hands(&mut self, pool: &Arc<Pool>) {
        let names: Vec<String> = self.disks.keys().cloned().collect();
        let at = usize::try_from(self.random.below(names.len() as u64)).expect("small");
        let name = names[at].clone();
        match self.random.below(4) {
            0 if names.len() > 2 => {
                cowdisk::remove(pool, &name, false).expect("removes");
                self.disks.remove(&name);
            }
            1 if names.len() < DISKS_MAX => {
                let child = self.new_name();
                cowdisk::fork(pool, &name, std::slice::from_ref(&child)).expect("forks");
                let mut known = self.disks[&name].clone();
                known.marks.push(self.next);
                self.disks.insert(child, known);
            }
            2 if names.len() < DISKS_MAX => self.create(pool),
            _ => {
                let disk = Disk::open(pool, &name).expect("opens");
                disk.discard(0, DISK_LEN / 2).expect("discards");
                let known = self.disks.get_mut(&name).expect("named");
                for sector in 0..DISK_LEN / 2 / SECTOR as u64 {
                    known.durable.insert(sector, 0);
                    known.newest.insert(sector, 0);
                }
            }
        }
    }

    fn new_name(&mut self) -> String {
        self.next += 1;
        format!("d{}", self.next)
    }

    fn create(&mut self, pool: &Arc<Pool>) {
        let name = self.new_name();
        cowdisk::create(pool, &NewDisk::empty(&name, DISK_LEN)).expect("creates");
        self.disks.insert(name, Known::new(self.next));
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn seed() -> u64 {
    number("TIDEPOOL_SEED", clock::unix_seconds())
}

#[test]
fn what_a_flush_acknowledged_survives_kill_9() {
    let (seed, rounds) = (seed(), number("TIDEPOOL_KILL_ROUNDS", 50));
    println!("TIDEPOOL_SEED={seed} TIDEPOOL_KILL_ROUNDS={rounds}");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kill.pool");
    {
        let file = FileStorage::create_new(&path, POOL_LEN).expect("creates");
        open::create(&file, &CreateOptions::new(POOL_LEN)).expect("an empty pool");
    }
    let sockets = dir.path().join("s");
    let (random, disks) = (Random(seed), BTreeMap::new());
    let mut world = World {
        path,
        sockets,
        random,
        disks,
        next: 0,
        version: 0,
        flushed: 0,
    };
    let pool = open_pool(&world.path);
    for _ in 0..CLIENTS {
        world.create(&pool);
    }
    pool.close().expect("closes");
    drop(pool);
    for round in 0..rounds {
        if round % 100 == 0 {
            println!("round {round}: {} disks", world.disks.len());
        }
        world.round();
    }
    println!("{rounds} kills, {} flushes acknowledged", world.flushed);
    assert!(world.flushed > 0, "something was flushed");
}

/// Where a pool of a fault round lies, and how its daemon is started.
struct Scene<'a> {
    pool: &'a Path,
    sockets: PathBuf,
    /// Words before the program.
    before: Vec<String>,
}

/// What fault rounds saw.
#[derive(Debug, Default)]
struct Seen {
    rounds: u64,
    /// Rounds in which a request failed.
    hit: u64,
    /// Requests that failed.
    failed: u64,
    /// Flushes that were acknowledged.
    flushed: u64,
    /// Rounds in which the pool froze: a flush of the storage or a write to the journal failed.
    frozen: u64,
}

impl Scene<'_> {
    /// A new pool, served and written to until it fails and a little longer. `ready` is called
    /// before it is served, `relieve` when the daemon is dead.
    fn round(
        &self,
        random: &mut Random,
        seen: &mut Seen,
        ready: impl FnOnce(),
        relieve: impl FnOnce(),
    ) {
        make_pool(self.pool);
        let pool = open_pool(self.pool);
        let mut disks = BTreeMap::new();
        for mark in 1..=CLIENTS as u64 {
            let name = format!("d{mark}");
            cowdisk::create(&pool, &NewDisk::empty(&name, DISK_LEN)).expect("creates");
            disks.insert(name, Known::new(mark));
        }
        pool.close().expect("closes");
        drop(pool);
        ready();
        let timeout = random.below(2).to_string();
        let after = ["--no-space-timeout", &timeout];
        let daemon = Daemon::start(self.pool, &self.sockets, &self.before, &after);
        let shared = Arc::new(Shared {
            may_fail: true,
            ..Shared::default()
        });
        let mut threads = Vec::new();
        for (name, known) in disks {
            let socket = daemon.socket(&name);
            let thread = start(&socket, known, Random(random.next()), 0, &shared);
            threads.push((name, thread));
        }
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let is_hit = wait_until(|| count(&shared.failed) > 0);
        // The moment of death.
        let death = clock::now() + Duration::from_millis(1 + random.below(200));
        while clock::now() < death {
            let is_frozen = daemon.has_said("frozen read-only since");
            shared.is_frozen.store(is_frozen, Ordering::SeqCst);
            sleep(POLL);
        }
        let is_told = !is_hit || wait_until(|| daemon.has_said("a request failed"));
        let is_frozen = shared.is_frozen.load(Ordering::SeqCst);
        assert!(is_told, "it says nothing of it: {}", daemon.kill());
        drop(daemon.kill());
        shared.is_dead.store(true, Ordering::SeqCst);
        let mut disks = BTreeMap::new();
        for (name, thread) in threads {
            disks.insert(name, thread.join().expect("a client survives its daemon"));
        }
        relieve();
        let pool = open_pool(self.pool);
        for (name, known) in &mut disks {
            known.verify(&pool, name);
        }
        pool.close().expect("closes");
        seen.rounds += 1;
        seen.hit += u64::from(is_hit);
        seen.failed += count(&shared.failed);
        seen.flushed += count(&shared.flushed);
        seen.frozen += u64::from(is_frozen);
    }
}

/// Longest load of a fault round that meets no fault.
const FAULT_TIME_MAX: Duration = Duration::from_secs(5);
/// How often a fault is looked for.
const POLL: Duration = Duration::from_millis(2);

/// Whether `is_so` came true within [`FAULT_TIME_MAX`].
fn wait_until(is_so: impl Fn() -> bool) -> bool {
    let end = clock::now() + FAULT_TIME_MAX;
    while !is_so() {
        if clock::now() > end {
            return false;
        }
        sleep(POLL);
    }
    true
}

fn make_pool(path: &Path) {
    let file = if path.starts_with("/dev") {
        FileStorage::open(path, Access::ReadWrite).expect("opens")
    } else {
        drop(std::fs::remove_file(path)); // of the round before
        FileStorage::create_new(path, POOL_LEN).expect("creates")
    };
    open::create(&file, &CreateOptions::new(POOL_LEN)).expect("an empty pool");
}

#[expect(clippy::print_stdout, reason = "counts, seeds, and what was skipped")]
fn say(text: &str) {
    println!("{text}");
}

/// Runs the rounds of one fault; `round` makes one. Says what was seen.
fn fault_rounds(name: &str, mut round: impl FnMut(&mut Random, &mut Seen)) -> Seen {
    let (seed, rounds) = (seed(), number("TIDEPOOL_FAULT_ROUNDS", 8));
    say(&format!(
        "TIDEPOOL_SEED={seed} TIDEPOOL_FAULT_ROUNDS={rounds}"
    ));
    let (mut random, mut seen) = (Random(seed), Seen::default());
    for _ in 0..rounds {
        round(&mut random, &mut seen);
    }
    say(&format!(
        "{name}: {} rounds, {} met the fault, {} requests failed, {} flushes acknowledged, {} \
         pools frozen",
        seen.rounds, seen.hit, seen.failed, seen.flushed, seen.frozen
    ));
    assert!(seen.hit > 0, "there was a fault");
    assert!(seen.flushed > 0, "there was something to lose");
    seen
}

/// A scene in which pools share a file system that fills up.
fn fill_up(kind: &str) {
    let small = match Mounted::new(kind, 384 * MIB) {
        Ok(small) => small,
        Err(e) => return say(&format!("SKIPPED: a_full_{kind}_loses_nothing: {e}")),
    };
    let dir = tempfile::tempdir().expect("a directory");
    let pool = small.path().join("pool");
    let scene = Scene {
        pool: &pool,
        sockets: dir.path().join("s"),
        before: Vec::new(),
    };
    fault_rounds(kind, |random, seen| {
        let free = (4 + random.below(24)) * MIB;
        // where nothing is overwritten in place, not even a superblock is written without room
        let is_early = kind == "btrfs" || seen.rounds.is_multiple_of(2);
        let early = || {
            if is_early {
                small.relieve();
            }
        };
        scene.round(random, seen, || small.fill(free), early);
        if !is_early {
            small.relieve();
        }
    });
}

#[test]
fn a_full_ext4_loses_nothing() {
    fill_up("ext4");
}

#[test]
fn a_full_xfs_loses_nothing() {
    fill_up("xfs");
}

#[test]
fn a_full_btrfs_loses_nothing() {
    fill_up("btrfs");
}

#[test]
fn a_file_that_must_not_grow_loses_nothing() {
    if let Err(e) = run("prlimit", &["--version"]) {
        return println!("SKIPPED: a_file_that_must_not_grow_loses_nothing: {e}");
    }
    let dir = fault_dir().expect("a directory");
    let pool = dir.path().join("pool");
    fault_rounds("RLIMIT_FSIZE", |random, seen| {
        let limit = (6 + random.below(32)) * MIB;
        let scene = Scene {
            pool: &pool,
            sockets: dir.path().join("s"),
            before: vec!["prlimit".to_owned(), format!("--fsize={limit}")],
        };
        scene.round(random, seen, || {}, || {});
    });
}

#[test]
fn a_device_of_errors_loses_nothing() {
    let name = "a_device_of_errors_loses_nothing";
    let made = Mounted::new("ext4", 384 * MIB).and_then(|small| {
        let file = small.path().join("device");
        let len = POOL_LEN.to_string();
        run("truncate", &["-s", &len, file.to_str().expect("UTF-8")])?;
        let device = Loop::new(&file)?;
        Ok((small, file, device))
    });
    let (small, file, device) = match made {
        Ok(made) => made,
        Err(e) => return println!("SKIPPED: {name}: {e}"),
    };
    let file = file.to_str().expect("UTF-8");
    let dir = tempfile::tempdir().expect("a directory");
    let scene = Scene {
        pool: device.path(),
        sockets: dir.path().join("s"),
        before: Vec::new(),
    };
    let seen = fault_rounds("loop device", |random, seen| {
        let free = (4 + random.below(24)) * MIB;
        let has_journal = seen.rounds % 2 == 1;
        let ready = || {
            if !has_journal {
                // then the part of the journal that comes next has no place on the device either,
                // once that is full
                run("fallocate", &["--dig-holes", file]).expect("digs");
            }
            small.fill(free);
        };
        scene.round(random, seen, ready, || small.relieve());
        run("blkdiscard", &[device.path().to_str().expect("UTF-8")]).expect("discards");
    });
    assert!(seen.frozen > 0 || seen.rounds < 2, "the journal failed too");
}
