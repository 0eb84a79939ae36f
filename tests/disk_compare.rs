//! Goal: what is said about where disks differ, where their data is, and what is copied in and out
//! of them is true of their bytes.
//!
//! Method: random families over a raw base with holes, beside flat arrays of bytes. Comparisons of
//! contents are those of the arrays, comparisons of places cover them; extents that say zeros are
//! zeros; an export is the array, and so is what is imported from it; flattening, with writes in
//! between, changes no byte, and the pool says the same when opened again. `TIDEPOOL_SEED` replays
//! one family.

mod common;

use common::{CLUSTER, Random, SUB, fresh, opened};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use tidepool::cowdisk::{
    self, Base, Comparison, Disk, ExtentKind, NewDisk, Qcow2Sink, RawSink, Sink, StreamSink,
};
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::Pool;

const BASE_LEN: u64 = 2 << 20;

type Flat = BTreeMap<String, Vec<u8>>;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

fn make_base(random: &mut Random, path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; at(BASE_LEN)];
    for _ in 0..6 {
        let from = random.below(BASE_LEN);
        let len = random.below(5 * CLUSTER).min(BASE_LEN - from);
        bytes[at(from)..at(from + len)].fill(0xba);
    }
    std::fs::write(path, &bytes).expect("writes");
    bytes
}

fn change(random: &mut Random, disk: &Disk, flat: &mut [u8]) {
    let sectors = disk.size() / 512;
    let from = random.below(sectors) * 512;
    let len = (1 + random.below(2 * CLUSTER / 512)) * 512;
    let len = len.min(disk.size() - from);
    let range = at(from)..at(from + len);
    match random.below(4) {
        0 => {
            disk.write_zeroes(from, len, random.below(2) == 0)
                .expect("in range");
            flat[range].fill(0);
        }
        // The same everywhere, so that equal bytes come to be in different places.
        1 => {
            disk.write_at(&vec![0xee; range.len()], from)
                .expect("in range");
            flat[range].fill(0xee);
        }
        _ => {
            let byte = u8::try_from(random.below(256)).expect("a byte");
            disk.write_at(&vec![byte; range.len()], from)
                .expect("in range");
            flat[range].fill(byte);
        }
    }
}

fn family(random: &mut Random, pool: &Arc<Pool>, base: &Path, bytes: &[u8]) -> Flat {
    let mut flat = Flat::new();
    // Longer, shorter and as long as the base, which ends within a cluster of none.
    let size = [BASE_LEN, BASE_LEN / 2 + 1536, BASE_LEN + 3 * CLUSTER + 512];
    let size = size[at(random.below(3))];
    let new = NewDisk {
        base: Some((base.to_owned(), BaseFormat::Raw)),
        ..NewDisk::empty("d0", size)
    };
    cowdisk::create(pool, &new).expect("creates");
    let mut first = bytes.to_owned();
    first.resize(at(size), 0);
    flat.insert("d0".to_owned(), first);
    for number in 1..5 {
        let names: Vec<String> = flat.keys().cloned().collect();
        for name in &names {
            let disk = Disk::open(pool, name).expect("opens");
            for _ in 0..random.below(4) {
                change(random, &disk, flat.get_mut(name).expect("modelled"));
            }
        }
        let from = names[at(random.below(names.len() as u64))].clone();
        let fork = format!("d{number}");
        cowdisk::fork(pool, &from, std::slice::from_ref(&fork)).expect("forks");
        let copy = flat[&from].clone();
        flat.insert(fork.clone(), copy);
        if random.below(4) == 0 {
            let size = flat[&fork].len() as u64 + CLUSTER + 1024;
            cowdisk::resize(pool, &fork, size, false).expect("grows");
            flat.get_mut(&fork).expect("modelled").resize(at(size), 0);
        }
    }
    flat
}

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![1; at(disk.size())];
    disk.read_at(&mut bytes, 0).expect("reads");
    bytes
}

