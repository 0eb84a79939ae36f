//! Planning a write. Four cases, cluster by cluster:
//!
//! - *overwrite*: the blocks are allocated in a cluster that is this disk's alone. Under the read
//!   lock, without any change.
//! - *fill*: the cluster is this disk's alone, the blocks are not allocated: written, and their
//!   bits set at completion (I2, R1).
//! - *new*: a cluster is taken, and hung over what was there.
//!   Among many others, on a store where holes are slow to fill, a small first write carries zeros
//!   for the rest of the cluster along, and has the cluster for itself until it is done.
//! - *copy*: some data must be moved first: blocks that are only written in part, and clusters that
//!   are shared and would become three deep ([`super::copy`]). Then the write is planned again.

use super::copy::{CopyJob, merged};
use super::disk::Disk;
use super::error::DiskError;
use super::pass::Pass;
use super::plan::{Piece, pieces};
use crate::format::journal::Entry;
use crate::format::units::Lcn;
use crate::pool::PoolErrorKind;
use crate::pool::account::OverLimit;
use crate::pool::volume::Map;
use crate::pool::woken::Woken;
use std::task::Waker;

/// What to do next with a request that was planned.
#[derive(Debug)]
pub enum Step {
    /// Write the plan's segments, then [`Disk::complete_write`].
    Ready,
    /// It is done: it only changed metadata.
    Done,
    /// Run [`Disk::run_copy`], pass in hand, where blocking is allowed; then plan again.
    Copy(CopyJob),
    /// Another request is in the way: give the pass back, and plan again when woken.
    Busy,
    /// The pool is full: give the pass back, and plan again when woken, or give up.
    Full,
}

/// Largest cluster that a first write fills with zeros, bytes.
const PADDED_CLUSTER_MAX: u64 = 64 << 10;
/// First writes of more than this part of a cluster are not padded: what is gained does not make
/// up for what is written in vain.
const PADDED_PART_MAX: u64 = 4;

/// Zeros to write around a segment, in bytes. A matter of speed alone: nobody reads them, and
/// nothing else is written there meanwhile, so they may also be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Padding {
    /// Before its first byte.
    pub before: u32,
    /// After its last byte.
    pub after: u32,
}

/// A part of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteSegment {
    /// First byte, within the request.
    pub at: u32,
    /// Bytes.
    pub len: u32,
    /// Byte of the pool's file it goes to.
    pub to: u64,
    /// Zeros that had better be written with it.
    pub padding: Padding,
}

/// Blocks that a write will allocate when it completes: those it covers whole that were not
/// allocated when it was planned. Not those that were: if a discard takes one of them away while
/// the write is in flight, the discard came last, or what it zeroed around the write would be back.
#[derive(Debug, Clone, Copy)]
struct Fill {
    lcn: Lcn,
    own: u32,
    /// The blocks; charged to the disk's account when planned.
    mask: u16,
    /// As [`crate::pool::busy::Busy::discards`] when it was planned.
    began: u8,
    /// The rest of the cluster is filled with zeros.
    is_padded: bool,
}

impl Fill {
    /// The write is over, or does not take place. Whether that lets others go on.
    fn end(&self, map: &mut Map) -> bool {
        if self.is_padded {
            map.end_exclusive(self.lcn);
            true
        } else {
            map.end_fill(self.lcn)
        }
    }
}

/// Where a write goes. Reusable: its memory is kept from one request to the next.
#[derive(Debug, Default)]
pub struct WritePlan {
    segments: Vec<WriteSegment>,
    fills: Vec<Fill>,
}

impl WritePlan {
    /// What to write, in order.
    #[must_use]
    pub fn segments(&self) -> &[WriteSegment] {
        &self.segments
    }

    fn push(&mut self, segment: WriteSegment) {
        if let Some(last) = self.segments.last_mut() {
            let is_next = last.to + u64::from(last.len) == segment.to;
            if is_next && last.padding.after == 0 && segment.padding.before == 0 {
                last.len += segment.len;
                last.padding.after = segment.padding.after;
                return;
            }
        }
        self.segments.push(segment);
    }
}

/// Why planning stopped.
pub(super) enum Stop {
    Step(Step),
    /// The disk's limit in sub-clusters. Its name is looked up when the map is unlocked: the
    /// catalogue comes before maps in the lock order.
    Limit(u64),
    Error(DiskError),
}

