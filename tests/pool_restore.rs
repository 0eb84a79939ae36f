//! Goal: a pool restored from its dump has the disks of the dump, whatever had become of its
//! metadata; a bad dump changes nothing; an interrupted restore is done by the next.
//!
//! Method: small pools on the simulated disk; the metadata is wiped, cut off or left as it is.

mod common;

use common::{CLUSTER, POOL_LEN, SUB, bytes, disk, fresh, opened, read};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk};
use tidepool::format::units::ClusterSize;
use tidepool::pool::check::check;
use tidepool::pool::dump::dump;
use tidepool::pool::load::read_superblock;
use tidepool::pool::restore::{Dump, Restored, Unknown};
use tidepool::pool::undo::undo;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, PoolError, open};
use tidepool::storage::{SimStorage, Storage};

const LEN: u64 = 200 * CLUSTER;

fn dumped(storage: &dyn Storage) -> Vec<String> {
    let mut lines = Vec::new();
    dump(storage, &mut |line| lines.push(line.to_string())).expect("whole");
    lines
}

fn parsed(lines: &[String]) -> Result<Dump, PoolError> {
    let mut dump = Dump::default();
    lines.iter().try_for_each(|line| dump.line(line))?;
    Ok(dump)
}

fn restore(storage: &Arc<SimStorage>, lines: &[String]) -> Result<usize, PoolError> {
    let store: Arc<dyn Storage> = Arc::clone(storage) as Arc<dyn Storage>;
    // What is wiped says nothing of who has had the clusters since.
    let is_wiped = read_superblock(&*store).is_err();
    let unknown = if is_wiped {
        Unknown::Accepted
    } else {
        Unknown::Refused
    };
    Ok(parsed(lines)?.restore(&store, unknown)?.disks)
}

/// Forks of forks, a snapshot, zeros, discards, and a partial cluster; closed.
fn sample() -> (Arc<SimStorage>, Vec<(String, Vec<u8>)>) {
    let (storage, pool) = fresh();
    let a = disk(&pool, "a", LEN);
    a.write_at(&bytes(1, 100 * CLUSTER), 0).expect("writes");
    cowdisk::fork(&pool, "a", &["b".to_owned(), "c".to_owned()]).expect("forks");
    let b = Disk::open(&pool, "b").expect("there");
    b.write_at(&bytes(2, 3 * SUB), 7 * CLUSTER + 5 * SUB)
        .expect("writes");
    b.discard(20 * CLUSTER, 70 * CLUSTER).expect("discards");
    a.write_zeroes(SUB, 4 * SUB, true).expect("zeroes");
    drop(b);
    cowdisk::snapshot(&pool, "b", "s").expect("snapshots");
    cowdisk::fork(&pool, "b", &["d".to_owned()]).expect("forks");
    let d = Disk::open(&pool, "d").expect("there");
    d.write_at(&bytes(4, CLUSTER), 150 * CLUSTER)
        .expect("writes");
    drop((a, d));
    let contents = contents(&pool);
    pool.close().expect("closes");
    (storage, contents)
}

fn contents(pool: &Arc<Pool>) -> Vec<(String, Vec<u8>)> {
    let names = pool.items().into_iter().map(|item| item.row.name);
    let content = |name: String| {
        let disk = Disk::open(pool, &name).expect("there");
        let all = read(&disk, 0, LEN);
        (name, all)
    };
    names.map(content).collect()
}

/// Everything before the data area, gone.
fn wipe(storage: &SimStorage, lines: &[String]) {
    let superblock: serde_json::Value = serde_json::from_str(&lines[0]).expect("JSON");
    let end = superblock["journal_half"][1].as_u64().expect("a number")
        + superblock["journal_half_len"].as_u64().expect("a number");
    storage.write_at(&bytes(0xff, end), 0).expect("writes");
    storage.flush().expect("flushes");
}

