//! One stretch of a client's file, mapped shared: sealed against shrinking where the file can be,
//! registered against its loss ([`super::sigbus`]) in any case.
#![expect(unsafe_code, reason = "registers a mapping with the handler of SIGBUS")]

use std::fs::File;
use std::io;
use std::ops::Deref;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::sigbus::Registration;

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
    /// Maps the pages of `file` that hold its bytes from `start`, a multiple of the page size, to
    /// `end`.
    ///
    /// # Errors
    /// `InvalidInput` if the file is too short; otherwise as mmap(2), or too many mappings.
    pub(super) fn new(file: File, start: u64, end: u64) -> io::Result<Self> {
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
        let size = usize::try_from(end - start).map_err(io::Error::other)?;
        let map = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, start))
            .build()
            .map_err(io::Error::other)?;
        // SAFETY: the mapping is ours and outlives the registration, which is dropped first; its
        // start is a page's, and mmap(2) and munmap(2) take the length up to the end of its last
        // page. Nobody has a reference into it (invariant).
        let registration = unsafe { Registration::new(map.as_ptr().addr(), map.size()) }?;
        Ok(Self { registration, map })
    }

    /// Whether the file was shrunk and the mapping now holds zeros of our own.
    pub(super) fn is_lost(&self) -> bool {
        self.registration.is_lost()
    }
}

impl Deref for Mapping {
    type Target = MmapRegion;

    fn deref(&self) -> &MmapRegion {
        &self.map
    }
}
