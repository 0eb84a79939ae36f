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
    epoch: u64,
}

impl Pass {
    /// For a request that the gate let in.
    pub(super) fn new(handle: &Arc<Handle>, shard: usize) -> Self {
        let epoch = handle.pool.epochs.enter(shard);
        Self {
            handle: Arc::clone(handle),
            shard,
            epoch,
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.handle.pool.epochs.leave(self.shard, self.epoch);
        self.handle.volume.gate.leave(self.shard);
    }
}
