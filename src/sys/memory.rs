//! Large tables in memory that are looked up at random: in huge pages most of the time goes that
//! is spent on finding out where they are.
#![expect(unsafe_code, reason = "advice takes an address")]

use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

const PAGE: usize = 4096;

/// `len` zeros, in huge pages where the kernel has some to spare.
#[must_use]
pub fn zeroed_table(len: usize) -> Vec<u64> {
    // Not touched yet: large ones come straight from the kernel, page by page when written to.
    let mut table = vec![0_u64; len];
    let begin = table.as_mut_ptr();
    let skipped = begin.addr().next_multiple_of(PAGE) - begin.addr();
    let bytes = len * size_of::<u64>();
    let whole = bytes.saturating_sub(skipped) / PAGE * PAGE;
    if let (true, Some(first_page)) = (whole > 0, NonNull::new(begin.wrapping_byte_add(skipped))) {
        // SAFETY: the pages lie inside `table`, which is ours, and MADV_HUGEPAGE changes nothing
        // of what they hold.
        // Kernels without huge pages refuse: the table is as good, only slower.
        let _refused = unsafe { madvise(first_page.cast(), whole, MmapAdvise::MADV_HUGEPAGE) };
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_any_length_are_zeros() {
        for len in [0, 1, 511, 512, 513, 3 << 20] {
            let mut table = zeroed_table(len);
            assert_eq!(table.len(), len);
            assert!(table.iter().all(|place| *place == 0));
            table.fill(7);
            assert!(table.iter().all(|place| *place == 7));
        }
    }
}
