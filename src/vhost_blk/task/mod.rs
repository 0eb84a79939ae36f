//! One request from its ring to its answer.
//!
//! ```text
//!            +---- retry: busy, full, copied ----+
//!            v                                   |
//! taken -> begin -> segments in flight -> settle +-> flush (write cache off) -> answered
//!            |                                          ^
//!            +-> helper (copy, base) -------------------+
//! ```
//! A task in flight has `pending` pieces of I/O or of work elsewhere; when the last ends, `settle`
//! decides what comes next. A large request is done in slices ([`slice`]): between two of them
//! others have their turn.

mod moving;
mod slice;
mod zeroing;

use std::fmt::Display;
use std::time::Instant;

use crate::cowdisk::{
    CopyJob, DiskError, DiskErrorKind, Padding, Pass, Source, Step, Tier, WritePlan,
};
use crate::sys::mmap::GuestPin;
use crate::sys::uring::Completion;
use crate::virtio::blk::{Op, Request, Status};

use crate::vhost_blk::events::EventKind;
use crate::vhost_blk::helpers::{Work, WorkFailed};

pub(super) use moving::{Mover, task_of};
use moving::{Piece, is_of_base, part_of};
use slice::COPY_COST;

/// What a task is waiting for while something is pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Stage {
    #[default]
    New,
    Reading,
    Writing,
    Copying,
    Zeroing,
    Flushing,
}

/// What becomes of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Something is pending.
    Wait,
    /// A slice is done: go on after the others had their turn.
    Again,
    /// Try again when the disk says so.
    Busy,
    /// Try again when the pool has space.
    Full,
    /// Try again when the host may have space.
    HostFull,
    /// Try again when buffers have come back.
    Starved,
    /// Answer.
    Finish(Status),
}

/// A piece of a request that goes through a buffer of ours.
#[derive(Debug, Clone, Copy)]
struct Part {
    at: u32,
    len: u32,
}

/// See the module. Reused from request to request.
#[derive(Debug, Default)]
pub(super) struct Task {
    pub(super) lane: u32,
    pub(super) head: u16,
    /// Where in the avail ring it was.
    pub(super) avail: u16,
    pub(super) request: Request,
    pub(super) memory: Option<GuestPin>,
    pub(super) began: Option<Instant>,
    /// Since when the pool has had no space for it.
    pub(super) full_since: Option<Instant>,
    stage: Stage,
    pass: Option<Pass>,
    plan: WritePlan,
    pending: u32,
    /// Of those, the ones that read a base.
    of_bases: u32,
    failure: Option<DiskErrorKind>,
    /// Bytes of an IN or OUT that are done.
    done: u32,
    /// Bytes after them that are being moved.
    slice: u32,
    /// Ranges of a DISCARD or WRITE_ZEROES that are done.
    ranges_done: usize,
    /// Bytes of the range after them that are done.
    range_done: u64,
    /// Bytes after those that are being zeroed.
    part: u64,
    parts: Vec<Part>,
}

impl Task {
    /// The task's own handle on its generation of memory.
    fn pin(&self) -> &GuestPin {
        self.memory.as_ref().expect("a task in use has memory")
    }

    /// Readies a used task for its next request.
    pub(super) fn reset(&mut self) {
        self.memory = None;
        self.full_since = None;
        self.stage = Stage::New;
        self.pass = None;
        self.failure = None;
        self.done = 0;
        self.slice = 0;
        self.ranges_done = 0;
        self.range_done = 0;
        self.part = 0;
        self.parts.clear();
        debug_assert_eq!(self.pending, 0, "a task ends with nothing pending");
    }

    /// Bytes that it has in flight, or as good as that.
    pub(super) fn moving(&self) -> u32 {
        if self.pending == 0 {
            return 0;
        }
        match self.stage {
            Stage::Reading | Stage::Writing => self.slice,
            Stage::Copying | Stage::Zeroing => COPY_COST,
            Stage::New | Stage::Flushing => 0,
        }
    }