/// The lines about disks: what a restore must bring back.
fn of_disks(lines: &[String]) -> Vec<&String> {
    let of_a_disk =
        |line: &&String| line.contains("\"kind\":\"disk\"") || line.contains("\"kind\":\"map\"");
    lines.iter().filter(of_a_disk).collect()
}

#[test]
fn a_wiped_pool_comes_back_from_its_dump() {
    let (storage, before) = sample();
    let lines = dumped(&*storage);
    let used = check(&*storage).expect("works").used_clusters;
    wipe(&storage, &lines);
    assert!(!check(&*storage).expect("works").faults.is_empty());
    assert_eq!(
        restore(&storage, &lines).map_err(|e| e.to_string()),
        Ok(before.len())
    );
    let report = check(&*storage).expect("works");
    assert_eq!(
        (report.faults.len(), report.used_clusters, report.is_clean),
        (0, used, true)
    );
    assert_eq!(of_disks(&dumped(&*storage)), of_disks(&lines));
    let refused = undo(&*storage).expect_err("there were no superblocks");
    assert!(
        refused.to_string().contains("nothing to put back"),
        "{refused}"
    );
    let pool = opened(&storage);
    assert!(contents(&pool) == before, "contents");
    // And it is a pool like any other: what is written now stays apart.
    let a = Disk::open(&pool, "a").expect("there");
    a.write_at(&bytes(9, LEN), 0).expect("writes");
    let after = contents(&pool);
    for ((name, now), (_, then)) in after.iter().zip(&before) {
        assert!((name == "a") != (now == then), "{name}");
    }
    drop((a, pool));
    opened(&Arc::new(storage.crash_all_kept()))
        .close()
        .expect("closes");
}

#[test]
fn a_pool_that_went_on_goes_back_to_the_dump() {
    let (storage, before) = sample();
    let lines = dumped(&*storage);
    let pool = opened(&storage);
    for n in 0..40 {
        disk(&pool, &format!("new{n}"), CLUSTER)
            .flush()
            .expect("flushes");
    }
    drop(pool);
    assert_eq!(
        restore(&storage, &lines).map_err(|e| e.to_string()),
        Ok(before.len())
    );
    let pool = opened(&storage);
    assert!(contents(&pool) == before, "nothing was written over since");
}

#[test]
fn an_interrupted_restore_is_done_by_the_next() {
    let (storage, before) = sample();
    let lines = dumped(&*storage);
    wipe(&storage, &lines);
    let whole = storage.crash_all_kept();
    let started = whole.counters().changes();
    restore(&Arc::new(whole), &lines).expect("restores");
    assert_eq!(started, 0);
    let mut cuts = 0;
    for cut in 0.. {
        let store = Arc::new(storage.crash_all_kept());
        store.cut_power_at(cut);
        if restore_with(&store, &lines, Unknown::Accepted).is_ok() {
            break;
        }
        cuts += 1;
        for image in [
            store.crash_all_lost(),
            store.crash(cut),
            store.crash_all_kept(),
        ] {
            let image = Arc::new(image);
            restore_with(&image, &lines, Unknown::Accepted).expect("restores");
            assert!(contents(&opened(&image)) == before, "cut at {cut}");
        }
    }
    assert!(cuts > 5, "{cuts} moments to stop at");
}

