//! Goal: faults once found by reading the engine as an adversary stay away.
//!
//! Method: each test is the shortest history that went wrong, on a simulated disk, through the
//! sans-I/O face where the order of events matters.

mod common;

use common::{CLUSTER, POOL_LEN, SUB, begin_write, bytes, disk, empty, enter, fresh, opened, read};
use std::sync::Arc;
use std::task::Waker;
use tidepool::cowdisk::{self, Disk, DiskErrorKind, NewDisk, Step, WritePlan};
use tidepool::pool::dump;
use tidepool::storage::sim::Op;
use tidepool::storage::{SimStorage, Storage};

/// A write over an allocated block and a new one set both bits at completion, and so brought back
/// what a discard in between had zeroed, around the part that was written.
#[test]
fn a_discard_during_a_write_is_not_undone_by_its_completion() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    d.write_at(&bytes(1, SUB), 0).expect("writes");
    let new = bytes(2, SUB + SUB / 2);
    let (pass, mut plan) = begin_write(&d, SUB / 2, &new);
    common::move_bytes(&d, &plan, &new);
    d.write_zeroes(0, SUB, true).expect("zeroes");
    d.complete_write(&mut plan, true);
    drop(pass);
    assert_eq!(
        read(&d, 0, SUB / 2),
        bytes(0, SUB / 2),
        "only the zeroes touched these sectors"
    );
    assert_eq!(read(&d, SUB, SUB), bytes(2, SUB));
}

/// Two first writes of a block in flight at once, the second one complete, then discarded: when the
/// first one was complete too, the block came back with what the second had written.
#[test]
fn a_discard_between_two_writes_that_overlapped_is_not_undone() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    let (old, new) = (bytes(1, 2 * SUB), bytes(2, SUB));
    let (slow_pass, mut slow) = begin_write(&d, 0, &old);
    common::move_bytes(&d, &slow, &old);
    d.write_at(&new, 0).expect("overtakes");
    d.write_zeroes(0, SUB, true).expect("zeroes");
    // A write that comes after the discard is not taken for one that came before.
    let later = bytes(3, SUB);
    let (later_pass, mut later_plan) = begin_write(&d, 2 * SUB, &later);
    d.write_at(&later, SUB).expect("writes");
    d.write_zeroes(SUB, SUB, true).expect("zeroes");
    d.write_at(&later, SUB).expect("writes");
    d.complete_write(&mut slow, true);
    drop(slow_pass);
    assert_eq!(read(&d, 0, SUB), bytes(0, SUB), "nothing came later");
    assert_eq!(read(&d, SUB, SUB), later);
    common::move_bytes(&d, &later_plan, &later);
    d.complete_write(&mut later_plan, true);
    drop(later_pass);
    assert_eq!(read(&d, 2 * SUB, SUB), later);
}

/// So many discards during one write that they cannot be counted wait for it.
#[test]
fn discards_during_a_write_are_counted() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    let data = bytes(1, SUB);
    let (pass, mut plan) = begin_write(&d, 0, &data);
    for n in 0..300 {
        d.write_at(&data, SUB).expect("writes");
        let discard = enter(&d);
        let step = d.plan_discard(&discard, SUB, SUB, Waker::noop());
        drop(discard);
        if matches!(step.map(|planned| planned.step), Ok(Step::Busy)) {
            assert_eq!(n, 255, "one for each number");
            common::move_bytes(&d, &plan, &data);
            d.complete_write(&mut plan, true);
            break;
        }
    }
    drop(pass);
    d.discard(SUB, SUB).expect("nothing is in the way");
    assert_eq!(read(&d, 0, 2 * SUB), [data, bytes(0, SUB)].concat());
}

