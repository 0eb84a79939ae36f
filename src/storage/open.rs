//! Opening a file as a store: who may, how it is locked, how it is then best driven, and why it
//! may be refused.

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{AlignedBuf, BLOCK, Tier};
use crate::sys::lock::{self, ImageUse, lock_holder};
use crate::sys::{clock, file as sys};

/// What the opener may do, and so which lock it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only; any number of readers share the file.
    ReadOnly,
    /// Reads and writes; nobody else may have the file open.
    ReadWrite,
}

/// Whether the page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Direct where it works with an alignment of at most [`BLOCK`] bytes.
    Auto,
    /// Through the page cache always: for files that several processes read, such as shared bases.
    Buffered,
}

/// What of a file is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Locking {
    /// The file is of our own kind: all of it.
    Whole,
    /// A disk image, which other programs use too: the bytes that QEMU locks
    /// ([`crate::sys::lock`]).
    Image,
}

/// Why a file could not be opened or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Someone else has it open (for writing, or we want to write).
    #[error("{}: in use by {}", path.display(), holder_text(*pid))]
    Locked {
        /// What was to be opened.
        path: PathBuf,
        /// The process that holds it, if we are allowed to see it.
        pid: Option<u32>,
    },
    /// The path leads to a directory, a pipe, a socket or a character device.
    #[error("{}: neither a regular file nor a block device", path.display())]
    NotAStore {
        /// What was to be opened.
        path: PathBuf,
    },
    /// The length asked for does not fit: a block device is smaller, or it is not a multiple of
    /// [`BLOCK`] bytes.
    #[error("{}: cannot hold {want} bytes (it has {have}; multiples of 512 only)", path.display())]
    Length {
        /// What was to be made.
        path: PathBuf,
        /// Bytes there are.
        have: u64,
        /// Bytes asked for.
        want: u64,
    },
    /// The operating system refused.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// What was to be opened.
        path: PathBuf,
        /// The step that failed.
        doing: &'static str,
        /// What it said.
        source: io::Error,
    },
}

impl OpenError {
    /// The nearest [`ErrorKind`], for callers who only tell a missing or existing file apart.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Locked { .. } => ErrorKind::ResourceBusy,
            Self::NotAStore { .. } | Self::Length { .. } => ErrorKind::InvalidInput,
            Self::Io { source, .. } => source.kind(),
        }
    }
}

fn holder_text(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("process {pid}"),
    )
}

/// `path` leads to something that is not opened.
pub(super) fn not_a_store(path: &Path) -> OpenError {
    let path = path.to_owned();
    OpenError::NotAStore { path }
}

/// Names the path and the step in an error.
pub(super) fn at<'a>(
    path: &'a Path,
    doing: &'static str,
) -> impl Fn(io::Error) -> OpenError + use<'a> {
    move |source| OpenError::Io {
        path: path.to_owned(),
        doing,
        source,
    }
}

/// How long a lock may outlive its holder. The kernel closes the files of a killed process's ring
/// only after the process is gone, and the lock with them: whoever restarts a daemon meets that.
const ORPHANED_LOCK_MAX: Duration = Duration::from_secs(2);
/// How long to wait between two looks at a lock that nobody seems to hold.
const ORPHANED_LOCK_LOOK: Duration = Duration::from_millis(5);