#[test]
fn a_bad_dump_is_refused_and_changes_nothing() {
    let (storage, _) = sample();
    let lines = dumped(&*storage);
    let map = lines
        .iter()
        .position(|line| line.contains("\"kind\":\"map\""))
        .expect("one");
    let disk = lines
        .iter()
        .position(|line| line.contains("\"kind\":\"disk\""))
        .expect("one");
    let with = |at: usize, from: &str, to: &str| {
        let mut lines = lines.clone();
        assert!(lines[at].contains(from), "{from} in {}", lines[at]);
        lines[at] = lines[at].replace(from, to);
        lines
    };
    let own = lines[map]
        .split("\"own\":")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .expect("one");
    let own = format!("\"own\":{own},");
    let cases = [
        ("cut off", lines[..lines.len() - 1].to_vec()),
        ("goes on", [&lines[..], &lines[..1]].concat()),
        ("no superblock", lines[2..].to_vec()),
        ("no JSON", vec!["tidepool".to_owned()]),
        ("kind", vec!["{\"kind\":\"pool\"}".to_owned()]),
        ("disk twice", [&lines[..=disk], &lines[disk..]].concat()),
        ("disk unknown", with(map, "\"disk\":\"", "\"disk\":\"x")),
        ("metadata area", with(map, &own, "\"own\":1,")),
        ("beyond the pool", with(map, &own, "\"own\":4294967200,")),
        ("beyond the disk", with(map, "\"lcn\":", "\"lcn\":4000000")),
        ("many", with(map, "\"count\":", "\"count\":4294967")),
        ("name", with(disk, "\"name\":\"", "\"name\":\"../")),
        ("born later", with(map, "\"birth\":", "\"birth\":99999")),
        (
            "generation",
            with(lines.len() - 1, "\"generation\":", "\"generation\":-"),
        ),
    ];
    let before = storage.counters().changes();
    for (what, lines) in cases {
        let refused = restore(&storage, &lines);
        assert!(refused.is_err(), "{what} passed");
        assert_eq!(
            storage.counters().changes(),
            before,
            "{what} changed something"
        );
    }
    assert!(check(&*storage).expect("works").faults.is_empty());
    let short = Arc::new(SimStorage::new(POOL_LEN / 2));
    let refused = restore(&short, &lines).map_err(|e| e.to_string());
    assert!(
        refused.is_err_and(|e| e.contains("bytes")),
        "too short a file"
    );
}

/// What one disk holds for all of its forks is held once again after a restore.
/// With a number that no superblock may have, the pool was lost by its own restore.
#[test]
fn a_dump_whose_numbers_are_used_up_is_refused_and_changes_nothing() {
    let (storage, _) = sample();
    let mut lines = dumped(&*storage);
    let end = lines.last_mut().expect("the end");
    let mut value: serde_json::Value = serde_json::from_str(end).expect("JSON");
    value["last_batch"] = (1_u64 << 62).into();
    *end = value.to_string();
    let changes = storage.counters().changes();
    let refused = restore(&storage, &lines).expect_err("refused");
    assert!(refused.to_string().contains("batch"), "{refused}");
    assert_eq!(storage.counters().changes(), changes);
}

#[test]
fn forks_share_their_maps_again() {
    let (storage, pool) = fresh();
    let a = disk(&pool, "a", LEN);
    a.write_at(&bytes(1, LEN), 0).expect("writes");
    let names: Vec<String> = (0..50).map(|n| format!("f{n}")).collect();
    cowdisk::fork(&pool, "a", &names).expect("forks");
    drop(a);
    pool.close().expect("closes");
    let lines = dumped(&*storage);
    restore(&storage, &lines).expect("restores");
    let pool = opened(&storage);
    let first = pool.find("a").expect("there").volume;
    for name in names {
        let fork = pool.find(&name).expect("there").volume;
        let (one, other) = (first.map.read(), fork.map.read());
        let leaf = |tree: &tidepool::pool::map::Tree| tree.leaf(1).map(Arc::as_ptr);
        assert_eq!(leaf(&one.tree), leaf(&other.tree), "{name}");
    }
}

