//! Goal: whatever bytes are said to be a pool, opening them gives a clear error or a pool with the
//! right data; it never panics, never hangs, and changes nothing.
//!
//! Method: one small pool with forks, snapshots, an image and a journal, and a table of what is
//! done to it: cut short, foreign, random, every block of metadata damaged, fields of newer
//! releases, and impossible values under a correct checksum. Each is opened read-only, and must
//! leave every byte as it was.

mod common;

use common::{CLUSTER, POOL_LEN, Random, SUB, bytes, disk, empty, opened, read};
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk::{self, Disk};
use tidepool::format::catalogue::{Row, RowKind};
use tidepool::format::image_block::{Extent, ImageStamp, seal_head};
use tidepool::format::journal::{BatchWriter, Entry, Record, Stamp, decode_header};
use tidepool::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use tidepool::format::units::{DiskId, Generation, Lcn};
use tidepool::pool::{OpenOptions, Pool, PoolError, check};
use tidepool::storage::{SimStorage, Storage};
use tidepool::sys::clock;

/// A pool with everything in it: `a` (and `a@s`), its fork `b`, an unrelated `z`, an image in
/// force, and batches after it.
fn sample() -> Arc<SimStorage> {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    let bulk = disk(&pool, "bulk", 20_000 * 64 * CLUSTER);
    let a = disk(&pool, "a", 64 * CLUSTER);
    a.write_at(&bytes(1, 20 * CLUSTER), 0).expect("writes");
    cowdisk::fork(&pool, "a", &["b".to_owned()]).expect("forks");
    let b = Disk::open(&pool, "b").expect("there");
    b.write_at(&bytes(2, SUB), 3 * CLUSTER).expect("writes");
    cowdisk::snapshot(&pool, "a", "s").expect("snapshots");
    let z = disk(&pool, "z", 64 * CLUSTER);
    z.write_at(&bytes(9, 4 * CLUSTER), 0).expect("writes");
    // Fat batches, until an image is in force.
    while pool.superblock().image.is_none() {
        for n in 0..8000 {
            bulk.discard(2 * n * 64 * CLUSTER, 64 * CLUSTER)
                .expect("discards");
        }
        bulk.flush().expect("flushes");
    }
    for n in 0..4_u8 {
        a.write_at(&bytes(10 + n, SUB), u64::from(n) * CLUSTER)
            .expect("writes");
        a.flush().expect("flushes");
    }
    assert!(pool.superblock().image.is_some());
    Arc::new(storage.crash_all_kept())
}

fn contents(storage: &SimStorage) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(storage.len().expect("known")).expect("small")];
    storage.read_at(&mut all, 0).expect("reads");
    all
}

fn open_read_only(storage: &Arc<SimStorage>) -> Result<Arc<Pool>, PoolError> {
    let options = OpenOptions {
        is_read_only: true,
        ..OpenOptions::default()
    };
    Pool::open(Arc::clone(storage) as Arc<dyn Storage>, &options)
}

/// Opens and checks what is in `storage`. `Ok` only with data that may be.
fn examine(storage: &Arc<SimStorage>, what: &str) -> Result<(), String> {
    let before = storage.counters().changes();
    let began = clock::now();
    let checked = check::check(&**storage);
    let result = open_read_only(storage);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{what}: it took {:?}",
        began.elapsed()
    );
    assert_eq!(
        storage.counters().changes(),
        before,
        "{what}: something was written"
    );
    match result {
        Err(e) => {
            let text = e.to_string();
            assert!(text.len() > 10, "{what}: `{text}` says nothing");
            let is_well = checked.is_ok_and(|report| report.faults.is_empty());
            assert!(
                !is_well,
                "{what}: it does not open ({text}), but check finds nothing"
            );
            Err(text)
        }
        Ok(pool) => {
            for item in pool.items().iter().filter(|item| item.row.name != "bulk") {
                let d = Disk::open(&pool, &item.row.name).expect("it is listed");
                let data = read(&d, 0, 24 * CLUSTER);
                let mine: &[u8] = match item.row.name.as_str() {
                    "z" => &[0, 9],
                    _ => &[0, 1, 2, 10, 11, 12, 13],
                };
                let foreign = data.iter().find(|byte| !mine.contains(byte));
                assert_eq!(foreign, None, "{what}: in {}", item.row.name);
            }
            Ok(())
        }
    }
}

