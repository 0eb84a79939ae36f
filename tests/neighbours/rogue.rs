//! A guest that asks for what its neighbours could suffer from, without an end, and one that only
//! wants its reads.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tidepool::sys::clock;

use crate::client::{Ram, Random, WRITE};
use crate::guest::{DATA, DISCARD, FLUSH, GPA, Guest, IN, MODERN, OK, OUT, Style, WRITE_ZEROES};
use crate::served::pattern;

/// Requests that a rogue has in flight.
const DEPTH: u16 = 32;
/// Bytes of a rogue's buffers.
const BUFFERS: u64 = 32 << 20;

/// What a rogue asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// 4 KiB reads: what its neighbours have to live with.
    Reads,
    /// Reads of 32 MiB in 1021 buffers.
    LargeReads,
    /// Reads and writes in a thousand buffers that direct I/O cannot use.
    Shreds,
    /// Writes of 1 MiB.
    LargeWrites,
    /// Writes of a sector, most of which need a copy first.
    SmallWrites,
    /// WRITE_ZEROES of 1 GiB that keep the space.
    KeptZeroes,
    /// WRITE_ZEROES between sectors.
    OddZeroes,
    /// DISCARD of 1 GiB, in 64 ranges.
    Discards,
    Flushes,
    /// Any of these.
    Anything,
}

pub const DEEDS: [Deed; 9] = [
    Deed::LargeReads,
    Deed::Shreds,
    Deed::LargeWrites,
    Deed::SmallWrites,
    Deed::KeptZeroes,
    Deed::OddZeroes,
    Deed::Discards,
    Deed::Flushes,
    Deed::Anything,
];

/// See the module.
pub struct Rogue {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Rogue {
    /// Sets a guest to work on the disk of `size` bytes at `socket`.
    pub fn start(socket: &Path, deed: Deed, size: u64, seed: u64) -> Self {
        let len = usize::try_from(DATA - GPA + BUFFERS).expect("a size");
        let guest = Guest::try_boot_on(Ram::new(GPA, len), socket, MODERN).expect("accepted");
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let (until, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let work = move || {
            let mut driver = Driver {
                guest,
                random: Random(seed),
                sectors: size / 512,
            };
            (0..DEPTH).for_each(|slot| driver.ask(slot, deed));
            while !until.load(Ordering::Relaxed) {
                let queue = &mut driver.guest.queues[0];
                let Some((slot, _)) = queue.wait_used(&driver.guest.ram, TICK) else {
                    continue;
                };
                count.fetch_add(1, Ordering::Relaxed);
                driver.ask(u16::try_from(slot).expect("a slot of ours"), deed);
            }
        };
        let thread = std::thread::Builder::new().spawn(work).expect("a thread");
        Self {
            stop,
            answered,
            thread: Some(thread),
        }
    }

    /// Requests of it that were answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

/// How often a rogue looks whether it is to stop.
const TICK: Duration = Duration::from_millis(50);

impl Drop for Rogue {
    /// Its client vanishes with whatever is in flight.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            assert!(
                thread.join().is_ok() || std::thread::panicking(),
                "a rogue's rogue"
            );
        }
    }
}

struct Driver {
    guest: Guest,
    random: Random,
    sectors: u64,
}

impl Driver {
    /// Puts the next request into `slot`.
    fn ask(&mut self, slot: u16, deed: Deed) {
        let deed = if deed == Deed::Anything {
            DEEDS[self.random.below(8) as usize]
        } else {
            deed
        };
        match deed {
            Deed::Reads | Deed::Anything => self.data(slot, IN, 8, &[(DATA, 4096, WRITE)]),
            Deed::LargeReads => self.data(slot, IN, 65_000, &shreds(32_256, 0x8000, 0, WRITE)),
            Deed::Shreds if self.random.below(2) == 0 => {
                self.data(slot, IN, 1022, &shreds(512, 1024, 8, WRITE));
            }
            Deed::Shreds => self.data(slot, OUT, 1022, &shreds(512, 1024, 8, 0)),
            Deed::LargeWrites => self.data(slot, OUT, 2048, &[(DATA, 1 << 20, 0)]),
            Deed::SmallWrites => self.data(slot, OUT, 1, &[(DATA, 512, 0)]),
            Deed::KeptZeroes => self.ranges(slot, WRITE_ZEROES, 1, 1 << 21, 1, 0),
            Deed::OddZeroes => self.ranges(slot, WRITE_ZEROES, 4, 1 << 10, 0, 0),
            Deed::Discards => self.ranges(slot, DISCARD, 64, 1 << 15, 1, 0),
            Deed::Flushes => self.guest.put_indirect(0, slot, FLUSH, 0, &[]),
        }
    }

