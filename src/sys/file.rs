//! Files and block devices beyond what `std` offers. Every function takes an open [`File`] and
//! says what the kernel said: policy (fallbacks, bouncing, error texts) belongs to the callers.
#![expect(
    unsafe_code,
    reason = "pwritev2, statx and block-device ioctls have no safe wrapper"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{
    self, AT_FDCWD, FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, RenameFlags,
};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::sys::statvfs::statvfs;
use nix::sys::uio;
use nix::unistd::{Whence, lseek};

/// Most buffers one call hands the kernel (`IOV_MAX`, uio(7)).
const IOV_MAX: usize = 1024;

/// How to open a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing. On a block device this also claims it, so that
    /// one which is mounted or claimed by another process is refused with `ResourceBusy`.
    ReadWrite,
    /// A file that must not exist yet, for reading and writing (`O_CREAT | O_EXCL`), mode 0600
    /// less the umask: a pool holds the disks of many owners.
    CreateNew,
}

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// A directory, a pipe, a socket, a character device.
    Other,
}

impl From<fs::FileType> for Kind {
    fn from(from: fs::FileType) -> Self {
        if from.is_file() {
            Self::Regular
        } else if from.is_block_device() {
            Self::BlockDevice
        } else {
            Self::Other
        }
    }
}

/// What `path` leads to, symbolic links followed, without opening it (opening a pipe may block).
///
/// # Errors
/// `NotFound`, `PermissionDenied` and the rest of stat(2).
pub fn kind_of(path: &Path) -> io::Result<Kind> {
    Ok(fs::metadata(path)?.file_type().into())
}

/// Whether `path` leads to a directory.
///
/// # Errors
/// As [`kind_of`].
pub fn is_directory(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.is_dir())
}

/// Opens `path`; closed on exec.
///
/// # Errors
/// As open(2).
pub fn open(path: &Path, mode: Mode) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).mode(0o600);
    match mode {
        // A pipe that took the place of a file since that was looked at would wait for its other end.
        Mode::Read => {
            options.custom_flags(libc::O_NONBLOCK);
        }
        Mode::ReadWrite => {
            options.write(true);
            // Without O_CREAT, O_EXCL means "claim" on block devices and nothing elsewhere.
            if kind_of(path)? == Kind::BlockDevice {
                options.custom_flags(libc::O_EXCL);
            }
        }
        Mode::CreateNew => {
            options.write(true).create_new(true);
        }
    }
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    let file = options.open(path)?;
    if mode == Mode::Read {
        // With it a ring would fail where it should wait.
        set_flag(&file, OFlag::O_NONBLOCK, false)?;
    }
    Ok(file)
}

/// Makes the directory entry of `path` durable: a new file is not in its directory after a crash
/// until the directory itself was synced (fsync(2)).
///
/// # Errors
/// As open(2) and fsync(2).
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    open(parent, Mode::Read)?.sync_all()
}