fn sectors_that_differ(a: &[u8], b: &[u8]) -> Vec<Range<u64>> {
    let len = a.len().max(b.len());
    let (mut a, mut b) = (a.to_owned(), b.to_owned());
    a.resize(len, 0);
    b.resize(len, 0);
    let mut found: Vec<Range<u64>> = Vec::new();
    for (number, (a, b)) in (0..).zip(a.chunks(512).zip(b.chunks(512))) {
        if a != b {
            match found.last_mut() {
                Some(last) if last.end == number * 512 => last.end += 512,
                _ => found.push(number * 512..number * 512 + 512),
            }
        }
    }
    found
}

fn check_comparisons(pool: &Arc<Pool>, flat: &Flat) {
    for (one, one_flat) in flat {
        for (other, other_flat) in flat {
            let a = Disk::open(pool, one).expect("opens");
            let b = Disk::open(pool, other).expect("opens");
            let exact = sectors_that_differ(one_flat, other_flat);
            let found = cowdisk::diff(&a, &b, Comparison::Contents).expect("compares");
            assert_eq!(found, exact, "contents of {one} and {other}");
            let places = cowdisk::diff(&a, &b, Comparison::Places).expect("compares");
            for range in &exact {
                let is_covered = places
                    .iter()
                    .any(|p| p.start <= range.start && range.end <= p.end);
                assert!(
                    is_covered,
                    "places of {one} and {other} leave out {range:?}"
                );
            }
        }
    }
}

fn check_extents(disk: &Disk, flat: &[u8]) {
    let mut end = 0;
    for extent in disk.extents().expect("is there") {
        assert_eq!(extent.offset, end, "no gaps");
        end = extent.end();
        let bytes = &flat[at(extent.offset)..at(end)];
        if matches!(extent.kind, ExtentKind::Zero | ExtentKind::Hole) {
            assert!(bytes.iter().all(|byte| *byte == 0), "{extent:?} is zeros");
        }
    }
    assert_eq!(end, disk.size());
}

fn check_copies(pool: &Arc<Pool>, dir: &Path, name: &str, flat: &[u8]) {
    let disk = Disk::open(pool, name).expect("opens");
    let raw = dir.join(format!("{name}.raw"));
    let qcow2 = dir.join(format!("{name}.qcow2"));
    let mut stream = Vec::new();
    let size = disk.size();
    let sinks: [Box<dyn Sink + '_>; 3] = [
        Box::new(RawSink::create(&raw, size).expect("makes it")),
        Box::new(Qcow2Sink::create(&qcow2, size).expect("makes it")),
        Box::new(StreamSink::new(&mut stream)),
    ];
    for mut sink in sinks {
        let mut last = (1, 0);
        let written = cowdisk::export(&disk, &mut *sink, &mut |done, total| {
            last = (done, total);
            Ok(())
        });
        let written = written.expect("exports");
        assert_eq!(last.0, last.1, "progress comes to its end");
        assert!(written <= last.1 && last.1 <= size, "and counts data only");
    }
    assert!(
        std::fs::read(&raw).expect("reads") == flat,
        "raw export of {name}"
    );
    assert!(stream == flat, "stream of {name}");
    for (path, format) in [(&raw, BaseFormat::Raw), (&qcow2, BaseFormat::Qcow2)] {
        let image = Base::examine(path, format).and_then(|base| Base::open(&base));
        let image = image.expect("opens");
        let copy = common::disk(pool, "copy", size);
        cowdisk::import(&image, &copy, &mut |_, _| Ok(())).expect("imports");
        assert!(contents(&copy) == flat, "{format:?} copy of {name}");
        drop(copy);
        cowdisk::remove(pool, "copy", false).expect("nothing depends on it");
        std::fs::remove_file(path).expect("removes");
    }
}

fn check_flatten(random: &mut Random, pool: &Arc<Pool>, name: &str, flat: &mut [u8]) {
    let disk = Disk::open(pool, name).expect("opens");
    let result = cowdisk::flatten(pool, name, &mut |done, total| {
        if done < total {
            change(random, &disk, flat);
        }
        Ok(())
    });
    result.expect("flattens");
    let row = pool.find(name).expect("is there").row;
    assert_eq!((row.base, row.base_len), (None, 0));
    assert!(contents(&disk) == flat, "{name}, flattened");
    drop(disk);
    let disk = Disk::open(pool, name).expect("opens");
    assert!(disk.base().is_none());
    assert!(
        contents(&disk) == flat,
        "{name}, flattened and opened again"
    );
}

