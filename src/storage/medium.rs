//! The simulated disk's surface: what it reads as now, and every older version of each block that
//! a crash may bring back.
//!
//! `pages` is the present. `dirty` holds, for each block written since it was last durable, the
//! versions before the present one, oldest (durable) first. A flush forgets them; a crash picks
//! one of them, or the present, for each block.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};

use super::BLOCK;
use super::pages::{PAGE_LEN, Page, Pages};

pub(super) const PAGE: u64 = 4096;
pub(super) const BLOCKS_PER_PAGE: u64 = PAGE / BLOCK;
pub(super) const BLOCK_LEN: usize = 512;

/// One version of a block; `None` reads as zeros.
pub(super) type Bytes = Option<Box<[u8; BLOCK_LEN]>>;

/// splitmix64: small, seedable, and the same on every machine for ever, so that a printed seed
/// reproduces a failure.
#[derive(Debug, Clone)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    /// The next 64 bits.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        index(self.next() % bound as u64)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Version {
    /// The operation that wrote it; 0 for the durable one.
    pub(super) operation: u64,
    pub(super) bytes: Bytes,
    /// [`mark_of`] it.
    pub(super) mark: u64,
}

#[derive(Debug, Clone, Default)]
pub(super) struct History {
    /// Never empty; the first is the durable one.
    pub(super) older: Vec<Version>,
    /// The operation that wrote the present version, and its mark.
    pub(super) present: u64,
    pub(super) mark: u64,
    /// A flush of the present version failed: no later flush covers it (the kernel marks a page
    /// clean whether or not writing it worked), only a new write followed by a flush.
    is_abandoned: bool,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Medium {
    pub(super) pages: Pages,
    pub(super) dirty: BTreeMap<u64, History>,
    pub(super) len: u64,
    /// Lengths since the last flush, the present one excluded.
    pub(super) older_lens: Vec<u64>,
    is_len_abandoned: bool,
    /// Bytes of pages there may be.
    capacity: u64,
    pub(super) operation: u64,
    /// Older versions are kept.
    remembers: bool,
    /// Sum of the marks of all blocks.
    pub(super) mark: u64,
}

/// A number for the contents of a block at its place: 0 for zeros. Sums of these tell disks apart.
pub(super) fn mark_of(block: u64, bytes: &[u8]) -> u64 {
    let (mut a, mut b, mut any) = (0x243f_6a88_85a3_08d3_u64, 0x1319_8a2e_0370_7344_u64, 0);
    let mut rest = bytes;
    while let Some((pair, after)) = rest.split_first_chunk::<16>() {
        let words: [u64; 2] = zerocopy::transmute!(*pair);
        let [first, second] = words.map(u64::from_le);
        any |= first | second;
        a = (a.rotate_left(23) ^ first).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        b = (b.rotate_left(29) ^ second).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        rest = after;
    }
    if any == 0 {
        return 0;
    }
    Rng(a ^ b.rotate_left(32) ^ block.wrapping_mul(0xd6e8_feb8_6659_fd93)).next()
}

pub(super) fn index(small: u64) -> usize {
    usize::try_from(small).expect("fits: it indexes memory we hold")
}

/// Blocks that `offset..offset + len` touches.
fn blocks(offset: u64, len: usize) -> std::ops::Range<u64> {
    let first = offset / BLOCK;
    if len == 0 {
        return first..first;
    }
    first..(offset + len as u64).div_ceil(BLOCK)
}

/// The part of `page` that is `block`.
pub(super) fn part(page: &Page, block: u64) -> &[u8] {
    let start = index(block % BLOCKS_PER_PAGE) * BLOCK_LEN;
    &page[start..start + BLOCK_LEN]
}

/// The present version of a block, and its mark.
pub(super) fn block_of(pages: &Pages, block: u64) -> (Bytes, u64) {
    let Some(page) = pages.get(block / BLOCKS_PER_PAGE) else {
        return (None, 0);
    };
    let found = part(page, block);
    let mark = mark_of(block, found);
    if mark == 0 {
        return (None, 0);
    }
    let mut bytes = Box::new([0; BLOCK_LEN]);
    bytes.copy_from_slice(found);
    (Some(bytes), mark)
}

impl Medium {
    pub(super) fn new(len: u64) -> Self {
        Self {
            pages: Pages::default(),
            dirty: BTreeMap::new(),
            len,
            older_lens: Vec::new(),
            is_len_abandoned: false,
            capacity: u64::MAX,
            operation: 0,
            remembers: true,
            mark: 0,
        }
    }

    /// Everything is durable at once from here on: nobody will ask what a crash leaves.
    pub(super) fn forget(&mut self) {
        self.remembers = false;
        self.dirty.clear();
        self.older_lens.clear();
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn set_capacity(&mut self, bytes: u64) {
        self.capacity = bytes;
    }

    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() * PAGE
    }

    /// Blocks a crash could still change.
    pub(super) fn dirty_blocks(&self) -> usize {
        self.dirty.len()
    }

    /// Begins an operation: blocks it writes can be kept or lost as one.
    pub(super) fn begin(&mut self) {
        self.operation += 1;
    }

    /// Fills `buf`; the range is inside the disk.
    pub(super) fn read(&self, mut buf: &mut [u8], mut offset: u64) {
        while !buf.is_empty() {
            let within = index(offset % PAGE);
            let take = buf.len().min(PAGE_LEN - within);
            let (now, rest) = buf.split_at_mut(take);
            match self.pages.get(offset / PAGE) {
                Some(page) => now.copy_from_slice(&page[within..within + take]),
                None => now.fill(0),
            }
            buf = rest;
            offset += take as u64;
        }
    }

