//! Opening a file as a store: who may, how it is locked, how it is then best driven, and why it
//! may be refused.

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{AlignedBuf, BLOCK, Tier};
use crate::sys::lock::{self, Holder, ImageUse};
use crate::sys::process::{Life, Process};
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
/// only after the process is gone, and the lock with them, once what the ring was at is done: whoever
/// restarts a daemon meets that.
const ORPHANED_MAX: Duration = Duration::from_secs(30);
/// The same, where nothing says that its holder is gone: it may be somebody whom we cannot see.
const UNSEEN_MAX: Duration = Duration::from_secs(2);
/// How long this is before it is worth telling.
const TOLD_AFTER: Duration = Duration::from_millis(200);
/// How long to wait between two looks at a lock that nobody seems to hold.
const LOOK: Duration = Duration::from_millis(10);

/// What an opener knows of who may be in its way, and does while it waits for a lock that is held by
/// nobody alive. A lock of somebody alive is never waited for.
pub(crate) struct Patience<'a> {
    /// The process that says it has the file, if one does now. Asked at every look.
    pub owner: &'a dyn Fn() -> Option<Process>,
    /// Told once, how long this may take.
    pub tell: &'a dyn Fn(Duration),
    /// Whether to wait no longer.
    pub is_over: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    /// Knows and says nothing.
    pub(super) const SILENT: Patience<'static> = Patience {
        owner: &|| None,
        tell: &|_| {},
        is_over: &|| false,
    };
}

/// Opens what is there. To open a block device for writing claims it, and a claim, like the lock,
/// may outlive a killed process: one that nobody seems to hold is waited for. So this takes
/// [`UNSEEN_MAX`] to refuse a device that is claimed in a way which `/proc` does not show:
/// mounted in another mount namespace, swapped to, or open in a program that claims but does not
/// lock.
///
/// # Errors
/// [`OpenError::Locked`] for a device that is mounted or claimed; [`OpenError::Io`], of kind
/// `Interrupted` if it was waited for no longer.
pub(super) fn claim(
    path: &Path,
    mode: sys::Mode,
    patience: &Patience<'_>,
) -> Result<File, OpenError> {
    let attempt = || match sys::open(path, mode) {
        Ok(file) => Ok(Ok(file)),
        Err(e) if e.kind() == ErrorKind::ResourceBusy => Ok(Err(Conflict { byte: None })),
        Err(e) => Err(at(path, "open")(e)),
    };
    let holder = |_conflict| {
        // Without a claim, to see who has it.
        let device = sys::open(path, sys::Mode::Read).map_err(at(path, "open"))?;
        Ok(match lock::find_holder(&device, None) {
            Holder::Process(pid) => InTheWay::For(Some(pid)),
            Holder::Kernel | Holder::Unseen if lock::is_mounted(&device) => InTheWay::For(None),
            // A claim need not go with a lock.
            Holder::Kernel | Holder::Unseen => InTheWay::Unseen,
        })
    };
    wait_out(path, patience, attempt, holder)
}

/// Takes the lock that goes with `access`.
///
/// # Errors
/// [`OpenError::Locked`] if someone holds one that conflicts; [`OpenError::Io`], of kind
/// `Interrupted` if it was waited for no longer.
pub(super) fn lock(
    file: &File,
    path: &Path,
    access: Access,
    locking: Locking,
    patience: &Patience<'_>,
) -> Result<(), OpenError> {
    let attempt = || try_lock(file, access, locking).map_err(at(path, "lock"));
    let holder = |conflict: Conflict| {
        Ok(match lock::find_holder(file, conflict.byte) {
            Holder::Process(pid) => InTheWay::For(Some(pid)),
            Holder::Kernel => InTheWay::Orphaned,
            Holder::Unseen => InTheWay::Unseen,
        })
    };
    wait_out(path, patience, attempt, holder)
}

/// What keeps an opener out.
enum InTheWay {
    /// Somebody alive, or a mount: for as long as that likes.
    For(Option<u32>),
    /// Nobody alive.
    Orphaned,
    /// Nobody whom we can see.
    Unseen,
}

