//! Guest memory as a vhost-user front end shares it.
//!
//! Guest memory is hostile: the guest writes to it while we read it. So nothing here ever hands
//! out a reference into it; bytes are copied in or out, or the kernel moves them ([`super::uring`],
//! [`GuestMemory::read_from`]). Every access is a [`GuestRun`] or a [`Window`], checked when it
//! was made and checked again when it is used.
#![expect(unsafe_code, reason = "preadv and pwritev take raw addresses")]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use vm_memory::{VolatileMemory, VolatileSlice};

use super::allowance::Allowance;
use super::mapping::Mapping;
pub use super::window::Window;

/// Most buffers one vectored call may carry (`IOV_MAX`, uio(7)).
pub const IOV_MAX: usize = 1024;

/// Whether `file` is memory and nothing else: a memfd, or a file on tmpfs or hugetlbfs. A touch of
/// anything else that is mapped may wait for storage, a network, or whoever serves a FUSE file, for
/// as long as they like.
///
/// Asked by way of its seals, which only these have: statfs(2), or a look at its length, would ask
/// whoever serves it.
#[must_use]
pub fn is_memory(file: &File) -> bool {
    fcntl(file, FcntlArg::F_GET_SEALS).is_ok()
}

/// One region of guest memory, mapped.
#[derive(Debug, Clone)]
pub struct Region {
    gpa: u64,
    len: u64,
    hva: u64,
    /// Bytes of the mapping before the region's first byte.
    lead: usize,
    map: Arc<Mapping>,
}

impl Region {
    /// Maps `len` bytes of `file` from byte `offset` as guest memory at guest-physical address
    /// `gpa`, known to the front end as `hva`.
    ///
    /// The file must be at least as long as the region, and is sealed with `F_SEAL_SHRINK` if that
    /// is possible. If the front end shrinks it later all the same, the region is lost
    /// ([`GuestMemory::is_lost`]).
    ///
    /// # Errors
    /// `InvalidInput` if the numbers overflow or the file is too short; otherwise as mmap(2).
    pub fn map(file: File, gpa: u64, len: u64, hva: u64, offset: u64) -> io::Result<Self> {
        let region = Self::map_counted(&file, gpa, len, hva, offset, None);
        drop(file);
        region
    }

    /// As [`Region::map`], counted among what one client may have.
    ///
    /// # Errors
    /// As [`Region::map`]; `QuotaExceeded` if the client has too many.
    pub fn map_for(
        allowance: &Allowance,
        file: &File,
        gpa: u64,
        len: u64,
        hva: u64,
        offset: u64,
    ) -> io::Result<Self> {
        Self::map_counted(file, gpa, len, hva, offset, Some(allowance))
    }

    fn map_counted(
        file: &File,
        gpa: u64,
        len: u64,
        hva: u64,
        offset: u64,
        allowance: Option<&Allowance>,
    ) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let end = offset
            .checked_add(len)
            .ok_or_else(|| invalid("region overflows its file"))?;
        if len == 0 || gpa.checked_add(len).is_none() || hva.checked_add(len).is_none() {
            return Err(invalid("region is empty or overflows the address space"));
        }
        let (map, lead) = Mapping::new(file, offset, end, allowance)?;
        Ok(Self {
            gpa,
            len,
            hva,
            lead,
            map: Arc::new(map),
        })
    }

    /// Whether this is the region that the front end describes so.
    #[must_use]
    pub fn is_at(&self, gpa: u64, len: u64, hva: u64) -> bool {
        (self.gpa, self.len, self.hva) == (gpa, len, hva)
    }

    fn end(&self) -> u64 {
        self.gpa + self.len
    }

    fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(offset).ok()?;
        self.map.get_slice(self.lead.checked_add(offset)?, len).ok()
    }
}

/// Consecutive bytes of one region, as an index into the [`GuestMemory`] that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestRun {
    region: u32,
    len: u32,
    offset: u64,
}

impl GuestRun {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// The `len` bytes from byte `at` of this run, cut to what the run holds.
    #[must_use]
    pub fn cut(&self, at: u32, len: u32) -> Self {
        let at = at.min(self.len);
        Self {
            region: self.region,
            len: len.min(self.len - at),
            offset: self.offset + u64::from(at),
        }
    }
}

/// Appends to `out` the part of `runs`, taken as one string of bytes, from byte `at` for `len`.
pub fn cut_runs(runs: &[GuestRun], mut at: u32, mut len: u32, out: &mut Vec<GuestRun>) {
    for run in runs {
        if len == 0 {
            return;
        }
        if at >= run.len {
            at -= run.len;
            continue;
        }
        let part = run.cut(at, len);
        len -= part.len;
        at = 0;
        out.push(part);
    }
}

