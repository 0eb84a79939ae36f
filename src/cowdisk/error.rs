//! What can go wrong with a disk, sorted by what a caller can do about it.

use crate::pool::{PoolError, PoolErrorKind};
use std::io;

/// Why a disk refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Beyond the end, or not whole sectors.
    #[error("bytes {offset}..{} are not within the disk's {size}, or not whole sectors of 512", offset.saturating_add(*len))]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// A snapshot, or a pool open for reading only.
    #[error("`{name}` is read-only")]
    ReadOnly {
        /// The disk.
        name: String,
    },
    /// The disk was deleted while it was open.
    #[error("`{name}` was deleted")]
    Deleted {
        /// The disk.
        name: String,
    },
    /// No space in the pool.
    #[error("no space left in the pool")]
    NoSpace,
    /// The pool has space, and the file system or device that holds it has none.
    #[error("no space left on the host, below the pool")]
    HostFull,
    /// The disk's own limit.
    #[error(
        "`{name}` has reached its limit of {limit} bytes; raise it with `tidepool disk set --limit`"
    )]
    LimitReached {
        /// The disk.
        name: String,
        /// Bytes.
        limit: u64,
    },
    /// The base image is not what it was, or cannot be read.
    #[error("base image {path}: {what}")]
    Base {
        /// Its path.
        path: String,
        /// What is wrong, and what to do.
        what: String,
    },
    /// The base image, or a file below it, is missing or not what it was: it was changed, moved, or
    /// put back from a copy.
    #[error("base image {path}: {what}")]
    BaseChanged {
        /// Its path.
        path: String,
        /// What differs.
        what: String,
    },
    /// The store below failed.
    #[error("{action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the store said.
        source: io::Error,
    },
    /// Long work was told to stop ([`Interrupted`]).
    #[error("interrupted")]
    Interrupted,
    /// The pool refused.
    #[error(transparent)]
    Pool(PoolError),
}

/// What a caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskErrorKind {
    /// Stay within the disk.
    OutOfRange,
    /// Not write.
    ReadOnly,
    /// Close the handle.
    Deleted,
    /// Make space, or wait for it.
    NoSpace,
    /// Raise the limit.
    LimitReached,
    /// See to the base image.
    Base,
    /// See to the storage.
    Io,
    /// Reopen the pool: it is poisoned, or closed.
    Poisoned,
    /// Correct the request.
    Request,
    /// Repair the pool.
    Damaged,
    /// Begin again, some time.
    Interrupted,
}

/// Whoever is told of the progress of long work wants it to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl From<Interrupted> for DiskError {
    fn from(_: Interrupted) -> Self {
        DiskError::Interrupted
    }
}

impl From<PoolError> for DiskError {
    fn from(error: PoolError) -> Self {
        match error.kind() {
            PoolErrorKind::NoSpace if matches!(error, PoolError::NoSpace) => DiskError::NoSpace,
            PoolErrorKind::NoSpace => DiskError::HostFull,
            PoolErrorKind::Request | PoolErrorKind::Storage | PoolErrorKind::Damaged => {
                DiskError::Pool(error)
            }
        }
    }
}

impl DiskError {
    /// What a caller can do.
    #[must_use]
    pub fn kind(&self) -> DiskErrorKind {
        match self {
            DiskError::OutOfRange { .. } => DiskErrorKind::OutOfRange,
            DiskError::ReadOnly { .. } => DiskErrorKind::ReadOnly,
            DiskError::Deleted { .. } => DiskErrorKind::Deleted,
            DiskError::NoSpace | DiskError::HostFull => DiskErrorKind::NoSpace,
            DiskError::LimitReached { .. } => DiskErrorKind::LimitReached,
            DiskError::Base { .. } | DiskError::BaseChanged { .. } => DiskErrorKind::Base,
            DiskError::Io { .. } => DiskErrorKind::Io,
            DiskError::Interrupted => DiskErrorKind::Interrupted,
            DiskError::Pool(PoolError::Poisoned { .. } | PoolError::Closed) => {
                DiskErrorKind::Poisoned
            }
            DiskError::Pool(error) => match error.kind() {
                PoolErrorKind::Request => DiskErrorKind::Request,
                PoolErrorKind::NoSpace => DiskErrorKind::NoSpace,
                PoolErrorKind::Storage => DiskErrorKind::Io,
                PoolErrorKind::Damaged => DiskErrorKind::Damaged,
            },
        }
    }

    /// For `map_err` on a store's result: running out of space is told apart.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> DiskError {
        move |source| {
            if source.kind() == io::ErrorKind::StorageFull {
                DiskError::HostFull
            } else {
                DiskError::Io { action, source }
            }
        }
    }
}