/// The next process read a batch that only the device's cache had, and wrote the next one after it:
/// a power cut then left a journal with a hole, or data of one disk in another.
#[test]
fn a_batch_that_a_killed_process_left_in_the_cache_is_made_durable() {
    for fails in [false, true] {
        let (storage, pool) = fresh();
        let d = disk(&pool, "d", 4 * CLUSTER);
        d.write_at(&bytes(1, 4 * CLUSTER), 0).expect("writes");
        d.flush().expect("flushes");
        d.discard(0, 4 * CLUSTER).expect("discards");
        if fails {
            storage.fail(Op::WriteDurable, 0, 5);
        } else {
            storage.cut_power_at(0);
        }
        d.flush().expect_err("stopped while the batch is written");
        drop((d, pool));
        // What the cache has of it after a failed write is any part.
        let next = Arc::new(storage.kill());
        let pool = opened(&next);
        let found = read(&Disk::open(&pool, "d").expect("there"), 0, CLUSTER);
        assert!(found == bytes(0, CLUSTER) || (fails && found == bytes(1, CLUSTER)));
        let other = disk(&pool, "o", 4 * CLUSTER);
        other.write_at(&bytes(2, 4 * CLUSTER), 0).expect("writes");
        for image in [next.crash_all_lost(), next.crash_all_kept()] {
            let pool = opened(&Arc::new(image));
            let d = Disk::open(&pool, "d").expect("there");
            assert!(
                read(&d, 0, CLUSTER) == found,
                "as the process before saw it"
            );
        }
    }
}

/// A flush with nothing to record flushed only what its own process had written.
#[test]
fn the_first_flush_covers_what_a_killed_process_wrote() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    d.write_at(&bytes(2, CLUSTER), 0).expect("writes in place");
    let next = Arc::new(storage.kill());
    let pool = opened(&next);
    let d = Disk::open(&pool, "d").expect("there");
    assert!(read(&d, 0, CLUSTER) == bytes(2, CLUSTER));
    d.flush().expect("flushes");
    let pool = opened(&Arc::new(next.crash_all_lost()));
    let d = Disk::open(&pool, "d").expect("there");
    assert!(
        read(&d, 0, CLUSTER) == bytes(2, CLUSTER),
        "it was acknowledged"
    );
}

/// A cut while the second copy was written left one good copy; the next opening wrote that one
/// first, and a second cut there left none.
#[test]
fn two_power_cuts_in_a_row_leave_a_superblock() {
    let storage = empty(POOL_LEN);
    for first_cut in 0..6 {
        let once = Arc::new(storage.crash_all_kept());
        once.cut_power_at(first_cut);
        drop(common::try_open(&once));
        for first_seed in 0..8 {
            for second_cut in 0..6 {
                let twice = Arc::new(once.crash(first_seed));
                twice.cut_power_at(second_cut);
                drop(common::try_open(&twice));
                for second_seed in 0..8 {
                    let after = Arc::new(twice.crash(second_seed));
                    let open = common::try_open(&after);
                    assert!(
                        open.is_ok(),
                        "cuts {first_cut} ({first_seed}) and {second_cut} ({second_seed}): {}",
                        open.err().map(|e| e.to_string()).unwrap_or_default()
                    );
                }
            }
        }
    }
}

/// Each unmap of a whole leaf is a record, whether or not anything was there, and all went into
/// one batch, which then did not fit the journal.
#[test]
fn many_unmaps_between_commits_fit_the_journal() {
    let (storage, pool) = fresh();
    let leaf = 64 * CLUSTER;
    let d = disk(&pool, "d", 80_000 * leaf);
    d.write_at(&bytes(1, SUB), 0).expect("writes");
    for n in 0..40_000 {
        let pass = enter(&d);
        let waker = Waker::noop();
        d.plan_discard(&pass, 2 * n * leaf, leaf, waker)
            .expect("discards");
    }
    d.flush().expect("several batches");
    drop((d, pool));
    let pool = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&pool, "d").expect("it is there");
    assert_eq!(read(&d, 0, SUB), bytes(0, SUB));
}

