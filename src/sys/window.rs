//! Pieces of guest memory that are used over and over, made by [`super::mmap::GuestMemory::window`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use super::mapping::Mapping;

/// A fixed piece of guest memory that is read and written over and over: a part of a virtqueue.
/// Keeps its region mapped.
///
/// Offsets come from our own arithmetic, never from the guest; one that is out of range is a bug
/// and panics.
#[derive(Debug)]
pub struct Window {
    pub(super) map: Arc<Mapping>,
    pub(super) start: usize,
    pub(super) len: usize,
}

impl Window {
    fn slice(&self, at: usize, len: usize) -> VolatileSlice<'_> {
        assert!(
            at + len <= self.len,
            "byte {at} is outside a window of {}",
            self.len
        );
        self.map
            .get_slice(self.start + at, len)
            .expect("a window lies within its mapping")
    }

    /// The little-endian 16-bit number at byte `at` (even), loaded as one.
    #[must_use]
    pub fn load_u16(&self, at: usize, order: Ordering) -> u16 {
        let raw: u16 = self
            .slice(at, 2)
            .load(0, order)
            .expect("a window is aligned");
        u16::from_le(raw)
    }

    /// Stores a little-endian 16-bit number at byte `at` (even), as one.
    pub fn store_u16(&self, at: usize, value: u16, order: Ordering) {
        self.slice(at, 2)
            .store(value.to_le(), 0, order)
            .expect("a window is aligned");
    }

    /// A copy of the `N` bytes from byte `at`. The guest may change them meanwhile: check the
    /// copy, and read nothing twice.
    #[must_use]
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut copy = [0; N];
        self.slice(at, N).copy_to(&mut copy[..]);
        copy
    }

    /// Copies `bytes` to byte `at`.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.slice(at, bytes.len()).copy_from(bytes);
    }
}