/// Commits `name`, the only disk left over the base, into it.
fn check_commit(pool: &Arc<Pool>, base: &Path, bytes: &[u8], name: &str, flat: &[u8]) {
    let refused = cowdisk::commit_to_base(pool, name, false, &mut |_, _| Ok(()));
    let refused = refused.expect_err("others have the same base").to_string();
    assert!(refused.contains("is the base of"), "{refused}");
    let others = pool.items().into_iter().map(|item| item.row.name);
    for other in others.filter(|other| other != name) {
        cowdisk::remove(pool, &other, true).expect("nothing depends on it");
    }
    let open = Disk::open(pool, name).expect("opens");
    cowdisk::commit_to_base(pool, name, false, &mut |_, _| Ok(())).expect_err("in use");
    drop(open);
    cowdisk::commit_to_base(pool, name, false, &mut |_, _| Ok(())).expect("commits");
    let mut expected = bytes.to_owned();
    expected.resize(flat.len().max(bytes.len()), 0);
    expected[..flat.len()].copy_from_slice(flat);
    assert!(
        std::fs::read(base).expect("reads") == expected,
        "the base is the disk"
    );
    let disk = Disk::open(pool, name).expect("opens");
    assert!(contents(&disk) == flat, "{name}, committed");
    let usage = cowdisk::usage(pool).expect("measures");
    assert_eq!(usage.used, 0, "it holds nothing of its own");
    drop(disk);
    // As an interrupted commit leaves it: written, and so of another time.
    let time = || {
        std::fs::metadata(base)
            .and_then(|file| file.modified())
            .expect("stats")
    };
    let before = time();
    while time() == before {
        std::fs::write(base, &expected).expect("writes");
    }
    Disk::open(pool, name).expect_err("the base has changed");
    cowdisk::commit_to_base(pool, name, false, &mut |_, _| Ok(())).expect_err("it has changed");
    cowdisk::commit_to_base(pool, name, true, &mut |_, _| Ok(())).expect("finishes");
    assert!(contents(&Disk::open(pool, name).expect("opens")) == flat);
}

#[test]
fn comparisons_extents_and_copies_tell_the_truth() {
    let seeds = match std::env::var("TIDEPOOL_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => (0..12).collect(),
    };
    for seed in seeds {
        println!("TIDEPOOL_SEED={seed}");
        let mut random = Random(seed);
        let dir = tempfile::tempdir().expect("a directory");
        let base = dir.path().join("base.raw");
        let bytes = make_base(&mut random, &base);
        let (storage, pool) = fresh();
        let mut flat = family(&mut random, &pool, &base, &bytes);
        check_comparisons(&pool, &flat);
        for (name, flat) in &flat {
            check_extents(&Disk::open(&pool, name).expect("opens"), flat);
            check_copies(&pool, dir.path(), name, flat);
        }
        check_flatten(
            &mut random,
            &pool,
            "d1",
            flat.get_mut("d1").expect("modelled"),
        );
        check_comparisons(&pool, &flat);
        pool.close().expect("closes");
        drop(pool);
        let pool = opened(&storage);
        check_comparisons(&pool, &flat);
        check_commit(&pool, &base, &bytes, "d0", &flat["d0"]);
        pool.close().expect("closes");
        drop(pool);
        let disk = Disk::open(&opened(&storage), "d0").expect("opens");
        assert!(
            contents(&disk) == flat["d0"],
            "d0, committed and opened again"
        );
    }
}

