//! Goal: limits, reserves and ephemeral disks are what they say, also after the pool was opened
//! again; and what a fork writes does not depend on what the disk holds.
//!
//! Method: small pools on the simulated disk.

mod common;

use common::{CLUSTER, POOL_LEN, SUB, bytes, fresh, opened, read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use tidepool::cowdisk::{self, Disk, DiskErrorKind, NewDisk, Settings, Step, WritePlan};
use tidepool::pool::Pool;
use tidepool::pool::space::Purpose;
use tidepool::storage::SimStorage;
use tidepool::sync::spawn_named;

const LEN: u64 = 8 << 20;

fn create(pool: &Arc<Pool>, new: &NewDisk) -> Disk {
    cowdisk::create(pool, new).expect("creates");
    Disk::open(pool, &new.name).expect("opens")
}

fn refused(disk: &Disk, at: u64) {
    let e = disk
        .write_at(&bytes(9, SUB), at)
        .expect_err("over the limit");
    assert_eq!(e.kind(), DiskErrorKind::LimitReached, "{e}");
    assert!(e.to_string().contains("--limit"), "{e}");
}

#[test]
fn a_limit_counts_blocks_since_the_fork_and_stays_after_opening_again() {
    let (storage, pool) = fresh();
    let new = NewDisk {
        limit: Some(10 * SUB),
        ..NewDisk::empty("d", LEN)
    };
    let disk = create(&pool, &new);
    for block in 0..10 {
        // Scattered: a limit is of data, not of clusters.
        disk.write_at(&bytes(1, SUB), block * 3 * CLUSTER)
            .expect("within the limit");
    }
    refused(&disk, 100 * CLUSTER);
    disk.write_at(&bytes(2, SUB), 3 * CLUSTER)
        .expect("overwrites go on");
    assert_eq!(
        read(&disk, 100 * CLUSTER, SUB),
        bytes(0, SUB),
        "a refused write changed nothing"
    );
    disk.discard(0, CLUSTER).expect("discards");
    disk.write_at(&bytes(3, SUB), 100 * CLUSTER)
        .expect("a discarded block makes room");
    disk.flush().expect("flushes");
    drop(disk);
    pool.close().expect("closes");
    drop(pool);

    let pool = opened(&storage);
    let disk = Disk::open(&pool, "d").expect("opens");
    refused(&disk, 200 * CLUSTER);
    cowdisk::set(
        &pool,
        "d",
        &Settings {
            limit: Some(Some(11 * SUB)),
            ..Settings::default()
        },
    )
    .expect("raises the limit");
    disk.write_at(&bytes(4, SUB), 200 * CLUSTER)
        .expect("one more");
    refused(&disk, 201 * CLUSTER);
    // A fork begins with nothing of its own, and without the limit of what it came from.
    cowdisk::fork(&pool, "d", &["f".to_owned()]).expect("forks");
    let fork = Disk::open(&pool, "f").expect("opens");
    for block in 0..20 {
        fork.write_at(&bytes(5, SUB), block * CLUSTER)
            .expect("no limit here");
    }
}

/// Writes whole clusters until there is no space; how many.
fn fill(disk: &Disk) -> u64 {
    let mut clusters = 0;
    loop {
        match disk.write_at(&bytes(1, CLUSTER), clusters * CLUSTER) {
            Ok(()) => clusters += 1,
            Err(e) => {
                assert_eq!(e.kind(), DiskErrorKind::NoSpace, "{e}");
                return clusters;
            }
        }
    }
}

#[test]
fn what_is_reserved_for_one_disk_no_other_can_take() {
    let (storage, pool) = fresh();
    let reserve = 100 * CLUSTER;
    let new = NewDisk {
        reserve: Some(reserve),
        ..NewDisk::empty("kept", LEN)
    };
    drop(create(&pool, &new));
    let greedy = create(&pool, &NewDisk::empty("greedy", 2 * POOL_LEN));
    let taken = fill(&greedy);
    assert!(taken > 0, "what is not reserved is for everybody");
    drop(greedy);
    pool.close().expect("closes");
    drop(pool);

    let pool = opened(&storage);
    let kept = Disk::open(&pool, "kept").expect("opens");
    for cluster in 0..100 {
        let written = kept.write_at(&bytes(2, CLUSTER), cluster * CLUSTER);
        written.unwrap_or_else(|e| panic!("cluster {cluster} of 100 reserved: {e}"));
    }
    let e = kept
        .write_at(&bytes(2, CLUSTER), 101 * CLUSTER)
        .expect_err("the pool is full");
    assert_eq!(e.kind(), DiskErrorKind::NoSpace);
    let huge = NewDisk {
        reserve: Some(POOL_LEN),
        ..NewDisk::empty("huge", LEN)
    };
    cowdisk::create(&pool, &huge).expect_err("more than there is cannot be promised");
}

#[test]
fn an_ephemeral_disk_loses_its_own_contents_at_most() {
    let (storage, pool) = fresh();
    let kept = create(&pool, &NewDisk::empty("kept", LEN));
    let scratch = NewDisk {
        is_ephemeral: true,
        ..NewDisk::empty("scratch", LEN)
    };
    let scratch = create(&pool, &scratch);
    let before = storage.counters();
    for cluster in 0..50 {
        scratch
            .write_at(&bytes(7, CLUSTER), cluster * CLUSTER)
            .expect("writes");
        scratch.flush().expect("acknowledged");
    }
    let after = storage.counters();
    assert_eq!(
        (after.flushes, after.durable_writes),
        (before.flushes, before.durable_writes),
        "its flushes reach no device"
    );
    kept.write_at(&bytes(8, SUB), 0).expect("writes");
    kept.flush().expect("flushes");
    for seed in 0..20 {
        let pool = opened(&Arc::new(storage.crash(seed)));
        let kept = Disk::open(&pool, "kept").expect("opens");
        assert_eq!(
            read(&kept, 0, SUB),
            bytes(8, SUB),
            "the other disk is as it was flushed"
        );
        let scratch = Disk::open(&pool, "scratch").expect("it is still there");
        for cluster in 0..50 {
            let held = read(&scratch, cluster * CLUSTER, CLUSTER);
            let is_own = held.iter().all(|byte| *byte == 7 || *byte == 0);
            assert!(is_own, "seed {seed}: something that is not its own");
        }
    }
}

#[test]
fn a_fork_records_the_same_whatever_the_disk_holds() {
    let cost = |clusters: u64, depth: u64| {
        let (storage, pool) = fresh();
        let disk = create(&pool, &NewDisk::empty("d0", LEN));
        for cluster in 0..clusters {
            disk.write_at(&bytes(1, SUB), cluster * CLUSTER)
                .expect("writes");
        }
        for n in 0..depth {
            cowdisk::fork(&pool, &format!("d{n}"), &[format!("d{}", n + 1)]).expect("forks");
        }
        disk.flush().expect("flushes");
        let count = |storage: &SimStorage| {
            let counters = storage.counters();
            (
                counters.durable_writes,
                counters.flushes,
                counters.writes,
                counters.reads,
            )
        };
        let before = count(&storage);
        cowdisk::fork(&pool, &format!("d{depth}"), &["last".to_owned()]).expect("forks");
        let after = count(&storage);
        (
            after.0 - before.0,
            after.1 - before.1,
            after.2 - before.2,
            after.3 - before.3,
        )
    };
    let smallest = cost(0, 0);
    assert_eq!(smallest, (1, 0, 0, 0), "one batch, and nothing else");
    assert_eq!(cost(300, 0), smallest);
    assert_eq!(cost(300, 40), smallest);
}

#[test]
fn changing_settings_of_a_disk_in_use_keeps_its_reserve_as_it_was_asked_for() {
    let (_storage, pool) = fresh();
    let free = pool.space.reservable();
    let new = NewDisk {
        reserve: Some(50 * CLUSTER),
        ..NewDisk::empty("d", LEN)
    };
    let disk = create(&pool, &new);
    disk.write_at(&bytes(1, CLUSTER), 0)
        .expect("writes, and sets clusters aside");
    for _ in 0..3 {
        let limit = Settings {
            limit: Some(Some(LEN)),
            ..Settings::default()
        };
        cowdisk::set(&pool, "d", &limit).expect("sets");
    }
    drop(disk);
    assert_eq!(
        pool.space.reservable(),
        free - 50,
        "49 are reserved, and one is used"
    );
    cowdisk::remove(&pool, "d", false).expect("removes");
    pool.flush().expect("flushes");
    while pool.reap(usize::MAX) {}
    assert_eq!(pool.space.reservable(), free);
}

#[test]
fn a_pool_does_not_shrink_into_what_is_reserved() {
    let (_storage, pool) = fresh();
    pool.resize(2 * POOL_LEN).expect("grows");
    let now = pool.superblock().pool_len();
    let spare = 100;
    let new = NewDisk {
        reserve: Some((u64::from(pool.space.reservable()) - spare) * CLUSTER),
        ..NewDisk::empty("d", LEN)
    };
    drop(create(&pool, &new));
    let e = pool.resize(now - (spare + 1) * CLUSTER);
    let e = e.expect_err("one too many").to_string();
    assert!(e.contains("disks with a reserve"), "{e}");
    assert_eq!(pool.superblock().pool_len(), now, "nothing was changed");
    assert_eq!(u64::from(pool.space.reservable()), spare);
    pool.resize(now - spare / 2 * CLUSTER)
        .expect("what is nobody's");
}

/// What is promised, in clusters, is there.
fn is_covered(pool: &Pool) -> bool {
    let usage = pool.space.usage();
    usage.clean + usage.written >= usage.reserved
}

/// What a disk has to itself counts for its reserve; shared with a snapshot, or rolled back to when it
/// had nothing, it is owed all of it again, before what it had comes back.
#[test]
fn a_rollback_promises_no_space_that_is_not_there() {
    let (_storage, pool) = fresh();
    let new = NewDisk {
        reserve: Some(100 * CLUSTER),
        ..NewDisk::empty("kept", LEN)
    };
    let kept = create(&pool, &new);
    cowdisk::snapshot(&pool, "kept", "empty").expect("snapshots");
    for cluster in 0..100 {
        kept.write_at(&bytes(2, CLUSTER), cluster * CLUSTER)
            .expect("it is reserved");
    }
    drop(kept);
    fill(&create(&pool, &NewDisk::empty("greedy", 2 * POOL_LEN)));
    assert!(is_covered(&pool));
    // The snapshot would share what the disk had to itself, and the rollback does away with it.
    for refused in [
        cowdisk::snapshot(&pool, "kept", "full"),
        cowdisk::fork(&pool, "kept", &["fork".to_owned()]),
        cowdisk::rollback(&pool, "kept@empty"),
    ] {
        assert!(is_covered(&pool), "nothing is free, and all is promised");
        let e = refused.expect_err("there is no space for its reserve");
        assert!(e.to_string().contains("cannot be reserved"), "{e}");
        pool.check_accounts().expect("as they were");
    }
    let kept = Disk::open(&pool, "kept").expect("opens");
    assert_eq!(read(&kept, 0, SUB), bytes(2, SUB), "it is as it was");
    drop(kept);
    let none = Settings {
        reserve: Some(None),
        ..Settings::default()
    };
    cowdisk::set(&pool, "kept", &none).expect("gives the reserve up");
    cowdisk::rollback(&pool, "kept@empty").expect("rolls back without");
    let kept = Disk::open(&pool, "kept").expect("opens");
    assert_eq!(read(&kept, 0, SUB), bytes(0, SUB));
}

/// Whether there was space for a reserve was found in one step, and the reserve made in the next: a
/// write between the two took of it.
#[test]
fn a_reserve_is_found_and_made_in_one_step() {
    let (_storage, pool) = fresh();
    drop(create(&pool, &NewDisk::empty("d", LEN)));
    let is_over = Arc::new(AtomicBool::new(false));
    let taker = {
        let (pool, is_over) = (Arc::clone(&pool), Arc::clone(&is_over));
        let take_and_give_back = move || {
            while !is_over.load(Ordering::SeqCst) {
                if let Ok(taken) = pool.space.take(16, Purpose::Data) {
                    std::thread::yield_now();
                    pool.space.give_back(taken.clusters, true).wake();
                }
            }
        };
        spawn_named("taker", take_and_give_back).expect("a thread")
    };
    let mut made = 0;
    for _ in 0..40_000 {
        let reserve = u64::from(pool.space.reservable()) * CLUSTER;
        let set = |reserve| {
            let settings = Settings {
                reserve: Some(reserve),
                ..Settings::default()
            };
            cowdisk::set(&pool, "d", &settings)
        };
        if set(Some(reserve)).is_ok() {
            made += 1;
            assert!(is_covered(&pool), "a reserve of {reserve} bytes");
            set(None).expect("gives it up");
        }
    }
    is_over.store(true, Ordering::SeqCst);
    taker.join().expect("no panic");
    assert!(made > 0, "some were made");
}

/// Whoever takes a snapshot of temporary data wants to keep that.
#[test]
fn a_snapshot_of_an_ephemeral_disk_is_kept_and_so_are_its_forks() {
    let (_storage, pool) = fresh();
    let scratch = NewDisk {
        is_ephemeral: true,
        ..NewDisk::empty("scratch", LEN)
    };
    drop(create(&pool, &scratch));
    cowdisk::snapshot(&pool, "scratch", "s").expect("snapshots");
    cowdisk::fork(&pool, "scratch", &["other".to_owned()]).expect("forks");
    cowdisk::fork(&pool, "scratch@s", &["kept".to_owned()]).expect("forks");
    let is_ephemeral = |name| pool.find(name).expect("there").row.is_ephemeral;
    let found = ["scratch", "other", "scratch@s", "kept"].map(is_ephemeral);
    assert_eq!(found, [true, true, false, false]);
}

/// After a commit a child counts from there, and is owed its whole reserve again.
#[test]
fn a_commit_promises_no_space_that_is_not_there() {
    let (_storage, pool) = fresh();
    drop(create(&pool, &NewDisk::empty("parent", LEN)));
    cowdisk::fork(&pool, "parent", &["child".to_owned()]).expect("forks");
    let reserve = Settings {
        reserve: Some(Some(100 * CLUSTER)),
        ..Settings::default()
    };
    cowdisk::set(&pool, "child", &reserve).expect("there is space");
    let child = Disk::open(&pool, "child").expect("opens");
    for cluster in 0..100 {
        child
            .write_at(&bytes(1, SUB), cluster * CLUSTER)
            .expect("it is reserved");
    }
    let before = pool.space.usage().reserved;
    cowdisk::commit(&pool, "child").expect("commits");
    assert_eq!(pool.space.usage().reserved, before + 100);
    fill(&create(&pool, &NewDisk::empty("greedy", 2 * POOL_LEN)));
    assert!(is_covered(&pool));
    for cluster in 0..100 {
        child
            .write_at(&bytes(2, SUB), (100 + cluster) * CLUSTER)
            .expect("it is reserved");
    }
}

/// A fork begins without its origin's limit and reserve; what is set stays after opening again.
#[test]
fn settings_are_of_one_disk() {
    let (storage, pool) = fresh();
    let new = NewDisk {
        limit: Some(10 * SUB),
        reserve: Some(CLUSTER),
        ..NewDisk::empty("d", LEN)
    };
    drop(create(&pool, &new));
    cowdisk::fork(&pool, "d", &["fork".to_owned()]).expect("forks");
    let settings = |pool: &Pool, name: &str| {
        let row = pool.find(name).expect("there").row;
        (row.limit, row.reserve, row.is_ephemeral)
    };
    assert_eq!(settings(&pool, "d"), (Some(10 * SUB), Some(CLUSTER), false));
    assert_eq!(settings(&pool, "fork"), (None, None, false));
    let other = Settings {
        limit: Some(Some(20 * SUB)),
        reserve: Some(None),
        is_ephemeral: Some(true),
    };
    cowdisk::set(&pool, "fork", &other).expect("sets");
    cowdisk::set(&pool, "fork", &Settings::default()).expect("leaves all as it is");
    let later = opened(&Arc::new(storage.crash_all_lost()));
    for pool in [&pool, &later] {
        assert_eq!(settings(pool, "fork"), (Some(20 * SUB), None, true));
    }
}

#[test]
fn all_that_is_free_can_be_reserved_and_no_more() {
    let (_storage, pool) = fresh();
    drop(create(&pool, &NewDisk::empty("d", LEN)));
    let most = u64::from(pool.space.reservable());
    let set = |clusters: u64| {
        let settings = Settings {
            reserve: Some(Some(clusters * CLUSTER)),
            ..Settings::default()
        };
        cowdisk::set(&pool, "d", &settings)
    };
    set(most + 1).expect_err("there is no more");
    set(most).expect("it is free");
}

/// A limit counted what a fork had inherited, once its origin was gone.
#[test]
fn what_was_inherited_never_counts() {
    for is_removed in [false, true] {
        let (storage, pool) = fresh();
        let p = create(&pool, &NewDisk::empty("p", LEN));
        for cluster in 0..4 {
            p.write_at(&bytes(1, CLUSTER), cluster * CLUSTER)
                .expect("writes");
        }
        drop(p);
        cowdisk::fork(&pool, "p", &["c".to_owned()]).expect("forks");
        let limit = Settings {
            limit: Some(Some(6 * SUB)),
            ..Settings::default()
        };
        cowdisk::set(&pool, "c", &limit).expect("sets");
        if is_removed {
            cowdisk::remove(&pool, "p", false).expect("removes");
            pool.reclaim().expect("reclaims");
        }
        let c = Disk::open(&pool, "c").expect("opens");
        for cluster in 0..4 {
            c.write_at(&bytes(2, SUB), cluster * CLUSTER)
                .expect("four of six");
        }
        c.write_at(&bytes(2, 2 * SUB), 10 * CLUSTER)
            .expect("six of six");
        refused(&c, 11 * CLUSTER);
        refused(&c, SUB);
        c.write_at(&bytes(3, SUB), CLUSTER)
            .expect("overwrites go on");
        pool.check_accounts().expect("exact");
        drop(c);
        pool.close().expect("closes");
        drop(pool);
        let pool = opened(&storage);
        pool.check_accounts().expect("exact");
        let c = Disk::open(&pool, "c").expect("opens");
        refused(&c, 11 * CLUSTER);
        assert_eq!(read(&c, SUB, SUB), bytes(1, SUB), "as it was inherited");
    }
}

/// What was discarded of a reserve was anybody's, and owed again after the next opening.
#[test]
fn what_is_discarded_is_reserved_again() {
    let (storage, pool) = fresh();
    let new = NewDisk {
        reserve: Some(100 * CLUSTER),
        ..NewDisk::empty("kept", LEN)
    };
    let kept = create(&pool, &new);
    let greedy = create(&pool, &NewDisk::empty("greedy", 2 * POOL_LEN));
    fill(&greedy);
    for round in 0..3 {
        for cluster in 0..100 {
            let written = kept.write_at(&bytes(round, CLUSTER), cluster * CLUSTER);
            written.unwrap_or_else(|e| panic!("cluster {cluster} of 100 reserved: {e}"));
        }
        kept.discard(0, 100 * CLUSTER).expect("discards");
        // Neither before it is free nor after.
        for is_free in [false, true] {
            if is_free {
                pool.reclaim().expect("reclaims");
                assert!(is_covered(&pool));
            }
            let e = greedy.write_at(&bytes(9, CLUSTER), POOL_LEN + 7 * CLUSTER);
            assert_eq!(e.expect_err("not its own").kind(), DiskErrorKind::NoSpace);
            pool.check_accounts().expect("exact");
        }
    }
    drop((kept, greedy));
    pool.close().expect("closes");
    drop(pool);
    let pool = opened(&storage);
    assert!(is_covered(&pool));
    pool.check_accounts().expect("exact");
}

/// Requests that copy first did not count before their copies were done: as many as were in flight
/// at once passed a limit.
#[test]
fn a_limit_holds_for_requests_in_flight() {
    for is_over_data in [false, true] {
        let (_storage, pool) = fresh();
        let p = create(&pool, &NewDisk::empty("p", LEN));
        if is_over_data {
            for cluster in 0..200 {
                // So that a write to the fork's fork merges.
                p.write_at(&bytes(1, 8 * SUB), cluster * CLUSTER)
                    .expect("writes");
            }
        }
        cowdisk::fork(&pool, "p", &["d".to_owned()]).expect("forks");
        let limit = Settings {
            limit: Some(Some(16 * SUB)),
            ..Settings::default()
        };
        cowdisk::set(&pool, "d", &limit).expect("sets");
        let d = Disk::open(&pool, "d").expect("opens");
        let mut jobs = Vec::new();
        let mut ready = Vec::new();
        for cluster in 0..200 {
            let pass = common::enter(&d);
            let mut plan = WritePlan::default();
            let len = if cluster % 2 == 0 { 512 } else { 1024 };
            let step = d.plan_write(&pass, cluster * CLUSTER, len, &mut plan, Waker::noop());
            match step {
                Ok(Step::Copy(job)) => jobs.push((cluster, pass, job)),
                Ok(Step::Ready) => ready.push((pass, plan)),
                Ok(other) => panic!("{other:?}"),
                Err(e) => assert_eq!(e.kind(), DiskErrorKind::LimitReached, "{e}"),
            }
        }
        assert!(!jobs.is_empty(), "small writes are copied first");
        assert_eq!(jobs.len() + ready.len(), 16, "a block each");
        for (n, (pass, mut plan)) in ready.into_iter().enumerate() {
            // One fails, which makes room again.
            d.complete_write(&mut plan, n > 0);
            drop(pass);
        }
        for (_, pass, job) in jobs {
            d.run_copy(job).expect("copies");
            drop(pass);
        }
        pool.check_accounts().expect("exact");
        let free = (300..400).map(|cluster| d.write_at(&bytes(4, SUB), cluster * CLUSTER));
        let accepted = free.filter(Result::is_ok).count();
        assert_eq!(accepted, 1, "the one that failed");
        pool.check_accounts().expect("exact");
    }
}
