//! One stretch of a client's file, mapped shared: sealed against shrinking where the file can be,
//! registered against its loss ([`super::sigbus`]) in any case. The file itself is not kept open: a
//! client has many regions, a process few descriptors.
#![expect(
    unsafe_code,
    reason = "maps files, and registers them with the handler of SIGBUS"
)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionBuilder;

use super::allowance::{Allowance, Counted};
use super::sigbus::Registration;

/// Bytes of an ordinary page.
const PAGE: u64 = 4096;

/// See the module.
///
/// # Invariants
/// Nobody has a reference into the mapping: [`super::mmap`] copies through raw, volatile accesses
/// only.
#[derive(Debug)]
pub(super) struct Mapping {
    // First: dropped, so taken out of the handler's table, before the mapping is.
    registration: Registration,
    map: MmapRegion,
    _pages: Pages,
    _counted: Option<Counted>,
}

/// Pages of a file.
///
/// # Invariants
/// `len` bytes from `start` are a mapping of ours, all of it, until this is dropped.
#[derive(Debug)]
struct Pages {
    start: usize,
    len: usize,
}

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_SHARED | libc::MAP_NORESERVE;

impl Pages {
    /// # Errors
    /// As mmap(2).
    fn map(file: &File, start: u64, len: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(start).map_err(io::Error::other)?;
        let null = std::ptr::null_mut();
        // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is (mmap(2)).
        let at = unsafe { libc::mmap(null, len, PROTECTION, FLAGS, file.as_raw_fd(), offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // INVARIANT: just mapped; the address is exposed, to be made a pointer of again.
        let start = at.expose_provenance();
        Ok(Self { start, len })
    }

    fn start(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.start)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and whole (invariant), and who used it is gone: it is dropped
        // after what refers to it.
        let unmapped = unsafe { libc::munmap(self.start().cast(), self.len) };
        assert_eq!(unmapped, 0, "a mapping of ours can be unmapped");
    }
}

impl Mapping {
    /// Maps the pages of `file` that hold its bytes from `offset` to `end`; returns how far into
    /// the mapping the first of them is, too.
    ///
    /// # Errors
    /// `InvalidInput` if the file is too short; otherwise as mmap(2), or too many mappings, of all or of this client.
    pub(super) fn new(
        file: &File,
        offset: u64,
        end: u64,
        allowance: Option<&Allowance>,
    ) -> io::Result<(Self, usize)> {
        let counted = allowance.map(Allowance::count).transpose()?;
        // Only a memfd that was made for it can be sealed, and one sealed already (F_SEAL_SEAL)
        // cannot be further: then the handler is what is left. Before the length is looked at,
        // so that it holds.
        let _unsealable = fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
        let file_len = file.metadata()?.len();
        if file_len < end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("region ends at byte {end} of a file of {file_len} bytes"),
            ));
        }
        let page = page_size(file)?;
        let start = offset / page * page;
        let size = (end - start).next_multiple_of(page);
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let lead = usize::try_from(offset - start).map_err(io::Error::other)?;
        let pages = Pages::map(file, start, size)?;
        let builder = MmapRegionBuilder::new(size)
            .with_mmap_prot(PROTECTION)
            .with_mmap_flags(FLAGS);
        // SAFETY: the pages are mapped so, and outlive the region, which is dropped before them.
        let builder = unsafe { builder.with_raw_mmap_pointer(pages.start()) };
        let map = builder.build().map_err(io::Error::other)?;
        // SAFETY: the mapping is ours and outlives the registration, which is dropped first; it
        // consists of whole pages of its file's size. Nobody has a reference into it (invariant).
        let registration = unsafe { Registration::new(map.as_ptr().addr(), map.size()) }?;
        let mapping = Self {
            registration,
            map,
            _pages: pages,
            _counted: counted,
        };
        Ok((mapping, lead))
    }

    /// Whether the file was shrunk and the mapping now holds zeros of our own.
    pub(super) fn is_lost(&self) -> bool {
        self.registration.is_lost()
    }
}

/// Bytes of the pages that `file` is mapped by. Parts of huge ones can neither be mapped nor
/// unmapped nor replaced (mmap(2), "Huge page (Huge TLB) mappings").
fn page_size(file: &File) -> io::Result<u64> {
    let stat = fstatfs(file)?;
    if stat.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(PAGE);
    }
    u64::try_from(stat.block_size()).map_err(io::Error::other)
}

impl Deref for Mapping {
    type Target = MmapRegion;

    fn deref(&self) -> &MmapRegion {
        &self.map
    }
}
