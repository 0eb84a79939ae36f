//! What a base is known by: where it is, which file it is, how long, and when it was last written;
//! the same for each file below it.

use super::file::{file_ref, nanoseconds};
use crate::cowdisk::error::DiskError;
use crate::format::catalogue::{BaseFormat, BaseRef, FileRef};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub(super) fn reference_to(path: &str, format: BaseFormat, metadata: &Metadata) -> BaseRef {
    BaseRef {
        path: path.to_owned(),
        format,
        dev: metadata.dev(),
        ino: metadata.ino(),
        file_len: metadata.len(),
        mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        below: None,
        samples: None,
    }
}

/// Whether both are one image with the same contents. Left out are what changes without them: the
/// inode's own time, with every link to it, and the number of the device, which many file systems get
/// anew each time they are mounted.
pub(in crate::cowdisk) fn is_same(a: &BaseRef, b: &BaseRef) -> bool {
    let is_same_below = match (&a.below, &b.below) {
        (Some(a), Some(b)) => a == b,
        (None, _) | (_, None) => true,
    };
    (&a.path, a.format) == (&b.path, b.format) && identity(a) == identity(b) && is_same_below
}

/// What tells an image from others on its file system, and from itself with other contents.
pub(in crate::cowdisk) fn identity(of: &BaseRef) -> (u64, u64, i64) {
    (of.ino, of.file_len, of.mtime_ns)
}

/// `Err` if a base is `now` something else than it was.
pub(super) fn check_same(was: &BaseRef, now: &BaseRef) -> Result<(), DiskError> {
    check_file(&top(was), &top(now)).map_err(|what| changed(was, &what))?;
    if let (Some(was_below), Some(now_below)) = (&was.below, &now.below) {
        check_below(was_below, now_below).map_err(|what| changed(was, &what))?;
    }
    Ok(())
}

/// `Err` if a file below a base is not what it was; looks at the files, and opens none.
pub(super) fn check_files_below(was: &BaseRef) -> Result<(), DiskError> {
    for file in was.below.iter().flatten() {
        let now = std::fs::metadata(Path::new(&file.path));
        let now = now.map_err(|e| changed(was, &format!("{}, below it: {e}", file.path)))?;
        let checked = check_file(file, &file_ref(&file.path, &now));
        checked.map_err(|what| changed(was, &format!("{}, below it: {what}", file.path)))?;
    }
    Ok(())
}

fn top(base: &BaseRef) -> FileRef {
    FileRef {
        path: base.path.clone(),
        ino: base.ino,
        file_len: base.file_len,
        mtime_ns: base.mtime_ns,
    }
}

fn check_below(was: &[FileRef], now: &[FileRef]) -> Result<(), String> {
    let paths = |files: &[FileRef]| {
        files
            .iter()
            .map(|file| file.path.clone())
            .collect::<Vec<_>>()
    };
    let (was_paths, now_paths) = (paths(was), paths(now));
    if was_paths != now_paths {
        let shown = |paths: Vec<String>| match paths.as_slice() {
            [] => "nothing".to_owned(),
            paths => paths.join(", "),
        };
        let (now, was) = (shown(now_paths), shown(was_paths));
        return Err(format!("below it is {now}, was {was}"));
    }
    for (was, now) in was.iter().zip(now) {
        check_file(was, now).map_err(|what| format!("{}, below it: {what}", was.path))?;
    }
    Ok(())
}

/// `Err` with all that differs.
fn check_file(was: &FileRef, now: &FileRef) -> Result<(), String> {
    let mut differs = Vec::new();
    if was.file_len != now.file_len {
        differs.push(format!("{} bytes, was {}", now.file_len, was.file_len));
    }
    if was.mtime_ns != now.mtime_ns {
        let (now, was) = (seconds(now.mtime_ns), seconds(was.mtime_ns));
        differs.push(format!("last written at {now}, was {was}"));
    }
    if was.ino != now.ino {
        differs.push(format!("inode {}, was {}", now.ino, was.ino));
    }
    match differs.as_slice() {
        [] => Ok(()),
        differs => Err(differs.join("; ")),
    }
}

/// Nanoseconds since 1970 as `date -d @` takes them.
fn seconds(ns: i64) -> String {
    format!(
        "{}.{:09}",
        ns.div_euclid(1_000_000_000),
        ns.rem_euclid(1_000_000_000)
    )
}

fn changed(was: &BaseRef, what: &str) -> DiskError {
    DiskError::BaseChanged {
        path: was.path.clone(),
        what: format!("it has changed since it became a base ({what})"),
    }
}
