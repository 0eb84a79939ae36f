//! Reading what a pool's store says: superblock, image, journal; and deriving from it what is never
//! stored: reference counts and free space.

use super::catalogue::Catalogue;
use super::counts::Counts;
use super::error::PoolError;
use super::image::{self, Loader};
use super::journal::{Journal, uuid_low};
use super::map::Leaf;
use super::space::Space;
use super::volume::Volume;
use super::walk::Seen;
use crate::format::image::decode_token;
use crate::format::image_block::{ImageStamp, unseal_block, unseal_head};
use crate::format::journal::Entry;
use crate::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use crate::format::units::{Cluster, DiskId, bytes_of, index};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::Arc;
use std::collections::HashSet;
use std::ops::Range;

/// What replay carries along.
#[derive(Debug)]
pub struct Replay {
    /// The pool's generation so far.
    pub generation: u32,
    /// The next disk id so far.
    pub next_disk: u32,
    /// Takes the counts of copied nodes; the real ones are derived afterwards.
    pub counts: Counts,
    /// Shared by all whole leaves of zeros.
    pub zero_leaf: Arc<Leaf>,
}

/// The newest intact superblock, and whether the other copy needs rewriting.
///
/// # Errors
/// Neither copy is intact; the first one's fault is told.
pub fn read_superblock(storage: &dyn Storage) -> Result<(Superblock, bool), PoolError> {
    let len = storage
        .len()
        .map_err(PoolError::storage("reading the superblock"))?;
    let mut copies = Vec::new();
    for at in SUPERBLOCK_AT {
        let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
        if at + bytes_of(SUPERBLOCK_LEN) > len {
            copies.push(Superblock::decode(&[]));
            continue;
        }
        storage
            .read_at(&mut bytes, at)
            .map_err(PoolError::storage("reading the superblock"))?;
        copies.push(Superblock::decode(&bytes));
    }
    let second = copies.pop().expect("two copies were read");
    let first = copies.pop().expect("two copies were read");
    match (first, second) {
        (Ok(a), Ok(b)) => {
            let differ = a.generation != b.generation;
            Ok((if a.generation >= b.generation { a } else { b }, differ))
        }
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok((one, true)),
        (Err(e), Err(_)) => Err(e.into()),
    }
}

/// All sub-clusters of all entries zero.
#[must_use]
pub fn zero_leaf() -> Leaf {
    let zero = Entry {
        zero: u16::MAX,
        ..Entry::default()
    };
    Leaf {
        entries: [zero; crate::format::image::LEAF_ENTRIES],
        dirty: 0,
    }
}

type ImageClusters = Vec<Range<u32>>;

/// `Err` if the store is shorter than the pool.
pub(super) fn check_len(storage: &dyn Storage, superblock: &Superblock) -> Result<(), PoolError> {
    let len = storage
        .len()
        .map_err(PoolError::storage("opening the pool"))?;
    if len < superblock.pool_len() {
        return Err(PoolError::damaged(format!(
            "the pool file has {len} bytes, but the pool {}: it was cut short",
            superblock.pool_len()
        )));
    }
    Ok(())
}

/// What a store says, before anything is derived from it.
#[derive(Debug)]
pub(super) struct Loaded {
    pub superblock: Superblock,
    pub catalogue: Catalogue,
    pub journal: Journal,
    pub replay: Replay,
    pub image_clusters: ImageClusters,
    /// Replay stopped here, although the journal seems to go on.
    pub journal_fault: Option<PoolError>,
}

/// Loads the image and replays the journal.
pub(super) fn load(storage: &dyn Storage, superblock: Superblock) -> Result<Loaded, PoolError> {
    let size = superblock.cluster_size;
    let (frozen, image_clusters) = load_image(storage, &superblock)?;
    let mut replay = Replay {
        generation: frozen.generation.0,
        next_disk: frozen.next_disk.0,
        counts: Counts::new(),
        zero_leaf: Arc::new(zero_leaf()),
    };
    let mut catalogue = Catalogue::default();
    for disk in frozen.disks {
        let (row, tree) = (disk.row, disk.tree);
        let volume = Volume::new(&row, tree, disk.last_fork, disk.changed, size);
        catalogue.check_row(&row, size)?;
        if catalogue.get(row.id).is_some() {
            let what = format!("checkpoint image: disk {} twice", row.id);
            return Err(PoolError::damaged(what));
        }
        replay.next_disk = replay.next_disk.max(row.id.0.saturating_add(1));
        catalogue.put(row, &Arc::new(volume));
    }
    let mut journal = Journal::new(&superblock);
    let journal_fault = loop {
        let records = match journal.replay_next(storage) {
            Ok(Some(records)) => records,
            Ok(None) if journal.last_seq() < journal.image_seq() => {
                break Some(PoolError::damaged(format!(
                    "the journal ends with batch {}, but the checkpoint image has batch {}",
                    journal.last_seq(),
                    journal.image_seq()
                )));
            }
            Ok(None) => break None,
            Err(fault) => break Some(fault),
        };
        let mut records = records.into_iter();
        let replayed = records.try_for_each(|record| catalogue.replay(record, &mut replay, size));
        if let Err(fault) = replayed {
            break Some(fault);
        }
    };
    Ok(Loaded {
        superblock,
        catalogue,
        journal,
        replay,
        image_clusters,
        journal_fault,
    })
}

