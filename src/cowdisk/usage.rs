//! Who uses how much: what each disk refers to, what deleting it would give back, and what of that
//! holds nothing. Counted from the maps, so it is exact while nothing changes, and close otherwise.

use super::error::DiskError;
use crate::format::units::{SUBS, bytes_of};
use crate::pool::by_cluster::ByCluster;
use crate::pool::map::{Inner, Leaf};
use crate::pool::{Pool, PoolError, catalogue::Item};
use crate::sync::Shared;
use std::collections::HashMap;

/// The space of one disk or snapshot, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskUsage {
    /// Clusters its map refers to.
    pub used: u64,
    /// Of those, the ones others refer to as well.
    pub shared: u64,
    /// Of those, the ones only it refers to: what deleting it gives back.
    pub unique: u64,
    /// Of the unique ones, blocks that hold no data of it: what copying it elsewhere would save.
    pub reclaimable: u64,
    /// What counts towards a disk's limit: data of its own, allocated since it was created or forked.
    /// `None` for a disk with neither limit nor reserve.
    pub counted: Option<u64>,
    /// What of its reserve is not used by data that it alone has: kept free for it. `None` likewise.
    pub reserve_left: Option<u64>,
}

/// The space of a pool, bytes. `capacity = metadata + used + free`.
#[derive(Debug, Clone)]
pub struct PoolUsage {
    /// What the pool may grow to.
    pub capacity: u64,
    /// Superblocks, journal and checkpoint image.
    pub metadata: u64,
    /// Clusters that hold data.
    pub used: u64,
    /// Clusters that hold none.
    pub free: u64,
    /// Of the free ones, kept back for checkpoint images and for disks with a reserve.
    pub reserved: u64,
    /// What the host has allocated to the pool's file.
    pub host_allocated: u64,
    /// Sum over the disks of [`DiskUsage::reclaimable`].
    pub reclaimable: u64,
    /// Disks and snapshots in the order of their names.
    pub disks: Vec<(Item, DiskUsage)>,
}

/// Measures a pool and its disks. Takes time with the size of the maps (not of the data), each
/// shared part looked at once; a disk's requests wait while its own part is looked at.
///
/// # Errors
/// As [`Pool::flush`], or the store cannot tell its size.
pub fn usage(pool: &Pool) -> Result<PoolUsage, DiskError> {
    pool.flush()?;
    while pool.reap(usize::MAX) {}
    let size = pool.cluster_size();
    let superblock = pool.superblock();
    let mut survey = Survey {
        nodes: HashMap::new(),
        references: ByCluster::new(superblock.cluster_count, false)?,
        is_void: false,
    };
    let items = pool.items();
    let mut used = Vec::with_capacity(items.len());
    let mut set_aside = 0;
    for item in &items {
        let map = item.volume.map.read();
        used.push(map.tree.root.as_ref().map_or(0, |root| survey.visit(root)));
        set_aside += map.slab_len();
    }
    if survey.is_void {
        return Err(PoolError::NoMemory.into());
    }
    let mut disks = Vec::with_capacity(items.len());
    for (item, used) in items.into_iter().zip(used) {
        let map = item.volume.map.read();
        let mut sums = Sums::default();
        if let Some(root) = &map.tree.root {
            survey.sum(root, &mut sums);
        }
        let account = Some(&map.account).filter(|account| account.is_counted());
        let counted = account.map(|account| account.held().subs * size.sub_bytes());
        let set_aside = u64::from(map.slab_len());
        let reserve_left = account.map(|account| match account.reserve() {
            0 => 0,
            _ => (u64::from(account.kept()) + set_aside) * size.bytes(),
        });
        drop(map);
        let unique = sums.unique * size.bytes();
        let used = used * size.bytes();
        let usage = DiskUsage {
            used,
            shared: used.saturating_sub(unique),
            unique,
            reclaimable: sums.dead_subs * size.sub_bytes(),
            counted,
            reserve_left,
        };
        disks.push((item, usage));
    }
    let space = pool.space.usage();
    let capacity = superblock.pool_len();
    let pieces = survey.references.pieces();
    let counts = pieces.flat_map(|(_, counts)| counts);
    let data = counts.filter(|count| **count > 0).count();
    let used = bytes_of(data) * size.bytes();
    let free = u64::from(space.clean + space.written + set_aside) * size.bytes();
    let host_allocated = pool.storage().allocated();
    Ok(PoolUsage {
        capacity,
        metadata: capacity.saturating_sub(used + free),
        used,
        free,
        reserved: u64::from(space.reserved) * size.bytes(),
        host_allocated: host_allocated.map_err(PoolError::storage("measuring the pool's file"))?,
        reclaimable: disks.iter().map(|(_, usage)| usage.reclaimable).sum(),
        disks,
    })
}

