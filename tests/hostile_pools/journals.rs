//! Journals that were damaged where they are longer than those of the smallest pools: what replay
//! and repair then make of them, and what a restore leaves of older ones.

use super::common::{CLUSTER, POOL_LEN, SUB, bytes, disk, empty, opened, read, try_open};
use super::planted::{append, batches, copy, row, superblock};
use super::repair::goes_on;
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk};
use tidepool::format::journal::Record;
use tidepool::format::units::Lcn;
use tidepool::pool::PoolError;
use tidepool::pool::check::{Fault, check};
use tidepool::pool::dump::dump;
use tidepool::pool::repair::repair;
use tidepool::pool::restore::{Dump, Restored, Unknown};
use tidepool::storage::{SimStorage, Storage};

/// Bytes of a pool whose journal has halves of 2 MiB.
const LARGE: u64 = 1 << 30;

fn faults(storage: &Arc<SimStorage>) -> Vec<Fault> {
    check(&**storage).expect("the store works").faults
}

fn mend(storage: &Arc<SimStorage>) {
    repair(&(Arc::clone(storage) as Arc<dyn Storage>)).expect("mends");
    assert_eq!(faults(storage), []);
}

fn value(n: u64) -> u8 {
    1 + u8::try_from(n % 200).expect("small")
}

/// The image ends in the middle of a half, and the journal goes on in the other: replay skips what
/// the image has and follows.
#[test]
fn a_covered_batch_is_no_loss_where_the_journal_goes_on() {
    for extra in [1_u64, 2, 5] {
        let storage = empty(LARGE);
        let pool = opened(&storage);
        let a = disk(&pool, "a", 600 * CLUSTER);
        let (mut count, mut in_other) = (0_u64, 0);
        while in_other < extra {
            let block = bytes(value(count), SUB);
            a.write_at(&block, count * SUB).expect("writes");
            a.flush().expect("flushes");
            count += 1;
            let mut header = vec![0; 4096];
            let at = (4 << 20) + in_other * 4096;
            storage.read_at(&mut header, at).expect("reads");
            in_other += u64::from(header.starts_with(b"TPJB"));
        }
        let bad = Arc::new(storage.crash_all_lost());
        assert!(superblock(&bad).image.is_some_and(|image| image.seq > 10));
        bad.write_durable_at(&[0; 4096], (2 << 20) + 4 * 4096)
            .expect("writes");
        let found = faults(&bad);
        assert!(found.len() == 1 && found[0].lost.is_empty(), "{found:?}");
        mend(&bad);
        let pool = opened(&bad);
        let a = Disk::open(&pool, "a").expect("there");
        for n in 0..count {
            assert_eq!(
                read(&a, n * SUB, SUB),
                bytes(value(n), SUB),
                "write {n} of {count}"
            );
        }
        drop((a, pool));
        goes_on(&bad, "a covered batch");
    }
}

/// Batches of an earlier life of the same restored pool are not those that follow the restore.
#[test]
fn a_second_restore_is_not_continued_by_the_first() {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    let a = disk(&pool, "a", 64 * CLUSTER);
    a.write_at(&bytes(1, SUB), 0).expect("writes");
    a.flush().expect("flushes");
    drop(a);
    pool.close().expect("closes");
    drop(pool);
    let mut lines = Vec::new();
    dump(&*storage, &mut |line| lines.push(line.to_string())).expect("dumps");
    let restore = |storage: &Arc<SimStorage>| -> Result<Restored, PoolError> {
        let mut dump = Dump::default();
        lines.iter().try_for_each(|line| dump.line(line))?;
        dump.restore(&(Arc::clone(storage) as Arc<dyn Storage>), Unknown::Refused)
    };
    restore(&storage).expect("restores");
    let pool = opened(&storage);
    let a = Disk::open(&pool, "a").expect("there");
    a.write_at(&bytes(77, SUB), 5 * SUB).expect("writes");
    a.flush().expect("flushes");
    drop((a, pool));
    let life = Arc::new(storage.crash_all_lost());
    let generation = superblock(&life).generation;
    for cut in 0.. {
        let again = copy(&life);
        again.cut_power_at(cut);
        let is_done = restore(&again).is_ok();
        let after = Arc::new(again.crash_all_lost());
        let is_restored = superblock(&after).generation > generation;
        // Until it is restored the old pool may be gone already; another restore does it.
        if !is_restored {
            restore(&after).expect("restores");
        }
        let pool = opened(&after);
        let a = Disk::open(&pool, "a").expect("there");
        assert_eq!(read(&a, 5 * SUB, SUB), bytes(0, SUB), "cut {cut}");
        if is_done {
            assert!(cut > 5, "only {cut} steps");
            break;
        }
    }
}

