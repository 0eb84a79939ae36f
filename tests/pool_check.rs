//! Goal: `check` names what is wrong with a pool and changes nothing; `repair` mends what can be
//! rebuilt and keeps everything else; `resize` and `dump` tell the truth.
//!
//! Method: small pools on the simulated disk, damaged at chosen bytes.

use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::check::check;
use tidepool::pool::dump::dump;
use tidepool::pool::repair::repair;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{SimStorage, Storage};

const POOL_LEN: u64 = 32 << 20;

fn new_store() -> Arc<dyn Storage> {
    let storage = Arc::new(SimStorage::new(POOL_LEN));
    open::create(&*storage, &CreateOptions::new(POOL_LEN)).expect("an empty pool");
    storage
}

fn open_pool(storage: &Arc<dyn Storage>) -> Arc<Pool> {
    Pool::open(Arc::clone(storage), &OpenOptions::default()).expect("opens")
}

/// A pool with a disk of `n` flushed writes, each its own batch; not closed.
fn with_batches(storage: &Arc<dyn Storage>, n: u64) {
    let pool = open_pool(storage);
    cowdisk::create(&pool, &NewDisk::empty("a", 8 << 20)).expect("creates");
    let disk = Disk::open(&pool, "a").expect("opens");
    for at in 0..n {
        disk.write_at(&[7; 4096], at * 65536).expect("writes");
        disk.flush().expect("flushes");
    }
}

fn flip(storage: &Arc<dyn Storage>, at: u64) {
    let mut byte = [0];
    storage.read_at(&mut byte, at).expect("reads");
    storage.write_at(&[byte[0] ^ 1], at).expect("writes");
}

fn faults(storage: &Arc<dyn Storage>) -> Vec<String> {
    let report = check(&**storage).expect("the store works");
    report.faults.into_iter().map(|fault| fault.what).collect()
}

#[test]
fn a_pool_that_is_well_has_no_faults() {
    let storage = new_store();
    assert_eq!(faults(&storage), [""; 0]);
    with_batches(&storage, 5);
    let report = check(&*storage).expect("the store works");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert!(!report.is_clean, "nobody closed it");
    assert_eq!((report.disks, report.used_clusters), (1, 5));
    open_pool(&storage).close().expect("closes");
    assert!(check(&*storage).expect("the store works").is_clean);
}

#[test]
fn one_bad_superblock_copy_is_named_and_mended() {
    for at in [0, 1 << 20] {
        let storage = new_store();
        with_batches(&storage, 3);
        flip(&storage, at + 100);
        assert!(faults(&storage)[0].contains(&format!("copy at byte {at}")));
        repair(&storage).expect("mends");
        assert_eq!(faults(&storage), [""; 0]);
        let disk = Disk::open(&open_pool(&storage), "a").expect("opens");
        let mut block = [0; 4096];
        disk.read_at(&mut block, 2 * 65536).expect("reads");
        assert_eq!(block, [7; 4096]);
    }
}

#[test]
fn two_bad_superblock_copies_cannot_be_mended() {
    let storage = new_store();
    flip(&storage, 100);
    flip(&storage, (1 << 20) + 100);
    assert_eq!(faults(&storage).len(), 1);
    repair(&storage).expect_err("nothing says where anything is");
}

#[test]
fn a_batch_that_cannot_be_read_between_others_is_refused_then_cut_off() {
    let storage = new_store();
    with_batches(&storage, 6);
    // Batches are 4 KiB each: create, then six writes. The fourth write goes.
    flip(&storage, (2 << 20) + 4 * 4096 + 200);
    let e = Pool::open(Arc::clone(&storage), &OpenOptions::default()).expect_err("damaged");
    assert!(e.to_string().contains("batch 5 cannot be read"), "{e}");
    assert!(faults(&storage)[0].contains("batch 5 cannot be read"));
    repair(&storage).expect("mends");
    assert_eq!(faults(&storage), [""; 0]);
    let disk = Disk::open(&open_pool(&storage), "a").expect("opens");
    for (at, byte) in [(0, 7), (1, 7), (2, 7), (3, 0), (5, 0)] {
        let mut block = [1; 4096];
        disk.read_at(&mut block, at * 65536).expect("reads");
        assert_eq!(block, [byte; 4096], "cluster {at}");
    }
}

#[test]
fn a_torn_last_batch_is_not_a_fault() {
    let storage = new_store();
    with_batches(&storage, 3);
    flip(&storage, (2 << 20) + 3 * 4096 + 200);
    assert_eq!(
        faults(&storage),
        [""; 0],
        "a crash leaves this; nothing after it is lost"
    );
}

#[test]
fn a_pool_grows_and_shrinks_as_far_as_its_data_lets_it() {
    let storage = new_store();
    let pool = open_pool(&storage);
    let free = pool.space.usage().clean;
    pool.resize(2 * POOL_LEN).expect("grows");
    assert_eq!(pool.space.usage().clean, free + 512);
    cowdisk::create(&pool, &NewDisk::empty("a", 60 << 20)).expect("creates");
    let disk = Disk::open(&pool, "a").expect("opens");
    disk.write_at(&vec![3; 40 << 20], 0)
        .expect("more than the pool held before");
    drop(disk);
    let e = pool.resize(POOL_LEN).expect_err("data is in the way");
    assert!(e.to_string().contains("bytes or more"), "{e}");
    cowdisk::remove(&pool, "a", false).expect("removes");
    pool.resize(POOL_LEN).expect("shrinks");
    assert_eq!(storage.len().expect("a length"), POOL_LEN);
    pool.close().expect("closes");
    let pool = open_pool(&storage);
    assert_eq!(pool.superblock().pool_len(), POOL_LEN);
    pool.resize(1 << 20)
        .expect_err("too small for its own metadata");
}

#[test]
fn a_dump_has_every_mapping() {
    let storage = new_store();
    with_batches(&storage, 4);
    let mut lines = Vec::new();
    dump(&*storage, &mut |line| lines.push(line.clone())).expect("dumps");
    let of = |kind: &str| {
        lines
            .iter()
            .filter(|line| line["kind"] == kind)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("superblock").len(), 2);
    assert_eq!(of("disk")[0]["row"]["name"], "a");
    let mapped: u64 = of("map")
        .iter()
        .map(|line| line["count"].as_u64().expect("a count"))
        .sum();
    assert_eq!(mapped, 4);
    assert_eq!(of("end").len(), 1);
}
