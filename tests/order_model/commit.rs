//! Making changes durable: rounds of six steps (close the batch, flush begins, flush ends, the
//! journal is being written, it is written, acknowledged), and the structural changes that end in
//! one.

use crate::Rule;
use crate::device::{Began, Content, Device, Random, Value};
use crate::oracle::{Cell, Id, Marks, Oracle};
use crate::pool::{Batch, Disk, Entry, LCNS, Pool, Record, SLOTS, SUBS, is_base};
use std::rc::Rc;

/// A structural change. Fork and snapshot, rollback and commit differ in who is whose parent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Change {
    Fork {
        from: Id,
        is_snapshot: bool,
    },
    /// `to` becomes what `from` is.
    Replace {
        from: Id,
        to: Id,
    },
    Delete(Id),
    /// Clusters.
    Resize(Id, usize),
    /// The end of flattening: nothing comes from the base any more.
    LeaveBase(Id),
    /// The end of a commit into the base: everything comes from there.
    EmptyOverBase(Id),
}

impl Change {
    /// R7: the disks whose requests must be over before it.
    pub(crate) fn drains(&self, pool: &Pool) -> Vec<Id> {
        match *self {
            Change::Fork { .. } if pool.breaks(Rule::DrainFork) => Vec::new(),
            Change::Replace { .. } if pool.breaks(Rule::DrainReplace) => Vec::new(),
            Change::Fork { from, .. } => vec![from],
            Change::Replace { from, to } => vec![from, to],
            Change::Delete(id)
            | Change::Resize(id, _)
            | Change::LeaveBase(id)
            | Change::EmptyOverBase(id) => vec![id],
        }
    }

    /// The disk that nobody uses until it is acknowledged.
    fn replaces(&self) -> Option<Id> {
        match *self {
            Change::Replace { to, .. } => Some(to),
            Change::Fork { .. }
            | Change::Delete(_)
            | Change::Resize(..)
            | Change::LeaveBase(_)
            | Change::EmptyOverBase(_) => None,
        }
    }
}

/// Where the next batch goes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Journal {
    pub(crate) opening: u32,
    pub(crate) next_seq: usize,
    pub(crate) previous: u64,
}

/// First of the two blocks of batch `seq`.
pub(crate) fn slot_at(seq: usize) -> usize {
    1 + 2 * seq
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Closed,
    Flushing,
    Flushed,
    Writing,
    Written,
}

/// One batch on its way.
#[derive(Debug, Clone)]
pub(crate) struct Round {
    step: Step,
    batch: Rc<Batch>,
    drops: Vec<usize>,
    change: Option<Change>,
    marks: Marks,
    flushes: bool,
    began: Option<Began>,
    /// Halves of the batch that are in the device's cache.
    landed: [bool; 2],
}

impl Round {
    /// A power cut, or the end of the process, finds the batch being written in any state.
    pub(crate) fn interrupt(&self, device: &mut Device, random: &mut Random) {
        if self.step != Step::Writing {
            return;
        }
        for half in (0..2).filter(|half| !self.landed[*half]) {
            if random.one_in(2) {
                self.land(device, half);
            }
        }
    }

    fn land(&self, device: &mut Device, half: usize) {
        let at = slot_at(self.batch.seq) + half;
        device.write(at, Content::Batch(Rc::clone(&self.batch)));
    }
}

impl Pool {
    /// No new request may begin: the disk is drained, or somebody replaces it.
    pub(crate) fn is_closed(&self, id: Id) -> bool {
        let drained = self.change.map(|change| change.drains(self));
        let replaced = self.rounds.iter().filter_map(|round| round.change);
        drained.is_some_and(|drained| drained.contains(&id))
            || replaced
                .filter_map(|change| change.replaces())
                .any(|to| to == id)
    }

