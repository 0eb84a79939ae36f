//! A pool's metadata made anew from a [`super::dump`]: the way back when it is damaged beyond
//! repair, and the way to pools made by hand. Data is not touched: it stays where the maps say.

use super::catalogue::Catalogue;
use super::counts::Counts;
use super::derive::derive;
use super::dump::{EMPTY_RUN_MAX, ZEROS};
use super::error::PoolError;
use super::evidence::Evidence;
use super::history::{Since, Then, since, take_away};
use super::journal::Journal;
use super::kinship::{Place, share};
use super::load::{Loaded, Replay, check_len, read_superblock, superblock_copies};
use super::lost::Lost;
use super::map::{Leaf, Tree, Zeros};
use super::rewrite::{OldJournal, rewrite};
use super::space::Space;
use super::volume::{Map, Volume};
use crate::format::catalogue::Row;
use crate::format::journal::Entry;
use crate::format::superblock::{JournalStart, KnownBatch, Superblock};
use crate::format::units::{ClusterSize, Generation, Lcn};
use crate::storage::Storage;
use crate::sync::{Arc, Shared};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};

/// Leaves of one place that a further one is compared with: those of the disks made last.
const VERSIONS_COMPARED: usize = 16;

#[derive(Deserialize)]
struct SuperblockLine {
    uuid: String,
    compat: u64,
    ro_compat: u64,
    generation: u64,
    open_epoch: u32,
    cluster_bytes: u64,
    cluster_count: u32,
    journal_half: [u64; 2],
    journal_half_len: u64,
}

#[derive(Deserialize)]
struct DiskLine {
    row: Value,
    last_fork: u32,
    changed: u32,
}

#[derive(Deserialize)]
struct MapLine {
    disk: String,
    lcn: u32,
    count: u32,
    own: u32,
    under: u32,
    alloc: String,
    zero: String,
    birth: u32,
}

#[derive(Deserialize)]
struct SameLine {
    disk: String,
    r#as: String,
    level: u8,
    node: u32,
}

#[derive(Deserialize)]
struct EndLine {
    generation: u32,
    next_disk: u32,
    last_batch: u64,
    /// Dumps of older releases do not have it.
    #[serde(default)]
    last_crc: u32,
}

/// A dump as far as it was read. Feed it every line, then [`Dump::restore`] it.
#[derive(Debug)]
pub struct Dump {
    superblock: Option<Superblock>,
    catalogue: Catalogue,
    replay: Replay,
    /// The last batch it has; known when it is whole.
    last_batch: Option<KnownBatch>,
    /// It says what disks share; dumps of older releases do not.
    is_shared: bool,
}

/// What if it is not known who has had the clusters of a dump since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// It is not restored.
    Refused,
    /// Clusters that nobody else is known to have had are taken as the dump says.
    Accepted,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Disks and snapshots.
    pub disks: usize,
    /// Bytes of the pool.
    pub pool_len: u64,
    /// Parts of disks that others may have written since: they are zeros now.
    pub lost: Vec<Lost>,
    /// Why it is not known whether that is all, if so.
    pub why_unknown: Option<String>,
}

fn bad(what: impl std::fmt::Display) -> PoolError {
    PoolError::invalid(format!("this is no dump to restore from: {what}"))
}

fn parse<T: DeserializeOwned>(value: Value) -> Result<T, PoolError> {
    serde_json::from_value(value).map_err(bad)
}

impl Default for Dump {
    fn default() -> Self {
        Self {
            superblock: None,
            catalogue: Catalogue::default(),
            replay: Replay {
                generation: 0,
                next_disk: 1,
                counts: Counts::none(),
                zeros: Zeros::new(),
            },
            last_batch: None,
            is_shared: false,
        }
    }
}

impl Dump {
    /// Takes the next line.
    ///
    /// # Errors
    /// It is not a line of a dump, or does not fit what came before.
    pub fn line(&mut self, line: &str) -> Result<(), PoolError> {
        if self.last_batch.is_some() {
            return Err(bad("it goes on after its end"));
        }
        let value: Value = serde_json::from_str(line).map_err(bad)?;
        let kind = value.get("kind").and_then(Value::as_str).unwrap_or("");
        match kind {
            "superblock" if value.get("fault").is_some() => Ok(()),
            "superblock" => self.add_superblock(&parse(value)?),
            // Where an image was is of no use: a new one is written.
            "image" => Ok(()),
            "disk" => self.add_disk(&parse(value)?),
            "map" => self.add_map(&parse(value)?),
            "same" => self.add_same(&parse(value)?),
            "end" => {
                let EndLine {
                    generation,
                    next_disk,
                    last_batch: seq,
                    last_crc: crc,
                } = parse(value)?;
                self.replay.generation = generation;
                self.replay.next_disk = self.replay.next_disk.max(next_disk);
                self.last_batch = Some(KnownBatch { seq, crc });
                Ok(())
            }
            _ => Err(bad(format!("a line of kind `{kind}`"))),
        }
    }

