//! What a repair or a restore gives up is not lost for that: it writes over nothing that anything named,
//! and what it took out of force can be put back.

use super::common::{CLUSTER, POOL_LEN, bytes, disk, empty, opened, read};
use super::planted::{batches, contents, copy, sample, superblock};
use super::repair::{goes_on, maps};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk};
use tidepool::format::journal::Entry;
use tidepool::format::units::Lcn;
use tidepool::pool::PoolError;
use tidepool::pool::check::check;
use tidepool::pool::dump::dump;
use tidepool::pool::kept::KEPT_PREFIX;
use tidepool::pool::repair::repair;
use tidepool::pool::restore::{Dump, Restored, Unknown};
use tidepool::pool::space::Purpose;
use tidepool::pool::undo::undo;
use tidepool::storage::{SimStorage, Storage};

const DISKS: [&str; 6] = ["d1", "d2", "d3", "d4", "d5", "d6"];
const LEN: u64 = 5 * CLUSTER;

fn value(n: usize) -> u8 {
    u8::try_from(n + 1).expect("small")
}

fn mend(storage: &Arc<SimStorage>) {
    repair(&(Arc::clone(storage) as Arc<dyn Storage>)).expect("mends");
    assert_eq!(check(&**storage).expect("reads").faults, []);
}

fn dumped(storage: &SimStorage) -> Vec<String> {
    let mut lines = Vec::new();
    dump(storage, &mut |line| lines.push(line.to_string())).expect("dumps");
    lines
}

fn restore(
    storage: &Arc<SimStorage>,
    lines: &[String],
    unknown: Unknown,
) -> Result<Restored, PoolError> {
    let mut dump = Dump::default();
    lines.iter().try_for_each(|line| dump.line(line))?;
    dump.restore(&(Arc::clone(storage) as Arc<dyn Storage>), unknown)
}

/// Six disks, a batch or two each, closed.
fn six_disks() -> Arc<SimStorage> {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    for (n, name) in DISKS.iter().enumerate() {
        let one = disk(&pool, name, LEN);
        one.write_at(&bytes(value(n), LEN), 0).expect("writes");
        one.flush().expect("flushes");
    }
    pool.close().expect("closes");
    storage
}

/// A bit of batch number `n` flipped.
fn damaged(storage: &SimStorage, n: usize) -> Arc<SimStorage> {
    let bad = copy(storage);
    let (at, ..) = batches(storage)[n];
    let mut block = vec![0; 4096];
    bad.read_at(&mut block, at).expect("reads");
    block[70] ^= 1;
    bad.write_durable_at(&block, at).expect("writes");
    bad
}

fn are_all_there(storage: &Arc<SimStorage>, what: &str) {
    let pool = opened(storage);
    for (n, name) in DISKS.iter().enumerate() {
        let one = Disk::open(&pool, name).expect("there");
        assert!(
            read(&one, 0, LEN) == bytes(value(n), LEN),
            "{what}: `{name}`"
        );
    }
}

/// The new image went into clusters of the disks that were given up, and the rest was punched.
#[test]
fn a_dump_is_restored_after_a_repair_as_before_it() {
    let storage = six_disks();
    let lines = dumped(&storage);
    for n in 0..batches(&storage).len() {
        let bad = damaged(&storage, n);
        let at_once = copy(&bad);
        restore(&at_once, &lines, Unknown::Refused).expect("nothing came after the dump");
        are_all_there(&at_once, "at once");
        mend(&bad);
        let kept = maps_of_kept(&bad);
        let restored = restore(&bad, &lines, Unknown::Refused).expect("nobody has written since");
        assert_eq!(restored.lost, [], "batch {n}");
        are_all_there(&bad, &format!("batch {n}, {kept} clusters kept"));
        goes_on(&bad, "restored");
    }
}

/// Clusters that repairs have kept.
fn maps_of_kept(storage: &SimStorage) -> u64 {
    let mut count = 0;
    let mut add = |line: &serde_json::Value| {
        let is_kept = line["disk"]
            .as_str()
            .is_some_and(|disk| disk.starts_with(KEPT_PREFIX));
        if line["kind"] == "map" && is_kept {
            count += line["count"].as_u64().expect("a number");
        }
    };
    dump(storage, &mut add).expect("dumps");
    count
}

