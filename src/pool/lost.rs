//! What is lost when batches of the journal are given up, as far as those say that can be read.

use super::derive::{EntryFault, Mend};
use super::load::Loaded;
use super::walk::Seen;
use crate::format::journal::Record;
use crate::format::units::{ClusterSize, DiskId, Lcn};
use std::collections::{BTreeMap, HashMap};

/// A part of a disk whose contents, or last changes, a repair gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The disk or snapshot.
    pub disk: String,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Lost {
    /// `count` clusters of `disk` from `first`.
    pub(super) fn clusters(disk: &str, first: Lcn, count: u32, size: ClusterSize) -> Self {
        Self {
            disk: disk.to_owned(),
            offset: size.disk_offset(first),
            len: u64::from(count) * size.bytes(),
        }
    }
}

/// A disk that records may be about.
struct Known {
    /// The last it had.
    name: String,
    family: DiskId,
    /// Bytes; the most it had.
    size: u64,
    /// It is only in the records.
    is_new: bool,
}

fn known(loaded: &Loaded, records: &[Record]) -> BTreeMap<DiskId, Known> {
    let mut known = BTreeMap::new();
    for item in loaded.catalogue.iter() {
        let row = Known {
            name: item.row.name.clone(),
            family: item.row.family,
            size: item.row.size,
            is_new: false,
        };
        known.insert(item.row.id, row);
    }
    for record in records {
        if let Record::Row(row) = record {
            let entry = known.entry(row.id).or_insert_with(|| Known {
                name: row.name.clone(),
                family: row.family,
                size: 0,
                is_new: true,
            });
            entry.size = entry.size.max(row.size);
            entry.name.clone_from(&row.name);
        }
    }
    known
}

/// The parts of disks that `records` are about. A disk that they remove comes back, and is named as a
/// whole.
pub(super) fn said_by(loaded: &Loaded, records: &[Record]) -> Vec<Lost> {
    let size = loaded.superblock.cluster_size;
    let disks = known(loaded, records);
    let mut lost = Vec::new();
    for record in records {
        let (disk, first, count) = match record {
            Record::Map { disk, lcn, .. } => (*disk, *lcn, 1),
            Record::Unmap {
                disk, first, count, ..
            } => (*disk, *first, *count),
            Record::Row(row) if disks.get(&row.id).is_some_and(|disk| disk.is_new) => {
                (row.id, Lcn(0), u32::MAX)
            }
            Record::Fork { to, .. } => (*to, Lcn(0), u32::MAX),
            Record::Delete { disk } => (*disk, Lcn(0), u32::MAX),
            Record::Row(_) => continue,
        };
        let end = disks.get(&disk).map_or(0, |disk| disk.size);
        let from = size.disk_offset(first).min(end);
        let to = from
            .saturating_add(u64::from(count) * size.bytes())
            .min(end);
        if from < to {
            lost.push((disk, from, to));
        }
    }
    let lost = joined(lost).into_iter().map(|(disk, from, to)| Lost {
        disk: disks
            .get(&disk)
            .map(|disk| disk.name.clone())
            .unwrap_or_default(),
        offset: from,
        len: to - from,
    });
    lost.collect()
}

/// Ranges (of what, from, to), neighbours together.
fn joined<T: Ord>(mut ranges: Vec<(T, u64, u64)>) -> Vec<(T, u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, one| {
        let is_joined = one.0 == next.0 && next.1 <= one.2;
        if is_joined {
            one.2 = one.2.max(next.2);
        }
        is_joined
    });
    ranges
}

/// The parts, neighbours together.
pub(super) fn join(parts: Vec<Lost>) -> Vec<Lost> {
    let range = |part: Lost| (part.disk, part.offset, part.offset.saturating_add(part.len));
    let joined = joined(parts.into_iter().map(range).collect());
    let part = |(disk, offset, end): (String, u64, u64)| Lost {
        disk,
        offset,
        len: end - offset,
    };
    joined.into_iter().map(part).collect()
}

/// What becomes of disks whose names, sizes or settings `records` change: a line for each.
pub(super) fn changed_rows(loaded: &Loaded, records: &[Record]) -> Vec<String> {
    let mut changed: BTreeMap<DiskId, &str> = BTreeMap::new();
    for record in records {
        if let Record::Row(row) = record {
            changed.insert(row.id, &row.name);
        }
    }
    let line = |(id, today): (DiskId, &str)| {
        let before = &loaded.catalogue.get(id)?.row.name;
        Some(match before == today {
            true => format!("`{before}` goes back to the size and settings it had before"),
            false => {
                format!("`{today}` goes back to the name, size and settings it had as `{before}`")
            }
        })
    };
    changed.into_iter().filter_map(line).collect()
}

/// Entries whose clusters `records` give to another place: what is there now is not theirs.
pub(super) fn given_away(loaded: &Loaded, records: &[Record]) -> Vec<EntryFault> {
    let disks = known(loaded, records);
    // By cluster, the one place that has it since; `None` if there are several.
    let mut taken: HashMap<u32, Option<(u32, u32)>> = HashMap::new();
    for record in records {
        let Record::Map { disk, lcn, entry } = record else {
            continue;
        };
        let family = disks.get(disk).map_or(disk.0, |disk| disk.family.0);
        for cluster in entry.clusters().into_iter().filter(|cluster| *cluster != 0) {
            let here = Some((family, lcn.0));
            let place = taken.entry(cluster).or_insert(here);
            if *place != here {
                *place = None;
            }
        }
    }
    let mut faults = Vec::new();
    if taken.is_empty() {
        return faults;
    }
    let mut seen = Seen::default();
    for item in loaded.catalogue.iter() {
        let map = item.volume.map.read();
        let family = item.row.family.0;
        seen.set_disk(family, map.last_fork.0);
        seen.walk(&map.tree, &mut |number, _, leaf| {
            for (lcn, entry) in (number * 64..).zip(&leaf.entries) {
                let is_taken = |cluster: &u32| {
                    let place = taken.get(cluster);
                    place.is_some_and(|place| *place != Some((family, lcn)))
                };
                if entry.clusters().iter().any(is_taken) {
                    faults.push(EntryFault {
                        disk: item.row.name.clone(),
                        lcn,
                        what: "its cluster of the pool has become another's".to_owned(),
                        mend: Mend::Zeros,
                    });
                }
            }
        });
    }
    faults
}
