//! What a disk may take of the pool, and what is kept for it. A reserve is a promise of clusters that
//! are free: whether they are there is found, and they are promised, in one step.

use super::Pool;
use super::error::PoolError;
use super::map::Tree;
use super::space::Space;
use super::volume::{Map, Volume};
use super::walk::Seen;
use super::woken::Woken;
use crate::format::catalogue::Row;
use crate::format::units::ClusterSize;

/// Limit and reserve of a disk, and what counts for them.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    limit: Option<u64>,
    /// Sub-clusters allocated since the disk's birth.
    used_subs: u64,
    /// Clusters to be kept for it.
    reserve_left: u32,
}

impl Quota {
    /// That of `row`, for a disk with the map `tree`.
    #[must_use]
    pub fn of(row: &Row, tree: &Tree, size: ClusterSize) -> Self {
        let (mut used_subs, mut clusters) = (0_u64, 0_u32);
        let birth = row.birth_generation.0;
        // Without a limit or a reserve nothing is counted: a rollback takes no longer on a large
        // disk than on a small one.
        if row.limit.is_some() || row.reserve.is_some() {
            // Nothing that has clusters is in a map twice.
            Seen::default().walk(tree, &mut |_, _, leaf| {
                for entry in leaf.entries.iter().filter(|entry| entry.birth > birth) {
                    used_subs += u64::from(entry.alloc.count_ones());
                    clusters += u32::from(entry.own != 0);
                }
            });
        }
        let in_clusters = |bytes| size.count(bytes).unwrap_or(u32::MAX);
        let wanted = row.reserve.map_or(0, in_clusters);
        Self {
            limit: row.limit,
            used_subs,
            reserve_left: wanted.saturating_sub(clusters),
        }
    }
}

impl Pool {
    /// Keeps for each disk what its quota says, instead of what is kept now; for all of them or
    /// none. The disks are drained, or nobody knows them yet: none of them takes clusters meanwhile.
    ///
    /// # Errors
    /// There is less free than that. Nothing was changed.
    pub fn reserve(&self, disks: &[(&Volume, Quota)]) -> Result<(), PoolError> {
        let mut woken = Woken::default();
        let (mut wanted, mut more) = (0_u64, 0_i64);
        for (volume, quota) in disks {
            let mut map = volume.map.write();
            // What was set aside from the reserve is counted as reserved again.
            woken.join(map.drop_slab(&self.space));
            wanted += u64::from(quota.reserve_left);
            more += i64::from(quota.reserve_left) - i64::from(map.reserve_left);
        }
        woken.wake();
        self.space.try_reserve(more).map_err(|have| {
            let size = self.cluster_size.bytes();
            // What these disks have is theirs to use.
            let can = wanted
                .saturating_add_signed(-more)
                .saturating_add(u64::from(have));
            PoolError::invalid(format!(
                "{} bytes cannot be reserved: the pool has {} free and not reserved; give up or \
                 lower a reserve (`disk set --reserve`), or make room",
                wanted * size,
                can * size
            ))
        })?;
        for (volume, quota) in disks {
            volume.map.write().reserve_left = quota.reserve_left;
        }
        Ok(())
    }
}

impl Map {
    /// Sets the limit, and how much of it is used. What is reserved is set by [`Pool::reserve`].
    pub fn set_quota(&mut self, quota: &Quota, size: ClusterSize) {
        self.set_limit(quota.limit, size);
        self.used_subs = quota.used_subs;
    }

    /// Sets all of a quota when a pool opens: what was promised stays so, whatever there is.
    pub(super) fn restore_quota(&mut self, quota: &Quota, size: ClusterSize, space: &Space) {
        self.set_quota(quota, size);
        space.change_disk_reserve(i64::from(quota.reserve_left));
        self.reserve_left = quota.reserve_left;
    }
}