    /// Begins, or begins again after [`Next::Busy`] and the like.
    pub(super) fn begin(&mut self, mover: &mut Mover<'_>) -> Next {
        let disk = &mover.lane.device.disk;
        match self.request.op {
            Op::Unknown => Next::Finish(Status::Unsupported),
            Op::GetId => {
                self.request.answer_id(self.pin(), &disk.id_string());
                Next::Finish(Status::Ok)
            }
            Op::Flush if disk.is_read_only() || disk.is_ephemeral() => Next::Finish(Status::Ok),
            Op::Flush => {
                mover.lane.device.agree();
                self.flush(mover)
            }
            Op::In if self.request.len == 0 => Next::Finish(Status::Ok),
            Op::In => self.read(mover),
            Op::Out | Op::Discard | Op::WriteZeroes if disk.is_read_only() => {
                Next::Finish(Status::IoErr)
            }
            Op::Out if self.request.len == 0 => Next::Finish(Status::Ok),
            Op::Out => self.write(mover),
            Op::Discard | Op::WriteZeroes => self.unmap(mover),
        }
    }

    /// Enters the disk unless it has been.
    fn enter(&mut self, mover: &Mover<'_>) -> bool {
        if self.pass.is_none() {
            self.pass = mover
                .lane
                .device
                .disk
                .enter(mover.context.shard, &mover.lane.waker);
        }
        self.pass.is_some()
    }

    fn retreat(&mut self, next: Next) -> Next {
        // A fork waits for all passes: whoever waits for something else must not hold one.
        self.pass = None;
        next
    }

    /// Whether pieces of the request may need buffers of ours.
    fn may_bounce(&self, mover: &Mover<'_>) -> bool {
        let lane = mover.lane;
        match lane.tier {
            // Pieces are cut between blocks.
            Tier::Direct { align } => {
                lane.device.disk.block_size() < align
                    || !self.pin().is_aligned(&self.request.data, align)
            }
            Tier::Buffered | Tier::Memory => false,
        }
    }

    fn is_starved(&self, mover: &Mover<'_>) -> bool {
        !mover.bounce.has_room() && self.may_bounce(mover)
    }

    fn read(&mut self, mover: &mut Mover<'_>) -> Next {
        if self.is_starved(mover) {
            return self.retreat(Next::Starved);
        }
        if !self.enter(mover) {
            return Next::Busy;
        }
        let Some(pass) = &self.pass else {
            return Next::Busy;
        };
        let mut segments = mover.context.segments.take();
        segments.clear();
        let disk = &mover.lane.device.disk;
        let (offset, len) = self.next_slice(mover);
        let planned = disk.plan_read(pass, offset, len, &mut segments);
        if let Err(error) = planned {
            mover.context.segments.replace(segments);
            return failed_with(mover, &error);
        }
        self.stage = Stage::Reading;
        self.slice = len;
        mover.spent += len;
        for segment in &segments {
            let at = self.done + segment.at;
            let piece = |offset| Piece {
                at,
                len: segment.len,
                offset,
                is_write: false,
                padding: Padding::default(),
            };
            match segment.source {
                Source::Pool(offset) => self.move_pool(mover, piece(offset)),
                Source::Base(offset) => self.read_base(mover, piece(offset)),
                Source::Zero => self.zero(mover, at, segment.len),
            }
        }
        mover.context.segments.replace(segments);
        self.leave_to_bases();
        self.settle_if_done(mover)
    }

    /// Gives the pass back once nothing but reads of bases is pending: these refer to no cluster, so
    /// neither a fork nor the clusters of the pool have to wait for a base that may hang.
    fn leave_to_bases(&mut self) {
        if self.stage == Stage::Reading && self.pending == self.of_bases {
            self.pass = None;
        }
    }

    fn write(&mut self, mover: &mut Mover<'_>) -> Next {
        if self.is_starved(mover) {
            return self.retreat(Next::Starved);
        }
        if !self.enter(mover) {
            return Next::Busy;
        }
        let Some(pass) = &self.pass else {
            return Next::Busy;
        };
        let disk = &mover.lane.device.disk;
        let (offset, len) = self.next_slice(mover);
        match disk.plan_write(pass, offset, len, &mut self.plan, &mover.lane.waker) {
            Err(error) => self.refused(mover, &error),
            Ok(Step::Ready) => {
                // `full_since` stays: the host may have no space although the pool has.
                self.stage = Stage::Writing;
                self.slice = len;
                mover.spent += len;
                let plan = std::mem::take(&mut self.plan);
                for segment in plan.segments() {
                    let piece = Piece {
                        at: self.done + segment.at,
                        len: segment.len,
                        offset: segment.to,
                        is_write: true,
                        padding: segment.padding,
                    };
                    self.move_pool(mover, piece);
                }
                self.plan = plan;
                self.settle_if_done(mover)
            }
            Ok(Step::Copy(job)) => self.copy(mover, job),
            Ok(Step::Done) => Next::Finish(Status::Ok),
            Ok(Step::Busy) => self.retreat(Next::Busy),
            Ok(Step::Full) => self.retreat(Next::Full),
        }
    }

