//! Large tables in memory that are looked up at random: in huge pages most of the time goes that
//! is spent on finding out where they are.
#![expect(unsafe_code, reason = "advice takes an address")]

use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

const PAGE: usize = 4096;

/// Asks for huge pages for `table`, as far as the kernel has some to spare. What of it was not
/// touched yet comes in them.
pub fn advise_huge<T>(table: &mut [T]) {
    let begin = table.as_mut_ptr().cast::<u8>();
    let skipped = begin.addr().next_multiple_of(PAGE) - begin.addr();
    let bytes = size_of_val(table);
    let whole = bytes.saturating_sub(skipped) / PAGE * PAGE;
    if let (true, Some(first_page)) = (whole > 0, NonNull::new(begin.wrapping_add(skipped))) {
        // SAFETY: the pages lie inside `table`, which is ours, and MADV_HUGEPAGE changes nothing
        // of what they hold.
        // Kernels without huge pages refuse: the table is as good, only slower.
        let _refused = unsafe { madvise(first_page.cast(), whole, MmapAdvise::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_any_length_keep_what_they_hold() {
        for len in [0, 1, 511, 512, 513, 3 << 20] {
            let mut table = vec![7_u64; len];
            advise_huge(&mut table);
            assert!(table.iter().all(|place| *place == 7));
            table.fill(8);
            assert!(table.iter().all(|place| *place == 8));
        }
    }
}
