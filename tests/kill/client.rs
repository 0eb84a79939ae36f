//! A client of one disk that knows what it must find there after the daemon's death: it writes
//! blocks stamped with (disk, sector, version), flushes, and notes what was acknowledged.

use crate::common::Random;
use crate::guest::{Device, Done, Kind};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use tidepool::cowdisk::Disk;
use tidepool::pool::Pool;
use tidepool::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tidepool::sync::spawn_named;

pub(crate) const SECTOR: usize = 512;
/// Bytes of a request; some begin in the middle of a block.
const REQUEST: u32 = 4096;
const SECTORS: usize = REQUEST as usize / SECTOR;
const DEPTH: u16 = 16;
pub(crate) const DISK_LEN: u64 = 8 << 20;

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
pub(crate) struct Known {
    /// Marks of this disk and of those it was forked from.
    pub(crate) marks: Vec<u64>,
    /// Versions by sector: complete before an acknowledged flush began.
    pub(crate) durable: BTreeMap<u64, u64>,
    /// Versions by sector: the newest submitted.
    pub(crate) newest: BTreeMap<u64, u64>,
}

impl Known {
    /// A disk of zeros.
    pub(crate) fn new(mark: u64) -> Self {
        Self {
            marks: vec![mark],
            durable: BTreeMap::new(),
            newest: BTreeMap::new(),
        }
    }

    /// Every sector of the disk holds one of its own stamps, new enough. What it holds is what it
    /// holds from now on, at least.
    pub(crate) fn verify(&mut self, pool: &Arc<Pool>, name: &str) {
        let disk = Disk::open(pool, name).expect("the disk is there");
        let mut bytes = vec![0; usize::try_from(DISK_LEN).expect("small")];
        disk.read_at(&mut bytes, 0).expect("reads");
        for (sector, held) in (0_u64..).zip(bytes.chunks_exact(SECTOR)) {
            let version = version_of(held, &self.marks, sector);
            let version = version.unwrap_or_else(|| panic!("{name}: foreign or torn at {sector}"));
            let least = self.durable.get(&sector).copied().unwrap_or(0);
            let most = self.newest.get(&sector).copied().unwrap_or(0);
            assert!(
                (least..=most).contains(&version),
                "{name} sector {sector}: version {version}, flushed {least}, newest {most}"
            );
            self.durable.insert(sector, version);
            self.newest.insert(sector, version);
        }
    }
}

/// What the clients of one daemon share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// The daemon has been killed: what has not been answered never will be.
    pub(crate) is_dead: AtomicBool,
    /// The storage below fails: requests may.
    pub(crate) may_fail: bool,
    /// Requests that did.
    pub(crate) failed: AtomicU64,
    /// The daemon has said that the pool is frozen: no flush may succeed any more.
    pub(crate) is_frozen: AtomicBool,
    /// Flushes that did not.
    pub(crate) flushed: AtomicU64,
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
    /// The pool was frozen when the flush in flight was submitted.
    must_fail: bool,
    shared: Arc<Shared>,
}

/// Starts a client whose versions begin after `version`; what it knows at the daemon's death is its
/// result.
pub(crate) fn start(
    socket: &Path,
    known: Known,
    random: Random,
    version: u64,
    shared: &Arc<Shared>,
) -> JoinHandle<Known> {
    let client = Client {
        device: Device::connect(socket, DEPTH, REQUEST).expect("connects"),
        known,
        random,
        version,
        slots: vec![None; usize::from(DEPTH)],
        complete: BTreeMap::new(),
        flushing: None,
        must_fail: false,
        shared: Arc::clone(shared),
    };
    spawn_named("client", move || client.run()).expect("a thread")
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
                self.complete_one(*one);
            }
            if done.is_empty() && self.shared.is_dead.load(Ordering::SeqCst) {
                return self.known;
            }
        }
    }

    fn complete_one(&mut self, done: Done) {
        let write = self.slots[usize::from(done.slot)].take();
        let flushed = match write {
            Some(_) => None,
            None => Some(self.flushing.take().expect("a flush was in flight")),
        };
        if !done.is_ok {
            assert!(self.shared.may_fail, "the daemon refused a request");
            // a write that failed may have happened, or in part; a flush that failed says nothing
            self.shared.failed.fetch_add(1, Ordering::SeqCst);
            return;
        }
        for n in 0..SECTORS as u64 {
            if let Some(write) = write {
                self.complete.insert(write.sector + n, write.version);
            }
        }
        if let Some(flushed) = flushed {
            assert!(!self.must_fail, "a frozen pool acknowledged a flush");
            self.known.durable.extend(flushed);
            self.shared.flushed.fetch_add(1, Ordering::SeqCst);
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
            self.must_fail = self.shared.is_frozen.load(Ordering::SeqCst);
            self.device
                .submit(Kind::Flush, DEPTH - 1, 0)
                .expect("the ring has room");
        }
    }
}
