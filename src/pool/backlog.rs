//! What a disk has changed and no batch has yet. A round of commits closes the backlogs of all disks
//! at its beginning and writes what is in them, batch by batch; what changes meanwhile is the next
//! round's. So a flush waits for what was there, and for nothing that comes later.
//!
//! **Order.** In a backlog the unmaps come first, then the leaves, each as it is when its turn comes.
//! Both may say more than was there when the backlog was closed, which is allowed: a batch says what
//! things are. It must never say less, nor undo what an earlier batch said. Therefore an unmap covers
//! no leaf that waits in a backlog: such a leaf stays in the tree, empty and changed as a whole, until
//! its turn comes ([`Map::unmap`]).

use super::map::{Dropped, Leaf, leaf_of};
use super::space::Space;
use super::volume::Map;
use super::woken::Woken;
use crate::format::image::LEAF_ENTRIES;
use crate::format::journal::{Entry, Record};
use crate::format::units::{DiskId, Lcn};
use crate::sync::Shared;
use std::collections::VecDeque;
use std::task::Waker;

/// Changes of one disk (records to be made, references to be dropped) from which on its next ones
/// wait for a commit. One request may go beyond it, by what the disk has mapped: it is let in before
/// what it does is known.
pub const BACKLOG_MAX: usize = 1 << 16;
/// Changes of one disk from which on they are committed without being asked for.
pub(super) const BACKLOG_SOFT: usize = BACKLOG_MAX / 4;
/// Bytes in clusters that one disk let go of from which on they are committed without being asked
/// for: until then nobody can have them.
pub(super) const FREED_LEN_SOFT: u64 = 128 << 20;

/// Clusters of a disk that map to nothing now, or to zeros.
#[derive(Debug, Clone, Copy)]
struct Unmap {
    first: Lcn,
    count: u32,
    is_zeroed: bool,
}

/// Changes that no batch has.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    unmaps: VecDeque<Unmap>,
    /// Leaves with changed entries.
    leaves: Vec<u32>,
    /// References that no entry holds any more; released after all of the others are durable.
    drops: Vec<Dropped>,
    /// At least as many records as it will make.
    records: usize,
    /// Clusters in `drops`, those below map nodes of higher levels left out.
    freed: u32,
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.unmaps.is_empty() && self.leaves.is_empty() && self.drops.is_empty()
    }

    fn len(&self) -> usize {
        self.records + self.drops.len()
    }

    /// Adds what came later.
    fn append(&mut self, mut later: Self) {
        self.unmaps.append(&mut later.unmaps);
        self.leaves.append(&mut later.leaves);
        self.drops.append(&mut later.drops);
        self.records += later.records;
        self.freed = self.freed.saturating_add(later.freed);
    }
}

/// What goes into a batch.
#[derive(Debug, Default)]
pub struct Changes {
    /// Its records.
    pub records: Vec<Record>,
    /// What can be released when it is durable.
    pub drops: Vec<Dropped>,
}

/// Where the changes of maps are taken from a pool.
#[derive(Debug, Clone, Copy)]
pub struct Shelf<'a> {
    /// The pool's clusters.
    pub space: &'a Space,
    /// The pool's leaf of zeros.
    pub zero_leaf: &'a Shared<Leaf>,
}

/// An entry of a discarded cluster: zeros where the base would show through, else nothing.
pub(super) fn unmapped(is_zeroed: bool) -> Entry {
    Entry {
        zero: if is_zeroed { u16::MAX } else { 0 },
        ..Entry::default()
    }
}

/// Writing down what is to become durable.
impl Map {
    /// `more` entries of `leaf` have changed; `is_first` if none had since it was last collected.
    pub(super) fn note_leaf(&mut self, leaf: u32, more: u32, is_first: bool) {
        if is_first {
            self.backlog.leaves.push(leaf);
        }
        self.backlog.records += crate::format::units::index(more);
    }

    /// `count` clusters from `first`, of leaves that wait in no backlog, map to nothing or to zeros.
    pub(super) fn note_unmap(&mut self, first: Lcn, count: u32, is_zeroed: bool) {
        self.backlog.records += 1;
        self.backlog.unmaps.push_back(Unmap {
            first,
            count,
            is_zeroed,
        });
    }

    /// Drops a reference that no entry of this map holds any more, with `clusters` below it.
    pub(super) fn note_drop(&mut self, dropped: Dropped, clusters: u32) {
        self.backlog.freed = self.backlog.freed.saturating_add(clusters);
        self.backlog.drops.push(dropped);
    }

