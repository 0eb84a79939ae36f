//! Discarding and zeroing: changes of the map, and zeros written over parts of blocks.
//!
//! Each call does the first part of a range: a bounded number of clusters, or the part of a block at
//! an end of it. Where a range is cut depends on where the disk ends, so that is found out with the
//! map locked, part by part: the disk may grow between two of them.

use super::disk::Disk;
use super::error::DiskError;
use super::pass::Pass;
use super::plan::Source;
use super::write::{Step, WritePlan};
use crate::format::journal::Entry;
use crate::format::units::{ClusterSize, Lcn, bytes_of};
use crate::pool::busy::Busy;
use crate::pool::entry::Place;
use crate::pool::volume::Map;
use crate::sync::RwLockWriteGuard;
use std::ops::Range;
use std::task::Waker;

/// Most clusters of the disk that one call unmaps: whole leaves of the map cost little each.
const UNMAPPED_MAX: u32 = 4096;
/// Most clusters of the disk that one call makes zeros one by one.
const ZEROED_MAX: u32 = 128;

/// What a call of [`Disk::plan_discard`] or [`Disk::plan_zeroes`] came to.
#[derive(Debug)]
pub struct ZeroStep {
    /// [`Step::Done`]: go on after `len` bytes. [`Step::Ready`], for zeroes only: write zeros to
    /// the plan's segments, then [`Disk::complete_write`], then go on after `len` bytes. Anything
    /// else: as for a write; nothing is done yet.
    pub step: Step,
    /// Bytes from the start of the range; 0 where nothing is done yet.
    pub len: u64,
}

impl ZeroStep {
    fn done(len: u64) -> Self {
        let step = Step::Done;
        Self { step, len }
    }

    fn stopped(step: Step) -> Self {
        Self { step, len: 0 }
    }
}

/// The beginning of a range.
enum Part {
    /// Less than a block, and all of the range that is in it.
    Edge(Range<u64>),
    /// Whole blocks.
    Blocks(Range<u64>),
}

impl Disk {
    /// Unmaps the first whole blocks in `[offset, offset + len)`, as many as one call does: they read
    /// as zeros, and clusters that are covered whole are given back. Parts of blocks at the ends
    /// are left as they are. [`Step::Done`] or [`Step::Busy`].
    ///
    /// # Errors
    /// Out of range, read-only, deleted, or poisoned.
    pub fn plan_discard(
        &self,
        _pass: &Pass,
        offset: u64,
        len: u64,
        waker: &Waker,
    ) -> Result<ZeroStep, DiskError> {
        let map = self.lock_for_zeroes(offset, len)?;
        match self.first_part(&map, offset, len) {
            Part::Edge(edge) => Ok(ZeroStep::done(edge.end - edge.start)),
            Part::Blocks(blocks) => Ok(self.zero_blocks(map, blocks, true, waker)),
        }
    }

    /// Makes the beginning of `[offset, offset + len)` read as zeros: as much as one call does, which
    /// is bounded. `plan` is for the part of a block at an end of the range, which is written like
    /// any other bytes; it is cleared first.
    ///
    /// # Errors
    /// As [`Disk::plan_write`].
    pub fn plan_zeroes(
        &self,
        pass: &Pass,
        offset: u64,
        len: u64,
        may_unmap: bool,
        plan: &mut WritePlan,
        waker: &Waker,
    ) -> Result<ZeroStep, DiskError> {
        let map = self.lock_for_zeroes(offset, len)?;
        let edge = match self.first_part(&map, offset, len) {
            Part::Edge(edge) => edge,
            Part::Blocks(blocks) => return Ok(self.zero_blocks(map, blocks, may_unmap, waker)),
        };
        let edge_len = edge.end - edge.start;
        if self.is_zero(&map, edge.start) {
            return Ok(ZeroStep::done(edge_len));
        }
        // The pass keeps the disk's size as it is: whoever changes it drains the disk.
        drop(map);
        let bytes = u32::try_from(edge_len).expect("less than a block");
        match self.plan_write(pass, edge.start, bytes, plan, waker)? {
            step @ (Step::Ready | Step::Done) => Ok(ZeroStep {
                step,
                len: edge_len,
            }),
            step @ (Step::Copy(_) | Step::Busy | Step::Full) => Ok(ZeroStep::stopped(step)),
        }
    }