/// Gives the file `from` the name `to`, which must be free: whoever made a file of that name
/// meanwhile keeps it (renameat2(2), `RENAME_NOREPLACE`; link(2) where the file system has no such
/// flag).
///
/// # Errors
/// `AlreadyExists`, and the rest of rename(2).
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let flags = RenameFlags::RENAME_NOREPLACE;
    match fcntl::renameat2(AT_FDCWD, from, AT_FDCWD, to, flags) {
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

/// Turns `O_DIRECT` on. Done after opening rather than in open(2), which would leave a created
/// file behind where the file system refuses.
///
/// # Errors
/// `InvalidInput` if the file system has no direct I/O.
pub fn set_direct(file: &File) -> io::Result<()> {
    set_flag(file, OFlag::O_DIRECT, true)
}

/// Turns `O_DIRECT` off again.
///
/// # Errors
/// As fcntl(2).
pub fn clear_direct(file: &File) -> io::Result<()> {
    set_flag(file, OFlag::O_DIRECT, false)
}

/// Changes one of the flags F_SETFL may change.
///
/// # Errors
/// As fcntl(2).
fn set_flag(file: &File, flag: OFlag, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl::fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(flag, on);
    fcntl::fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// The alignment direct I/O needs of offsets, lengths and addresses, in bytes, from statx(2)
/// (`STATX_DIOALIGN`, Linux 6.1): `Some(0)` if the file has no direct I/O, `None` if the kernel or
/// the file system does not say.
#[must_use]
pub fn direct_align(file: &File) -> Option<u32> {
    // SAFETY: `libc::statx` is plain integers and padding, for which all zeros is a valid value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open for the whole call because `file` is borrowed; the path is a
    // NUL-terminated static string, empty as AT_EMPTY_PATH wants; `stat` is a writable statx
    // buffer that outlives the call (statx(2)).
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    if result != 0 || stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    if stat.stx_dio_offset_align == 0 {
        return Some(0);
    }
    Some(stat.stx_dio_mem_align.max(stat.stx_dio_offset_align))
}

/// True if the file lives on tmpfs.
///
/// # Errors
/// As fstatfs(2).
pub fn is_tmpfs(file: &File) -> io::Result<bool> {
    Ok(fstatfs(file)?.filesystem_type() == TMPFS_MAGIC)
}

/// Bytes that the file system of `path` has left for us; `None` if it is a block device, which holds
/// no more than itself.
///
/// # Errors
/// As stat(2) and statvfs(3).
pub fn host_free(path: &Path) -> io::Result<Option<u64>> {
    if kind_of(path)? == Kind::BlockDevice {
        return Ok(None);
    }
    let stat = statvfs(path)?;
    Ok(Some(stat.blocks_available() * stat.fragment_size()))
}

/// Whether a read of `file` that has to wait takes no thread for that: of the file systems on local
/// devices this is known. Of any other, FUSE and those on a network above all, a ring has one of its
/// few threads wait for as long as it takes, and other files' requests with it.
#[must_use]
pub fn waits_without_thread(file: &File) -> bool {
    let known = [
        EXT4_SUPER_MAGIC,
        XFS_SUPER_MAGIC,
        BTRFS_SUPER_MAGIC,
        TMPFS_MAGIC,
    ];
    fstatfs(file).is_ok_and(|stat| known.contains(&stat.filesystem_type()))
}

/// Tells the page cache that access is random. Without it one sequential read fills the cache with
/// large folios, after which every small overwrite through the cache costs many times as much.
///
/// # Errors
/// As posix_fadvise(2).
pub fn advise_random(file: &File) -> io::Result<()> {
    fcntl::posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    Ok(())
}

/// An offset as the kernel counts it.
///
/// # Errors
/// `InvalidInput` beyond 2^63.
fn signed(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes)
        .map_err(|_beyond| io::Error::new(ErrorKind::InvalidInput, "offset beyond 2^63"))
}

/// Fills every buffer from byte `offset` on (preadv(2)), however short the kernel's reads are.
///
/// # Errors
/// `UnexpectedEof` if the file ends first; otherwise what the device said.
pub fn read_exact_at(
    file: &File,
    mut bufs: &mut [IoSliceMut<'_>],
    mut offset: u64,
) -> io::Result<()> {
    IoSliceMut::advance_slices(&mut bufs, 0); // drops empty buffers in front
    while !bufs.is_empty() {
        let count = bufs.len().min(IOV_MAX);
        match uio::preadv(file, &mut bufs[..count], signed(offset)?) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                IoSliceMut::advance_slices(&mut bufs, read);
                offset += read as u64;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Writes every buffer from byte `offset` on (pwritev(2)), however short the kernel's writes are.
///
/// # Errors
/// What the device said; any part may have been written.
pub fn write_all_at(file: &File, bufs: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
    write_loop(bufs, offset, |bufs, offset| {
        Ok(uio::pwritev(file, bufs, offset)?)
    })
}

/// As [`write_all_at`], each byte durable before the call returns (`RWF_DSYNC`, pwritev2(2)).
///
/// # Errors
/// What the device said; any part may have been written. `Unsupported` if the file system does not
/// know the flag.
pub fn write_all_durable_at(file: &File, bufs: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
    write_loop(bufs, offset, |bufs, offset| {
        let count = i32::try_from(bufs.len())
            .map_err(|_beyond| io::Error::from(ErrorKind::InvalidInput))?;
        // SAFETY: the descriptor is open because `file` is borrowed; `IoSlice` is guaranteed to
        // have the layout of `struct iovec`, `bufs` holds `count` of them and each borrows memory
        // that stays readable for the call (pwritev2(2)).
        let written = unsafe {
            libc::pwritev2(
                file.as_raw_fd(),
                bufs.as_ptr().cast::<libc::iovec>(),
                count,
                offset,
                libc::RWF_DSYNC,
            )
        };
        usize::try_from(written).map_err(|_negative| io::Error::last_os_error())
    })
}

/// Calls `write` with what is left until nothing is.
///
/// # Errors
/// As `write`; `WriteZero` if it writes nothing.
fn write_loop(
    mut bufs: &mut [IoSlice<'_>],
    mut offset: u64,
    mut write: impl FnMut(&[IoSlice<'_>], i64) -> io::Result<usize>,
) -> io::Result<()> {
    IoSlice::advance_slices(&mut bufs, 0); // drops empty buffers in front
    while !bufs.is_empty() {
        let count = bufs.len().min(IOV_MAX);
        match write(&bufs[..count], signed(offset)?) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => {
                IoSlice::advance_slices(&mut bufs, written);
                offset += written as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// fallocate(2), again after a signal.
///
/// # Errors
/// As fallocate(2).
fn fallocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (signed(offset)?, signed(len)?);
    loop {
        match fcntl::fallocate(file, flags, offset, len) {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Makes a hole of `len` bytes, which then read as zeros; the file keeps its length. On a block
/// device, unmaps blocks if they are known to read as zeros then.
///
/// # Errors
/// `Unsupported` where it cannot be done; otherwise as fallocate(2).
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, offset, len)
}

/// Sets space aside for `len` bytes; the file keeps its length and contents.
///
/// # Errors
/// `Unsupported` where it cannot be done; otherwise as fallocate(2).
pub fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// The first byte at or after `offset` that is not in a hole (`SEEK_DATA`), or `None` if there is
/// none before the end.
///
/// # Errors
/// `InvalidInput` where the file system cannot tell; otherwise as lseek(2).
pub fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, Whence::SeekData)
}

/// The first byte at or after `offset` that is in a hole (`SEEK_HOLE`; the end counts as one), or
/// `None` if `offset` is at or beyond the end.
///
/// # Errors
/// `InvalidInput` where the file system cannot tell; otherwise as lseek(2).
pub fn seek_hole(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, Whence::SeekHole)
}

/// lseek(2), which moves an offset that nothing here uses.
///
/// # Errors
/// As lseek(2).
fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek(file, signed(offset)?, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Bytes the file system has allocated to the file (`st_blocks`, which counts 512-byte units on
/// every file system).
///
/// # Errors
/// As fstat(2).
pub fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// `_IOR(0x12, 114, size_t)` of linux/fs.h: length in bytes.
const BLKGETSIZE64: libc::Ioctl = nix::request_code_read!(0x12, 114, size_of::<usize>());
/// `_IO(0x12, 104)`: logical block size.
const BLKSSZGET: libc::Ioctl = nix::request_code_none!(0x12, 104);
/// `_IO(0x12, 119)`: discard a range.
const BLKDISCARD: libc::Ioctl = nix::request_code_none!(0x12, 119);
/// `_IO(0x12, 127)`: zero a range.
const BLKZEROOUT: libc::Ioctl = nix::request_code_none!(0x12, 127);

/// Length of a block device in bytes.
///
/// # Errors
/// As ioctl(2); `ENOTTY` if it is no block device.
pub fn device_len(file: &File) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: the descriptor is open because `file` is borrowed; BLKGETSIZE64 writes one u64
    // through the pointer, which is to a live u64 (linux/fs.h).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    Errno::result(result)?;
    Ok(bytes)
}

/// Smallest unit the block device reads and writes, in bytes.
///
/// # Errors
/// As ioctl(2); `ENOTTY` if it is no block device.
pub fn device_block_size(file: &File) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open because `file` is borrowed; BLKSSZGET writes one int through
    // the pointer, which is to a live int (linux/fs.h).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut bytes) };
    Errno::result(result)?;
    u32::try_from(bytes).map_err(|_negative| ErrorKind::InvalidData.into())
}

/// Tells the block device that `len` bytes at `offset` are not needed; they read as anything
/// afterwards. Both are multiples of [`device_block_size`].
///
/// # Errors
/// `Unsupported` where the device cannot; otherwise as ioctl(2).
pub fn device_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    device_range(file, BLKDISCARD, offset, len)
}

/// Makes `len` bytes at `offset` of the block device read as zeros, by writing them if need be.
/// Both are multiples of [`device_block_size`].
///
/// # Errors
/// As ioctl(2).
pub fn device_zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    device_range(file, BLKZEROOUT, offset, len)
}

/// An ioctl on (start, length).
///
/// # Errors
/// As ioctl(2).
fn device_range(file: &File, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<()> {
    let range: [u64; 2] = [offset, len];
    // SAFETY: the descriptor is open because `file` is borrowed; both requests read two u64
    // (start, length) through the pointer, which is to a live array of two (linux/fs.h).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) };
    Errno::result(result)?;
    Ok(())
}
