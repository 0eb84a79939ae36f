//! Reading a map entry: where the data of a sub-cluster is.

use crate::format::journal::Entry;
use crate::format::units::Cluster;

/// Where a sub-cluster's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the same sub-cluster of this cluster of the pool.
    Pool(Cluster),
    /// Nowhere: it reads as zeros.
    Zero,
    /// In the base, or nowhere if there is none.
    Below,
}

impl Entry {
    /// Where the data of sub-cluster `sub` (0..16) is. At most two clusters deep, by I3.
    #[must_use]
    pub fn place(&self, sub: u32) -> Place {
        let bit = 1_u16 << sub;
        if self.alloc & bit != 0 {
            Place::Pool(Cluster(self.own))
        } else if self.zero & bit != 0 {
            Place::Zero
        } else if self.under != 0 {
            Place::Pool(Cluster(self.under))
        } else {
            Place::Below
        }
    }

    /// Sub-clusters in neither mask: they come from `under` or below.
    #[must_use]
    pub fn rest(&self) -> u16 {
        !(self.alloc | self.zero)
    }

    /// The clusters it refers to, 0 where there is none.
    #[must_use]
    pub fn clusters(&self) -> [u32; 2] {
        [self.own, self.under]
    }

    /// Whether it refers to `cluster`.
    #[must_use]
    pub fn refers_to(&self, cluster: u32) -> bool {
        cluster != 0 && (self.own == cluster || self.under == cluster)
    }

    /// What is impossible about it in a pool whose data clusters are `first..count`.
    #[must_use]
    pub fn fault(&self, first: u32, count: u32) -> Option<&'static str> {
        let is_outside = |c: u32| c != 0 && !(first..count).contains(&c);
        if is_outside(self.own) || is_outside(self.under) {
            Some("a cluster outside the data area")
        } else if self.own != 0 && self.own == self.under {
            Some("own and under are the same cluster")
        } else if self.alloc & self.zero != 0 {
            Some("a sub-cluster both allocated and zero")
        } else if self.own == 0 && self.alloc != 0 {
            Some("an allocated sub-cluster without a cluster")
        } else {
            None
        }
    }
}
