//! One operation of a ring: what the kernel is told, and what it must not lose meanwhile.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::types::{Fd, Fixed};
use io_uring::{opcode, squeue};

use crate::sys::buffer::AlignedBuf;
use crate::sys::fd::EventFd;
use crate::sys::mmap::{GuestPin, advance};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Kind {
    #[default]
    Idle,
    Read,
    Write,
    Poll,
    /// A poll that is being cancelled.
    Cancelled,
}

impl Kind {
    /// Whether bytes are moved.
    pub(super) fn moves(self) -> bool {
        matches!(self, Kind::Read | Kind::Write)
    }
}

/// What must stay alive while the kernel works on it.
#[derive(Debug, Default)]
pub(super) enum Hold {
    #[default]
    Nothing,
    Guest(#[expect(dead_code, reason = "held, not read")] GuestPin),
    Buffer(AlignedBuf),
    Event(Arc<EventFd>),
}

#[derive(Debug, Default)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) file: u32,
    pub(super) offset: u64,
    /// Buffers left to move start at this one.
    pub(super) first: usize,
    /// The kernel may hold this array's address while the operation is in flight.
    pub(super) iovs: Vec<libc::iovec>,
    pub(super) hold: Hold,
    pub(super) token: u64,
}

/// Most zeros written before or after guest memory, bytes.
pub const ZEROS_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct Zeros([u8; ZEROS_LEN]);

/// Written from, never to.
static ZEROS: Zeros = Zeros([0; ZEROS_LEN]);

impl Op {
    /// `len` zeros come next.
    pub(super) fn push_zeros(&mut self, len: usize) {
        if len > 0 {
            let zeros = &ZEROS.0[..len];
            self.iovs.push(libc::iovec {
                iov_base: zeros.as_ptr().cast_mut().cast(),
                iov_len: zeros.len(),
            });
        }
    }

    /// What to submit, or submit again, for this operation in slot `index`.
    pub(super) fn entry(&self, index: u32) -> squeue::Entry {
        let op = self;
        let file = Fixed(op.file);
        let iovs = &op.iovs[op.first..];
        let entry = match (op.kind, iovs) {
            (Kind::Read, [iov]) => {
                opcode::Read::new(file, iov.iov_base.cast(), to_u32(iov.iov_len))
                    .offset(op.offset)
                    .build()
            }
            (Kind::Write, [iov]) => {
                opcode::Write::new(file, iov.iov_base.cast(), to_u32(iov.iov_len))
                    .offset(op.offset)
                    .build()
            }
            (Kind::Read, iovs) => opcode::Readv::new(file, iovs.as_ptr(), to_u32(iovs.len()))
                .offset(op.offset)
                .build(),
            (Kind::Write, iovs) => opcode::Writev::new(file, iovs.as_ptr(), to_u32(iovs.len()))
                .offset(op.offset)
                .build(),
            (Kind::Poll | Kind::Cancelled | Kind::Idle, _) => {
                let fd = match &op.hold {
                    Hold::Event(event) => event.as_fd().as_raw_fd(),
                    Hold::Nothing | Hold::Guest(_) | Hold::Buffer(_) => -1,
                };
                let events = u32::try_from(libc::POLLIN).unwrap_or(1);
                opcode::PollAdd::new(Fd(fd), events).multi(true).build()
            }
        };
        entry.user_data(u64::from(index))
    }
}

/// The outcome of an operation whose completion said `result`, or `None` if it must go on.
pub(super) fn carry_on(op: &mut Op, result: i32) -> Option<io::Result<()>> {
    let moved = match errno_result(result) {
        Ok(0) if op.kind == Kind::Read => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
        Ok(0) => return Some(Err(io::ErrorKind::WriteZero.into())),
        Ok(moved) => moved,
        Err(error) => {
            let is_transient = matches!(
                error.kind(),
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
            );
            return if is_transient { None } else { Some(Err(error)) };
        }
    };
    let first = op.first;
    op.first += advance(&mut op.iovs[first..], to_usize(moved));
    op.offset += u64::from(moved);
    (op.first == op.iovs.len()).then_some(Ok(()))
}

pub(super) fn errno_result(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_negative| io::Error::from_raw_os_error(-result))
}

pub(super) fn to_usize(index: u32) -> usize {
    usize::try_from(index).expect("usize has at least 32 bits")
}

pub(super) fn to_u32(len: usize) -> u32 {
    u32::try_from(len).expect("lengths come from 32-bit guest lengths")
}

pub(super) fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("u64 has at least the bits of usize")
}
