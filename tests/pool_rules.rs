//! Goal: every invariant and ordering rule of the pool (`src/pool/mod.rs`) has a test that fails
//! when the rule is broken.
//!
//! Method: a simulated disk and the sans-I/O face: a request that is planned but not completed is
//! I/O in flight, so that every interleaving is spelled out. Each rule was broken once on purpose;
//! the table says how, and which tests noticed.
//!
//! | rule | broken on purpose | tests that failed |
//! |---|---|---|
//! | I1 | an entry may refer to a cluster that another refers to | i1 |
//! | I2, R1 | `alloc` set when the write is planned | i2_r1 |
//! | I3 | no merge: the old cluster goes under as it is | i3 |
//! | I4 | a fork does not end what the source may write in place | i4, i6, r7 |
//! | I4 | the count is not asked before a cluster is claimed | i4, i5, i6, r5, r7 |
//! | I5 | a cluster is freed with one reference left | i5, i6 |
//! | I6 | a fork is recorded before the disk it makes | i4, i6, r5 |
//! | R2 | no data flush before the journal is written | i4, r10, r2, r3, r8 |
//! | R2 | the journal is written before the data is flushed | r2 |
//! | R3, R5 | a dropped reference is released at once | r3, r5, r6 |
//! | R4 | a cluster is free while it is punched | r4 |
//! | R6 | dropped references do not wait for epochs | r6 |
//! | R7 | a fork does not drain its source | r7 |
//! | R7 | a fork leaves out what its source has not committed | r7_full_batch |
//! | R8 | a commit without records flushes nothing | r8 |
//! | R9 | the checksum of the batch before is not compared | r9 |
//! | R9 | the opening is not compared | r9 |
//! | R9 | a batch after a gap is taken for an old one | r9_gap |
//! | R9 | whoever leads leaves the journal to others meanwhile | r9_one |
//! | R10 | a failed flush does not freeze the pool | r10 |
//! | R10 | a failed journal write does not freeze the pool | r10 |
//! | R11 | the last batch is not written again, or opening does not flush | `engine_faults`: `*_killed_process_*` |
//!
//! (`i4` stands for the test whose name begins with it, and so on.)

mod common;

use common::{CLUSTER, POOL_LEN, SUB, begin_write, bytes, disk, empty, enter, fresh, opened, read};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use tidepool::cowdisk::{self, Disk, Source, Step, WritePlan};
use tidepool::format::journal::{BatchWriter, Entry, Record, Stamp, decode_header};
use tidepool::format::superblock::JOURNAL_AT;
use tidepool::format::units::{DiskId, Lcn};
use tidepool::pool::space::Purpose;
use tidepool::pool::{OpenOptions, Pool, check};
use tidepool::storage::sim::Op;
use tidepool::storage::{SimStorage, Storage, Tier};
use tidepool::sync::{Mutex, spawn_named};

/// Byte of the pool's file that sub-cluster 0 of cluster 0 of `disk` is read from.
fn place(disk: &Disk, at: u64) -> Option<u64> {
    match disk.segments(at, 512).expect("in range")[0].source {
        Source::Pool(at) => Some(at),
        Source::Zero | Source::Base(_) => None,
    }
}

/// Fills all space there is with `value` without ever committing: writes are planned, moved and
/// completed, and nobody asks for a flush.
fn fill_all(disk: &Disk, value: u8) -> u64 {
    let data = bytes(value, CLUSTER);
    let mut at = 0;
    loop {
        let pass = enter(disk);
        let mut plan = WritePlan::default();
        let len = u32::try_from(CLUSTER).expect("small");
        let step = disk.plan_write(&pass, at, len, &mut plan, Waker::noop());
        match step.expect("legal") {
            Step::Ready => {}
            Step::Full => return at,
            Step::Done | Step::Copy(_) | Step::Busy => panic!("whole clusters"),
        }
        common::move_bytes(disk, &plan, &data);
        disk.complete_write(&mut plan, true);
        at += CLUSTER;
    }
}

