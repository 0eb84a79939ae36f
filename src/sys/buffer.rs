//! Page-aligned buffers, for direct I/O from and to memory of our own.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// A buffer that `O_DIRECT` accepts: page-aligned, a whole number of pages long.
pub struct AlignedBuf(Vec<Page>);

impl AlignedBuf {
    /// At least `len` zero bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self(vec![Page([0; 4096]); len.div_ceil(4096).max(1)])
    }

    /// Bytes it holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.len() * 4096
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// All bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_bytes()
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.capacity())
    }
}
