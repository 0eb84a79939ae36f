//! Goal: a commit into a parent loses nothing that the parent has and the child never saw.
//!
//! Method: the parent is changed between the fork and the commit in each way there is.

mod common;

use common::{CLUSTER, bytes, disk, fresh, opened, read};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::Pool;
use tidepool::storage::SimStorage;

fn fork(pool: &Arc<Pool>, from: &str, to: &str) {
    cowdisk::fork(pool, from, &[to.to_owned()]).expect("forks");
}

fn write(pool: &Arc<Pool>, name: &str, value: u8, at: u64) {
    let disk = Disk::open(pool, name).expect("there");
    disk.write_at(&bytes(value, CLUSTER), at).expect("writes");
}

/// The pool, and the pool as it is opened after a crash.
fn now_and_later(storage: &Arc<SimStorage>, pool: &Arc<Pool>) -> [Arc<Pool>; 2] {
    let later = opened(&Arc::new(storage.crash_all_lost()));
    [Arc::clone(pool), later]
}

#[test]
fn a_parent_that_was_enlarged_keeps_its_size() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "p", 4 * CLUSTER));
    fork(&pool, "p", "c");
    write(&pool, "c", 7, 0);
    cowdisk::resize(&pool, "p", 8 * CLUSTER, false).expect("grows");
    cowdisk::commit(&pool, "c").expect("commits");
    for pool in now_and_later(&storage, &pool) {
        let parent = Disk::open(&pool, "p").expect("there");
        assert_eq!(parent.size(), 8 * CLUSTER);
        assert!(read(&parent, 0, CLUSTER) == bytes(7, CLUSTER));
        assert!(read(&parent, 4 * CLUSTER, 4 * CLUSTER) == bytes(0, 4 * CLUSTER));
    }
}

#[test]
fn a_child_that_was_enlarged_enlarges_its_parent() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "p", 4 * CLUSTER));
    fork(&pool, "p", "c");
    cowdisk::resize(&pool, "c", 8 * CLUSTER, false).expect("grows");
    write(&pool, "c", 7, 7 * CLUSTER);
    cowdisk::commit(&pool, "c").expect("commits");
    for pool in now_and_later(&storage, &pool) {
        let parent = Disk::open(&pool, "p").expect("there");
        assert_eq!(parent.size(), 8 * CLUSTER);
        assert!(read(&parent, 7 * CLUSTER, CLUSTER) == bytes(7, CLUSTER));
    }
}

/// The child of a removed disk becomes its grandparent's, which may have changed since the removed
/// one was forked from it, although not since the child was.
#[test]
fn a_grandparent_that_changed_is_not_committed_into() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "g", 4 * CLUSTER));
    fork(&pool, "g", "p");
    write(&pool, "g", 1, 0);
    fork(&pool, "p", "c");
    write(&pool, "c", 2, CLUSTER);
    cowdisk::remove(&pool, "p", false).expect("removes");
    for pool in now_and_later(&storage, &pool) {
        cowdisk::commit(&pool, "c").expect_err("what `g` holds now would be lost");
        let grandparent = Disk::open(&pool, "g").expect("there");
        assert!(read(&grandparent, 0, CLUSTER) == bytes(1, CLUSTER));
    }
}

#[test]
fn a_grandparent_that_did_not_change_is() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "g", 4 * CLUSTER));
    write(&pool, "g", 1, 0);
    fork(&pool, "g", "p");
    write(&pool, "p", 2, CLUSTER);
    fork(&pool, "p", "c");
    write(&pool, "c", 3, 2 * CLUSTER);
    cowdisk::remove(&pool, "p", false).expect("removes");
    for pool in now_and_later(&storage, &pool) {
        cowdisk::commit(&pool, "c").expect("commits");
        let grandparent = Disk::open(&pool, "g").expect("there");
        for n in 0..3_u8 {
            let found = read(&grandparent, u64::from(n) * CLUSTER, CLUSTER);
            assert!(found == bytes(n + 1, CLUSTER), "cluster {n}");
        }
    }
}