/// The batches in the first half of the journal: offset, length, stamp and checksum of each.
fn batches(storage: &SimStorage) -> Vec<(u64, u64, Stamp, u32)> {
    let mut found = Vec::new();
    let mut at = JOURNAL_AT;
    loop {
        let mut block = vec![0; 4096];
        storage.read_at(&mut block, at).expect("reads");
        let Ok(header) = decode_header(&block) else {
            return found;
        };
        found.push((at, header.len, header.stamp, header.crc));
        at += header.len;
    }
}

/// Appends a batch with `records` to the journal, as of the last opening plus `epochs`.
fn append(storage: &SimStorage, records: &[Record], epochs: u32) {
    let (at, len, stamp, crc) = *batches(storage).last().expect("some batch");
    let mut batch = BatchWriter::default();
    for record in records {
        batch.push(record).expect("short");
    }
    let open_epoch = stamp.open_epoch + epochs;
    let stamp = Stamp {
        seq: stamp.seq + 1,
        prev_crc: crc,
        open_epoch,
        ..stamp
    };
    let (bytes, _) = batch.seal(stamp);
    storage.write_durable_at(&bytes, at + len).expect("writes");
}

#[test]
fn i1_a_cluster_referred_to_from_two_places_is_noticed() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 8 * CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    let own = u32::try_from(place(&d, 0).expect("data") / CLUSTER).expect("small");
    let entry = Entry {
        own,
        alloc: 1,
        birth: 1,
        ..Entry::default()
    };
    append(
        &storage,
        &[Record::Map {
            disk: DiskId(1),
            lcn: Lcn(5),
            entry,
        }],
        0,
    );
    let e = common::try_open(&storage).expect_err("two places");
    assert!(e.to_string().contains("used elsewhere"), "{e}");
}

#[test]
fn i2_r1_a_write_in_flight_shows_nothing_of_what_the_cluster_held() {
    let (storage, pool) = fresh();
    let old = disk(&pool, "old", 64 << 20);
    fill_all(&old, 0x11);
    drop(old);
    cowdisk::remove(&pool, "old", false).expect("removes");
    let d = disk(&pool, "d", CLUSTER);
    let (pass, mut plan) = begin_write(&d, 0, &bytes(0x22, CLUSTER));
    d.flush().expect("flushes");
    assert_eq!(read(&d, 0, CLUSTER), bytes(0, CLUSTER), "live");
    for crashed in [storage.crash_all_kept(), storage.crash_all_lost()] {
        let pool = opened(&Arc::new(crashed));
        let d = Disk::open(&pool, "d").expect("there");
        assert_eq!(read(&d, 0, CLUSTER), bytes(0, CLUSTER), "after a crash");
    }
    d.complete_write(&mut plan, false);
    drop(pass);
    assert_eq!(read(&d, 0, CLUSTER), bytes(0, CLUSTER), "after it failed");
}

#[test]
fn i3_no_read_looks_further_than_two_clusters_down() {
    let (_storage, pool) = fresh();
    let mut d = disk(&pool, "d0", CLUSTER);
    let mut expected = bytes(0, CLUSTER);
    for n in 1..=40_u64 {
        let value = u8::try_from(n).expect("small");
        let at = (n * 7 % 16) * SUB;
        d.write_at(&bytes(value, SUB), at).expect("writes");
        let from = usize::try_from(at).expect("small");
        expected[from..][..usize::try_from(SUB).expect("small")].fill(value);
        assert_eq!(read(&d, 0, CLUSTER), expected, "generation {n}");
        let segments = d
            .segments(0, u32::try_from(CLUSTER).expect("small"))
            .expect("in range");
        let clusters = segments.iter().filter_map(|segment| match segment.source {
            Source::Pool(at) => Some(at / CLUSTER),
            Source::Zero | Source::Base(_) => None,
        });
        let clusters: std::collections::BTreeSet<u64> = clusters.collect();
        assert!(
            clusters.len() <= 2,
            "generation {n} reads from {clusters:?}"
        );
        let name = format!("d{n}");
        cowdisk::fork(&pool, &d.name(), std::slice::from_ref(&name)).expect("forks");
        d = Disk::open(&pool, &name).expect("there");
    }
}