/// Rows of many forks or snapshots, behind a batch full of other changes, did not fit either.
#[test]
fn structural_changes_fit_the_journal_however_many_rows_they_write() {
    let storage = empty(64 << 20);
    let pool = opened(&storage);
    let busy = disk(&pool, "busy", 1 << 30);
    let fill = |busy: &Disk| {
        let mut plan = WritePlan::default();
        for n in 0..300 {
            busy.write_at(&bytes(1, SUB), n * 64 * CLUSTER)
                .expect("writes");
        }
        for n in 0..9000 {
            let pass = enter(busy);
            let waker = Waker::noop();
            let at = (n % 1000) * 64 * CLUSTER + CLUSTER * (n / 1000 + 2);
            busy.plan_zeroes(&pass, at, SUB, true, &mut plan, waker)
                .expect("zeroes");
        }
    };
    let long = "n".repeat(120);
    disk(&pool, &long, 1 << 20);
    fill(&busy);
    let names: Vec<String> = (0..256).map(|n| format!("{long}{n:08}")).collect();
    cowdisk::fork(&pool, &long, &names).expect("forks");
    for n in 0..700 {
        cowdisk::snapshot(&pool, &long, &format!("{n:0120}")).expect("snapshots");
    }
    fill(&busy);
    cowdisk::rename(&pool, &long, "short").expect("its snapshots follow");
    fill(&busy);
    cowdisk::remove(&pool, "short", true).expect("with its snapshots");
    pool.close().expect("closes");
    let pool = opened(&storage);
    assert_eq!(pool.items().len(), 257, "the forks and the busy disk");
}

/// A fork that failed late had taken a generation that the journal did not know of. After the next
/// opening entries born in it counted as one disk's own although a fork shared them.
#[test]
fn a_fork_that_fails_takes_no_generation() {
    let (storage, pool) = fresh();
    let dir = tempfile::tempdir().expect("a directory");
    let raw = tidepool::format::catalogue::BaseFormat::Raw;
    let make = |base: &std::path::Path, name: &str| {
        let new = NewDisk {
            base: Some((base.to_path_buf(), raw)),
            ..NewDisk::empty(name, CLUSTER)
        };
        cowdisk::create(&pool, &new)
    };
    // Control characters take six bytes each in a row: a path is found with which a row just fits.
    let mut path = dir.path().to_path_buf();
    for _ in 0..5 {
        path.push("\u{1}".repeat(240));
    }
    let mut base = path.join("base");
    let mut len = None;
    for more in 1..240 {
        std::fs::create_dir_all(base.parent().expect("it has one")).expect("makes");
        std::fs::write(&base, bytes(7, CLUSTER)).expect("writes");
        let fits = |n: &usize| make(&base, &"x".repeat(*n)).is_ok();
        if make(&base, &format!("{more:0128}")).is_err() {
            len = (1..=128).rev().find(fits);
            // Not so near that a row with a parent, which is some bytes shorter, fits as well.
            if len.is_some_and(|len| len < 100) {
                break;
            }
        }
        base = path.join("\u{1}".repeat(more)).join("base");
    }
    let len = len.expect("a row that just fits");
    let name = "x".repeat(len);
    let before = pool.generation();
    let used = pool.items().len();
    let names = ["y".to_owned(), "z".repeat(128)];
    cowdisk::fork(&pool, &name, &names).expect_err("one row is too long");
    assert_eq!(pool.items().len(), used, "all or nothing");
    assert_eq!(pool.generation(), before);
    drop(storage);
}

