//! The seam every durable byte crosses: one trait over a pool's file, block device or simulated
//! disk. The pool and its disks are written against this contract alone, so that every crash the
//! contract allows can be simulated.

mod aligned;
#[cfg(test)]
mod conformance;
mod crash;
mod file;
#[cfg(test)]
mod loop_device;
mod medium;
mod one;
mod open;
mod pages;
mod plan;
pub mod sim;
mod watch;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

pub use crate::sys::clock::unix_seconds;
pub use aligned::AlignedBuf;
pub use file::FileStorage;
pub(crate) use open::Patience;
pub use open::{Access, Caching, OpenError};
pub use sim::SimStorage;

pub use crate::sys::memory::advise_huge;

/// What a crash keeps or loses as one: the smallest sector any disk has, in bytes.
pub const BLOCK: u64 = 512;

/// How a backing store wants to be driven by someone who brings their own ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// `O_DIRECT`: offsets, lengths and buffer addresses are multiples of `align` (a power of two,
    /// at most 512: coarser devices are opened buffered).
    Direct {
        /// Bytes.
        align: u32,
    },
    /// Through the page cache.
    Buffered,
    /// tmpfs: io_uring would punt every request to a worker thread; `preadv`/`pwritev` do not.
    Memory,
}

/// A flat array of bytes that survives a crash as far as [`Storage::flush`] promised.
///
/// # What the implementer promises
/// - An operation is complete when the call returns, or has failed; there is no short success.
/// - A completed write is seen by every read that begins after it.
/// - After a crash each 512-byte block ([`BLOCK`]) holds one of the versions written since the last `flush`
///   that began after that version's write completed, or the version before them. Blocks are
///   independent: unflushed writes are lost, torn and reordered freely.
/// - `flush` covers every write and punch that completed before it began.
/// - `write_durable_at` is a write that is itself covered by a flush when it returns; it says
///   nothing of any other write.
///
/// # What the caller promises
/// - Nothing overlapping is in flight at once, unless any outcome of the race is acceptable.
/// - After a failed `flush` or `write_durable_at` nothing is assumed of any unflushed byte, and
///   the call is never retried (the kernel may have dropped the dirty pages it failed to write).
///
/// # What neither may rely on
/// Alignment: any offset and length is legal here (implementations bounce), but a ring that goes
/// to [`Storage::as_fd`] directly must obey [`Storage::tier`].
pub trait Storage: Send + Sync + Debug {
    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end; otherwise what the device said.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at byte `offset`, within the current length.
    ///
    /// # Errors
    /// `StorageFull` if the host has no space (or no quota); `InvalidInput` beyond the end;
    /// otherwise what the device said. Any part of the range may have been written.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// As [`Storage::write_at`], and durable on return (`RWF_DSYNC`).
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes every completed write and punch durable (`fdatasync`).
    ///
    /// # Errors
    /// What the device said. The caller must stop writing: see the contract.
    fn flush(&self) -> io::Result<()>;

    /// Gives the space of `len` bytes at `offset` back to the host; they read as zeros afterwards,
    /// where the store can do that, and as anything where it cannot.
    ///
    /// # Errors
    /// What the device said. A store that cannot punch returns `Ok` and does nothing.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Asks the host to set space aside for `len` bytes at `offset` without changing what they
    /// read as. A hint: stores that cannot return `Ok`.
    ///
    /// # Errors
    /// `StorageFull` if the host has no space.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Bytes from the start to the end.
    ///
    /// # Errors
    /// What the device said.
    fn len(&self) -> io::Result<u64>;

    /// Makes the store `len` bytes long, a multiple of [`BLOCK`]; new bytes read as zeros. Durable
    /// after the next `flush`; until then a crash may leave either length.
    ///
    /// # Errors
    /// `InvalidInput` for an odd length; `Unsupported` on a block device whose size differs.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Bytes the host has allocated to this store (`st_blocks`); the length where it cannot tell.
    ///
    /// # Errors
    /// What the device said.
    fn allocated(&self) -> io::Result<u64>;

    /// The first range at or after `offset` that the host may hold data for, as `(start, end)` in
    /// bytes, or `None` if only holes remain (`SEEK_DATA`). Stores that cannot tell return all.
    ///
    /// # Errors
    /// What the device said.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;

    /// With this many first writes in flight another one is slow, so that it is worth writing more
    /// than was asked for: a hole of a file has to get blocks first, under a lock of the file, and
    /// with `O_DIRECT` the writers wait for one another. `usize::MAX` where holes are no slower.
    fn hole_writes_max(&self) -> usize {
        usize::MAX
    }

    /// What `error`, of an operation on [`Storage::as_fd`], is in the terms of this contract.
    fn failure(&self, error: io::Error) -> io::Error {
        error
    }

    /// How a ring must treat [`Storage::as_fd`].
    fn tier(&self) -> Tier;

    /// The descriptor a ring may read and write itself, if there is one.
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;
}
