//! Goal: the space a disk is said to use, share and give back is what it uses, shares and gives
//! back.
//!
//! Method: random families of disks, snapshots and forks with random writes and discards; then they
//! are deleted one by one in random order. Each deletion frees exactly what was `unique` to it, and
//! the last one leaves nothing used. For a disk alone, what is not reclaimable is its data.
//! `TIDEPOOL_SEED` replays one family.

mod common;

use common::{CLUSTER, Random, SUB, disk, fresh};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, DiskUsage, ExtentKind, PoolUsage};
use tidepool::pool::Pool;
use tidepool::storage::Storage;

const DISK_LEN: u64 = 64 * CLUSTER;

fn names(pool: &Arc<Pool>) -> Vec<String> {
    pool.items().into_iter().map(|item| item.row.name).collect()
}

fn scribble(random: &mut Random, disk: &Disk) {
    for _ in 0..1 + random.below(20) {
        let sectors = DISK_LEN / 512;
        let offset = random.below(sectors);
        let len = (1 + random.below(3 * CLUSTER / 512)).min(sectors - offset) * 512;
        if random.below(4) == 0 {
            disk.discard(offset * 512, len).expect("in range");
        } else {
            let byte = u8::try_from(random.below(255)).expect("a byte") + 1;
            let data = vec![byte; usize::try_from(len).expect("small")];
            disk.write_at(&data, offset * 512).expect("there is space");
        }
    }
}

fn family(random: &mut Random, pool: &Arc<Pool>) {
    scribble(random, &disk(pool, "d0", DISK_LEN));
    for number in 1..=2 + random.below(8) {
        let all = names(pool);
        let from = &all[usize::try_from(random.below(all.len() as u64)).expect("small")];
        if random.below(3) == 0 && !from.contains('@') {
            cowdisk::snapshot(pool, from, &format!("s{number}")).expect("a snapshot");
        } else {
            let fork = format!("d{number}");
            cowdisk::fork(pool, from, std::slice::from_ref(&fork)).expect("a fork");
        }
        for name in names(pool).iter().filter(|name| !name.contains('@')) {
            if random.below(3) == 0 {
                scribble(random, &Disk::open(pool, name).expect("opens"));
            }
        }
    }
}

fn of(usage: &PoolUsage, name: &str) -> DiskUsage {
    let found = usage.disks.iter().find(|(item, _)| item.row.name == name);
    found.expect("a disk of the pool").1
}

fn check_sums(usage: &PoolUsage) {
    assert_eq!(usage.capacity, usage.metadata + usage.used + usage.free);
    let unique: u64 = usage.disks.iter().map(|(_, disk)| disk.unique).sum();
    let used: u64 = usage.disks.iter().map(|(_, disk)| disk.used).sum();
    assert!(unique <= usage.used && usage.used <= used);
    for (_, disk) in &usage.disks {
        assert_eq!(disk.used, disk.unique + disk.shared);
        assert!(disk.reclaimable <= disk.unique);
    }
}

#[test]
fn deleting_a_disk_gives_back_what_was_unique_to_it() {
    let seeds = match std::env::var("TIDEPOOL_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => (0..60).collect(),
    };
    for seed in seeds {
        println!("TIDEPOOL_SEED={seed}");
        let mut random = Random(seed);
        let (_, pool) = fresh();
        family(&mut random, &pool);
        let mut usage = cowdisk::usage(&pool).expect("measures");
        check_sums(&usage);
        while !usage.disks.is_empty() {
            let all = names(&pool);
            let can_go: Vec<&String> = all
                .iter()
                .filter(|name| {
                    !all.iter()
                        .any(|other| other.starts_with(&format!("{name}@")))
                })
                .collect();
            let name = can_go[usize::try_from(random.below(can_go.len() as u64)).expect("small")];
            let unique = of(&usage, name).unique;
            cowdisk::remove(&pool, name, false).expect("nothing depends on it");
            let after = cowdisk::usage(&pool).expect("measures");
            check_sums(&after);
            assert_eq!(usage.used - after.used, unique, "deleting {name}");
            // A checkpoint image may have been written meanwhile; the rest is free.
            assert_eq!(
                after.free + after.metadata,
                usage.free + usage.metadata + unique,
                "deleting {name}"
            );
            usage = after;
        }
        assert_eq!(usage.used, 0, "nothing is left");
    }
}

#[test]
fn what_is_not_reclaimable_is_data() {
    for seed in 0..40 {
        println!("TIDEPOOL_SEED={seed}");
        let (_, pool) = fresh();
        let alone = disk(&pool, "alone", DISK_LEN);
        scribble(&mut Random(seed), &alone);
        let extents = alone.extents().expect("is there");
        let data = extents
            .iter()
            .filter(|e| matches!(e.kind, ExtentKind::Data(_)));
        let data: u64 = data.map(|extent| extent.len).sum();
        let usage = of(&cowdisk::usage(&pool).expect("measures"), "alone");
        assert_eq!(data % SUB, 0);
        assert_eq!(usage.used - usage.reclaimable, data);
        assert_eq!(usage.shared, 0);
    }
}

/// While a checkpoint image is written it holds the maps too; that makes nothing shared.
#[test]
fn a_map_that_is_being_looked_at_is_still_of_one_disk() {
    let (_, pool) = fresh();
    let d = disk(&pool, "d", DISK_LEN);
    d.write_at(&common::bytes(1, 3 * CLUSTER), 0)
        .expect("writes");
    let usage = || of(&cowdisk::usage(&pool).expect("measures"), "d");
    let before = usage();
    assert_eq!((before.unique, before.shared), (3 * CLUSTER, 0));
    let frozen = pool
        .find("d")
        .expect("there")
        .volume
        .map
        .read()
        .tree
        .clone();
    assert_eq!(usage(), before);
    drop(frozen);
}

#[test]
fn zeros_keep_nothing_beneath_them() {
    let (_, pool) = fresh();
    let parent = disk(&pool, "parent", CLUSTER);
    parent
        .write_at(&common::bytes(1, CLUSTER), 0)
        .expect("writes");
    drop(parent);
    cowdisk::fork(&pool, "parent", &["fork".to_owned()]).expect("forks");
    let fork = Disk::open(&pool, "fork").expect("there");
    fork.write_at(&common::bytes(2, SUB), 0).expect("writes");
    fork.write_zeroes(0, CLUSTER, false).expect("zeroes");
    cowdisk::remove(&pool, "parent", false).expect("removes");
    let usage = cowdisk::usage(&pool).expect("measures");
    assert_eq!(usage.used, CLUSTER, "its own cluster, kept allocated");
}

/// Neither less than what was freed goes back to the host, nor a neighbour's data.
#[test]
fn what_was_freed_goes_back_to_the_host_and_nothing_else() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", DISK_LEN);
    let all = common::bytes(1, DISK_LEN);
    d.write_at(&all, 0).expect("writes");
    d.discard(10 * CLUSTER, 20 * CLUSTER).expect("discards");
    d.flush().expect("flushes");
    while pool.reap(usize::MAX) {}
    let before = storage.allocated().expect("told");
    assert_eq!(pool.punch_written(u32::MAX).expect("punches"), 20);
    let after = storage.allocated().expect("told");
    assert_eq!(before - after, 20 * CLUSTER);
    let [first, last] = [(0, 10), (30, 34)].map(|(at, len)| {
        let found = common::read(&d, at * CLUSTER, len * CLUSTER);
        found == common::bytes(1, len * CLUSTER)
    });
    assert!(first && last);
}
