//! The well-behaved guest: one request at a time, every byte that it reads checked, every answer
//! timed.

use std::path::Path;
use std::time::Duration;

use tidepool::sys::clock;

use crate::guest::{DATA, FLUSH, Guest, IN, MODERN, OK, OUT};
use crate::random::Random;

/// Blocks of 4 KiB it works on.
const BLOCKS: u64 = 512;
const BLOCK: usize = 4096;
const SECTORS: u64 = 8;

/// How long its requests took.
#[derive(Debug, Default, Clone)]
pub struct Latencies {
    pub reads: Vec<Duration>,
    pub writes: Vec<Duration>,
    pub flushes: Vec<Duration>,
}

impl Latencies {
    /// The time within which 99 of 100 reads were answered.
    pub fn read_p99(&self) -> Duration {
        percentile(&self.reads, 99)
    }

    pub fn worst(&self) -> Duration {
        let all = self.reads.iter().chain(&self.writes);
        all.max().copied().unwrap_or_default()
    }

    pub fn worst_flush(&self) -> Duration {
        self.flushes.iter().max().copied().unwrap_or_default()
    }

    pub fn add(&mut self, other: Latencies) {
        self.reads.extend(other.reads);
        self.writes.extend(other.writes);
        self.flushes.extend(other.flushes);
    }
}

/// The smallest of `all` that `percent` of them do not exceed.
fn percentile(all: &[Duration], percent: usize) -> Duration {
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

/// The guest, and what its disk must hold.
pub struct User {
    guest: Guest,
    /// By block, how often it was written.
    versions: Vec<u64>,
    random: Random,
}

impl User {
    /// Boots on `socket` and writes each of its blocks once.
    pub fn boot(socket: &Path, seed: u64) -> Self {
        let mut user = Self {
            guest: Guest::boot(socket, MODERN),
            versions: vec![0; usize::try_from(BLOCKS).expect("small")],
            random: Random(seed),
        };
        for block in 0..BLOCKS {
            user.write(block);
        }
        user
    }

    fn pattern(block: u64, version: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        Random(block << 32 | version).fill(&mut bytes);
        bytes
    }

    fn write(&mut self, block: u64) {
        let version = &mut self.versions[usize::try_from(block).expect("small")];
        *version += 1;
        let bytes = Self::pattern(block, *version);
        self.guest.ram.write(DATA, &bytes);
        let len = u32::try_from(BLOCK).expect("small");
        let status = self
            .guest
            .request(0, OUT, block * SECTORS, &[(DATA, len, 0)]);
        assert_eq!(status, OK, "a write to block {block} it has");
    }

    fn read(&mut self, block: u64) {
        let version = self.versions[usize::try_from(block).expect("small")];
        let bytes = self.guest.read(0, block * SECTORS, BLOCK);
        let expected = Self::pattern(block, version);
        assert!(bytes == expected, "block {block} is not what was written");
    }

    /// Does `count` requests; most are reads.
    pub fn work(&mut self, count: usize) -> Latencies {
        let mut latencies = Latencies::default();
        for _ in 0..count {
            let block = self.random.below(BLOCKS);
            let kind = match self.random.below(32) {
                0 => FLUSH,
                1..6 => OUT,
                _ => IN,
            };
            let began = clock::now();
            let times = match kind {
                FLUSH => {
                    assert_eq!(self.guest.request(0, FLUSH, 0, &[]), OK, "a flush");
                    &mut latencies.flushes
                }
                OUT => {
                    self.write(block);
                    &mut latencies.writes
                }
                _ => {
                    self.read(block);
                    &mut latencies.reads
                }
            };
            times.push(began.elapsed());
        }
        latencies
    }

    /// Everything it wrote is there.
    pub fn check(&mut self) {
        for block in 0..BLOCKS {
            self.read(block);
        }
    }
}
