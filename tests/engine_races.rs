//! Goal: requests and operations that meet do not undo one another.
//!
//! Method: a request that is planned but not completed is I/O in flight, so each meeting is spelled
//! out; where threads must meet, one is held at a gate or in the store until the other is there.

mod common;

use common::{CLUSTER, POOL_LEN, SUB, begin_write, bytes, disk, fresh, move_bytes, opened, read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Wake, Waker};
use tidepool::cowdisk::{self, Disk, DiskErrorKind, NewDisk, Step, WritePlan};
use tidepool::format::catalogue::{BaseFormat, Row};
use tidepool::format::units::Lcn;
use tidepool::pool::volume::Volume;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Access, FileStorage};

use tidepool::sync::{Mutex, spawn_named};

/// The write's blocks are not the discard's, so neither has anything to do with the other; the
/// discard found nothing allocated in the cluster and took it away, with the write in flight.
#[test]
fn a_discard_beside_a_write_in_flight_leaves_it_its_cluster() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    // Every block of the cluster is known to be zeros.
    for sub in 0..16 {
        d.discard(sub * SUB, SUB).expect("discards");
    }
    let new = bytes(7, SUB);
    let (pass, mut plan) = begin_write(&d, 5 * SUB, &new);
    d.discard(3 * SUB, SUB).expect("discards");
    move_bytes(&d, &plan, &new);
    d.complete_write(&mut plan, true);
    drop(pass);
    assert!(read(&d, 5 * SUB, SUB) == new, "it completed");
    d.flush().expect("flushes");
    let again = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&again, "d").expect("there");
    assert!(read(&d, 5 * SUB, SUB) == new, "it was acknowledged");
}

/// A file system that frees one block of a cluster that has only that one gives the cluster back,
/// whether or not there is a base that its other blocks would show; and to discard what was never
/// written makes the map no larger.
#[test]
fn the_last_block_of_a_cluster_takes_it_along() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", 64 * 64 * CLUSTER);
    let used = |pool: &Arc<Pool>| cowdisk::usage(pool).expect("measures").used;
    d.write_at(&bytes(7, SUB), 5 * SUB).expect("writes");
    assert_eq!(used(&pool), CLUSTER);
    d.discard(5 * SUB, SUB).expect("discards");
    assert_eq!(used(&pool), 0);
    for leaf in 1..64 {
        d.discard(leaf * 64 * CLUSTER, SUB).expect("discards");
    }
    let item = pool.find("d").expect("there");
    assert_eq!(item.volume.map.read().tree.next_leaf(1), None);
}

/// What a killed process wrote is in the host's cache: the device has it only after a flush, and
/// the next process is the one to be asked for that.
#[test]
fn a_flush_covers_what_the_process_before_wrote() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    d.flush().expect("flushes");
    d.write_at(&bytes(2, CLUSTER), 0).expect("in place");
    // Killed: nothing of the pool is left but what it wrote.
    drop((d, pool));
    let pool = opened(&storage);
    let d = Disk::open(&pool, "d").expect("there");
    assert!(
        read(&d, 0, CLUSTER) == bytes(2, CLUSTER),
        "it is in the cache"
    );
    d.flush().expect("flushes");
    let pool = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&pool, "d").expect("there");
    assert!(read(&d, 0, CLUSTER) == bytes(2, CLUSTER), "it was flushed");
}

/// Each went by the size it had found before the others changed it: clusters became free twice, or
/// were lost.
#[test]
fn resizes_at_once_come_one_after_the_other() {
    let (_storage, pool) = fresh();
    let count = |pool: &Pool| {
        let usage = pool.space.usage();
        pool.superblock().cluster_count - usage.clean - usage.written
    };
    let metadata = count(&pool);
    let mut threads = Vec::new();
    for n in 0..4 {
        let pool = Arc::clone(&pool);
        let resizer = move || {
            for round in 0..50 {
                let len = POOL_LEN + (round * 7 + n * 5) % 16 * 4 * CLUSTER;
                pool.resize(len).expect("nothing is in the way");
            }
        };
        threads.push(spawn_named("resizer", resizer).expect("a thread"));
    }
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(count(&pool), metadata);
    let len = pool.storage().len().expect("known");
    assert_eq!(len, pool.superblock().pool_len());
    pool.close().expect("closes");
}