/// Requests that overflow 64 bits, or reach over the end, are refused before anything is changed.
#[test]
fn what_is_out_of_range_changes_nothing() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", 3 << 20);
    let end = d.size();
    let data = bytes(5, 2 << 20);
    for offset in [u64::MAX - 511, end, end - 512, 1 << 63] {
        for may_unmap in [false, true] {
            let e = d
                .write_zeroes(offset, 1024, may_unmap)
                .expect_err("out of range");
            assert_eq!(e.kind(), DiskErrorKind::OutOfRange);
        }
        let e = d.discard(offset, 1024).expect_err("out of range");
        assert_eq!(e.kind(), DiskErrorKind::OutOfRange);
        let e = d.write_at(&data[..1024], offset).expect_err("out of range");
        assert_eq!(e.kind(), DiskErrorKind::OutOfRange);
        let mut buf = vec![0; 1024];
        let e = d.read_at(&mut buf, offset).expect_err("out of range");
        assert_eq!(e.kind(), DiskErrorKind::OutOfRange);
    }
    d.write_at(&data, end - (1 << 20) - 4096)
        .expect_err("its end is out of range");
    d.write_at(&bytes(5, SUB), end - SUB).expect("writes");
    d.write_zeroes(end - SUB / 2, SUB, true)
        .expect_err("its end is out of range");
    assert_eq!(read(&d, 0, end - SUB), bytes(0, end - SUB));
    assert_eq!(read(&d, end - SUB, SUB), bytes(5, SUB));
}

/// Space that was discarded, but whose discard nobody had flushed, was "no space".
#[test]
fn what_was_discarded_can_be_written_again_without_a_flush() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", 64 << 20);
    let mut at = 0;
    while d.write_at(&bytes(1, CLUSTER), at).is_ok() {
        at += CLUSTER;
    }
    assert!(at > 8 << 20, "{at} bytes fit");
    d.discard(0, 4 << 20).expect("discards");
    d.write_at(&bytes(2, CLUSTER), at)
        .expect("there is space again");
}

/// R10: a poisoned pool still flushed again, for the image that waited.
#[test]
fn a_poisoned_pool_sends_nothing_more_to_the_device() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 8 << 20);
    // Enough commits that an image is due at the next ones.
    for n in 0..300 {
        d.write_at(&bytes(1, SUB), (n % 64) * CLUSTER)
            .expect("writes");
        d.write_at(&bytes(1, 512), (n % 16) * SUB).expect("writes");
        storage.fail(Op::Flush, u64::MAX >> 2, 5);
        d.discard((n % 64) * CLUSTER, CLUSTER).expect("discards");
        d.flush().expect("flushes");
    }
    for skip in 0..4 {
        let copy = Arc::new(storage.crash_all_kept());
        let pool = opened(&copy);
        let d = Disk::open(&pool, "d").expect("it is there");
        copy.fail(Op::Flush, skip, 5);
        let mut failed = None;
        for n in 0..400 {
            let written = d.write_at(&bytes(3, SUB), (n % 64) * CLUSTER);
            if written.and_then(|()| d.flush()).is_err() {
                failed = Some(copy.counters());
                break;
            }
            d.discard((n % 64) * CLUSTER, CLUSTER).expect("discards");
        }
        let failed = failed.expect("the flush failed");
        d.flush().expect_err("poisoned");
        d.write_at(&bytes(4, SUB), 0).expect_err("poisoned");
        d.discard(0, SUB).expect_err("poisoned");
        if pool.write_frozen_image().is_ok_and(|is_written| is_written) {
            panic!("an image was put in force");
        }
        pool.punch_written(u32::MAX).expect_err("poisoned");
        pool.trim().expect_err("poisoned");
        pool.close().expect_err("poisoned");
        assert_eq!(copy.counters().changes(), failed.changes(), "skip {skip}");
    }
}

