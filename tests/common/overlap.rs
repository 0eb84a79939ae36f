//! Overlapping requests on one disk by many threads, while it is forked, snapshotted, discarded and
//! cleaned up after; each does what its seed says, and all write down what they saw.

use super::common::{CLUSTER, Random, SUB, move_bytes};
use super::history::{Event, What};
use std::sync::Arc;
use std::task::Waker;
use tidepool::cowdisk::{self, Disk, Step, WritePlan};
use tidepool::pool::Pool;
use tidepool::sync::global::Mutex;
use tidepool::sync::global::atomic::{AtomicU64, Ordering};

const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;

fn short(n: u64) -> usize {
    usize::try_from(n).expect("short")
}

/// What all threads share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) pool: Arc<Pool>,
    /// Bytes of the disk `d` at first.
    pub(crate) len: u64,
    /// Bytes that it has by now, or more.
    size: AtomicU64,
    clock: AtomicU64,
    log: Mutex<Vec<Event>>,
}

impl World {
    /// For the disk `d` of `pool`, which holds zeros.
    pub(crate) fn new(pool: &Arc<Pool>, len: u64) -> Arc<Self> {
        Arc::new(Self {
            pool: Arc::clone(pool),
            len,
            size: AtomicU64::new(len),
            clock: AtomicU64::new(1),
            log: Mutex::default(),
        })
    }

    /// What was written down.
    pub(crate) fn log(&self) -> Vec<Event> {
        self.log.lock().clone()
    }

    /// The time, which is another each time; also a value nobody wrote before.
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn note(&self, what: What, offset: u64, values: &[u64], began: u64, ended: u64) {
        let event = |(sector, value): (u64, &u64)| Event {
            what,
            sector,
            value: *value,
            began,
            ended,
        };
        let sectors = offset / SECTOR..;
        self.log.lock().extend(sectors.zip(values).map(event));
    }

    /// Any sectors of the disk, more often few than many.
    fn range(&self, random: &mut Random, unit: u64) -> (u64, u64) {
        range_in(self.size.load(Ordering::SeqCst), random, unit)
    }
}

/// Any sectors of a disk of `size` bytes, more often few than many.
fn range_in(size: u64, random: &mut Random, unit: u64) -> (u64, u64) {
    let most = [2, 8, 40][short(random.below(3))];
    let len = (1 + random.below(most)) * unit;
    let offset = random.below(size / unit) * unit;
    (offset, len.min(size - offset))
}

/// Sectors from `offset` that hold `value`, each with its own number.
fn stamped(offset: u64, len: u64, value: u64) -> Vec<u8> {
    let sectors = offset / SECTOR..(offset + len) / SECTOR;
    let words = sectors.flat_map(|sector| [value, sector].repeat(SECTOR_LEN / 16));
    words.flat_map(u64::to_le_bytes).collect()
}

/// The values of sectors from `offset`.
///
/// # Panics
/// One is torn, or another's.
fn values(offset: u64, bytes: &[u8]) -> Vec<u64> {
    let sectors = offset / SECTOR..;
    let value = |(sector, bytes): (u64, &[u8])| {
        let value = u64::from_le_bytes(*bytes.first_chunk().expect("512 bytes"));
        let is_whole = match value {
            0 => bytes.iter().all(|byte| *byte == 0),
            _ => bytes == stamped(sector * SECTOR, SECTOR, value),
        };
        assert!(
            is_whole,
            "sector {sector} is torn or another's: {:?}",
            &bytes[..32]
        );
        value
    };
    sectors.zip(bytes.chunks(SECTOR_LEN)).map(value).collect()
}

/// The values of a disk now.
pub(crate) fn all(disk: &Disk) -> Vec<u64> {
    values(0, &super::common::read(disk, 0, disk.size()))
}

/// Reads all of the disk, and writes it down.
pub(crate) fn read_all(world: &World, disk: &Disk) -> Vec<u64> {
    let began = world.now();
    let seen = all(disk);
    world.note(What::Read, 0, &seen, began, world.now());
    seen
}

/// Writes and reads, some of them several at a time.
pub(crate) fn write_and_read(world: &World, disk: &Disk, mut random: Random, steps: u32) {
    for _ in 0..steps {
        let (offset, len) = world.range(&mut random, SECTOR);
        match random.below(8) {
            0..3 => {
                let value = world.now();
                let bytes = stamped(offset, len, value);
                disk.write_at(&bytes, offset).expect("writes");
                let count = short(len / SECTOR);
                world.note(What::Write, offset, &vec![value; count], value, world.now());
            }
            3..5 => write_two(world, disk, &mut random),
            5..7 => {
                let began = world.now();
                let bytes = super::common::read(disk, offset, len);
                let seen = values(offset, &bytes);
                world.note(What::Read, offset, &seen, began, world.now());
            }
            _ => disk.flush().expect("flushes"),
        }
    }
}

