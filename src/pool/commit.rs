//! Making changes durable, in rounds. Whoever needs one leads (holding the journal is leadership; no
//! lock is held over the I/O) and begins a round: what all disks have changed until then is in it, and
//! is written in as many batches as it takes. Those who come meanwhile are covered by the next round,
//! however many they are (group commit). So a flush waits for two rounds at most, what changes after
//! its own began is in neither, and a round is no longer than what disks may have pending
//! ([`super::backlog::BACKLOG_MAX`] each). Between two batches others may lead, in turn.
//!
//! The order is R2: the batch is closed, then the data it names is flushed, then the batch is
//! written. Only then are the references it dropped released, after the requests that may still
//! use them (R3, R5, R6).

use super::Pool;
use super::backlog::{BACKLOG_MAX, Changes, FREED_LEN_SOFT};
use super::error::PoolError;
use super::gate::ClosedGates;
use super::journal::{BATCH_LEN_MAX, Journal, LONG_BATCH_LEN_MAX, records_per_batch};
use super::lead::Leader;
use super::transaction::Transaction;
use super::volume::{Map, Volume};
use crate::format::journal::HEADER_LEN;
use crate::format::units::{BLOCK, bytes_of};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, RwLockWriteGuard};

/// Room a leader makes sure of: a full batch, and as much again for its tail.
pub(super) const ROOM: u64 = 2 * BATCH_LEN_MAX;
/// Bytes of records a structural change may add of its own, unless it says so: what is left of
/// [`ROOM`] after a full batch (with one leaf more) and the records of drained disks.
pub const SMALL_CHANGE_LEN_MAX: u64 = 96 << 10;
/// Records a drained disk may add to a batch that is full already.
const TAIL_RECORDS_MAX: usize = 4096;
/// Times a structural change waits for a disk to have few changes before it gives up.
const DRAIN_TRIES_MAX: u32 = 64;

/// What becomes of what disks have changed.
#[derive(Debug, Clone, Copy)]
enum Others {
    /// It is in the same batch.
    TakenAlong,
    /// It waits for the next round.
    LeftOut,
}

impl Pool {
    /// Makes everything that completed before this call durable.
    ///
    /// # Errors
    /// The pool is poisoned, by this flush or an earlier one, or (nothing is lost then) there is
    /// no space for a checkpoint image.
    pub fn flush(&self) -> Result<(), PoolError> {
        if self.is_read_only {
            return Ok(());
        }
        let mine = self.commits.state.lock().begun + 1;
        while let Some(leader) = self.lead(mine)? {
            self.commit_some(leader)?;
        }
        self.check_poison()
    }

    /// One batch of the round under way, which begins if there is none.
    fn commit_some(&self, mut leader: Leader<'_>) -> Result<(), PoolError> {
        self.begin_round();
        // Nothing recorded needs no room: overwrites go on to be flushed in a full pool.
        let room = match self.commits.round.lock().is_empty() {
            true => 0,
            false => ROOM,
        };
        if !self.make_room(&mut leader, room)? {
            self.wait_with_journal_free(leader);
            return Ok(());
        }
        let mut transaction = Transaction::new(self);
        self.collect_round(&mut transaction)?;
        self.end_commit(leader, transaction)
    }

    /// Writes a batch, and ends the round if that was its last.
    fn end_commit(
        &self,
        mut leader: Leader<'_>,
        transaction: Transaction<'_>,
    ) -> Result<(), PoolError> {
        let result = self.write_batch(leader.journal(), transaction);
        if result.is_ok() && self.commits.round.lock().is_empty() {
            let mut state = self.commits.state.lock();
            state.finished = state.begun;
        }
        drop(leader);
        self.after_commit();
        result
    }

    /// Called with the lead. What completed before a round begins is in it.
    fn begin_round(&self) {
        {
            let mut state = self.commits.state.lock();
            if state.begun > state.finished {
                return;
            }
            state.begun += 1;
        }
        self.wants_commit.store(false, Ordering::SeqCst);
        let listed = std::mem::take(&mut *self.listed.lock());
        for volume in &listed {
            volume.map.write().close_backlog();
        }
        *self.commits.round.lock() = listed.into();
    }

    /// Called with the lead: as much of the round as one batch takes.
    fn collect_round(&self, transaction: &mut Transaction<'_>) -> Result<(), PoolError> {
        let mut changes = Changes::default();
        loop {
            let Some(volume) = self.commits.round.lock().front().cloned() else {
                break;
            };
            let (is_done, woken) = {
                let mut map = volume.map.write();
                map.collect_closed(records_per_batch(), self.shelf(), &mut changes)
            };
            transaction.woken.join(woken);
            if !is_done {
                break;
            }
            self.commits.round.lock().pop_front();
        }
        transaction.add(changes)
    }

    /// A round was begun and is not finished: whoever began it has failed, or is at it.
    pub(super) fn is_in_round(&self) -> bool {
        let state = self.commits.state.lock();
        state.begun > state.finished
    }

