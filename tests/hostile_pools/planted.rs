//! A small pool with everything in it, and the faults that can be planted in it.

use super::common::{CLUSTER, POOL_LEN, Random, SUB, bytes, disk, empty, opened};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk};
use tidepool::format::catalogue::{Row, RowKind};
use tidepool::format::image_block::{Extent, ImageStamp, seal_head};
use tidepool::format::journal::{BatchWriter, Entry, Record, Stamp, decode_header};
use tidepool::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use tidepool::format::units::{DiskId, Generation, Lcn};
use tidepool::pool::{OpenOptions, Pool, PoolError};
use tidepool::storage::{SimStorage, Storage};

/// A pool with everything in it: `a` (and `a@s`), its fork `b`, an unrelated `z`, an image in
/// force, and batches after it.
pub(crate) fn sample() -> Arc<SimStorage> {
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

pub(crate) fn contents(storage: &SimStorage) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(storage.len().expect("known")).expect("small")];
    storage.read_at(&mut all, 0).expect("reads");
    all
}

pub(crate) fn open_read_only(storage: &Arc<SimStorage>) -> Result<Arc<Pool>, PoolError> {
    let options = OpenOptions {
        is_read_only: true,
        ..OpenOptions::default()
    };
    Pool::open(Arc::clone(storage) as Arc<dyn Storage>, &options)
}

pub(crate) fn copy(storage: &SimStorage) -> Arc<SimStorage> {
    Arc::new(storage.crash_all_kept())
}

pub(crate) fn superblock(storage: &SimStorage) -> Superblock {
    let mut raw = vec![0; SUPERBLOCK_LEN];
    storage.read_at(&mut raw, 0).expect("reads");
    Superblock::decode(&raw).expect("intact")
}

/// All blocks of metadata, and the first one of each cluster of an image: where, and what is there.
pub(crate) fn metadata_blocks(storage: &SimStorage) -> Vec<(u64, Vec<u8>)> {
    let all = contents(storage);
    let metadata_end = superblock(storage).metadata_end();
    let block = |at: u64| {
        let from = usize::try_from(at).expect("small");
        (at, all[from..from + 4096].to_vec())
    };
    let metadata = (0..metadata_end).step_by(4096).map(block);
    let clusters = (metadata_end..POOL_LEN).step_by(usize::try_from(CLUSTER).expect("small"));
    let image = clusters
        .map(block)
        .filter(|(_, block)| block.starts_with(b"TPI"));
    metadata.chain(image).collect()
}

/// A bit of the header flipped (way 0), all zeros (1), or noise (2).
pub(crate) fn damaged(block: &[u8], way: u64, random: &mut Random) -> Vec<u8> {
    let mut block = block.to_vec();
    match way {
        0 => block[usize::try_from(random.below(64)).expect("small")] ^= 1,
        1 => block.fill(0),
        _ => block.fill_with(|| random.next().to_le_bytes()[0]),
    }
    block
}

/// Writes both copies.
pub(crate) fn put_superblock(storage: &SimStorage, superblock: &Superblock) {
    for at in SUPERBLOCK_AT {
        storage
            .write_durable_at(&superblock.encode(), at)
            .expect("writes");
    }
}

/// Changes bytes of both copies and seals them anew.
pub(crate) fn patch_superblock(storage: &SimStorage, at: usize, value: &[u8]) {
    let mut raw = superblock(storage).encode();
    raw[at..at + value.len()].copy_from_slice(value);
    raw[12..16].fill(0);
    let crc = tidepool::format::crc32c(*b"TPSB", &[&raw]);
    raw[12..16].copy_from_slice(&crc.to_le_bytes());
    for at in SUPERBLOCK_AT {
        storage.write_durable_at(&raw, at).expect("writes");
    }
}

/// The places of the batches that would be replayed.
pub(crate) fn batches(storage: &SimStorage) -> Vec<(u64, u64, Stamp, u32)> {
    let superblock = superblock(storage);
    let first = superblock.start.half as usize;
    let mut next = superblock.start.seq;
    let mut found = Vec::new();
    for half in [first, 1 - first] {
        let mut at = superblock.journal_half[half];
        let end = at + superblock.journal_half_len;
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
    }
    found
}

/// Appends a batch with these records.
pub(crate) fn append(storage: &SimStorage, records: &[Record]) {
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

pub(crate) fn row(storage: &Arc<SimStorage>, name: &str) -> Row {
    open_read_only(storage)
        .expect("opens")
        .find(name)
        .expect("there")
        .row
}

/// Images that no release writes, under correct checksums.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(crate) fn impossible_images(storage: &SimStorage) -> Vec<(&'static str, Arc<SimStorage>)> {
    let good = superblock(storage);
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
        let bad = copy(storage);
        let image = tidepool::format::superblock::ImageRef {
            seq,
            len,
            head,
            head_copy: 0,
        };
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
            (image.head, image.head_copy),
            vec![Extent {
                start: image.head - 1,
                count: 1,
            }],
        ),
        ("nothing", (0, 0), vec![]),
        (
            "itself",
            (0, 0),
            vec![Extent {
                start: image.head,
                count: 1,
            }],
        ),
        (
            "everything",
            (0, 0),
            vec![Extent {
                start: 1,
                count: count - 1,
            }],
        ),
        (
            "twice",
            (0, 0),
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
            (0, 0),
            vec![Extent {
                start: count - 1,
                count: u32::MAX,
            }],
        ),
    ] {
        let bad = copy(storage);
        let mut block = bytes(0, CLUSTER);
        seal_head(stamp, next, &extents, &mut block);
        for head in [image.head, image.head_copy] {
            let at = u64::from(head) * CLUSTER;
            bad.write_durable_at(&block, at).expect("writes");
        }
        cases.push((what, bad));
    }
    cases
}

/// Records under a correct checksum that no release writes.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(crate) fn impossible_records(storage: &Arc<SimStorage>) -> Vec<(&'static str, Vec<Record>)> {
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
