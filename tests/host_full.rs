//! Goal: a host that runs out of space harms nothing: writes fail with an error that says so,
//! what was flushed stays, reads, overwrites and discards go on, and once there is space so do
//! writes.
//!
//! Method: a pool that may grow to 64 MiB on a tmpfs of 24 MiB, mounted for the test.

#[path = "common/small.rs"]
mod small;

use small::Small;
use std::path::Path;
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, DiskError, DiskErrorKind, NewDisk};
use tidepool::pool::check::check;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Access, FileStorage};

const MIB: u64 = 1 << 20;

fn open_pool(path: &Path) -> Arc<Pool> {
    let file = FileStorage::open(path, Access::ReadWrite).expect("opens");
    Pool::open(Arc::new(file), &OpenOptions::default()).expect("a pool")
}

#[test]
fn a_full_host_is_an_error_and_nothing_worse() {
    let Some(small) = Small::mount("a_full_host_is_an_error_and_nothing_worse") else {
        return;
    };
    let path = small.path().join("full.pool");
    let file = FileStorage::create_new(&path, 64 * MIB).expect("a sparse file fits");
    open::create(&file, &CreateOptions::new(64 * MIB)).expect("an empty pool");
    drop(file);
    let pool = open_pool(&path);
    cowdisk::create(&pool, &NewDisk::empty("a", 48 * MIB)).expect("creates");
    let disk = Disk::open(&pool, "a").expect("opens");
    disk.write_at(&vec![1; 4 << 20], 0).expect("fits");
    disk.flush().expect("flushes");
    let mut at = 4 * MIB;
    let e = loop {
        if let Err(e) = disk.write_at(&vec![2; 1 << 20], at) {
            break e;
        }
        at += MIB;
        assert!(at < 48 * MIB, "the host has 24 MiB");
    };
    assert_eq!(e.kind(), DiskErrorKind::NoSpace, "{e}");
    assert!(matches!(e, DiskError::HostFull), "the pool has space: {e}");
    assert!(e.to_string().contains("on the host"), "{e}");

    let mut bytes = vec![0; 4 << 20];
    disk.read_at(&mut bytes, 0).expect("reads go on");
    assert!(bytes.iter().all(|byte| *byte == 1));
    disk.write_at(&[3; 4096], 0).expect("overwrites go on");
    disk.flush().expect("what is there can be flushed");
    disk.discard(4 * MIB, 8 * MIB).expect("discards go on");
    pool.trim().expect("and give space to the host");
    disk.write_at(&vec![4; 2 << 20], 20 * MIB)
        .expect("so that writes go on too");
    disk.flush().expect("flushes");
    drop(disk);
    pool.close().expect("closes");
    drop(pool);

    let report = check(&FileStorage::open(&path, Access::ReadOnly).expect("opens")).expect("reads");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    let disk = Disk::open(&open_pool(&path), "a").expect("opens");
    disk.read_at(&mut bytes[..8192], 0).expect("reads");
    assert!(bytes[..4096].iter().all(|byte| *byte == 3) && bytes[4096] == 1);
    disk.read_at(&mut bytes[..2 << 20], 20 * MIB)
        .expect("reads");
    assert!(bytes[..2 << 20].iter().all(|byte| *byte == 4));
}
