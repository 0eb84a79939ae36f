//! A handle on an open disk or snapshot, and its blocking face.

use super::base::Base;
use super::discard::ZeroStep;
use super::error::DiskError;
use super::pass::Pass;
use super::plan::{Segment, Source};
use super::write::{Padding, Step, WritePlan, WriteSegment};
use crate::format::catalogue::RowKind;
use crate::format::units::{DiskId, bytes_of, len_of};
use crate::pool::Pool;
use crate::pool::catalogue::Item;
use crate::pool::space::Purpose;
use crate::pool::volume::{Map, Volume};
use crate::storage::{AlignedBuf, Tier};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Thread, current, park};
use std::os::fd::BorrowedFd;
use std::task::{Wake, Waker};

/// Most bytes the blocking face moves in one plan.
const PART_LEN_MAX: usize = 1 << 20;

/// What all clones of a handle share.
#[derive(Debug)]
pub(super) struct Handle {
    pub pool: Arc<Pool>,
    pub volume: Arc<Volume>,
    pub base: Option<Arc<Base>>,
    pub is_read_only: bool,
    pub is_ephemeral: bool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.volume.opens.fetch_sub(1, Ordering::SeqCst) == 1 {
            // Nobody writes any more: what was set aside for the next writes is for others.
            let woken = self.volume.map.write().drop_slab(&self.pool.space);
            woken.wake();
        }
    }
}

/// An open disk or snapshot. Cheap to clone.
///
/// The *sans-I/O face* (`enter`, `plan_*`, `complete_write`) serves those who bring their own
/// ring; the *blocking face* (`read_at`, `write_at`, `discard`, `write_zeroes`, `flush`) moves the
/// bytes itself. Both can be used at once, from any number of threads.
///
/// Like a disk: a write is seen by every read that begins after it completed; overlapping requests
/// in flight at once may take effect in any order, sector by sector; what completed before a flush
/// began survives a crash once the flush has returned.
#[derive(Debug, Clone)]
pub struct Disk(pub(super) Arc<Handle>);

/// Completes a write when dropped: a store that panics keeps no cluster busy.
struct Completing<'a> {
    disk: &'a Disk,
    plan: &'a mut WritePlan,
    is_ok: bool,
}

impl Drop for Completing<'_> {
    fn drop(&mut self) {
        self.disk.complete_write(self.plan, self.is_ok);
    }
}

/// Wakes a thread that waits in the blocking face.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

pub(super) fn thread_waker() -> Waker {
    Waker::from(Arc::new(Unpark(current())))
}

impl Disk {
    /// Opens the disk or snapshot `name`, and its base.
    ///
    /// # Errors
    /// No such disk, or its base is missing or changed.
    pub fn open(pool: &Arc<Pool>, name: &str) -> Result<Disk, DiskError> {
        let waker = thread_waker();
        loop {
            let item = pool.find(name)?;
            let base = item.row.base.as_ref().map(Base::open).transpose()?;
            item.volume.opens.fetch_add(1, Ordering::SeqCst);
            let handle = Handle {
                pool: Arc::clone(pool),
                is_read_only: pool.is_read_only() || item.row.kind == RowKind::Snapshot,
                is_ephemeral: item.row.is_ephemeral,
                volume: item.volume,
                base,
            };
            let disk = Disk(Arc::new(handle));
            // Whoever replaces or removes a disk drains it first, then looks whether it is open. Once
            // this has been let in, either it was counted in time, or it now finds the new row.
            drop(disk.enter_blocking(&waker));
            let id = disk.volume().id;
            let is_same = |now: &Item| now.row == item.row;
            if pool.with_catalogue(|all| all.get(id).is_some_and(is_same)) {
                return Ok(disk);
            }
        }
    }

    /// Its name: `DISK` or `DISK@SNAPSHOT`.
    #[must_use]
    pub fn name(&self) -> String {
        let name = |row: &crate::format::catalogue::Row| row.name.clone();
        let found = self
            .pool()
            .with_catalogue(|all| all.get(self.volume().id).map(|i| name(&i.row)));
        found.unwrap_or_else(|| format!("deleted disk {}", self.volume().id))
    }

    /// Its identity, which no other disk of its pool has or will have.
    #[must_use]
    pub fn id(&self) -> DiskId {
        self.volume().id
    }

    /// 20 ASCII characters that identify it, for a serial number.
    #[must_use]
    pub fn id_string(&self) -> String {
        let uuid = u32::from_le_bytes(*self.pool().uuid().first_chunk().expect("16 bytes"));
        format!("tp{uuid:08x}{:010x}", self.volume().id.0)
    }