#[test]
fn clusters_in_a_row_are_one_line() {
    let (storage, pool) = fresh();
    let d = disk(&pool, "d", LEN);
    d.write_at(&bytes(1, 100 * CLUSTER), 20 * CLUSTER)
        .expect("writes");
    d.discard(170 * CLUSTER, CLUSTER).expect("discards");
    drop(d);
    pool.close().expect("closes");
    let lines = dumped(&*storage);
    let maps = lines.iter().filter(|line| line.contains(r#""kind":"map""#));
    assert_eq!(maps.count(), 1, "{lines:?}");
}

/// A dump from which somebody took a disk: what is left of it is told.
#[test]
fn a_snapshot_without_its_disk_is_named() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "a", LEN));
    cowdisk::snapshot(&pool, "a", "s").expect("snapshots");
    pool.close().expect("closes");
    drop(pool);
    let mut lines = dumped(&*storage);
    let remarks = || check(&*storage).expect("reads").remarks;
    assert_eq!(remarks(), [""; 0]);
    lines.retain(|line| !line.contains(r#""name":"a""#));
    restore(&storage, &lines).expect("restores");
    let found = remarks();
    assert!(
        found.iter().any(|line| line.contains("`a@s` has no disk")),
        "{found:?}"
    );
}

/// A cluster that one disk of a dump had, and another has written since, is not shown to the first.
fn given_to_bob(snapshot: bool) -> (Arc<SimStorage>, Vec<String>) {
    let (storage, pool) = fresh();
    let alice = disk(&pool, "alice", LEN);
    alice.write_at(&bytes(1, 8 * CLUSTER), 0).expect("writes");
    drop(alice);
    if snapshot {
        cowdisk::snapshot(&pool, "alice", "s").expect("snapshots");
    }
    drop(disk(&pool, "carol", LEN));
    pool.close().expect("closes");
    drop(pool);
    let lines = dumped(&*storage);
    let pool = opened(&storage);
    match snapshot {
        // The snapshot stays, and holds what the disk had.
        true => {
            let alice = Disk::open(&pool, "alice").expect("there");
            alice.write_at(&bytes(2, 8 * CLUSTER), 0).expect("writes");
        }
        false => cowdisk::remove(&pool, "alice", false).expect("removes"),
    }
    pool.reclaim().expect("reclaims");
    let bob = disk(&pool, "bob", LEN);
    bob.write_at(&bytes(66, LEN), 0).expect("writes");
    drop(bob);
    drop(disk(&pool, "x", CLUSTER));
    pool.close().expect("closes");
    (storage, lines)
}

fn seen(storage: &Arc<SimStorage>, name: &str) -> Vec<u8> {
    let pool = opened(storage);
    read(&Disk::open(&pool, name).expect("there"), 0, LEN)
}

fn restore_with(
    storage: &Arc<SimStorage>,
    lines: &[String],
    unknown: Unknown,
) -> Result<Restored, PoolError> {
    let store: Arc<dyn Storage> = Arc::clone(storage) as Arc<dyn Storage>;
    parsed(lines)?.restore(&store, unknown)
}

#[test]
fn what_others_have_written_since_is_zeros_and_named() {
    let (storage, lines) = given_to_bob(false);
    let restored = restore_with(&storage, &lines, Unknown::Refused).expect("all is known");
    let [lost] = &restored.lost[..] else {
        panic!("{restored:?}")
    };
    assert_eq!(
        (&*lost.disk, lost.offset, lost.len),
        ("alice", 0, 8 * CLUSTER)
    );
    assert!(seen(&storage, "alice").iter().all(|byte| *byte == 0));
    assert!(check(&*storage).expect("works").faults.is_empty());
}

#[test]
fn what_a_snapshot_holds_still_comes_back() {
    let (storage, lines) = given_to_bob(true);
    let restored = restore_with(&storage, &lines, Unknown::Refused).expect("all is known");
    assert_eq!(restored.lost, []);
    for name in ["alice", "alice@s"] {
        let seen = seen(&storage, name);
        assert!(
            seen[..len(8 * CLUSTER)].iter().all(|byte| *byte == 1),
            "{name}"
        );
    }
}

fn len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("small")
}