impl Disk {
    /// Plans a write of `[offset, offset + len)`. `plan` is cleared first. After [`Step::Ready`],
    /// [`Disk::complete_write`] must be called exactly once.
    ///
    /// # Errors
    /// Out of range, read-only, deleted, poisoned, or over the disk's limit.
    pub fn plan_write(
        &self,
        pass: &Pass,
        offset: u64,
        len: u32,
        plan: &mut WritePlan,
        waker: &Waker,
    ) -> Result<Step, DiskError> {
        debug_assert!(plan.fills.is_empty(), "the last write was completed");
        debug_assert!(!pass.is_paused(), "no cluster may be used");
        plan.segments.clear();
        if self.is_read_only() {
            return Err(DiskError::ReadOnly { name: self.name() });
        }
        self.pool().check_poison()?;
        {
            let map = self.volume().map.read();
            self.check_range(&map, offset, u64::from(len))?;
            if self.plan_overwrite(&map, offset, len, plan) {
                return Ok(Step::Ready);
            }
        }
        plan.segments.clear();
        let mut map = self.volume().map.write();
        self.check_range(&map, offset, u64::from(len))?;
        if self.must_wait(&mut map, waker) {
            return Ok(Step::Busy);
        }
        let mut stopped = None;
        for piece in pieces(self, offset, len) {
            if let Err(stop) = self.plan_write_piece(&mut map, piece, plan) {
                stopped = Some(stop);
                break;
            }
        }
        self.pool().list_changes(self.volume(), &mut map);
        let Some(stop) = stopped else {
            return Ok(Step::Ready);
        };
        undo(&mut map, plan);
        if matches!(stop, Stop::Step(Step::Busy)) {
            map.waiting.push(waker.clone());
        }
        let purpose = map.purpose();
        drop(map);
        match stop {
            Stop::Error(e) => Err(e),
            Stop::Limit(subs) => Err(DiskError::LimitReached {
                name: self.name(),
                limit: subs.saturating_mul(self.pool().cluster_size().sub_bytes()),
            }),
            Stop::Step(step) => {
                if matches!(step, Step::Full) {
                    self.pool().wait_for_space(purpose, waker);
                }
                Ok(step)
            }
        }
    }

    /// Every block is allocated in this disk's own clusters: no lock but the read lock, no change.
    fn plan_overwrite(&self, map: &Map, offset: u64, len: u32, plan: &mut WritePlan) -> bool {
        let size = self.pool().cluster_size();
        for piece in pieces(self, offset, len) {
            let entry = map.get(piece.lcn);
            let touched = size.touched(piece.from, piece.to);
            if !map.is_own(&entry) || touched & !entry.alloc != 0 {
                return false;
            }
            self.push_segment(plan, piece, entry.own, Padding::default());
        }
        true
    }

    fn push_segment(&self, plan: &mut WritePlan, piece: Piece, own: u32, padding: Padding) {
        let to = self.pool_offset(own, piece.from);
        plan.push(WriteSegment {
            at: piece.at,
            len: piece.to - piece.from,
            to,
            padding,
        });
    }

    /// What to write around the first write into a cluster that may be a hole of the store.
    fn padding(&self, map: &Map, piece: Piece) -> Padding {
        let bytes = self.pool().cluster_size().bytes();
        let is_small = u64::from(piece.to - piece.from) * PADDED_PART_MAX <= bytes;
        let is_slow = map.busy.len() >= self.pool().storage().hole_writes_max();
        if is_small && bytes <= PADDED_CLUSTER_MAX && is_slow {
            Padding {
                before: piece.from,
                after: u32::try_from(bytes).expect("at most 64 KiB") - piece.to,
            }
        } else {
            Padding::default()
        }
    }

    fn plan_write_piece(
        &self,
        map: &mut Map,
        piece: Piece,
        plan: &mut WritePlan,
    ) -> Result<(), Stop> {
        let pool = self.pool();
        let size = pool.cluster_size();
        let now = pool.generation();
        let busy = map.busy.get(&piece.lcn.0).copied().unwrap_or_default();
        if busy.is_exclusive {
            return Err(Stop::Step(Step::Busy));
        }
        let mut entry = map.get(piece.lcn);
        let is_own =
            map.is_own(&entry) || (entry.own != 0 && map.claim(&pool.space, piece.lcn, now));
        entry = map.get(piece.lcn);
        let touched = size.touched(piece.from, piece.to);
        let covered = size.covered(piece.from, piece.to);
        let mut padding = Padding::default();
        if !is_own {
            // Asked before a cluster is taken for nothing.
            map.check_limit(map.more_in_new(&entry, touched))?;
            let is_hole;
            (entry, is_hole) = self.hang_new(map, piece.lcn, entry)?;
            if is_hole && busy.fills == 0 {
                padding = self.padding(map, piece);
            }
        }
        let missing = touched & !entry.alloc;
        let in_part = missing & !covered;
        if in_part != 0 {
            if busy.fills > 0 {
                return Err(Stop::Step(Step::Busy));
            }
            let job = self.copy_up(map, piece.lcn, entry, in_part)?;
            return Err(Stop::Step(Step::Copy(job)));
        }
        if missing != 0 {
            map.charge(piece.lcn, &entry, missing)?;
            let is_padded = padding != Padding::default();
            let busy = map.busy.entry(piece.lcn.0).or_default();
            busy.fills += 1;
            busy.is_exclusive = is_padded;
            plan.fills.push(Fill {
                lcn: piece.lcn,
                own: entry.own,
                mask: missing,
                began: busy.discards,
                is_padded,
            });
        }
        self.push_segment(plan, piece, entry.own, padding);
        Ok(())
    }

