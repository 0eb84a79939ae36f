//! Checkpoint images of the maps as they are at one moment: frozen by sharing their roots, written
//! beside the traffic, and put in force by the superblock, so that a half of the journal can be
//! written again.

use super::Pool;
use super::error::PoolError;
use super::image::{Frozen, FrozenDisk};
use super::journal::Journal;
use super::lead::{FrozenState, ImageTurn};
use crate::format::units::{DiskId, Generation};
use crate::sync::atomic::Ordering;

impl Pool {
    /// Freezes the forest after batch `seq`, unless an image is on its way already.
    pub(super) fn freeze_once(&self, seq: u64) {
        let mut state = self.commits.state.lock();
        if matches!(state.frozen, FrozenState::None) {
            state.frozen = FrozenState::Waiting(Box::new(self.freeze(seq)));
        }
    }

    /// The forest as it is, consistent because structural changes wait for the leader, who calls.
    fn freeze(&self, seq: u64) -> Frozen {
        let catalogue = self.catalogue.read();
        let disks = catalogue.iter().map(|item| {
            let map = item.volume.map.read();
            let (last_fork, changed) = (map.last_fork, map.changed);
            FrozenDisk {
                row: item.row.clone(),
                tree: map.tree.clone(),
                last_fork,
                changed,
            }
        });
        Frozen {
            seq,
            generation: Generation(self.generation.load(Ordering::Relaxed)),
            next_disk: DiskId(self.next_disk.load(Ordering::Relaxed)),
            disks: disks.collect(),
        }
    }

    /// The journal is full: write an image of the forest before anything else. `false` if one is
    /// being written already: two would race, and the older one come into force last.
    pub(super) fn write_image_now(&self, journal: &mut Journal) -> Result<bool, PoolError> {
        let old = {
            let mut state = self.commits.state.lock();
            match std::mem::replace(&mut state.frozen, FrozenState::BeingWritten) {
                FrozenState::BeingWritten => return Ok(false),
                old @ (FrozenState::None | FrozenState::Waiting(_)) => old,
            }
        };
        let turn = ImageTurn(self);
        if let FrozenState::Waiting(frozen) = old {
            self.retire(frozen.into_dropped());
        }
        let frozen = self.freeze(journal.last_seq());
        let result = self
            .write_image(&frozen)
            .and_then(|written| self.adopt(written, journal));
        self.retire(frozen.into_dropped());
        drop(turn);
        result.map(|()| true)
    }

    /// Writes the image of a forest frozen by an earlier commit, if there is one. Requests and
    /// commits go on meanwhile.
    ///
    /// # Errors
    /// No space, or the store failed; the journal still has everything.
    pub fn write_frozen_image(&self) -> Result<bool, PoolError> {
        let frozen = {
            let mut state = self.commits.state.lock();
            match std::mem::replace(&mut state.frozen, FrozenState::BeingWritten) {
                FrozenState::Waiting(frozen) => frozen,
                other @ (FrozenState::None | FrozenState::BeingWritten) => {
                    state.frozen = other;
                    return Ok(false);
                }
            }
        };
        let turn = ImageTurn(self);
        let written = self.write_image(&frozen);
        self.retire(frozen.into_dropped());
        let result = written.and_then(|written| {
            let leader = self.lead(u64::MAX)?;
            let mut leader = leader.expect("no round has the largest number");
            self.adopt(written, leader.journal())
        });
        drop(turn);
        result.map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::commit::ROOM;
    use crate::pool::{CreateOptions, OpenOptions, open};
    use crate::storage::{SimStorage, Storage};
    use crate::sync::Arc;

    /// The older of two images that were written at once came into force last, and replay then
    /// missed the batches between them, which were overwritten by then.
    #[test]
    fn no_image_is_begun_while_another_is_being_written() {
        let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(16 << 20));
        open::create(&*storage, &CreateOptions::new(16 << 20)).expect("an empty pool");
        let pool = Pool::open(storage, &OpenOptions::default()).expect("opens");
        pool.commits.state.lock().frozen = FrozenState::BeingWritten;
        let mut leader = pool.lead_alone(ROOM).expect("nobody leads");
        let image = pool.write_image_now(leader.journal());
        assert_eq!(image.map_err(|e| e.to_string()), Ok(false));
        assert!(pool.superblock().image.is_none());
        pool.commits.state.lock().frozen = FrozenState::None;
        let image = pool.write_image_now(leader.journal());
        assert_eq!(image.map_err(|e| e.to_string()), Ok(true));
        assert!(pool.superblock().image.is_some());
    }
}