    fn data(&mut self, slot: u16, kind: u32, sectors: u64, bufs: &[(u64, u32, u16)]) {
        let at = self.random.below(self.sectors - sectors);
        let at = if sectors.is_multiple_of(8) {
            at & !7
        } else {
            at
        };
        self.guest.put_indirect(0, slot, kind, at, bufs);
    }

    /// `count` ranges of `most` sectors, or of up to that many if they are aligned to nothing.
    fn ranges(&mut self, slot: u16, kind: u32, count: u64, most: u64, align: u64, flags: u32) {
        let most = most.min(self.sectors);
        let mut bytes = Vec::new();
        for _ in 0..count {
            let len = if align == 0 {
                1 + self.random.below(most)
            } else {
                most
            };
            let at = self.random.below(self.sectors - len + 1);
            bytes.extend(at.to_le_bytes());
            bytes.extend((len as u32).to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        // A place of its own, out of the way of what others write.
        let place = DATA + u64::from(slot) * 1024;
        self.guest.ram.write(place, &bytes);
        let bufs = [(place, bytes.len() as u32, 0)];
        self.guest.put_indirect(0, slot, kind, 0, &bufs);
    }
}

/// 1022 buffers of `len` bytes at every `step` bytes from `skew`; the largest end with less, so that
/// the request is no larger than one may be.
fn shreds(len: u32, step: u64, skew: u64, flags: u16) -> Vec<(u64, u32, u16)> {
    let count = 1022.min((BUFFERS - skew) / step);
    (0..count)
        .map(|i| (DATA + skew + i * step, len, flags))
        .collect()
}

/// How long reads took.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    pub reads: usize,
    pub p99: Duration,
    pub worst: Duration,
}

/// One reader, one read at a time, of a disk whose first `filled` bytes hold the pattern.
pub struct Reader {
    guest: Guest,
    random: Random,
    blocks: u64,
}

impl Reader {
    pub fn new(socket: &Path, filled: u64, seed: u64) -> Self {
        let style = Style { size: 64, ..MODERN };
        Self {
            guest: Guest::boot(socket, style),
            random: Random(seed),
            blocks: filled / 4096,
        }
    }

    /// Writes the pattern.
    pub fn fill(&mut self) {
        for block in 0..self.blocks {
            self.guest.ram.write(DATA, &[pattern(block); 4096]);
            let status = self.guest.request(0, OUT, block * 8, &[(DATA, 4096, 0)]);
            assert_eq!(status, OK);
        }
    }

    /// Reads and verifies for `time`.
    pub fn read_for(&mut self, time: Duration) -> Latency {
        let begin = clock::now();
        let mut taken = Vec::new();
        while clock::now().duration_since(begin) < time {
            taken.push(self.read_one());
        }
        taken.sort_unstable();
        let at = taken.len() * 99 / 100;
        Latency {
            reads: taken.len(),
            p99: taken[at],
            worst: taken[taken.len() - 1],
        }
    }

    fn read_one(&mut self) -> Duration {
        let block = self.random.below(self.blocks);
        let begin: Instant = clock::now();
        let status = self.guest.request(0, IN, block * 8, &[(DATA, 4096, WRITE)]);
        let taken = clock::now().duration_since(begin);
        assert_eq!(status, OK);
        let got = self.guest.ram.read(DATA, 4096);
        assert!(
            got.iter().all(|byte| *byte == pattern(block)),
            "block {block}"
        );
        taken
    }
}