    fn lock_for_zeroes(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<RwLockWriteGuard<'_, Map>, DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly { name: self.name() });
        }
        self.pool().check_poison()?;
        let map = self.volume().map.write();
        self.check_range(&map, offset, len)?;
        Ok(map)
    }

    /// The end of the disk counts as the end of a block.
    fn first_part(&self, map: &Map, offset: u64, len: u64) -> Part {
        let block = u64::from(self.block_size());
        let end = offset + len;
        let block_end = offset.next_multiple_of(block);
        if block_end > offset {
            return Part::Edge(offset..block_end.min(end));
        }
        let whole = if end == map.size {
            end
        } else {
            end / block * block
        };
        if whole > offset {
            Part::Blocks(offset..whole)
        } else {
            Part::Edge(offset..end)
        }
    }

    /// Whether the block around byte `at` holds nothing but zeros, and no write that has ended says
    /// otherwise: one that is under way comes after.
    fn is_zero(&self, map: &Map, at: u64) -> bool {
        let size = self.pool().cluster_size();
        let (lcn, within) = size.split(at);
        let sub = within / self.block_size();
        let place = map.get(lcn).place(sub);
        !matches!(place, Place::Pool(_)) && self.sub_source(map, lcn, place, sub) == Source::Zero
    }

    fn zero_blocks(
        &self,
        mut map: RwLockWriteGuard<'_, Map>,
        blocks: Range<u64>,
        may_unmap: bool,
        waker: &Waker,
    ) -> ZeroStep {
        let size = self.pool().cluster_size();
        let most = if may_unmap { UNMAPPED_MAX } else { ZEROED_MAX };
        let turn = u64::from(most) * size.bytes();
        let to = blocks.end.min((blocks.start / turn + 1) * turn);
        if self.must_wait(&mut map, waker) {
            return ZeroStep::stopped(Step::Busy);
        }
        if is_taken(&map, size, blocks.start..to) {
            map.waiting.push(waker.clone());
            return ZeroStep::stopped(Step::Busy);
        }
        self.zero_in_map(&mut map, blocks.start..to, may_unmap);
        self.pool().list_changes(self.volume(), &mut map);
        ZeroStep::done(to - blocks.start)
    }

    fn zero_in_map(&self, map: &mut Map, range: Range<u64>, may_unmap: bool) {
        let pool = self.pool();
        let size = pool.cluster_size();
        let is_disk_end = range.end == map.size;
        let (mut lcn, mut within) = size.split(range.start);
        let mut at = range.start;
        while at < range.end {
            let whole = (range.end - at) / size.bytes();
            if within == 0 && whole > 0 && may_unmap {
                let count = u32::try_from(whole).expect("disks have at most 2^32 clusters");
                map.unmap(
                    &pool.space,
                    lcn,
                    count,
                    size,
                    pool.zero_leaf(),
                    pool.generation(),
                );
                at += whole * size.bytes();
            } else {
                let left = range.end - size.disk_offset(lcn);
                let to = u32::try_from(left.min(size.bytes())).expect("at most 1 MiB");
                // The rest of a last block, beyond the disk's end, is nobody's.
                let is_last = is_disk_end && left <= size.bytes();
                let mask = if is_last {
                    size.touched(within, to)
                } else {
                    size.covered(within, to)
                };
                self.zero_subs(map, lcn, mask, may_unmap);
                at += u64::from(to - within);
            }
            (lcn, within) = size.split(at);
        }
    }

    /// Marks the sub-clusters `mask` of `lcn` as zeros. The last ones take the cluster with them.
    fn zero_subs(&self, map: &mut Map, lcn: Lcn, mask: u16, may_unmap: bool) {
        let pool = self.pool();
        let old = map.get(lcn);
        let zeroed = Entry {
            alloc: old.alloc & !mask,
            zero: old.zero | mask,
            ..old
        };
        let is_over_base = pool.cluster_size().disk_offset(lcn) < map.base_len;
        let has_below = zeroed.under != 0 || is_over_base;
        let is_empty = zeroed.alloc == 0 && (zeroed.zero == u16::MAX || !has_below);
        // Writes in flight to other blocks of the cluster are going to allocate them.
        let filled = map.busy.get_mut(&lcn.0).filter(|busy| busy.fills > 0);
        let is_filled = filled.is_some();
        if let Some(busy) = filled.filter(|_| old.alloc & mask != 0) {
            busy.discard(old.alloc & mask);
        }
        let new = if is_empty && !is_filled && (may_unmap || old.own == 0) {
            Entry {
                zero: if is_over_base { u16::MAX } else { 0 },
                ..Entry::default()
            }
        } else if zeroed.zero == u16::MAX {
            Entry { under: 0, ..zeroed }
        } else {
            zeroed
        };
        if new != old {
            map.set(&pool.space, lcn, new, pool.generation());
        }
    }
}

/// Whether one request has one of the clusters for itself, or too much was discarded there already
/// since writes to it began.
fn is_taken(map: &Map, size: ClusterSize, range: Range<u64>) -> bool {
    let (first, last) = (size.split(range.start).0.0, size.split(range.end - 1).0.0);
    let is_in_the_way = |busy: &Busy| busy.is_exclusive || !busy.can_discard();
    // Whichever is less to look at.
    if u64::from(last - first) < bytes_of(map.busy.len()) {
        return (first..=last).any(|lcn| map.busy.get(&lcn).is_some_and(is_in_the_way));
    }
    map.busy
        .iter()
        .any(|(lcn, busy)| (first..=last).contains(lcn) && is_in_the_way(busy))
}
