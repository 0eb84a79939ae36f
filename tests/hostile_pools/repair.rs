//! A repair mends every fault that its check says it can, loses what the check named and nothing
//! else, and leaves a pool that works; or it changes nothing.

use super::common::{CLUSTER, Random, SUB, bytes, disk, opened, read};
use super::planted::{
    append, batches, contents, copy, damaged, impossible_images, impossible_records,
    metadata_blocks, open_read_only, patch_superblock, sample,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tidepool::format::journal::{Record, Stamp, decode_batch, decode_header};
use tidepool::format::superblock::SUPERBLOCK_AT;
use tidepool::format::units::DiskId;
use tidepool::pool::check::{Fault, check};
use tidepool::pool::dump::dump;
use tidepool::pool::kept::KEPT_PREFIX;
use tidepool::pool::repair::repair;
use tidepool::storage::{SimStorage, Storage};

/// By disk and cluster: the pool's clusters and the masks.
pub(crate) type Maps = BTreeMap<(String, u64), (u64, u64, String, String)>;

/// As far as they can be read. Without `bulk`, whose map is long and says nothing.
pub(crate) fn maps(storage: &SimStorage) -> Maps {
    let mut maps = Maps::new();
    let mut add = |line: &serde_json::Value| {
        let number = |key: &str| line[key].as_u64().expect("a number");
        let text = |key: &str| line[key].as_str().expect("a string").to_owned();
        // What a repair keeps of what it gave up is nobody's disk.
        let is_kept = line["disk"]
            .as_str()
            .is_some_and(|disk| disk.starts_with(KEPT_PREFIX));
        if line["disk"] == "bulk" || is_kept {
            return;
        }
        if line["kind"] == "same" {
            let clusters = 64_u64 << (9 * number("level"));
            let first = number("node") * clusters;
            let as_far = (text("as"), first + clusters);
            let there = maps.range((text("as"), first)..as_far);
            let there: Vec<_> = there
                .map(|(place, entry)| (place.1, entry.clone()))
                .collect();
            maps.extend(
                there
                    .into_iter()
                    .map(|(lcn, entry)| ((text("disk"), lcn), entry)),
            );
        }
        if line["kind"] != "map" {
            return;
        }
        for n in 0..number("count") {
            let step = |first: u64| if first == 0 { 0 } else { first + n };
            let entry = (
                step(number("own")),
                step(number("under")),
                text("alloc"),
                text("zero"),
            );
            maps.insert((text("disk"), number("lcn") + n), entry);
        }
    };
    drop(dump(storage, &mut add));
    maps
}

fn is_named(faults: &[Fault], name: &str, lcn: u64) -> bool {
    faults.iter().flat_map(|fault| &fault.lost).any(|lost| {
        let inside = lost.offset..lost.offset + lost.len;
        lost.disk == name && inside.contains(&(lcn * CLUSTER))
    })
}

/// Clusters of disks that a damaged batch may have said something about.
type Unknown = BTreeSet<(String, u64)>;

/// Whether it was repaired. What differs from `all`, the maps before the damage, must have been named,
/// or be unknown.
pub(crate) fn is_mended(
    storage: &Arc<SimStorage>,
    what: &str,
    all: &Maps,
    unknown: &Unknown,
) -> bool {
    let before = contents(storage);
    let faults = check(&**storage).expect("the store works").faults;
    let is_mendable = faults.iter().all(|fault| fault.remedy.is_some());
    let store = Arc::clone(storage) as Arc<dyn Storage>;
    if let Err(e) = repair(&store) {
        assert!(!is_mendable, "{what}: {e}, but the check said {faults:?}");
        assert!(contents(storage) == before, "{what}: it changed something");
        return false;
    }
    assert!(is_mendable, "{what}: {faults:?}");
    let left = check(&**storage).expect("the store works").faults;
    assert!(left.is_empty(), "{what}: {left:?} are left of {faults:?}");
    let after = maps(storage);
    let differ = all
        .iter()
        .filter(|(at, entry)| after.get(at) != Some(entry))
        .chain(after.iter().filter(|(at, _)| !all.contains_key(at)));
    for (at, entry) in differ {
        let (name, lcn) = at;
        assert!(
            is_named(&faults, name, *lcn) || unknown.contains(at),
            "{what}: cluster {lcn} of `{name}`: {entry:?}, but only {faults:?} were named"
        );
    }
    goes_on(storage, what);
    true
}

/// What the batch around byte `at` says.
fn said_at(storage: &SimStorage, at: u64) -> Unknown {
    let pool = open_read_only(&Arc::new(storage.crash_all_kept())).expect("opens");
    let name = |id: DiskId| {
        let found = pool.items().into_iter().find(|item| item.row.id == id);
        found.map(|item| item.row.name)
    };
    let around = |(from, len, ..): &&(u64, u64, Stamp, u32)| (*from..from + len).contains(&at);
    let batches = batches(storage);
    let Some((from, len, ..)) = batches.iter().find(around) else {
        return Unknown::new();
    };
    let mut batch = vec![0; usize::try_from(*len).expect("short")];
    storage.read_at(&mut batch, *from).expect("reads");
    let header = decode_header(&batch).expect("intact");
    let records = decode_batch(&header, &batch).expect("intact");
    let about = |record: &Record| match record {
        Record::Map { disk, lcn, .. } => Some((name(*disk)?, u64::from(lcn.0))),
        Record::Unmap { .. } | Record::Fork { .. } | Record::Row(_) | Record::Delete { .. } => None,
    };
    records.iter().filter_map(about).collect()
}

/// What is written and flushed after a repair is there after a crash.
pub(crate) fn goes_on(storage: &Arc<SimStorage>, what: &str) {
    let pool = opened(storage);
    let new = disk(&pool, "new", 4 * CLUSTER);
    new.write_at(&bytes(7, 2 * SUB), 0).expect("writes");
    new.flush().expect("flushes");
    drop((new, pool));
    let pool = opened(&Arc::new(storage.crash_all_lost()));
    let new = tidepool::cowdisk::Disk::open(&pool, "new").expect("it was flushed");
    assert_eq!(read(&new, 0, 2 * SUB), bytes(7, 2 * SUB), "{what}");
}

#[test]
fn records_that_cannot_be_are_mended() {
    let storage = sample();
    let all = maps(&storage);
    for (what, records) in impossible_records(&storage) {
        let bad = copy(&storage);
        append(&bad, &records);
        // Possible ones among them count; what they did is in the damaged pool.
        let or_later: Unknown = maps(&bad).into_keys().collect();
        assert!(is_mended(&bad, what, &all, &or_later), "{what}");
        // With more after it, that is lost too.
        let bad = copy(&storage);
        append(&bad, &records);
        append(&bad, &records);
        is_mended(&bad, what, &all, &or_later);
    }
}

#[test]
fn images_that_cannot_be_are_left_alone() {
    let storage = sample();
    let all = maps(&storage);
    for (what, bad) in impossible_images(&storage) {
        let is_mended = is_mended(&bad, what, &all, &Unknown::new());
        assert!(!is_mended, "{what}: nothing else says what it did");
    }
}

#[test]
fn damaged_blocks_are_mended_or_left_alone() {
    let storage = sample();
    let mut random = Random(5);
    let (mut mended, mut refused) = (0, 0);
    let all = maps(&storage);
    let (last_at, last_len, ..) = *batches(&storage).last().expect("some batch");
    let last = last_at..last_at + last_len;
    let blocks = metadata_blocks(&storage);
    let is_superblock = |(at, _): &&(u64, Vec<u8>)| SUPERBLOCK_AT.contains(at);
    for (at, block) in blocks.iter().chain(blocks.iter().filter(is_superblock)) {
        let at = *at;
        let is_empty = block.iter().all(|byte| *byte == 0);
        if is_empty && random.below(50) != 0 {
            continue;
        }
        let way = random.below(3);
        let damaged = damaged(block, way, &mut random);
        let bad = copy(&storage);
        bad.write_durable_at(&damaged, at).expect("writes");
        let what = format!("block at {at}");
        // A torn last batch is taken for one that a crash cut off.
        let is_well = check(&*bad).expect("the store works").faults.is_empty();
        if is_well && !last.contains(&at) {
            assert!(
                maps(&bad) == all,
                "{what}: something is lost, and nobody says so"
            );
        }
        match is_mended(&bad, &what, &all, &said_at(&storage, at)) {
            true => mended += 1,
            false => refused += 1,
        }
    }
    assert!(
        mended > 100 && refused == 0,
        "{mended} mended, {refused} refused"
    );
}

#[test]
fn impossible_superblocks_are_left_alone() {
    let storage = sample();
    for (at, value) in [(72, 3_u32), (76, u32::MAX), (104, 2), (136, u32::MAX - 1)] {
        let bad = copy(&storage);
        patch_superblock(&bad, at, &value.to_le_bytes());
        let what = format!("{value} at {at}");
        assert!(!is_mended(&bad, &what, &maps(&storage), &Unknown::new()));
    }
}

/// The journal is not needed up to where the image is: replay goes on behind it.
#[test]
fn a_batch_that_the_image_covers_is_no_loss() {
    let storage = sample();
    let all = maps(&storage);
    let (at, ..) = batches(&storage)[0];
    let bad = copy(&storage);
    bad.write_durable_at(&[0; 4096], at).expect("writes");
    let faults = check(&*bad).expect("the store works").faults;
    assert!(faults[0].what.contains("cannot be read"), "{faults:?}");
    assert_eq!(faults[0].lost, []);
    assert!(is_mended(&bad, "a covered batch", &all, &Unknown::new()));
}