/// One generation of a guest's memory table. Immutable: a change makes a new one, and whoever
/// still holds the old one (requests in flight) keeps its regions mapped.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Sorted by `gpa`, without overlap.
    regions: Vec<Region>,
}

impl GuestMemory {
    /// A table of `regions` in any order.
    ///
    /// # Errors
    /// `InvalidInput` if two overlap.
    pub fn new(mut regions: Vec<Region>) -> io::Result<Self> {
        regions.sort_by_key(|region| region.gpa);
        if regions.windows(2).any(|pair| pair[0].end() > pair[1].gpa) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "memory regions overlap",
            ));
        }
        Ok(Self { regions })
    }

    /// The regions, by ascending guest-physical address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Whether the front end took away memory that it had shared. What was read from it since, or
    /// shortly before, is zeros of ours, and what was written is seen by nobody.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.map.is_lost())
    }

    /// The guest-physical address of what the front end knows as `hva`.
    #[must_use]
    pub fn gpa_of(&self, hva: u64) -> Option<u64> {
        let region = self
            .regions
            .iter()
            .find(|r| hva >= r.hva && hva - r.hva < r.len)?;
        Some(region.gpa + (hva - region.hva))
    }

    fn find(&self, gpa: u64) -> Option<(u32, &Region)> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let index = after.checked_sub(1)?;
        let region = &self.regions[index];
        let index = u32::try_from(index).ok()?;
        (gpa < region.end()).then_some((index, region))
    }

    /// Appends the runs of `len` bytes at `gpa` to `out`: one, or several where the bytes go on
    /// in an adjoining region. `false` (and `out` in any state) if not all of it is memory.
    #[must_use]
    pub fn translate(&self, mut gpa: u64, mut len: u32, out: &mut Vec<GuestRun>) -> bool {
        while len > 0 {
            let Some((index, region)) = self.find(gpa) else {
                return false;
            };
            let left = u32::try_from(region.end() - gpa).unwrap_or(u32::MAX);
            let part = left.min(len);
            out.push(GuestRun {
                region: index,
                len: part,
                offset: gpa - region.gpa,
            });
            len -= part;
            let Some(next) = gpa.checked_add(u64::from(part)) else {
                return len == 0;
            };
            gpa = next;
        }
        true
    }

    /// The one run of `len` bytes at `gpa`, if they lie within one region.
    #[must_use]
    pub fn contiguous(&self, gpa: u64, len: u32) -> Option<GuestRun> {
        let (index, region) = self.find(gpa)?;
        let fits = u64::from(len) <= region.end() - gpa;
        fits.then(|| GuestRun {
            region: index,
            len,
            offset: gpa - region.gpa,
        })
    }

    /// A window of `len` bytes at `gpa` within one region, its first byte aligned to `align`
    /// bytes in our own address space.
    #[must_use]
    pub fn window(&self, gpa: u64, len: usize, align: usize) -> Option<Window> {
        let (_, region) = self.find(gpa)?;
        let offset = gpa - region.gpa;
        if u64::try_from(len).ok()? > region.len - offset {
            return None;
        }
        let slice = region.slice(offset, len)?;
        if !slice.ptr_guard().as_ptr().addr().is_multiple_of(align) {
            return None;
        }
        let start = region.lead + usize::try_from(offset).ok()?;
        Some(Window {
            map: Arc::clone(&region.map),
            start,
            len,
        })
    }

    fn slice(&self, run: &GuestRun) -> VolatileSlice<'_> {
        let region = usize::try_from(run.region)
            .ok()
            .and_then(|index| self.regions.get(index));
        let len = usize::try_from(run.len).ok();
        region
            .zip(len)
            .and_then(|(region, len)| region.slice(run.offset, len))
            .expect("a run is used with the generation of memory that made it")
    }

    /// Copies the first bytes of `run` into `buf`; the number copied is the shorter length.
    pub fn read(&self, run: &GuestRun, buf: &mut [u8]) -> usize {
        self.slice(run).copy_to(buf)
    }

    /// Copies `buf` to the start of `run`; the number copied is the shorter length.
    pub fn write(&self, run: &GuestRun, buf: &[u8]) -> usize {
        let slice = self.slice(run);
        slice.copy_from(buf);
        buf.len().min(slice.len())
    }

    /// Copies all of `runs` in order into `buf`, as far as it goes; returns the bytes copied.
    pub fn gather(&self, runs: &[GuestRun], buf: &mut [u8]) -> usize {
        runs.iter()
            .fold(0, |done, run| done + self.read(run, &mut buf[done..]))
    }

    /// Copies `buf` over `runs` in order, as far as they go; returns the bytes copied.
    pub fn scatter(&self, runs: &[GuestRun], buf: &[u8]) -> usize {
        runs.iter()
            .fold(0, |done, run| done + self.write(run, &buf[done..]))
    }

    /// Fills `runs` with zeros.
    pub fn zero(&self, runs: &[GuestRun]) {
        const ZEROS: [u8; 4096] = [0; 4096];
        for run in runs {
            let mut at = 0;
            while at < run.len {
                let part = run.cut(at, 4096);
                self.write(&part, &ZEROS);
                at += part.len;
            }
        }
    }

    /// Whether every run starts and ends on a multiple of `align` bytes in our address space, as
    /// `O_DIRECT` wants it.
    #[must_use]
    pub fn is_aligned(&self, runs: &[GuestRun], align: u32) -> bool {
        let Ok(align) = usize::try_from(align) else {
            return false;
        };
        runs.iter().all(|run| {
            let slice = self.slice(run);
            slice.ptr_guard().as_ptr().addr().is_multiple_of(align)
                && slice.len().is_multiple_of(align)
        })
    }

    pub(super) fn iovec(&self, run: &GuestRun) -> libc::iovec {
        let slice = self.slice(run);
        libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }
    }

    /// Fills `runs` from byte `offset` of `fd`, blocking.
    ///
    /// # Errors
    /// `UnexpectedEof` at the end of the file; otherwise as preadv(2).
    pub fn read_from(&self, fd: BorrowedFd<'_>, runs: &[GuestRun], offset: u64) -> io::Result<()> {
        self.move_all(fd, runs, offset, false)
    }

    /// Writes `runs` to `fd` at byte `offset`, blocking.
    ///
    /// # Errors
    /// As pwritev(2).
    pub fn write_to(&self, fd: BorrowedFd<'_>, runs: &[GuestRun], offset: u64) -> io::Result<()> {
        self.move_all(fd, runs, offset, true)
    }

    fn move_all(
        &self,
        fd: BorrowedFd<'_>,
        runs: &[GuestRun],
        mut offset: u64,
        is_write: bool,
    ) -> io::Result<()> {
        const BATCH: usize = 16;
        let mut iovs = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; BATCH];
        for batch in runs.chunks(BATCH) {
            let iovs = &mut iovs[..batch.len()];
            for (iov, run) in iovs.iter_mut().zip(batch) {
                *iov = self.iovec(run);
            }
            let mut rest = &mut *iovs;
            while !rest.is_empty() {
                let moved = move_once(fd, rest, offset, is_write)?;
                offset += u64::try_from(moved).map_err(io::Error::other)?;
                let skip = advance(rest, moved);
                rest = &mut rest[skip..];
            }
        }
        Ok(())
    }
}

