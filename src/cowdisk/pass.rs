//! Leave to have a request in flight.

use super::disk::Handle;
use crate::sync::Arc;

/// Held by every request from before its plan until its I/O has completed: while it is held the
/// disk's map is not forked or deleted (R7), and no cluster it may use is given to somebody else
/// (R6). A request that must wait for another or for space gives its pass back first, or a fork
/// would wait for it.
#[derive(Debug)]
pub struct Pass {
    handle: Arc<Handle>,
    shard: usize,
    /// `None` while it is paused.
    epoch: Option<u64>,
}

impl Pass {
    /// For a request that the gate let in.
    pub(super) fn new(handle: &Arc<Handle>, shard: usize) -> Self {
        let epoch = handle.pool.epochs.enter(shard);
        Self {
            handle: Arc::clone(handle),
            shard,
            epoch: Some(epoch),
        }
    }

    /// Before a copy that takes as long as the base below likes: clusters that were dropped need not
    /// wait for it. What the copy itself uses is not dropped, because nothing else may change the
    /// entry that refers to it, and the disk is not forked or deleted. Nothing is planned until
    /// [`Pass::resume`].
    pub fn pause(&mut self) {
        if let Some(epoch) = self.epoch.take() {
            self.handle.pool.epochs.leave(self.shard, epoch);
        }
    }

    /// After the copy.
    pub fn resume(&mut self) {
        if self.epoch.is_none() {
            self.epoch = Some(self.handle.pool.epochs.enter(self.shard));
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.epoch.is_none()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.pause();
        self.handle.volume.gate.leave(self.shard);
    }
}
