//! What a crash may leave of a simulated disk: for every block that was written since it was last
//! durable, one of its versions.

use super::BLOCK;
use super::medium::{BLOCK_LEN, BLOCKS_PER_PAGE, History, Medium, PAGE, Rng, index, mark_of};
use std::collections::BTreeMap;

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
    /// Pages of 4 KiB, the sectors of many disks, each at some moment of its own.
    Pages,
}

/// One way a crash may choose: blocks of which an older version survives, and which; the length.
#[derive(Debug, Clone)]
pub(super) struct Draw {
    older: Vec<(u64, usize)>,
    len: u64,
    /// Equal for equal contents of the disk, as good as never for others.
    pub(super) mark: u64,
}

impl Medium {
    /// What `choose` picks for every dirty block: an index into its older versions, or anything
    /// beyond them for the present one.
    fn choose(&self, len: u64, mut choose: impl FnMut(u64, &History) -> usize) -> Draw {
        let mut older = Vec::new();
        let mut mark = self.mark.wrapping_add(mark_of(len, &[1; 16]));
        for (block, history) in &self.dirty {
            let number = choose(*block, history);
            if let Some(version) = history.older.get(number) {
                mark = mark.wrapping_sub(history.mark).wrapping_add(version.mark);
                older.push((*block, number));
            }
        }
        Draw { older, len, mark }
    }

    /// A durable disk as `draw` says.
    pub(super) fn image(&self, draw: &Draw) -> Self {
        let len = draw.len;
        let mut image = Self::new(len);
        image.pages = self.pages.clone();
        for (block, number) in &draw.older {
            let version = &self.dirty[block].older[*number];
            image.put(*block, version.bytes.as_deref());
        }
        image.mark = draw.mark.wrapping_sub(mark_of(len, &[1; 16]));
        if len < self.len || !self.older_lens.is_empty() {
            image.cut_to(len);
        }
        image
    }

    /// Nothing is left beyond `len`.
    fn cut_to(&mut self, len: u64) {
        if !len.is_multiple_of(PAGE) && self.pages.get(len / PAGE).is_some() {
            self.pages.get_mut(len / PAGE)[index(len % PAGE)..].fill(0);
        }
        self.remove_beyond(len.div_ceil(PAGE));
    }

    /// Overwrites one block without a history.
    fn put(&mut self, block: u64, bytes: Option<&[u8; BLOCK_LEN]>) {
        let page = block / BLOCKS_PER_PAGE;
        if bytes.is_none() && self.pages.get(page).is_none() {
            return;
        }
        let page = self.pages.get_mut(page);
        let start = index(block % BLOCKS_PER_PAGE) * BLOCK_LEN;
        page[start..start + BLOCK_LEN].copy_from_slice(bytes.unwrap_or(&[0; BLOCK_LEN]));
    }

    /// Nothing unflushed survives.
    pub(super) fn draw_all_lost(&self) -> Draw {
        let len = self.older_lens.first().copied().unwrap_or(self.len);
        self.choose(len, |_block, _history| 0)
    }

    /// Everything completed survives.
    pub(super) fn draw_all_kept(&self) -> Draw {
        self.choose(self.len, |_block, _history| usize::MAX)
    }

    /// One image the contract allows.
    pub(super) fn draw(&self, seed: u64) -> Draw {
        let mut rng = Rng(seed);
        let pick = match rng.below(9) {
            0 => Pick::MostlyKept,
            1 => Pick::MostlyLost,
            2 | 3 => Pick::Prefix,
            4 | 5 => Pick::Operations,
            6 => Pick::Pages,
            _ => Pick::Scatter,
        };
        let mut lens = self.older_lens.clone();
        lens.push(self.len);
        let len = lens[rng.below(lens.len())];
        let last = rng.next() % (self.operation + 1);
        let salt = rng.next();
        let first = self.dirty.values().map(History::first).min();
        let first = first.unwrap_or(self.operation).saturating_sub(1);
        let is_kept = |operation: u64| Rng(salt ^ operation).next() & 1 == 0;
        self.choose(len, |block, history| {
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
                Pick::Pages => {
                    let moment = Rng(salt ^ (block / BLOCKS_PER_PAGE)).next();
                    let last = first + moment % (self.operation + 1 - first);
                    history.newest(|operation| operation <= last)
                }
            }
        })
    }

    /// Every distinct image a crash may leave, if there are at most `max`.
    pub(super) fn draws(&self, max: usize) -> Option<Vec<Draw>> {
        let mut lens = self.older_lens.clone();
        lens.push(self.len);
        lens.sort_unstable();
        lens.dedup();
        // For each length: the distinct versions of each dirty block in front of it, by index.
        let mut plans = Vec::new();
        let mut total = 0_usize;
        for len in lens {
            let mut choices = Vec::new();
            let mut count = 1_usize;
            for (block, history) in self.dirty.range(..len / BLOCK) {
                let distinct = Self::distinct(history);
                count = count
                    .checked_mul(distinct.len())
                    .filter(|count| *count <= max)?;
                choices.push((*block, distinct));
            }
            total = total.checked_add(count).filter(|total| *total <= max)?;
            plans.push((len, choices, count));
        }
        let mut draws = Vec::with_capacity(total);
        for (len, choices, count) in plans {
            for number in 0..count {
                let mut digits = number;
                let mut picked = BTreeMap::new();
                for (block, choice) in &choices {
                    picked.insert(*block, choice[digits % choice.len()]);
                    digits /= choice.len();
                }
                draws.push(self.choose(len, |block, _| {
                    picked.get(&block).copied().unwrap_or(usize::MAX)
                }));
            }
        }
        Some(draws)
    }

    /// One index for each different content among the versions of a block, the present included.
    fn distinct(history: &History) -> Vec<usize> {
        let versions = history.older.iter().map(|version| version.mark);
        let mut seen = Vec::new();
        let mut indices = Vec::new();
        for (number, mark) in versions.chain([history.mark]).enumerate() {
            if !seen.contains(&mark) {
                seen.push(mark);
                indices.push(number);
            }
        }
        indices
    }
}

impl History {
    /// The operation that wrote the version after the durable one.
    fn first(&self) -> u64 {
        self.older.get(1).map_or(self.present, |v| v.operation)
    }

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