/// With one batch of the time since damaged, a disk showed what another had written, and a check found
/// nothing.
#[test]
fn a_dump_is_not_restored_over_what_is_not_known() {
    let (storage, lines) = given_to_bob(false);
    let first = 2 << 20;
    let mut told = 0;
    for n in 0..12 {
        let bad = Arc::new(storage.crash_all_kept());
        let mut block = vec![0; 4096];
        bad.read_at(&mut block, first + n * 4096).expect("reads");
        if !block.starts_with(b"TPJB") {
            continue;
        }
        block[70] ^= 1;
        bad.write_durable_at(&block, first + n * 4096)
            .expect("writes");
        if check(&*bad).expect("reads").faults.is_empty() {
            continue;
        }
        let changes = bad.counters().changes();
        // Known where only batches before the dump are damaged.
        if let Err(refused) = restore_with(&bad, &lines, Unknown::Refused) {
            assert!(
                refused.to_string().contains("--accept-unknown"),
                "{refused}"
            );
            assert_eq!(bad.counters().changes(), changes);
            let restored = restore_with(&bad, &lines, Unknown::Accepted).expect("as is said");
            assert!(restored.why_unknown.is_some());
            if restored.lost.is_empty() {
                // The batch that cannot be read is the one that says that it is bob's.
                continue;
            }
            told += 1;
        }
        let seen = seen(&bad, "alice");
        assert!(seen.iter().all(|byte| *byte != 66), "batch {n}: foreign");
    }
    assert!(told > 0, "whose it is now is known in no case");
}

/// Clusters in a row, each with another beneath it: one line, and both count up.
#[test]
fn a_row_of_clusters_over_another_comes_back() {
    let (storage, pool) = fresh();
    let a = disk(&pool, "a", LEN);
    for n in 0..10 {
        a.write_at(&bytes(10 + n, CLUSTER), u64::from(n) * CLUSTER)
            .expect("writes");
    }
    cowdisk::fork(&pool, "a", &["b".to_owned()]).expect("forks");
    let b = Disk::open(&pool, "b").expect("there");
    for n in 0..10 {
        b.write_at(&bytes(1, SUB), n * CLUSTER).expect("writes");
    }
    drop((a, b));
    let before = contents(&pool);
    pool.close().expect("closes");
    drop(pool);
    let lines = dumped(&*storage);
    assert_eq!(of_disks(&lines).len(), 4, "two disks, a run each");
    restore(&storage, &lines).expect("restores");
    assert!(contents(&opened(&storage)) == before);
}

/// Of two superblocks, as a power cut between writing them leaves them, the newer counts.
#[test]
fn the_newer_superblock_of_a_dump_counts() {
    let (storage, pool) = fresh();
    pool.close().expect("closes");
    drop(pool);
    let older = dumped(&*storage).swap_remove(0);
    let pool = opened(&storage);
    pool.resize(2 * POOL_LEN).expect("grows");
    pool.close().expect("closes");
    drop(pool);
    let lines = dumped(&*storage);
    for at in [0, 1] {
        let mut lines = lines.clone();
        lines.insert(at, older.clone());
        restore(&storage, &lines).expect("restores");
        assert_eq!(opened(&storage).superblock().pool_len(), 2 * POOL_LEN);
    }
}

/// What another pool had may be written over by a restore in its place: that cannot be taken back. A
/// restore in the place of the same pool can.
#[test]
fn a_restore_is_taken_back_where_nothing_was_written_over() {
    let (storage, before) = sample();
    let lines = dumped(&*storage);
    let pool = opened(&storage);
    let new = disk(&pool, "new", LEN);
    new.write_at(&bytes(8, LEN), 0).expect("writes");
    drop(new);
    let later = contents(&pool);
    pool.close().expect("closes");
    drop(pool);
    restore_with(&storage, &lines, Unknown::Refused).expect("restores");
    assert!(contents(&read_only(&storage)) == before);
    undo(&*storage).expect("nobody wrote since");
    assert!(contents(&opened(&storage)) == later);
    // Those that tests make have one identity otherwise.
    let other = Arc::new(SimStorage::new(POOL_LEN));
    let cluster_size = ClusterSize::from_bytes(CLUSTER).expect("in range");
    let options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(POOL_LEN)
    };
    open::create(&*other, &options).expect("an empty pool");
    restore_with(&other, &lines, Unknown::Accepted).expect("as is said");
    let refused = undo(&*other).expect_err("another pool");
    assert!(
        refused.to_string().contains("nothing to put back"),
        "{refused}"
    );
}