    /// Bytes; a multiple of 512. May change while the disk is open.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.volume().map.read().size
    }

    /// A snapshot, or the pool is open for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.0.is_read_only
    }

    /// Flushes are acknowledged at once: contents may be lost in a crash, but never mixed up.
    #[must_use]
    pub fn is_ephemeral(&self) -> bool {
        self.0.is_ephemeral
    }

    /// Clusters of the pool are kept for it, which others may not take.
    #[must_use]
    pub fn has_reserve_left(&self) -> bool {
        self.volume().map.read().purpose() == Purpose::ReservedData
    }

    /// Bytes in a cluster: discards of whole ones give most space back.
    #[must_use]
    pub fn cluster_size(&self) -> u32 {
        u32::try_from(self.pool().cluster_size().bytes()).expect("at most 1 MiB")
    }

    /// Bytes in a sub-cluster: smaller first writes cost a read.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        u32::try_from(self.pool().cluster_size().sub_bytes()).expect("at most 64 KiB")
    }

    /// The pool it is in.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.0.pool
    }

    /// Its base image.
    #[must_use]
    pub fn base(&self) -> Option<&Arc<Base>> {
        self.0.base.as_ref()
    }

    /// How a ring must treat [`Disk::data_fd`].
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.pool().storage().tier()
    }

    /// The pool's file, for a ring of one's own.
    #[must_use]
    pub fn data_fd(&self) -> Option<BorrowedFd<'_>> {
        self.pool().storage().as_fd()
    }

    pub(super) fn volume(&self) -> &Arc<Volume> {
        &self.0.volume
    }

    /// Leave for one request. `shard` spreads the counting: give each worker its own. `None` while
    /// the disk is being drained; `waker` is woken when it is worth trying again.
    #[must_use]
    pub fn enter(&self, shard: usize, waker: &Waker) -> Option<Pass> {
        let is_in = self.volume().gate.enter(shard, waker);
        is_in.then(|| Pass::new(&self.0, shard))
    }

    pub(super) fn enter_blocking(&self, waker: &Waker) -> Pass {
        loop {
            if let Some(pass) = self.enter(0, waker) {
                return pass;
            }
            park();
        }
    }

    /// Refuses what is out of range before any part of it is done.
    fn check_request(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_range(&self.volume().map.read(), offset, len)
    }

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// Out of range, deleted, or the store or base failed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.check_request(offset, bytes_of(buf.len()))?;
        let waker = thread_waker();
        let mut segments = Vec::new();
        let mut at = offset;
        for part in buf.chunks_mut(PART_LEN_MAX) {
            let len = u32::try_from(part.len()).expect("at most PART_LEN_MAX");
            let pass = self.enter_blocking(&waker);
            segments.clear();
            self.plan_read(&pass, at, len, &mut segments)?;
            for segment in &segments {
                let from = len_of(u64::from(segment.at));
                let to = from + len_of(u64::from(segment.len));
                self.read_source(segment.source, &mut part[from..to])?;
            }
            at += u64::from(len);
        }
        Ok(())
    }

    /// Fills `buf` from one place.
    pub(super) fn read_source(&self, source: Source, buf: &mut [u8]) -> Result<(), DiskError> {
        match source {
            Source::Pool(at) => {
                let read = self.pool().storage().read_at(buf, at);
                read.map_err(DiskError::io("reading the pool"))
            }
            Source::Base(at) => {
                let base = self.base().expect("the plan found a base");
                base.read_at(buf, at)
                    .map_err(DiskError::io("reading the base image"))
            }
            Source::Zero => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// Writes `buf` at byte `offset`.
    ///
    /// # Errors
    /// Out of range, read-only, deleted, out of space (at once: nobody waits here), or the store
    /// failed. Any part of the range may have been written.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.check_request(offset, bytes_of(buf.len()))?;
        let waker = thread_waker();
        let mut plan = WritePlan::default();
        let mut at = offset;
        for part in buf.chunks(PART_LEN_MAX) {
            self.write_part(part, at, &mut plan, &waker)?;
            at += bytes_of(part.len());
        }
        self.relieve()
    }

    fn write_part(
        &self,
        part: &[u8],
        offset: u64,
        plan: &mut WritePlan,
        waker: &Waker,
    ) -> Result<(), DiskError> {
        let len = u32::try_from(part.len()).expect("at most PART_LEN_MAX");
        let (_pass, step) = self.settle(waker, |pass, waker| {
            self.plan_write(pass, offset, len, plan, waker)
        })?;
        assert!(
            matches!(step, Step::Ready),
            "a write is never pure metadata"
        );
        self.write_planned(plan, |segment| {
            let from = len_of(u64::from(segment.at));
            let to = from + len_of(u64::from(segment.len));
            self.write_segment(&part[from..to], segment)
        })
    }

    /// Writes the segments of a plan, and completes it, whatever becomes of them.
    fn write_planned(
        &self,
        plan: &mut WritePlan,
        mut write: impl FnMut(&WriteSegment) -> std::io::Result<()>,
    ) -> Result<(), DiskError> {
        let mut completing = Completing {
            disk: self,
            plan,
            is_ok: false,
        };
        let mut segments = completing.plan.segments().iter();
        let written = segments.try_for_each(&mut write);
        completing.is_ok = written.is_ok();
        written.map_err(DiskError::io("writing the pool"))
    }

    fn write_segment(&self, bytes: &[u8], segment: &WriteSegment) -> std::io::Result<()> {
        let Padding { before, after } = segment.padding;
        let storage = self.pool().storage();
        if (before, after) == (0, 0) {
            return storage.write_at(bytes, segment.to);
        }
        let before_len = len_of(u64::from(before));
        let mut all = AlignedBuf::new(before_len + bytes.len() + len_of(u64::from(after)));
        all[before_len..][..bytes.len()].copy_from_slice(bytes);
        storage.write_at(&all, segment.to - u64::from(before))
    }

    /// Plans again and again, doing between what the plan asks for and waiting where it must, until
    /// it is [`Step::Ready`] or [`Step::Done`]; with the pass it was planned under.
    pub(super) fn settle(
        &self,
        waker: &Waker,
        mut plan: impl FnMut(&Pass, &Waker) -> Result<Step, DiskError>,
    ) -> Result<(Pass, Step), DiskError> {
        let mut has_reclaimed = false;
        loop {
            let mut pass = self.enter_blocking(waker);
            match plan(&pass, waker)? {
                Step::Copy(job) => {
                    pass.pause();
                    self.run_copy(job)?;
                }
                Step::Busy => {
                    drop(pass);
                    park();
                }
                Step::Full if has_reclaimed => {
                    self.pool().space.stop_waiting(waker);
                    return Err(DiskError::NoSpace);
                }
                Step::Full => {
                    // A commit drains disks: not with a pass in hand.
                    drop(pass);
                    self.pool().reclaim()?;
                    has_reclaimed = true;
                }
                step @ (Step::Ready | Step::Done) => return Ok((pass, step)),
            }
        }
    }

    /// Whether a change of the disk waits for a commit to take what changed before; then `waker` is
    /// woken by that.
    pub(super) fn must_wait(&self, map: &mut Map, waker: &Waker) -> bool {
        let must_wait = self.pool().must_wait(map);
        if must_wait {
            map.stall(waker);
        }
        must_wait
    }

    /// Without a background thread nobody else commits what piles up.
    pub(super) fn relieve(&self) -> Result<(), DiskError> {
        if self.pool().wants_commit() {
            self.pool().flush()?;
        }
        Ok(())
    }

    /// Makes `[offset, offset + len)` read as zeros, and gives whole clusters of it back. Parts of
    /// blocks at the ends keep their contents.
    ///
    /// # Errors
    /// Out of range, read-only, or deleted.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.zero_parts(offset, len, |pass, at, left, _plan, waker| {
            self.plan_discard(pass, at, left, waker)
        })
    }

    /// Makes every byte of `[offset, offset + len)` read as zero. `may_unmap` lets whole clusters
    /// be given back; otherwise they stay allocated to the disk.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        self.zero_parts(offset, len, |pass, at, left, plan, waker| {
            self.plan_zeroes(pass, at, left, may_unmap, plan, waker)
        })
    }

    /// Part by part: nothing that one plan was based on is relied on in the next.
    fn zero_parts(
        &self,
        offset: u64,
        len: u64,
        plan_part: impl Fn(&Pass, u64, u64, &mut WritePlan, &Waker) -> Result<ZeroStep, DiskError>,
    ) -> Result<(), DiskError> {
        self.check_request(offset, len)?;
        let waker = thread_waker();
        let mut plan = WritePlan::default();
        let mut done = 0;
        while done < len {
            let mut part = 0;
            let (_pass, step) = self.settle(&waker, |pass, waker| {
                let planned = plan_part(pass, offset + done, len - done, &mut plan, waker)?;
                part = planned.len;
                Ok(planned.step)
            })?;
            if matches!(step, Step::Ready) {
                self.write_zero_segments(&mut plan)?;
            }
            done += part;
        }
        self.relieve()
    }

    /// Writes zeros where a plan says, and ends it.
    fn write_zero_segments(&self, plan: &mut WritePlan) -> Result<(), DiskError> {
        let zeros = AlignedBuf::new(len_of(u64::from(self.block_size())));
        self.write_planned(plan, |segment| {
            self.write_segment(&zeros[..len_of(u64::from(segment.len))], segment)
        })
    }

    /// Makes everything that completed before durable: all disks of the pool share one commit.
    /// Returns at once for ephemeral disks.
    ///
    /// # Errors
    /// The pool is poisoned; what was not flushed before may be lost.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.is_ephemeral() {
            return Ok(self.pool().check_poison()?);
        }
        Ok(self.pool().flush()?)
    }

    /// Segments of a read, for callers that want to see where data is.
    ///
    /// # Errors
    /// As [`Disk::plan_read`].
    pub fn segments(&self, offset: u64, len: u32) -> Result<Vec<Segment>, DiskError> {
        let pass = self.enter_blocking(&thread_waker());
        let mut segments = Vec::new();
        self.plan_read(&pass, offset, len, &mut segments)?;
        Ok(segments)
    }
}