/// While all free space was being punched, writers were told that there was none.
#[test]
fn a_trim_leaves_space_for_writers() {
    #[derive(Debug)]
    struct Watched {
        inner: Arc<SimStorage>,
        pool: tidepool::sync::Mutex<Option<Arc<tidepool::pool::Pool>>>,
        least: tidepool::sync::Mutex<u32>,
    }
    impl Storage for Watched {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.inner.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
            self.inner.write_at(buf, offset)
        }
        fn write_durable_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
            self.inner.write_durable_at(buf, offset)
        }
        fn flush(&self) -> std::io::Result<()> {
            self.inner.flush()
        }
        fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
            if let Some(pool) = &*self.pool.lock() {
                let mut least = self.least.lock();
                let usage = pool.space.usage();
                *least = (*least).min(usage.clean + usage.written);
            }
            self.inner.punch(offset, len)
        }
        fn allocate(&self, offset: u64, len: u64) -> std::io::Result<()> {
            self.inner.allocate(offset, len)
        }
        fn len(&self) -> std::io::Result<u64> {
            self.inner.len()
        }
        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.inner.set_len(len)
        }
        fn allocated(&self) -> std::io::Result<u64> {
            self.inner.allocated()
        }
        // A device that cannot tell what is a hole.
        fn next_data(&self, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
            let len = self.inner.len()?;
            Ok((offset < len).then_some((offset, len)))
        }
        fn tier(&self) -> tidepool::storage::Tier {
            self.inner.tier()
        }
        fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            None
        }
    }
    let storage = Arc::new(Watched {
        inner: empty(POOL_LEN),
        pool: tidepool::sync::Mutex::default(),
        least: tidepool::sync::Mutex::new(u32::MAX),
    });
    let options = tidepool::pool::OpenOptions::default();
    let pool = tidepool::pool::Pool::open(Arc::clone(&storage) as Arc<dyn Storage>, &options)
        .expect("opens");
    *storage.pool.lock() = Some(Arc::clone(&pool));
    let usage = pool.space.usage();
    pool.trim().expect("trims");
    *storage.pool.lock() = None;
    let least = *storage.least.lock();
    let most_taken = u32::try_from((1 << 20) / CLUSTER).expect("few");
    assert!(
        usage.clean - least <= most_taken,
        "{} of {} were away at once",
        usage.clean - least,
        usage.clean
    );
}

/// The journal came back to a half that the image covered, but the superblock still began replay
/// there: a crash then left a pool that did not open.
#[test]
fn the_half_that_replay_begins_in_is_not_written_over() {
    let (storage, pool) = fresh();
    let leaf = 64 * CLUSTER;
    let d = disk(&pool, "d", 20_000 * leaf);
    for round in 0..16 {
        for n in 0..8000 {
            let pass = enter(&d);
            let waker = Waker::noop();
            d.plan_discard(&pass, 2 * n * leaf, leaf, waker)
                .expect("discards");
        }
        d.flush().expect("a batch of a quarter of a half");
        d.write_at(&bytes(round, SUB), u64::from(round) * CLUSTER)
            .expect("writes");
        d.flush().expect("flushes");
        let after = opened(&Arc::new(storage.crash_all_lost()));
        let d = Disk::open(&after, "d").expect("it is there");
        assert_eq!(read(&d, u64::from(round) * CLUSTER, SUB), bytes(round, SUB));
    }
}

/// The last leaf of the largest map has a place for one cluster more than there are numbers for.
#[test]
fn the_last_cluster_of_the_largest_disk_is_like_any_other() {
    let (storage, pool) = fresh();
    let size = pool.cluster_size().disk_bytes_max();
    let d = disk(&pool, "d", size);
    let last = size - CLUSTER;
    d.write_at(&bytes(7, CLUSTER), last).expect("writes");
    cowdisk::fork(&pool, "d", &["f".to_owned()]).expect("forks");
    let f = Disk::open(&pool, "f").expect("there");
    f.write_at(&bytes(8, SUB), last).expect("writes");
    let differ = cowdisk::diff(&d, &f, cowdisk::Comparison::Contents).expect("compares");
    assert!(differ.iter().eq([&(last..last + SUB)]), "{differ:?}");
    assert!(read(&d, last, CLUSTER) == bytes(7, CLUSTER));
    let extents = d.extents().expect("there");
    assert_eq!(extents.last().map(|extent| extent.offset), Some(last));
    d.flush().expect("flushes");
    drop((d, f));
    // Replayed, then from an image.
    for is_image in [false, true] {
        let pool = opened(&storage);
        let d = Disk::open(&pool, "d").expect("there");
        assert!(read(&d, last, CLUSTER) == bytes(7, CLUSTER));
        let mut lines = 0;
        dump::dump(&*storage, &mut |line| {
            lines += u32::from(line["lcn"] == u32::MAX - 1);
        })
        .expect("dumps");
        assert_eq!(lines, 2, "of both disks");
        assert_eq!(pool.superblock().image.is_some(), is_image);
        while pool.superblock().image.is_none() {
            for n in 0..4000 {
                d.discard(n * 64 * CLUSTER, 64 * CLUSTER).expect("discards");
            }
            d.flush().expect("flushes");
        }
    }
    let d = Disk::open(&pool, "d").expect("there");
    d.discard(last - 65 * CLUSTER, 66 * CLUSTER)
        .expect("discards");
    assert!(read(&d, last, CLUSTER) == bytes(0, CLUSTER));
}

