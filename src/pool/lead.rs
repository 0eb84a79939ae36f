//! Who may write the journal. Holding it is leadership, and who wants it stands in line: a thread that
//! commits batch after batch would otherwise take it again before one that sleeps is awake.

use super::Pool;
use super::error::PoolError;
use super::image::Frozen;
use super::journal::Journal;
use super::volume::Volume;
use crate::sync::{Arc, Condvar, Mutex};
use std::collections::VecDeque;

/// Who leads, and how far commits have come.
#[derive(Debug)]
pub(super) struct Commits {
    pub(super) state: Mutex<State>,
    /// Disks of which the round under way has something to write still. Whoever leads has it.
    pub(super) round: Mutex<VecDeque<Arc<Volume>>>,
    changed: Condvar,
}

#[derive(Debug)]
pub(super) struct State {
    /// `None` while somebody leads.
    journal: Option<Journal>,
    /// Tickets of those who want to lead.
    line: VecDeque<u64>,
    next_ticket: u64,
    /// Rounds begun and finished. A round that begins after a change covers it.
    pub(super) begun: u64,
    pub(super) finished: u64,
    /// A frozen forest waits for its image to be written, or is being written.
    pub(super) frozen: FrozenState,
}

#[derive(Debug)]
pub(super) enum FrozenState {
    None,
    Waiting(Box<Frozen>),
    BeingWritten,
}

impl Commits {
    pub(super) fn new(journal: Journal) -> Self {
        let state = State {
            journal: Some(journal),
            line: VecDeque::new(),
            next_ticket: 0,
            begun: 0,
            finished: 0,
            frozen: FrozenState::None,
        };
        Self {
            state: Mutex::new(state),
            round: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// No image is being written any more.
    fn end_image(&self) {
        self.state.lock().frozen = FrozenState::None;
        self.changed.notify_all();
    }

    /// Waits while an image is being written.
    fn wait_for_image(&self) {
        let mut state = self.state.lock();
        while matches!(state.frozen, FrozenState::BeingWritten) {
            self.changed.wait(&mut state);
        }
    }
}

/// Leadership: the journal, given back when dropped.
pub(super) struct Leader<'a> {
    pool: &'a Pool,
    journal: Option<Journal>,
}

impl Leader<'_> {
    pub(super) fn journal(&mut self) -> &mut Journal {
        self.journal
            .as_mut()
            .expect("a leader has the journal until it is dropped")
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        // What a store that panicked has done of a batch, nobody knows (R10).
        self.pool.poison_if_panicking();
        let commits = &self.pool.commits;
        let mut state = commits.state.lock();
        state.journal = self.journal.take();
        drop(state);
        commits.changed.notify_all();
    }
}

/// The writing of an image; over when dropped.
pub(super) struct ImageTurn<'a>(pub(super) &'a Pool);

impl Drop for ImageTurn<'_> {
    fn drop(&mut self) {
        self.0.poison_if_panicking();
        self.0.commits.end_image();
    }
}

impl Pool {
    /// Takes the lead when it is this caller's turn; `None` once round `mine` has finished.
    ///
    /// # Errors
    /// As [`Pool::check_poison`].
    pub(super) fn lead(&self, mine: u64) -> Result<Option<Leader<'_>>, PoolError> {
        let commits = &self.commits;
        let mut state = commits.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.line.push_back(ticket);
        let taken = loop {
            if let Err(e) = self.check_poison() {
                break Err(e);
            }
            if state.finished >= mine {
                break Ok(None);
            }
            if state.line.front() == Some(&ticket)
                && let Some(journal) = state.journal.take()
            {
                break Ok(Some(journal));
            }
            commits.changed.wait(&mut state);
        };
        state.line.retain(|other| *other != ticket);
        drop(state);
        if !matches!(taken, Ok(Some(_))) {
            // It may be somebody else's turn now.
            commits.changed.notify_all();
        }
        Ok(taken?.map(|journal| Leader {
            pool: self,
            journal: Some(journal),
        }))
    }

    /// Leads with at least `room` bytes for a batch.
    pub(super) fn lead_alone(&self, room: u64) -> Result<Leader<'_>, PoolError> {
        loop {
            let leader = self.lead(u64::MAX)?;
            let mut leader = leader.expect("no round has the largest number");
            if self.make_room(&mut leader, room)? {
                return Ok(leader);
            }
            self.wait_with_journal_free(leader);
        }
    }

    /// Sees to it that the journal has `room` bytes. `false` if an image is being written, which
    /// must be over first.
    pub(super) fn make_room(&self, leader: &mut Leader<'_>, room: u64) -> Result<bool, PoolError> {
        let journal = leader.journal();
        Ok(journal.room() >= room
            || self.switch_half(journal)?
            || (self.write_image_now(journal)? && self.switch_half(journal)?))
    }

    /// Lets others lead (whoever writes an image must) until the image is written.
    pub(super) fn wait_with_journal_free(&self, leader: Leader<'_>) {
        drop(leader);
        self.commits.wait_for_image();
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
}