/// A disk whose removal is lost comes back. Those of its clusters that others have since read as
/// zeros, and it is named.
#[test]
fn a_disk_that_comes_back_shows_nothing_of_others() {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    let a = disk(&pool, "a", 900 * CLUSTER);
    let z = disk(&pool, "z", 900 * CLUSTER);
    z.write_at(&bytes(9, 400 * CLUSTER), 0).expect("writes");
    z.flush().expect("flushes");
    drop(z);
    a.write_at(&bytes(1, SUB), 0).expect("writes");
    a.flush().expect("flushes");
    let (victim, ..) = *batches(&storage).last().expect("some");
    cowdisk::remove(&pool, "z", false).expect("removes");
    pool.take_back_slabs();
    while pool.reap(usize::MAX) {}
    a.write_at(&bytes(7, 700 * CLUSTER), CLUSTER)
        .expect("writes");
    a.flush().expect("flushes");
    let bad = Arc::new(storage.crash_all_lost());
    bad.write_durable_at(&[0; 4096], victim).expect("writes");
    let found = faults(&bad);
    let named = |name: &str| {
        let lost = found.iter().flat_map(|fault| &fault.lost);
        lost.filter(|lost| lost.disk == name)
            .map(|lost| lost.len)
            .max()
    };
    assert_eq!(named("z"), Some(900 * CLUSTER), "{found:?}");
    assert!(named("a").is_some(), "{found:?}");
    mend(&bad);
    let pool = opened(&bad);
    let z = Disk::open(&pool, "z").expect("it is back");
    let seen = read(&z, 0, 400 * CLUSTER);
    assert!(seen.iter().all(|byte| [0, 9].contains(byte)), "foreign");
}

/// The longest batches, of renames by earlier releases, are longer than any that flushes write.
#[test]
fn a_long_batch_that_cannot_be_read_hides_nothing() {
    let storage = empty(LARGE);
    let pool = opened(&storage);
    drop(disk(&pool, "a", 600 * CLUSTER));
    drop(pool);
    let unmap = |n: u32| Record::Unmap {
        disk: row(&storage, "a").id,
        first: Lcn(100 + n % 500),
        count: 1,
        is_zeroed: false,
    };
    let records: Vec<Record> = (0..20_000).map(unmap).collect();
    append(&storage, &records);
    let pool = opened(&storage);
    let a = Disk::open(&pool, "a").expect("there");
    for n in 0..20 {
        a.write_at(&bytes(value(n), SUB), n * SUB).expect("writes");
        a.flush().expect("flushes");
    }
    let bad = Arc::new(storage.crash_all_lost());
    let all = batches(&bad);
    let (at, len, ..) = *all.iter().max_by_key(|(_, len, ..)| *len).expect("some");
    assert!(len > 2 * (256 << 10) + 8192, "{len} bytes");
    bad.write_durable_at(&[0; 4096], at).expect("writes");
    let refused = try_open(&bad).expect_err("batches follow it");
    assert!(refused.to_string().contains("cannot be read"), "{refused}");
    let found = faults(&bad);
    assert!(
        found.iter().any(|fault| !fault.lost.is_empty()),
        "{found:?}"
    );
}

