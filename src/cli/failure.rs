//! What a command says when it fails: what happened, to which object, and what to do next.

use crate::cowdisk::{DiskError, DiskErrorKind};
use crate::pool::{PoolError, PoolErrorKind};
use crate::storage::OpenError;
use nix::sys::signal::Signal;
use std::fmt::Display;
use std::io;
use std::path::Path;

/// What helps when the file system that holds a pool is full.
const HOST_FULL: &str = "make space on the file system that holds the pool: `tidepool pool info` \
                         shows what it has, `tidepool pool trim` gives back what the pool has freed";

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[error("{object}{}{what}", if object.is_empty() { "" } else { ": " })]
pub(super) struct Failure {
    /// A word for programs; see `docs/CLI.md`.
    pub kind: &'static str,
    /// What it happened to; empty if `what` says so.
    pub object: String,
    /// What happened.
    pub what: String,
    /// What to do next, where the rest does not say.
    pub hint: Option<String>,
    /// The signal that caused it, and is yet to end the process.
    pub signal: Option<Signal>,
}

impl Failure {
    /// A failure of `kind`.
    #[must_use]
    pub(super) fn new(kind: &'static str, object: impl Display, what: impl Display) -> Self {
        Self {
            kind,
            object: object.to_string(),
            what: what.to_string(),
            hint: None,
            signal: None,
        }
    }

    /// With what to do next.
    #[must_use]
    pub(super) fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// The command line makes no sense.
    #[must_use]
    pub(super) fn usage(what: impl Display) -> Self {
        Self::new("usage", "", what)
    }

    /// What a disk said.
    #[must_use]
    pub(super) fn disk(object: impl Display, error: &DiskError) -> Self {
        let kind = match (error.kind(), error) {
            (_, DiskError::Pool(error)) => return Self::pool(object, error),
            (DiskErrorKind::OutOfRange, _) => "out_of_range",
            (DiskErrorKind::ReadOnly, _) => "read_only",
            (DiskErrorKind::Deleted, _) => "not_found",
            (DiskErrorKind::NoSpace, _) => "no_space",
            (DiskErrorKind::LimitReached, _) => "limit_reached",
            (DiskErrorKind::Base, _) => "base",
            (DiskErrorKind::Io, _) => "io",
            (DiskErrorKind::Poisoned, _) => "frozen",
            (DiskErrorKind::Request, _) => "invalid",
            (DiskErrorKind::Damaged, _) => "damaged",
            (DiskErrorKind::Interrupted, _) => "interrupted",
        };
        let shown = object.to_string();
        let failure = Self::new(kind, &shown, error);
        match error {
            DiskError::BaseChanged { .. } => failure.hint(format!(
                "put back what was there; or, if it was moved or restored from a copy, have that compared \
                 and taken: `tidepool disk rebase {shown} --base FILE` (`--accept` if it is at the same \
                 path)"
            )),
            DiskError::NoSpace => failure.hint(
                "remove or discard something, or enlarge the pool with `tidepool pool resize`",
            ),
            DiskError::HostFull => failure.hint(HOST_FULL),
            DiskError::ReadOnly { .. } => failure.hint("fork it to get a disk that can be written"),
            DiskError::OutOfRange { .. }
            | DiskError::Deleted { .. }
            | DiskError::LimitReached { .. }
            | DiskError::Base { .. }
            | DiskError::Io { .. }
            | DiskError::Interrupted
            | DiskError::Pool(_) => failure,
        }
    }

    /// What was wrong with an image that was named.
    #[must_use]
    pub(super) fn image(path: &Path, error: &DiskError) -> Self {
        if let DiskError::Base { path, what } = error {
            return Self::new("base", path, what);
        }
        Self::disk(path.display(), error)
    }

    /// What a pool said.
    #[must_use]
    pub(super) fn pool(object: impl Display, error: &PoolError) -> Self {
        let kind = match error {
            PoolError::Storage { .. } if error.kind() == PoolErrorKind::NoSpace => "no_space",
            PoolError::Storage { .. } => "io",
            PoolError::Format(crate::format::FormatError::Magic { .. }) => "not_a_pool",
            PoolError::Format(
                crate::format::FormatError::Version { .. }
                | crate::format::FormatError::Features { .. },
            ) => "newer_version",
            PoolError::Format(_) | PoolError::Damaged { .. } => "damaged",
            PoolError::Poisoned { .. } | PoolError::Closed => "frozen",
            PoolError::ReadOnly => "read_only",
            PoolError::NoSpace => "no_space",
            PoolError::NoMemory => "io",
            PoolError::NotFound { .. } => "not_found",
            PoolError::Exists { .. } => "exists",
            PoolError::InUse { .. } => "in_use",
            PoolError::HasDependents { .. } => "has_dependents",
            PoolError::Invalid { .. } => "invalid",
        };
        let failure = match kind {
            "not_a_pool" => Self::new(kind, object, "this is not a Tidepool pool"),
            _ => Self::new(kind, object, error),
        };
        match error {
            PoolError::Storage { .. } if kind == "no_space" => failure.hint(HOST_FULL),
            PoolError::NotFound { .. } => {
                failure.hint("`tidepool disk ls POOL` lists what is there")
            }
            PoolError::Format(crate::format::FormatError::Magic { .. }) => {
                failure.hint("`tidepool pool ls DIR` finds the pools in a directory")
            }
            PoolError::Storage { .. }
            | PoolError::Format(_)
            | PoolError::Damaged { .. }
            | PoolError::Poisoned { .. }
            | PoolError::Closed
            | PoolError::ReadOnly
            | PoolError::NoSpace
            | PoolError::NoMemory
            | PoolError::Exists { .. }
            | PoolError::InUse { .. }
            | PoolError::HasDependents { .. }
            | PoolError::Invalid { .. } => failure,
        }
    }

    /// What the operating system said about a file of the user's.
    #[must_use]
    pub(super) fn io(path: &Path, doing: &str, error: &io::Error) -> Self {
        let kind = io_kind(error.kind());
        Self::new(kind, path.display(), format!("cannot {doing}: {error}"))
    }

    /// Why a file of the user's, not a pool, cannot be opened or made.
    #[must_use]
    pub(super) fn file(error: &OpenError) -> Self {
        let kind = match error {
            OpenError::Locked { .. } => "locked",
            OpenError::NotAStore { .. } | OpenError::Length { .. } | OpenError::Io { .. } => {
                io_kind(error.kind())
            }
        };
        let failure = Self::new(kind, "", error);
        match kind {
            "exists" => failure.hint("choose another name"),
            "locked" => failure.hint("stop what has it open, and try again"),
            _ => failure,
        }
    }
}

fn io_kind(kind: io::ErrorKind) -> &'static str {
    let kinds = [
        (io::ErrorKind::NotFound, "not_found"),
        (io::ErrorKind::AlreadyExists, "exists"),
        (io::ErrorKind::StorageFull, "no_space"),
        (io::ErrorKind::QuotaExceeded, "no_space"),
        (io::ErrorKind::Interrupted, "interrupted"),
    ];
    let known = kinds.iter().find(|(known, _)| *known == kind);
    known.map_or("io", |(_, word)| word)
}