fn copy(storage: &SimStorage) -> Arc<SimStorage> {
    Arc::new(storage.crash_all_kept())
}

fn superblock(storage: &SimStorage) -> Superblock {
    let mut raw = vec![0; SUPERBLOCK_LEN];
    storage.read_at(&mut raw, 0).expect("reads");
    Superblock::decode(&raw).expect("intact")
}

/// Writes both copies.
fn put_superblock(storage: &SimStorage, superblock: &Superblock) {
    for at in SUPERBLOCK_AT {
        storage
            .write_durable_at(&superblock.encode(), at)
            .expect("writes");
    }
}

/// Changes bytes of both copies and seals them anew.
fn patch_superblock(storage: &SimStorage, at: usize, value: &[u8]) {
    let mut raw = superblock(storage).encode();
    raw[at..at + value.len()].copy_from_slice(value);
    raw[12..16].fill(0);
    let crc = tidepool::format::crc32c(*b"TPSB", &[&raw]);
    raw[12..16].copy_from_slice(&crc.to_le_bytes());
    for at in SUPERBLOCK_AT {
        storage.write_durable_at(&raw, at).expect("writes");
    }
}

/// The places of the batches that would be replayed first, in their half.
fn batches(storage: &SimStorage) -> Vec<(u64, u64, Stamp, u32)> {
    let superblock = superblock(storage);
    let mut at = superblock.journal_half[superblock.start.half as usize];
    let end = at + superblock.journal_half_len;
    let mut next = superblock.start.seq;
    let mut found = Vec::new();
    while at < end {
        let mut block = vec![0; 4096];
        storage.read_at(&mut block, at).expect("reads");
        match decode_header(&block) {
            Ok(header) if header.stamp.seq == next => {
                found.push((at, header.len, header.stamp, header.crc));
                at += header.len;
                next += 1;
            }
            Ok(_) | Err(_) => break,
        }
    }
    found
}

/// Appends a batch with these records.
fn append(storage: &SimStorage, records: &[Record]) {
    let (at, len, stamp, crc) = *batches(storage).last().expect("some batch");
    let mut batch = BatchWriter::default();
    for record in records {
        batch.push(record).expect("short");
    }
    let stamp = Stamp {
        seq: stamp.seq + 1,
        prev_crc: crc,
        ..stamp
    };
    let (bytes, _) = batch.seal(stamp);
    storage.write_durable_at(&bytes, at + len).expect("writes");
}

fn row(storage: &Arc<SimStorage>, name: &str) -> Row {
    open_read_only(storage)
        .expect("opens")
        .find(name)
        .expect("there")
        .row
}

#[test]
fn the_sample_itself_is_well() {
    examine(&sample(), "the sample").expect("it opens");
}

#[test]
fn cut_short_at_any_length() {
    let storage = sample();
    for n in 0..64 {
        let len = POOL_LEN / 64 * n;
        for len in [len, len + 512, len + 4096] {
            let short = copy(&storage);
            short.set_len(len).expect("cuts");
            let e = examine(&short, &format!("{len} bytes")).expect_err("a part is missing");
            assert!(!e.is_empty());
        }
    }
}

#[test]
fn foreign_and_random_files() {
    let mut random = Random(7);
    for len in [0, 512, 4096, 1 << 20, POOL_LEN] {
        let storage = Arc::new(SimStorage::new(len));
        examine(&storage, "zeros").expect_err("not a pool");
        let noise: Vec<u8> = (0..len / 8)
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        storage.write_at(&noise, 0).expect("writes");
        examine(&storage, "noise").expect_err("not a pool");
        let magics: [&[u8]; 4] = [b"QFI\xfb\0\0\0\x03", b"TIDEPOOL", b"\x7fELF", b"conectix"];
        for magic in magics.iter().filter(|_| len > 8) {
            storage.write_at(magic, 0).expect("writes");
            examine(&storage, "a magic number").expect_err("not a pool");
        }
    }
}

