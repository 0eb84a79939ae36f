//! A regular file or block device as a [`Storage`]: locked against a second opener, driven past
//! the page cache where that works, through it where not.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use super::one::{Writer, bounce_len, full, is_read_only, narrow, read, write, write_durable};
use super::open::{
    Access, Caching, Locking, OpenError, Patience, at, choose_tier, claim, lock, not_a_store,
};
use super::{AlignedBuf, BLOCK, Storage, Tier};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sys::file as sys;

/// First writes that a file takes at once: alone, a write into a hole costs a few microseconds
/// more; from here on they wait for one another.
const HOLE_WRITES_MAX: usize = 4;

/// An open, locked file or block device.
///
/// # Invariants
/// With [`Tier::Direct`], `len` is a multiple of `align`, so widening a range inside the file to
/// aligned bounds stays inside the file.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    access: Access,
    kind: sys::Kind,
    tier: Tier,
    /// Nobody else may change the length while we hold the lock, so one look is enough.
    len: AtomicU64,
    /// Held while a block is read, changed in part and written back: two writers of different
    /// bytes in one block do not overlap as far as the contract goes. Innermost; held across I/O
    /// because the I/O is what it orders.
    edges: Mutex<()>,
}

impl FileStorage {
    /// Makes a file of `len` bytes (a multiple of [`BLOCK`]) that read as zeros, and locks it. A
    /// block device is taken as it is, if it has at least `len` bytes: it keeps its length, and what
    /// it held before is still there to read.
    ///
    /// # Errors
    /// [`OpenError::Io`] of kind `AlreadyExists` if the file exists; see [`OpenError`].
    pub fn create_new(path: impl AsRef<Path>, len: u64) -> Result<Self, OpenError> {
        Self::create_new_with(path, len, Caching::Auto)
    }

