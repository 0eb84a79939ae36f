//! What became of the clusters of a dump since it was made. A restore hands out no cluster that another
//! disk may have written: a disk of the dump gets back what it still has in the pool as it is now,
//! what a snapshot that is still there holds for it, and zeros in the place of the rest.
//!
//! Disk numbers are never used twice, so a disk that has a cluster at a place now, and had it there
//! then, has its own data in it. One that has given it up may find anything there.

use super::catalogue::{Catalogue, Item};
use super::derive::derive;
use super::error::PoolError;
use super::image_read;
use super::journal::{Batch, Journal};
use super::kept::KEPT_PREFIX;
use super::load::{Loaded, Replay, load, read_superblock};
use super::lost::{Lost, join};
use super::map::{Tree, Zeros};
use super::space::Space;
use super::undo::undo_of;
use super::volume::Volume;
use crate::format::catalogue::RowKind;
use crate::format::journal::{Entry, Record};
use crate::format::superblock::{KnownBatch, Superblock};
use crate::format::units::{DiskId, Lcn};
use crate::storage::Storage;
use crate::sync::Arc;
use std::collections::{HashMap, HashSet};

/// The pool as a dump has it.
pub(super) struct Then<'a> {
    pub superblock: &'a Superblock,
    pub catalogue: &'a Catalogue,
    pub replay: &'a Replay,
    /// Its last batch; without a checksum in dumps of older releases.
    pub last_batch: KnownBatch,
}

/// By cluster, who has named it: the disk, its place, and whether to write there.
type Named = HashMap<u32, Vec<(DiskId, Lcn, bool)>>;

/// What is known of the time since.
pub(super) enum Since {
    /// All: these are the disks now.
    Known(Catalogue),
    /// Not all.
    Unknown {
        /// Why not.
        why: String,
        /// Who is known to have named a cluster since.
        named: Named,
    },
}

/// What is known of the time since the dump `then` was made.
///
/// # Errors
/// The store failed.
pub(super) fn since(storage: &dyn Storage, then: &Then<'_>) -> Result<Since, PoolError> {
    let mut named = HashMap::new();
    let unknown = |why: &str, named| Since::Unknown {
        why: why.to_owned(),
        named,
    };
    let Some(superblock) = superblock_before(storage, then)? else {
        return Ok(unknown("no superblock of that pool is left", named));
    };
    let last = then.last_batch.seq;
    let mut why = match load(storage, superblock.clone()) {
        Ok(loaded) if is_well(&loaded)? => {
            let now = loaded.journal.last_seq();
            let is_repaired = loaded.catalogue.iter().any(|item| is_kept(item, then));
            if now >= last && !is_repaired {
                return Ok(Since::Known(loaded.catalogue));
            }
            name_all(&loaded, last, &mut named);
            match is_repaired {
                true => "the pool was repaired since, and then written",
                false => "the pool is older than the dump",
            }
        }
        Ok(loaded) => {
            name_all(&loaded, last, &mut named);
            "batches of its journal cannot be read"
        }
        Err(e @ (PoolError::Storage { .. } | PoolError::NoMemory)) => return Err(e),
        Err(_damaged) => "its metadata is damaged",
    };
    let batches = Journal::new(&superblock).batches_from(storage, last)?;
    if let Some(chain) = chain(&superblock, then, &batches) {
        match replayed(then, &chain) {
            Some(catalogue) => return Ok(Since::Known(catalogue)),
            None => why = "what its journal says since does not fit the dump",
        }
    }
    let later = batches.iter().filter(|batch| batch.seq > last);
    for record in later.flat_map(|batch| &batch.records) {
        if let Record::Map { disk, lcn, entry } = record {
            name(&mut named, *disk, *lcn, entry);
        }
    }
    Ok(unknown(why, named))
}

/// The superblock in force, or the one before a repair or restore that nobody has written since.
fn superblock_before(
    storage: &dyn Storage,
    then: &Then<'_>,
) -> Result<Option<Superblock>, PoolError> {
    let superblock = match read_superblock(storage) {
        Ok((superblock, _)) => superblock,
        Err(e @ PoolError::Storage { .. }) => return Err(e),
        Err(_damaged) => return Ok(None),
    };
    let before = match undo_of(storage, &superblock)? {
        Some(undo) => undo.superblock(),
        None => Some(superblock),
    };
    Ok(before.filter(|superblock| superblock.is_like(then.superblock)))
}

fn is_well(loaded: &Loaded) -> Result<bool, PoolError> {
    Ok(loaded.journal_faults.is_empty() && derive(loaded, &mut Space::new())?.is_empty())
}

