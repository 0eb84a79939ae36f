//! One thread's io_uring. The ring owns what the kernel works on: the guest memory or buffer of
//! every operation is held here from submission to completion, so an operation that outlives its
//! submitter is no danger. An operation either completes whole or fails: short transfers are
//! carried on inside.
#![expect(unsafe_code, reason = "submission entries carry raw addresses")]

mod op;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

pub use op::ZEROS_LEN;
use op::{Hold, Kind, Op, carry_on, errno_result, to_u32, to_u64, to_usize};

use super::buffer::AlignedBuf;
use super::fd::EventFd;
use super::mmap::{GuestPin, GuestRun, IOV_MAX};

/// Submission entries; more operations than this go in over several calls.
const ENTRIES: u32 = 256;
/// Completion entries: the kernel keeps what does not fit, at a cost.
const COMPLETIONS: u32 = 4096;
/// Sizes tried for the table of registered files (bounded by RLIMIT_NOFILE).
const FILES: [u32; 3] = [4096, 1024, 128];
/// The completion of a cancellation says nothing: the cancelled operation completes itself.
const IGNORED: u64 = u64::MAX;

/// A file registered with one ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIndex(u32);

/// A poll that goes on until it is cancelled.
#[derive(Debug, Clone, Copy)]
pub struct PollHandle(u32);

/// Something finished.
#[derive(Debug)]
pub struct Completion {
    /// What the submitter called it.
    pub token: u64,
    /// All bytes moved, or why not. Polls: the event counter was written to.
    pub result: io::Result<()>,
    /// The buffer of an operation on one.
    pub buffer: Option<AlignedBuf>,
}

/// See the module.
///
/// # Invariants
/// For every operation that is not `Idle`, `iovs` names memory that `hold` keeps alive, or zeros
/// that are only written from, and neither changes until its last completion was seen.
pub struct Ring {
    ring: IoUring,
    ops: Vec<Op>,
    free: Vec<u32>,
    /// Operations that found no submission entry.
    backlog: VecDeque<u32>,
    files_free: Vec<u32>,
    in_flight: usize,
    /// Of those in flight, reads and writes.
    moving: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} in flight)", self.in_flight)
    }
}

fn build() -> io::Result<IoUring> {
    let mut best = IoUring::builder();
    best.setup_cqsize(COMPLETIONS)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all();
    // Kernels before 6.1 refuse some of these; without them the ring works as well, only slower.
    best.build(ENTRIES)
        .or_else(|_| IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES))
}

impl Ring {
    /// A ring for the calling thread alone.
    ///
    /// # Errors
    /// As `io_uring_setup(2)`: forbidden (`kernel.io_uring_disabled`, seccomp) or out of memory.
    pub fn new() -> io::Result<Self> {
        let mut ring = build()?;
        let files = FILES
            .into_iter()
            .find(|files| ring.submitter().register_files_sparse(*files).is_ok())
            .ok_or_else(|| {
                let least = FILES[FILES.len() - 1];
                let what = format!("no table of {least} files (does `ulimit -n` allow as many?)");
                io::Error::other(what)
            })?;
        // A registered ring saves the descriptor look-up of every call; older kernels have none.
        if ring.submitter().register_ring_fd().is_err() {
            ring = build()?;
            ring.submitter().register_files_sparse(files)?;
        }
        Ok(Self {
            ring,
            ops: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            files_free: (0..files).rev().collect(),
            in_flight: 0,
            moving: 0,
        })
    }

    /// Registers `fd`; the ring keeps the file open by itself.
    ///
    /// # Errors
    /// The table is full, or as `io_uring_register(2)`.
    pub fn add_file(&mut self, fd: BorrowedFd<'_>) -> io::Result<FileIndex> {
        let index = self
            .files_free
            .pop()
            .ok_or_else(|| io::Error::other("too many files"))?;
        match self
            .ring
            .submitter()
            .register_files_update(index, &[fd.as_raw_fd()])
        {
            Ok(_) => Ok(FileIndex(index)),
            Err(error) => {
                self.files_free.push(index);
                Err(error)
            }
        }
    }

    /// Forgets a file. Operations in flight on it finish.
    pub fn remove_file(&mut self, file: FileIndex) {
        // Entries not yet submitted name the file by its index: they must go first.
        let submitted = self.submit();
        let removed = self.ring.submitter().register_files_update(file.0, &[-1]);
        if submitted.is_ok() && removed.is_ok() && self.backlog.is_empty() {
            self.files_free.push(file.0);
        }
    }

    /// Reads `runs` (at most [`IOV_MAX`]) of `memory` from byte `offset` of `file`.
    pub fn read(
        &mut self,
        file: FileIndex,
        offset: u64,
        memory: &GuestPin,
        runs: &[GuestRun],
        token: u64,
    ) {
        let index = self.slot();
        let op = &mut self.ops[to_usize(index)];
        op.iovs.clear();
        op.iovs.extend(runs.iter().map(|run| memory.iovec(run)));
        self.launch_guest(index, Kind::Read, file, offset, memory, token);
    }

