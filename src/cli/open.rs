//! Opening pools for a command, and saying who is in the way if that fails.

use super::failure::Failure;
use super::{interrupt, output};
use crate::format::FormatError;
use crate::format::superblock::{OWNER_NOTE_AT, SUPERBLOCK_LEN, Superblock};
use crate::pool::open::parse_owner_note;
use crate::pool::{OpenOptions, Pool, Return};
use crate::storage::{Access, FileStorage, OpenError, Patience, Storage};
use crate::sync::Arc;
use crate::sys::file;
use crate::sys::process::{Life, Process};
use std::io::{self, IoSliceMut};
use std::path::Path;
use std::time::Duration;

/// Runs `work` on the pool, opened for reading only: others may read it at the same time.
///
/// # Errors
/// The pool cannot be opened, or what `work` says.
pub(super) fn reading<T>(
    path: &Path,
    work: impl FnOnce(&Arc<Pool>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    work(&open_to_read(path)?)
}

/// Opens the pool for reading only.
///
/// # Errors
/// It cannot be opened.
pub(super) fn open_to_read(path: &Path) -> Result<Arc<Pool>, Failure> {
    let options = OpenOptions {
        is_read_only: true,
        ..OpenOptions::default()
    };
    open(path, Access::ReadOnly, &options)
}

/// Runs `work` on the pool, opened for writing, and closes it. `doing` is for others who want it
/// meanwhile.
///
/// # Errors
/// The pool cannot be opened or closed, or what `work` says.
pub(super) fn writing<T>(
    path: &Path,
    doing: &str,
    work: impl FnOnce(&Arc<Pool>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let pool = open_for(path, doing, Return::Idle)?;
    let result = work(&pool);
    let closed = pool.close();
    let value = result?;
    closed.map_err(|e| Failure::pool(path.display(), &e))?;
    Ok(value)
}

/// Opens the pool for writing, with a note of who does.
///
/// # Errors
/// It cannot be opened.
pub(super) fn open_for(path: &Path, doing: &str, returning: Return) -> Result<Arc<Pool>, Failure> {
    let options = OpenOptions {
        is_read_only: false,
        returning,
        owner: match Process::this() {
            Ok(process) => format!("{process}, {doing}"),
            Err(_unknown) => format!("pid {}, {doing}", std::process::id()),
        },
    };
    open(path, Access::ReadWrite, &options)
}

fn open(path: &Path, access: Access, options: &OpenOptions) -> Result<Arc<Pool>, Failure> {
    let patience = Patience {
        owner: &|| Process::parse(&owner_note(path)).map(|(process, _)| process),
        tell: &|most| tell_of_waiting(path, most),
        is_over: &interrupt::is_caught,
    };
    let storage = FileStorage::open_patiently(path, access, &patience);
    let storage = storage.map_err(|e| refusal(path, &e))?;
    let storage: Arc<dyn Storage> = Arc::new(storage);
    Pool::open(storage, options).map_err(|e| Failure::pool(path.display(), &e))
}

/// Why a pool's file cannot be opened.
#[must_use]
pub(super) fn refusal(path: &Path, error: &OpenError) -> Failure {
    match error {
        OpenError::Locked { pid, .. } => locked(path, *pid),
        OpenError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => missing(path),
        OpenError::NotAStore { .. } => Failure::new("not_a_pool", "", error)
            .hint("`tidepool pool ls DIR` finds the pools in a directory"),
        OpenError::Length { .. } | OpenError::Io { .. } => Failure::file(error),
    }
}

fn tell_of_waiting(path: &Path, most: Duration) {
    let (path, most) = (path.display(), most.as_secs());
    output::remark(&format!(
        "{path}: nobody alive has it, and the kernel has not yet closed it; waiting for that, {most} \
         seconds at most"
    ));
}

/// The pool at `path` is in use by `pid`, if that is known.
fn locked(path: &Path, pid: Option<u32>) -> Failure {
    let note = owner_note(path);
    let owner = Process::parse(&note);
    // A note of another process was left by one that was killed.
    let is_about = |process: &Process| match pid {
        Some(pid) => process.pid == pid,
        None => process.life() != Life::Over,
    };
    let doing = match (owner, pid) {
        (Some((process, doing)), _) if is_about(&process) => doing,
        (Some(_), _) => "",
        (None, Some(pid)) => {
            let rest = note.strip_prefix(&format!("pid {pid}, "));
            rest.unwrap_or_default()
        }
        (None, None) => note.as_str(),
    };
    let doing = match doing {
        "" => String::new(),
        doing => format!(" ({doing})"),
    };
    let failure = |what: String| Failure::new("locked", path.display(), what);
    match (pid, owner) {
        (Some(pid), _) => failure(format!("in use by process {pid}{doing}")).hint(format!(
            "stop it with `kill {pid}` or Ctrl-C there, and try again"
        )),
        (None, Some((owner, _))) if owner.life() == Life::Over => {
            let pid = owner.pid;
            failure(format!(
                "process {pid} had it and has ended, and the kernel has not closed it yet"
            ))
            .hint("its last requests are under way: see that its storage answers, and try again")
        }
        (None, _) => failure(format!("in use by another process{doing}"))
            .hint("stop what has it open, and try again"),
    }
}

/// There is no pool at `path`: what may have been meant.
fn missing(path: &Path) -> Failure {
    let shown = path.display();
    let failure = Failure::new("not_found", &shown, "there is no such pool");
    let text = path.as_os_str().to_string_lossy();
    if let Some((pool, disk)) = text.rsplit_once(':')
        && is_pool(Path::new(pool))
    {
        return failure.hint(format!(
            "`{pool}` is a pool: name it alone here; for `{disk}` in it see `tidepool disk`"
        ));
    }
    match check_directory(path) {
        Err(nowhere) => nowhere,
        Ok(()) => failure.hint(format!(
            "`tidepool pool ls DIR` finds pools; `tidepool pool create {shown} --size 100G` makes one"
        )),
    }
}

/// # Errors
/// The directory that the file `path` would be in is not there.
pub(super) fn check_directory(path: &Path) -> Result<(), Failure> {
    let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else {
        return Ok(());
    };
    let shown = dir.display();
    let failure = |what| Failure::new("not_found", path.display(), what);
    match file::is_directory(dir) {
        Ok(true) => Ok(()),
        Ok(false) => Err(failure(format!("`{shown}` is not a directory"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(failure(format!("there is no directory `{shown}`"))
                .hint(format!("`mkdir -p {shown}` makes it")))
        }
        Err(e) => Err(Failure::io(dir, "look into the directory", &e)),
    }
}

/// Who has the pool open, for people, as far as the note says; empty if it does not.
#[must_use]
pub(super) fn owner_text(path: &Path) -> String {
    let note = owner_note(path);
    match Process::parse(&note) {
        Some((process, doing)) => format!("pid {}, {doing}", process.pid),
        None => note,
    }
}

/// The note of who has the pool open; empty if there is none or it cannot be read.
#[must_use]
fn owner_note(path: &Path) -> String {
    peek(path, OWNER_NOTE_AT, 4096).map_or_else(|_| String::new(), |block| parse_owner_note(&block))
}

/// `len` bytes of a file, whoever has it locked.
///
/// # Errors
/// As open(2) and read(2); `UnexpectedEof` if it is shorter.
pub(super) fn peek(path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    // Opening a pipe would wait for its other end.
    if file::kind_of(path)? == file::Kind::Other {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = file::open(path, file::Mode::Read)?;
    let mut bytes = vec![0; len];
    file::read_exact_at(&file, &mut [IoSliceMut::new(&mut bytes)], offset)?;
    Ok(bytes)
}

/// Whether there is a superblock, in whatever state.
#[must_use]
pub(super) fn is_pool(path: &Path) -> bool {
    peek(path, 0, SUPERBLOCK_LEN).is_ok_and(|block| {
        !matches!(
            Superblock::decode(&block),
            Err(FormatError::Magic { .. } | FormatError::Short { .. })
        )
    })
}
