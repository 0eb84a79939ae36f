//! The disks and snapshots of a pool by identity, by name and by parent. Nothing that is done to one
//! of them takes time for the others: a pool has tens of thousands.

use super::error::PoolError;
use super::map::{Tree, leaf_of};
use super::volume::Volume;
use crate::format::catalogue::Row;
use crate::format::journal::Record;
use crate::format::units::{ClusterSize, DiskId, Generation, index};
use crate::sync::{Arc, Shared};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// A disk or snapshot: what it is, and its map.
#[derive(Debug, Clone)]
pub struct Item {
    /// What it is.
    pub row: Row,
    /// Its map and requests.
    pub volume: Arc<Volume>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Catalogue {
    items: BTreeMap<DiskId, Item>,
    names: BTreeMap<String, DiskId>,
    /// Parent and child, of every item whose row names a parent.
    children: BTreeSet<(DiskId, DiskId)>,
}

impl Catalogue {
    /// By identity.
    #[must_use]
    pub fn get(&self, id: DiskId) -> Option<&Item> {
        self.items.get(&id)
    }

    /// By name.
    ///
    /// # Errors
    /// [`PoolError::NotFound`].
    pub fn find(&self, name: &str) -> Result<&Item, PoolError> {
        let id = self.names.get(name);
        id.and_then(|id| self.items.get(id))
            .ok_or_else(|| PoolError::NotFound {
                name: name.to_owned(),
            })
    }

    /// `Err` if the name is taken.
    ///
    /// # Errors
    /// [`PoolError::Exists`].
    pub fn check_free(&self, name: &str) -> Result<(), PoolError> {
        match self.names.contains_key(name) {
            true => Err(PoolError::Exists {
                name: name.to_owned(),
            }),
            false => Ok(()),
        }
    }

    /// All, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Item> {
        self.names.values().filter_map(|id| self.items.get(id))
    }

