//! Histories: who does what when, crashes, and recovery step by step.

use crate::Rule;
use crate::commit::{Change, Journal, slot_at};
use crate::device::{Content, Device, Random, Value};
use crate::oracle::{Cell, Id, Oracle};
use crate::pool::{
    Batch, CLUSTERS, DEVICE_BLOCKS, Disk, Entry, LCNS, Pool, Record, SLOTS, SUBS, SUPERBLOCK, Work,
    base_at, is_base,
};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

/// Steps of a history before its last crash.
const STEPS: usize = 220;
/// Disks and snapshots at once.
const DISKS_MAX: usize = 4;

/// Something that happened: what, and to what.
#[derive(Debug, Clone)]
pub(crate) struct Event(&'static str, Vec<usize>);

impl Event {
    pub(crate) fn to_text(&self) -> String {
        format!("{} {:?}", self.0, self.1)
    }
}

/// How often histories came to each kind of event.
#[derive(Debug, Default)]
pub(crate) struct Reached(BTreeMap<&'static str, usize>);

impl Reached {
    pub(crate) fn add(&mut self, trace: &[Event]) {
        for event in trace {
            *self.0.entry(event.0).or_default() += 1;
        }
    }

    /// A model that does nothing has no faults either.
    pub(crate) fn check(&self) {
        for name in EVENTS {
            let count = self.0.get(name).copied().unwrap_or(0);
            assert!(count > 100, "only {count} events `{name}`");
        }
    }
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self
            .0
            .iter()
            .map(|(name, n)| format!("{n} {name}"))
            .collect();
        f.write_str(&list.join(", "))
    }
}

const EVENTS: [&str; 24] = [
    "write",
    "read",
    "land",
    "finish",
    "zero",
    "flush",
    "round",
    "failing round",
    "fork",
    "snapshot",
    "rollback",
    "commit",
    "delete",
    "resize",
    "flatten",
    "pull",
    "leave base",
    "commit to base",
    "base block",
    "empty",
    "punch",
    "power cut",
    "kill",
    "crash in recovery",
];

/// A pool that is being opened: the next step, and what was read.
struct Opening {
    step: usize,
    pool: Pool,
    last: Option<Rc<Batch>>,
}

enum Phase {
    Down,
    Opening(Box<Opening>),
    Up(Box<Pool>),
}

/// What runs in the background over a disk with a base, block by block.
#[derive(Clone, Copy)]
enum Job {
    Flatten { id: Id, next: usize },
    CommitToBase { id: Id, next: usize, is_again: bool },
}

struct World {
    broken: Option<Rule>,
    random: Random,
    device: Device,
    oracle: Oracle,
    phase: Phase,
    job: Option<Job>,
    next_value: Value,
    /// One step in so many is a crash.
    crash_in: usize,
    /// Steps of a round at once: where flushes are quick, more can follow them.
    round_steps: usize,
    /// One step in so many asks for a flush besides.
    flush_in: usize,
    /// A power cut, rather than the end of the process alone, lies between now and the last time
    /// the pool was open.
    was_power_cut: bool,
    trace: Vec<Event>,
}

/// Runs the history `seed`, with a rule broken or none; what happened, and what went wrong.
pub(crate) fn run(broken: Option<Rule>, seed: u64) -> (Vec<Event>, Result<(), String>) {
    let mut random = Random(seed);
    // Histories differ in pace: a fault shows best at one or the other.
    let crash_in = [30, 80, 200][random.below(3)];
    let round_steps = [1, 2, 7][random.below(3)];
    let flush_in = [4, 400][random.below(2)];
    let mut world = World {
        broken,
        random,
        crash_in,
        round_steps,
        flush_in,
        device: Device::new(DEVICE_BLOCKS),
        oracle: Oracle::default(),
        phase: Phase::Down,
        job: None,
        next_value: 1000,
        was_power_cut: true,
        trace: Vec::new(),
    };
    world.create();
    let mut result = Ok(());
    for step in 0..STEPS {
        if step + 1 == STEPS {
            world.crash();
        }
        result = result.and_then(|()| world.step());
    }
    while result.is_ok() && !matches!(world.phase, Phase::Up(_)) {
        result = world.step();
    }
    (world.trace, result)
}

impl World {
    /// One disk over a base; the pool is closed.
    fn create(&mut self) {
        let mut cells = Vec::new();
        for block in 0..LCNS * SUBS {
            self.next_value += 1;
            self.device
                .write(base_at(block), Content::Data(self.next_value));
            self.device.settle(base_at(block));
            cells.push(Cell::new(self.next_value));
        }
        let disk = Disk {
            entries: [Entry::default(); LCNS],
            size: LCNS,
            family: 1,
            parent: None,
            is_snapshot: false,
            has_base: true,
            last_fork: 0,
            birth: 0,
            changed: 0,
        };
        let batch = Rc::new(Batch {
            generation: 1,
            next_id: 2,
            records: vec![Record::Put(1, disk)],
            ..Batch::default()
        });
        for half in 0..2 {
            self.device
                .write(slot_at(0) + half, Content::Batch(Rc::clone(&batch)));
            self.device.settle(slot_at(0) + half);
        }
        self.oracle.now.insert(1, cells);
    }

    fn log(&mut self, what: &'static str, which: &[usize]) {
        self.trace.push(Event(what, which.to_vec()));
    }

    fn step(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.phase, Phase::Down) {
            Phase::Down => {
                let opening = self.replay()?;
                self.phase = Phase::Opening(Box::new(opening));
            }
            Phase::Opening(opening) => {
                if self.random.one_in(12) {
                    self.log("crash in recovery", &[opening.step]);
                    self.lose_power_or_die(false);
                    return Ok(());
                }
                self.phase = self.open_on(*opening)?;
            }
            Phase::Up(pool) => {
                self.phase = Phase::Up(pool);
                if self.random.one_in(self.crash_in) {
                    self.crash();
                    return Ok(());
                }
                return self.act();
            }
        }
        Ok(())
    }

    // --- crashes and recovery ---

    fn lose_power_or_die(&mut self, has_failed: bool) {
        // What a failed flush was to save may be seen now and be lost later, until it is written
        // again. Whoever asked was told: the client begins anew after that.
        if !has_failed && self.random.one_in(3) {
            self.log("kill", &[]);
            return;
        }
        self.log("power cut", &[]);
        self.device.power_cut(&mut self.random);
        self.was_power_cut = true;
    }

    /// Requests in flight reach the device or do not; then the process is gone.
    fn crash(&mut self) {
        // A base that a commit may have changed is refused until the commit was done again.
        self.job = match self.job {
            Some(Job::CommitToBase { id, .. }) => {
                let (next, is_again) = (0, true);
                Some(Job::CommitToBase { id, next, is_again })
            }
            Some(Job::Flatten { .. }) | None => None,
        };
        let Phase::Up(mut pool) = std::mem::replace(&mut self.phase, Phase::Down) else {
            return;
        };
        for n in 0..pool.requests.len() {
            if !pool.requests[n].has_landed && self.random.one_in(2) {
                pool.land(&mut self.device, n);
            }
        }
        for round in &pool.rounds {
            round.interrupt(&mut self.device, &mut self.random);
        }
        self.was_power_cut = false;
        self.lose_power_or_die(pool.has_lost_data);
    }

    /// The batch at `seq`, if it is there whole.
    fn batch_at(&self, seq: usize) -> Option<Rc<Batch>> {
        let (first, second) = (slot_at(seq), slot_at(seq) + 1);
        match (self.device.read(first), self.device.read(second)) {
            (Content::Batch(a), Content::Batch(b)) if a == b => Some(Rc::clone(a)),
            _ => None,
        }
    }

    /// R8 broken: a batch counts if the data it names is there.
    fn has_its_data(&self, batch: &Batch) -> bool {
        let mut named = batch.checksums.iter();
        named.all(|(at, value)| self.device.value(*at) == *value)
    }

    fn replay(&self) -> Result<Opening, String> {
        let opening = match self.device.read(SUPERBLOCK) {
            Content::Opening(opening) => *opening,
            Content::Data(_) | Content::Batch(_) => 0,
        };
        let mut journal = Journal {
            opening: opening + 1,
            next_seq: 0,
            previous: 0,
        };
        let (mut disks, mut last) = (BTreeMap::new(), None);
        while let Some(batch) = self
            .batch_at(journal.next_seq)
            .filter(|_| journal.next_seq < SLOTS)
        {
            // R9: it follows the one before, and is not of an opening that has not been.
            let follows = batch.previous == journal.previous && batch.opening <= opening;
            let is_next = follows || self.broken == Some(Rule::Chain);
            if batch.seq != journal.next_seq || !is_next || !self.has_its_data(&batch) {
                break;
            }
            for record in &batch.records {
                match record.clone() {
                    Record::Put(id, disk) => drop(disks.insert(id, disk)),
                    Record::Delete(id) => drop(disks.remove(&id)),
                    Record::Map(id, lcn, entry) => {
                        let disk: &mut Disk = disks.get_mut(&id).ok_or("a record of no disk")?;
                        disk.entries[lcn] = entry;
                        disk.changed = batch.generation;
                    }
                }
            }
            journal.next_seq += 1;
            journal.previous = batch.checksum();
            last = Some(batch);
        }
        let later = (journal.next_seq + 1..SLOTS).find_map(|seq| self.batch_at(seq));
        if let Some(later) = later.filter(|_| self.broken != Some(Rule::Chain)) {
            let (lost, seq) = (journal.next_seq, later.seq);
            return Err(format!(
                "batch {lost} cannot be read, but batch {seq} after it can"
            ));
        }
        let batch = last.clone().unwrap_or_default();
        let pool = Pool::derive(self.broken, disks, &batch, journal)?;
        Ok(Opening {
            step: 0,
            pool,
            last,
        })
    }

    /// R11: what was read is made durable before anything relies on it. Then batches of this
    /// opening are told from earlier ones (R9).
    fn open_on(&mut self, mut opening: Opening) -> Result<Phase, String> {
        let last = opening.last.clone();
        let last = last.filter(|_| self.broken != Some(Rule::SettleJournal));
        match (opening.step, last) {
            (half @ (0 | 1), Some(last)) => {
                let at = slot_at(last.seq) + half;
                self.device.write(at, Content::Batch(last));
            }
            (2, Some(last)) => {
                self.device.settle(slot_at(last.seq));
                self.device.settle(slot_at(last.seq) + 1);
            }
            (3, _) if self.broken != Some(Rule::FlushAtOpening) => {
                let began = self.device.flush_begin();
                self.device.flush_end(began, true, |at| !is_base(at));
            }
            (4, _) => {
                let number = opening.pool.journal.opening;
                self.device.write(SUPERBLOCK, Content::Opening(number));
            }
            (5, _) => self.device.settle(SUPERBLOCK),
            (6, _) => {
                let pool = opening.pool;
                let seen = pool.disks.iter().map(|(id, disk)| {
                    let blocks = 0..disk.blocks();
                    let values = blocks.map(|block| pool.read_now(&self.device, *id, block));
                    (*id, values.collect())
                });
                self.oracle.recovered(&seen.collect(), self.was_power_cut)?;
                return Ok(Phase::Up(Box::new(pool)));
            }
            _ => {}
        }
        opening.step += 1;
        Ok(Phase::Opening(Box::new(opening)))
    }

    // --- the pool at work ---

    fn act(&mut self) -> Result<(), String> {
        let Phase::Up(mut pool) = std::mem::replace(&mut self.phase, Phase::Down) else {
            return Ok(());
        };
        let result = self.act_on(&mut pool);
        self.phase = Phase::Up(pool);
        result
    }

    fn act_on(&mut self, pool: &mut Pool) -> Result<(), String> {
        if let Some(Job::CommitToBase { is_again: true, .. }) = self.job {
            // Nobody sees the disk before that is over, and so no flush is asked for.
            self.work(pool);
            return Ok(());
        }
        if self.random.one_in(self.flush_in) && !pool.is_frozen {
            pool.waiting += 1;
            self.log("flush", &[]);
        }
        let choice = self.random.below(100);
        if pool.is_frozen && !(36..=67).contains(&choice) {
            return Ok(());
        }
        match choice {
            0..=20 => self.write(pool),
            21..=28 => self.read(pool),
            29..=33 => self.zero(pool),
            34..=35 => {
                pool.waiting += 1;
                self.log("flush", &[]);
            }
            36..=51 => self.land(pool),
            52..=67 => return self.finish(pool),
            68..=84 => self.round(pool),
            85..=90 => self.ask_change(pool),
            91..=93 => self.punch(pool),
            _ => self.work(pool),
        }
        Ok(())
    }

    /// A disk that may be used now, and one of its blocks.
    fn pick(&mut self, pool: &Pool, may_be_snapshot: bool) -> Option<(Id, usize)> {
        let worked_on = match self.job {
            Some(Job::CommitToBase { id, .. }) => Some(id),
            Some(Job::Flatten { .. }) | None => None,
        };
        let usable = |(id, disk): &(&Id, &Disk)| {
            let is_open = !pool.is_closed(**id) && worked_on != Some(**id);
            is_open && (may_be_snapshot || !disk.is_snapshot)
        };
        let usable: Vec<_> = pool.disks.iter().filter(usable).collect();
        let (id, disk) = usable.get(self.random.below(usable.len().max(1)))?;
        Some((**id, self.random.below(disk.blocks())))
    }

    fn write(&mut self, pool: &mut Pool) {
        let Some((id, block)) = self.pick(pool, false) else {
            return;
        };
        // Overlapping requests may take effect in any order: the client sends none.
        let here = |r: &crate::pool::Request| r.disk == id && r.block == block;
        if pool.requests.iter().any(here) {
            return;
        }
        self.next_value += 1;
        let value = self.next_value;
        if pool.begin_write(&mut self.oracle, &mut self.random, (id, block), value) {
            self.log("write", &[to_index(id), block, to_index(value)]);
        }
    }

    fn read(&mut self, pool: &mut Pool) {
        let Some((id, block)) = self.pick(pool, true) else {
            return;
        };
        pool.begin_read(&self.oracle, id, block);
        self.log("read", &[to_index(id), block]);
    }

    fn zero(&mut self, pool: &mut Pool) {
        let Some((id, block)) = self.pick(pool, false) else {
            return;
        };
        let first = block / SUBS * SUBS;
        let blocks = if self.random.one_in(2) {
            first..first + SUBS
        } else {
            block..block + 1
        };
        for block in blocks {
            if pool.zero(&mut self.oracle, id, block) {
                self.log("zero", &[to_index(id), block]);
            }
        }
    }

    fn land(&mut self, pool: &mut Pool) {
        let waiting: Vec<usize> = (0..pool.requests.len())
            .filter(|n| !pool.requests[*n].has_landed)
            .collect();
        let Some(n) = waiting.get(self.random.below(waiting.len().max(1))) else {
            return;
        };
        pool.land(&mut self.device, *n);
        let number = pool.requests[*n].number;
        self.log("land", &[to_index(number)]);
    }

    fn finish(&mut self, pool: &mut Pool) -> Result<(), String> {
        let landed: Vec<usize> = (0..pool.requests.len())
            .filter(|n| pool.requests[*n].has_landed)
            .collect();
        let Some(n) = landed.get(self.random.below(landed.len().max(1))) else {
            return Ok(());
        };
        let number = pool.requests[*n].number;
        self.log("finish", &[to_index(number)]);
        pool.finish(&self.device, &mut self.oracle, *n)
    }

    fn round(&mut self, pool: &mut Pool) {
        for _ in 0..self.round_steps {
            if pool.is_frozen {
                return;
            }
            if pool.rounds.is_empty() || self.random.one_in(4) {
                pool.close_batch(&self.device, &mut self.oracle);
                continue;
            }
            let n = self.random.below(pool.rounds.len());
            let is_failing = self.random.one_in(60);
            let what = if is_failing { "failing round" } else { "round" };
            self.log(what, &[n]);
            pool.advance_round(&mut self.device, &mut self.oracle, n, is_failing);
        }
    }

    fn punch(&mut self, pool: &mut Pool) {
        let free: Vec<usize> = pool.free.iter().copied().collect();
        let is_punched = |cluster: usize| {
            let punches = |r: &crate::pool::Request| matches!(r.work, Work::Punch { cluster: c, .. } if c == cluster);
            pool.requests.iter().any(punches)
        };
        let Some(cluster) = free.get(self.random.below(free.len().max(1))) else {
            return;
        };
        if !is_punched(*cluster) && free.len() > CLUSTERS / 4 {
            pool.begin_punch(*cluster);
            self.log("punch", &[*cluster]);
        }
    }

    /// Asks for a structural change.
    fn ask_change(&mut self, pool: &mut Pool) {
        if pool.change.is_some() || matches!(self.job, Some(Job::CommitToBase { .. })) {
            return;
        }
        let Some((id, _)) = self.pick(pool, true) else {
            return;
        };
        let disk = &pool.disks[&id];
        let parent = disk.parent.filter(|parent| pool.disks.contains_key(parent));
        let has_room = pool.disks.len() < DISKS_MAX;
        let (what, change) = match self.random.below(8) {
            0 | 1 if has_room => (
                "fork",
                Change::Fork {
                    from: id,
                    is_snapshot: false,
                },
            ),
            2 if has_room && !disk.is_snapshot => (
                "snapshot",
                Change::Fork {
                    from: id,
                    is_snapshot: true,
                },
            ),
            3 | 4 => {
                let Some(to) = parent.filter(|to| !pool.disks[to].is_snapshot) else {
                    return;
                };
                // A target in use is refused, unless nobody looks.
                let is_used = pool.requests.iter().any(|r| r.disk == to);
                if (is_used && !pool.breaks(Rule::DrainReplace)) || pool.is_closed(to) {
                    return;
                }
                let what = if disk.is_snapshot {
                    "rollback"
                } else {
                    "commit"
                };
                (what, Change::Replace { from: id, to })
            }
            5 | 6 if pool.disks.len() > 1 => ("delete", Change::Delete(id)),
            7 if !disk.is_snapshot => {
                let size = 1 + self.random.below(LCNS);
                ("resize", Change::Resize(id, size))
            }
            _ => return,
        };
        pool.change = Some(change);
        self.log(what, &[to_index(id)]);
    }

    // --- background work over the base ---

    fn work(&mut self, pool: &mut Pool) {
        match self.job {
            None => self.begin_job(pool),
            Some(Job::Flatten { id, next }) => self.flatten(pool, id, next),
            Some(Job::CommitToBase { id, next, is_again }) => {
                self.commit_to_base(pool, id, next, is_again);
            }
        }
    }

    fn begin_job(&mut self, pool: &Pool) {
        let Some((id, _)) = self.pick(pool, false) else {
            return;
        };
        if !pool.disks[&id].has_base || pool.change.is_some() {
            return;
        }
        let users = pool.disks.values().filter(|disk| disk.has_base).count();
        let is_used = pool.requests.iter().any(|r| r.disk == id) || !pool.rounds.is_empty();
        if self.random.one_in(2) && users == 1 && !is_used && pool.disks[&id].size == LCNS {
            let (next, is_again) = (0, false);
            self.job = Some(Job::CommitToBase { id, next, is_again });
            self.log("commit to base", &[to_index(id)]);
        } else if self.random.one_in(4) {
            self.job = Some(Job::Flatten { id, next: 0 });
            self.log("flatten", &[to_index(id)]);
        }
    }

    fn flatten(&mut self, pool: &mut Pool, id: Id, next: usize) {
        let Some(disk) = pool.disks.get(&id).filter(|disk| disk.has_base) else {
            self.job = None;
            return;
        };
        if next < disk.blocks() {
            if pool.is_closed(id) {
                return;
            }
            if disk.place(next).is_none_or(|at| !is_base(at)) {
                self.job = Some(Job::Flatten { id, next: next + 1 });
            } else if pool.begin_pull(&mut self.random, id, next) {
                self.log("pull", &[to_index(id), next]);
            }
        } else if pool.change.is_none() && !pool.is_closed(id) {
            pool.change = Some(Change::LeaveBase(id));
            self.job = None;
            self.log("leave base", &[to_index(id)]);
        }
    }

    /// What the disk holds hides what is written under it, so that it reads the same all the while.
    fn commit_to_base(&mut self, pool: &mut Pool, id: Id, next: usize, is_again: bool) {
        if next < pool.disks[&id].blocks() {
            if pool.disks[&id].place(next).is_none_or(|at| !is_base(at)) {
                let value = pool.read_now(&self.device, id, next);
                self.device.write(base_at(next), Content::Data(value));
                self.log("base block", &[to_index(id), next]);
            }
            let next = next + 1;
            self.job = Some(Job::CommitToBase { id, next, is_again });
        } else if pool.change.is_none() {
            // R2: the base has it durably before the disk lets go of it.
            if !pool.breaks(Rule::BaseFlush) {
                self.device
                    .flush_end(self.device.flush_begin(), true, is_base);
            }
            pool.change = Some(Change::EmptyOverBase(id));
            self.job = None;
            self.log("empty", &[to_index(id)]);
        }
    }
}

fn to_index(n: impl TryInto<usize>) -> usize {
    n.try_into().unwrap_or(usize::MAX)
}