fn read_only(storage: &Arc<SimStorage>) -> Arc<Pool> {
    let options = OpenOptions {
        is_read_only: true,
        ..OpenOptions::default()
    };
    Pool::open(Arc::clone(storage) as Arc<dyn Storage>, &options).expect("opens")
}

/// Five hundred forks of one disk, some of which differ here and there: a dump says what they share
/// once, and so does the image of what is restored.
#[test]
fn what_forks_share_is_dumped_once_and_shared_again() {
    let (storage, pool) = fresh();
    let origin = disk(&pool, "origin", 4 * LEN);
    for n in 0..64 {
        origin
            .write_at(&bytes(1, SUB), n * 3 * CLUSTER)
            .expect("writes");
    }
    drop(origin);
    let count = 500;
    let names: Vec<String> = (0..count).map(|n| format!("f{n}")).collect();
    cowdisk::fork(&pool, "origin", &names).expect("forks");
    for (n, name) in (0_u64..).zip(&names).step_by(50) {
        let fork = Disk::open(&pool, name).expect("opens");
        fork.write_at(&bytes(2, SUB), n % 64 * 3 * CLUSTER)
            .expect("writes");
    }
    pool.close().expect("closes");
    drop(pool);
    let lines = dumped(&*storage);
    // A line for each disk and its whole map; some for each that was changed, and for the first.
    assert!(lines.len() < 2 * count + 1000, "{} lines", lines.len());
    restore(&storage, &lines).expect("restores");
    let again = dumped(&*storage);
    let maps = |lines: &[String]| {
        let lines = lines
            .iter()
            .filter(|line| !line.contains(r#""kind":"superblock""#));
        let lines = lines.filter(|line| !line.contains(r#""kind":"image""#));
        let lines = lines.filter(|line| !line.contains(r#""kind":"end""#));
        lines.cloned().collect::<Vec<_>>()
    };
    assert!(maps(&lines) == maps(&again), "shared as before");
    let pool = opened(&storage);
    let mut buf = vec![0; usize::try_from(SUB).expect("small")];
    for name in ["origin", "f0", "f50", "f499"] {
        let disk = Disk::open(&pool, name).expect("opens");
        disk.read_at(&mut buf, 3 * CLUSTER).expect("reads");
        assert_eq!(buf, bytes(1, SUB), "{name}");
    }
}

/// Dumps of releases that did not say what disks share are restored as ever.
#[test]
fn a_dump_that_says_everything_twice_is_restored() {
    let (storage, pool) = fresh();
    drop(disk(&pool, "a", LEN));
    pool.close().expect("closes");
    drop(pool);
    let mut lines = dumped(&*storage);
    let row = lines
        .iter()
        .position(|line| line.contains(r#""kind":"disk""#));
    let row = row.expect("a disk");
    for (name, level) in [("b", 3), ("a", 7), ("a", 3)] {
        let mut odd = lines.clone();
        let same = serde_json::json!({
            "kind": "same", "disk": "a", "as": name, "level": level, "node": 9,
        });
        odd.insert(row + 1, same.to_string());
        restore(&storage, &odd).expect_err("nothing is there");
    }
    let map = serde_json::json!({
        "kind": "map", "disk": "a", "lcn": 0, "count": 2, "own": 500, "under": 0, "alloc": "ffff",
        "zero": "0000", "birth": 1,
    });
    lines.insert(row + 1, map.to_string());
    restore(&storage, &lines).expect("restores");
    let pool = opened(&storage);
    assert_eq!(pool.items().len(), 1);
}
