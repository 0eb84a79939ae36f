//! One disk or snapshot in memory: its map, the clusters some request is busy with, and the gate its
//! requests pass. What of the map is not yet in the journal is in `backlog`.

use super::account::Account;
use super::backlog::{Backlog, unmapped};
use super::busy::Busy;
use super::error::PoolError;
use super::gate::Gate;
use super::load::Replay;
use super::map::{Dropped, Leaf, Tree, leaf_of};
use super::slab::{NewCluster, Slab};
use super::space::{Purpose, Space};
use super::woken::{Waiters, Woken};
use crate::format::catalogue::Row;
use crate::format::image::LEAF_ENTRIES;
use crate::format::journal::Entry;
use crate::format::units::{ClusterSize, DiskId, Generation, Lcn};
use crate::sync::atomic::{AtomicBool, AtomicU32};
use crate::sync::{RwLock, Shared};
use std::collections::HashMap;
use std::ops::Range;

/// A disk or snapshot.
#[derive(Debug)]
pub struct Volume {
    /// Its identity.
    pub id: DiskId,
    /// Its requests in flight.
    pub gate: Gate,
    /// Lock order: catalogue, then one map, then space. Held over no I/O.
    pub map: RwLock<Map>,
    /// Handles that are open.
    pub opens: AtomicU32,
    /// Its base is being changed into what it is: a fork would be left with a base that is neither.
    pub is_committing: AtomicBool,
}

/// The map of a disk and all that changes with it.
#[derive(Debug)]
pub struct Map {
    /// Its identity, for records.
    pub id: DiskId,
    /// Cluster to entry.
    pub tree: Tree,
    /// Bytes.
    pub size: u64,
    /// Bytes from the start that come from the base where nothing else is said.
    pub base_len: u64,
    /// Generation of the last fork from or to this disk: what is older may be shared.
    pub last_fork: Generation,
    /// Generation of the last change of the map.
    pub changed: Generation,
    /// What it has and may have of the pool.
    pub account: Account,
    /// Clusters requests are busy with.
    pub busy: HashMap<u32, Busy>,
    /// Who waits for one of `busy`.
    pub waiting: Waiters,
    /// The disk is gone; handles to it are stale.
    pub is_deleted: bool,
    /// Whether the pool knows that there is something to collect here.
    pub is_listed: bool,
    /// What the round of commits under way has still to write of this disk.
    pub(super) closing: Backlog,
    /// What has changed since that round began.
    pub(super) backlog: Backlog,
    /// Requests that wait for a commit to take some of it.
    pub(super) stalled: Waiters,
    slab: Slab,
}

impl Volume {
    /// The volume of `row` with the map `tree`, without its quota.
    #[must_use]
    pub fn new(row: &Row, tree: Tree, last_fork: Generation, changed: Generation) -> Self {
        let map = Map {
            id: row.id,
            tree,
            size: row.size,
            base_len: row.base_len,
            last_fork,
            changed,
            account: Account::new(row.birth_generation),
            busy: HashMap::new(),
            waiting: Waiters::default(),
            is_deleted: false,
            is_listed: false,
            closing: Backlog::default(),
            backlog: Backlog::default(),
            stalled: Waiters::default(),
            slab: Slab::default(),
        };
        Self {
            id: row.id,
            gate: Gate::default(),
            map: RwLock::new(map),
            opens: AtomicU32::new(0),
            is_committing: AtomicBool::new(false),
        }
    }
}

impl Map {
    /// The entry of `lcn`.
    #[must_use]
    pub fn get(&self, lcn: Lcn) -> Entry {
        self.tree.get(lcn)
    }

    /// Whether this disk alone refers to the entry's own cluster, known without looking further
    /// (I4): it was born after the last fork.
    #[must_use]
    pub fn is_own(&self, entry: &Entry) -> bool {
        entry.own != 0 && entry.birth > self.last_fork.0
    }

    /// Makes `lcn` map to `new`; references, dirty marks and the account follow.
    pub fn set(&mut self, space: &Space, lcn: Lcn, new: Entry, now: Generation) {
        let (leaf_number, place) = leaf_of(lcn);
        let leaf = self.tree.leaf_mut(leaf_number, &space.counts);
        let old = std::mem::replace(&mut leaf.entries[place], new);
        let before = leaf.dirty;
        leaf.dirty |= 1 << place;
        if leaf.dirty != before {
            self.note_leaf(leaf_number, 1, before == 0);
        }
        for cluster in new.clusters() {
            if cluster != 0 && !old.refers_to(cluster) {
                space.counts.retain(cluster);
            }
        }
        for cluster in old.clusters() {
            if cluster != 0 && !new.refers_to(cluster) {
                self.note_drop(Dropped::Cluster(cluster), 1);
            }
        }
        self.changed = now;
        self.count_change(&old, &new);
        self.balance(space);
    }

