//! Requests that meet on one map: the whole of the pool and its disks, over a store in memory.

use super::store::{Image, Store};
use super::{explore, spawn};
use std::task::Waker;
use tidepool::cowdisk::{self, Disk, NewDisk, Step, WritePlan};
use tidepool::format::units::{ClusterSize, Lcn};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, Return, open};
use tidepool::storage::Storage;
use tidepool::sync::global::Mutex;
use tidepool::sync::{Arc, OnceLock};

const CLUSTER: u64 = 16 << 10;
const SUB: u64 = CLUSTER / 16;
const POOL_LEN: u64 = 16 << 20;

fn bytes(value: u8, len: u64) -> Vec<u8> {
    vec![value; usize::try_from(len).expect("short")]
}

/// The first byte of each 512 bytes there: what a write of one value leaves.
fn values(disk: &Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut all = bytes(0xee, len);
    disk.read_at(&mut all, offset).expect("reads");
    for sector in all.chunks(512) {
        assert!(
            sector.iter().all(|byte| *byte == sector[0]),
            "a torn sector"
        );
    }
    all.chunks(512).map(|sector| sector[0]).collect()
}

fn open_pool(image: Image) -> (Arc<Store>, Arc<Pool>) {
    let store = Arc::new(Store::new(image));
    let options = OpenOptions {
        returning: Return::Never,
        ..OpenOptions::default()
    };
    let pool = Pool::open(Arc::clone(&store) as Arc<dyn Storage>, &options).expect("opens");
    (store, pool)
}

/// A pool with the disk `d`, of which `written` bytes from the start hold 1. Made in a model of its
/// own, once.
fn prepared(written: u64) -> Image {
    static MADE: OnceLock<Mutex<Vec<(u64, Image)>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock();
    if let Some((_, image)) = made.iter().find(|(of, _)| *of == written) {
        return image.clone();
    }
    let result = Arc::new(Mutex::new(Image::default()));
    let out = Arc::clone(&result);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.check(move || {
        let store = Store::new(Image::default());
        let options = CreateOptions {
            cluster_size: ClusterSize::from_bytes(CLUSTER).expect("in range"),
            ..CreateOptions::new(POOL_LEN)
        };
        open::create(&store, &options).expect("an empty pool");
        let (store, pool) = open_pool(store.image());
        cowdisk::create(&pool, &NewDisk::empty("d", 4 * CLUSTER)).expect("creates");
        let disk = Disk::open(&pool, "d").expect("there");
        if written > 0 {
            disk.write_at(&bytes(1, written), 0).expect("writes");
        }
        drop(disk);
        pool.close().expect("closes");
        *out.lock() = store.image();
    });
    let image = result.lock().clone();
    made.push((written, image.clone()));
    image
}

/// Runs `body` with a pool whose disk has 1 in its first `written` bytes, then checks that memory and
/// journal agree and that every cluster is free or referred to.
fn meet(name: &str, written: u64, preemptions: usize, body: fn(&Arc<Pool>, &Disk)) {
    let image = prepared(written);
    explore(name, preemptions, move || {
        let (store, pool) = open_pool(image.clone());
        let disk = Disk::open(&pool, "d").expect("there");
        body(&pool, &disk);
        let seen = values(&disk, 0, 4 * CLUSTER);
        drop(disk);
        pool.flush().expect("flushes");
        pool.take_back_slabs();
        while pool.reap(usize::MAX) {}
        assert!(pool.is_reaped());
        let usage = pool.space.usage();
        let (again, free) = (store.image(), usage.clean + usage.written);
        drop(pool);
        // What an opening finds free was derived from the maps alone.
        let (_store, pool) = open_pool(again);
        let usage = pool.space.usage();
        assert_eq!(
            free,
            usage.clean + usage.written,
            "clusters got lost, or are free twice"
        );
        let disk = Disk::open(&pool, "d").expect("there");
        assert_eq!(
            values(&disk, 0, 4 * CLUSTER),
            seen,
            "what was flushed is there"
        );
    });
}

/// Two first writes to different blocks of a cluster: one takes a cluster of the pool, both fill it.
///
/// Fails if `Disk::complete_write` sets the bits it planned with instead of adding its own to those
/// that are there.
#[test]
fn two_writes_fill_one_cluster() {
    meet("entries/fills", 0, 3, |pool, disk| {
        let other = disk.clone();
        let writer = spawn(move || other.write_at(&bytes(2, SUB), SUB).expect("writes"));
        disk.write_at(&bytes(3, SUB), 0).expect("writes");
        writer.join().expect("no panic");
        assert_eq!(values(disk, 0, 2 * SUB), [3, 3, 2, 2]);
        let item = pool.find("d").expect("there");
        let entry = item.volume.map.read().get(Lcn(0));
        assert_eq!(entry.alloc, 0b11);
        assert_eq!(pool.space.counts.get(entry.own), 1);
    });
}