    /// Writes `runs` of `memory` to `file` at byte `offset`, and zeros right `before` and `after`
    /// them (bytes, at most [`ZEROS_LEN`] each). At most [`IOV_MAX`] pieces in all.
    pub fn write(
        &mut self,
        file: FileIndex,
        offset: u64,
        memory: &GuestPin,
        runs: &[GuestRun],
        (before, after): (usize, usize),
        token: u64,
    ) {
        let index = self.slot();
        let op = &mut self.ops[to_usize(index)];
        op.iovs.clear();
        op.push_zeros(before);
        op.iovs.extend(runs.iter().map(|run| memory.iovec(run)));
        op.push_zeros(after);
        let begin = offset - to_u64(before);
        self.launch_guest(index, Kind::Write, file, begin, memory, token);
    }

    /// Writes `len` zeros, at most [`ZEROS_LEN`], to `file` at byte `offset`.
    pub fn write_zeros(&mut self, file: FileIndex, offset: u64, len: usize, token: u64) {
        let index = self.slot();
        let op = &mut self.ops[to_usize(index)];
        op.iovs.clear();
        op.push_zeros(len);
        op.hold = Hold::Nothing;
        self.launch(index, Kind::Write, file, offset, token);
    }

    fn launch_guest(
        &mut self,
        index: u32,
        kind: Kind,
        file: FileIndex,
        offset: u64,
        memory: &GuestPin,
        token: u64,
    ) {
        let op = &mut self.ops[to_usize(index)];
        assert!(op.iovs.len() <= IOV_MAX, "{} buffers", op.iovs.len());
        op.hold = Hold::Guest(memory.clone());
        self.launch(index, kind, file, offset, token);
    }

    /// Reads `len` bytes into the start of `buffer`, which comes back with the completion.
    pub fn read_buffer(
        &mut self,
        file: FileIndex,
        offset: u64,
        buffer: AlignedBuf,
        len: usize,
        token: u64,
    ) {
        self.start_buffer(Kind::Read, file, offset, buffer, len, token);
    }

    /// Writes `len` bytes from the start of `buffer`, which comes back with the completion.
    pub fn write_buffer(
        &mut self,
        file: FileIndex,
        offset: u64,
        buffer: AlignedBuf,
        len: usize,
        token: u64,
    ) {
        self.start_buffer(Kind::Write, file, offset, buffer, len, token);
    }

    fn start_buffer(
        &mut self,
        kind: Kind,
        file: FileIndex,
        offset: u64,
        mut buffer: AlignedBuf,
        len: usize,
        token: u64,
    ) {
        let index = self.slot();
        let op = &mut self.ops[to_usize(index)];
        op.iovs.clear();
        let iov_base = buffer.bytes_mut()[..len].as_mut_ptr().cast();
        op.iovs.push(libc::iovec {
            iov_base,
            iov_len: len,
        });
        op.hold = Hold::Buffer(buffer);
        self.launch(index, kind, file, offset, token);
    }

    /// Completes with `token` each time `event` is written to, and once at the start if it was
    /// written to before. The counter is never read: every write wakes a poll, whatever its value.
    pub fn poll(&mut self, event: Arc<EventFd>, token: u64) -> PollHandle {
        let index = self.slot();
        let op = &mut self.ops[to_usize(index)];
        op.iovs.clear();
        op.hold = Hold::Event(event);
        self.launch(index, Kind::Poll, FileIndex(0), 0, token);
        PollHandle(index)
    }

    /// Ends a poll. A completion that is already on its way may still come.
    pub fn cancel(&mut self, poll: PollHandle) {
        let PollHandle(index) = poll;
        let op = &mut self.ops[to_usize(index)];
        op.kind = Kind::Cancelled;
        // Not POLL_REMOVE: that gives up (EALREADY) on a poll that is just being woken.
        let entry = opcode::AsyncCancel::new(u64::from(index))
            .build()
            .user_data(IGNORED);
        // A backlogged poll was never armed: then the removal must queue behind it.
        while !self.backlog.is_empty() || !self.try_push(&entry) {
            if self.submit().is_err() {
                return;
            }
            self.drain_backlog();
        }
    }

    fn slot(&mut self) -> u32 {
        if let Some(index) = self.free.pop() {
            return index;
        }
        let index = u32::try_from(self.ops.len()).expect("operations are bounded by queue sizes");
        self.ops.push(Op::default());
        index
    }

    fn launch(&mut self, index: u32, kind: Kind, file: FileIndex, offset: u64, token: u64) {
        let op = &mut self.ops[to_usize(index)];
        op.kind = kind;
        op.file = file.0;
        op.offset = offset;
        op.first = 0;
        op.token = token;
        self.in_flight += 1;
        if kind.moves() {
            self.moving += 1;
        }
        self.enqueue(index);
    }