/// Two writes in flight at once, in different clusters so that neither waits for the other: planned
/// one after the other, moved and completed in another order.
fn write_two(world: &World, disk: &Disk, random: &mut Random) {
    let at = |n: u64, random: &mut Random| {
        let half = world.len / 2;
        let offset = n * half + random.below(half / CLUSTER) * CLUSTER + random.below(16) * SUB;
        // Whole blocks: nothing has to be copied first, so nothing has to be waited for.
        (offset, SUB)
    };
    let mut writes: Vec<(u64, u64, _)> = Vec::new();
    for n in 0..2 {
        let (offset, len) = at(n, random);
        let value = world.now();
        let bytes = stamped(offset, len, value);
        if let Some((pass, plan)) = try_begin(disk, offset, &bytes) {
            writes.push((offset, value, (bytes, pass, plan)));
        }
    }
    if random.below(2) == 0 {
        writes.reverse();
    }
    for (_, _, (bytes, _, plan)) in &writes {
        move_bytes(disk, plan, bytes);
    }
    for (offset, value, (bytes, pass, mut plan)) in writes {
        disk.complete_write(&mut plan, true);
        drop(pass);
        let count = bytes.len() / SECTOR_LEN;
        world.note(What::Write, offset, &vec![value; count], value, world.now());
    }
}

/// As `common::begin_write`, unless something is in the way.
fn try_begin(disk: &Disk, offset: u64, bytes: &[u8]) -> Option<(cowdisk::Pass, WritePlan)> {
    let pass = disk.enter(0, Waker::noop())?;
    let mut plan = WritePlan::default();
    let len = u32::try_from(bytes.len()).expect("short");
    loop {
        let step = disk.plan_write(&pass, offset, len, &mut plan, Waker::noop());
        match step.expect("a legal write") {
            Step::Ready => return Some((pass, plan)),
            Step::Copy(job) => disk.run_copy(job).expect("copies"),
            Step::Done | Step::Busy | Step::Full => return None,
        }
    }
}

/// Discards and zeroes.
pub(crate) fn discard(world: &World, disk: &Disk, mut random: Random, steps: u32) {
    for _ in 0..steps {
        let unit = [SUB, CLUSTER][short(random.below(2))];
        let (offset, len) = match random.below(4) {
            0 | 1 => world.range(&mut random, unit),
            2 => world.range(&mut random, SECTOR),
            _ => {
                // To the end of the disk, which may not be that any more.
                let len = (1 + random.below(5)) * SECTOR;
                (disk.size() - len, len)
            }
        };
        let began = world.now();
        let is_discard = offset % SUB == 0 && len % SUB == 0 && random.below(2) == 0;
        match is_discard {
            true => disk.discard(offset, len).expect("discards"),
            false => disk
                .write_zeroes(offset, len, random.below(2) == 0)
                .expect("zeroes"),
        }
        let count = short(len / SECTOR);
        world.note(What::Write, offset, &vec![0; count], began, world.now());
    }
}

/// Forks and snapshots the disk: what they hold is a read of all of it at that time. They do not
/// change, and what is written to a fork is nobody else's.
pub(crate) fn fork(world: &World, mut random: Random, steps: u32) {
    let pool = &world.pool;
    for step in 0..steps {
        let is_snapshot = random.below(3) == 0;
        let began = world.now();
        let name = match is_snapshot {
            true => {
                cowdisk::snapshot(pool, "d", &format!("s{step}")).expect("snapshots");
                format!("d@s{step}")
            }
            false => {
                let name = format!("f{step}");
                cowdisk::fork(pool, "d", std::slice::from_ref(&name)).expect("forks");
                name
            }
        };
        let ended = world.now();
        let fork = Disk::open(pool, &name).expect("there");
        let mut seen = all(&fork);
        world.note(What::Read, 0, &seen, began, ended);
        for _ in 0..2 {
            if !is_snapshot {
                let (offset, len) = range_in(fork.size(), &mut random, SECTOR);
                let value = world.now();
                fork.write_at(&stamped(offset, len, value), offset)
                    .expect("writes");
                let (from, to) = (offset / SECTOR, (offset + len) / SECTOR);
                seen[short(from)..short(to)].fill(value);
            }
            assert_eq!(all(&fork), seen, "`{name}` has changed");
        }
        drop(fork);
        cowdisk::remove(pool, &name, false).expect("removes");
    }
}

/// Lets the disk grow, by blocks in part and whole.
pub(crate) fn grow(world: &World, mut random: Random, steps: u32) {
    for _ in 0..steps {
        let size = world.size.load(Ordering::SeqCst) + (1 + random.below(6)) * SECTOR;
        cowdisk::resize(&world.pool, "d", size, false).expect("grows");
        world.size.store(size, Ordering::SeqCst);
    }
}

/// Makes what was freed free, and takes it away from disks that set it aside.
pub(crate) fn reclaim(world: &World, mut random: Random, steps: u32) {
    for _ in 0..steps {
        match random.below(4) {
            0 => world.pool.flush().expect("flushes"),
            1 => world.pool.take_back_slabs(),
            2 => drop(
                world
                    .pool
                    .punch_written(1 + u32::try_from(random.below(8)).expect("short"))
                    .expect("punches"),
            ),
            _ => world.pool.reclaim().expect("reclaims"),
        }
    }
}