    /// Makes the present version of `block` an older one.
    fn remember(&mut self, block: u64) {
        if !self.remembers {
            return;
        }
        let (bytes, mark) = block_of(&self.pages, block);
        self.mark = self.mark.wrapping_sub(mark);
        let history = self.dirty.entry(block).or_default();
        history.older.push(Version {
            operation: history.present,
            bytes,
            mark,
        });
        history.present = self.operation;
        history.is_abandoned = false;
    }

    /// The present version of `block` has been written.
    fn note(&mut self, block: u64) {
        if !self.remembers {
            return;
        }
        let page = self.pages.get(block / BLOCKS_PER_PAGE);
        let mark = page.map_or(0, |page| mark_of(block, part(page, block)));
        self.mark = self.mark.wrapping_add(mark);
        if let Some(history) = self.dirty.get_mut(&block) {
            history.mark = mark;
        }
    }

    /// Makes the page, if there is room for it.
    ///
    /// # Errors
    /// `StorageFull` if there is not.
    fn make_page(&mut self, page: u64) -> io::Result<()> {
        let has_room = self.allocated() + PAGE <= self.capacity;
        if !has_room && self.pages.get(page).is_none() {
            return Err(ErrorKind::StorageFull.into());
        }
        self.pages.get_mut(page);
        Ok(())
    }

    /// Writes the blocks of `buf` that `keep` says yes to; the range is inside the disk.
    ///
    /// # Errors
    /// `StorageFull`, after the blocks in front of the first that does not fit.
    pub(super) fn write(
        &mut self,
        buf: &[u8],
        offset: u64,
        mut keep: impl FnMut() -> bool,
    ) -> io::Result<()> {
        for block in blocks(offset, buf.len()) {
            if !keep() {
                continue;
            }
            self.make_page(block / BLOCKS_PER_PAGE)?;
            self.remember(block);
            let start = (block * BLOCK).max(offset);
            let end = ((block + 1) * BLOCK).min(offset + buf.len() as u64);
            let within = index(start % PAGE);
            let bytes = &buf[index(start - offset)..index(end - offset)];
            let page = self.pages.get_mut(block / BLOCKS_PER_PAGE);
            page[within..within + bytes.len()].copy_from_slice(bytes);
            self.note(block);
        }
        Ok(())
    }

    /// Makes the present version of every block of the range durable, and a length that holds it.
    pub(super) fn settle(&mut self, offset: u64, len: usize) {
        for block in blocks(offset, len) {
            self.dirty.remove(&block);
        }
        self.older_lens
            .retain(|older| *older >= offset + len as u64);
    }

    /// Marks the present version of every block of the range as one no flush will save.
    pub(super) fn abandon(&mut self, offset: u64, len: usize) {
        for (_block, history) in self.dirty.range_mut(blocks(offset, len)) {
            history.is_abandoned = true;
        }
    }

    /// Makes everything durable that still can be.
    pub(super) fn flush(&mut self) {
        self.dirty.retain(|_block, history| history.is_abandoned);
        if !self.is_len_abandoned {
            self.older_lens.clear();
        }
    }

    /// A flush that failed: nothing that was to be made durable ever will be.
    pub(super) fn flush_failed(&mut self) {
        for history in self.dirty.values_mut() {
            history.is_abandoned = true;
        }
        self.is_len_abandoned = !self.older_lens.is_empty();
    }

    /// Makes the range read as zeros and gives back its whole pages; it is inside the disk.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let touched = offset / PAGE..end.div_ceil(PAGE);
        let touched: Vec<u64> = self.pages.range(touched).collect();
        for page in touched {
            let start = offset.max(page * PAGE);
            let stop = end.min((page + 1) * PAGE);
            for block in blocks(start, index(stop - start)) {
                self.remember(block);
            }
            if stop - start == PAGE {
                self.pages.remove(page);
            } else {
                let within = index(start % PAGE);
                self.pages.get_mut(page)[within..within + index(stop - start)].fill(0);
            }
            for block in blocks(start, index(stop - start)) {
                self.note(block);
            }
        }
    }

    /// Gives every page of the range a place; it is inside the disk.
    ///
    /// # Errors
    /// `StorageFull`, after the pages in front of the first that does not fit.
    pub(super) fn allocate(&mut self, offset: u64, len: u64) -> io::Result<()> {
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            self.make_page(page)?;
        }
        Ok(())
    }

    /// Changes the length; what lies beyond a shorter one is lost, after a crash perhaps not.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len, self.len - len);
            self.remove_beyond(len.div_ceil(PAGE));
        }
        if len != self.len {
            if self.remembers {
                self.older_lens.push(self.len);
            }
            self.is_len_abandoned = false;
            self.len = len;
        }
    }

    pub(super) fn remove_beyond(&mut self, first: u64) {
        for page in Vec::from_iter(self.pages.range(first..u64::MAX)) {
            self.pages.remove(page);
        }
    }

    /// The first run of pages at or after `offset`, cut to it and to the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages.range(offset / PAGE..u64::MAX);
        let first = pages.next().filter(|page| page * PAGE < self.len)?;
        let mut last = first;
        while pages.next() == Some(last + 1) {
            last += 1;
        }
        let (start, end) = ((first * PAGE).max(offset), (last + 1) * PAGE);
        (start < self.len).then(|| (start, end.min(self.len)))
    }
}
