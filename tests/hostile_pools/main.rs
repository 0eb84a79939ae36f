//! Goal: whatever bytes are said to be a pool, opening them gives a clear error or a pool with the
//! right data; it never panics, never hangs, and changes nothing. A repair mends all that its check
//! says it can, or changes nothing.
//!
//! Method: one small pool with forks, snapshots, an image and a journal, and a table of what is
//! done to it: cut short, foreign, random, every block of metadata damaged, fields of newer
//! releases, and impossible values under a correct checksum. Each is opened read-only, and must
//! leave every byte as it was.

#[path = "../common/mod.rs"]
mod common;
mod given_up;
mod images;
mod interrupted;
mod journals;
mod planted;
mod repair;

use common::{CLUSTER, POOL_LEN, Random, read};
use planted::{
    append, contents, copy, damaged, impossible_images, impossible_records, metadata_blocks,
    open_read_only, patch_superblock, row, sample,
};
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk::Disk;
use tidepool::format::catalogue::Row;
use tidepool::format::journal::Record;
use tidepool::format::superblock::{OPEN_EPOCH_MAX, SUPERBLOCK_AT};
use tidepool::format::units::Lcn;
use tidepool::pool::check;
use tidepool::storage::{SimStorage, Storage};
use tidepool::sys::clock;

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
    let mut random = Random(3);
    let (mut opened, mut refused) = (0, 0);
    for (at, block) in metadata_blocks(&storage) {
        let is_empty = block.iter().all(|byte| *byte == 0);
        if is_empty && random.below(50) != 0 {
            continue;
        }
        for way in 0..3 {
            let bad = copy(&storage);
            let damaged = damaged(&block, way, &mut random);
            bad.write_durable_at(&damaged, at).expect("writes");
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
fn a_pool_that_was_opened_as_often_as_can_be_is_read_and_not_written() {
    let storage = sample();
    patch_superblock(&storage, 64, &OPEN_EPOCH_MAX.to_le_bytes());
    let pool = open_read_only(&storage).expect("nothing is written");
    assert!(!pool.items().is_empty());
    drop(pool);
    let before = storage.counters().changes();
    let refused = common::try_open(&storage).expect_err("there is no next opening");
    assert!(refused.to_string().contains("2^31"), "{refused}");
    assert_eq!(storage.counters().changes(), before, "nothing is changed");
}

#[test]
fn images_that_cannot_be() {
    let storage = sample();
    for (what, bad) in impossible_images(&storage) {
        examine(&bad, what).expect_err(what);
    }
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
