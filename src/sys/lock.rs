//! Open-file-description locks (fcntl(2)): they go when the last descriptor of an open is closed,
//! however the process ends. On a whole file for what only we use, and on single bytes for disk
//! images, in the way that QEMU locks them.
//!
//! QEMU's way: whoever has an image open holds read locks on byte 100 + n for each permission n
//! that it uses, and on byte 200 + n for each that it does not share. It first takes its locks, then
//! looks whether somebody does not share what it uses, or uses what it does not share.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use super::process;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// QEMU's permissions, by number.
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const WRITE_UNCHANGED: u64 = 2;
const RESIZE: u64 = 3;
/// The byte of permission 0 in use, and that of permission 0 not shared.
const USED_AT: u64 = 100;
const UNSHARED_AT: u64 = 200;

/// What an opener does with a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageUse {
    /// Reads it, with others, while nobody writes.
    Read,
    /// Writes it, alone.
    Write,
}

impl ImageUse {
    fn used(self) -> &'static [u64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshared(self) -> &'static [u64] {
        match self {
            Self::Read => &[WRITE, RESIZE],
            Self::Write => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }
}

/// A lock of type `kind` (`F_RDLCK` and so on) on `len` bytes from byte `start`; 0 for all to the
/// end, however far that moves.
fn flock(kind: libc::c_int, start: u64, len: u64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).expect("lock types are small constants"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("SEEK_SET is 0"),
        l_start: i64::try_from(start).expect("locked bytes are near the start"),
        l_len: i64::try_from(len).expect("locked bytes are few"),
        l_pid: 0, // must be 0 for these locks
    }
}

/// False if another open holds a lock that conflicts.
///
/// # Errors
/// As fcntl(2).
fn set(file: &File, lock: &libc::flock) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(lock)) {
        Ok(_zero) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes a lock on the whole file for this open, without waiting: exclusive or shared. False if
/// another open holds a lock that conflicts.
///
/// # Errors
/// As fcntl(2).
pub fn try_lock(file: &File, is_exclusive: bool) -> io::Result<bool> {
    let kind = if is_exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    set(file, &flock(kind, 0, 0))
}

/// Takes the locks of a disk image for this open, without waiting. The byte in whose way somebody
/// is, if somebody is; then nothing is locked.
///
/// # Errors
/// As fcntl(2).
pub fn try_lock_image(file: &File, image_use: ImageUse) -> io::Result<Option<u64>> {
    let (used, unshared) = (image_use.used(), image_use.unshared());
    let at = |base: u64, permissions: &'static [u64]| permissions.iter().map(move |n| base + n);
    let mut conflict = None;
    for byte in at(USED_AT, used).chain(at(UNSHARED_AT, unshared)) {
        // In the way can only be a lock on the whole file: of a pool, or of a file being made.
        if !set(file, &flock(libc::F_RDLCK, byte, 1))? {
            conflict = conflict.or(Some(byte));
        }
    }
    for byte in at(UNSHARED_AT, used).chain(at(USED_AT, unshared)) {
        if conflict.is_none() && is_locked(file, byte)? {
            conflict = Some(byte);
        }
    }
    if conflict.is_some() {
        set(file, &flock(libc::F_UNLCK, 0, 0))?;
    }
    Ok(conflict)
}

/// Whether another open holds any lock on `byte`.
///
/// # Errors
/// As fcntl(2).
fn is_locked(file: &File, byte: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte, 1);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Who holds a lock, as far as /proc shows it to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// This process, which is alive.
    Process(u32),
    /// Nobody alive: the kernel has not yet closed what some process had open (io_uring does it when
    /// the process is gone).
    Kernel,
    /// Nobody whom we may look at.
    Unseen,
}

/// Who holds a lock on the same file as `file`, on `byte` if one is given: locks of this kind belong
/// to no process, but the descriptors that carry them do (proc_pid_fdinfo(5)). This looks at every
/// descriptor of every process once, and is not for loops.
#[must_use]
pub fn find_holder(file: &File, byte: Option<u64>) -> Holder {
    let Ok(stat) = file.metadata() else {
        return Holder::Unseen;
    };
    let (major, minor) = (libc::major(stat.dev()), libc::minor(stat.dev()));
    let inode = format!("{major:02x}:{minor:02x}:{}", stat.ino());
    let Ok(pids) = fs::read_dir("/proc") else {
        return Holder::Unseen;
    };
    let pids = pids
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut sees_all = process::sees_all();
    for pid in pids {
        match has_lock(pid, &inode, byte) {
            Ok(true) if !process::is_ending(pid) => return Holder::Process(pid),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => sees_all = false,
            Err(_gone) => {}
        }
    }
    if sees_all {
        Holder::Kernel
    } else {
        Holder::Unseen
    }
}

