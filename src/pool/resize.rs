//! Growing and shrinking a pool.

use super::Pool;
use super::error::PoolError;
use super::open::POOL_LEN_MIN;
use std::ops::Range;

impl Pool {
    /// Makes the pool `size` bytes long, rounded down to clusters. It shrinks only as far as
    /// nothing is in the way: clusters are not moved.
    ///
    /// # Errors
    /// A size out of range, something in the way, a block device of another size, or the store
    /// failed.
    pub fn resize(&self, size: u64) -> Result<(), PoolError> {
        self.check_writable()?;
        let cluster = self.cluster_size;
        let len = size / cluster.bytes() * cluster.bytes();
        let count = cluster.count(len).filter(|count| *count < u32::MAX);
        let superblock = self.superblock();
        let metadata_end = superblock.metadata_end() + cluster.bytes();
        let Some(count) = count.filter(|_| len >= POOL_LEN_MIN.max(metadata_end)) else {
            return Err(PoolError::invalid(format!(
                "a pool with this cluster size has {} to {} bytes, not {size}",
                POOL_LEN_MIN.max(metadata_end),
                cluster.disk_bytes_max()
            )));
        };
        if count < superblock.cluster_count {
            self.flush()?;
            self.take_back_slabs();
            while self.reap(usize::MAX) {}
            self.punch_written(u32::MAX)?;
        }
        // Whoever leads is alone: two at once would each go by what the other is changing.
        self.lead_for(|_| {
            let now = self.superblock().cluster_count;
            if count >= now {
                self.grow(now, count)
            } else {
                self.shrink(now, count)
            }
        })?;
        self.keep_image_reserve();
        Ok(())
    }

    /// Called with the lead. Needs no batch, and so no space: it is the way out of a full pool.
    fn grow(&self, from: u32, to: u32) -> Result<(), PoolError> {
        let growing = || PoolError::storage("growing the pool");
        let len = u64::from(to) * self.cluster_size.bytes();
        if self.storage.len().map_err(growing())? < len {
            self.storage.set_len(len).map_err(growing())?;
            // A new length is durable after a flush, and must be before the superblock says so.
            let flushed = self.storage.flush();
            flushed.map_err(|e| self.poison("flushing the pool's new length", e))?;
        }
        self.set_cluster_count(to)?;
        self.space.add_clean(from..to);
        Ok(())
    }

    /// Called with the lead.
    fn shrink(&self, from: u32, to: u32) -> Result<(), PoolError> {
        let taken = self.space.take_clean_in(to..from);
        if let Err(e) = self.check_shrink(&taken, from, to) {
            for run in taken {
                self.space.give_back(run, false).wake();
            }
            return Err(e);
        }
        self.set_cluster_count(to)?;
        let len = u64::from(to) * self.cluster_size.bytes();
        // A block device keeps its length: the pool is just smaller than it.
        match self.storage.set_len(len) {
            Err(e) if e.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            result => result.map_err(PoolError::storage("shrinking the pool")),
        }
    }

    /// `Err` unless the clusters `taken` are all of `to..from`, and can be spared.
    fn check_shrink(&self, taken: &[Range<u32>], from: u32, to: u32) -> Result<(), PoolError> {
        let free: u32 = taken.iter().map(|run| run.end - run.start).sum();
        if free < from - to {
            // The last run reaches the end unless the last cluster is used.
            let last_used = match taken.last() {
                Some(run) if run.end == from => run.start,
                Some(_) | None => from,
            };
            let least = u64::from(last_used) * self.cluster_size.bytes();
            return Err(PoolError::invalid(format!(
                "data lies beyond that size; without moving it the pool can have {least} bytes \
                 or more"
            )));
        }
        let left = self.space.usage();
        let free = left.clean.saturating_add(left.written);
        if free < left.reserved {
            return Err(PoolError::invalid(format!(
                "{} bytes of what would be left are kept for disks with a reserve and for the \
                 pool's own use, and it would have {} free",
                u64::from(left.reserved) * self.cluster_size.bytes(),
                u64::from(free) * self.cluster_size.bytes()
            )));
        }
        Ok(())
    }

    fn set_cluster_count(&self, count: u32) -> Result<(), PoolError> {
        let mut superblock = self.superblock();
        superblock.cluster_count = count;
        self.write_superblock(superblock)
    }
}
