//! Reading the blocks of a checkpoint image in the order of its extent lists. What one block or list
//! has lost is made up for: by its copy, or by the parity of the blocks around it.

use super::error::PoolError;
use super::journal::uuid_low;
use crate::format::FormatError;
use crate::format::image_block::{
    Extent, ImageStamp, PARITY_BLOCKS, WINDOW, add_parity, parity_of, unseal_block, unseal_head,
};
use crate::format::superblock::{ImageRef, Superblock};
use crate::format::units::{Cluster, ClusterSize, index};
use crate::storage::{AlignedBuf, Storage};
use std::collections::HashSet;
use std::ops::Range;

/// Bytes of an image read at once: a device asked for one cluster at a time is idle in between.
const READ_LEN: u64 = 4 << 20;
/// Damaged parts that are told one by one.
const FAULTS_MAX: usize = 64;

/// A block that nothing makes up for: what is wrong with it, and its bytes.
pub(super) type Bad<'a> = (FormatError, &'a [u8]);
/// Called with the tokens of each block.
pub(super) type Visit<'a> = &'a mut dyn FnMut(Result<&[u8], Bad<'_>>) -> Result<(), PoolError>;

/// Where an image lies.
#[derive(Debug)]
pub(super) struct Extents {
    size: ClusterSize,
    stamp: ImageStamp,
    /// Of blocks, after each window of them their parity; with the place of the first of each.
    listed: Vec<(u32, Extent)>,
    /// Blocks of tokens.
    blocks: u32,
    /// It is of a release that wrote it.
    has_parity: bool,
    /// Every cluster it takes, heads included.
    pub clusters: Vec<Range<u32>>,
    /// What is damaged and made up for.
    pub faults: Vec<String>,
}

/// Where the image of `superblock` lies; `None` if it has none.
///
/// # Errors
/// Its heads are damaged, or the store failed.
pub(super) fn extents(
    storage: &dyn Storage,
    superblock: &Superblock,
) -> Result<Option<Extents>, PoolError> {
    let Some(image) = superblock.image else {
        return Ok(None);
    };
    let mut extents = Extents {
        size: superblock.cluster_size,
        stamp: ImageStamp {
            uuid_low: uuid_low(&superblock.uuid),
            seq: image.seq,
        },
        listed: Vec::new(),
        blocks: 0,
        has_parity: false,
        clusters: Vec::new(),
        faults: Vec::new(),
    };
    extents.add_heads(storage, image, superblock.cluster_count)?;
    Ok(Some(extents))
}

impl Extents {
    /// The last batch that the image includes.
    pub(super) fn seq(&self) -> u64 {
        self.stamp.seq
    }

    fn add_heads(
        &mut self,
        storage: &dyn Storage,
        image: ImageRef,
        cluster_count: u32,
    ) -> Result<(), PoolError> {
        let mut heads = HashSet::new();
        let mut named = 0_u64;
        let mut head = (image.head, image.head_copy);
        while head.0 != 0 {
            if !heads.insert(head.0) {
                return Err(PoolError::damaged(
                    "checkpoint image: its extent lists go round in a ring",
                ));
            }
            self.clusters.push(head.0..head.0 + 1);
            if head.1 != 0 {
                self.clusters.push(head.1..head.1 + 1);
            }
            let (found, next) = self.read_head(storage, head, cluster_count)?;
            for extent in found {
                // So few extents can name so many clusters, each many times, that this comes first.
                let place = u32::try_from(named).unwrap_or(u32::MAX);
                self.listed.push((place, extent));
                named += u64::from(extent.count);
            }
            head = next;
        }
        let blocks = u32::try_from(image.len / self.size.bytes()).unwrap_or(u32::MAX);
        let with_parity = u64::from(blocks) + u64::from(parity_of(blocks));
        self.blocks = blocks;
        self.has_parity = named == with_parity;
        let is_whole = image.len.is_multiple_of(self.size.bytes());
        let is_known = self.has_parity || named == u64::from(blocks);
        if named > u64::from(cluster_count) || !is_whole || !is_known {
            return Err(PoolError::damaged(format!(
                "checkpoint image: its extents have {named} clusters, and it has {} bytes",
                image.len
            )));
        }
        let runs = self.listed.iter();
        let runs = runs.map(|(_, one)| one.start..one.start + one.count);
        self.clusters.extend(runs);
        Ok(())
    }

    /// The extents of a head, from its copy if it is damaged.
    fn read_head(
        &mut self,
        storage: &dyn Storage,
        (head, copy): (u32, u32),
        cluster_count: u32,
    ) -> Result<(Vec<Extent>, (u32, u32)), PoolError> {
        let read = |cluster: u32| {
            let mut block = AlignedBuf::new(self.size.len());
            self.read(storage, cluster, &mut block)?;
            Ok(unseal_head(self.stamp, cluster_count, &block)?)
        };
        let found = read(head);
        let other = match copy {
            0 => return found,
            copy => read(copy),
        };
        let (found, cluster, error) = match (found, other) {
            (Ok(found), Ok(_)) => return Ok(found),
            (Ok(found), Err(e)) => (found, copy, e),
            (Err(e), Ok(found)) => (found, head, e),
            (Err(e), Err(_)) => return Err(e),
        };
        self.tell(format!("extent list in cluster {cluster}: {error}"));
        Ok(found)
    }

    fn tell(&mut self, what: String) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(what);
        }
    }

    /// Calls `visit` with the tokens of each block.
    ///
    /// # Errors
    /// What `visit` says, or the store failed.
    pub(super) fn each_block(
        &mut self,
        storage: &dyn Storage,
        visit: Visit<'_>,
    ) -> Result<(), PoolError> {
        let per_read = u32::try_from(READ_LEN / self.size.bytes())
            .unwrap_or(1)
            .max(1);
        let mut part = AlignedBuf::new(self.size.len() * index(per_read));
        let mut number = 0;
        while number < self.blocks {
            let (cluster, run) = self.run_at(self.place(number));
            let window_left = WINDOW - number % WINDOW;
            let most = if self.has_parity {
                window_left
            } else {
                u32::MAX
            };
            let count = run.min(per_read).min(most).min(self.blocks - number);
            let part = &mut part[..self.size.len() * index(count)];
            let is_read = self.read(storage, cluster, part);
            for (number, block) in (number..).zip(part.chunks_mut(self.size.len())) {
                // One that cannot be read leaves the others.
                let is_read = match &is_read {
                    Ok(()) => Ok(()),
                    Err(_) => self.read(storage, self.run_at(self.place(number)).0, block),
                };
                self.visit_block(storage, number, is_read, block, visit)?;
            }
            number += count;
        }
        Ok(())
    }

    fn visit_block(
        &mut self,
        storage: &dyn Storage,
        number: u32,
        is_read: Result<(), PoolError>,
        block: &[u8],
        visit: Visit<'_>,
    ) -> Result<(), PoolError> {
        let error = match (is_read, unseal_block(self.stamp, number, block)) {
            (Ok(()), Ok(tokens)) => return visit(Ok(tokens)),
            (Ok(()), Err(e)) => Ok(e),
            (Err(e), _) => Err(e),
        };
        let made = self.make_up_for(storage, number);
        let made = made
            .as_deref()
            .map(|made| unseal_block(self.stamp, number, made));
        match (made, error) {
            (Some(Ok(tokens)), error) => {
                let what = error.map_or_else(|e| e.to_string(), |e| e.to_string());
                self.tell(format!("block {number}: {what}"));
                visit(Ok(tokens))
            }
            (Some(Err(_)) | None, Ok(damage)) => visit(Err((damage, block))),
            (Some(Err(_)) | None, Err(failed)) => Err(failed),
        }
    }

    /// Block `number` from the others of its parity block; `None` if one of them cannot be read.
    fn make_up_for(&self, storage: &dyn Storage, number: u32) -> Option<AlignedBuf> {
        if !self.has_parity {
            return None;
        }
        let mut sum = AlignedBuf::new(self.size.len());
        let mut block = AlignedBuf::new(self.size.len());
        let others = self.group(number).filter(|other| *other != number);
        let places = others.map(|other| self.place(other));
        for place in places.chain([self.parity_place(number)]) {
            self.read(storage, self.run_at(place).0, &mut block).ok()?;
            add_parity(&mut sum, &block);
        }
        Some(sum)
    }

    /// Blocks that share the parity block of block `number`.
    fn group(&self, number: u32) -> impl Iterator<Item = u32> + use<> {
        let first = number - number % WINDOW + number % PARITY_BLOCKS;
        let end = (number - number % WINDOW)
            .saturating_add(WINDOW)
            .min(self.blocks);
        (first..end).step_by(index(PARITY_BLOCKS))
    }

    /// Where block `number` stands among all that are listed.
    fn place(&self, number: u32) -> u32 {
        match self.has_parity {
            true => number + number / WINDOW * PARITY_BLOCKS,
            false => number,
        }
    }

    /// Where the parity block of block `number` stands.
    fn parity_place(&self, number: u32) -> u32 {
        let window = number - number % WINDOW;
        let len = WINDOW.min(self.blocks - window);
        let groups = len.min(PARITY_BLOCKS);
        // They go on where the blocks end, so that no two neighbours are of one group.
        let after = (number % PARITY_BLOCKS + groups - len % groups) % groups;
        self.place(window) + len + after
    }

    /// The cluster of the one that stands at `place`, and how many follow it in a row with it.
    fn run_at(&self, place: u32) -> (u32, u32) {
        let after = self.listed.partition_point(|(first, _)| *first <= place);
        // All places are listed: their number was compared.
        let (first, extent) = self.listed[after - 1];
        let from = place - first;
        (extent.start + from, extent.count - from)
    }

    /// Reads the parity blocks, too, and tells which of them would make up for nothing.
    ///
    /// # Errors
    /// The store failed.
    pub(super) fn check_parity(&mut self, storage: &dyn Storage) -> Result<(), PoolError> {
        if !self.has_parity {
            return Ok(());
        }
        let mut sum = AlignedBuf::new(self.size.len());
        let mut block = AlignedBuf::new(self.size.len());
        let firsts = (0..self.blocks).filter(|number| number % WINDOW < PARITY_BLOCKS);
        for first in firsts {
            sum.fill(0);
            let members = self.group(first).map(|number| self.place(number));
            let mut is_whole = true;
            for place in members.chain([self.parity_place(first)]) {
                is_whole &= self.read(storage, self.run_at(place).0, &mut block).is_ok();
                add_parity(&mut sum, &block);
            }
            if !is_whole || sum.iter().any(|byte| *byte != 0) {
                let cluster = self.run_at(self.parity_place(first)).0;
                self.tell(format!(
                    "the parity in cluster {cluster} is not that of its blocks"
                ));
            }
        }
        Ok(())
    }

    fn read(&self, storage: &dyn Storage, cluster: u32, block: &mut [u8]) -> Result<(), PoolError> {
        let read = storage.read_at(block, self.size.offset(Cluster(cluster)));
        read.map_err(PoolError::storage("reading the checkpoint image"))
    }
}
