//! The clusters a disk has set aside for its next writes: a run, so that what is written together
//! lies together.

use super::error::PoolError;
use super::space::{Purpose, Space, Taken};
use super::woken::Woken;
use std::ops::Range;

/// Most clusters a disk sets aside.
const CLUSTERS_MAX: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Slab {
    clusters: Range<u32>,
    is_written: bool,
    is_reserved: bool,
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
    /// The next cluster; more are set aside if none is left, from what is reserved for the disk
    /// while there is any (`reserve_left`, clusters).
    ///
    /// # Errors
    /// [`PoolError::NoSpace`].
    pub(super) fn take(
        &mut self,
        space: &Space,
        reserve_left: &mut u32,
    ) -> Result<NewCluster, PoolError> {
        if self.clusters.is_empty() {
            self.is_reserved = *reserve_left > 0;
            let taken = if self.is_reserved {
                space.take(CLUSTERS_MAX.min(*reserve_left), Purpose::ReservedData)?
            } else {
                space.take(CLUSTERS_MAX, Purpose::Data)?
            };
            let Taken {
                clusters,
                is_written,
            } = taken;
            if self.is_reserved {
                *reserve_left -= clusters.end - clusters.start;
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

    /// Gives back what was not used. What was reserved is reserved again: the promise stays.
    /// Returns who waits for space.
    pub(super) fn give_back(&mut self, space: &Space, reserve_left: &mut u32) -> Woken {
        if self.is_reserved {
            *reserve_left += self.len();
            space.change_disk_reserve(i64::from(self.len()));
        }
        space.give_back(std::mem::take(&mut self.clusters), self.is_written)
    }

    /// Clusters set aside and not used.
    pub(super) fn len(&self) -> u32 {
        self.clusters.end - self.clusters.start
    }
}
