//! Goal: while clusters go from one disk to another as fast as they can, no reader ever sees a
//! sector of another disk, of an older version than it may, or one that is torn.
//!
//! Method: a small pool in a real file, so that every freed cluster is used again at once. Threads
//! own disks and write stamps (disk, sector, version) into every sector, over what discards,
//! deletes and forks of the other threads give back. Each thread knows the newest version of each
//! of its sectors and reads them back; forks are read against what their source held. The seed is
//! printed; `TIDEPOOL_SECONDS` runs longer.

mod common;

use common::{Random, bytes};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tidepool::cowdisk::{self, Disk, DiskErrorKind, NewDisk};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, Return, check, open};
use tidepool::storage::{Access, Caching, FileStorage, Storage};
use tidepool::sync::spawn_named;
use tidepool::sys::clock;

const SECTORS: u64 = 2048;
const POOL_LEN: u64 = 24 << 20;
const THREADS: u64 = 6;

/// Stamps of all disks ever made are told apart by this.
static NEXT_DISK: AtomicU64 = AtomicU64::new(1);

fn at(n: u64) -> usize {
    usize::try_from(n).expect("small")
}

fn stamp(disk: u64, sector: u64, version: u64) -> Vec<u8> {
    let one = [
        disk.to_le_bytes(),
        sector.to_le_bytes(),
        version.to_le_bytes(),
        [0x5a; 8],
    ];
    one.concat().repeat(16)
}

/// A disk and what its sectors hold: (disk that wrote it, version), or zeros.
struct Known {
    disk: Disk,
    stamp_id: u64,
    sectors: Vec<Option<(u64, u64)>>,
}

fn make(pool: &Arc<Pool>) -> Option<Known> {
    let id = NEXT_DISK.fetch_add(1, Ordering::Relaxed);
    let name = format!("d{id}");
    cowdisk::create(pool, &NewDisk::empty(&name, SECTORS * 512)).ok()?;
    let disk = Disk::open(pool, &name).ok()?;
    Some(Known {
        disk,
        stamp_id: id,
        sectors: vec![None; at(SECTORS)],
    })
}

impl Known {
    fn write(&mut self, from: u64, len: u64, version: u64) {
        let data: Vec<u8> = (from..from + len)
            .flat_map(|sector| stamp(self.stamp_id, sector, version))
            .collect();
        match self.disk.write_at(&data, from * 512) {
            Ok(()) => {
                let new = Some((self.stamp_id, version));
                self.sectors[at(from)..at(from + len)].fill(new);
            }
            Err(e) => {
                // Any part may have been written: what is there must be this or the old.
                assert_eq!(e.kind(), DiskErrorKind::NoSpace, "{e}");
                for sector in from..from + len {
                    let found = common::read(&self.disk, sector * 512, 512);
                    if found == stamp(self.stamp_id, sector, version) {
                        self.sectors[at(sector)] = Some((self.stamp_id, version));
                    }
                }
                self.verify(from, len);
            }
        }
    }

    fn discard(&mut self, from: u64, len: u64) {
        self.disk.discard(from * 512, len * 512).expect("discards");
        let block = u64::from(self.disk.block_size()) / 512;
        let (first, end) = (from.next_multiple_of(block), (from + len) / block * block);
        if first < end {
            self.sectors[at(first)..at(end)].fill(None);
        }
    }

    fn verify(&self, from: u64, len: u64) {
        let all = common::read(&self.disk, from * 512, len * 512);
        for (sector, found) in (from..).zip(all.chunks_exact(512)) {
            let expected = match self.sectors[at(sector)] {
                Some((disk, version)) => stamp(disk, sector, version),
                None => bytes(0, 512),
            };
            let word = |n: usize| u64::from_le_bytes(*found[n..].first_chunk().expect("8 bytes"));
            assert!(
                found == expected,
                "disk {} sector {sector}: expected {:?}, found disk {} sector {} version {}",
                self.stamp_id,
                self.sectors[at(sector)],
                word(0),
                word(8),
                word(16)
            );
        }
    }