/// Made shorter than its base and enlarged, a disk has zeros where another has the base. Neither has
/// a map that says so, and both are large enough for several nodes of one.
#[test]
fn disks_that_read_one_base_to_different_ends_differ_there() {
    const LEN: u64 = 4 << 30;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    let base = std::fs::File::create(&path).expect("an image");
    base.set_len(LEN).expect("is sparse");
    let (_storage, pool) = fresh();
    for (name, size) in [("whole", LEN), ("begun", LEN / 4)] {
        let new = NewDisk {
            base: Some((path.clone(), BaseFormat::Raw)),
            ..NewDisk::empty(name, size)
        };
        cowdisk::create(&pool, &new).expect("creates");
    }
    cowdisk::resize(&pool, "begun", LEN, false).expect("grows");
    let [whole, begun] = ["whole", "begun"].map(|name| Disk::open(&pool, name).expect("opens"));
    for (a, b) in [(&whole, &begun), (&begun, &whole)] {
        let found = cowdisk::diff(a, b, Comparison::Places).expect("compares");
        let grown = LEN / 4..LEN;
        assert_eq!(found, [grown]);
    }
}

/// What a fork wrote is told to the block, from what it discarded again and what it never had.
#[test]
fn a_fork_differs_in_the_blocks_that_it_has() {
    let (_storage, pool) = fresh();
    drop(common::disk(&pool, "d", 4 * CLUSTER));
    cowdisk::fork(&pool, "d", &["fork".to_owned()]).expect("forks");
    let [d, fork] = ["d", "fork"].map(|name| Disk::open(&pool, name).expect("opens"));
    let blocks = common::bytes(1, 3 * SUB);
    fork.write_at(&blocks, CLUSTER).expect("writes");
    fork.discard(CLUSTER, SUB).expect("discards");
    let found = cowdisk::diff(&d, &fork, Comparison::Places).expect("compares");
    let written = CLUSTER + SUB..CLUSTER + 3 * SUB;
    assert_eq!(found, [written]);
}

/// The snapshot still reads the base that the disk has no more.
#[test]
fn a_rollback_brings_the_base_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    std::fs::write(&path, common::bytes(7, 4 * CLUSTER)).expect("an image");
    let (storage, pool) = fresh();
    let new = NewDisk {
        base: Some((path, BaseFormat::Raw)),
        ..NewDisk::empty("d", 4 * CLUSTER)
    };
    cowdisk::create(&pool, &new).expect("creates");
    cowdisk::snapshot(&pool, "d", "s").expect("snapshots");
    cowdisk::flatten(&pool, "d", &mut |_, _| Ok(())).expect("flattens");
    cowdisk::rollback(&pool, "d@s").expect("rolls back");
    let later = opened(&Arc::new(storage.crash_all_lost()));
    for pool in [pool, later] {
        let d = Disk::open(&pool, "d").expect("opens");
        assert!(contents(&d) == common::bytes(7, 4 * CLUSTER));
    }
}

/// Zeros hide the base, whether they came at once or block by block, discarded or written, and after
/// the next opening too.
#[test]
fn zeros_over_a_base_hide_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    // Whole leaves of the map have a record of their own.
    let leaves = 2 * 64 * CLUSTER;
    let len = leaves + 4 * CLUSTER;
    std::fs::write(&path, common::bytes(7, len)).expect("an image");
    let (storage, pool) = fresh();
    let new = NewDisk {
        base: Some((path, BaseFormat::Raw)),
        ..NewDisk::empty("d", len)
    };
    cowdisk::create(&pool, &new).expect("creates");
    let d = Disk::open(&pool, "d").expect("opens");
    d.discard(0, CLUSTER).expect("discards");
    d.discard(4 * CLUSTER, leaves).expect("discards");
    d.write_zeroes(CLUSTER, CLUSTER, false).expect("zeroes");
    for block in 0..16 {
        d.discard(2 * CLUSTER + block * SUB, SUB).expect("discards");
        let at = 3 * CLUSTER + block * SUB;
        d.write_zeroes(at, SUB, false).expect("zeroes");
    }
    assert!(contents(&d) == common::bytes(0, len));
    d.flush().expect("flushes");
    let again = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&again, "d").expect("opens");
    assert!(contents(&d) == common::bytes(0, len));
}