/// Attempts until it succeeds or there is no hope. `holder` looks at all of /proc: once at first, and
/// once more in the end, for whoever was faster.
fn wait_out<T>(
    path: &Path,
    patience: &Patience<'_>,
    mut attempt: impl FnMut() -> Result<Result<T, Conflict>, OpenError>,
    holder: impl Fn(Conflict) -> Result<InTheWay, OpenError>,
) -> Result<T, OpenError> {
    let refused = |pid| {
        let path = path.to_owned();
        Err(OpenError::Locked { path, pid })
    };
    let mut waiting: Option<(Instant, Duration)> = None;
    let mut is_told = false;
    loop {
        let conflict = match attempt()? {
            Ok(done) => return Ok(done),
            Err(conflict) => conflict,
        };
        let owner = (patience.owner)().map(|owner| (owner.pid, owner.life()));
        if let Some((pid, Life::Alive)) = owner {
            return refused(Some(pid));
        }
        let now = clock::now();
        let (began, most) = match waiting {
            Some(waiting) => waiting,
            None => match (holder(conflict)?, owner) {
                (InTheWay::For(pid), _) => return refused(pid),
                (InTheWay::Orphaned, _) | (_, Some((_, Life::Over))) => (now, ORPHANED_MAX),
                (InTheWay::Unseen, _) => (now, UNSEEN_MAX),
            },
        };
        waiting = Some((began, most));
        let waited = now.saturating_duration_since(began);
        if waited >= most {
            return match holder(conflict)? {
                InTheWay::For(pid) => refused(pid),
                InTheWay::Orphaned | InTheWay::Unseen => refused(None),
            };
        }
        if (patience.is_over)() {
            return Err(at(path, "lock")(ErrorKind::Interrupted.into()));
        }
        if waited >= TOLD_AFTER && !is_told {
            (patience.tell)(most);
            is_told = true;
        }
        std::thread::sleep(LOOK);
    }
}

/// Somebody is in the way.
#[derive(Clone, Copy)]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::global::Mutex;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    /// Has a lock on `path` that no process has: its descriptor is on its way between two sockets, and
    /// so the kernel's alone, as the files of a ring are whose process was killed.
    fn orphaned_lock(path: &Path) -> (UnixStream, UnixStream) {
        let file = sys::open(path, sys::Mode::ReadWrite).expect("opens");
        while !lock::try_lock(&file, true).expect("no failure") {
            std::thread::yield_now(); // what another test starts has our descriptors for a moment
        }
        let pair = UnixStream::pair().expect("sockets");
        let fds = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let bytes = [IoSlice::new(b"x")];
        let sent = sendmsg::<()>(pair.0.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None);
        assert_eq!(sent, Ok(1));
        pair
    }

    fn dead() -> Process {
        let mut child = Command::new("sleep").arg("600").spawn().expect("starts");
        let process = Process::of(child.id()).expect("it runs");
        child.kill().expect("ours");
        child.wait().expect("ours");
        process
    }

    #[test]
    fn a_lock_that_outlives_its_holder_is_waited_for_and_told() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let on_its_way = Mutex::new(Some(orphaned_lock(file.path())));
        let (owner, told) = (dead(), Mutex::new(Vec::new()));
        let patience = Patience {
            owner: &|| Some(owner),
            tell: &|most| {
                told.lock().push(most);
                drop(on_its_way.lock().take());
            },
            is_over: &|| false,
        };
        let opened = sys::open(file.path(), sys::Mode::ReadWrite).expect("opens");
        let access = Access::ReadWrite;
        lock(&opened, file.path(), access, Locking::Whole, &patience).expect("it goes by itself");
        assert_eq!(*told.lock(), [ORPHANED_MAX], "once");
    }

    #[test]
    fn who_waits_for_a_lock_can_be_stopped() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let _on_its_way = orphaned_lock(file.path());
        let (owner, is_told) = (dead(), Mutex::new(false));
        let patience = Patience {
            owner: &|| Some(owner),
            tell: &|_| *is_told.lock() = true,
            is_over: &|| *is_told.lock(),
        };
        let opened = sys::open(file.path(), sys::Mode::ReadWrite).expect("opens");
        let access = Access::ReadWrite;
        let stopped = lock(&opened, file.path(), access, Locking::Whole, &patience);
        assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn somebody_alive_is_not_waited_for() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        // Not even if nobody sees that he has it.
        let _on_its_way = orphaned_lock(file.path());
        let this = Process::this().expect("/proc");
        let patience = Patience {
            owner: &|| Some(this),
            tell: &|_| panic!("nobody waits"),
            is_over: &|| false,
        };
        let opened = sys::open(file.path(), sys::Mode::ReadWrite).expect("opens");
        let access = Access::ReadWrite;
        let refused = lock(&opened, file.path(), access, Locking::Whole, &patience);
        let refused = refused.expect_err("in use");
        let pid = Some(std::process::id());
        assert!(
            matches!(refused, OpenError::Locked { pid: by, .. } if by == pid),
            "{refused}"
        );
    }
}
