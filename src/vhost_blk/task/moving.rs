//! Moving a request's bytes: straight between guest memory and the file where alignment lets it
//! be, through buffers of ours where it does not.

use crate::cowdisk::{DiskErrorKind, Padding, Tier};
use crate::sys::buffer::AlignedBuf;
use crate::sys::mmap::{GuestRun, cut_runs};
use crate::sys::uring::{FileIndex, Ring};
use crate::vhost_blk::bounce::{Bounce, LARGE};
use crate::vhost_blk::crew::SCRATCH_LEN;
use crate::vhost_blk::events::EventKind;
use crate::vhost_blk::helpers::{Ticket, Work};
use crate::vhost_blk::lane::Lane;
use crate::vhost_blk::worker::Context;

use super::{Part, Stage, Task};

/// What is started goes to a device once it is this part of what is in flight there. With batches
/// of 16 at depth 32 a device served 0.9 of what it serves one by one; with an eighth, all of it.
const SUBMIT_SHARE: usize = 8;

/// What moves a task's bytes.
#[derive(Debug)]
pub(in crate::vhost_blk) struct Mover<'a> {
    pub(in crate::vhost_blk) ring: &'a mut Ring,
    pub(in crate::vhost_blk) bounce: &'a mut Bounce,
    pub(in crate::vhost_blk) runs: &'a mut Vec<GuestRun>,
    pub(in crate::vhost_blk) lane: &'a Lane,
    pub(in crate::vhost_blk) task: u32,
    /// What the step has cost so far, in bytes copied or as good as that.
    pub(in crate::vhost_blk) spent: u32,
    pub(in crate::vhost_blk) context: &'a Context,
}

/// A piece of I/O on one file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) at: u32,
    pub(super) len: u32,
    pub(super) offset: u64,
    pub(super) is_write: bool,
    /// Zeros to write around it, where that takes no copying.
    pub(super) padding: Padding,
}

/// In the token of an operation that reads a base.
const OF_BASE: u64 = 1 << 61;

/// Tokens of ring operations: the task below, one more than the part above (0: no buffer).
fn token(task: u32, part: u32) -> u64 {
    u64::from(part) << 32 | u64::from(task)
}

/// Whether the token is that of an operation that reads a base.
pub(super) fn is_of_base(token: u64) -> bool {
    token & OF_BASE != 0
}

/// The task that a token names.
pub(in crate::vhost_blk) fn task_of(token: u64) -> u32 {
    u32::try_from(token & u64::from(u32::MAX)).expect("32 bits are left")
}

pub(super) fn part_of(token: u64) -> Option<usize> {
    usize::try_from((token & !OF_BASE) >> 32)
        .ok()?
        .checked_sub(1)
}

fn to_usize(len: u32) -> usize {
    usize::try_from(len).expect("usize has at least 32 bits")
}

impl Mover<'_> {
    pub(super) fn ticket(&self) -> Ticket {
        Ticket {
            worker: self.context.mailbox.clone(),
            task: self.task,
        }
    }
}

impl Task {
    pub(super) fn move_pool(&mut self, mover: &mut Mover<'_>, piece: Piece) {
        mover.runs.clear();
        cut_runs(&self.request.data, piece.at, piece.len, mover.runs);
        match mover.lane.tier {
            Tier::Memory => self.move_inline(mover, piece),
            Tier::Direct { align } => {
                let is_aligned = self.pin().is_aligned(mover.runs, align);
                self.move_ring(mover, piece, is_aligned);
            }
            Tier::Buffered => self.move_ring(mover, piece, true),
        }
    }

    pub(super) fn move_inline(&mut self, mover: &mut Mover<'_>, piece: Piece) {
        let memory = self.pin();
        let result = match mover.lane.device.disk.data_fd() {
            None => Err(std::io::ErrorKind::Unsupported.into()),
            Some(fd) if piece.is_write => memory.write_to(fd, mover.runs, piece.offset),
            Some(fd) => memory.read_from(fd, mover.runs, piece.offset),
        };
        self.note(mover, result);
    }

    pub(super) fn move_ring(&mut self, mover: &mut Mover<'_>, piece: Piece, is_aligned: bool) {
        let file = mover.lane.files.pool;
        if !is_aligned {
            self.move_bounced(mover, file, piece);
            return;
        }
        let memory = self.memory.as_ref().expect("a task in use has memory");
        let token = token(mover.task, 0);
        if piece.is_write {
            let Padding { before, after } = piece.padding;
            let padding = (to_usize(before), to_usize(after));
            mover
                .ring
                .write(file, piece.offset, memory, mover.runs, padding, token);
        } else {
            mover
                .ring
                .read(file, piece.offset, memory, mover.runs, token);
        }
        self.pending += 1;
        if matches!(mover.lane.tier, Tier::Direct { .. }) {
            // Should it fail, the call before the next sleep fails too, and says so.
            drop(mover.ring.submit_share(SUBMIT_SHARE));
        }
    }