    /// Begins a round, if somebody waits for one and nothing is in the way.
    pub(crate) fn close_batch(&mut self, device: &Device, oracle: &mut Oracle) {
        let is_wanted = self.waiting > 0 || self.change.is_some();
        if !is_wanted || self.is_frozen || !self.may_begin_round() {
            return;
        }
        let drained = self
            .change
            .map(|change| change.drains(self))
            .unwrap_or_default();
        if self.requests.iter().any(|r| drained.contains(&r.disk)) {
            return;
        }
        let change = self
            .change
            .take()
            .filter(|change| self.is_possible(*change));
        // Built from the entries as they are now (R1).
        let dirty = std::mem::take(&mut self.dirty);
        let entries = dirty
            .into_iter()
            .filter(|(id, _)| self.disks.contains_key(id));
        let mut records: Vec<Record> = entries
            .map(|(id, lcn)| Record::Map(id, lcn, self.disks[&id].entries[lcn]))
            .collect();
        if let Some(change) = change {
            oracle.before = Some(oracle.now.clone());
            self.apply(oracle, change, &mut records);
        }
        let mut flushes = self.is_unflushed;
        if self.breaks(Rule::FlushOverwrites) && records.is_empty() {
            flushes = false;
        }
        if self.breaks(Rule::DataFlush) {
            flushes = false;
        }
        let mut checksums = Vec::new();
        if self.breaks(Rule::NoChecksums) && !records.is_empty() {
            flushes = false;
            checksums = self.checksums(device, &records);
        }
        self.is_unflushed = false;
        self.waiting = 0;
        let batch = Batch {
            seq: self.journal.next_seq,
            opening: self.journal.opening,
            previous: self.journal.previous,
            generation: self.generation,
            next_id: self.next_id,
            records,
            checksums,
        };
        if !batch.records.is_empty() {
            self.journal.next_seq += 1;
            self.journal.previous = batch.checksum();
        }
        self.rounds.push(Round {
            step: Step::Closed,
            batch: Rc::new(batch),
            drops: std::mem::take(&mut self.drops),
            change,
            marks: oracle.marks(),
            flushes,
            began: None,
            landed: [false; 2],
        });
    }

    /// R9: one batch is outstanding.
    fn may_begin_round(&self) -> bool {
        let pipelines = self.breaks(Rule::OneOutstanding) || self.breaks(Rule::Chain);
        let is_writing = |round: &Round| round.step == Step::Writing && round.change.is_none();
        let may_overlap = pipelines && self.change.is_none() && self.rounds.iter().all(is_writing);
        (self.rounds.is_empty() || may_overlap) && self.journal.next_seq < SLOTS
    }

    /// R8 broken: what the blocks named by `records` hold.
    fn checksums(&self, device: &Device, records: &[Record]) -> Vec<(usize, Value)> {
        let mut found = Vec::new();
        for record in records {
            if let Record::Map(id, lcn, entry) = record {
                for sub in (0..SUBS).filter(|sub| entry.alloc[*sub]) {
                    let at = self.disks[id].place(lcn * SUBS + sub);
                    found.extend(at.map(|at| (at, device.value(at))));
                }
            }
        }
        found
    }

    /// The next step of round `n`. `is_failing`: the device fails it.
    pub(crate) fn advance_round(
        &mut self,
        device: &mut Device,
        oracle: &mut Oracle,
        n: usize,
        is_failing: bool,
    ) {
        let data_last = self.breaks(Rule::DataFirst);
        let tries_again = self.breaks(Rule::NoSecondFlush);
        let round = &mut self.rounds[n];
        let is_empty = round.batch.records.is_empty();
        match round.step {
            Step::Closed if round.flushes && (!data_last || is_empty) => {
                round.began = Some(device.flush_begin());
                round.step = Step::Flushing;
            }
            Step::Closed | Step::Flushed if is_empty => round.step = Step::Written,
            Step::Closed | Step::Flushed => round.step = Step::Writing,
            Step::Flushing => {
                let began = round.began.take().expect("it began");
                device.flush_end(began, !is_failing, |at| !is_base(at));
                round.step = Step::Flushed;
                if is_failing && tries_again {
                    round.step = Step::Closed;
                } else if is_failing {
                    (self.is_frozen, self.has_lost_data) = (true, true);
                }
            }
            Step::Writing => {
                if let Some(half) = (0..2).find(|half| !round.landed[*half]) {
                    round.landed[half] = true;
                    round.land(device, half);
                } else {
                    self.end_journal_write(device, oracle, n, is_failing);
                }
            }
            Step::Written => self.acknowledge(oracle, n),
        }
    }

    fn end_journal_write(
        &mut self,
        device: &mut Device,
        oracle: &mut Oracle,
        n: usize,
        is_failing: bool,
    ) {
        let goes_on = self.breaks(Rule::FreezeOnJournal);
        let round = &mut self.rounds[n];
        let at = slot_at(round.batch.seq);
        if !is_failing {
            device.settle(at);
            device.settle(at + 1);
            round.step = Step::Written;
            if self.breaks(Rule::DataFirst) && self.rounds[n].flushes {
                device.flush_end(device.flush_begin(), true, |at| !is_base(at));
            }
            return;
        }
        device.fail(at);
        device.fail(at + 1);
        if goes_on {
            // An error is told; the next batch takes this one's place.
            self.journal.next_seq = round.batch.seq;
            self.journal.previous = round.batch.previous;
            self.rounds.remove(n);
            oracle.before = None;
        } else {
            self.is_frozen = true;
        }
    }