#[test]
fn every_block_of_metadata_damaged() {
    let storage = sample();
    let original = contents(&storage);
    let superblock = superblock(&storage);
    let mut random = Random(3);
    let (mut opened, mut refused) = (0, 0);
    let metadata = 0..superblock.metadata_end();
    let in_image = |at: &u64| original[usize::try_from(*at).expect("small")..].starts_with(b"TPI");
    let image = (metadata.end..POOL_LEN)
        .step_by(usize::try_from(CLUSTER).expect("small"))
        .filter(in_image);
    for at in metadata.clone().step_by(4096).chain(image) {
        let from = usize::try_from(at).expect("small");
        let is_empty = original[from..from + 4096].iter().all(|byte| *byte == 0);
        if is_empty && random.below(50) != 0 {
            continue;
        }
        for way in 0..3 {
            let bad = copy(&storage);
            let mut block = original[from..from + 4096].to_vec();
            match way {
                0 => block[usize::try_from(random.below(64)).expect("small")] ^= 1,
                1 => block.fill(0),
                _ => block.fill_with(|| random.next().to_le_bytes()[0]),
            }
            bad.write_durable_at(&block, at).expect("writes");
            match examine(&bad, &format!("block at {at}, way {way}")) {
                Ok(()) => opened += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(
        opened > 10 && refused > 10,
        "{opened} opened, {refused} refused"
    );
    for (n, at) in SUPERBLOCK_AT.into_iter().enumerate() {
        let bad = copy(&storage);
        bad.write_durable_at(&[0xff; 4096], at).expect("writes");
        examine(&bad, "one superblock").expect("the other one counts");
        bad.write_durable_at(&[0xff; 4096], SUPERBLOCK_AT[1 - n])
            .expect("writes");
        examine(&bad, "both superblocks").expect_err("none is left");
    }
}

#[test]
fn superblocks_of_newer_releases_and_impossible_ones() {
    let storage = sample();
    let cases: [(&str, usize, &[u8], &str); 14] = [
        ("version 2", 8, &2_u32.to_le_bytes(), "version"),
        ("version 0", 8, &0_u32.to_le_bytes(), "version"),
        ("incompat", 48, &(1_u64 << 40).to_le_bytes(), "incompat"),
        ("generation", 56, &u64::MAX.to_le_bytes(), "generation"),
        ("open epoch", 64, &u32::MAX.to_le_bytes(), "open_epoch"),
        ("tiny clusters", 72, &3_u32.to_le_bytes(), "cluster_log2"),
        ("huge clusters", 72, &40_u32.to_le_bytes(), "cluster_log2"),
        ("many clusters", 76, &u32::MAX.to_le_bytes(), "cut short"),
        ("no clusters", 76, &1_u32.to_le_bytes(), "cluster_count"),
        (
            "journal elsewhere",
            80,
            &4096_u64.to_le_bytes(),
            "journal_half",
        ),
        (
            "long journal",
            96,
            &(1_u64 << 50).to_le_bytes(),
            "journal_half",
        ),
        ("half 2", 104, &2_u32.to_le_bytes(), "start_half"),
        ("batch 0", 112, &0_u64.to_le_bytes(), "start_seq"),
        (
            "head outside",
            136,
            &(u32::MAX - 1).to_le_bytes(),
            "image_head",
        ),
    ];
    for (what, at, value, expected) in cases {
        let bad = copy(&storage);
        patch_superblock(&bad, at, value);
        let e = examine(&bad, what).expect_err(what);
        assert!(e.contains(expected), "{what}: {e}");
    }
    let newer = copy(&storage);
    patch_superblock(&newer, 40, &(1_u64 << 7).to_le_bytes());
    examine(&newer, "ro_compat").expect("it can be read");
    let e = common::try_open(&newer).expect_err("but not written");
    assert!(e.to_string().contains("ro_compat"), "{e}");
    let compatible = copy(&storage);
    patch_superblock(&compatible, 32, &u64::MAX.to_le_bytes());
    examine(&compatible, "compat").expect("nobody needs to know these");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn images_that_cannot_be() {
    let storage = sample();
    let good = superblock(&storage);
    let image = good.image.expect("an image");
    let mut cases = Vec::new();
    for (what, head, seq, len) in [
        ("head in the journal", 100, image.seq, image.len),
        ("head elsewhere", image.head - 1, image.seq, image.len),
        ("another image", image.head, image.seq - 1, image.len),
        (
            "image of the future",
            image.head,
            image.seq + 100,
            image.len,
        ),
        ("too short", image.head, image.seq, 0),
        ("too long", image.head, image.seq, u64::MAX),
    ] {
        let bad = copy(&storage);
        let image = tidepool::format::superblock::ImageRef { seq, len, head };
        put_superblock(
            &bad,
            &Superblock {
                image: Some(image),
                ..good.clone()
            },
        );
        cases.push((what, bad));
    }
    let uuid_low = u64::from_le_bytes(*good.uuid.first_chunk().expect("16 bytes"));
    let stamp = ImageStamp {
        uuid_low,
        seq: image.seq,
    };
    let count = u32::try_from(POOL_LEN / CLUSTER).expect("small");
    for (what, next, extents) in [
        (
            "a ring of heads",
            image.head,
            vec![Extent {
                start: image.head - 1,
                count: 1,
            }],
        ),
        ("nothing", 0, vec![]),
        (
            "itself",
            0,
            vec![Extent {
                start: image.head,
                count: 1,
            }],
        ),
        (
            "everything",
            0,
            vec![Extent {
                start: 1,
                count: count - 1,
            }],
        ),
        (
            "twice",
            0,
            vec![
                Extent {
                    start: image.head - 1,
                    count: 1
                };
                2
            ],
        ),
        (
            "outside",
            0,
            vec![Extent {
                start: count - 1,
                count: u32::MAX,
            }],
        ),
    ] {
        let bad = copy(&storage);
        let mut block = bytes(0, CLUSTER);
        seal_head(stamp, next, &extents, &mut block);
        let at = u64::from(image.head) * CLUSTER;
        bad.write_durable_at(&block, at).expect("writes");
        cases.push((what, bad));
    }
    for (what, bad) in cases {
        examine(&bad, what).expect_err(what);
    }
}

/// Records under a correct checksum that no release writes.
#[expect(clippy::too_many_lines, reason = "a table")]
fn impossible_records(storage: &Arc<SimStorage>) -> Vec<(&'static str, Vec<Record>)> {
    let pool = open_read_only(storage).expect("opens");
    let id = |name: &str| pool.find(name).expect("there").row.id;
    let (a, b, z) = (id("a"), id("b"), id("z"));
    let snapshot = id("a@s");
    let map = |disk: DiskId, lcn: u32, entry: Entry| Record::Map {
        disk,
        lcn: Lcn(lcn),
        entry,
    };
    let stolen = pool.find("z").expect("there").volume.map.read().get(Lcn(0));
    let own = Entry {
        own: 1000,
        alloc: 1,
        birth: 1,
        ..Entry::default()
    };
    let rows = |change: &dyn Fn(&mut Row)| {
        let mut row = row(storage, "a");
        change(&mut row);
        vec![Record::Row(Box::new(row))]
    };
    let fork_in = |generation: u32, from: DiskId, to: DiskId| Record::Fork {
        from,
        to,
        generation: Generation(generation),
    };
    let fork = |from: DiskId, to: DiskId| fork_in(2, from, to);
    // Born after all forks, as if nobody else had the cluster.
    let alone = Entry { birth: 3, ..own };
    let unmap = |disk: DiskId, first: u32, count: u32| Record::Unmap {
        disk,
        first: Lcn(first),
        count,
        is_zeroed: true,
    };
    vec![
        ("a cluster of another family", vec![map(a, 40, stolen)]),
        ("a cluster twice", vec![map(a, 40, own), map(a, 41, own)]),
        (
            "a cluster outside",
            vec![map(
                a,
                40,
                Entry {
                    own: u32::MAX,
                    ..own
                },
            )],
        ),
        (
            "a cluster of the journal",
            vec![map(a, 40, Entry { own: 200, ..own })],
        ),
        (
            "under outside",
            vec![map(a, 40, Entry { under: 5000, ..own })],
        ),
        (
            "own under itself",
            vec![map(a, 40, Entry { under: 1000, ..own })],
        ),
        ("both masks", vec![map(a, 40, Entry { zero: 1, ..own })]),
        (
            "data of no cluster",
            vec![map(a, 40, Entry { own: 0, ..own })],
        ),
        (
            "born in the future",
            vec![map(
                a,
                40,
                Entry {
                    birth: u32::MAX,
                    ..own
                },
            )],
        ),
        (
            "alone with what a relative has",
            vec![map(a, 40, alone), map(b, 40, own)],
        ),
        (
            "a relative alone with it",
            vec![map(a, 40, own), map(b, 40, alone)],
        ),
        (
            "alone with what is under a relative's",
            vec![
                map(a, 40, alone),
                map(
                    b,
                    40,
                    Entry {
                        own: 1001,
                        under: 1000,
                        ..own
                    },
                ),
            ],
        ),
        (
            "alone with a shared leaf",
            vec![map(a, 40, alone), fork_in(1, a, b)],
        ),
        (
            "one of three alone with a shared leaf",
            vec![
                map(a, 40, alone),
                fork_in(10, a, b),
                fork_in(1, b, snapshot),
            ],
        ),
        ("beyond the disk's end", vec![map(a, 64, own)]),
        ("far beyond", vec![map(a, u32::MAX, own)]),
        ("a disk that is not there", vec![map(DiskId(77), 0, own)]),
        ("an unmap past the end", vec![unmap(a, 10, 100)]),
        ("an unmap of everything", vec![unmap(a, 0, u32::MAX)]),
        (
            "a deletion twice",
            vec![Record::Delete { disk: z }, Record::Delete { disk: z }],
        ),
        ("a fork of nothing", vec![fork(DiskId(77), a)]),
        ("a fork to nothing", vec![fork(a, DiskId(77))]),
        ("a fork of another family", vec![fork(a, z)]),
        (
            "a name that is taken",
            rows(&|row| row.name = "z".to_owned()),
        ),
        (
            "a name with a slash",
            rows(&|row| row.name = "../x".to_owned()),
        ),
        ("an empty name", rows(&|row| row.name = String::new())),
        (
            "a snapshot's name",
            rows(&|row| row.name = "a@t".to_owned()),
        ),
        (
            "a snapshot without one",
            rows(&|row| row.kind = RowKind::Snapshot),
        ),
        ("a size of 0", rows(&|row| row.size = 0)),
        ("an odd size", rows(&|row| row.size = 1000)),
        ("an endless size", rows(&|row| row.size = !511)),
        ("too small for its map", rows(&|row| row.size = 512)),
        ("more base than disk", rows(&|row| row.base_len = u64::MAX)),
        ("its own parent", rows(&|row| row.parent = Some(row.id))),
        (
            "a younger parent",
            rows(&|row| row.parent = Some(DiskId(row.id.0 + 1))),
        ),
        ("no family", rows(&|row| row.family = DiskId(0))),
    ]
}

#[test]
fn records_that_cannot_be() {
    let storage = sample();
    for (what, records) in impossible_records(&storage) {
        let bad = copy(&storage);
        append(&bad, &records);
        let before = contents(&bad);
        examine(&bad, what).expect_err(what);
        common::try_open(&bad).expect_err("not for writing either");
        assert!(
            contents(&bad) == before,
            "{what}: opening it for writing changed it"
        );
    }
}

#[test]
fn a_great_many_huge_discards_take_no_time() {
    let storage = sample();
    let bulk = row(&storage, "bulk");
    let huge = Row {
        size: (u64::from(u32::MAX) - 64) * CLUSTER,
        ..bulk.clone()
    };
    let mut records = vec![Record::Row(Box::new(huge))];
    for n in 0..5000 {
        records.push(Record::Unmap {
            disk: bulk.id,
            first: Lcn(n % 3),
            count: u32::MAX - 100,
            is_zeroed: n % 2 == 0,
        });
    }
    append(&storage, &records);
    examine(&storage, "discards").expect("legal, if odd");
}