    /// Runs `change` alone, with every request of `drained` over and no new one begun (R7), and
    /// makes what it records durable as one atom, together with what changed before, as far as one
    /// batch takes that.
    ///
    /// `change` checks first and fails before it changes anything. Besides the changes of `drained`
    /// it records [`SMALL_CHANGE_LEN_MAX`] bytes at most.
    ///
    /// # Errors
    /// What `change` says, or as [`Pool::flush`].
    pub fn transact<T>(
        &self,
        drained: &[Arc<Volume>],
        change: impl FnMut(&mut Transaction<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        self.transact_large(drained, SMALL_CHANGE_LEN_MAX, change)
    }

    /// As [`Pool::transact`], for a change that records up to `len` bytes of its own.
    ///
    /// # Errors
    /// As [`Pool::transact`]; so long a change does not fit the journal.
    pub fn transact_large<T>(
        &self,
        drained: &[Arc<Volume>],
        len: u64,
        change: impl FnMut(&mut Transaction<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        self.check_writable()?;
        let room = (ROOM - SMALL_CHANGE_LEN_MAX).saturating_add(len);
        let room_max = self
            .superblock
            .lock()
            .journal_half_len
            .min(LONG_BATCH_LEN_MAX);
        if room > room_max {
            return Err(PoolError::invalid(format!(
                "this change has {len} bytes of records, and this pool's journal takes {} at \
                 once: do it in parts",
                room_max - (ROOM - SMALL_CHANGE_LEN_MAX)
            )));
        }
        for _ in 0..DRAIN_TRIES_MAX {
            let leader = self.lead_alone(room)?;
            let gates = ClosedGates::close(drained);
            let pending: usize = drained
                .iter()
                .map(|volume| volume.map.read().pending_max())
                .sum();
            if pending > TAIL_RECORDS_MAX {
                drop(gates);
                drop(leader);
                self.flush()?;
                continue;
            }
            return self.run_alone(leader, gates, Others::TakenAlong, change);
        }
        Err(PoolError::InUse {
            name: "a disk under very heavy load".to_owned(),
        })
    }

    /// As [`Pool::transact_large`], for a change that gives space back and collects nothing from
    /// `drained`, while the pool is so full that not even an image has space: what else has changed
    /// is not taken along, so the rest of a full journal suffices. A long batch leaves enough of it
    /// for nearly 900 removals in one, or for seven, one by one.
    ///
    /// # Errors
    /// As [`Pool::transact`].
    pub fn transact_in_rest<T>(
        &self,
        drained: &[Arc<Volume>],
        len: u64,
        change: impl FnMut(&mut Transaction<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        self.check_writable()?;
        let room = bytes_of(HEADER_LEN).saturating_add(len);
        let leader = self.lead_alone(room.next_multiple_of(BLOCK))?;
        let gates = ClosedGates::close(drained);
        self.run_alone(leader, gates, Others::LeftOut, change)
    }

    /// Runs `change` with the lead and drained disks, which are let go of when it is done.
    fn run_alone<T>(
        &self,
        leader: Leader<'_>,
        gates: ClosedGates<'_>,
        others: Others,
        mut change: impl FnMut(&mut Transaction<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        let mut transaction = Transaction::new(self);
        if matches!(others, Others::TakenAlong) {
            self.begin_round();
            self.collect_round(&mut transaction)?;
        }
        let outcome = change(&mut transaction);
        drop(gates);
        self.end_commit(leader, transaction)?;
        outcome
    }

    /// Writes a batch, after the data it names.
    fn write_batch(
        &self,
        journal: &mut Journal,
        transaction: Transaction<'_>,
    ) -> Result<(), PoolError> {
        let Transaction {
            batch,
            drops,
            woken,
            ..
        } = transaction;
        woken.wake();
        if journal.wants_image() {
            self.freeze_once(journal.last_seq() + u64::from(!batch.is_empty()));
        }
        // Every write that completed before the batch was closed is covered: the mark is taken
        // back before the flush, not after.
        if self.unflushed.swap(false, Ordering::SeqCst) {
            let flushed = self.storage.flush();
            flushed.map_err(|e| self.poison("flushing data", e))?;
        }
        if !batch.is_empty() {
            let written = journal.write(&*self.storage, batch);
            written.map_err(|e| self.poison("writing the journal", e))?;
        }
        self.retire(drops);
        Ok(())
    }

    /// So much has changed that it should be committed, and there is no background thread to do it:
    /// what is not in the journal takes memory.
    #[must_use]
    pub fn wants_commit(&self) -> bool {
        self.wants_commit.load(Ordering::Relaxed) && !self.has_background()
    }

    /// Whether the disk has changed so much since the last commits that its next changes wait for
    /// one, and those of no other disk. Without a background thread nobody waits: who changes
    /// something commits, too ([`Pool::wants_commit`]).
    #[must_use]
    pub fn must_wait(&self, map: &Map) -> bool {
        map.backlog_len() >= BACKLOG_MAX && self.has_background()
    }

    /// Wakes all who wait for a commit.
    pub(super) fn wake_stalled(&self) {
        let volumes: Vec<_> =
            self.with_catalogue(|all| all.iter().map(|item| Arc::clone(&item.volume)).collect());
        for volume in volumes {
            let woken = volume.map.write().take_stalled();
            woken.wake();
        }
    }

    /// Puts `volume` on the list of those with changes; called with its map locked.
    pub fn list_changes(&self, volume: &Arc<Volume>, map: &mut RwLockWriteGuard<'_, Map>) {
        if !map.is_listed && map.has_changes() {
            map.is_listed = true;
            self.listed.lock().push(Arc::clone(volume));
        }
        let freed_max = FREED_LEN_SOFT / self.cluster_size.bytes();
        let freed_max = u32::try_from(freed_max).unwrap_or(u32::MAX);
        if map.wants_commit(freed_max) && !self.wants_commit.load(Ordering::Relaxed) {
            self.wants_commit.store(true, Ordering::SeqCst);
            self.hurry();
        }
    }

    /// What follows every commit: without a background thread, the work that waits is done here.
    fn after_commit(&self) {
        if self.has_background() {
            self.work.notify_one();
        } else {
            // A failed image is tried again when the journal is full, where the error is told.
            drop(self.write_frozen_image());
            self.reap(usize::MAX);
        }
    }
}
