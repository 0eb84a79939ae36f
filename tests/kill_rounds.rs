//! Goal: a daemon killed at any moment under load costs nothing that a flush had acknowledged, and
//! shows no disk what another wrote.
//!
//! Method: each round starts `tidepool serve` on a pool that all rounds share, and drives several
//! disks at once through real vhost-user clients: writes of whole and half blocks stamped with
//! (disk, sector, version), and flushes. After 1 to 200 ms of load the daemon is killed with
//! SIGKILL. The pool must check clean, and each sector of each disk must hold one of its own stamps
//! with a version at least as new as the last one that was complete before an acknowledged flush
//! began. Between rounds disks are forked, deleted (clusters change hands) and discarded.
//!
//! `TIDEPOOL_KILL_ROUNDS` (50) sets the rounds, `TIDEPOOL_SEED` replays a seed. The moment of the
//! kill depends on the machine, so a seed repeats the load, not the instant.

mod common;
#[expect(
    dead_code,
    reason = "the load generator uses more of it than this test"
)]
#[path = "../benches/loadgen/guest.rs"]
mod guest;

use common::Random;
use guest::{Device, Done, Kind};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::check::check;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Access, FileStorage};
use tidepool::sync::atomic::{AtomicBool, Ordering};
use tidepool::sync::spawn_named;
use tidepool::sys::clock;

const SECTOR: usize = 512;
/// Bytes of a request; some begin in the middle of a block.
const REQUEST: u32 = 4096;
const SECTORS: usize = REQUEST as usize / SECTOR;
const DEPTH: u16 = 16;
const CLIENTS: usize = 3;
const DISK_LEN: u64 = 8 << 20;
const POOL_LEN: u64 = 128 << 20;

