//! One stretch of a client's file, mapped shared: sealed against shrinking where the file can be,
//! registered against its loss ([`super::sigbus`]) in any case.
#![expect(unsafe_code, reason = "registers a mapping with the handler of SIGBUS")]

use std::fs::File;
use std::io;
use std::ops::Deref;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

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
}

impl Mapping {
    /// Maps the pages of `file` that hold its bytes from `offset` to `end`; returns how far into
    /// the mapping the first of them is, too.
    ///
    /// # Errors
    /// `InvalidInput` if the file is too short; otherwise as mmap(2), or too many mappings.
    pub(super) fn new(file: File, offset: u64, end: u64) -> io::Result<(Self, usize)> {
        // Only a memfd that was made for it can be sealed, and one sealed already (F_SEAL_SEAL)
        // cannot be further: then the handler is what is left. Before the length is looked at,
        // so that it holds.
        let _unsealable = fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
        let file_len = file.metadata()?.len();
        if file_len < end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("region ends at byte {end} of a file of {file_len} bytes"),
            ));
        }
        let page = page_size(&file)?;
        let start = offset / page * page;
        let size = (end - start).next_multiple_of(page);
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let lead = usize::try_from(offset - start).map_err(io::Error::other)?;
        let map = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, start))
            .build()
            .map_err(io::Error::other)?;
        // SAFETY: the mapping is ours and outlives the registration, which is dropped first; it
        // consists of whole pages of its file's size. Nobody has a reference into it (invariant).
        let registration = unsafe { Registration::new(map.as_ptr().addr(), map.size()) }?;
        Ok((Self { registration, map }, lead))
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