    /// Hangs a new cluster over what `entry` says, or asks for a copy if that would be three deep.
    /// Returns the entry, and whether the cluster may be a hole of the store.
    pub(super) fn hang_new(
        &self,
        map: &mut Map,
        lcn: Lcn,
        entry: Entry,
    ) -> Result<(Entry, bool), Stop> {
        let pool = self.pool();
        let take = |map: &mut Map| {
            map.take_cluster(&pool.space).map_err(|e| match e.kind() {
                PoolErrorKind::NoSpace => Stop::Step(Step::Full),
                PoolErrorKind::Request | PoolErrorKind::Storage | PoolErrorKind::Damaged => {
                    Stop::Error(e.into())
                }
            })
        };
        let rest = entry.rest();
        let is_merge = entry.alloc != 0 && rest != 0 && self.has_data_below(map, lcn, &entry);
        if is_merge {
            map.check_limit(map.more_in_new(&entry, merged(&entry).0))?;
        }
        let cluster = take(map)?;
        let hung = Entry {
            own: cluster.number,
            birth: pool.generation().0,
            ..entry
        };
        let new = if entry.alloc == 0 {
            // Nothing of its own: what is under stays under.
            hung
        } else if !is_merge {
            // Everything not in the old cluster is zeros: the old cluster goes under.
            Entry {
                under: entry.own,
                alloc: 0,
                zero: entry.zero | rest,
                ..hung
            }
        } else {
            let job = self.merge(map, lcn, entry, cluster.number);
            return Err(Stop::Step(Step::Copy(job)));
        };
        map.set(&pool.space, lcn, new, pool.generation());
        Ok((new, !cluster.is_written))
    }

    /// Whether sub-clusters in neither mask may hold data: in `under`, or in the base.
    fn has_data_below(&self, map: &Map, lcn: Lcn, entry: &Entry) -> bool {
        let begins = self.pool().cluster_size().disk_offset(lcn);
        entry.under != 0 || (self.base().is_some() && begins < map.base_len)
    }

    /// Ends a planned write: with `is_ok` its blocks are allocated from now on; without, they are
    /// as they were, and their contents are anything the write may have left.
    pub fn complete_write(&self, plan: &mut WritePlan, is_ok: bool) {
        let pool = self.pool();
        // Before the bits are set: the flush that makes them durable must cover the data (R2).
        pool.mark_written();
        if plan.fills.is_empty() {
            return;
        }
        let now = pool.generation();
        let mut map = self.volume().map.write();
        let mut woken = Woken::default();
        for fill in plan.fills.drain(..) {
            let entry = map.get(fill.lcn);
            // The cluster may have been discarded meanwhile: then the write came first.
            if is_ok && entry.own == fill.own {
                let busy = map.busy.get(&fill.lcn.0).copied().unwrap_or_default();
                let mask = fill.mask & !busy.discarded_since(fill.began);
                let new = Entry {
                    alloc: entry.alloc | mask,
                    zero: entry.zero & !mask,
                    ..entry
                };
                map.settle(fill.lcn, mask);
                map.set(&pool.space, fill.lcn, new, now);
            }
            if fill.end(&mut map) {
                woken.join(map.take_waiting());
            }
        }
        pool.list_changes(self.volume(), &mut map);
        drop(map);
        woken.wake();
    }
}

impl From<OverLimit> for Stop {
    fn from(over: OverLimit) -> Self {
        Stop::Limit(over.limit_subs)
    }
}

/// Takes back what a plan marked before it stopped. Nobody saw it and waits for its end: to wake
/// those who wait for others would have two of them, or one and itself, wake each other for ever.
fn undo(map: &mut Map, plan: &mut WritePlan) {
    plan.segments.clear();
    for fill in plan.fills.drain(..) {
        fill.end(map);
    }
}