/// Whether `pid` has a descriptor that carries the lock.
fn has_lock(pid: u32, inode: &str, byte: Option<u64>) -> io::Result<bool> {
    for fd in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let fd = fd?;
        // Most descriptors of a server are sockets and the like, and their links say so.
        let is_file = fs::read_link(fd.path()).is_ok_and(|link| link.is_absolute());
        if !is_file {
            continue;
        }
        let info = format!("/proc/{pid}/fdinfo/{}", fd.file_name().display());
        let text = fs::read_to_string(info).unwrap_or_default();
        let mut locks = text.lines().filter_map(|line| line.strip_prefix("lock:"));
        if locks.any(|line| covers(line, inode, byte)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a line of fdinfo is about a lock on `byte`, or any, of the file `inode`. It looks like
/// `1: OFDLCK  ADVISORY  READ -1 08:01:1234 100 100`, or ends in `EOF`.
fn covers(line: &str, inode: &str, byte: Option<u64>) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [.., file, start, end] = words.as_slice() else {
        return false;
    };
    let is_beyond = |byte: u64| {
        let first = start.parse().unwrap_or(0);
        let last = end.parse().unwrap_or(u64::MAX);
        byte < first || last < byte
    };
    *file == inode && !byte.is_some_and(is_beyond)
}

/// Whether the block device `device` is mounted where we can see it, or part of another device, as
/// far as /proc and /sys show it to us.
#[must_use]
pub fn is_mounted(device: &File) -> bool {
    let Ok(stat) = device.metadata() else {
        return false;
    };
    let number = format!("{}:{}", libc::major(stat.rdev()), libc::minor(stat.rdev()));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let holders = fs::read_dir(format!("/sys/dev/block/{number}/holders"));
    mounts.lines().any(|line| mounts_device(line, &number))
        || holders.is_ok_and(|mut holders| holders.next().is_some())
}

/// Whether a line of mountinfo (proc_pid_mountinfo(5)) is about the device `number`. It looks like
/// `36 35 8:1 / /mnt rw - ext4 /dev/sda1 rw`; some file systems (btrfs) have a number of their own
/// there, but then they name the device.
fn mounts_device(line: &str, number: &str) -> bool {
    let is_it = |name: &str| {
        let is_path = name.starts_with("/dev/");
        is_path
            && fs::metadata(name).is_ok_and(|stat| {
                let (major, minor) = (libc::major(stat.rdev()), libc::minor(stat.rdev()));
                format!("{major}:{minor}") == number
            })
    };
    let source = line
        .split_once(" - ")
        .and_then(|(_mount, kind)| kind.split(' ').nth(1));
    line.split(' ').nth(2) == Some(number) || source.is_some_and(is_it)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file::{Mode, open};
    use std::path::Path;

    fn opened(path: &Path) -> File {
        open(path, Mode::ReadWrite).expect("opens")
    }

    /// What another test starts has our descriptors, and so our locks, until it executes.
    fn take_at_last(file: &File, how: ImageUse) {
        while try_lock_image(file, how).expect("no failure").is_some() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn readers_of_an_image_share_it_and_a_writer_does_not() {
        let image = tempfile::NamedTempFile::new().expect("a file");
        let take = |file: &File, how| try_lock_image(file, how).expect("no failure");
        let (first, second) = (opened(image.path()), opened(image.path()));
        assert_eq!(take(&first, ImageUse::Read), None);
        assert_eq!(take(&second, ImageUse::Read), None);
        let third = opened(image.path());
        assert_eq!(take(&third, ImageUse::Write), Some(UNSHARED_AT + WRITE));
        let this = Holder::Process(std::process::id());
        assert_eq!(find_holder(&third, Some(UNSHARED_AT + WRITE)), this);
        assert_ne!(find_holder(&third, Some(USED_AT + WRITE)), this);
        drop((first, second));
        take_at_last(&third, ImageUse::Write);
        let fourth = opened(image.path());
        assert_eq!(
            take(&fourth, ImageUse::Read),
            Some(UNSHARED_AT + CONSISTENT_READ)
        );
        // What is locked as a whole is no image to share.
        drop(third);
        while !try_lock(&fourth, true).expect("no failure") {
            std::thread::yield_now();
        }
        let fifth = opened(image.path());
        assert_eq!(
            take(&fifth, ImageUse::Read),
            Some(USED_AT + CONSISTENT_READ)
        );
        drop(fourth);
        take_at_last(&fifth, ImageUse::Read);
    }

    /// It took as long as all descriptors of all processes, again and again: 11 seconds and more.
    #[test]
    fn a_holder_among_thousands_of_descriptors_is_found_soon() {
        let limit = crate::sys::fd::raise_limit().expect("a limit");
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = tempfile::NamedTempFile::new().expect("a file");
        let others = usize::try_from(limit / 2).map_or(10_000, |half| half.min(10_000));
        let _held: Vec<File> = (0..others).map(|_| opened(other.path())).collect();
        let holder = opened(file.path());
        assert!(try_lock(&holder, true).expect("no failure"));
        let began = crate::sys::clock::now();
        let seeker = opened(file.path());
        let found = find_holder(&seeker, None);
        assert_eq!(found, Holder::Process(std::process::id()));
        let took = began.elapsed();
        assert!(took < std::time::Duration::from_secs(5), "{took:?}");
    }

    #[test]
    fn lines_of_mountinfo_name_the_device() {
        let ext4 = "36 35 8:1 / /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw";
        assert!(mounts_device(ext4, "8:1"));
        assert!(!mounts_device(ext4, "8:2"));
        // any device that is everywhere will do
        let btrfs = "36 35 0:44 / /mnt rw - btrfs /dev/null rw,ssd";
        assert!(mounts_device(btrfs, "1:3"));
        assert!(!mounts_device(btrfs, "1:5"));
        assert!(!mounts_device("", "1:3"));
    }

    #[test]
    fn lines_of_fdinfo_name_the_bytes() {
        let line = " 1: OFDLCK  ADVISORY  READ -1 08:01:1234 100 101";
        assert!(covers(line, "08:01:1234", None));
        assert!(covers(line, "08:01:1234", Some(101)));
        assert!(!covers(line, "08:01:1234", Some(102)));
        assert!(!covers(line, "08:01:123", None));
        let whole = " 1: OFDLCK  ADVISORY  WRITE -1 08:01:1234 0 EOF";
        assert!(covers(whole, "08:01:1234", Some(200)));
        assert!(!covers("", "08:01:1234", None));
    }
}
