//! The metadata of a pool as text: a JSON object a line, for people and for scripts. Reads what
//! can be read, and says where it cannot go on.

use super::error::PoolError;
use super::kinship::{Found, Known, Place};
use super::load::{load, read_superblock, superblock_copies};
use super::map::Tree;
use super::repair::last_batch;
use crate::format::journal::Entry;
use crate::format::superblock::{SUPERBLOCK_AT, Superblock};
use crate::storage::Storage;
use serde_json::{Value, json};

/// Longest run of entries that name no cluster and are not all zeros: each takes memory when the
/// dump is restored, and no other figure bounds them.
pub(super) const EMPTY_RUN_MAX: u32 = 65536;

/// Nothing but zeros: runs of any length take no memory.
pub(super) const ZEROS: Entry = Entry {
    own: 0,
    under: 0,
    alloc: 0,
    zero: u16::MAX,
    birth: 0,
};

/// Calls `line` with each line of the dump.
///
/// # Errors
/// The store failed, or the pool's metadata cannot be read further; what could be was dumped.
pub fn dump(storage: &dyn Storage, line: &mut dyn FnMut(&Value)) -> Result<(), PoolError> {
    for (at, copy) in SUPERBLOCK_AT.into_iter().zip(superblock_copies(storage)?) {
        match copy {
            Ok(superblock) => line(&superblock_line(at, &superblock)),
            Err(e) => line(&json!({"kind": "superblock", "at": at, "fault": e.to_string()})),
        }
    }
    let (superblock, _) = read_superblock(storage)?;
    let loaded = load(storage, superblock)?;
    for run in &loaded.image_clusters {
        line(&json!({"kind": "image", "cluster": run.start, "count": run.end - run.start}));
    }
    let mut known = Known::default();
    let mut names = Vec::new();
    for item in loaded.catalogue.iter() {
        names.push(item.row.name.as_str());
        let map = item.volume.map.read();
        let row = serde_json::to_value(&item.row).unwrap_or(Value::Null);
        let (last_fork, changed) = (map.last_fork.0, map.changed.0);
        line(&json!({"kind": "disk", "row": row, "last_fork": last_fork, "changed": changed}));
        dump_map(&names, &map.tree, &mut known, line);
    }
    let last_batch = last_batch(&loaded);
    let last = loaded
        .journal
        .last_batch()
        .filter(|last| last.seq == last_batch);
    line(&json!({
        "kind": "end",
        "generation": loaded.replay.generation,
        "next_disk": loaded.replay.next_disk,
        "last_batch": last_batch,
        "last_crc": last.map_or(0, |last| last.crc),
    }));
    loaded
        .journal_faults
        .into_iter()
        .next()
        .map_or(Ok(()), |fault| Err(fault.error))
}

fn superblock_line(at: u64, superblock: &Superblock) -> Value {
    let image = superblock
        .image
        .map(|image| json!({"seq": image.seq, "len": image.len, "head": image.head}));
    let start = superblock.start;
    json!({
        "kind": "superblock",
        "at": at,
        "compat": superblock.compat,
        "ro_compat": superblock.ro_compat,
        "uuid": uuid::Uuid::from_bytes(superblock.uuid).to_string(),
        "generation": superblock.generation,
        "open_epoch": superblock.open_epoch,
        "clean": superblock.is_clean,
        "cluster_bytes": superblock.cluster_size.bytes(),
        "cluster_count": superblock.cluster_count,
        "journal_half": superblock.journal_half,
        "journal_half_len": superblock.journal_half_len,
        "start": {"half": start.half, "seq": start.seq, "prev_crc": start.prev_crc},
        "image": image,
    })
}

/// The map of the last of `names`. Runs of entries that follow from one another are one line, and so is
/// what a disk before it has too.
fn dump_map(names: &[&str], tree: &Tree, known: &mut Known, line: &mut dyn FnMut(&Value)) {
    let number = names.len() - 1;
    let disk = names[number];
    let mut run: Option<(u32, u32, Entry)> = None;
    let put = |run: Option<(u32, u32, Entry)>, line: &mut dyn FnMut(&Value)| {
        if let Some((lcn, count, entry)) = run {
            line(&json!({
                "kind": "map", "disk": disk, "lcn": lcn, "count": count,
                "own": entry.own, "under": entry.under,
                "alloc": format!("{:04x}", entry.alloc), "zero": format!("{:04x}", entry.zero),
                "birth": entry.birth,
            }));
        }
    };
    known.walk(tree, number, &mut |found| {
        let (leaf, node) = match found {
            Found::Leaf(number, leaf) => (number, leaf),
            Found::Same { place, of } => {
                put(run.take(), line);
                let Place { level, number } = place;
                line(&json!({
                    "kind": "same", "disk": disk, "as": names[of], "level": level, "node": number,
                }));
                return;
            }
        };
        for (place, entry) in (0..).zip(&node.entries) {
            let lcn = leaf * 64 + place;
            if *entry == Entry::default() {
                continue;
            }
            match &mut run {
                Some((first, count, start)) if goes_on((*first, *count, *start), lcn, entry) => {
                    *count += 1;
                }
                Some(_) | None => put(run.replace((lcn, 1, *entry)), line),
            }
        }
    });
    put(run, line);
}

fn goes_on((first, count, start): (u32, u32, Entry), lcn: u32, entry: &Entry) -> bool {
    let step = |cluster: u32| {
        if cluster == 0 {
            0
        } else {
            cluster.saturating_add(count)
        }
    };
    let next = Entry {
        own: step(start.own),
        under: step(start.under),
        ..start
    };
    let is_short = count < EMPTY_RUN_MAX || start.clusters() != [0, 0] || start == ZEROS;
    lcn == first + count && *entry == next && is_short
}
