//! Making changes durable. Whoever needs it leads: takes the journal, closes a batch with what all
//! disks changed, and writes it; those who come meanwhile wait and are covered by the next batch
//! (group commit). Holding the journal is leadership; no lock is held over the I/O.
//!
//! The order is R2: the batch is closed, then the data it names is flushed, then the batch is
//! written. Only then are the references it dropped released, after the requests that may still
//! use them (R3, R5, R6).

use super::Pool;
use super::error::PoolError;
use super::gate::ClosedGates;
use super::image::{Frozen, FrozenDisk};
use super::journal::{BATCH_LEN_MAX, Journal, LONG_BATCH_LEN_MAX, records_per_batch};
use super::transaction::Transaction;
use super::volume::{Map, Volume};
use crate::format::journal::HEADER_LEN;
use crate::format::units::{BLOCK, DiskId, Generation, bytes_of};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, RwLockWriteGuard};

/// Room a leader makes sure of: a full batch, and as much again for its tail.
const ROOM: u64 = 2 * BATCH_LEN_MAX;
/// Bytes of records a structural change may add of its own, unless it says so: what is left of
/// [`ROOM`] after a full batch (with one leaf more) and the records of drained disks.
pub const SMALL_CHANGE_LEN_MAX: u64 = 96 << 10;
/// Records a drained disk may add to a batch that is full already.
const TAIL_RECORDS_MAX: usize = 4096;
/// Times a structural change waits for a disk to have few changes before it gives up.
const DRAIN_TRIES_MAX: u32 = 64;

/// Who leads, and how far commits have come.
#[derive(Debug)]
pub(super) struct Commits {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// `None` while somebody leads.
    journal: Option<Journal>,
    /// Rounds begun and finished. A round that begins after a change covers it.
    begun: u64,
    finished: u64,
    /// A frozen forest waits for its image to be written, or is being written.
    frozen: FrozenState,
}

#[derive(Debug)]
enum FrozenState {
    None,
    Waiting(Box<Frozen>),
    BeingWritten,
}

/// What becomes of what disks have changed.
#[derive(Debug, Clone, Copy)]
enum Others {
    /// It is in the same batch.
    TakenAlong,
    /// It waits for the next one, if there is any.
    LeftOut,
}

impl Commits {
    pub(super) fn new(journal: Journal) -> Self {
        let state = State {
            journal: Some(journal),
            begun: 0,
            finished: 0,
            frozen: FrozenState::None,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }
}

/// Leadership: the journal, given back when dropped.
struct Leader<'a> {
    commits: &'a Commits,
    journal: Option<Journal>,
}