/// What is lost of a full journal is told in little time.
#[test]
fn many_records_that_are_lost_are_told_soon() {
    let storage = empty(LARGE);
    let pool = opened(&storage);
    let bulk = disk(&pool, "bulk", 20_000 * 64 * CLUSTER);
    bulk.flush().expect("flushes");
    for round in 0..5_u64 {
        for n in 0..8000 {
            let at = (2 * n + round % 2) * 64 * CLUSTER;
            bulk.discard(at, 64 * CLUSTER).expect("discards");
        }
        bulk.flush().expect("flushes");
    }
    let bad = Arc::new(storage.crash_all_lost());
    let (victim, ..) = batches(&bad)[0];
    bad.write_durable_at(&[0; 4096], victim).expect("writes");
    let began = tidepool::sys::clock::now();
    assert!(!faults(&bad).is_empty());
    let took = began.elapsed();
    assert!(
        took.as_secs() < 10,
        "{took:?}; 34 s were seen, and most of that by the square"
    );
}

/// A bit of the last batch of a pool that was closed, or only opened since, was taken for a batch that
/// a crash had cut off: the disk was gone, and nothing at fault.
#[test]
fn the_last_batch_of_a_closed_pool_is_missed() {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    drop(disk(&pool, "a", CLUSTER));
    let precious = disk(&pool, "precious", 3 * CLUSTER);
    precious
        .write_at(&bytes(5, CLUSTER), CLUSTER)
        .expect("writes");
    drop(precious);
    pool.close().expect("closes");
    drop(pool);
    let (last, ..) = *batches(&storage).last().expect("some");
    let is_opened_again = |store: &Arc<SimStorage>| drop(opened(store));
    for (what, then) in [
        ("closed", None),
        (
            "opened",
            Some(&is_opened_again as &dyn Fn(&Arc<SimStorage>)),
        ),
    ] {
        let bad = copy(&storage);
        then.inspect(|then| then(&bad));
        let mut block = vec![0; 4096];
        bad.read_at(&mut block, last).expect("reads");
        // The cluster of the pool in its record.
        block[64 + 16] ^= 1;
        bad.write_durable_at(&block, last).expect("writes");
        let refused = try_open(&bad).map(|_| ()).expect_err(what);
        assert!(refused.to_string().contains("cannot be read"), "{refused}");
        let found = faults(&bad);
        assert!(found.len() == 1 && found[0].may_miss, "{what}: {found:?}");
        let remarks = check(&*bad).expect("reads").remarks;
        let about = format!("`precious`, bytes {CLUSTER} to {}", 2 * CLUSTER - 1);
        assert!(
            remarks.iter().any(|line| line.contains(&about)),
            "{remarks:?}"
        );
        mend(&bad);
        goes_on(&bad, what);
    }
}

/// What follows a batch that cannot be read is said under the names that disks have since.
#[test]
fn what_is_lost_has_the_name_of_today() {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    for name in ["a", "b", "x"] {
        drop(disk(&pool, name, CLUSTER));
    }
    cowdisk::rename(&pool, "x", "production-db").expect("renames");
    cowdisk::rename(&pool, "a", "old").expect("renames");
    pool.close().expect("closes");
    drop(pool);
    let (second, ..) = batches(&storage)[1];
    storage
        .write_durable_at(&[0; 4096], second)
        .expect("writes");
    let report = check(&*storage).expect("reads");
    let [fault] = &report.faults[..] else {
        panic!("{:?}", report.faults)
    };
    let names: Vec<&str> = fault.lost.iter().map(|lost| &*lost.disk).collect();
    assert_eq!(names, ["production-db"]);
    assert!(fault.may_miss, "the batch of `b` cannot be read");
    let said = |what: &str| report.remarks.iter().any(|line| line.contains(what));
    assert!(said("`old` goes back"), "{:?}", report.remarks);
}
