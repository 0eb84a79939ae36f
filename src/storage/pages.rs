//! The contents of a simulated disk in pages, of which copies share all they have in common: a
//! simulation makes images by the million, each a few blocks away from the last.

use crate::sync::Arc;
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a page.
pub(super) const PAGE_LEN: usize = 4096;
/// Pages that are found, and cloned, together.
const CHUNK: u64 = 64;
const CHUNK_LEN: usize = 64;

pub(super) type Page = [u8; PAGE_LEN];
type Chunk = [Option<Arc<Page>>; CHUNK_LEN];

/// Pages by number. A page that is absent reads as zeros.
#[derive(Clone, Default)]
pub(super) struct Pages {
    chunks: BTreeMap<u64, Arc<Chunk>>,
    len: u64,
}

fn place(page: u64) -> usize {
    usize::try_from(page % CHUNK).expect("below CHUNK")
}

impl Pages {
    /// How many there are.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn get(&self, page: u64) -> Option<&Page> {
        self.chunks.get(&(page / CHUNK))?[place(page)].as_deref()
    }

    /// The page, made if it is absent; alone from here on.
    pub(super) fn get_mut(&mut self, page: u64) -> &mut Page {
        let empty = || Arc::new([const { None }; CHUNK_LEN]);
        let chunk = self.chunks.entry(page / CHUNK).or_insert_with(empty);
        let slot = &mut Arc::make_mut(chunk)[place(page)];
        self.len += u64::from(slot.is_none());
        Arc::make_mut(slot.get_or_insert_with(|| Arc::new([0; PAGE_LEN])))
    }

    pub(super) fn remove(&mut self, page: u64) {
        let Some(chunk) = self.chunks.get_mut(&(page / CHUNK)) else {
            return;
        };
        if chunk[place(page)].is_some() {
            Arc::make_mut(chunk)[place(page)] = None;
            self.len -= 1;
        }
    }

    /// Numbers of the pages in `range` that are there, in order.
    pub(super) fn range(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        let chunks = range.start / CHUNK..range.end.div_ceil(CHUNK);
        let numbers = self.chunks.range(chunks).flat_map(|(number, chunk)| {
            let present = (number * CHUNK..).zip(chunk.iter());
            present.filter_map(|(page, slot)| slot.is_some().then_some(page))
        });
        numbers.filter(move |page| range.contains(page))
    }
}