/// What was given up is nobody else's until it is removed: a pool that is filled to the last cluster
/// after the repair leaves it as it is.
#[test]
fn what_is_given_up_is_kept_until_it_is_removed() {
    let storage = six_disks();
    let lines = dumped(&storage);
    let bad = damaged(&storage, 4);
    mend(&bad);
    let kept = maps_of_kept(&bad);
    assert!(kept >= 4 * 5, "{kept} clusters");
    let report = check(&*bad).expect("reads");
    let said = report
        .remarks
        .iter()
        .any(|line| line.contains("lost+found@1"));
    assert!(said, "{:?}", report.remarks);
    let pool = opened(&bad);
    let filler = disk(&pool, "filler", 1000 * CLUSTER);
    let is_full = (0..1000).any(|n| filler.write_at(&bytes(99, CLUSTER), n * CLUSTER).is_err());
    assert!(is_full, "the pool has fewer clusters");
    filler.flush().expect("flushes");
    drop(filler);
    cowdisk::remove(&pool, "filler", false).expect("removes");
    pool.close().expect("closes");
    drop(pool);
    let later = copy(&bad);
    let refused = restore(&bad, &lines, Unknown::Refused).expect_err("who wrote what?");
    assert!(refused.to_string().contains("repaired since"), "{refused}");
    restore(&bad, &lines, Unknown::Accepted).expect("as is said");
    are_all_there(&bad, "accepted");
    let pool = opened(&later);
    let free = |pool: &tidepool::pool::Pool| pool.space.usage().clean + pool.space.usage().written;
    let before = u64::from(free(&pool));
    cowdisk::remove(&pool, "lost+found@1", false).expect("removes");
    pool.reclaim().expect("reclaims");
    assert_eq!(u64::from(free(&pool)), before + kept);
}

#[test]
fn a_repair_is_taken_back() {
    let storage = sample();
    let mut cases: Vec<Arc<SimStorage>> = [1, 4, 6].map(|n| damaged(&storage, n)).into();
    let one_copy = copy(&storage);
    one_copy
        .write_durable_at(&[7; 4096], 1 << 20)
        .expect("writes");
    cases.push(one_copy);
    for bad in cases {
        let before = (
            contents(&bad),
            maps(&bad),
            check(&*bad).expect("reads").faults,
        );
        undo(&*bad).expect_err("there was no repair");
        mend(&bad);
        mend(&bad);
        let repaired = copy(&bad);
        // Interrupted at any moment, and done by the next.
        for cut in 0.. {
            let again = copy(&repaired);
            again.cut_power_at(cut);
            let is_done = undo(&*again).is_ok();
            for left in [again.crash_all_lost(), again.crash(cut)] {
                let left = Arc::new(left);
                drop(undo(&*left));
                assert_eq!(
                    check(&*left).expect("reads").faults,
                    before.2,
                    "cut at {cut}"
                );
                assert!(maps(&left) == before.1, "cut at {cut}");
            }
            if is_done {
                break;
            }
        }
        undo(&*bad).expect("nobody wrote since");
        let now = contents(&bad);
        for at in [0_usize, 1 << 20] {
            assert!(
                now[at..at + 4096] == before.0[at..at + 4096],
                "superblock at {at}"
            );
        }
        let end = usize::try_from(superblock(&storage).metadata_end()).expect("small");
        assert!(now[2 << 20..end] == before.0[2 << 20..end], "the journal");
        mend(&bad);
        drop(opened(&bad));
        let refused = undo(&*bad).expect_err("it was opened for writing");
        assert!(
            refused.to_string().contains("opened for writing"),
            "{refused}"
        );
    }
}

/// All that is free was somebody's: the pool grows for its new metadata.
#[test]
fn a_repair_finds_room_where_nothing_ever_was() {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    let a = disk(&pool, "a", 1000 * CLUSTER);
    let mut count = 0;
    while a.write_at(&bytes(3, CLUSTER), count * CLUSTER).is_ok() {
        count += 1;
        if count.is_multiple_of(200) {
            a.flush().expect("flushes");
        }
    }
    a.flush().expect("flushes");
    // What is kept for images was somebody's, too.
    while let Ok(taken) = pool.space.take(u32::MAX, Purpose::Image) {
        let lcns = (count..).zip(taken.clusters);
        for (lcn, own) in lcns {
            let entry = Entry {
                own,
                alloc: u16::MAX,
                birth: 1,
                ..Entry::default()
            };
            let volume = pool.find("a").expect("there").volume;
            let mut map = volume.map.write();
            map.set(
                &pool.space,
                Lcn(u32::try_from(lcn).expect("small")),
                entry,
                pool.generation(),
            );
            pool.list_changes(&volume, &mut map);
            count += 1;
        }
    }
    a.flush().expect("flushes");
    drop((a, pool));
    let bad = damaged(&Arc::new(storage.crash_all_kept()), 2);
    let before = contents(&bad);
    mend(&bad);
    assert!(superblock(&bad).pool_len() > POOL_LEN, "there was room");
    let after = contents(&bad);
    let data = usize::try_from(superblock(&bad).metadata_end()).expect("small");
    assert!(
        after[data..before.len()] == before[data..],
        "data was written over"
    );
    goes_on(&copy(&bad), "grown");
    undo(&*bad).expect("puts back");
    assert_eq!(superblock(&bad).pool_len(), POOL_LEN);
}

/// Numbers of disks that were given up are not given to others, whose data a later restore would show.
#[test]
fn a_disk_given_up_leaves_its_number() {
    let storage = six_disks();
    let bad = damaged(&storage, 4);
    mend(&bad);
    let pool = opened(&bad);
    drop(disk(&pool, "new", CLUSTER));
    let id = pool.find("new").expect("there").row.id;
    assert!(id.0 > 6, "{id}");
}