    /// Bytes the pool needs; 0 before its superblock was read.
    #[must_use]
    pub fn pool_len(&self) -> u64 {
        self.superblock.as_ref().map_or(0, Superblock::pool_len)
    }

    /// Identity of the pool that was dumped.
    #[must_use]
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.superblock.as_ref().map(|superblock| superblock.uuid)
    }

    fn size(&self) -> Result<ClusterSize, PoolError> {
        let superblock = self.superblock.as_ref();
        superblock
            .map(|superblock| superblock.cluster_size)
            .ok_or_else(|| bad("no superblock before the first disk"))
    }

    fn add_superblock(&mut self, line: &SuperblockLine) -> Result<(), PoolError> {
        let cluster_size = ClusterSize::from_bytes(line.cluster_bytes)
            .ok_or_else(|| bad(format!("clusters of {} bytes", line.cluster_bytes)))?;
        let superblock = Superblock {
            uuid: uuid::Uuid::parse_str(&line.uuid).map_err(bad)?.into_bytes(),
            compat: line.compat,
            ro_compat: line.ro_compat,
            generation: line.generation,
            open_epoch: line.open_epoch,
            is_clean: true,
            cluster_size,
            cluster_count: line.cluster_count,
            journal_half: line.journal_half,
            journal_half_len: line.journal_half_len,
            start: JournalStart {
                half: 0,
                seq: 1,
                prev_crc: 0,
            },
            image: None,
            known: None,
        };
        // Checks what every superblock is checked for.
        let superblock = Superblock::decode(&superblock.encode())?;
        let known = self.superblock.as_ref().map(|known| known.generation);
        if known.is_none_or(|known| known < superblock.generation) {
            self.superblock = Some(superblock);
        }
        Ok(())
    }

    fn add_disk(&mut self, line: &DiskLine) -> Result<(), PoolError> {
        let size = self.size()?;
        let json = serde_json::to_vec(&line.row).map_err(bad)?;
        let row = Row::from_json(&json)?;
        self.catalogue.check_row(&row, size)?;
        if self.catalogue.get(row.id).is_some() {
            return Err(bad(format!("disk {} twice", row.id)));
        }
        self.replay.next_disk = self.replay.next_disk.max(row.id.0.saturating_add(1));
        let (last_fork, changed) = (Generation(line.last_fork), Generation(line.changed));
        let volume = Volume::new(&row, Tree::default(), last_fork, changed);
        self.catalogue.put(row, &Arc::new(volume));
        Ok(())
    }

    fn add_map(&mut self, line: &MapLine) -> Result<(), PoolError> {
        let size = self.size()?;
        let mask = |text: &str| u16::from_str_radix(text, 16).map_err(bad);
        let first = Entry {
            own: line.own,
            under: line.under,
            alloc: mask(&line.alloc)?,
            zero: mask(&line.zero)?,
            birth: line.birth,
        };
        let volume = Arc::clone(&self.catalogue.find(&line.disk)?.volume);
        let mut map = volume.map.write();
        // Replay changes a map now; this map was last changed when its disk's line says.
        let changed = map.changed;
        let result = self.add_run(&mut map, line, first, size);
        map.changed = changed;
        result
    }

    /// What one disk has of another's map.
    fn add_same(&mut self, line: &SameLine) -> Result<(), PoolError> {
        let from = self
            .catalogue
            .find(&line.r#as)?
            .volume
            .map
            .read()
            .tree
            .clone();
        let mut map = self.catalogue.find(&line.disk)?.volume.map.write();
        let (level, number) = (line.level, line.node);
        if share(&from, &mut map.tree, Place { level, number }).is_none() {
            let SameLine {
                disk, r#as: other, ..
            } = line;
            return Err(bad(format!(
                "`{disk}` is to have node {number} of level {level} of `{other}`, which has none"
            )));
        }
        drop(map);
        self.is_shared = true;
        Ok(())
    }

    fn add_run(
        &self,
        map: &mut Map,
        line: &MapLine,
        first: Entry,
        size: ClusterSize,
    ) -> Result<(), PoolError> {
        map.check_inside(Lcn(line.lcn), line.count, size)?;
        if first == ZEROS {
            map.replay_unmap(&self.replay, Lcn(line.lcn), line.count, true);
            return Ok(());
        }
        // What refers to clusters is bounded by their number, and with it the memory this takes.
        let most = match first.clusters() {
            [0, 0] => EMPTY_RUN_MAX,
            [_, _] => self.superblock.as_ref().map_or(0, |s| s.cluster_count),
        };
        if line.count > most {
            return Err(bad(format!("a run of {} entries", line.count)));
        }
        let step = |cluster: u32, n: u32| match cluster {
            0 => Some(0),
            some => some.checked_add(n),
        };
        for n in 0..line.count {
            let (Some(own), Some(under)) = (step(first.own, n), step(first.under, n)) else {
                return Err(bad("a run of clusters that ends beyond the last number"));
            };
            let entry = Entry {
                own,
                under,
                ..first
            };
            map.replay_entry(&self.replay, Lcn(line.lcn + n), entry);
        }
        Ok(())
    }

    /// Puts the pool that was dumped into `storage`, which must be as long as it. What the store
    /// holds as a pool is given up, its data area kept as it is; [`super::undo`] puts it back. What
    /// others have had of its disks' clusters since is zeros ([`super::history`]).
    ///
    /// # Errors
    /// The dump is not whole, or is of a pool that cannot be, or what became of its clusters is not
    /// known and that was not accepted: nothing was changed then. The store failed: run it again.
    pub fn restore(
        self,
        storage: &Arc<dyn Storage>,
        unknown: Unknown,
    ) -> Result<Restored, PoolError> {
        let storage = &**storage;
        let last_batch = self
            .last_batch
            .ok_or_else(|| bad("it breaks off before its end"))?;
        let superblock = self.superblock.ok_or_else(|| bad("it has no superblock"))?;
        check_len(storage, &superblock)?;
        superblock.check_writable()?;
        let mut loaded = Loaded {
            journal: Journal::new(&superblock),
            superblock,
            catalogue: self.catalogue,
            replay: self.replay,
            image_clusters: Vec::new(),
            image_faults: Vec::new(),
            journal_faults: Vec::new(),
        };
        if let Some(fault) = derive(&loaded, &mut Space::new())?.first() {
            return Err(bad(fault));
        }
        let (lost, why_unknown) = settle(storage, &loaded, last_batch, unknown)?;
        // Newer than any copy that is there, so that an interruption between the two does not
        // bring the old one back.
        let superblock = &mut loaded.superblock;
        let copies = superblock_copies(storage)?;
        let is_others = copies
            .iter()
            .flatten()
            .any(|copy| !copy.is_like(superblock));
        for copy in copies.iter().flatten() {
            superblock.generation = superblock.generation.max(copy.generation);
            superblock.open_epoch = superblock.open_epoch.max(copy.open_epoch);
        }
        if !self.is_shared {
            share_leaves(&loaded.catalogue);
        }
        let restored = Restored {
            disks: loaded.catalogue.iter().count(),
            pool_len: loaded.superblock.pool_len(),
            lost,
            why_unknown,
        };
        let mut space = Space::new();
        if let Some(fault) = derive(&loaded, &mut space)?.first() {
            return Err(bad(fault));
        }
        let in_force = match read_superblock(storage) {
            Ok((in_force, _)) => in_force,
            Err(_) => loaded.superblock.clone(),
        };
        // The clusters of another pool are others.
        let evidence = match is_others {
            true => None,
            false => Some(Evidence::of(storage, &in_force, None)?),
        };
        let old_journal = match evidence.as_ref().is_some_and(|found| found.has_batches) {
            true => OldJournal::Kept,
            false => OldJournal::Zeroed,
        };
        let next_disk = evidence.as_ref().map_or(1, |found| found.next_disk);
        loaded.replay.next_disk = loaded.replay.next_disk.max(next_disk);
        let old = (evidence.as_ref(), old_journal);
        rewrite(storage, loaded, &space, last_batch.seq, old)?;
        Ok(restored)
    }
}

