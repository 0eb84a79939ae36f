//! How many leaves refer to each cluster. Derived at open, never stored: two truths that can
//! disagree are how other formats lose data.

use super::map::Leaf;
use crate::format::journal::Entry;
use crate::format::units::index;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{IS_MODELLED, OnceLock, with_mut};

/// Counts in a chunk, chunks in a table, and tables: 2^14 x 2^9 x 2^9 are all there can be.
const CHUNK: usize = if IS_MODELLED { 1 << 4 } else { 1 << 14 };
const TABLE: usize = 1 << 9;
type Chunk = Box<[AtomicU32]>;
type Table = Box<[OnceLock<Chunk>]>;

/// A count for each cluster there can ever be, in chunks made when first touched: a small pool
/// takes little memory, and little time to open.
pub struct Counts {
    tables: Box<[OnceLock<Table>]>,
}

fn new_chunk() -> Chunk {
    (0..CHUNK).map(|_| AtomicU32::new(0)).collect()
}

fn new_table() -> Table {
    (0..TABLE).map(|_| OnceLock::new()).collect()
}

/// Places of a cluster: in the tables, in its table, in its chunk.
fn split(cluster: u32) -> [usize; 3] {
    let at = index(cluster);
    [at / CHUNK / TABLE, at / CHUNK % TABLE, at % CHUNK]
}

impl std::fmt::Debug for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counts").finish_non_exhaustive()
    }
}

impl Counts {
    /// All zero.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tables: (0..TABLE).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Counts nothing: for copies of leaves before there is anything to count.
    #[must_use]
    pub fn none() -> Self {
        Self {
            tables: Box::default(),
        }
    }

    fn is_none(&self) -> bool {
        self.tables.is_empty()
    }

    fn at(&self, cluster: u32) -> &AtomicU32 {
        let [table, chunk, place] = split(cluster);
        let table = self.tables[table].get_or_init(new_table);
        &table[chunk].get_or_init(new_chunk)[place]
    }

    /// References to `cluster`, those dropped but not yet durably and finally dropped included (R5).
    #[must_use]
    pub fn get(&self, cluster: u32) -> u32 {
        // Acquire pairs with the release in `release`: who sees a count fall to one also sees all
        // that the other holder did before.
        self.at(cluster).load(Ordering::Acquire)
    }

    /// One more reference; returns how many there were.
    pub fn retain(&self, cluster: u32) -> u32 {
        self.at(cluster).fetch_add(1, Ordering::Relaxed)
    }

    /// As [`Counts::retain`], while nobody else has the counts: at open, where most of the time goes
    /// into waiting for memory, an atomic addition would wait for each place before the next.
    pub fn retain_alone(&mut self, cluster: u32) {
        let [table, chunk, place] = split(cluster);
        let table = &mut self.tables[table];
        table.get_or_init(new_table);
        let chunk = &mut table.get_mut().expect("just made")[chunk];
        chunk.get_or_init(new_chunk);
        let chunk = chunk.get_mut().expect("just made");
        with_mut(&mut chunk[place], |count| *count += 1);
    }

    /// One reference fewer; returns how many are left.
    ///
    /// # Panics
    /// There was none: a cluster would be freed twice.
    pub fn release(&self, cluster: u32) -> u32 {
        let before = self.at(cluster).fetch_sub(1, Ordering::AcqRel);
        assert!(
            before > 0,
            "cluster {cluster} is released more often than it was taken"
        );
        before - 1
    }

    /// A leaf was copied: its clusters have one more reference each.
    pub fn retain_leaf(&self, leaf: &Leaf) {
        if self.is_none() {
            return;
        }
        for cluster in leaf.entries.iter().flat_map(Entry::clusters) {
            if cluster != 0 {
                self.retain(cluster);
            }
        }
    }

    /// A copied leaf turned out to have had no other holder.
    pub fn release_copied_leaf(&self, leaf: &Leaf) {
        if self.is_none() {
            return;
        }
        for cluster in leaf.entries.iter().flat_map(Entry::clusters) {
            if cluster != 0 {
                let left = self.release(cluster);
                assert!(
                    left > 0,
                    "cluster {cluster}: the copy of its leaf refers to it too"
                );
            }
        }
    }
}