    /// What the copy is for is planned again after it, with the pass that is held now.
    fn copy(&mut self, mover: &mut Mover<'_>, job: CopyJob) -> Next {
        if let Some(pass) = &mut self.pass {
            pass.pause();
        }
        self.stage = Stage::Copying;
        self.pending += 1;
        let device = &mover.lane.device;
        let work = Work::Copy(device.disk.clone(), job);
        device.submit(work, mover.ticket());
        Next::Wait
    }

    fn refused(&mut self, mover: &Mover<'_>, error: &DiskError) -> Next {
        if error.kind() == DiskErrorKind::NoSpace {
            return self.retreat(Next::HostFull);
        }
        failed_with(mover, error)
    }

    /// A write is on the disk; whether it must be durable before the guest hears of it.
    fn written(&mut self, mover: &mut Mover<'_>) -> Next {
        let device = &mover.lane.device;
        if device.is_writeback(mover.lane.features) || device.disk.is_ephemeral() {
            return Next::Finish(Status::Ok);
        }
        self.flush(mover)
    }

    fn flush(&mut self, mover: &mut Mover<'_>) -> Next {
        self.pass = None;
        self.stage = Stage::Flushing;
        self.pending += 1;
        let device = &mover.lane.device;
        device.flusher.submit(device.disk.clone(), mover.ticket());
        Next::Wait
    }

    /// One ring operation ended.
    pub(super) fn moved(&mut self, mover: &mut Mover<'_>, completion: Completion) -> Next {
        let is_ok = completion.result.is_ok();
        self.note(mover, completion.result);
        self.unbounce(mover, part_of(completion.token), completion.buffer, is_ok);
        self.of_bases -= u32::from(is_of_base(completion.token));
        self.pending -= 1;
        self.leave_to_bases();
        self.settle_if_done(mover)
    }

    /// Work on another thread ended.
    pub(super) fn worked(&mut self, mover: &mut Mover<'_>, result: Result<(), WorkFailed>) -> Next {
        if let Err(WorkFailed { kind, reason }) = result {
            if kind != DiskErrorKind::NoSpace {
                let device = &mover.lane.device;
                device.report(EventKind::RequestFailed, &reason);
            }
            self.failure = Some(kind);
        }
        self.of_bases -= u32::from(self.stage == Stage::Reading);
        self.pending -= 1;
        self.settle_if_done(mover)
    }

    fn settle_if_done(&mut self, mover: &mut Mover<'_>) -> Next {
        if self.pending > 0 {
            return Next::Wait;
        }
        self.parts.clear();
        let failure = self.failure.take();
        match self.stage {
            Stage::New => Next::Wait,
            Stage::Reading => match failure {
                None if self.end_slice() => Next::Finish(Status::Ok),
                None => self.retreat(Next::Again),
                Some(_) => Next::Finish(Status::IoErr),
            },
            Stage::Flushing => Next::Finish(match failure {
                None => Status::Ok,
                Some(_) => Status::IoErr,
            }),
            Stage::Writing => {
                mover
                    .lane
                    .device
                    .disk
                    .complete_write(&mut self.plan, failure.is_none());
                self.pass = None;
                match failure {
                    None if self.end_slice() => self.written(mover),
                    None => Next::Again,
                    Some(kind) => failed(kind),
                }
            }
            // The pass stays: what the copy was for comes next.
            Stage::Copying => match failure {
                None => {
                    if let Some(pass) = &mut self.pass {
                        pass.resume();
                    }
                    self.begin(mover)
                }
                Some(kind) => {
                    self.pass = None;
                    failed(kind)
                }
            },
            Stage::Zeroing => self.zeroed(mover, failure),
        }
    }
}

fn failed(kind: DiskErrorKind) -> Next {
    if kind == DiskErrorKind::NoSpace {
        Next::HostFull
    } else {
        Next::Finish(Status::IoErr)
    }
}

fn failed_with(mover: &Mover<'_>, error: &dyn Display) -> Next {
    let device = &mover.lane.device;
    device.report(EventKind::RequestFailed, error);
    Next::Finish(Status::IoErr)
}