/// A sector's contents: who wrote it, where, and which time.
fn stamp(disk: u64, sector: u64, version: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for part in bytes.chunks_exact_mut(32) {
        for (field, value) in part
            .chunks_exact_mut(8)
            .zip([0x7469_6465, disk, sector, version])
        {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

fn version_of(bytes: &[u8], disks: &[u64], sector: u64) -> Option<u64> {
    let field = |n: usize| {
        let field: [u8; 8] = bytes[n * 8..n * 8 + 8].try_into().expect("8 bytes");
        u64::from_le_bytes(field)
    };
    if bytes == [0; SECTOR] {
        return Some(0);
    }
    let (disk, version) = (field(1), field(3));
    let is_own = disks.contains(&disk) && bytes == stamp(disk, sector, version);
    is_own.then_some(version)
}

/// What a disk must hold at least, and may hold at most.
#[derive(Debug, Clone)]
struct Known {
    /// Marks of this disk and of those it was forked from.
    marks: Vec<u64>,
    /// Versions by sector: complete before an acknowledged flush began.
    durable: BTreeMap<u64, u64>,
    /// Versions by sector: the newest submitted.
    newest: BTreeMap<u64, u64>,
}

/// One write in flight.
#[derive(Debug, Clone, Copy)]
struct Write {
    sector: u64,
    version: u64,
}

/// A client of one disk: everything it knows when the daemon dies.
struct Client {
    device: Device,
    known: Known,
    random: Random,
    version: u64,
    slots: Vec<Option<Write>>,
    /// Completed since the last flush was submitted, or before it.
    complete: BTreeMap<u64, u64>,
    /// What the flush in flight makes durable.
    flushing: Option<BTreeMap<u64, u64>>,
    /// The daemon has been killed: what has not been answered never will be.
    is_dead: Arc<AtomicBool>,
}

impl Client {
    fn run(mut self) -> Known {
        let mut done: Vec<Done> = Vec::new();
        loop {
            self.fill_ring();
            self.device.want_call(true);
            self.device
                .kick()
                .expect("an eventfd outlives who reads it");
            if !self.device.has_done() {
                self.device
                    .sleep_at_most(10)
                    .expect("an eventfd outlives who writes it");
            }
            done.clear();
            self.device.collect_done(&mut done);
            for one in &done {
                assert!(one.is_ok, "the daemon refused a request");
                self.complete_one(one.slot);
            }
            if done.is_empty() && self.is_dead.load(Ordering::SeqCst) {
                return self.known;
            }
        }
    }

    fn complete_one(&mut self, slot: u16) {
        match self.slots[usize::from(slot)].take() {
            Some(write) => {
                for n in 0..SECTORS as u64 {
                    self.complete.insert(write.sector + n, write.version);
                }
            }
            None => {
                let flushed = self.flushing.take().expect("a flush was in flight");
                self.known.durable.extend(flushed);
            }
        }
    }

    /// The last slot is for flushes. No two writes in flight overlap, so that the version of a
    /// sector tells how far it got.
    fn fill_ring(&mut self) {
        for slot in 0..DEPTH - 1 {
            if self.slots[usize::from(slot)].is_some() {
                continue;
            }
            let most = DISK_LEN / SECTOR as u64 - SECTORS as u64;
            let mut sector = self.random.below(most);
            if self.random.below(4) != 0 {
                sector &= !7;
            }
            let span = sector..sector + SECTORS as u64;
            let overlaps =
                self.slots.iter().flatten().any(|other| {
                    other.sector < span.end && span.start < other.sector + SECTORS as u64
                });
            if overlaps {
                continue;
            }
            self.version += 1;
            let mut bytes = Vec::new();
            let mark = *self.known.marks.last().expect("a disk has a mark");
            for sector in span {
                bytes.extend_from_slice(&stamp(mark, sector, self.version));
                self.known.newest.insert(sector, self.version);
            }
            self.device.fill(slot, &bytes);
            let at = sector * SECTOR as u64;
            self.device
                .submit(Kind::Write, slot, at)
                .expect("the ring has room");
            self.slots[usize::from(slot)] = Some(Write {
                sector,
                version: self.version,
            });
        }
        if self.flushing.is_none() && self.random.below(3) == 0 {
            self.flushing = Some(self.complete.clone());
            self.device
                .submit(Kind::Flush, DEPTH - 1, 0)
                .expect("the ring has room");
        }
    }
}

struct Daemon {
    child: Child,
    sockets: PathBuf,
}

impl Daemon {
    fn start(pool: &Path, sockets: &Path) -> Self {
        std::fs::create_dir_all(sockets).expect("a directory");
        let mut child = Command::new(env!("CARGO_BIN_EXE_tidepool"))
            .arg("serve")
            .arg(pool)
            .arg("--sockets")
            .arg(sockets)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the daemon starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line.contains("ready"));
        assert!(ready, "the daemon says when it is ready");
        Self {
            child,
            sockets: sockets.to_owned(),
        }
    }

    fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("it was ours");
    }
}

fn open_pool(path: &Path) -> Arc<Pool> {
    let file = FileStorage::open(path, Access::ReadWrite).expect("the dead daemon's lock is gone");
    let report = check(&file).expect("readable");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    Pool::open(Arc::new(file), &OpenOptions::default()).expect("a killed pool opens")
}

/// Every sector holds a stamp of its own disk, new enough. What it holds is what it holds from now
/// on, at least.
fn verify(pool: &Arc<Pool>, name: &str, known: &mut Known) {
    let disk = Disk::open(pool, name).expect("the disk is there");
    let mut bytes = vec![0; usize::try_from(DISK_LEN).expect("small")];
    disk.read_at(&mut bytes, 0).expect("reads");
    for (sector, held) in (0_u64..).zip(bytes.chunks_exact(SECTOR)) {
        let version = version_of(held, &known.marks, sector);
        let version = version.unwrap_or_else(|| panic!("{name}: foreign or torn at {sector}"));
        let least = known.durable.get(&sector).copied().unwrap_or(0);
        let most = known.newest.get(&sector).copied().unwrap_or(0);
        assert!(
            (least..=most).contains(&version),
            "{name} sector {sector}: version {version}, flushed {least}, newest {most}"
        );
        known.durable.insert(sector, version);
        known.newest.insert(sector, version);
    }
}

struct World {
    path: PathBuf,
    sockets: PathBuf,
    random: Random,
    disks: BTreeMap<String, Known>,
    next: u64,
    version: u64,
}

impl World {
    fn round(&mut self) {
        let daemon = Daemon::start(&self.path, &self.sockets);
        let mut names: Vec<String> = self.disks.keys().cloned().collect();
        while names.len() > CLIENTS {
            let at = usize::try_from(self.random.below(names.len() as u64)).expect("small");
            names.swap_remove(at);
        }
        self.version += 1 << 32;
        let is_dead = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for name in names {
            let socket = daemon.sockets.join(format!("{name}.sock"));
            let device = Device::connect(&socket, DEPTH, REQUEST).expect("connects");
            let known = self.disks[&name].clone();
            let random = Random(self.random.next());
            let slots = vec![None; usize::from(DEPTH)];
            let version = self.version;
            let (complete, flushing) = (BTreeMap::new(), None);
            let is_dead = Arc::clone(&is_dead);
            let client = Client {
                device,
                known,
                random,
                version,
                slots,
                complete,
                flushing,
                is_dead,
            };
            let thread = spawn_named("client", move || client.run()).expect("a thread");
            threads.push((name, thread));
        }
        // The moment of death: this is the load's length, not a wait for a condition.
        std::thread::sleep(Duration::from_millis(1 + self.random.below(200)));
        daemon.kill();
        is_dead.store(true, Ordering::SeqCst);
        for (name, thread) in threads {
            let known = thread.join().expect("a client survives its daemon");
            self.disks.insert(name, known);
        }
        let pool = open_pool(&self.path);
        for (name, known) in &mut self.disks {
            verify(&pool, name, known);
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
            1 if names.len() < 6 => {
                let child = self.new_name();
                cowdisk::fork(pool, &name, std::slice::from_ref(&child)).expect("forks");
                let mut known = self.disks[&name].clone();
                known.marks.push(self.next);
                self.disks.insert(child, known);
            }
            2 if names.len() < 6 => self.create(pool),
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
        let (durable, newest) = (BTreeMap::new(), BTreeMap::new());
        self.disks.insert(
            name,
            Known {
                marks: vec![self.next],
                durable,
                newest,
            },
        );
    }
}

#[test]
fn what_a_flush_acknowledged_survives_kill_9() {
    let now = clock::unix_seconds();
    let seed = std::env::var("TIDEPOOL_SEED").map_or(now, |seed| seed.parse().expect("a number"));
    let rounds = std::env::var("TIDEPOOL_KILL_ROUNDS").map_or(50, |n| n.parse().expect("a number"));
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
    };
    let pool = open_pool(&world.path);
    for _ in 0..CLIENTS {
        world.create(&pool);
    }
    pool.close().expect("closes");
    drop(pool);
    for round in 0..rounds {
        println!("round {round}: {} disks", world.disks.len());
        world.round();
    }
    let flushed: usize = world.disks.values().map(|known| known.durable.len()).sum();
    assert!(flushed > 0, "something was flushed");
}