#[test]
fn i4_what_is_shared_is_not_written_in_place_and_what_is_alone_again_is() {
    let (storage, pool) = fresh();
    let parent = disk(&pool, "p", CLUSTER);
    parent.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    cowdisk::fork(&pool, "p", &["c".to_owned()]).expect("forks");
    let child = Disk::open(&pool, "c").expect("there");
    parent.write_at(&bytes(2, SUB), 0).expect("writes");
    assert_eq!(read(&child, 0, CLUSTER), bytes(1, CLUSTER));
    child.write_at(&bytes(3, SUB), SUB).expect("writes");
    assert_eq!(read(&parent, SUB, SUB), bytes(1, SUB));
    parent.flush().expect("flushes");
    let again = opened(&Arc::new(storage.crash_all_lost()));
    let reopened = Disk::open(&again, "p").expect("there");
    reopened.write_at(&bytes(4, CLUSTER), 0).expect("writes");
    let other = Disk::open(&again, "c").expect("there");
    assert_eq!(
        read(&other, 2 * SUB, SUB),
        bytes(1, SUB),
        "after reopening too"
    );
    drop(child);
    cowdisk::remove(&pool, "c", false).expect("removes");
    parent.write_at(&bytes(5, CLUSTER), 0).expect("writes");
    let before = place(&parent, 0);
    parent.write_at(&bytes(6, CLUSTER), 0).expect("writes");
    assert_eq!(place(&parent, 0), before, "nobody else has it");
}

#[test]
fn i5_nothing_that_is_referred_to_is_ever_free() {
    let (_storage, pool) = fresh();
    let parent = disk(&pool, "p", 64 * CLUSTER);
    for n in 0..64_u8 {
        parent
            .write_at(&bytes(n, CLUSTER), u64::from(n) * CLUSTER)
            .expect("writes");
    }
    for n in 0..8 {
        let name = format!("c{n}");
        cowdisk::fork(&pool, "p", std::slice::from_ref(&name)).expect("forks");
        let child = Disk::open(&pool, &name).expect("there");
        child
            .write_at(&bytes(0xcc, SUB), n * 5 * CLUSTER)
            .expect("writes");
        parent
            .write_at(&bytes(0xdd, SUB), 63 * CLUSTER)
            .expect("writes");
        drop(child);
        cowdisk::remove(&pool, &name, false).expect("removes");
    }
    let other = disk(&pool, "o", 64 << 20);
    fill_all(&other, 0xee);
    for n in 0..63_u8 {
        assert_eq!(
            read(&parent, u64::from(n) * CLUSTER, CLUSTER),
            bytes(n, CLUSTER)
        );
    }
}

#[test]
fn i6_every_prefix_of_the_journal_is_a_legal_state() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 64 * CLUSTER);
    for n in 0..6_u8 {
        d.write_at(&bytes(n, 2 * CLUSTER), u64::from(n) * CLUSTER)
            .expect("writes");
        cowdisk::fork(&pool, "d", &[format!("c{n}")]).expect("forks");
        d.discard(0, CLUSTER * u64::from(n)).expect("discards");
        if n > 2 {
            cowdisk::remove(&pool, &format!("c{}", n - 2), false).expect("removes");
        }
        d.flush().expect("flushes");
    }
    // The clusters of those removed went to others since: their data is not in a prefix's past.
    let last_ones = pool.items();
    let all = batches(&storage);
    assert!(all.len() > 10, "{} batches", all.len());
    let (last, len, ..) = *all.last().expect("some");
    for (n, (at, ..)) in all.iter().enumerate() {
        let copy = Arc::new(storage.crash_all_kept());
        let rest = usize::try_from(last + len - at).expect("small");
        copy.write_durable_at(&vec![0; rest], *at).expect("writes");
        let report = check::check(&*copy).expect("reads");
        assert!(
            report.faults.is_empty(),
            "first {n} batches: {:?}",
            report.faults
        );
        let pool = opened(&copy);
        let is_child = |name: &str| name.starts_with('c');
        for item in last_ones.iter().filter(|item| is_child(&item.row.name)) {
            if pool.find(&item.row.name).is_err() {
                continue;
            }
            let child = Disk::open(&pool, &item.row.name).expect("there");
            let value: u8 = item.row.name[1..].parse().expect("a number");
            let at = u64::from(value) * CLUSTER;
            let is_right = read(&child, at, 2 * CLUSTER) == bytes(value, 2 * CLUSTER);
            assert!(is_right, "{}: first {n} batches", item.row.name);
        }
    }
}

