//! Reading the blocks of a checkpoint image in the order of its extent lists.

use super::error::PoolError;
use super::journal::uuid_low;
use crate::format::image_block::{Extent, ImageStamp, unseal_head};
use crate::format::superblock::{ImageRef, Superblock};
use crate::format::units::{Cluster, ClusterSize, index};
use crate::storage::{AlignedBuf, Storage};
use std::collections::HashSet;
use std::ops::Range;

/// Bytes of an image read at once: a device asked for one cluster at a time is idle in between.
const READ_LEN: u64 = 4 << 20;

/// Called with the number and the bytes of a block.
type Visit<'a> = &'a mut dyn FnMut(u32, &[u8]) -> Result<(), PoolError>;

/// Where an image lies.
#[derive(Debug)]
pub(super) struct Extents {
    size: ClusterSize,
    /// What its blocks are marked with.
    pub stamp: ImageStamp,
    blocks: Vec<Extent>,
    /// Every cluster it takes, heads included.
    pub clusters: Vec<Range<u32>>,
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
    let size = superblock.cluster_size;
    let mut extents = Extents {
        size,
        stamp: ImageStamp {
            uuid_low: uuid_low(&superblock.uuid),
            seq: image.seq,
        },
        blocks: Vec::new(),
        clusters: Vec::new(),
    };
    extents.add_heads(storage, image, superblock.cluster_count)?;
    Ok(Some(extents))
}

impl Extents {
    fn add_heads(
        &mut self,
        storage: &dyn Storage,
        image: ImageRef,
        cluster_count: u32,
    ) -> Result<(), PoolError> {
        let mut block = AlignedBuf::new(self.size.len());
        let mut heads = HashSet::new();
        let mut head = image.head;
        while head != 0 {
            if !heads.insert(head) {
                return Err(PoolError::damaged(
                    "checkpoint image: its extent lists go round in a ring",
                ));
            }
            self.clusters.push(head..head + 1);
            self.read(storage, head, &mut block)?;
            let (found, next) = unseal_head(self.stamp, cluster_count, &block)?;
            self.blocks.extend(found);
            head = next;
        }
        // So few extents can name so many clusters, each many times, that this comes first.
        let named: u64 = self.blocks.iter().map(|one| u64::from(one.count)).sum();
        if named > u64::from(cluster_count) || named * self.size.bytes() != image.len {
            return Err(PoolError::damaged(format!(
                "checkpoint image: its extents have {named} clusters, and it has {} bytes",
                image.len
            )));
        }
        let runs = self
            .blocks
            .iter()
            .map(|one| one.start..one.start + one.count);
        self.clusters.extend(runs);
        Ok(())
    }

    /// Calls `visit` with the number and the bytes of each block.
    ///
    /// # Errors
    /// What `visit` says, or the store failed.
    pub(super) fn each_block(
        &self,
        storage: &dyn Storage,
        visit: Visit<'_>,
    ) -> Result<(), PoolError> {
        let per_read = u32::try_from(READ_LEN / self.size.bytes())
            .unwrap_or(1)
            .max(1);
        let mut part = AlignedBuf::new(self.size.len() * index(per_read));
        let mut number = 0_u32;
        for extent in &self.blocks {
            let end = extent.start + extent.count;
            let mut at = extent.start;
            while at < end {
                let count = per_read.min(end - at);
                let part = &mut part[..self.size.len() * index(count)];
                self.read(storage, at, part)?;
                for block in part.chunks(self.size.len()) {
                    visit(number, block)?;
                    number += 1;
                }
                at += count;
            }
        }
        Ok(())
    }

    fn read(&self, storage: &dyn Storage, cluster: u32, block: &mut [u8]) -> Result<(), PoolError> {
        let read = storage.read_at(block, self.size.offset(Cluster(cluster)));
        read.map_err(PoolError::storage("reading the checkpoint image"))
    }
}