/// Opens what is there. To open a block device for writing claims it, and a claim, like the lock,
/// may outlive a killed process: one that nobody seems to hold is waited for. So this takes
/// [`ORPHANED_LOCK_MAX`] to refuse a device that is claimed in a way which `/proc` does not show:
/// mounted in another mount namespace, swapped to, or open in a program that claims but does not
/// lock.
///
/// # Errors
/// [`OpenError::Locked`] for a device that is mounted or claimed; [`OpenError::Io`].
pub(super) fn claim(path: &Path, mode: sys::Mode) -> Result<File, OpenError> {
    let end = clock::now() + ORPHANED_LOCK_MAX;
    loop {
        match sys::open(path, mode) {
            Ok(file) => return Ok(file),
            Err(e) if e.kind() != ErrorKind::ResourceBusy => return Err(at(path, "open")(e)),
            Err(_busy) => {}
        }
        // Without a claim, to see who has it.
        let device = sys::open(path, sys::Mode::Read).map_err(at(path, "open"))?;
        let pid = lock_holder(&device, None);
        if pid.is_some() || lock::is_mounted(&device) || clock::now() >= end {
            let path = path.to_owned();
            return Err(OpenError::Locked { path, pid });
        }
        std::thread::sleep(ORPHANED_LOCK_LOOK);
    }
}

/// Takes the lock that goes with `access`.
///
/// # Errors
/// [`OpenError::Locked`] if someone holds one that conflicts.
pub(super) fn lock(
    file: &File,
    path: &Path,
    access: Access,
    locking: Locking,
) -> Result<(), OpenError> {
    let end = clock::now() + ORPHANED_LOCK_MAX;
    loop {
        let byte = match try_lock(file, access, locking).map_err(at(path, "lock"))? {
            Ok(()) => return Ok(()),
            Err(Conflict { byte }) => byte,
        };
        let pid = lock_holder(file, byte);
        if pid.is_some() || clock::now() >= end {
            let path = path.to_owned();
            return Err(OpenError::Locked { path, pid });
        }
        std::thread::sleep(ORPHANED_LOCK_LOOK);
    }
}

/// Somebody is in the way.
struct Conflict {
    /// The byte, where it matters.
    byte: Option<u64>,
}

fn try_lock(file: &File, access: Access, locking: Locking) -> io::Result<Result<(), Conflict>> {
    let is_writer = access == Access::ReadWrite;
    match locking {
        Locking::Whole => {
            let is_locked = lock::try_lock(file, is_writer)?;
            Ok(if is_locked {
                Ok(())
            } else {
                Err(Conflict { byte: None })
            })
        }
        Locking::Image => {
            let image_use = if is_writer {
                ImageUse::Write
            } else {
                ImageUse::Read
            };
            let byte = lock::try_lock_image(file, image_use)?;
            Ok(byte.map_or(Ok(()), |byte| Err(Conflict { byte: Some(byte) })))
        }
    }
}

/// How the file is best driven; sets the file's flags to match.
///
/// # Errors
/// What the operating system said.
pub(super) fn choose_tier(
    file: &File,
    kind: sys::Kind,
    len: u64,
    access: Access,
    caching: Caching,
) -> io::Result<Tier> {
    if kind == sys::Kind::Regular && sys::is_tmpfs(file)? {
        return Ok(Tier::Memory);
    }
    if caching == Caching::Auto && sys::set_direct(file).is_ok() {
        let align = match sys::direct_align(file) {
            Some(align) => u64::from(align),
            None => probe_align(file),
        };
        let is_usable = align.is_power_of_two() && align <= BLOCK && len.is_multiple_of(align);
        if let (true, Ok(align)) = (is_usable, u32::try_from(align)) {
            return Ok(Tier::Direct { align });
        }
        sys::clear_direct(file)?;
    }
    if access == Access::ReadWrite {
        // Only what is written suffers from large folios; readers are glad of the read-ahead.
        sys::advise_random(file)?;
    }
    Ok(Tier::Buffered)
}

/// [`BLOCK`] if direct reads aligned to no more than that work, else 0: found by trying. An empty
/// file says yes to anything, which is why a file gets its length before its tier.
fn probe_align(file: &File) -> u64 {
    let mut buf = AlignedBuf::new(1024);
    match sys::read_exact_at(file, &mut [IoSliceMut::new(&mut buf[512..])], 0) {
        Ok(()) => BLOCK,
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => BLOCK,
        Err(_refused) => 0,
    }
}