/// Takes `moved` bytes off the front of `iovs`; returns how many of them are used up.
pub(super) fn advance(iovs: &mut [libc::iovec], mut moved: usize) -> usize {
    for (index, iov) in iovs.iter_mut().enumerate() {
        if moved < iov.iov_len {
            iov.iov_base = iov.iov_base.cast::<u8>().wrapping_add(moved).cast();
            iov.iov_len -= moved;
            return index;
        }
        moved -= iov.iov_len;
    }
    iovs.len()
}

fn move_once(
    fd: BorrowedFd<'_>,
    iovs: &[libc::iovec],
    offset: u64,
    is_write: bool,
) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let count = libc::c_int::try_from(iovs.len()).map_err(io::Error::other)?;
    loop {
        let moved = if is_write {
            // SAFETY: `iovs` comes from `GuestMemory::iovec`, so every entry names mapped memory
            // that outlives this call; the kernel only reads it (pwritev(2)).
            unsafe { libc::pwritev(fd.as_raw_fd(), iovs.as_ptr(), count, offset) }
        } else {
            // SAFETY: as above; the kernel writes to shared memory that Rust holds no reference
            // to (preadv(2)).
            unsafe { libc::preadv(fd.as_raw_fd(), iovs.as_ptr(), count, offset) }
        };
        match usize::try_from(moved) {
            Ok(0) if is_write => return Err(io::ErrorKind::WriteZero.into()),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A thread's own handle on a generation of memory: cloned once a request, so without the atomic
/// count that threads would fight over.
#[derive(Debug, Clone)]
pub struct GuestPin(Rc<Pinned>);

#[derive(Debug)]
struct Pinned(Arc<GuestMemory>);

impl GuestPin {
    /// Pins `memory` for this thread.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self(Rc::new(Pinned(memory)))
    }

    /// The memory, for another thread.
    #[must_use]
    pub fn shared(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.0.0)
    }
}

impl Deref for GuestPin {
    type Target = GuestMemory;

    fn deref(&self) -> &GuestMemory {
        &self.0.0
    }
}