    fn fork(&self, pool: &Arc<Pool>) -> Option<Known> {
        let id = NEXT_DISK.fetch_add(1, Ordering::Relaxed);
        let name = format!("d{id}");
        cowdisk::fork(pool, &self.disk.name(), std::slice::from_ref(&name)).ok()?;
        let disk = Disk::open(pool, &name).ok()?;
        Some(Known {
            disk,
            stamp_id: id,
            sectors: self.sectors.clone(),
        })
    }
}

/// One thread's life: its own disks, and everything that can be done to them.
fn live(pool: &Arc<Pool>, seed: u64, end: Instant) -> u64 {
    let mut random = Random(seed);
    let mut mine: Vec<Known> = Vec::new();
    let mut done = 0;
    while clock::now() < end {
        done += 1;
        if mine.is_empty() || (mine.len() < 4 && random.below(30) == 0) {
            mine.extend(make(pool));
            continue;
        }
        let pick = at(random.below(mine.len() as u64));
        let from = random.below(SECTORS);
        let most = [1, 8, 128, 400][at(random.below(4))];
        let len = 1 + random.below(most.min(SECTORS - from));
        match random.below(100) {
            0..=39 => mine[pick].write(from, len, done),
            40..=54 => mine[pick].discard(from, len),
            55..=84 => mine[pick].verify(from, len),
            85..=89 => mine[pick].disk.flush().expect("flushes"),
            90..=93 if mine.len() < 4 => {
                let fork = mine[pick].fork(pool);
                mine.extend(fork);
            }
            94..=95 => mine[pick].discard(0, SECTORS),
            _ => {
                mine[pick].verify(0, SECTORS);
                let known = mine.swap_remove(pick);
                let name = known.disk.name();
                drop(known);
                cowdisk::remove(pool, &name, true).expect("nobody else has it");
            }
        }
    }
    for known in &mine {
        known.verify(0, SECTORS);
    }
    done
}

fn file(path: &Path) -> Arc<dyn Storage> {
    let access = Access::ReadWrite;
    let opened = FileStorage::open_with(path, access, Caching::Buffered);
    Arc::new(opened.expect("the file opens"))
}

#[test]
fn readers_never_see_what_is_not_theirs() {
    let seconds = std::env::var("TIDEPOOL_SECONDS").map_or(12, |s| s.parse().expect("a number"));
    let seed = std::env::var("TIDEPOOL_SEED").map_or_else(
        |_| {
            std::time::UNIX_EPOCH
                .elapsed()
                .expect("after 1970")
                .as_secs()
        },
        |s| s.parse().expect("a number"),
    );
    println!("TIDEPOOL_SEED={seed}");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pool");
    std::fs::write(&path, []).expect("makes");
    let storage = file(&path);
    open::create(&*storage, &CreateOptions::new(POOL_LEN)).expect("an empty pool");
    let options = OpenOptions {
        returning: Return::Eager,
        ..OpenOptions::default()
    };
    let pool = Pool::open(Arc::clone(&storage), &options).expect("opens");
    let background = pool.start_background().expect("a thread");
    let end = clock::now() + Duration::from_secs(seconds);
    let threads: Vec<_> = (0..THREADS)
        .map(|n| {
            let pool = Arc::clone(&pool);
            let body = move || live(&pool, seed * THREADS + n, end);
            spawn_named("client", body).expect("a thread")
        })
        .collect();
    let done: u64 = threads
        .into_iter()
        .map(|t| t.join().expect("no violation"))
        .sum();
    drop(background);
    pool.close().expect("closes");
    drop(pool);
    let report = check::check(&*storage).expect("reads");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    println!("{done} operations of {THREADS} threads in {seconds} s");
    assert!(done > 1000, "only {done} operations");
}