impl Leader<'_> {
    fn journal(&mut self) -> &mut Journal {
        self.journal
            .as_mut()
            .expect("a leader has the journal until it is dropped")
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let mut state = self.commits.state.lock();
        state.journal = self.journal.take();
        drop(state);
        self.commits.changed.notify_all();
    }
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
        loop {
            // Nothing recorded needs no room: overwrites go on to be flushed in a full pool.
            let room = || match self.listed.lock().is_empty() {
                true => 0,
                false => ROOM,
            };
            let Some(mut leader) = self.lead(mine, room)? else {
                return self.check_poison();
            };
            let others = match leader.journal().room() >= ROOM {
                true => Others::TakenAlong,
                false => Others::LeftOut,
            };
            let mut is_done = false;
            let result = self.commit_one(leader.journal(), others, &mut |_| {}, &mut is_done);
            if is_done && result.is_ok() {
                let mut state = self.commits.state.lock();
                state.finished = state.finished.max(state.begun);
            }
            drop(leader);
            self.after_commit();
            result?;
            if is_done {
                return Ok(());
            }
        }
    }

    /// Runs `change` alone, with every request of `drained` over and no new one begun (R7), and
    /// makes what it records durable as one atom, together with what changed before.
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
        mut leader: Leader<'_>,
        gates: ClosedGates<'_>,
        others: Others,
        mut change: impl FnMut(&mut Transaction<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        let mut gates = Some(gates);
        let mut outcome = None;
        let mut tail = |transaction: &mut Transaction<'_>| {
            outcome = Some(change(transaction));
            gates = None;
        };
        let result = self.commit_one(leader.journal(), others, &mut tail, &mut false);
        drop(leader);
        self.after_commit();
        result?;
        outcome.unwrap_or_else(|| Err(PoolError::invalid("the change did not run")))
    }

    /// Runs `change` with the lead and without a batch, for what the superblock alone records: it
    /// takes no place in the journal.
    pub(super) fn lead_for<T>(
        &self,
        change: impl FnOnce(&Journal) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        self.check_writable()?;
        let mut leader = self.lead_alone(0)?;
        change(leader.journal())
    }

    /// Takes the lead, with as many bytes for a batch as `room` says then; `None` once a round that
    /// began at or after `mine` has finished.
    fn lead(&self, mine: u64, room: impl Fn() -> u64) -> Result<Option<Leader<'_>>, PoolError> {
        let mut state = self.commits.state.lock();
        loop {
            self.check_poison()?;
            if state.finished >= mine {
                return Ok(None);
            }
            let Some(journal) = state.journal.take() else {
                self.commits.changed.wait(&mut state);
                continue;
            };
            state.begun += 1;
            let mut leader = Leader {
                commits: &self.commits,
                journal: Some(journal),
            };
            drop(state);
            let journal = leader.journal();
            if journal.room() >= room()
                || self.switch_half(journal)?
                || (self.write_image_now(journal)? && self.switch_half(journal)?)
            {
                return Ok(Some(leader));
            }
            drop(leader);
            state = self.commits.state.lock();
            if matches!(state.frozen, FrozenState::BeingWritten) {
                self.commits.changed.wait(&mut state);
            }
        }
    }

    fn lead_alone(&self, room: u64) -> Result<Leader<'_>, PoolError> {
        let leader = self.lead(u64::MAX, || room)?;
        Ok(leader.expect("no round has the largest number"))
    }

    /// One batch: `tail` adds to it last. `is_done` if nothing of `others` was left for want of room.
    fn commit_one(
        &self,
        journal: &mut Journal,
        others: Others,
        tail: &mut dyn FnMut(&mut Transaction<'_>),
        is_done: &mut bool,
    ) -> Result<(), PoolError> {
        let mut transaction = Transaction::new(self);
        *is_done = match others {
            Others::TakenAlong => self.collect_listed(&mut transaction)?,
            Others::LeftOut => true,
        };
        tail(&mut transaction);
        let Transaction { batch, drops, .. } = transaction;
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

    fn collect_listed(&self, transaction: &mut Transaction<'_>) -> Result<bool, PoolError> {
        let listed = std::mem::take(&mut *self.listed.lock());
        let mut left = Vec::new();
        let mut records = Vec::new();
        for volume in listed {
            let mut map = volume.map.write();
            let is_done = map.collect(
                records_per_batch(),
                &mut records,
                &mut transaction.drops,
                &self.space,
            );
            map.is_listed = !is_done;
            drop(map);
            if !is_done {
                left.push(volume);
            }
        }
        records
            .iter()
            .try_for_each(|record| transaction.record(record))?;
        let is_done = left.is_empty();
        self.listed.lock().extend(left);
        Ok(is_done)
    }

    /// So much has changed that it should be committed without being asked: what is not in the
    /// journal takes memory.
    #[must_use]
    pub fn wants_commit(&self) -> bool {
        const CHANGES_MAX: usize = 8 * TAIL_RECORDS_MAX;
        // Cloned: maps are locked before the list is.
        let listed = self.listed.lock().clone();
        let pending = |volume: &Arc<Volume>| volume.map.read().pending_max();
        listed.iter().map(pending).sum::<usize>() > CHANGES_MAX
    }

    /// Puts `volume` on the list of those with changes; called with its map locked.
    pub fn list_changes(&self, volume: &Arc<Volume>, map: &mut RwLockWriteGuard<'_, Map>) {
        if !map.is_listed && map.has_changes() {
            map.is_listed = true;
            self.listed.lock().push(Arc::clone(volume));
        }
    }

    fn freeze_once(&self, seq: u64) {
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
    fn write_image_now(&self, journal: &mut Journal) -> Result<bool, PoolError> {
        let old = {
            let mut state = self.commits.state.lock();
            match std::mem::replace(&mut state.frozen, FrozenState::BeingWritten) {
                FrozenState::BeingWritten => return Ok(false),
                old @ (FrozenState::None | FrozenState::Waiting(_)) => old,
            }
        };
        if let FrozenState::Waiting(frozen) = old {
            self.retire(frozen.into_dropped());
        }
        let frozen = self.freeze(journal.last_seq());
        let result = self
            .write_image(&frozen)
            .and_then(|written| self.adopt(written, journal));
        self.retire(frozen.into_dropped());
        self.commits.state.lock().frozen = FrozenState::None;
        result.map(|()| true)
    }

    /// Writes an image of the forest as it is and puts it in force, where nobody else has the pool.
    ///
    /// # Errors
    /// No space, or the store failed.
    pub(super) fn write_image_alone(&self) -> Result<(), PoolError> {
        let mut leader = self.lead_alone(ROOM)?;
        let is_written = self.write_image_now(leader.journal())?;
        assert!(is_written, "nobody else writes one");
        Ok(())
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
        let written = self.write_image(&frozen);
        self.retire(frozen.into_dropped());
        let result = written.and_then(|written| {
            let mut state = self.commits.state.lock();
            let journal = self.wait_for_journal(&mut state);
            drop(state);
            let mut leader = Leader {
                commits: &self.commits,
                journal: Some(journal),
            };
            self.adopt(written, leader.journal())
        });
        self.commits.state.lock().frozen = FrozenState::None;
        self.commits.changed.notify_all();
        result.map(|()| true)
    }

    fn wait_for_journal(&self, state: &mut MutexGuard<'_, State>) -> Journal {
        loop {
            if let Some(journal) = state.journal.take() {
                return journal;
            }
            self.commits.changed.wait(state);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{CreateOptions, OpenOptions, open};
    use crate::storage::{SimStorage, Storage};

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