    /// The batch is durable: whoever waited is told, and what it dropped may go (R3).
    fn acknowledge(&mut self, oracle: &mut Oracle, n: usize) {
        if self.breaks(Rule::Chain) && n > 0 {
            return;
        }
        let round = self.rounds.remove(n);
        oracle.acknowledge(&round.marks);
        if round.change.is_some() {
            oracle.before = None;
        }
        self.retire(round.drops);
    }

    /// Whether a change that was asked for is still possible, now that its disks are drained.
    fn is_possible(&self, change: Change) -> bool {
        let has = |id: Id| self.disks.contains_key(&id);
        match change {
            Change::Replace { from, to } => {
                let is_commit = !self.disks[&from].is_snapshot;
                let is_unchanged = || self.disks[&to].changed <= self.disks[&from].birth;
                has(from) && has(to) && (!is_commit || is_unchanged())
            }
            Change::LeaveBase(id) => (0..self.disks[&id].blocks())
                .all(|block| self.disks[&id].place(block).is_none_or(|at| !is_base(at))),
            Change::Fork { from: id, .. }
            | Change::Delete(id)
            | Change::Resize(id, _)
            | Change::EmptyOverBase(id) => has(id),
        }
    }

    fn apply(&mut self, oracle: &mut Oracle, change: Change, records: &mut Vec<Record>) {
        match change {
            Change::Fork { from, is_snapshot } => self.fork(oracle, from, is_snapshot, records),
            Change::Replace { from, to } => self.replace(oracle, from, to, records),
            Change::Delete(id) => {
                self.drop_entries(id);
                self.disks.remove(&id);
                oracle.now.remove(&id);
                records.push(Record::Delete(id));
            }
            Change::Resize(id, size) => {
                for lcn in size..LCNS {
                    self.set(id, lcn, Entry::default());
                }
                let disk = self.disk(id);
                disk.size = size;
                for lcn in size..LCNS {
                    // What comes back when it grows again is zeros, not the base.
                    disk.entries[lcn].zero = [true; SUBS];
                }
                let cells = oracle.now.get_mut(&id).expect("it is there");
                cells.resize(size * SUBS, Cell::new(0));
                records.push(self.record(id));
            }
            Change::LeaveBase(id) => {
                self.disk(id).has_base = false;
                records.push(self.record(id));
            }
            Change::EmptyOverBase(id) => {
                for lcn in 0..LCNS {
                    self.set(id, lcn, Entry::default());
                }
                records.push(self.record(id));
            }
        }
        // Structural records say everything of their disks.
        self.dirty.clear();
    }

    fn fork(
        &mut self,
        oracle: &mut Oracle,
        from: Id,
        is_snapshot: bool,
        records: &mut Vec<Record>,
    ) {
        let ended = self.end_generation();
        let id = self.next_id;
        self.next_id += 1;
        let source = self.disk(from);
        source.last_fork = ended;
        let child = Disk {
            parent: Some(from),
            is_snapshot,
            birth: ended,
            changed: ended,
            ..source.clone()
        };
        self.share(&child.entries);
        self.disks.insert(id, child);
        oracle.copy(from, id);
        records.extend([from, id].map(|id| self.record(id)));
    }

    fn replace(&mut self, oracle: &mut Oracle, from: Id, to: Id, records: &mut Vec<Record>) {
        let ended = self.end_generation();
        let source = self.disk(from);
        source.last_fork = ended;
        if !source.is_snapshot {
            source.birth = ended;
        }
        let Disk {
            entries,
            size,
            has_base,
            ..
        } = source.clone();
        self.drop_entries(to);
        self.share(&entries);
        let target = self.disk(to);
        (target.entries, target.size, target.has_base) = (entries, size, has_base);
        (target.last_fork, target.birth, target.changed) = (ended, ended, ended);
        oracle.copy(from, to);
        records.extend([from, to].map(|id| self.record(id)));
    }

    fn disk(&mut self, id: Id) -> &mut Disk {
        self.disks.get_mut(&id).expect("it is there")
    }

    fn record(&self, id: Id) -> Record {
        Record::Put(id, self.disks[&id].clone())
    }

    fn end_generation(&mut self) -> u32 {
        self.generation += 1;
        self.generation - 1
    }

    fn share(&mut self, entries: &[Entry]) {
        for cluster in entries.iter().flat_map(Entry::clusters) {
            self.counts[cluster] += 1;
        }
    }

    fn drop_entries(&mut self, id: Id) {
        for cluster in self.disks[&id]
            .entries
            .iter()
            .flat_map(Entry::clusters)
            .collect::<Vec<_>>()
        {
            self.drop_reference(cluster);
        }
    }
}