/// A repair made it since the dump.
fn is_kept(item: &Item, then: &Then<'_>) -> bool {
    item.row.name.starts_with(KEPT_PREFIX) && then.catalogue.get(item.row.id).is_none()
}

/// Those of `batches` that came after the dump, if they are all there were.
fn chain<'a>(
    superblock: &Superblock,
    then: &Then<'_>,
    batches: &'a [Batch],
) -> Option<Vec<&'a Batch>> {
    let last = then.last_batch;
    let is_last = |batch: &&Batch| batch.seq == last.seq && [0, batch.crc].contains(&last.crc);
    let found = batches.iter().find(is_last);
    let (mut seq, mut crc) = (last.seq, found.map_or(last.crc, |found| found.crc));
    let mut chain = Vec::new();
    for batch in batches {
        if batch.seq == seq.saturating_add(1) && (batch.prev_crc == crc || crc == 0) {
            (seq, crc) = (batch.seq, batch.crc);
            chain.push(batch);
        }
    }
    let image = superblock.image.map_or(0, |image| image.seq);
    let known = superblock.known.map_or(0, |known| known.seq);
    let least = image.max(known).max(superblock.start.seq.saturating_sub(1));
    let highest = batches.iter().map(|batch| batch.seq).max().unwrap_or(0);
    // The pool has been as far as the dump: it has its last batch, or nobody has opened it since.
    let is_later =
        found.is_some() || least >= last.seq || superblock.generation == then.superblock.generation;
    (is_later && seq >= least && seq >= highest).then_some(chain)
}

/// The disks of the dump after `batches`; `None` if these do not fit.
fn replayed(then: &Then<'_>, batches: &[&Batch]) -> Option<Catalogue> {
    let size = then.superblock.cluster_size;
    let mut catalogue = Catalogue::default();
    for item in then.catalogue.iter() {
        let map = item.volume.map.read();
        let tree: Tree = map.tree.clone();
        let volume = Volume::new(&item.row, tree, map.last_fork, map.changed);
        catalogue.put(item.row.clone(), &Arc::new(volume));
    }
    let mut replay = Replay {
        generation: then.replay.generation,
        next_disk: then.replay.next_disk,
        counts: super::counts::Counts::none(),
        zeros: Zeros::new(),
    };
    for record in batches.iter().flat_map(|batch| &batch.records) {
        catalogue.replay(record.clone(), &mut replay, size).ok()?;
    }
    Some(catalogue)
}

fn name(named: &mut Named, disk: DiskId, lcn: Lcn, entry: &Entry) {
    for (cluster, is_own) in [(entry.own, true), (entry.under, false)] {
        if cluster != 0 {
            named.entry(cluster).or_default().push((disk, lcn, is_own));
        }
    }
}

/// What `loaded` names, unless that is older than batch `last`, or only kept.
fn name_all(loaded: &Loaded, last: u64, named: &mut Named) {
    if loaded.journal.last_seq() <= last {
        return;
    }
    let items = loaded.catalogue.iter();
    for item in items.filter(|item| !item.row.name.starts_with(KEPT_PREFIX)) {
        let map = item.volume.map.read();
        super::walk::walk_all(&map.tree, &mut |leaf, _, node| {
            for (lcn, entry) in (leaf * 64..).zip(&node.entries) {
                name(named, item.row.id, Lcn(lcn), entry);
            }
        });
    }
}

/// Takes from the disks of `then` what `since` gave to others, or may have; what they lose by that.
/// The clusters of the image that `storage` has now are nobody's.
///
/// # Errors
/// The store failed.
pub(super) fn take_away(
    storage: &dyn Storage,
    then: &Then<'_>,
    since: &Since,
) -> Result<Vec<Lost>, PoolError> {
    let images = image_clusters(storage, then)?;
    let size = then.superblock.cluster_size;
    let mut lost = Vec::new();
    // Judged by what the dump says, so all is judged before anything is changed.
    let mut changes = Vec::new();
    for item in then.catalogue.iter() {
        let judge = Judge::new(then, since, &images, item);
        let map = item.volume.map.read();
        super::walk::walk_all(&map.tree, &mut |leaf, _, node| {
            for (lcn, entry) in (leaf * 64..).zip(&node.entries) {
                let new = judge.entry(Lcn(lcn), entry);
                if new != *entry {
                    changes.push((item.row.id, Lcn(lcn), new));
                }
                if new.zero != entry.zero {
                    lost.push(Lost::clusters(&item.row.name, Lcn(lcn), 1, size));
                }
            }
        });
    }
    for (disk, lcn, new) in changes {
        if let Some(item) = then.catalogue.get(disk) {
            let mut map = item.volume.map.write();
            let changed = map.changed;
            map.replay_entry(then.replay, lcn, new);
            map.changed = changed;
        }
    }
    Ok(join(lost))
}

