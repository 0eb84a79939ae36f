//! Goal: a disk becomes smaller wholly or not at all. Whatever stops it (a power cut, an error of the
//! device, a full pool, somebody who has the disk open), not one byte has changed; and what a later
//! growth shows is zeros.
//!
//! Method: disks whose last cluster is cut inside a block: their own, shared with a snapshot, partly
//! inherited. Power is cut at every operation of the change, and every operation fails once.

mod common;

use common::{CLUSTER, POOL_LEN, SUB, bytes, disk, empty, opened, read};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, DiskErrorKind};
use tidepool::pool::Pool;
use tidepool::storage::SimStorage;
use tidepool::storage::sim::Harm;

const LEN: u64 = 4 * CLUSTER;
/// In the middle of a block of the second cluster.
const CUT: u64 = CLUSTER + 5 * SUB + 512;

/// A disk `d` in a pool that was closed, and what else must stay as it is.
struct Scene {
    what: &'static str,
    storage: SimStorage,
    content: Vec<u8>,
    others: Vec<(&'static str, Vec<u8>)>,
}

fn scene(what: &'static str, make: impl FnOnce(&Arc<Pool>)) -> Scene {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    make(&pool);
    pool.close().expect("closes");
    let all = |name: &str| {
        let disk = Disk::open(&pool, name).expect("opens");
        read(&disk, 0, disk.size())
    };
    let others = ["d@s", "o"].into_iter();
    let others = others.filter(|name| pool.find(name).is_ok());
    let others = others.map(|name| (name, all(name))).collect();
    let content = all("d");
    storage.forget_versions();
    Scene {
        what,
        storage: storage.crash_all_kept(),
        content,
        others,
    }
}

fn scenes() -> Vec<Scene> {
    let own = scene("its own", |pool| {
        disk(pool, "d", LEN)
            .write_at(&bytes(1, LEN), 0)
            .expect("writes");
    });
    let shared = scene("shared with a snapshot", |pool| {
        let d = disk(pool, "d", LEN);
        d.write_at(&bytes(1, LEN), 0).expect("writes");
        cowdisk::snapshot(pool, "d", "s").expect("a snapshot");
    });
    let mixed = scene("in two clusters", |pool| {
        let o = disk(pool, "o", LEN);
        o.write_at(&bytes(1, LEN), 0).expect("writes");
        cowdisk::fork(pool, "o", &["d".to_owned()]).expect("forks");
        let d = Disk::open(pool, "d").expect("opens");
        d.write_at(&bytes(2, 3 * SUB), CLUSTER + SUB)
            .expect("writes");
        cowdisk::snapshot(pool, "d", "s").expect("a snapshot");
    });
    let sparse = scene("alone in its cluster", |pool| {
        let d = disk(pool, "d", LEN);
        d.write_at(&bytes(3, SUB), CLUSTER + 5 * SUB)
            .expect("writes");
    });
    vec![own, shared, mixed, sparse]
}

/// What the pool in `storage` has is one of two things; which.
fn has_happened(scene: &Scene, storage: &SimStorage) -> bool {
    let storage = Arc::new(storage.crash_all_kept());
    let pool = opened(&storage);
    for (name, content) in &scene.others {
        let other = Disk::open(&pool, name).expect("opens");
        assert!(read(&other, 0, LEN) == *content, "{}: {name}", scene.what);
    }
    let d = Disk::open(&pool, "d").expect("opens");
    let size = d.size();
    assert!(size == LEN || size == CUT, "{}: {size} bytes", scene.what);
    let stays = usize::try_from(size).expect("short");
    assert!(
        read(&d, 0, size) == scene.content[..stays],
        "{}: changed without having shrunk, or what stays did",
        scene.what
    );
    drop(d);
    if size == CUT {
        cowdisk::resize(&pool, "d", LEN, false).expect("grows");
        let d = Disk::open(&pool, "d").expect("opens");
        let grown = read(&d, CUT, LEN - CUT);
        assert!(grown == bytes(0, LEN - CUT), "{}: not zeros", scene.what);
    }
    size == CUT
}

#[test]
fn a_smaller_size_is_there_wholly_or_not_at_all() {
    let hows = [
        None,
        Some(Harm::Fails(5)),
        Some(Harm::Fails(28)),
        Some(Harm::Short(5)),
    ];
    for scene in scenes() {
        for how in hows {
            let mut has_ended = false;
            for step in 0..100 {
                let storage = Arc::new(scene.storage.crash_all_kept());
                let pool = opened(&storage);
                match how {
                    None => storage.cut_power_at(step),
                    Some(harm) => storage.harm_any(step, harm),
                }
                let done = cowdisk::resize(&pool, "d", CUT, true);
                drop(pool);
                storage.clear_faults();
                let kept = has_happened(&scene, &storage.crash_all_kept());
                let lost = has_happened(&scene, &storage.crash_all_lost());
                if done.is_ok() {
                    assert!(kept && lost, "{} {how:?} at {step}", scene.what);
                    has_ended = true;
                    break;
                }
            }
            assert!(has_ended, "{}: it comes to an end", scene.what);
        }
    }
}

#[test]
fn a_size_that_is_refused_changes_nothing() {
    for scene in scenes() {
        let storage = Arc::new(scene.storage.crash_all_kept());
        let pool = opened(&storage);
        let handle = Disk::open(&pool, "d").expect("opens");
        let refused = cowdisk::resize(&pool, "d", CUT, true).expect_err("it is open");
        assert_eq!(refused.kind(), DiskErrorKind::Request, "{refused}");
        assert!(read(&handle, 0, LEN) == scene.content, "{}", scene.what);
        handle.flush().expect("flushes");
        assert!(!has_happened(&scene, &storage));
    }
}

#[test]
fn a_full_pool_says_which_sizes_need_no_space() {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    let d = disk(&pool, "d", LEN);
    d.write_at(&bytes(1, LEN), 0).expect("writes");
    let greedy = disk(&pool, "greedy", 2 * POOL_LEN);
    let mut at = 0;
    while greedy.write_at(&bytes(2, CLUSTER), at).is_ok() {
        at += CLUSTER;
    }
    drop(d);
    let refused = cowdisk::resize(&pool, "d", CUT, true).expect_err("there is no space");
    let next = CLUSTER + 6 * SUB;
    assert!(refused.to_string().contains(&next.to_string()), "{refused}");
    let d = Disk::open(&pool, "d").expect("opens");
    assert!(read(&d, 0, LEN) == bytes(1, LEN));
    drop(d);
    cowdisk::resize(&pool, "d", next, true).expect("shrinks as it was told");
    let d = Disk::open(&pool, "d").expect("opens");
    assert!(read(&d, 0, next) == bytes(1, next));
}
