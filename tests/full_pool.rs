//! Goal: a pool that is full, with a journal that is full, can be emptied and can be enlarged.
//!
//! Method: data takes every cluster, then forks make a checkpoint image that needs more than what
//! was kept for it. The journal cannot be written over without one.

mod common;

use common::{CLUSTER, POOL_LEN, bytes, disk, fresh, opened, read};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, DiskErrorKind};
use tidepool::pool::Pool;
use tidepool::storage::SimStorage;

/// Clusters of the disk that takes all the space.
const BULK: u64 = 1024;

/// A pool in which nothing can be recorded any more: `bulk` has most of its space, and `d` has the
/// forks `f0`, `f1` and so on. `phase` says which of the last batches was long.
fn stuck(phase: u64) -> (Arc<SimStorage>, Arc<Pool>) {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    let bulk = disk(&pool, "bulk", BULK * CLUSTER);
    let mut written = 0;
    while bulk.write_at(&bytes(2, CLUSTER), written * CLUSTER).is_ok() {
        written += 1;
    }
    assert!(written > BULK / 2 && written < BULK, "{written} clusters");
    drop((d, bulk));
    // What it takes to name them is more than what was kept for an image.
    for n in 0..25 {
        let names: Vec<String> = (0..40).map(|k| format!("f{}", 40 * n + k)).collect();
        cowdisk::fork(&pool, "d", &names).expect("forks");
    }
    assert!(pool.superblock().image.is_none());
    let wide = disk(&pool, "wide", 8000 * 64 * CLUSTER);
    let fill = |records: u64| {
        for n in 0..records {
            wide.discard(n * 64 * CLUSTER, 64 * CLUSTER)
                .expect("discards");
        }
        wide.flush()
    };
    for n in phase.. {
        let filled = fill(if n % 129 == 128 { 8000 } else { 1 });
        if let Err(e) = filled {
            assert_eq!(e.kind(), DiskErrorKind::NoSpace, "{e}");
            break;
        }
        assert!(n < 10_000, "the journal takes everything");
    }
    drop(wide);
    (storage, pool)
}

/// However much place the last batches left in the journal.
const PHASES: [u64; 8] = [0, 16, 32, 48, 64, 80, 96, 112];

#[test]
fn what_fills_a_pool_can_be_removed() {
    for phase in PHASES {
        remove_what_fills(stuck(phase));
    }
}

fn remove_what_fills((storage, pool): (Arc<SimStorage>, Arc<Pool>)) {
    cowdisk::remove(&pool, "f0", false).expect("a small one, that gives nothing back");
    cowdisk::remove(&pool, "bulk", false).expect("what took the space");
    pool.flush().expect("there is space for an image");
    assert!(pool.superblock().image.is_some());
    let pool = opened(&Arc::new(storage.crash_all_lost()));
    for gone in ["f0", "bulk"] {
        Disk::open(&pool, gone).expect_err("it was removed");
    }
    let f = Disk::open(&pool, "f1").expect("there");
    f.write_at(&bytes(3, CLUSTER / 2), 0).expect("writes");
    assert_eq!(read(&f, CLUSTER - 512, 512), bytes(1, 512));
    pool.close().expect("closes");
}

#[test]
fn several_removals_and_power_cuts_are_no_obstacle() {
    for phase in PHASES {
        let (mut storage, _) = stuck(phase);
        for n in 0..5 {
            storage = Arc::new(storage.crash_all_lost());
            let pool = opened(&storage);
            cowdisk::remove(&pool, &format!("f{n}"), false).expect("removes");
        }
        let pool = opened(&storage);
        cowdisk::remove(&pool, "bulk", true).expect("removes");
        pool.flush().expect("there is space for an image");
    }
}

/// What needs no record needs no space: a guest's overwrites, and to close.
#[test]
fn overwrites_in_a_full_pool_are_flushed_and_it_closes() {
    let (storage, pool) = stuck(0);
    drop(pool);
    let storage = Arc::new(storage.crash_all_lost());
    let pool = opened(&storage);
    let bulk = Disk::open(&pool, "bulk").expect("there");
    for value in 3..6 {
        bulk.write_at(&bytes(value, CLUSTER), 0).expect("in place");
        bulk.flush().expect("flushes");
        let later = opened(&Arc::new(storage.crash_all_lost()));
        let bulk = Disk::open(&later, "bulk").expect("there");
        assert_eq!(read(&bulk, 0, 512), bytes(value, 512));
    }
    drop(bulk);
    cowdisk::remove(&pool, "f0", false).expect("removes");
    pool.close().expect("closes");
    drop(pool);
    let pool = opened(&storage);
    Disk::open(&pool, "f0").expect_err("it was removed");
}

#[test]
fn a_full_pool_can_be_enlarged() {
    let (storage, pool) = stuck(0);
    pool.resize(2 * POOL_LEN).expect("grows");
    pool.flush().expect("there is space for an image");
    let d = Disk::open(&pool, "d").expect("there");
    d.write_at(&bytes(3, CLUSTER / 2), 0).expect("writes");
    d.flush().expect("flushes");
    let pool = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&pool, "d").expect("there");
    assert_eq!(read(&d, 0, 512), bytes(3, 512));
    assert_eq!(pool.superblock().pool_len(), 2 * POOL_LEN);
}