    fn enqueue(&mut self, index: u32) {
        let entry = self.ops[to_usize(index)].entry(index);
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(index);
        }
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        if self.ring.submission().is_full() && self.submit().is_err() {
            return false;
        }
        // SAFETY: the entry's addresses are those of an operation in `ops`, whose memory and
        // array stay as they are until its completion (invariant of `Ring`); the entry of a
        // cancellation holds none.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn drain_backlog(&mut self) {
        while let Some(index) = self.backlog.pop_front() {
            let entry = self.ops[to_usize(index)].entry(index);
            if !self.try_push(&entry) {
                self.backlog.push_front(index);
                return;
            }
        }
    }

    /// Hands what was started to the kernel, without waiting.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() && !self.ring.submission().taskrun() {
            return Ok(());
        }
        tolerate(self.ring.submitter().submit_and_wait(0))
    }

    /// Hands over what was started if it is at least one `share`-th of the reads and writes in
    /// flight: the device works on some while the rest are made, yet a deep queue shares calls.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`.
    pub fn submit_share(&mut self, share: usize) -> io::Result<()> {
        if self.ring.submission().len() >= self.moving / share {
            self.submit()
        } else {
            Ok(())
        }
    }

    /// Whether reads or writes are in flight.
    #[must_use]
    pub fn is_moving(&self) -> bool {
        self.moving > 0
    }

    /// As [`Ring::submit`], then waits until something completed or `timeout` passed.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.drain_backlog();
        if !self.ring.completion().is_empty() {
            return self.submit();
        }
        match timeout {
            None => tolerate(self.ring.submitter().submit_and_wait(1)),
            Some(timeout) => {
                let time = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&time);
                tolerate(self.ring.submitter().submit_with_args(1, &args))
            }
        }
    }

    /// Whether a completion is ready, without a call into the kernel.
    pub fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// Appends what has completed to `out`.
    pub fn reap(&mut self, out: &mut Vec<Completion>) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            if let Ok(index) = u32::try_from(entry.user_data()) {
                self.settle(index, &entry, out);
            }
        }
    }

    fn settle(&mut self, index: u32, entry: &cqueue::Entry, out: &mut Vec<Completion>) {
        let op = &mut self.ops[to_usize(index)];
        let token = op.token;
        match op.kind {
            Kind::Idle => {}
            Kind::Cancelled => {
                if !cqueue::more(entry.flags()) {
                    self.release(index);
                }
            }
            Kind::Poll => {
                if !cqueue::more(entry.flags()) {
                    if entry.result() < 0 {
                        // Never re-armed in a circle: an error ends the poll.
                        op.kind = Kind::Cancelled;
                        self.in_flight -= 1;
                    } else {
                        self.enqueue(index);
                    }
                }
                let result = errno_result(entry.result()).map(drop);
                out.push(Completion {
                    token,
                    result,
                    buffer: None,
                });
            }
            Kind::Read | Kind::Write => {
                if let Some(result) = carry_on(op, entry.result()) {
                    let buffer = self.release(index);
                    out.push(Completion {
                        token,
                        result,
                        buffer,
                    });
                } else {
                    self.enqueue(index);
                }
            }
        }
    }

    fn release(&mut self, index: u32) -> Option<AlignedBuf> {
        let op = &mut self.ops[to_usize(index)];
        if op.kind.moves() {
            self.moving -= 1;
        }
        op.kind = Kind::Idle;
        self.in_flight -= 1;
        self.free.push(index);
        match std::mem::replace(&mut op.hold, Hold::Nothing) {
            Hold::Buffer(buffer) => Some(buffer),
            Hold::Nothing | Hold::Guest(_) | Hold::Event(_) => None,
        }
    }
}

/// Outcomes of `io_uring_enter(2)` after which the loop simply goes round again: a signal, the
/// timeout, completions that must be reaped first, a passing shortage of memory.
fn tolerate(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
            Some(_) | None => Err(error),
        },
    }
}

impl Drop for Ring {
    /// Waits for the kernel to let go of every buffer.
    fn drop(&mut self) {
        let polls: Vec<u32> = (0..to_u32(self.ops.len()))
            .filter(|index| self.ops[to_usize(*index)].kind == Kind::Poll)
            .collect();
        for index in polls {
            self.cancel(PollHandle(index));
        }
        let mut seen = Vec::new();
        while self.in_flight > 0 {
            if self.wait(None).is_err() {
                // The kernel may still write to these buffers, so they are never freed.
                Box::leak(std::mem::take(&mut self.ops).into_boxed_slice());
                return;
            }
            self.reap(&mut seen);
            seen.clear();
        }
    }
}
