//! Buffers for guest memory that direct I/O cannot use as it is, and for reads of bases. Kept and
//! used again. What is lent out never exceeds [`LENT_MAX`]: a slice of a request begins only if
//! there is room for the most that one can take.

use crate::sys::buffer::AlignedBuf;

/// Bytes of a large buffer: longer pieces are cut.
pub(super) const LARGE: u32 = 32 << 10;
const SMALL: u32 = 4 << 10;
/// Most bytes of a slice of a request that may need buffers.
pub(super) const SLICE_LEN_MAX: u32 = 256 << 10;
/// Most bytes lent for a slice: pieces are whole sectors, of which the smallest and those that
/// hardly need a large buffer take eight times what they hold.
const SLICE_LENT_MAX: u64 = 8 * (256 << 10);
/// Most bytes lent out.
const LENT_MAX: u64 = 32 << 20;
/// Buffers of each size that are kept.
const KEPT_MAX: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Bounce {
    small: Vec<AlignedBuf>,
    large: Vec<AlignedBuf>,
    lent: u64,
    /// Others wait for buffers, and come first.
    pub(super) is_waited_for: bool,
}

impl Bounce {
    /// Whether a slice that needs buffers may begin.
    pub(super) fn has_room(&self) -> bool {
        !self.is_waited_for && self.could_lend()
    }

    /// Whether there are buffers for a slice.
    pub(super) fn could_lend(&self) -> bool {
        self.lent + SLICE_LENT_MAX <= LENT_MAX
    }

    /// A buffer of at least `len` bytes, at most [`LARGE`].
    pub(super) fn take(&mut self, len: u32) -> AlignedBuf {
        let (kept, size) = if len <= SMALL {
            (&mut self.small, SMALL)
        } else {
            (&mut self.large, LARGE)
        };
        self.lent += u64::from(size);
        assert!(self.lent <= LENT_MAX, "a slice takes no more than it may");
        let bytes = usize::try_from(size.max(len)).unwrap_or(usize::MAX);
        kept.pop().unwrap_or_else(|| AlignedBuf::new(bytes))
    }

    pub(super) fn give(&mut self, buffer: AlignedBuf) {
        let size = u32::try_from(buffer.capacity()).unwrap_or(LARGE);
        self.lent = self.lent.saturating_sub(u64::from(size));
        let kept = if size <= SMALL {
            &mut self.small
        } else {
            &mut self.large
        };
        if kept.len() < KEPT_MAX {
            kept.push(buffer);
        }
    }
}
