//! What is left in a store that says where data is, or was. Whatever replaces metadata writes nowhere
//! there, so that what it gives up can be put back, or be restored from a dump.

use super::bitmap::Bitmap;
use super::error::PoolError;
use super::image_read;
use super::journal::Journal;
use super::load::{Loaded, superblock_copies};
use super::undo::undo_of;
use super::walk::Seen;
use crate::format::image::{Token, decode_token};
use crate::format::image_block::damaged_tokens;
use crate::format::journal::{Entry, Record, SLOT_LEN, SlotNames, slot_names};
use crate::format::superblock::Superblock;
use crate::format::units::{bytes_of, len_of};
use crate::storage::{AlignedBuf, Storage};
use std::ops::Range;

/// Journal read at once, bytes.
const PART_LEN: u64 = 1 << 20;
/// What cannot be read may name disks with numbers so much higher than any that can.
const DISKS_UNSEEN_MAX: u32 = 1 << 16;

/// Clusters of the data area that something names.
#[derive(Debug)]
pub(super) struct Evidence {
    /// Where data may be.
    clusters: Range<u32>,
    /// Named by a whole batch, by an image, by the maps, or by what may be left of a batch.
    pub named: Bitmap,
    /// Of those, named by what is given up.
    given_up: Bitmap,
    /// A number above those of all disks that anything tells of.
    pub next_disk: u32,
    /// There are whole batches of this pool.
    pub has_batches: bool,
}

impl Evidence {
    /// What there is in the store of the pool of `superblock`, the one in force: also of the other
    /// copy, and of what a repair or restore could be taken back to.
    ///
    /// # Errors
    /// The store failed.
    pub(super) fn of(
        storage: &dyn Storage,
        superblock: &Superblock,
        given_up: Option<u64>,
    ) -> Result<Self, PoolError> {
        let copies = superblock_copies(storage)?.into_iter().flatten();
        let before = undo_of(storage, superblock)?.and_then(|undo| undo.superblock());
        let older = copies.chain(before).filter(|copy| copy.is_like(superblock));
        let older: Vec<_> = older
            .filter(|copy| copy.image != superblock.image)
            .collect();
        Self::gather(storage, superblock, &older, given_up)
    }

    /// What the journal and the images of `superblock` and of `older` ones say. Batches from
    /// `given_up` on are given up, if there is such a number.
    ///
    /// # Errors
    /// The store failed.
    fn gather(
        storage: &dyn Storage,
        superblock: &Superblock,
        older: &[Superblock],
        given_up: Option<u64>,
    ) -> Result<Self, PoolError> {
        let size = superblock.cluster_size;
        let first = size.count(superblock.metadata_end()).unwrap_or(u32::MAX);
        let mut evidence = Self {
            clusters: first..superblock.cluster_count,
            named: Bitmap::default(),
            given_up: Bitmap::default(),
            next_disk: 1,
            has_batches: false,
        };
        evidence.add_journal(storage, superblock, given_up)?;
        for superblock in older.iter().chain([superblock]) {
            evidence.add_image(storage, superblock)?;
        }
        Ok(evidence)
    }

    /// Adds what the maps refer to, which may be given up.
    pub(super) fn add_maps(&mut self, loaded: &Loaded) {
        each_entry(loaded, &mut |entry| self.add(entry.clusters(), true));
        self.next_disk = self.next_disk.max(loaded.replay.next_disk);
    }

    /// What is given up and has no other place in `loaded`, as runs of clusters.
    pub(super) fn left_by(&self, loaded: &Loaded) -> Vec<Range<u32>> {
        let mut held = Bitmap::default();
        for cluster in loaded.image_clusters.iter().cloned().flatten() {
            put(&mut held, cluster);
        }
        each_entry(loaded, &mut |entry| {
            for cluster in entry.clusters().into_iter().filter(|cluster| *cluster != 0) {
                put(&mut held, cluster);
            }
        });
        let mut left: Vec<Range<u32>> = Vec::new();
        let mut from = 0;
        while let Some(cluster) = self.given_up.next(from) {
            from = cluster + 1;
            if held.contains(cluster) {
                continue;
            }
            match left.last_mut().filter(|run| run.end == cluster) {
                Some(run) => run.end = from,
                None => left.push(cluster..from),
            }
        }
        left
    }

    fn add(&mut self, clusters: [u32; 2], is_given_up: bool) {
        for cluster in clusters {
            if self.clusters.contains(&cluster) {
                put(&mut self.named, cluster);
                if is_given_up {
                    put(&mut self.given_up, cluster);
                }
            }
        }
    }