/// Loads the image in force, and lists its clusters.
fn load_image(
    storage: &dyn Storage,
    superblock: &Superblock,
) -> Result<(image::Frozen, ImageClusters), PoolError> {
    let Some(image) = superblock.image else {
        let generation = crate::format::units::Generation(1);
        let (next_disk, disks) = (DiskId(1), Vec::new());
        return Ok((
            image::Frozen {
                seq: 0,
                generation,
                next_disk,
                disks,
            },
            Vec::new(),
        ));
    };
    let size = superblock.cluster_size;
    let stamp = ImageStamp {
        uuid_low: uuid_low(&superblock.uuid),
        seq: image.seq,
    };
    let mut block = AlignedBuf::new(size.len());
    let read = |cluster: u32, block: &mut AlignedBuf| {
        let read = storage.read_at(block, size.offset(Cluster(cluster)));
        read.map_err(PoolError::storage("reading the checkpoint image"))
    };
    let mut extents = Vec::new();
    let mut clusters = Vec::new();
    let mut heads = HashSet::new();
    let mut head = image.head;
    while head != 0 {
        if !heads.insert(head) {
            return Err(PoolError::damaged(
                "checkpoint image: its extent lists go round in a ring",
            ));
        }
        clusters.push(head..head + 1);
        read(head, &mut block)?;
        let (found, next) = unseal_head(stamp, superblock.cluster_count, &block)?;
        extents.extend(found);
        head = next;
    }
    let blocks = image.len / size.bytes();
    let mut loader = Loader::default();
    let mut number = 0_u32;
    for extent in &extents {
        clusters.push(extent.start..extent.start + extent.count);
        for cluster in extent.start..extent.start + extent.count {
            if u64::from(number) == blocks {
                break;
            }
            read(cluster, &mut block)?;
            let mut tokens = unseal_block(stamp, number, &block)?;
            while let Some(token) = decode_token(&mut tokens)? {
                loader.feed(token)?;
            }
            number += 1;
        }
    }
    Ok((loader.finish(image.seq)?, clusters))
}

/// An entry that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{disk}`, cluster {lcn}: {what}")]
pub struct EntryFault {
    /// The disk or snapshot.
    pub disk: String,
    /// Its cluster.
    pub lcn: u32,
    /// What is wrong.
    pub what: String,
}

/// Counts the references, checks every entry and I1, and declares the rest free. Empty if all is
/// well.
pub(super) fn derive(loaded: &Loaded, space: &Space) -> Vec<EntryFault> {
    let size = loaded.superblock.cluster_size;
    let count = loaded.superblock.cluster_count;
    let first = size
        .count(loaded.superblock.metadata_end())
        .unwrap_or(u32::MAX);
    let mut used = vec![0_u64; index(count)];
    let mut faults = Vec::new();
    for cluster in loaded.image_clusters.iter().cloned().flatten() {
        match used.get_mut(index(cluster)) {
            Some(place) if *place == 0 && cluster >= first => *place = u64::MAX,
            Some(_) | None => faults.push(EntryFault {
                disk: "checkpoint image".to_owned(),
                lcn: cluster,
                what: "this cluster of the pool cannot belong to it".to_owned(),
            }),
        }
    }
    // Births are of generations that have begun.
    let generation_end = loaded.replay.generation.saturating_add(1);
    let mut seen = Seen::default();
    for item in loaded.catalogue.iter() {
        let family = u64::from(item.row.family.0);
        let map = item.volume.map.read();
        let clusters = size.count(map.size).unwrap_or(u32::MAX);
        seen.set_family(item.row.family.0);
        let clashes = seen.clashes().len();
        seen.walk(&map.tree, &mut |leaf, is_shared, node| {
            for (lcn, entry) in (leaf * 64..).zip(&node.entries) {
                // Packed so that it is never 0: disk ids begin at 1.
                let owner = (family << 32) | u64::from(lcn);
                let fault = check_entry(entry, first, count, owner, &mut used, space);
                let is_mine = entry.own != 0 && entry.birth > map.last_fork.0;
                let fault = if fault.is_some() {
                    fault
                } else if entry.clusters() != [0, 0] && lcn >= clusters {
                    Some("beyond the end of the disk".to_owned())
                } else if entry.birth >= generation_end || (is_shared && is_mine) {
                    Some("it would be written in place although it may be shared".to_owned())
                } else {
                    None
                };
                if let Some(what) = fault {
                    faults.push(EntryFault {
                        disk: item.row.name.clone(),
                        lcn,
                        what,
                    });
                }
            }
        });
        let clashes = &seen.clashes()[clashes..];
        faults.extend(clashes.iter().map(|number| EntryFault {
            disk: item.row.name.clone(),
            lcn: *number,
            what: "a map node belongs to another place too".to_owned(),
        }));
    }
    let mut free_from = first;
    for (cluster, used) in (0..count).zip(&used).skip(index(first)) {
        if *used != 0 {
            space.add_clean(free_from..cluster);
            free_from = cluster + 1;
        }
    }
    space.add_clean(free_from..count);
    faults
}

/// Counts what one entry refers to. I1: one (family, lcn) for each cluster.
fn check_entry(
    entry: &Entry,
    first: u32,
    count: u32,
    owner: u64,
    used: &mut [u64],
    space: &Space,
) -> Option<String> {
    if let Some(fault) = entry.fault(first, count) {
        return Some(fault.to_owned());
    }
    for cluster in entry.clusters().into_iter().filter(|cluster| *cluster != 0) {
        let place = &mut used[index(cluster)];
        if *place != 0 && *place != owner {
            return Some(format!(
                "cluster {cluster} of the pool is used elsewhere too"
            ));
        }
        *place = owner;
        space.counts.retain(cluster);
    }
    None
}
