//! Buffers that direct I/O accepts, without unsafe code.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Bytes whose address is a multiple of [`AlignedBuf::ALIGN`], zero when made. Made by allocating
/// a little more than asked for; the kernel hands out the zeros, so large ones are cheap.
///
/// # Invariants
/// `bytes` is never reallocated, so `start..start + len` stays aligned.
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// Alignment in bytes: a page, and no less than any device wants for direct I/O.
    pub const ALIGN: usize = 4096;

    /// `len` zero bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + Self::ALIGN - 1];
        let address = bytes.as_ptr().addr();
        // INVARIANT: `bytes` does not move after this.
        let start = address.next_multiple_of(Self::ALIGN) - address;
        Self { bytes, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zero_and_of_the_length_asked_for() {
        for len in [0, 1, 511, 4096, 4097, 3 << 20] {
            let mut buf = AlignedBuf::new(len);
            assert_eq!(buf.as_ptr().addr() % AlignedBuf::ALIGN, 0);
            assert_eq!(buf.len(), len);
            assert!(buf.iter().all(|byte| *byte == 0));
            buf.fill(7);
            let moved = buf;
            assert_eq!(moved.as_ptr().addr() % AlignedBuf::ALIGN, 0);
            assert!(moved.iter().all(|byte| *byte == 7));
        }
    }
}