#[test]
fn r2_what_a_record_names_is_durable_before_it() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    d.write_at(&bytes(7, 2 * CLUSTER), 0).expect("writes");
    let before = storage.counters();
    storage.cut_power_at(0);
    d.flush().expect_err("cut in the first thing it does");
    let after = storage.counters();
    assert_eq!(after.flushes, before.flushes + 1, "the data comes first");
    assert_eq!(
        after.durable_writes, before.durable_writes,
        "and the journal later"
    );
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    d.write_at(&bytes(7, 2 * CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    drop(pool);
    let pool = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&pool, "d").expect("there");
    assert_eq!(read(&d, 0, 2 * CLUSTER), bytes(7, 2 * CLUSTER));
}

#[test]
fn r3_what_was_freed_is_not_used_again_before_that_is_durable() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 8 * CLUSTER);
    let other = disk(&pool, "o", 64 << 20);
    d.write_at(&bytes(1, 8 * CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    d.discard(0, 8 * CLUSTER).expect("discards");
    fill_all(&other, 2);
    assert!(
        pool.punch_written(u32::MAX).is_ok(),
        "nothing of it is there to be punched"
    );
    for crashed in [storage.crash_all_kept(), storage.crash_all_lost()] {
        let pool = opened(&Arc::new(crashed));
        let d = Disk::open(&pool, "d").expect("there");
        assert_eq!(
            read(&d, 0, 8 * CLUSTER),
            bytes(1, 8 * CLUSTER),
            "nobody flushed the discard"
        );
    }
}

#[test]
fn r5_a_dropped_reference_counts_until_the_drop_is_durable() {
    let (storage, pool) = fresh();
    let parent = disk(&pool, "p", CLUSTER);
    parent.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    cowdisk::fork(&pool, "p", &["c".to_owned()]).expect("forks");
    let child = Disk::open(&pool, "c").expect("there");
    parent.flush().expect("flushes");
    parent.discard(0, CLUSTER).expect("discards");
    child.write_at(&bytes(2, SUB), 0).expect("writes");
    let pool = opened(&Arc::new(storage.crash_all_kept()));
    let parent = Disk::open(&pool, "p").expect("there");
    assert_eq!(
        read(&parent, 0, CLUSTER),
        bytes(1, CLUSTER),
        "the child wrote in its own place"
    );
}

#[test]
fn r6_a_freed_cluster_waits_for_the_requests_that_may_use_it() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    let other = disk(&pool, "o", 64 << 20);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    let reader = enter(&d);
    let mut segments = Vec::new();
    let len = u32::try_from(CLUSTER).expect("small");
    d.plan_read(&reader, 0, len, &mut segments)
        .expect("in range");
    let Source::Pool(at) = segments[0].source else {
        panic!("data")
    };
    d.discard(0, CLUSTER).expect("discards");
    for _ in 0..4 {
        d.flush().expect("flushes");
        pool.reap(usize::MAX);
    }
    let end = fill_all(&other, 2);
    let mut found = bytes(0, CLUSTER);
    storage.read_at(&mut found, at).expect("reads");
    assert_eq!(
        found,
        bytes(1, CLUSTER),
        "the read in flight still finds its data"
    );
    drop(reader);
    d.flush().expect("flushes");
    pool.reap(usize::MAX);
    assert!(
        !pool.space.is_waited_for() || pool.is_reaped(),
        "{end} bytes were written"
    );
    assert!(pool.is_reaped(), "the last request is over");
}

