//! The clusters a disk has set aside for its next writes: a run, so that what is written together
//! lies together.

use super::account::Account;
use super::error::PoolError;
use super::space::{Purpose, Space, Taken};
use std::ops::Range;

/// Most clusters a disk sets aside.
const CLUSTERS_MAX: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Slab {
    clusters: Range<u32>,
    is_written: bool,
}

/// A cluster to write to.
#[derive(Debug, Clone, Copy)]
pub struct NewCluster {
    /// Its number.
    pub number: u32,
    /// It was written before, so that the host has blocks for it; otherwise it may be a hole.
    pub is_written: bool,
}

impl Slab {
    /// The next cluster; more are set aside if none is left, from what is kept for the disk while
    /// there is any.
    ///
    /// # Errors
    /// [`PoolError::NoSpace`].
    pub(super) fn take(
        &mut self,
        space: &Space,
        account: &mut Account,
    ) -> Result<NewCluster, PoolError> {
        if self.clusters.is_empty() {
            let (purpose, most) = account.purpose();
            let taken = space.take(CLUSTERS_MAX.min(most), purpose)?;
            let Taken {
                clusters,
                is_written,
            } = taken;
            if purpose == Purpose::ReservedData {
                account.take_kept(clusters.end - clusters.start);
            }
            self.clusters = clusters;
            self.is_written = is_written;
        }
        let number = self.clusters.next().ok_or(PoolError::NoSpace)?;
        Ok(NewCluster {
            number,
            is_written: self.is_written,
        })
    }

    /// Takes out what was not used, and whether it was written before.
    pub(super) fn empty(&mut self) -> (Range<u32>, bool) {
        (std::mem::take(&mut self.clusters), self.is_written)
    }

    /// Clusters set aside and not used.
    pub(super) fn len(&self) -> u32 {
        self.clusters.end - self.clusters.start
    }
}