/// A write that has to merge two clusters into a third, and cannot read them, takes no space.
#[test]
fn a_merge_that_fails_gives_its_cluster_back() {
    let (storage, pool) = fresh();
    let fork = |from: &str, to: &str| {
        cowdisk::fork(&pool, from, &[to.to_owned()]).expect("forks");
        Disk::open(&pool, to).expect("there")
    };
    let first = disk(&pool, "a", CLUSTER);
    first.write_at(&bytes(1, SUB), 0).expect("writes");
    let second = fork("a", "b");
    second.write_at(&bytes(2, SUB), SUB).expect("writes");
    let third = fork("b", "c");
    let free = || cowdisk::usage(&pool).expect("measures").free;
    let before = free();
    storage.fail(Op::Read, 0, 5);
    third
        .write_at(&bytes(3, SUB), 2 * SUB)
        .expect_err("cannot merge");
    assert_eq!(free(), before);
    third.write_at(&bytes(3, SUB), 2 * SUB).expect("merges");
    assert_eq!(free(), before - CLUSTER);
    let expected = [bytes(1, SUB), bytes(2, SUB), bytes(3, SUB)].concat();
    assert!(read(&third, 0, 3 * SUB) == expected);
}

/// A disk's new name was recorded for each of its snapshots, and each snapshot that went with a disk
/// by itself: with some 2500 the journal of a small pool had no room for it.
#[test]
fn a_disk_with_thousands_of_snapshots_is_renamed_and_removed_whole() {
    const SNAPSHOTS: usize = 3000;
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    drop(disk(&pool, "old", CLUSTER));
    drop(disk(&pool, "old2", CLUSTER));
    for n in 0..SNAPSHOTS {
        if n % 500 == 0 {
            storage.forget_versions();
        }
        cowdisk::snapshot(&pool, "old", &format!("s{n}")).expect("snapshots");
    }
    pool.close().expect("closes");
    drop(pool);
    let made = storage.crash_all_kept();
    // All have the one name or the other, in memory and after each crash.
    let named = |storage: &SimStorage| {
        let pool = opened(&Arc::new(storage.crash_all_kept()));
        let count = |name: &str| pool.with_catalogue(|all| all.snapshots_of(name).count());
        let (old, new) = (count("old"), count("new"));
        assert_eq!(pool.find("new").is_ok(), new > 0, "with its snapshots");
        assert_eq!(pool.find("old").is_ok(), old > 0, "with its snapshots");
        pool.find("old2").expect("no snapshot, and not asked for");
        (old, new)
    };
    let mut step = 0;
    loop {
        let storage = Arc::new(made.crash_all_kept());
        let pool = opened(&storage);
        storage.cut_power_at(step);
        let renamed = cowdisk::rename(&pool, "old", "new");
        storage.clear_faults();
        for image in [storage.crash_all_lost(), storage.crash_all_kept()] {
            let found = named(&image);
            let is_whole = found == (SNAPSHOTS, 0) || found == (0, SNAPSHOTS);
            assert!(is_whole, "{found:?} at {step}");
        }
        step += 1;
        if renamed.is_err() {
            continue;
        }
        let storage = Arc::new(storage.crash_all_lost());
        assert_eq!(named(&storage), (0, SNAPSHOTS));
        let pool = opened(&storage);
        cowdisk::rename(&pool, "new@s7", "new@seven").expect("one alone");
        pool.find("new@s8").expect("as it was");
        cowdisk::remove(&pool, "new", true).expect("removes");
        assert_eq!(pool.items().len(), 1);
        pool.flush().expect("flushes");
        assert_eq!(named(&storage.crash_all_lost()), (0, 0));
        break;
    }
}