    /// What the open file is, whatever its path leads to by now.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// As [`FileStorage::create_new`], with a say about the page cache.
    ///
    /// # Errors
    /// As [`FileStorage::create_new`].
    pub fn create_new_with(
        path: impl AsRef<Path>,
        len: u64,
        caching: Caching,
    ) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let wrong_len = |have| OpenError::Length {
            path: path.to_owned(),
            have,
            want: len,
        };
        if !len.is_multiple_of(BLOCK) {
            return Err(wrong_len(0));
        }
        if sys::kind_of(path).is_ok_and(|kind| kind == sys::Kind::BlockDevice) {
            let device = Self::open_with(path, Access::ReadWrite, caching)?;
            let have = device.len.load(Ordering::Relaxed);
            return if have < len {
                Err(wrong_len(have))
            } else {
                Ok(device)
            };
        }
        let io = |doing| at(path, doing);
        let file = sys::open(path, sys::Mode::CreateNew).map_err(io("create"))?;
        let made = lock(
            &file,
            path,
            Access::ReadWrite,
            Locking::Whole,
            &Patience::SILENT,
        )
        .and_then(|()| file.set_len(len).map_err(io("set the length")))
        .and_then(|()| file.sync_all().map_err(io("sync")))
        .and_then(|()| sys::sync_parent(path).map_err(io("sync the directory of")))
        .and_then(|()| Self::from_locked(file, path, Access::ReadWrite, caching));
        if made.is_err() {
            // What we made is of no use to anyone; the first error says more than a second would.
            drop(std::fs::remove_file(path));
        }
        made
    }

    /// Opens and locks what is there: shared for [`Access::ReadOnly`], else exclusive.
    ///
    /// # Errors
    /// [`OpenError::Locked`] if someone else has it; see [`OpenError`].
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self, OpenError> {
        Self::open_with(path, access, Caching::Auto)
    }

    /// As [`FileStorage::open`], with a say about the page cache.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn open_with(
        path: impl AsRef<Path>,
        access: Access,
        caching: Caching,
    ) -> Result<Self, OpenError> {
        let silent = &Patience::SILENT;
        Self::open_as(path.as_ref(), access, caching, Locking::Whole, silent)
    }

    /// As [`FileStorage::open`], for a caller that knows more of who may be in the way.
    ///
    /// # Errors
    /// As [`FileStorage::open`]; [`OpenError::Io`] of kind `Interrupted` if it waits no longer.
    pub(crate) fn open_patiently(
        path: &Path,
        access: Access,
        patience: &Patience<'_>,
    ) -> Result<Self, OpenError> {
        Self::open_as(path, access, Caching::Auto, Locking::Whole, patience)
    }

    /// Opens a disk image that other programs may know, through the page cache. Readers share it
    /// with those of QEMU and its tools; whoever writes has it alone.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn open_image(path: impl AsRef<Path>, access: Access) -> Result<Self, OpenError> {
        let silent = &Patience::SILENT;
        Self::open_as(
            path.as_ref(),
            access,
            Caching::Buffered,
            Locking::Image,
            silent,
        )
    }

    /// # Errors
    /// As [`FileStorage::open`].
    fn open_as(
        path: &Path,
        access: Access,
        caching: Caching,
        locking: Locking,
        patience: &Patience<'_>,
    ) -> Result<Self, OpenError> {
        // Looked at before opening: opening a pipe would wait for its other end.
        if sys::kind_of(path).map_err(at(path, "open"))? == sys::Kind::Other {
            return Err(not_a_store(path));
        }
        let mode = match access {
            Access::ReadOnly => sys::Mode::Read,
            Access::ReadWrite => sys::Mode::ReadWrite,
        };
        let file = claim(path, mode, patience)?;
        lock(&file, path, access, locking, patience)?;
        Self::from_locked(file, path, access, caching)
    }

    /// The rest of opening, once the lock is held.
    ///
    /// # Errors
    /// See [`OpenError`].
    fn from_locked(
        file: File,
        path: &Path,
        access: Access,
        caching: Caching,
    ) -> Result<Self, OpenError> {
        let io = |doing| at(path, doing);
        let metadata = file.metadata().map_err(io("stat"))?;
        let kind = sys::Kind::from(metadata.file_type());
        let len = match kind {
            sys::Kind::BlockDevice => sys::device_len(&file).map_err(io("measure"))?,
            sys::Kind::Regular => metadata.len(),
            sys::Kind::Other => return Err(not_a_store(path)),
        };
        let tier = choose_tier(&file, kind, len, access, caching).map_err(io("examine"))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            access,
            kind,
            tier,
            len: AtomicU64::new(len),
            edges: Mutex::new(()),
        })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As [`sys::waits_without_thread`].
    #[must_use]
    pub fn waits_without_thread(&self) -> bool {
        sys::waits_without_thread(&self.file)
    }

    /// True if this is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.kind == sys::Kind::BlockDevice
    }

    /// Makes everything durable that was written to the file, by whomever, and the time of the last
    /// write with it, which [`Storage::flush`] leaves behind (`fsync(2)`).
    ///
    /// # Errors
    /// What the file system said.
    pub fn sync_all(&self) -> io::Result<()> {
        match self.file.sync_all() {
            // Nothing can be unsaved on a file system that is only read: some have no fsync.
            Err(e) if is_read_only(&e) => Ok(()),
            synced => synced,
        }
    }

    /// Checks that a range is inside the file.
    ///
    /// # Errors
    /// `beyond` if it is not.
    fn check(&self, offset: u64, len: u64, beyond: ErrorKind) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len.load(Ordering::Acquire) => Ok(()),
            Some(_) | None => Err(beyond.into()),
        }
    }

    /// Checks that we may write.
    ///
    /// # Errors
    /// `PermissionDenied` if opened read-only.
    fn check_writable(&self) -> io::Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(io::Error::new(
                ErrorKind::PermissionDenied,
                "opened read-only",
            )),
        }
    }

    /// The alignment a request breaks, if it breaks one.
    fn needs_bounce(&self, buf: &[u8], offset: u64) -> Option<u64> {
        match self.tier {
            Tier::Direct { align } => {
                let align = u64::from(align);
                let all = buf.as_ptr().addr() as u64 | buf.len() as u64 | offset;
                (!all.is_multiple_of(align)).then_some(align)
            }
            Tier::Buffered | Tier::Memory => None,
        }
    }

    /// Reads through an aligned buffer.
    ///
    /// # Errors
    /// As [`Storage::read_at`].
    fn read_bounced(&self, mut buf: &mut [u8], mut offset: u64, align: u64) -> io::Result<()> {
        let mut bounce = AlignedBuf::new(bounce_len(buf.len(), align));
        while !buf.is_empty() {
            let skip = narrow(offset % align);
            let take = buf.len().min(bounce.len() - skip);
            let span = (skip + take).next_multiple_of(narrow(align));
            let start = offset - skip as u64;
            read(&self.file, &mut bounce[..span], start)?;
            let (now, rest) = buf.split_at_mut(take);
            now.copy_from_slice(&bounce[skip..skip + take]);
            buf = rest;
            offset += take as u64;
        }
        Ok(())
    }

    /// Writes through an aligned buffer; edges that cover part of a block are read first.
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn write_bounced(
        &self,
        mut buf: &[u8],
        mut offset: u64,
        align: u64,
        write: Writer,
    ) -> io::Result<()> {
        let mut bounce = AlignedBuf::new(bounce_len(buf.len(), align));
        let is_edged = !(offset | buf.len() as u64).is_multiple_of(align);
        let _guard = is_edged.then(|| self.edges.lock());
        while !buf.is_empty() {
            let skip = narrow(offset % align);
            let take = buf.len().min(bounce.len() - skip);
            let span = (skip + take).next_multiple_of(narrow(align));
            let start = offset - skip as u64;
            let last = span - narrow(align);
            if skip != 0 {
                read(&self.file, &mut bounce[..narrow(align)], start)?;
            }
            if skip + take != span && (skip == 0 || last != 0) {
                read(&self.file, &mut bounce[last..span], start + last as u64)?;
            }
            let (now, rest) = buf.split_at(take);
            bounce[skip..skip + take].copy_from_slice(now);
            write(&self.file, &bounce[..span], start)?;
            buf = rest;
            offset += take as u64;
        }
        Ok(())
    }

    /// The one way bytes are written.
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn write_any(&self, buf: &[u8], offset: u64, write: Writer) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, buf.len() as u64, ErrorKind::InvalidInput)?;
        match self.needs_bounce(buf, offset) {
            None => write(&self.file, buf, offset),
            Some(align) => self.write_bounced(buf, offset, align, write),
        }
        .map_err(|error| self.failure(error))
    }
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len() as u64, ErrorKind::UnexpectedEof)?;
        match self.needs_bounce(buf, offset) {
            None => read(&self.file, buf, offset),
            Some(align) => self.read_bounced(buf, offset, align),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_any(buf, offset, write)
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_any(buf, offset, write_durable)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, len, ErrorKind::InvalidInput)?;
        let (mut start, mut end) = (offset, offset + len);
        if self.is_block_device() {
            // A device unmaps whole blocks only; the pieces at the edges stay as they are.
            let block = u64::from(sys::device_block_size(&self.file)?);
            start = start.next_multiple_of(block);
            end -= end % block;
        }
        if start >= end {
            return Ok(());
        }
        let mut punched = sys::punch_hole(&self.file, start, end - start);
        if self.is_block_device() && is_unsupported(&punched) {
            punched = sys::device_discard(&self.file, start, end - start);
        }
        if is_unsupported(&punched) {
            return Ok(());
        }
        punched
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, len, ErrorKind::InvalidInput)?;
        if len == 0 || self.is_block_device() {
            return Ok(());
        }
        let allocated = sys::allocate(&self.file, offset, len);
        if is_unsupported(&allocated) {
            return Ok(());
        }
        allocated.map_err(full)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len.load(Ordering::Acquire))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_writable()?;
        if !len.is_multiple_of(BLOCK) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if self.is_block_device() {
            let is_same = len == self.len.load(Ordering::Acquire);
            return if is_same {
                Ok(())
            } else {
                Err(ErrorKind::Unsupported.into())
            };
        }
        self.file.set_len(len).map_err(full)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.is_block_device() {
            return self.len();
        }
        sys::allocated_bytes(&self.file)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.len.load(Ordering::Acquire);
        if offset >= len {
            return Ok(None);
        }
        if self.is_block_device() {
            return Ok(Some((offset, len)));
        }
        let start = match sys::seek_data(&self.file, offset) {
            Ok(Some(start)) if start < len => start,
            Ok(Some(_) | None) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                return Ok(Some((offset, len))); // the file system keeps no such map
            }
            Err(error) => return Err(error),
        };
        let end = sys::seek_hole(&self.file, start)?.unwrap_or(len);
        Ok(Some((start, end.min(len))))
    }

    fn hole_writes_max(&self) -> usize {
        let is_slow = matches!(self.tier, Tier::Direct { .. }) && !self.is_block_device();
        if is_slow { HOLE_WRITES_MAX } else { usize::MAX }
    }

    /// A device says "no space" beyond its end too, where no waiting helps.
    fn failure(&self, error: io::Error) -> io::Error {
        let error = full(error);
        if error.kind() != ErrorKind::StorageFull || !self.is_block_device() {
            return error;
        }
        let len = self.len.load(Ordering::Acquire);
        match sys::device_len(&self.file) {
            Ok(have) if have >= len => error,
            Ok(have) => io::Error::other(format!(
                "the device had {len} bytes when it was opened, and has {have} now"
            )),
            Err(gone) => gone,
        }
    }

    fn tier(&self) -> Tier {
        self.tier
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

fn is_unsupported(result: &io::Result<()>) -> bool {
    matches!(result, Err(error) if error.kind() == ErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::conformance::at_last;
    use super::*;

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn pid_of(error: &OpenError) -> Option<u32> {
        match error {
            OpenError::Locked { pid, .. } => *pid,
            OpenError::NotAStore { .. } | OpenError::Length { .. } | OpenError::Io { .. } => {
                panic!("expected a lock, found: {error}")
            }
        }
    }

    fn open_again(path: &Path) -> FileStorage {
        at_last(|| FileStorage::open(path, Access::ReadWrite)).unwrap()
    }

    #[test]
    fn a_writer_excludes_everyone_and_is_named() {
        let dir = dir();
        let path = dir.path().join("pool");
        let writer = FileStorage::create_new(&path, 8192).unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let refused = FileStorage::open(&path, access).unwrap_err();
            assert_eq!(pid_of(&refused), Some(std::process::id()));
            let text = format!(
                "{}: in use by process {}",
                path.display(),
                std::process::id()
            );
            assert_eq!(refused.to_string(), text);
            assert_eq!(refused.kind(), ErrorKind::ResourceBusy);
        }
        drop(writer);
        open_again(&path);
    }

    #[test]
    fn readers_share_and_exclude_a_writer() {
        let dir = dir();
        let path = dir.path().join("base");
        drop(FileStorage::create_new(&path, 8192).unwrap());
        let one = FileStorage::open(&path, Access::ReadOnly).unwrap();
        let two = FileStorage::open(&path, Access::ReadOnly).unwrap();
        pid_of(&FileStorage::open(&path, Access::ReadWrite).unwrap_err());
        drop(one);
        pid_of(&FileStorage::open(&path, Access::ReadWrite).unwrap_err());
        drop(two);
        open_again(&path);
    }

    #[test]
    fn a_reader_cannot_change_anything() {
        let dir = dir();
        let path = dir.path().join("base");
        drop(FileStorage::create_new(&path, 8192).unwrap());
        let base = FileStorage::open(&path, Access::ReadOnly).unwrap();
        for refused in [
            base.write_at(&[1], 0),
            base.write_durable_at(&[1], 0),
            base.punch(0, 4096),
            base.allocate(0, 4096),
            base.set_len(0),
        ] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::PermissionDenied);
        }
        let mut byte = [7];
        base.read_at(&mut byte, 8191).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn what_cannot_be_a_store_is_refused_by_name() {
        let dir = dir();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [dir.path(), &pipe, Path::new("/dev/null")] {
            for access in [Access::ReadOnly, Access::ReadWrite] {
                let refused = FileStorage::open(path, access).unwrap_err();
                assert!(matches!(refused, OpenError::NotAStore { .. }), "{refused}");
                assert!(refused.to_string().contains(path.to_str().unwrap()));
            }
        }
        let absent = FileStorage::open(dir.path().join("absent"), Access::ReadOnly).unwrap_err();
        assert_eq!(absent.kind(), ErrorKind::NotFound);
        assert!(
            absent.to_string().contains("absent: cannot open"),
            "{absent}"
        );
        let odd = FileStorage::create_new(dir.path().join("odd"), 1000).unwrap_err();
        assert!(matches!(odd, OpenError::Length { want: 1000, .. }), "{odd}");
        assert!(!dir.path().join("odd").exists());
    }

    #[test]
    fn an_existing_file_is_never_made_anew() {
        let dir = dir();
        let path = dir.path().join("pool");
        std::fs::write(&path, [7; 700]).unwrap();
        let refused = FileStorage::create_new(&path, 8192).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 700]);
    }

    #[test]
    fn an_odd_length_is_read_to_its_last_byte() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("base");
        std::fs::write(&path, [7; 700]).unwrap();
        let base = FileStorage::open(&path, Access::ReadWrite).unwrap();
        assert!(
            !matches!(base.tier(), Tier::Direct { .. }),
            "{:?}",
            base.tier()
        );
        base.write_at(&[8], 699).unwrap();
        let mut all = [0; 700];
        base.read_at(&mut all, 0).unwrap();
        assert_eq!((all[698], all[699]), (7, 8));
        let beyond = base.read_at(&mut [0; 2], 699).unwrap_err();
        assert_eq!(beyond.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 700);
    }

    #[test]
    fn a_full_host_says_so() {
        let dir = dir();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
            .arg(dir.path())
            .output();
        if !mounted.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: cannot mount a small tmpfs: {mounted:?}");
            return;
        }
        let store = FileStorage::create_new(dir.path().join("pool"), 1 << 20).unwrap();
        let written = store.write_at(&vec![1; 1 << 20], 0);
        let allocated = store.allocate(0, 1 << 20);
        drop(store);
        let unmounted = Command::new("umount").arg(dir.path()).status().unwrap();
        assert!(unmounted.success());
        assert_eq!(written.unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(allocated.unwrap_err().kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn an_exhausted_quota_counts_as_full() {
        let quota = io::Error::from(nix::errno::Errno::EDQUOT);
        assert_eq!(full(quota).kind(), ErrorKind::StorageFull);
        let other = io::Error::from(nix::errno::Errno::EIO);
        assert_eq!(full(other).raw_os_error(), Some(5));
    }
}
