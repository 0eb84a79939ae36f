//! The simulated disk's surface: what it reads as now, and every older version of each block that
//! a crash may bring back.
//!
//! `pages` is the present. `dirty` holds, for each block written since it was last durable, the
//! versions before the present one, oldest (durable) first. A flush forgets them; a crash picks
//! one of them, or the present, for each block.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};

use super::BLOCK;
use crate::sync::Arc;

const PAGE: u64 = 4096;
const BLOCKS_PER_PAGE: u64 = PAGE / BLOCK;
const BLOCK_LEN: usize = 512;
const PAGE_LEN: usize = 4096;

type Page = [u8; PAGE_LEN];

/// One version of a block; `None` reads as zeros.
type Bytes = Option<Box<[u8; BLOCK_LEN]>>;

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

/// How a crash chooses. All choices are legal; they differ in which bugs they find soonest.
#[derive(Debug, Clone, Copy)]
enum Pick {
    /// Every block any version, independently.
    Scatter,
    /// Nearly every block the present one.
    MostlyKept,
    /// Nearly every block the durable one.
    MostlyLost,
    /// All operations up to one, none after.
    Prefix,
    /// Each operation kept or lost as a whole.
    Operations,
}

#[derive(Debug, Clone)]
struct Version {
    /// The operation that wrote it; 0 for the durable one.
    operation: u64,
    bytes: Bytes,
}

#[derive(Debug, Clone, Default)]
struct History {
    /// Never empty; the first is the durable one.
    older: Vec<Version>,
    /// The operation that wrote the present version.
    present: u64,
    /// A flush of the present version failed: no later flush covers it (the kernel marks a page
    /// clean whether or not writing it worked), only a new write followed by a flush.
    is_abandoned: bool,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Medium {
    pages: BTreeMap<u64, Arc<Page>>,
    dirty: BTreeMap<u64, History>,
    len: u64,
    /// Lengths since the last flush, the present one excluded.
    older_lens: Vec<u64>,
    is_len_abandoned: bool,
    /// Bytes of pages there may be.
    capacity: u64,
    operation: u64,
}

fn index(small: u64) -> usize {
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

fn block_of(pages: &BTreeMap<u64, Arc<Page>>, block: u64) -> Bytes {
    let page = pages.get(&(block / BLOCKS_PER_PAGE))?;
    let start = index(block % BLOCKS_PER_PAGE) * BLOCK_LEN;
    let mut bytes = Box::new([0; BLOCK_LEN]);
    bytes.copy_from_slice(&page[start..start + BLOCK_LEN]);
    bytes.iter().any(|byte| *byte != 0).then_some(bytes)
}

impl Medium {
    pub(super) fn new(len: u64) -> Self {
        Self {
            pages: BTreeMap::new(),
            dirty: BTreeMap::new(),
            len,
            older_lens: Vec::new(),
            is_len_abandoned: false,
            capacity: u64::MAX,
            operation: 0,
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn set_capacity(&mut self, bytes: u64) {
        self.capacity = bytes;
    }

    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
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
            match self.pages.get(&(offset / PAGE)) {
                Some(page) => now.copy_from_slice(&page[within..within + take]),
                None => now.fill(0),
            }
            buf = rest;
            offset += take as u64;
        }
    }

    /// Makes the present version of `block` an older one.
    fn remember(&mut self, block: u64) {
        let bytes = block_of(&self.pages, block);
        let history = self.dirty.entry(block).or_default();
        history.older.push(Version {
            operation: history.present,
            bytes,
        });
        history.present = self.operation;
        history.is_abandoned = false;
    }

    /// The page, made if there is room for it.
    ///
    /// # Errors
    /// `StorageFull` if there is not.
    fn page_mut(&mut self, page: u64) -> io::Result<&mut Arc<Page>> {
        let has_room = self.allocated() + PAGE <= self.capacity;
        if !has_room && !self.pages.contains_key(&page) {
            return Err(ErrorKind::StorageFull.into());
        }
        let zeros = || Arc::new([0; PAGE_LEN]);
        Ok(self.pages.entry(page).or_insert_with(zeros))
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
            self.page_mut(block / BLOCKS_PER_PAGE)?;
            self.remember(block);
            let start = (block * BLOCK).max(offset);
            let end = ((block + 1) * BLOCK).min(offset + buf.len() as u64);
            let within = index(start % PAGE);
            let bytes = &buf[index(start - offset)..index(end - offset)];
            let page = Arc::make_mut(self.page_mut(block / BLOCKS_PER_PAGE)?);
            page[within..within + bytes.len()].copy_from_slice(bytes);
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
        let touched: Vec<u64> = self.pages.range(touched).map(|(page, _)| *page).collect();
        for page in touched {
            let start = offset.max(page * PAGE);
            let stop = end.min((page + 1) * PAGE);
            for block in blocks(start, index(stop - start)) {
                self.remember(block);
            }
            if stop - start == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                let within = index(start % PAGE);
                Arc::make_mut(bytes)[within..within + index(stop - start)].fill(0);
            }
        }
    }

    /// Gives every page of the range a place; it is inside the disk.
    ///
    /// # Errors
    /// `StorageFull`, after the pages in front of the first that does not fit.
    pub(super) fn allocate(&mut self, offset: u64, len: u64) -> io::Result<()> {
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            self.page_mut(page)?;
        }
        Ok(())
    }