    /// Moves a piece through buffers of ours; [`Task::unbounce`] takes them back.
    pub(super) fn move_bounced(&mut self, mover: &mut Mover<'_>, file: FileIndex, piece: Piece) {
        let mut done = 0;
        while done < piece.len {
            let len = (piece.len - done).min(LARGE);
            let at = piece.at + done;
            let part = self.add_part(at, len);
            let mut buffer = mover.bounce.take(len);
            let bytes = to_usize(len);
            let offset = piece.offset + u64::from(done);
            let token = token(mover.task, part);
            if piece.is_write {
                mover.runs.clear();
                cut_runs(&self.request.data, at, len, mover.runs);
                self.pin()
                    .gather(mover.runs, &mut buffer.bytes_mut()[..bytes]);
                mover.ring.write_buffer(file, offset, buffer, bytes, token);
            } else {
                mover.ring.read_buffer(file, offset, buffer, bytes, token);
            }
            self.pending += 1;
            done += len;
        }
    }

    /// Notes a piece that has a buffer; returns its number, from 1.
    pub(super) fn add_part(&mut self, at: u32, len: u32) -> u32 {
        self.parts.push(Part { at, len });
        u32::try_from(self.parts.len()).expect("parts are bounded by the request's length")
    }

    pub(super) fn read_base(&mut self, mover: &mut Mover<'_>, piece: Piece) {
        let Some(base) = mover.lane.base else {
            self.read_base_elsewhere(mover, piece);
            return;
        };
        let held = base
            .len
            .saturating_sub(piece.offset)
            .min(u64::from(piece.len));
        let held = u32::try_from(held).unwrap_or(piece.len);
        if held < piece.len {
            self.zero(mover, piece.at + held, piece.len - held);
        }
        if held == 0 {
            return;
        }
        mover.runs.clear();
        cut_runs(&self.request.data, piece.at, held, mover.runs);
        let memory = self.memory.as_ref().expect("a task in use has memory");
        mover.ring.read(
            base.file,
            piece.offset,
            memory,
            mover.runs,
            token(mover.task, 0) | OF_BASE,
        );
        self.pending += 1;
        self.of_bases += 1;
    }

    pub(super) fn read_base_elsewhere(&mut self, mover: &mut Mover<'_>, piece: Piece) {
        let Some(base) = mover.lane.device.disk.base() else {
            self.failure = Some(DiskErrorKind::Io);
            return;
        };
        let most = u32::try_from(SCRATCH_LEN).expect("128 KiB");
        let mut done = 0;
        while done < piece.len {
            let len = (piece.len - done).min(most);
            let mut runs = Vec::new();
            cut_runs(&self.request.data, piece.at + done, len, &mut runs);
            let work = Work::Base {
                base: base.clone(),
                offset: piece.offset + u64::from(done),
                len: to_usize(len),
                memory: self.pin().shared(),
                runs,
            };
            mover.lane.device.submit(work, mover.ticket());
            self.pending += 1;
            self.of_bases += 1;
            done += len;
        }
    }

    pub(super) fn zero(&mut self, mover: &mut Mover<'_>, at: u32, len: u32) {
        mover.runs.clear();
        cut_runs(&self.request.data, at, len, mover.runs);
        self.pin().zero(mover.runs);
    }

    /// Writes `len` zeros, less than a block, to byte `to` of the pool's file.
    pub(super) fn write_zeros_at(&mut self, mover: &mut Mover<'_>, to: u64, len: u32) {
        if mover.lane.tier == Tier::Memory {
            let zeros = vec![0; to_usize(len)];
            let storage = mover.lane.device.disk.pool().storage();
            let result = storage.write_at(&zeros, to);
            self.note(mover, result);
            return;
        }
        let file = mover.lane.files.pool;
        let token = token(mover.task, 0);
        mover.ring.write_zeros(file, to, to_usize(len), token);
        self.pending += 1;
    }

    pub(super) fn note(&mut self, mover: &Mover<'_>, result: std::io::Result<()>) {
        if let Err(error) = result {
            let storage = mover.lane.device.disk.pool().storage();
            let error = storage.failure(error);
            let is_full = matches!(
                error.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
            );
            self.failure = Some(if is_full {
                DiskErrorKind::NoSpace
            } else {
                let device = &mover.lane.device;
                device.report(EventKind::RequestFailed, &error);
                DiskErrorKind::Io
            });
        }
    }

    pub(super) fn unbounce(
        &mut self,
        mover: &mut Mover<'_>,
        part: Option<usize>,
        buffer: Option<AlignedBuf>,
        is_ok: bool,
    ) {
        let Some(buffer) = buffer else {
            return;
        };
        let part = part.and_then(|part| self.parts.get(part)).copied();
        if let (Some(part), true, Stage::Reading) = (part, is_ok, self.stage) {
            mover.runs.clear();
            cut_runs(&self.request.data, part.at, part.len, mover.runs);
            let len = to_usize(part.len);
            self.pin().scatter(mover.runs, &buffer.bytes()[..len]);
        }
        mover.bounce.give(buffer);
    }
}