fn image_clusters(storage: &dyn Storage, then: &Then<'_>) -> Result<HashSet<u32>, PoolError> {
    let superblock = match read_superblock(storage) {
        Ok((superblock, _)) if superblock.is_like(then.superblock) => superblock,
        Ok(_) => return Ok(HashSet::new()),
        Err(e @ PoolError::Storage { .. }) => return Err(e),
        Err(_damaged) => return Ok(HashSet::new()),
    };
    match image_read::extents(storage, &superblock) {
        Ok(Some(extents)) => Ok(extents.clusters.into_iter().flatten().collect()),
        Ok(None) => Ok(HashSet::new()),
        Err(e @ PoolError::Storage { .. }) => Err(e),
        Err(_damaged) => Ok(HashSet::new()),
    }
}

/// Judges the entries of one disk of a dump.
struct Judge<'a> {
    since: &'a Since,
    images: &'a HashSet<u32>,
    item: &'a Item,
    /// The same disk now.
    now: Option<&'a Item>,
    /// Snapshots of its family, in the dump and now.
    snapshots: Vec<(&'a Item, &'a Item)>,
    families: HashMap<DiskId, DiskId>,
}

impl<'a> Judge<'a> {
    fn new(then: &Then<'a>, since: &'a Since, images: &'a HashSet<u32>, item: &'a Item) -> Self {
        let family = item.row.family;
        let catalogue = then.catalogue;
        let snapshots = catalogue
            .iter()
            .filter(|other| other.row.family == family && other.row.kind == RowKind::Snapshot);
        let families = match since {
            Since::Known(_) => HashMap::new(),
            Since::Unknown { .. } => catalogue
                .iter()
                .map(|item| (item.row.id, item.row.family))
                .collect(),
        };
        Self {
            since,
            images,
            item,
            now: same(since, item),
            snapshots: snapshots
                .filter_map(|then| Some((then, same(since, then)?)))
                .collect(),
            families,
        }
    }

    /// What is left of `entry`.
    fn entry(&self, lcn: Lcn, entry: &Entry) -> Entry {
        let mut new = *entry;
        let kept = self.kept(lcn, entry.own) & entry.alloc;
        let below = !(entry.alloc | entry.zero);
        new.zero |= entry.alloc & !kept;
        new.alloc = kept;
        if entry.own != 0 && kept == 0 {
            // Nothing would be read from it, and others may have it.
            (new.own, new.birth) = (0, 0);
        }
        if entry.under != 0 && self.kept(lcn, entry.under) & below != below {
            new.under = 0;
            new.zero |= below;
        }
        new
    }

    /// The sub-clusters of `cluster` that are as the dump says.
    fn kept(&self, lcn: Lcn, cluster: u32) -> u16 {
        if cluster == 0 || self.images.contains(&cluster) {
            return 0;
        }
        match self.since {
            Since::Known(_) => self.kept_now(lcn, cluster),
            Since::Unknown { named, .. } => {
                let is_others = named
                    .get(&cluster)
                    .is_some_and(|named| named.iter().any(|place| self.is_others(lcn, *place)));
                if is_others { 0 } else { u16::MAX }
            }
        }
    }

    fn kept_now(&self, lcn: Lcn, cluster: u32) -> u16 {
        let has = |item: &Item| {
            let entry = item.volume.map.read().get(lcn);
            entry.refers_to(cluster).then_some(entry)
        };
        // A snapshot is never written: what it has is what it had.
        let is_held = |(then, now): &(&Item, &Item)| has(then).is_some() && has(now).is_some();
        match self.now.and_then(has) {
            Some(now) if now.under == cluster => u16::MAX,
            Some(_) if self.snapshots.iter().any(is_held) => u16::MAX,
            Some(now) => now.alloc,
            None if self.snapshots.iter().any(is_held) => u16::MAX,
            None => 0,
        }
    }

    /// Whether a disk that named the cluster may have written there what is not this disk's.
    fn is_others(&self, lcn: Lcn, (disk, place, is_own): (DiskId, Lcn, bool)) -> bool {
        let is_relative = self.families.get(&disk) == Some(&self.item.row.family);
        let is_same = disk == self.item.row.id || is_relative && !is_own;
        !is_same || place != lcn
    }
}

/// The same disk or snapshot now.
fn same<'a>(since: &'a Since, item: &Item) -> Option<&'a Item> {
    let Since::Known(catalogue) = since else {
        return None;
    };
    let now = catalogue.get(item.row.id)?;
    let what = |item: &Item| (item.row.family, item.row.kind, item.row.created);
    (what(now) == what(item)).then_some(now)
}