    /// Whether the own cluster of `lcn` can be, and now is, this disk's alone (I4): its leaf is
    /// made unshared, and then nothing else refers to the cluster, not even a drop on its way (R5).
    /// What the disk inherited stays as it is: claimed, it could not be told from what the disk has
    /// allocated itself, and would count for its limit.
    pub fn claim(&mut self, space: &Space, lcn: Lcn, now: Generation) -> bool {
        if self.get(lcn).birth <= self.account.birth().0 {
            return false;
        }
        let (leaf_number, place) = leaf_of(lcn);
        let leaf = self.tree.leaf_mut(leaf_number, &space.counts);
        let mut entry = leaf.entries[place];
        if entry.own == 0 || space.counts.get(entry.own) != 1 {
            return false;
        }
        entry.birth = now.0;
        self.set(space, lcn, entry, now);
        true
    }

    /// A cluster for this disk to write to, from what it set aside.
    ///
    /// # Errors
    /// [`PoolError::NoSpace`].
    pub fn take_cluster(&mut self, space: &Space) -> Result<NewCluster, PoolError> {
        self.slab.take(space, &mut self.account)
    }

    /// Gives back what was set aside and not used. Returns who waits for that.
    pub fn drop_slab(&mut self, space: &Space) -> Woken {
        let (clusters, is_written) = self.slab.empty();
        // Before others can take them: what was reserved stays promised.
        self.balance(space);
        space.give_back(clusters, is_written)
    }

    /// Clusters set aside and not used.
    #[must_use]
    pub fn slab_len(&self) -> u32 {
        self.slab.len()
    }

    /// Puts `tree` in the place of this disk's map; the old one is dropped.
    pub fn replace_tree(&mut self, tree: Tree) {
        let old = std::mem::replace(&mut self.tree, tree);
        if let Some(root) = old.root {
            self.note_drop(Dropped::Root(root), 0);
        }
    }

    /// All that this disk has may be shared from now on, by a fork in `generation`.
    pub fn share_all(&mut self, generation: Generation) {
        self.last_fork = generation;
        self.count_shared();
    }

    /// Whose space its next cluster comes from.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        self.account.purpose().0
    }

    /// Unmaps `count` clusters from `first`. Whole leaves go at once, with one record for all.
    /// Where the base shows through they become zeros; `zero_leaf` is a leaf of zeros to share.
    pub fn unmap(
        &mut self,
        space: &Space,
        first: Lcn,
        count: u32,
        size: ClusterSize,
        zero_leaf: &Shared<Leaf>,
        now: Generation,
    ) {
        let end = first.0 + count;
        let base_end = size.count(self.base_len).unwrap_or(u32::MAX);
        let mut lcn = first.0;
        while lcn < end {
            let (leaf, place) = leaf_of(Lcn(lcn));
            let is_whole = place == 0 && end - lcn >= 64;
            if is_whole {
                lcn = self.unmap_leaves(leaf, (end - lcn) / 64, base_end, zero_leaf, now);
                continue;
            }
            let new = unmapped(lcn < base_end);
            if self.get(Lcn(lcn)) != new {
                self.set(space, Lcn(lcn), new, now);
            }
            lcn += 1;
        }
        self.balance(space);
    }

    /// Unmaps `count` leaves from leaf `first`; returns the cluster after them.
    fn unmap_leaves(
        &mut self,
        first: u32,
        count: u32,
        base_end: u32,
        zero_leaf: &Shared<Leaf>,
        now: Generation,
    ) -> u32 {
        let end = first + count;
        let zeroed_end = base_end.div_ceil(64).clamp(first, end);
        let mut run = first;
        for leaf in first..zeroed_end {
            run = self.unmap_leaf(leaf, run, Some(zero_leaf));
        }
        self.note_leaves(run..zeroed_end, true);
        run = zeroed_end;
        let mut next = self.tree.next_leaf(zeroed_end);
        while let Some(leaf) = next.filter(|leaf| *leaf < end) {
            run = self.unmap_leaf(leaf, run, None);
            next = leaf
                .checked_add(1)
                .and_then(|leaf| self.tree.next_leaf(leaf));
        }
        self.note_leaves(run..end, false);
        self.changed = now;
        end * 64
    }

    /// Unmaps a leaf at the end of a run of leaves that one record is going to name. A leaf that waits
    /// in a backlog is not in the run: the record could come after the leaf's own, and undo it. It
    /// stays, empty and changed as a whole. Returns where the run begins.
    fn unmap_leaf(&mut self, leaf: u32, run: u32, zero_leaf: Option<&Shared<Leaf>>) -> u32 {
        let dirty = self.tree.leaf(leaf).map_or(0, |leaf| leaf.dirty);
        if dirty == 0 {
            let old = self.tree.replace_leaf(leaf, zero_leaf.cloned());
            self.forget_leaf(old);
            return run;
        }
        self.note_leaves(run..leaf, zero_leaf.is_some());
        let empty = Leaf {
            entries: [unmapped(zero_leaf.is_some()); LEAF_ENTRIES],
            dirty: u64::MAX,
        };
        let old = self.tree.replace_leaf(leaf, Some(Shared::new(empty)));
        self.forget_leaf(old);
        self.note_leaf(leaf, dirty.count_zeros(), false);
        leaf + 1
    }

    fn note_leaves(&mut self, leaves: Range<u32>, is_zeroed: bool) {
        if !leaves.is_empty() {
            let count = (leaves.end - leaves.start) * 64;
            self.note_unmap(Lcn(leaves.start * 64), count, is_zeroed);
        }
    }

    fn forget_leaf(&mut self, old: Option<Shared<Leaf>>) {
        let Some(leaf) = old else { return };
        let clusters = leaf.entries.iter().flat_map(Entry::clusters);
        let clusters = clusters.filter(|cluster| *cluster != 0).count();
        let clusters = u32::try_from(clusters).expect("at most 128 in a leaf");
        self.count_gone(&leaf);
        self.note_drop(Dropped::Leaf(leaf), clusters);
    }

    /// Marks `lcn` as having one fill fewer. Whether requests that wait may go on: if they could
    /// have seen the fill, wake them.
    pub fn end_fill(&mut self, lcn: Lcn) -> bool {
        let Some(busy) = self.busy.get_mut(&lcn.0) else {
            return false;
        };
        let left = busy.fills.checked_sub(1);
        busy.fills = left.expect("a fill that ends has begun");
        let is_free = busy.fills == 0 && !busy.is_exclusive;
        if is_free {
            self.end_exclusive(lcn);
        }
        is_free
    }

    /// Marks `lcn` as no longer one request's alone. Requests that wait may go on. What was charged
    /// and not allocated is not charged any more.
    pub fn end_exclusive(&mut self, lcn: Lcn) {
        self.settle(lcn, u16::MAX);
        self.busy.remove(&lcn.0);
    }

    /// All that wait, to be woken when the map is unlocked.
    pub fn take_waiting(&mut self) -> Woken {
        self.waiting.take()
    }
}