/// A store of an embedder's that panics when it writes, if it is told to.
#[derive(Debug)]
struct Panicking {
    inner: Arc<SimStorage>,
    is_armed: std::sync::atomic::AtomicBool,
}
impl Panicking {
    fn trip(&self) {
        let is_armed = self.is_armed.load(std::sync::atomic::Ordering::SeqCst);
        assert!(!is_armed, "a store of an embedder's fails like this");
    }
}
impl Storage for Panicking {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
        self.trip();
        self.inner.write_at(buf, offset)
    }
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
        self.trip();
        self.inner.write_durable_at(buf, offset)
    }
    fn flush(&self) -> std::io::Result<()> {
        self.inner.flush()
    }
    fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.inner.punch(offset, len)
    }
    fn allocate(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.inner.allocate(offset, len)
    }
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.inner.set_len(len)
    }
    fn allocated(&self) -> std::io::Result<u64> {
        self.inner.allocated()
    }
    fn next_data(&self, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
        self.inner.next_data(offset)
    }
    fn hole_writes_max(&self) -> usize {
        // First writes have their cluster for themselves.
        0
    }
    fn tier(&self) -> tidepool::storage::Tier {
        self.inner.tier()
    }
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// A store that panics in the middle of a request left its cluster busy, and everybody who came later
/// waiting for it.
#[test]
fn a_store_that_panics_keeps_no_cluster_busy() {
    let storage = Arc::new(Panicking {
        inner: empty(POOL_LEN),
        is_armed: std::sync::atomic::AtomicBool::new(false),
    });
    let options = tidepool::pool::OpenOptions::default();
    let pool = tidepool::pool::Pool::open(Arc::clone(&storage) as Arc<dyn Storage>, &options)
        .expect("opens");
    drop(disk(&pool, "p", 8 * CLUSTER));
    let limit = cowdisk::Settings {
        limit: Some(Some(8 * CLUSTER)),
        ..cowdisk::Settings::default()
    };
    cowdisk::set(&pool, "p", &limit).expect("sets");
    let p = Disk::open(&pool, "p").expect("opens");
    p.write_at(&bytes(1, SUB), 0).expect("writes");
    cowdisk::snapshot(&pool, "p", "s").expect("snapshots");
    let panics = |act: &dyn Fn()| {
        storage
            .is_armed
            .store(true, std::sync::atomic::Ordering::SeqCst);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        storage
            .is_armed
            .store(false, std::sync::atomic::Ordering::SeqCst);
        caught.expect_err("the store panicked");
    };
    // A fill, a copy of the rest of a block, a copy of a shared one, zeros.
    panics(&|| drop(p.write_at(&bytes(2, SUB), CLUSTER)));
    panics(&|| drop(p.write_at(&bytes(2, 512), 2 * CLUSTER)));
    panics(&|| drop(p.write_at(&bytes(2, 512), 0)));
    panics(&|| drop(p.write_zeroes(512, 512, true)));
    for at in 0..4 {
        p.write_at(&bytes(3, 512), at * CLUSTER)
            .expect("nobody is in the way");
        p.write_zeroes(at * CLUSTER, CLUSTER, true)
            .expect("nor here");
    }
    pool.check_accounts().expect("nothing stays charged");
    p.write_at(&bytes(4, CLUSTER), 0).expect("writes");
    // In the middle of a batch: what there is of it nobody knows.
    panics(&|| drop(p.flush()));
    let refused = p.flush().expect_err("not acknowledged");
    assert_eq!(refused.kind(), DiskErrorKind::Poisoned, "{refused}");
    p.write_at(&bytes(5, CLUSTER), 0).expect_err("nor this");
}
