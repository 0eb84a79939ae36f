//! What can go wrong with a pool, sorted by what a caller can do about it.

use crate::format::FormatError;
use std::io;

/// Why a pool refused.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The store below failed.
    #[error("{action}: {source}")]
    Storage {
        /// What was being done.
        action: &'static str,
        /// What the store said.
        source: io::Error,
    },
    /// Bytes of the pool are not what they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Metadata contradicts itself.
    #[error("the pool's metadata is damaged: {what}; run `tidepool pool check`")]
    Damaged {
        /// What contradicts what.
        what: String,
    },
    /// An earlier write or flush failed, and nothing unflushed can be trusted.
    #[error(
        "the pool is frozen read-only since {reason}; close it, see to the storage below, and open it again"
    )]
    Poisoned {
        /// The first failure.
        reason: String,
    },
    /// It was closed; this handle is left over.
    #[error("the pool was closed: open it again")]
    Closed,
    /// Opened for reading only.
    #[error("the pool is open for reading only")]
    ReadOnly,
    /// No cluster left.
    #[error(
        "the pool is full: delete or discard something, or enlarge it with `tidepool pool resize`"
    )]
    NoSpace,
    /// The host has no memory for what the pool's maps need.
    #[error("there is not enough memory for the maps of this pool")]
    NoMemory,
    /// No such disk or snapshot.
    #[error("there is no disk or snapshot named `{name}` in this pool")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The name is taken.
    #[error("`{name}` exists already: choose another name")]
    Exists {
        /// The name.
        name: String,
    },
    /// Somebody is using the disk.
    #[error("`{name}` is in use: stop what has it open first")]
    InUse {
        /// The disk.
        name: String,
    },
    /// Others would go with it.
    #[error("`{name}` has snapshots: {}; remove them first, or use --cascade", names.join(", "))]
    HasDependents {
        /// The disk.
        name: String,
        /// What depends on it.
        names: Vec<String>,
    },
    /// A request that makes no sense.
    #[error("{what}")]
    Invalid {
        /// What, and what would make sense.
        what: String,
    },
}

/// What a caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolErrorKind {
    /// Correct the request.
    Request,
    /// Make space, or wait for it.
    NoSpace,
    /// Reopen, after seeing to the storage.
    Storage,
    /// Repair.
    Damaged,
}

impl PoolError {
    /// What a caller can do.
    #[must_use]
    pub fn kind(&self) -> PoolErrorKind {
        match self {
            PoolError::Storage { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                PoolErrorKind::NoSpace
            }
            PoolError::Storage { .. }
            | PoolError::Poisoned { .. }
            | PoolError::Closed
            | PoolError::NoMemory => PoolErrorKind::Storage,
            PoolError::Format(_) | PoolError::Damaged { .. } => PoolErrorKind::Damaged,
            PoolError::NoSpace => PoolErrorKind::NoSpace,
            PoolError::ReadOnly
            | PoolError::NotFound { .. }
            | PoolError::Exists { .. }
            | PoolError::InUse { .. }
            | PoolError::HasDependents { .. }
            | PoolError::Invalid { .. } => PoolErrorKind::Request,
        }
    }

    /// For `map_err` on a store's result.
    pub(crate) fn storage(action: &'static str) -> impl FnOnce(io::Error) -> PoolError {
        move |source| PoolError::Storage { action, source }
    }

    /// A request that makes no sense.
    pub(crate) fn invalid(what: impl Into<String>) -> PoolError {
        PoolError::Invalid { what: what.into() }
    }

    /// Contradicting metadata.
    pub(crate) fn damaged(what: impl Into<String>) -> PoolError {
        PoolError::Damaged { what: what.into() }
    }
}