/// Waits until the disk lets nobody in, or `is_over`.
fn drained_or(disk: &Disk, is_over: impl Fn() -> bool) {
    while disk.enter(1, Waker::noop()).is_some() && !is_over() {
        std::thread::yield_now();
    }
}

#[test]
fn r7_a_fork_waits_for_writes_in_flight() {
    let (_storage, pool) = fresh();
    let parent = disk(&pool, "p", CLUSTER);
    parent.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    let new = bytes(2, CLUSTER);
    let (pass, mut plan) = begin_write(&parent, 0, &new);
    let forker = {
        let pool = Arc::clone(&pool);
        spawn_named("forker", move || {
            cowdisk::fork(&pool, "p", &["c".to_owned()])
        })
    };
    let forker = forker.expect("a thread");
    drained_or(&parent, || forker.is_finished());
    assert!(!forker.is_finished(), "a write in place is in flight");
    common::move_bytes(&parent, &plan, &new);
    parent.complete_write(&mut plan, true);
    drop(pass);
    forker.join().expect("no panic").expect("forks");
    let child = Disk::open(&pool, "c").expect("there");
    let at_fork = read(&child, 0, CLUSTER);
    parent.write_at(&bytes(3, CLUSTER), 0).expect("writes");
    assert_eq!(read(&child, 0, CLUSTER), at_fork);
    assert_eq!(at_fork, new);
}

/// The batch of the fork has no room for what its source changed, and takes that along anyway.
#[test]
fn r7_full_batch_what_was_not_committed_is_in_a_fork() {
    let (storage, pool) = fresh();
    let busy = disk(&pool, "busy", 1024 * 64 * CLUSTER);
    let d = disk(&pool, "d", CLUSTER);
    for n in 0..9000 {
        // A record each, more than go into a batch, ahead of the other disk's.
        let at = n % 1024 * 64 * CLUSTER;
        busy.discard(at, 64 * CLUSTER).expect("discards");
    }
    assert!(!pool.wants_commit(), "nobody commits but the fork");
    d.write_at(&bytes(7, CLUSTER), 0).expect("writes");
    cowdisk::fork(&pool, "d", &["f".to_owned()]).expect("forks");
    let later = opened(&Arc::new(storage.crash_all_lost()));
    for pool in [&pool, &later] {
        let f = Disk::open(pool, "f").expect("there");
        assert_eq!(read(&f, 0, SUB), bytes(7, SUB));
        assert!(read(&f, 0, CLUSTER) == bytes(7, CLUSTER));
    }
}

#[test]
fn r8_every_flush_of_overwritten_data_reaches_the_device() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    for value in 2..6 {
        let before = storage.counters();
        d.write_at(&bytes(value, SUB), 0).expect("in place");
        d.flush().expect("flushes");
        assert_eq!(
            storage.counters().durable_writes,
            before.durable_writes,
            "no metadata"
        );
        assert_eq!(storage.counters().flushes, before.flushes + 1);
        let pool = opened(&Arc::new(storage.crash_all_lost()));
        let d = Disk::open(&pool, "d").expect("there");
        assert_eq!(read(&d, 0, SUB), bytes(value, SUB));
    }
}

#[test]
fn r9_batches_of_another_life_are_not_replayed() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    d.flush().expect("flushes");
    let other_life = Arc::new(storage.crash_all_lost());
    for value in [1, 2] {
        d.write_at(&bytes(value, SUB), u64::from(value) * SUB)
            .expect("writes");
        d.flush().expect("flushes");
    }
    let (at, len, stamp, _) = *batches(&storage).last().expect("two batches more");
    {
        let pool = opened(&other_life);
        let d = Disk::open(&pool, "d").expect("there");
        d.write_at(&bytes(7, SUB), 0).expect("writes");
        d.flush().expect("flushes");
        let mine = *batches(&other_life).last().expect("one batch more");
        assert_eq!(
            (mine.0 + mine.1, mine.2.seq + 1),
            (at, stamp.seq),
            "it would fit behind"
        );
    }
    // A batch of an opening that never was.
    let future = Arc::new(other_life.crash_all_kept());
    append(&future, &[Record::Delete { disk: DiskId(1) }], 5);
    opened(&future).find("d").expect("the batch did not count");
    // The second batch of the first life, behind the first of the second.
    let mut batch = vec![0; usize::try_from(len).expect("small")];
    storage.read_at(&mut batch, at).expect("reads");
    other_life.write_durable_at(&batch, at).expect("writes");
    let pool = opened(&other_life);
    let d = Disk::open(&pool, "d").expect("there");
    assert_eq!(
        read(&d, 0, 3 * SUB),
        [bytes(7, SUB), bytes(0, 2 * SUB)].concat()
    );
}