/// A first write, and a discard of all of its cluster. One of them comes last, as a whole.
///
/// Fails if `Disk::complete_write` does not look whether the entry still has the cluster that the
/// write went to.
#[test]
fn a_write_and_a_discard_of_its_cluster() {
    meet("entries/discard", 0, 3, |_pool, disk| {
        let other = disk.clone();
        let discarder = spawn(move || other.discard(0, CLUSTER).expect("discards"));
        disk.write_at(&bytes(2, SUB), 0).expect("writes");
        let seen = values(disk, 0, SUB);
        discarder.join().expect("no panic");
        let last = values(disk, 0, SUB);
        assert!(seen == [2, 2] || seen == [0, 0], "{seen:?}");
        assert!(last == seen || last == [0, 0], "{last:?} after {seen:?}");
    });
}

/// A write of half a block brings the other half along; a discard of the cluster waits for that, and
/// is woken.
///
/// Fails if a discard does not look for clusters that one request has for itself, and if the end of
/// the copy does not wake who waits.
#[test]
fn a_copy_and_a_discard() {
    meet("entries/copy", 0, 3, |_pool, disk| {
        let other = disk.clone();
        let discarder = spawn(move || other.discard(0, CLUSTER).expect("discards"));
        disk.write_at(&bytes(2, 512), 512).expect("writes");
        discarder.join().expect("no panic");
        let last = values(disk, 0, SUB);
        assert!(last == [0, 2] || last == [0, 0], "{last:?}");
    });
}

/// A write in place, and a fork: the fork has it or has it not, and does not change afterwards (R7).
/// A commit drains the disk, which waits for the write's I/O.
///
/// Fails if `Gate::close` does not wait until nobody is inside, or does not see who is.
#[test]
fn a_write_in_place_and_a_fork() {
    meet("entries/fork", CLUSTER, 3, |pool, disk| {
        let other = disk.clone();
        let writer = spawn(move || other.write_at(&bytes(2, SUB), 0).expect("writes"));
        cowdisk::fork(pool, "d", &["f".to_owned()]).expect("forks");
        let fork = Disk::open(pool, "f").expect("there");
        let before = values(&fork, 0, 2 * SUB);
        writer.join().expect("no panic");
        assert!(
            before == [1, 1, 1, 1] || before == [2, 2, 1, 1],
            "{before:?}"
        );
        assert_eq!(values(&fork, 0, 2 * SUB), before, "it changed");
        assert_eq!(values(disk, 0, 2 * SUB), [2, 2, 1, 1]);
    });
}

/// A read, while what it reads is discarded, the discard made durable, and another write looking for
/// a cluster to take: it takes the one that was read only when the read is over (R6).
///
/// Fails if `Pool::reap` takes drops of the present epoch.
#[test]
fn a_read_of_a_cluster_that_is_given_to_another() {
    meet("entries/reuse", CLUSTER, 3, |pool, disk| {
        let other = disk.clone();
        let reader = spawn(move || values(&other, 0, SUB));
        disk.discard(0, CLUSTER).expect("discards");
        pool.flush().expect("flushes");
        disk.write_at(&bytes(2, SUB), 2 * CLUSTER).expect("writes");
        let seen = reader.join().expect("no panic");
        assert!(seen == [1, 1] || seen == [0, 0], "{seen:?}");
    });
}

/// A write that was planned and not completed, and one beside it in the same cluster that needs a
/// copy: it waits, and is woken.
///
/// Fails if `Disk::complete_write` does not wake who waits.
#[test]
fn who_waits_for_a_write_is_woken() {
    meet("entries/woken", 0, 3, |_pool, disk| {
        let pass = disk.enter(0, Waker::noop()).expect("open");
        let mut plan = WritePlan::default();
        let len = u32::try_from(SUB).expect("short");
        let step = disk.plan_write(&pass, 0, len, &mut plan, Waker::noop());
        assert!(matches!(step, Ok(Step::Ready)), "{step:?}");
        let other = disk.clone();
        let writer = spawn(move || other.write_at(&bytes(3, 512), SUB).expect("writes"));
        for segment in plan.segments() {
            let written = disk.pool().storage().write_at(&bytes(2, SUB), segment.to);
            written.expect("writes");
        }
        disk.complete_write(&mut plan, true);
        drop(pass);
        writer.join().expect("no panic");
        assert_eq!(values(disk, 0, 2 * SUB), [2, 2, 3, 0]);
    });
}