    /// Whether anything has changed that no round of commits has begun to write.
    #[must_use]
    pub fn has_changes(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether references were dropped that no round has begun to write.
    #[must_use]
    pub fn has_drops(&self) -> bool {
        !self.backlog.drops.is_empty()
    }

    /// Changes that no batch has yet.
    #[must_use]
    pub fn backlog_len(&self) -> usize {
        self.closing.len() + self.backlog.len()
    }

    /// Most records that [`Map::collect`] could return now.
    #[must_use]
    pub fn pending_max(&self) -> usize {
        self.closing.records + self.backlog.records
    }

    /// So much has changed since the last round began that the next should begin without being
    /// asked for. `freed_max`: clusters let go of, likewise.
    pub(super) fn wants_commit(&self, freed_max: u32) -> bool {
        self.backlog.len() > BACKLOG_SOFT || self.backlog.freed > freed_max
    }

    /// `waker` is woken when a commit has taken enough of the backlog.
    pub fn stall(&mut self, waker: &Waker) {
        self.stalled.push(waker.clone());
    }

    /// Those who wait for a commit, if it has taken enough.
    fn take_relieved(&mut self) -> Woken {
        match self.backlog_len() < BACKLOG_MAX / 2 {
            true => self.take_stalled(),
            false => Woken::default(),
        }
    }

    /// All who wait for a commit.
    pub(super) fn take_stalled(&mut self) -> Woken {
        self.stalled.take()
    }
}

/// Taking it.
impl Map {
    /// A round begins: what has changed until now is in it.
    pub(super) fn close_backlog(&mut self) {
        let closed = std::mem::take(&mut self.backlog);
        self.closing.append(closed);
        self.is_listed = false;
    }

    /// Takes what the round under way has of this disk until there are about `most` records; the
    /// references dropped come along with the last. Whether nothing is left, and who waited for that.
    pub(super) fn collect_closed(
        &mut self,
        most: usize,
        shelf: Shelf<'_>,
        changes: &mut Changes,
    ) -> (bool, Woken) {
        let mut closing = std::mem::take(&mut self.closing);
        let is_done = self.drain(&mut closing, most, shelf, changes);
        if !is_done {
            self.closing = closing;
        }
        (is_done, self.take_relieved())
    }

    /// Takes all that has changed. Returns who waited for that.
    pub(super) fn collect(&mut self, shelf: Shelf<'_>, changes: &mut Changes) -> Woken {
        let mut all = std::mem::take(&mut self.closing);
        all.append(std::mem::take(&mut self.backlog));
        self.drain(&mut all, usize::MAX, shelf, changes);
        self.take_relieved()
    }

    /// Takes about `most` records from `backlog`, which is no longer this map's. Built from the
    /// entries as they are now: an `alloc` bit is there only if its data write has completed (R1, I2).
    fn drain(
        &mut self,
        backlog: &mut Backlog,
        most: usize,
        shelf: Shelf<'_>,
        changes: &mut Changes,
    ) -> bool {
        let now = most.saturating_sub(changes.records.len());
        let now = backlog.unmaps.len().min(now);
        let disk = self.id;
        let records = backlog.unmaps.drain(..now);
        changes
            .records
            .extend(records.map(|unmap| unmap.record(disk)));
        backlog.records = backlog.records.saturating_sub(now);
        if !backlog.unmaps.is_empty() {
            return false;
        }
        while changes.records.len() < most {
            let Some(number) = backlog.leaves.pop() else {
                break;
            };
            let before = changes.records.len();
            self.collect_leaf(number, shelf, changes);
            let made = changes.records.len() - before;
            backlog.records = backlog.records.saturating_sub(made);
        }
        let is_done = backlog.leaves.is_empty();
        if is_done {
            changes.drops.append(&mut backlog.drops);
        }
        is_done
    }

    fn collect_leaf(&mut self, number: u32, shelf: Shelf<'_>, changes: &mut Changes) {
        // The map may have been replaced as a whole.
        if self.tree.leaf(number).is_none_or(|leaf| leaf.dirty == 0) {
            return;
        }
        let leaf = self.tree.leaf_mut(number, &shelf.space.counts);
        let dirty = std::mem::take(&mut leaf.dirty);
        let is_rest = match dirty == u64::MAX {
            true => most_common(&leaf.entries),
            false => None,
        };
        let first = Lcn(number * 64);
        if let Some(is_zeroed) = is_rest {
            let unmap = Unmap {
                first,
                count: 64,
                is_zeroed,
            };
            changes.records.push(unmap.record(self.id));
        }
        let rest = is_rest.map(unmapped);
        let mut is_empty = rest.is_some();
        for place in (0..64).filter(|place| dirty >> place & 1 == 1) {
            let lcn = Lcn(first.0 + place);
            let entry = leaf.entries[leaf_of(lcn).1];
            if rest == Some(entry) {
                continue;
            }
            is_empty = false;
            changes.records.push(Record::Map {
                disk: self.id,
                lcn,
                entry,
            });
        }
        if is_empty {
            // Nothing is in it, so nothing is dropped with it.
            let instead = (is_rest == Some(true)).then(|| Shared::clone(shelf.zero_leaf));
            self.tree.replace_leaf(number, instead);
        }
    }
}

impl Unmap {
    fn record(self, disk: DiskId) -> Record {
        let Self {
            first,
            count,
            is_zeroed,
        } = self;
        Record::Unmap {
            disk,
            first,
            count,
            is_zeroed,
        }
    }
}

/// Whether most of the entries that say nothing are zeros; `None` if there are not two of a kind.
fn most_common(entries: &[Entry; LEAF_ENTRIES]) -> Option<bool> {
    let count = |is_zeroed| {
        let empty = unmapped(is_zeroed);
        entries.iter().filter(|entry| **entry == empty).count()
    };
    let (zeroed, plain) = (count(true), count(false));
    (zeroed.max(plain) > 1).then_some(zeroed > plain)
}