    fn add_disk(&mut self, disk: u32) {
        self.next_disk = self.next_disk.max(disk.saturating_add(1));
    }

    fn add_journal(
        &mut self,
        storage: &dyn Storage,
        superblock: &Superblock,
        given_up: Option<u64>,
    ) -> Result<(), PoolError> {
        let journal = Journal::new(superblock);
        let mut whole = [Vec::new(), Vec::new()];
        journal.search(storage, 0).all(&mut |found| {
            let is_given_up = given_up.is_some_and(|first| found.stamp.seq >= first);
            for record in &found.records {
                self.add_record(record, is_given_up);
            }
            let range = found.used..found.used + found.len;
            whole[usize::from(found.half == 1)].push(range);
            self.has_batches = true;
        })?;
        let unseen = self.next_disk.saturating_add(DISKS_UNSEEN_MAX);
        for (at, whole) in superblock.journal_half.into_iter().zip(whole) {
            let end = superblock.journal_half_len;
            let starts = [0].into_iter().chain(whole.iter().map(|range| range.end));
            let ends = whole.iter().map(|range| range.start).chain([end]);
            for (start, end) in starts.zip(ends).filter(|(start, end)| start < end) {
                let mut names = |names: SlotNames| {
                    self.add(names.clusters, given_up.is_some());
                    if names.disk.0 < unseen {
                        self.add_disk(names.disk.0);
                    }
                };
                each_slot(storage, at + start..at + end, &mut names)?;
            }
        }
        Ok(())
    }

    fn add_record(&mut self, record: &Record, is_given_up: bool) {
        match record {
            Record::Map { entry, .. } => self.add(entry.clusters(), is_given_up),
            Record::Row(row) => self.add_disk(row.id.0),
            Record::Unmap { .. } | Record::Fork { .. } | Record::Delete { .. } => {}
        }
    }

    /// As far as it can be read; also of blocks that are damaged, what of them can be.
    fn add_image(
        &mut self,
        storage: &dyn Storage,
        superblock: &Superblock,
    ) -> Result<(), PoolError> {
        let mut extents = match image_read::extents(storage, superblock) {
            Ok(Some(extents)) => extents,
            Ok(None) => return Ok(()),
            Err(e @ PoolError::Storage { .. }) => return Err(e),
            Err(_damaged) => return Ok(()),
        };
        for cluster in extents.clusters.iter().cloned().flatten() {
            self.add([cluster, 0], false);
        }
        extents.each_block(storage, &mut |block| {
            let mut tokens = match block {
                Ok(tokens) => tokens,
                Err((_, block)) => damaged_tokens(block),
            };
            while let Ok(Some(token)) = decode_token(&mut tokens) {
                match token {
                    Token::Leaf(entries) => {
                        let clusters = entries.iter().map(Entry::clusters);
                        clusters.for_each(|clusters| self.add(clusters, false));
                    }
                    Token::Disk { row, .. } => self.add_disk(row.id.0),
                    Token::Start { .. } | Token::Inner { .. } | Token::End { .. } => {}
                }
            }
            Ok(())
        })
    }
}

fn put(set: &mut Bitmap, cluster: u32) {
    if !set.contains(cluster) {
        set.insert(cluster..cluster + 1);
    }
}

/// Every entry of every map, those of shared nodes once.
fn each_entry(loaded: &Loaded, visit: &mut dyn FnMut(&Entry)) {
    let mut seen = Seen::default();
    for item in loaded.catalogue.iter() {
        let map = item.volume.map.read();
        seen.set_disk(item.row.family.0, map.last_fork.0);
        seen.walk(&map.tree, &mut |_, _, leaf| {
            leaf.entries.iter().for_each(&mut *visit);
        });
    }
}

/// What each slot in `range` of the store names, if it is one.
fn each_slot(
    storage: &dyn Storage,
    range: Range<u64>,
    visit: &mut dyn FnMut(SlotNames),
) -> Result<(), PoolError> {
    let mut at = range.start;
    while at < range.end {
        let mut part = AlignedBuf::new(len_of((range.end - at).min(PART_LEN)));
        let read = storage.read_at(&mut part, at);
        read.map_err(PoolError::storage("reading the journal"))?;
        part.chunks(SLOT_LEN)
            .filter_map(slot_names)
            .for_each(&mut *visit);
        at += bytes_of(part.len());
    }
    Ok(())
}