/// Takes from the disks of a dump what others may have written since; what they lose by that, and why
/// it is not known whether that is all.
fn settle(
    storage: &dyn Storage,
    loaded: &Loaded,
    last_batch: KnownBatch,
    unknown: Unknown,
) -> Result<(Vec<Lost>, Option<String>), PoolError> {
    let then = Then {
        superblock: &loaded.superblock,
        catalogue: &loaded.catalogue,
        replay: &loaded.replay,
        last_batch,
    };
    let since = since(storage, &then)?;
    let why_unknown = match &since {
        Since::Known(_) => None,
        Since::Unknown { why, .. } => Some(why.clone()),
    };
    if let (Some(why), Unknown::Refused) = (&why_unknown, unknown) {
        return Err(PoolError::invalid(format!(
            "it is not known who has had the clusters of its disks since the dump: {why}. With \
             --accept-unknown those that nobody else is known to have had are taken as the dump says; \
             they may hold what others wrote"
        )));
    }
    Ok((take_away(storage, &then, &since)?, why_unknown))
}

/// Leaves of one family that are equal become one, as they were: an image of a thousand forks is
/// not a thousand times as long as that of one.
fn share_leaves(catalogue: &Catalogue) {
    let mut known: HashMap<(u32, u32), VecDeque<Shared<Leaf>>> = HashMap::new();
    let mut items: Vec<_> = catalogue.iter().collect();
    items.sort_by_key(|item| item.row.id);
    for item in items {
        let mut map = item.volume.map.write();
        let mut next = map.tree.next_leaf(0);
        while let Some(number) = next {
            let versions = known.entry((item.row.family.0, number)).or_default();
            if let Some(leaf) = map.tree.leaf(number).cloned() {
                let same = versions.iter().find(|one| one.entries == leaf.entries);
                if let Some(same) = same.cloned() {
                    map.tree.replace_leaf(number, Some(same));
                } else {
                    versions.push_front(leaf);
                    versions.truncate(VERSIONS_COMPARED);
                }
            }
            next = number
                .checked_add(1)
                .and_then(|from| map.tree.next_leaf(from));
        }
    }
}
