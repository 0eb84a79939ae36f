//! Discarding and zeroing: changes of the map alone.

use super::disk::Disk;
use super::error::DiskError;
use super::pass::Pass;
use super::write::Step;
use crate::format::journal::Entry;
use crate::format::units::{ClusterSize, Lcn};
use crate::pool::volume::Map;
use std::ops::Range;
use std::task::Waker;

/// Most clusters of the disk that are unmapped before others get at the map: 4 GiB at 64 KiB.
const CLUSTERS_PER_TURN: u32 = 65536;

impl Disk {
    /// Unmaps the whole blocks in `[offset, offset + len)`: they read as zeros, and clusters that
    /// are covered whole are given back. [`Step::Done`] or [`Step::Busy`].
    ///
    /// # Errors
    /// Out of range, read-only, deleted, or poisoned.
    pub fn plan_discard(
        &self,
        pass: &Pass,
        offset: u64,
        len: u64,
        waker: &Waker,
    ) -> Result<Step, DiskError> {
        self.check_can_change(offset, len)?;
        let (_, body, _) = self.split_blocks(offset, len);
        self.zero_blocks(pass, body, true, waker)
    }

    /// Makes `[offset, offset + len)` read as zeros. [`Step::Done`], [`Step::Busy`], or
    /// [`Step::Blocking`] if it does not begin and end at whole blocks.
    ///
    /// # Errors
    /// As [`Disk::plan_discard`].
    pub fn plan_zeroes(
        &self,
        pass: &Pass,
        offset: u64,
        len: u64,
        may_unmap: bool,
        waker: &Waker,
    ) -> Result<Step, DiskError> {
        self.check_can_change(offset, len)?;
        let (_, body, _) = self.split_blocks(offset, len);
        if body != (offset..offset + len) {
            return Ok(Step::Blocking);
        }
        self.zero_blocks(pass, body, may_unmap, waker)
    }

    fn check_can_change(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly { name: self.name() });
        }
        self.pool().check_poison()?;
        self.check_range(&self.volume().map.read(), offset, len)
    }

    /// `[offset, offset + len)` as a part of a block, whole blocks, and a part of a block. The end
    /// of the disk counts as the end of a block.
    pub(super) fn split_blocks(
        &self,
        offset: u64,
        len: u64,
    ) -> (Range<u64>, Range<u64>, Range<u64>) {
        let block = u64::from(self.block_size());
        let end = offset + len;
        let body_start = offset.next_multiple_of(block).min(end);
        let is_disk_end = end == self.size();
        let body_end = if is_disk_end {
            end
        } else {
            (end / block * block).max(body_start)
        };
        (offset..body_start, body_start..body_end, body_end..end)
    }

    fn zero_blocks(
        &self,
        _pass: &Pass,
        body: Range<u64>,
        may_unmap: bool,
        waker: &Waker,
    ) -> Result<Step, DiskError> {
        let size = self.pool().cluster_size();
        let turn = u64::from(CLUSTERS_PER_TURN) * size.bytes();
        let mut from = body.start;
        while from < body.end {
            let to = body.end.min((from / turn + 1) * turn);
            let mut map = self.volume().map.write();
            self.check_range(&map, from, to - from)?;
            if must_wait(&map, size, from..to) {
                map.waiting.push(waker.clone());
                return Ok(Step::Busy);
            }
            self.zero_in_map(&mut map, from..to, may_unmap);
            self.pool().list_changes(self.volume(), &mut map);
            from = to;
        }
        Ok(Step::Done)
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
fn must_wait(map: &Map, size: ClusterSize, range: Range<u64>) -> bool {
    let (first, last) = (size.split(range.start).0.0, size.split(range.end - 1).0.0);
    map.busy.iter().any(|(lcn, busy)| {
        (busy.is_exclusive || !busy.can_discard()) && (first..=last).contains(lcn)
    })
}