/// Once a pool is closed its store may be somebody else's.
#[test]
fn handles_left_over_write_nothing_after_a_close() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    pool.close().expect("closes");
    let before = storage.counters().changes();
    for at in [0, CLUSTER] {
        let refused = d.write_at(&bytes(2, CLUSTER), at).expect_err("closed");
        assert_eq!(refused.kind(), DiskErrorKind::Poisoned);
    }
    d.discard(0, CLUSTER).expect_err("closed");
    d.flush().expect_err("closed");
    cowdisk::fork(&pool, "d", &["f".to_owned()]).expect_err("closed");
    pool.resize(2 * POOL_LEN).expect_err("closed");
    pool.trim().expect_err("closed");
    pool.close().expect("it is closed already");
    drop((d, pool));
    assert_eq!(storage.counters().changes(), before);
    let d = Disk::open(&opened(&storage), "d").expect("there");
    assert!(read(&d, 0, CLUSTER) == bytes(1, CLUSTER));
}

#[test]
fn a_close_waits_for_writes_in_flight() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
    let new = bytes(2, CLUSTER);
    let (pass, mut plan) = begin_write(&d, 0, &new);
    let closer = {
        let pool = Arc::clone(&pool);
        spawn_named("closer", move || pool.close()).expect("a thread")
    };
    while d.enter(1, Waker::noop()).is_some() && !closer.is_finished() {
        std::thread::yield_now();
    }
    assert!(!closer.is_finished(), "a write in place is in flight");
    move_bytes(&d, &plan, &new);
    d.complete_write(&mut plan, true);
    drop(pass);
    closer.join().expect("no panic").expect("closes");
    let d = Disk::open(&opened(&storage), "d").expect("there");
    assert!(read(&d, 0, CLUSTER) == new);
}

/// The lock of a pool's file is let go of by the last handle, not by the close.
#[test]
fn a_file_is_locked_while_any_handle_is_left() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pool");
    let store = FileStorage::create_new(&path, POOL_LEN).expect("creates");
    open::create(&store, &CreateOptions::new(POOL_LEN)).expect("an empty pool");
    let pool = Pool::open(Arc::new(store), &OpenOptions::default()).expect("opens");
    let d = disk(&pool, "d", 1 << 20);
    pool.close().expect("closes");
    drop(pool);
    FileStorage::open(&path, Access::ReadWrite).expect_err("a disk is left");
    drop(d);
    FileStorage::open(&path, Access::ReadWrite).expect("nobody has it");
}

/// With its thread gone, whoever commits does again what can wait.
#[test]
fn after_the_background_ends_commits_release_what_was_dropped() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    for _ in 0..3 {
        let background = pool.start_background().expect("a thread");
        pool.start_background().expect_err("there is one");
        drop(background);
        d.write_at(&bytes(1, CLUSTER), 0).expect("writes");
        d.flush().expect("flushes");
        d.discard(0, CLUSTER).expect("discards");
        d.flush().expect("flushes");
        assert!(pool.is_reaped(), "nobody else will");
    }
}

/// A waker that looks whether the map is locked by whoever wakes it.
struct Look {
    volume: Arc<Volume>,
    found: Mutex<Vec<bool>>,
}

impl Wake for Look {
    fn wake(self: Arc<Self>) {
        let is_free = self.volume.map.try_write().is_some();
        self.found.lock().push(is_free);
    }
}

#[test]
fn who_waits_is_woken_with_the_map_unlocked() {
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", 4 * CLUSTER);
    let look = Arc::new(Look {
        volume: pool.find("d").expect("there").volume,
        found: Mutex::default(),
    });
    let waker = Waker::from(Arc::clone(&look));
    let mut waiting = WritePlan::default();
    let new = bytes(1, SUB);
    // A fill, then a copy, is in the way of a write to a part of a block.
    let (pass, mut plan) = begin_write(&d, 0, &new);
    let step = d.plan_write(&pass, SUB, 512, &mut waiting, &waker);
    assert!(matches!(step, Ok(Step::Busy)), "{step:?}");
    move_bytes(&d, &plan, &new);
    d.complete_write(&mut plan, true);
    let step = d.plan_write(&pass, SUB, 512, &mut waiting, &waker);
    let Ok(Step::Copy(job)) = step else {
        panic!("{step:?}")
    };
    let step = d.plan_write(&pass, SUB, 512, &mut waiting, &waker);
    assert!(matches!(step, Ok(Step::Busy)), "{step:?}");
    d.run_copy(job).expect("copies");
    assert_eq!(*look.found.lock(), [true, true]);
}