    /// Changes the length; what lies beyond a shorter one is lost, after a crash perhaps not.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len, self.len - len);
            drop(self.pages.split_off(&len.div_ceil(PAGE)));
        }
        if len != self.len {
            self.older_lens.push(self.len);
            self.is_len_abandoned = false;
            self.len = len;
        }
    }

    /// The first run of pages at or after `offset`, cut to it and to the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages.range(offset / PAGE..).map(|(page, _)| *page);
        let first = pages.next().filter(|page| page * PAGE < self.len)?;
        let mut last = first;
        while pages.next() == Some(last + 1) {
            last += 1;
        }
        let (start, end) = ((first * PAGE).max(offset), (last + 1) * PAGE);
        (start < self.len).then(|| (start, end.min(self.len)))
    }

    /// A durable disk of length `len` where `choose` has picked a version of every dirty block:
    /// an index into the older ones, or anything beyond them for the present one.
    fn image(&self, len: u64, mut choose: impl FnMut(u64, &History) -> usize) -> Self {
        let mut image = Self::new(len);
        image.pages = self.pages.clone();
        for (block, history) in &self.dirty {
            if let Some(version) = history.older.get(choose(*block, history)) {
                image.put(*block, version.bytes.as_deref());
            }
        }
        let beyond = image.pages.split_off(&(len / PAGE));
        if let Some(mut page) = beyond.get(&(len / PAGE)).cloned()
            && !len.is_multiple_of(PAGE)
        {
            Arc::make_mut(&mut page)[index(len % PAGE)..].fill(0);
            image.pages.insert(len / PAGE, page);
        }
        image
    }

    /// Overwrites one block without a history.
    fn put(&mut self, block: u64, bytes: Option<&[u8; BLOCK_LEN]>) {
        let page = block / BLOCKS_PER_PAGE;
        if bytes.is_none() && !self.pages.contains_key(&page) {
            return;
        }
        let zeros = || Arc::new([0; PAGE_LEN]);
        let page = Arc::make_mut(self.pages.entry(page).or_insert_with(zeros));
        let start = index(block % BLOCKS_PER_PAGE) * BLOCK_LEN;
        page[start..start + BLOCK_LEN].copy_from_slice(bytes.unwrap_or(&[0; BLOCK_LEN]));
    }

    /// Nothing unflushed survives.
    pub(super) fn crash_all_lost(&self) -> Self {
        let len = self.older_lens.first().copied().unwrap_or(self.len);
        self.image(len, |_block, _history| 0)
    }

    /// Everything completed survives.
    pub(super) fn crash_all_kept(&self) -> Self {
        self.image(self.len, |_block, _history| usize::MAX)
    }

    /// One image the contract allows.
    pub(super) fn crash(&self, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let pick = match rng.below(8) {
            0 => Pick::MostlyKept,
            1 => Pick::MostlyLost,
            2 | 3 => Pick::Prefix,
            4 | 5 => Pick::Operations,
            _ => Pick::Scatter,
        };
        let mut lens = self.older_lens.clone();
        lens.push(self.len);
        let len = lens[rng.below(lens.len())];
        let last = index(rng.next() % (self.operation + 1)) as u64;
        let salt = rng.next();
        let is_kept = |operation: u64| Rng(salt ^ operation).next() & 1 == 0;
        self.image(len, |_block, history| {
            let any = rng.below(history.older.len() + 1);
            let is_rare = rng.below(8) == 0;
            match pick {
                Pick::Scatter => any,
                Pick::MostlyKept => {
                    if is_rare {
                        any
                    } else {
                        usize::MAX
                    }
                }
                Pick::MostlyLost => {
                    if is_rare {
                        any
                    } else {
                        0
                    }
                }
                Pick::Prefix => history.newest(|operation| operation <= last),
                Pick::Operations => history.newest(is_kept),
            }
        })
    }

    /// Every distinct image a crash may leave, if there are at most `max`.
    pub(super) fn images(&self, max: usize) -> Option<impl Iterator<Item = Self> + use<>> {
        let mut lens = self.older_lens.clone();
        lens.push(self.len);
        lens.sort_unstable();
        lens.dedup();
        // For each length: the distinct versions of each dirty block in front of it, by index.
        let mut plans = Vec::new();
        let mut total = 0_usize;
        for len in lens {
            let choices: Vec<(u64, Vec<usize>)> = (self.dirty.range(..len / BLOCK))
                .map(|(block, history)| (*block, self.distinct(*block, history)))
                .collect();
            let count = choices.iter().try_fold(1_usize, |product, (_, choice)| {
                product.checked_mul(choice.len())
            })?;
            total = total.checked_add(count).filter(|total| *total <= max)?;
            plans.push((len, choices, count));
        }
        let medium = self.clone();
        Some(plans.into_iter().flat_map(move |(len, choices, count)| {
            let medium = medium.clone();
            (0..count).map(move |number| {
                let mut digits = number;
                let mut picked = BTreeMap::new();
                for (block, choice) in &choices {
                    picked.insert(*block, choice[digits % choice.len()]);
                    digits /= choice.len();
                }
                medium.image(len, |block, _| {
                    picked.get(&block).copied().unwrap_or(usize::MAX)
                })
            })
        }))
    }

    /// One index for each different content among the versions of a block, the present included.
    fn distinct(&self, block: u64, history: &History) -> Vec<usize> {
        let present = block_of(&self.pages, block);
        let versions = history.older.iter().map(|version| &version.bytes);
        let mut seen: Vec<&Bytes> = Vec::new();
        let mut indices = Vec::new();
        for (number, bytes) in versions.chain([&present]).enumerate() {
            if !seen.contains(&bytes) {
                seen.push(bytes);
                indices.push(number);
            }
        }
        indices
    }
}

impl History {
    /// The newest version whose operation `is_kept`; the durable one if there is none.
    fn newest(&self, is_kept: impl Fn(u64) -> bool) -> usize {
        if is_kept(self.present) {
            return usize::MAX;
        }
        let kept = self
            .older
            .iter()
            .skip(1)
            .rposition(|v| is_kept(v.operation));
        kept.map_or(0, |position| position + 1)
    }
}