/// Replay at open: nothing is in flight, counts are derived afterwards, nothing becomes dirty.
impl Map {
    /// The catalogue row changed.
    pub fn replay_row(&mut self, row: &Row) {
        self.size = row.size;
        self.base_len = row.base_len;
        self.account.set_birth(row.birth_generation);
    }

    /// `Err` if clusters `first..first + count` are not in this disk.
    ///
    /// # Errors
    /// [`PoolError::Damaged`].
    pub fn check_inside(&self, first: Lcn, count: u32, size: ClusterSize) -> Result<(), PoolError> {
        let all = size.count(self.size).unwrap_or(u32::MAX);
        match first.0.checked_add(count) {
            Some(end) if end <= all => Ok(()),
            Some(_) | None => Err(PoolError::damaged(format!(
                "a record of {count} clusters from {} of disk {}, which has {all}",
                first.0, self.id
            ))),
        }
    }

    /// `lcn` maps to `entry`.
    pub fn replay_entry(&mut self, replay: &Replay, lcn: Lcn, entry: Entry) {
        let (leaf, place) = leaf_of(lcn);
        self.tree.leaf_mut(leaf, &replay.counts).entries[place] = entry;
        self.changed = Generation(replay.generation);
    }

    /// `count` clusters from `first` map to nothing, or to zeros.
    pub fn replay_unmap(&mut self, replay: &Replay, first: Lcn, count: u32, is_zeroed: bool) {
        let new = unmapped(is_zeroed);
        let end = first.0.saturating_add(count);
        let mut lcn = first.0;
        while lcn < end {
            let (leaf, place) = leaf_of(Lcn(lcn));
            if place == 0 && end - lcn >= 64 {
                let zeros = is_zeroed.then_some(&replay.zeros);
                lcn += 64 * self.tree.fill(leaf, (end - lcn) / 64, zeros);
            } else {
                self.tree.leaf_mut(leaf, &replay.counts).entries[place] = new;
                lcn += 1;
            }
        }
        self.changed = Generation(replay.generation);
    }

    /// The map becomes a fork's, in `generation`. Its row says when the disk was born.
    pub fn become_fork(&mut self, tree: Tree, generation: Generation) {
        self.tree = tree;
        self.last_fork = generation;
        self.changed = generation;
    }
}