/// Neither a rollback of a child nor a commit into it is a new fork of its parent.
#[test]
fn a_parent_that_changed_before_a_rollback_is_not_committed_into() {
    for is_rollback in [true, false] {
        let (storage, pool) = fresh();
        drop(disk(&pool, "p", 4 * CLUSTER));
        fork(&pool, "p", "c");
        write(&pool, "p", 1, 0);
        if is_rollback {
            cowdisk::snapshot(&pool, "c", "s").expect("snapshots");
            write(&pool, "c", 2, CLUSTER);
            cowdisk::rollback(&pool, "c@s").expect("rolls back");
        } else {
            fork(&pool, "c", "d");
            write(&pool, "d", 2, CLUSTER);
            cowdisk::commit(&pool, "d").expect("`c` has not changed");
        }
        for pool in now_and_later(&storage, &pool) {
            cowdisk::commit(&pool, "c").expect_err("what `p` holds now would be lost");
            let parent = Disk::open(&pool, "p").expect("there");
            assert!(read(&parent, 0, CLUSTER) == bytes(1, CLUSTER));
        }
    }
}

/// What was committed into a disk is its own from then on, and counts.
#[test]
fn a_commit_is_no_way_around_a_limit() {
    let (_storage, pool) = fresh();
    let limited = cowdisk::NewDisk {
        limit: Some(2 * CLUSTER),
        ..cowdisk::NewDisk::empty("p", 8 * CLUSTER)
    };
    cowdisk::create(&pool, &limited).expect("creates");
    fork(&pool, "p", "c");
    write(&pool, "c", 1, 0);
    write(&pool, "c", 2, CLUSTER);
    cowdisk::commit(&pool, "c").expect("commits");
    let parent = Disk::open(&pool, "p").expect("there");
    let refused = parent.write_at(&bytes(3, CLUSTER), 2 * CLUSTER);
    let kind = refused.expect_err("over the limit").kind();
    assert_eq!(kind, cowdisk::DiskErrorKind::LimitReached);
}

/// The base has grown with the commit; what it has there is the disk's after the next opening too.
#[test]
fn a_disk_longer_than_its_base_is_committed_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    std::fs::write(&path, bytes(1, 2 * CLUSTER)).expect("an image");
    let (storage, pool) = fresh();
    let new = cowdisk::NewDisk {
        base: Some((path.clone(), BaseFormat::Raw)),
        ..cowdisk::NewDisk::empty("d", 8 * CLUSTER)
    };
    cowdisk::create(&pool, &new).expect("creates");
    write(&pool, "d", 7, 6 * CLUSTER);
    cowdisk::commit_to_base(&pool, "d", false, &mut |_, _| Ok(())).expect("commits");
    let [one, zeros] = [bytes(1, 2 * CLUSTER), bytes(0, 4 * CLUSTER)];
    let expected = [one, zeros, bytes(7, CLUSTER), bytes(0, CLUSTER)].concat();
    assert!(std::fs::read(&path).expect("reads") == expected);
    for pool in now_and_later(&storage, &pool) {
        let disk = Disk::open(&pool, "d").expect("there");
        assert!(read(&disk, 0, 8 * CLUSTER) == expected);
    }
}

/// After a commit the two are equal: the child's next changes can be committed like the first.
#[test]
fn a_child_is_committed_again_and_again() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "p", 4 * CLUSTER));
    fork(&pool, "p", "c");
    let commit = |pool: &Arc<Pool>, value: u8| {
        write(pool, "c", value, 0);
        cowdisk::commit(pool, "c").expect("the parent has not changed");
        let parent = Disk::open(pool, "p").expect("there");
        assert!(read(&parent, 0, CLUSTER) == bytes(value, CLUSTER));
    };
    commit(&pool, 1);
    commit(&pool, 2);
    for pool in now_and_later(&storage, &pool) {
        commit(&pool, 3);
    }
}