    /// The snapshots of the disk `name`, in the order of their names.
    pub fn snapshots_of<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Item> + use<'a> {
        let first = format!("{name}@");
        let named = self.names.range(first.clone()..);
        let named = named.take_while(move |(name, _)| name.starts_with(&first));
        named.filter_map(|(_, id)| self.items.get(id))
    }

    /// Identities of the items forked from `parent`, in order.
    fn children_of(&self, parent: DiskId) -> Vec<DiskId> {
        let least = Bound::Included((parent, DiskId(0)));
        let most = Bound::Included((parent, DiskId(u32::MAX)));
        let pairs = self.children.range((least, most));
        pairs.map(|(_, child)| *child).collect()
    }

    /// Adds an item, or changes the row of one that is there. A disk's new name is its snapshots' too.
    pub fn put(&mut self, row: Row, volume: &Arc<Volume>) {
        if let Some(old) = self.items.get(&row.id) {
            self.names.remove(&old.row.name);
            if let Some(parent) = old.row.parent {
                self.children.remove(&(parent, row.id));
            }
            if old.row.name != row.name {
                let old = old.row.name.clone();
                self.rename_snapshots(&old, &row.name);
            }
        }
        self.names.insert(row.name.clone(), row.id);
        if let Some(parent) = row.parent {
            self.children.insert((parent, row.id));
        }
        let volume = Arc::clone(volume);
        self.items.insert(row.id, Item { row, volume });
    }

    fn rename_snapshots(&mut self, old: &str, new: &str) {
        let snapshots: Vec<DiskId> = self.snapshots_of(old).map(|item| item.row.id).collect();
        for id in snapshots {
            let Some(item) = self.items.get_mut(&id) else {
                continue;
            };
            let name = renamed(&item.row.name, old, new);
            self.names.remove(&item.row.name);
            self.names.insert(name.clone(), id);
            item.row.name = name;
        }
    }

    /// Takes an item out; its children become children of its parent, unless that changed since
    /// the item was forked from it: a commit into it would look no further back than the child's
    /// own birth, and undo those changes.
    pub fn remove(&mut self, id: DiskId) -> Option<Item> {
        let item = self.items.remove(&id)?;
        self.names.remove(&item.row.name);
        if let Some(parent) = item.row.parent {
            self.children.remove(&(parent, id));
        }
        let is_as_forked = |parent: &Item| {
            let changed = parent.volume.map.read().changed;
            changed <= item.row.birth_generation
        };
        let heir = item.row.parent;
        let heir = heir.filter(|heir| self.items.get(heir).is_some_and(is_as_forked));
        for child in self.children_of(id) {
            self.children.remove(&(id, child));
            if let Some(heir) = heir {
                self.children.insert((heir, child));
            }
            if let Some(child) = self.items.get_mut(&child) {
                child.row.parent = heir;
            }
        }
        Some(item)
    }

    /// `Err` if a pool cannot have `row` beside what is here.
    ///
    /// # Errors
    /// A size no map can have, or the name of another disk.
    pub fn check_row(&self, row: &Row, size: ClusterSize) -> Result<(), PoolError> {
        if row.size > size.disk_bytes_max() {
            let what = format!("disk `{}` has {} bytes", row.name, row.size);
            return Err(PoolError::damaged(what));
        }
        self.check_name(&row.name, row.id)?;
        let old = self.items.get(&row.id).map(|old| &old.row.name);
        match old.filter(|old| **old != row.name) {
            Some(old) => self.snapshots_of(old).try_for_each(|snapshot| {
                let name = renamed(&snapshot.row.name, old, &row.name);
                self.check_name(&name, snapshot.row.id)
            }),
            None => Ok(()),
        }
    }

    fn check_name(&self, name: &str, id: DiskId) -> Result<(), PoolError> {
        match self.names.get(name) {
            Some(other) if *other != id => Err(PoolError::damaged(format!(
                "disks {other} and {id} are both named `{name}`"
            ))),
            Some(_) | None => Ok(()),
        }
    }

    /// Looks at the entries that `records` replace all at once, so that the processor fetches them
    /// side by side and not one after the other.
    pub fn fetch(&self, records: &[Record]) {
        let mut all = 0;
        for run in records.chunk_by(|one, next| map_disk(one) == map_disk(next)) {
            let Some(item) = map_disk(&run[0]).and_then(|disk| self.items.get(&disk)) else {
                continue;
            };
            let map = item.volume.map.read();
            for record in run {
                if let Record::Map { lcn, .. } = record {
                    let (number, place) = leaf_of(*lcn);
                    let leaf = map.tree.leaf(number);
                    // The count of references lies apart from the entries.
                    all |= leaf.map_or(0, Shared::strong_count);
                    all |= leaf.map_or(0, |leaf| index(leaf.entries[place].own));
                }
            }
        }
        std::hint::black_box(all);
    }

    /// Replays one record on top of what is here. Only at open: nothing is in flight, and counts
    /// are derived afterwards.
    ///
    /// # Errors
    /// A record that does not fit what is here.
    pub fn replay(
        &mut self,
        record: Record,
        replay: &mut super::load::Replay,
        size: ClusterSize,
    ) -> Result<(), PoolError> {
        let unknown =
            |id: DiskId| PoolError::damaged(format!("a record of disk {id}, which is not there"));
        match record {
            Record::Row(row) => {
                self.check_row(&row, size)?;
                replay.next_disk = replay.next_disk.max(row.id.0.saturating_add(1));
                match self.items.get(&row.id).map(|item| Arc::clone(&item.volume)) {
                    Some(volume) => {
                        volume.map.write().replay_row(&row);
                        self.put(*row, &volume);
                    }
                    None => {
                        let (tree, none) = (Tree::default(), Generation(0));
                        let volume = Volume::new(&row, tree, none, none);
                        self.put(*row, &Arc::new(volume));
                    }
                }
            }
            Record::Map { disk, lcn, entry } => {
                let item = self.items.get(&disk).ok_or_else(|| unknown(disk))?;
                let mut map = item.volume.map.write();
                map.check_inside(lcn, 1, size)?;
                map.replay_entry(replay, lcn, entry);
            }
            Record::Unmap {
                disk,
                first,
                count,
                is_zeroed,
            } => {
                let item = self.items.get(&disk).ok_or_else(|| unknown(disk))?;
                let mut map = item.volume.map.write();
                map.check_inside(first, count, size)?;
                map.replay_unmap(replay, first, count, is_zeroed);
            }
            Record::Fork {
                from,
                to,
                generation,
            } => {
                let source = self.items.get(&from).ok_or_else(|| unknown(from))?;
                let target = self.items.get(&to).ok_or_else(|| unknown(to))?;
                if source.row.family != target.row.family {
                    let (from, to) = (&source.row.name, &target.row.name);
                    let what = format!("`{to}` became a fork of `{from}`, of another family");
                    return Err(PoolError::damaged(what));
                }
                replay.generation = replay.generation.max(generation.0.saturating_add(1));
                let tree = {
                    let mut map = source.volume.map.write();
                    map.last_fork = generation;
                    map.tree.clone()
                };
                target.volume.map.write().become_fork(tree, generation);
            }
            Record::Delete { disk } => {
                let item = self.items.get(&disk).ok_or_else(|| unknown(disk))?;
                // Its snapshots go with it, in the order in which they went when it was recorded.
                let snapshots = self.snapshots_of(&item.row.name).map(|item| item.row.id);
                let gone: Vec<DiskId> = snapshots.chain([disk]).collect();
                for id in gone {
                    self.remove(id);
                }
            }
        }
        Ok(())
    }
}

/// The name of a snapshot of the disk `old`, which is named `new` from now on.
#[must_use]
pub fn renamed(snapshot: &str, old: &str, new: &str) -> String {
    let rest = snapshot.strip_prefix(old).unwrap_or_default();
    format!("{new}{rest}")
}

/// The disk whose entry a record replaces.
fn map_disk(record: &Record) -> Option<DiskId> {
    match record {
        Record::Map { disk, .. } => Some(*disk),
        Record::Row(_) | Record::Unmap { .. } | Record::Fork { .. } | Record::Delete { .. } => None,
    }
}