/// What is known about a node that several parents may have.
struct Node {
    parents: u32,
    clusters: u64,
}

struct Survey {
    /// Nodes that may be shared, by address.
    nodes: HashMap<usize, Node>,
    /// By cluster: leaves that refer to it, up to 255.
    references: ByCluster<u8>,
    /// There was not enough memory: nothing that was counted holds.
    is_void: bool,
}

#[derive(Debug, Default)]
struct Sums {
    unique: u64,
    dead_subs: u64,
}

/// A node of a map.
trait Visit: Sized {
    /// Counts the clusters below, and the references that were not counted before.
    fn count(&self, survey: &mut Survey) -> u64;
    /// Adds what only one disk reaches; the node is one of those.
    fn sum(&self, survey: &Survey, sums: &mut Sums);
}

impl Survey {
    /// Clusters below `node`; it has one parent more.
    fn visit<N: Visit>(&mut self, node: &Shared<N>) -> u64 {
        if Shared::strong_count(node) == 1 {
            return node.count(self);
        }
        let address = Shared::as_ptr(node).addr();
        if let Some(known) = self.nodes.get_mut(&address) {
            known.parents += 1;
            return known.clusters;
        }
        let clusters = node.count(self);
        let parents = 1;
        self.nodes.insert(address, Node { parents, clusters });
        clusters
    }

    fn sum<N: Visit>(&self, node: &Shared<N>, sums: &mut Sums) {
        let address = Shared::as_ptr(node).addr();
        let is_shared = Shared::strong_count(node) > 1
            && self
                .nodes
                .get(&address)
                .is_some_and(|node| node.parents > 1);
        if !is_shared {
            node.sum(self, sums);
        }
    }
}

impl<C: Visit> Visit for Inner<C> {
    fn count(&self, survey: &mut Survey) -> u64 {
        let children = self.child.iter().flatten();
        children.map(|child| survey.visit(child)).sum()
    }

    fn sum(&self, survey: &Survey, sums: &mut Sums) {
        for child in self.child.iter().flatten() {
            survey.sum(child, sums);
        }
    }
}

impl Visit for Leaf {
    fn count(&self, survey: &mut Survey) -> u64 {
        let mut clusters = 0;
        for cluster in self.entries.iter().flat_map(|entry| entry.clusters()) {
            if cluster == 0 {
                continue;
            }
            if survey.references.get_mut(cluster).is_none() {
                survey.is_void |= survey.references.make(cluster).is_err();
            }
            if let Some(count) = survey.references.get_mut(cluster) {
                *count = count.saturating_add(1);
                clusters += 1;
            }
        }
        clusters
    }

    fn sum(&self, survey: &Survey, sums: &mut Sums) {
        let is_unique = |cluster: u32| cluster != 0 && survey.references.get(cluster) == 1;
        for entry in &self.entries {
            let live = [entry.alloc, entry.rest()];
            for (cluster, live) in entry.clusters().into_iter().zip(live) {
                if is_unique(cluster) {
                    sums.unique += 1;
                    sums.dead_subs += u64::from(SUBS - live.count_ones());
                }
            }
        }
    }
}
