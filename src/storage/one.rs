//! One buffer to or from a file, and what a file system says of it.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};

use crate::sys::file as sys;

/// Most bytes bounced through one aligned buffer.
const BOUNCE_MAX: usize = 1 << 20;

/// Writes one aligned buffer, durably or not.
pub(super) type Writer = fn(&File, &[u8], u64) -> io::Result<()>;

/// Reads one buffer.
///
/// # Errors
/// As [`sys::read_exact_at`].
pub(super) fn read(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    sys::read_exact_at(file, &mut [IoSliceMut::new(buf)], offset)
}

/// Writes one buffer.
///
/// # Errors
/// As [`sys::write_all_at`].
pub(super) fn write(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    sys::write_all_at(file, &mut [IoSlice::new(buf)], offset)
}

/// Writes one buffer, durable on return.
///
/// # Errors
/// As [`sys::write_all_durable_at`].
pub(super) fn write_durable(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    match sys::write_all_durable_at(file, &mut [IoSlice::new(buf)], offset) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            // The file system does not know the flag: a whole flush promises more, and costs more.
            write(file, buf, offset)?;
            file.sync_data()
        }
        done => done,
    }
}

/// Length of a bounce buffer that holds `len` bytes with both edges widened, or a good part of them.
pub(super) fn bounce_len(len: usize, align: u64) -> usize {
    let wanted = len.saturating_add(2 * narrow(align));
    wanted.next_multiple_of(narrow(align)).min(BOUNCE_MAX)
}

/// An alignment or an offset within one, as an index.
pub(super) fn narrow(bytes: u64) -> usize {
    usize::try_from(bytes).expect("alignments are at most 512")
}

/// What fsync(2) says on file systems that have nothing to save.
pub(super) fn is_read_only(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidInput | ErrorKind::ReadOnlyFilesystem
    )
}

/// "No space" in every form the host says it.
pub(super) fn full(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::QuotaExceeded {
        return io::Error::new(ErrorKind::StorageFull, error);
    }
    error
}
