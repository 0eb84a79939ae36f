//! Counting what is in flight. A [`Gate`] lets a disk be drained before its map is forked or
//! deleted (R7). [`Epochs`] tell when everything that began before some moment is over, so that a
//! cluster dropped at that moment can be given to somebody else (R6).

use super::volume::Volume;
use super::woken::Waiters;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex};
use std::task::Waker;

/// Counters a gate or the epochs are spread over, so that workers do not share a cache line.
pub const SHARDS: usize = 4;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter(AtomicU64);

/// In-flight requests of one disk. Open unless somebody is draining it.
#[derive(Debug, Default)]
pub struct Gate {
    inside: [Counter; SHARDS],
    is_closed: AtomicBool,
    /// Lock order: taken last, held over no call.
    waiting: Mutex<Waiters>,
    emptied: Condvar,
}

impl Gate {
    /// Counts one request in, unless the gate is closed; then `waker` is woken when it opens.
    pub fn enter(&self, shard: usize, waker: &Waker) -> bool {
        // SeqCst: either `close` sees this count, or this sees the gate closed.
        self.inside[shard % SHARDS].0.fetch_add(1, Ordering::SeqCst);
        if !self.is_closed.load(Ordering::SeqCst) {
            return true;
        }
        self.leave(shard);
        let mut waiting = self.waiting.lock();
        if self.is_closed.load(Ordering::SeqCst) {
            waiting.push(waker.clone());
        } else {
            drop(waiting);
            waker.wake_by_ref();
        }
        false
    }

    /// Counts it out again.
    pub fn leave(&self, shard: usize) {
        self.inside[shard % SHARDS].0.fetch_sub(1, Ordering::SeqCst);
        if self.is_closed.load(Ordering::SeqCst) {
            // The lock keeps this from falling between a drainer's look and its sleep.
            drop(self.waiting.lock());
            self.emptied.notify_all();
        }
    }

    /// Lets nobody in and waits until everybody is out. One closer at a time: the caller leads the
    /// pool's commits.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        let mut waiting = self.waiting.lock();
        while self
            .inside
            .iter()
            .any(|count| count.0.load(Ordering::SeqCst) != 0)
        {
            self.emptied.wait(&mut waiting);
        }
    }

    /// Lets everybody in again.
    pub fn open(&self) {
        let woken = {
            let mut waiting = self.waiting.lock();
            self.is_closed.store(false, Ordering::SeqCst);
            waiting.take()
        };
        woken.wake();
    }
}

/// Gates of drained disks, opened when dropped.
pub(super) struct ClosedGates<'a> {
    volumes: &'a [Arc<Volume>],
}

impl<'a> ClosedGates<'a> {
    pub(super) fn close(volumes: &'a [Arc<Volume>]) -> Self {
        for volume in volumes {
            volume.gate.close();
        }
        Self { volumes }
    }
}

impl Drop for ClosedGates<'_> {
    fn drop(&mut self) {
        for volume in self.volumes {
            volume.gate.open();
        }
    }
}

/// Epoch-based waiting over all requests of a pool. Requests of two epochs can be in flight.
#[derive(Debug, Default)]
pub struct Epochs {
    current: AtomicU64,
    inside: [[Counter; 2]; SHARDS],
}

impl Epochs {
    /// Counts one request in; returns its epoch, to be given back to [`Epochs::leave`].
    pub fn enter(&self, shard: usize) -> u64 {
        loop {
            let epoch = self.current.load(Ordering::SeqCst);
            let count = &self.inside[shard % SHARDS][slot(epoch)].0;
            count.fetch_add(1, Ordering::SeqCst);
            // Had the epoch moved on between the two, this would be counted in one that
            // `try_advance` looks at too late.
            if self.current.load(Ordering::SeqCst) == epoch {
                return epoch;
            }
            count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Counts it out again.
    pub fn leave(&self, shard: usize, epoch: u64) {
        self.inside[shard % SHARDS][slot(epoch)]
            .0
            .fetch_sub(1, Ordering::SeqCst);
    }

    /// The epoch something dropped now belongs to: it is over when [`Epochs::current`] is two
    /// further.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::SeqCst)
    }

    /// Moves on to the next epoch if nothing of the one before this is in flight. One caller at a
    /// time. Returns the current epoch.
    pub fn try_advance(&self) -> u64 {
        let epoch = self.current();
        let before = slot(epoch + 1);
        if self
            .inside
            .iter()
            .all(|shard| shard[before].0.load(Ordering::SeqCst) == 0)
        {
            self.current.store(epoch + 1, Ordering::SeqCst);
        }
        self.current()
    }
}

fn slot(epoch: u64) -> usize {
    usize::from(epoch & 1 == 1)
}

// The checkers have no way to ask whether a thread is over.
#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;
    use crate::sync::spawn_named;

    #[test]
    fn a_closed_gate_waits_for_those_inside_and_turns_others_away() {
        let gate = Arc::new(Gate::default());
        assert!(gate.enter(0, Waker::noop()));
        let closer = {
            let gate = Arc::clone(&gate);
            spawn_named("closer", move || gate.close()).expect("a thread")
        };
        while gate.enter(1, Waker::noop()) {
            gate.leave(1);
        }
        assert!(!closer.is_finished(), "one request is still inside");
        gate.leave(0);
        closer.join().expect("no panic");
        assert!(!gate.enter(2, Waker::noop()));
        gate.open();
        assert!(gate.enter(2, Waker::noop()));
    }

    #[test]
    fn an_epoch_ends_only_after_all_that_began_before() {
        let epochs = Epochs::default();
        let old = epochs.enter(0);
        let dropped_at = epochs.current();
        epochs.try_advance();
        let newer = epochs.enter(3);
        for _ in 0..5 {
            assert!(
                epochs.try_advance() < dropped_at + 2,
                "the first request is still in flight"
            );
        }
        epochs.leave(0, old);
        epochs.try_advance();
        assert!(epochs.current() >= dropped_at + 2);
        epochs.leave(3, newer);
    }
}