#[test]
fn r9_a_gap_in_the_journal_is_damage_and_not_its_end() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    for value in 1..6 {
        d.write_at(&bytes(value, SUB), u64::from(value) * SUB)
            .expect("writes");
        d.flush().expect("flushes");
    }
    let all = batches(&storage);
    for (at, ..) in &all[..all.len() - 1] {
        let copy = Arc::new(storage.crash_all_kept());
        copy.write_durable_at(&[0; 512], *at).expect("writes");
        let e = common::try_open(&copy).expect_err("flushed batches follow");
        assert!(e.to_string().contains("cannot be read"), "{e}");
    }
}

#[test]
fn r10_a_failed_flush_or_journal_write_is_never_tried_again() {
    for op in [Op::Flush, Op::WriteDurable] {
        let (storage, pool) = fresh();
        let d = disk(&pool, "d", 2 * CLUSTER);
        d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
        d.flush().expect("flushes");
        d.write_at(&bytes(2, CLUSTER), CLUSTER).expect("writes");
        storage.fail(op, 0, 5);
        d.flush().expect_err("it failed");
        let failed = storage.counters().changes();
        d.flush().expect_err("for good");
        d.write_at(&bytes(3, SUB), 0).expect_err("frozen");
        cowdisk::fork(&pool, "d", &["c".to_owned()]).expect_err("frozen");
        pool.close().expect_err("frozen");
        assert_eq!(read(&d, 0, SUB), bytes(1, SUB), "reads go on");
        assert_eq!(
            storage.counters().changes(),
            failed,
            "nothing more was sent"
        );
        let pool = opened(&Arc::new(storage.crash_all_lost()));
        let d = Disk::open(&pool, "d").expect("there");
        assert_eq!(read(&d, 0, CLUSTER), bytes(1, CLUSTER));
    }
}

/// What both stores below leave to the one inside.
macro_rules! pass_on {
    () => {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.inner.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            self.inner.write_at(buf, offset)
        }
        fn flush(&self) -> io::Result<()> {
            self.inner.flush()
        }
        fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
            self.inner.allocate(offset, len)
        }
        fn len(&self) -> io::Result<u64> {
            self.inner.len()
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.inner.set_len(len)
        }
        fn allocated(&self) -> io::Result<u64> {
            self.inner.allocated()
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
            self.inner.next_data(offset)
        }
        fn tier(&self) -> Tier {
            self.inner.tier()
        }
        fn as_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    };
}

/// A store that notices two durable writes at once, and makes them likely.
#[derive(Debug)]
struct Single {
    inner: Arc<SimStorage>,
    is_writing: AtomicBool,
}

impl Storage for Single {
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let is_second = self.is_writing.swap(true, Ordering::SeqCst);
        assert!(!is_second, "one write is outstanding");
        for _ in 0..20 {
            std::thread::yield_now();
        }
        let written = self.inner.write_durable_at(buf, offset);
        self.is_writing.store(false, Ordering::SeqCst);
        written
    }
    pass_on!();
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len)
    }
}