/// Opening counts as use only once it is counted, and what the disk is may be replaced before: a
/// handle then had the base of what it was, and read zeros where there was data.
#[test]
fn a_disk_that_is_being_replaced_opens_as_what_it_becomes() {
    let (_storage, pool) = fresh();
    drop(disk(&pool, "d", 4 * CLUSTER));
    let item = pool.find("d").expect("there");
    // As a rollback does: drained, found unused, replaced.
    item.volume.gate.close();
    let opener = {
        let pool = Arc::clone(&pool);
        spawn_named("opener", move || Disk::open(&pool, "d")).expect("a thread")
    };
    while item.volume.opens.load(Ordering::SeqCst) == 0 && !opener.is_finished() {
        std::thread::yield_now();
    }
    let row = Row {
        is_ephemeral: true,
        ..item.row.clone()
    };
    pool.change_catalogue(|all| all.put(row, &item.volume));
    item.volume.gate.open();
    let d = opener.join().expect("no panic").expect("opens");
    assert!(d.is_ephemeral());
    assert_eq!(item.volume.opens.load(Ordering::SeqCst), 1);
    drop(d);
    assert_eq!(item.volume.opens.load(Ordering::SeqCst), 0);
}

/// A block that a write in flight fills is not pulled from the base over it.
#[test]
fn a_flattening_waits_for_the_writes_in_a_cluster() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    std::fs::write(&path, bytes(7, CLUSTER)).expect("an image");
    let (_storage, pool) = fresh();
    let new = NewDisk {
        base: Some((path, BaseFormat::Raw)),
        ..NewDisk::empty("d", CLUSTER)
    };
    cowdisk::create(&pool, &new).expect("creates");
    let d = Disk::open(&pool, "d").expect("opens");
    let written = bytes(1, SUB);
    let (pass, mut plan) = begin_write(&d, 0, &written);
    move_bytes(&d, &plan, &written);
    let flattener = {
        let pool = Arc::clone(&pool);
        let flatten = move || cowdisk::flatten(&pool, "d", &mut |_, _| Ok(()));
        spawn_named("flattener", flatten).expect("a thread")
    };
    let volume = pool.find("d").expect("there").volume;
    let is_waiting = || {
        let map = volume.map.read();
        assert_eq!(map.get(Lcn(0)).alloc, 0, "nothing is pulled yet");
        !map.waiting.is_empty()
    };
    while !is_waiting() {
        std::thread::yield_now();
    }
    d.complete_write(&mut plan, true);
    drop(pass);
    flattener.join().expect("no panic").expect("flattens");
    let expected = [written, bytes(7, CLUSTER - SUB)].concat();
    assert!(read(&d, 0, CLUSTER) == expected);
}

/// Which part of the range was whole blocks was found out before the requests for it were begun; the
/// disk then no longer ended there.
#[test]
fn zeroes_to_the_end_of_a_disk_that_grows() {
    const START: u64 = 64 * SUB + 512;
    let (_storage, pool) = fresh();
    let d = disk(&pool, "d", START);
    let grower = {
        let pool = Arc::clone(&pool);
        let grow = move || {
            for n in 1..=10_000 {
                cowdisk::resize(&pool, "d", START + n * 512, false).expect("grows");
            }
        };
        spawn_named("grower", grow).expect("a thread")
    };
    let mut rounds = 0_u32;
    while rounds == 0 || !grower.is_finished() {
        let end = d.size();
        let from = end / SUB * SUB - 8 * SUB;
        if rounds.is_multiple_of(64) {
            d.write_at(&bytes(7, end - from), from).expect("writes");
        }
        d.write_zeroes(from, end - from, rounds.is_multiple_of(2))
            .expect("zeroes");
        if rounds.is_multiple_of(64) {
            assert_eq!(read(&d, from, end - from), bytes(0, end - from));
        }
        rounds += 1;
    }
    grower.join().expect("no panic");
}