#[test]
fn r9_one_batch_is_outstanding_however_many_ask_for_one() {
    const CLIENTS: u64 = 8;
    // So few that the journal stays in one half, whose batches are looked at one after the other.
    const ROUNDS: u64 = 24;
    let storage = Arc::new(Single {
        inner: empty(POOL_LEN),
        is_writing: AtomicBool::new(false),
    });
    let store = Arc::clone(&storage) as Arc<dyn Storage>;
    let pool = Pool::open(store, &OpenOptions::default()).expect("opens");
    let background = pool.start_background().expect("a thread");
    let mut threads = Vec::new();
    for n in 0..CLIENTS {
        let pool = Arc::clone(&pool);
        let client = move || {
            let name = format!("d{n}");
            let d = disk(&pool, &name, 8 * CLUSTER);
            for round in 0..ROUNDS {
                let value = u8::try_from(round).expect("small");
                let at = round % 8 * CLUSTER;
                d.write_at(&bytes(value, SUB), at).expect("writes");
                if round % 10 == n {
                    let snapshot = format!("s{round}");
                    cowdisk::snapshot(&pool, &name, &snapshot).expect("snapshots");
                } else {
                    d.flush().expect("flushes");
                }
            }
        };
        threads.push(spawn_named("client", client).expect("a thread"));
    }
    for thread in threads {
        thread.join().expect("no panic");
    }
    drop(background);
    let all = batches(&storage.inner);
    assert!(all.len() > 10, "{} batches", all.len());
    for pair in all.windows(2) {
        let ((at, len, stamp, crc), (next_at, _, next, _)) = (pair[0], pair[1]);
        assert_eq!((next_at, next.seq), (at + len, stamp.seq + 1));
        assert_eq!(next.prev_crc, crc, "batch {}", next.seq);
    }
    let later = opened(&Arc::new(storage.inner.crash_all_lost()));
    for n in 0..CLIENTS {
        let d = Disk::open(&later, &format!("d{n}")).expect("there");
        for round in ROUNDS - 8..ROUNDS {
            let value = u8::try_from(round).expect("small");
            assert_eq!(read(&d, round % 8 * CLUSTER, SUB), bytes(value, SUB));
        }
    }
}

/// A store that, while it punches, takes every free cluster there is.
#[derive(Debug)]
struct Greedy {
    inner: Arc<SimStorage>,
    pool: Mutex<Option<Arc<Pool>>>,
    punches: Mutex<u32>,
}

impl Greedy {
    fn take_all_but(&self, offset: u64, len: u64) {
        let guard = self.pool.lock();
        let Some(pool) = &*guard else { return };
        let mut taken = Vec::new();
        while let Ok(run) = pool.space.take(64, Purpose::Image) {
            taken.push(run.clusters);
        }
        let punched = offset / CLUSTER..(offset + len) / CLUSTER;
        let is_free = |run: &std::ops::Range<u32>| {
            u64::from(run.start) < punched.end && u64::from(run.end) > punched.start
        };
        let found = taken.iter().find(|run| is_free(run)).cloned();
        for run in taken {
            pool.space.give_back(run, false).wake();
        }
        assert_eq!(found, None, "clusters {punched:?} are being punched");
        *self.punches.lock() += 1;
    }
}

impl Storage for Greedy {
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_durable_at(buf, offset)
    }
    pass_on!();
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.take_all_but(offset, len);
        self.inner.punch(offset, len)
    }
}

#[test]
fn r4_nobody_can_have_a_cluster_while_it_is_punched() {
    let storage = Arc::new(Greedy {
        inner: empty(POOL_LEN),
        pool: Mutex::default(),
        punches: Mutex::default(),
    });
    let store = Arc::clone(&storage) as Arc<dyn Storage>;
    let pool = Pool::open(store, &OpenOptions::default()).expect("opens");
    let d = disk(&pool, "d", 200 * CLUSTER);
    d.write_at(&bytes(1, 200 * CLUSTER), 0).expect("writes");
    d.discard(0, 200 * CLUSTER).expect("discards");
    pool.reclaim().expect("flushes");
    *storage.pool.lock() = Some(Arc::clone(&pool));
    pool.punch_written(u32::MAX).expect("punches");
    pool.trim().expect("trims");
    *storage.pool.lock() = None;
    assert!(*storage.punches.lock() > 1, "several calls");
}
