//! The pool in memory: maps, counts, free clusters, and requests in their three steps (planned,
//! landed on the device, published).

use crate::Rule;
use crate::commit::{Change, Journal, Round};
use crate::device::{Content, Device, Random, Value};
use crate::oracle::{Id, Oracle};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Clusters of a disk at most, and blocks of a cluster.
pub(crate) const LCNS: usize = 2;
pub(crate) const SUBS: usize = 2;
/// Clusters of the pool; number 0 means none.
pub(crate) const CLUSTERS: usize = 8;
/// Batches there is room for.
pub(crate) const SLOTS: usize = 80;

/// Blocks of the device: superblock, journal, base image, clusters.
pub(crate) const SUPERBLOCK: usize = 0;
const BASE_AT: usize = 1 + 2 * SLOTS;
const DATA_AT: usize = BASE_AT + LCNS * SUBS;
pub(crate) const DEVICE_BLOCKS: usize = DATA_AT + CLUSTERS * SUBS;

pub(crate) fn base_at(block: usize) -> usize {
    BASE_AT + block
}

pub(crate) fn is_base(at: usize) -> bool {
    (BASE_AT..DATA_AT).contains(&at)
}

fn data_at(cluster: usize, sub: usize) -> usize {
    DATA_AT + cluster * SUBS + sub
}

/// As in the pool: `alloc` reads `own`, `zero` zeros, the rest `under` or what lies below.
#[derive(Debug, Clone, Copy, PartialEq, Hash, Default)]
pub(crate) struct Entry {
    pub(crate) own: usize,
    pub(crate) under: usize,
    pub(crate) alloc: [bool; SUBS],
    pub(crate) zero: [bool; SUBS],
    pub(crate) birth: u32,
}

impl Entry {
    fn is_rest(&self, sub: usize) -> bool {
        !self.alloc[sub] && !self.zero[sub]
    }

    pub(crate) fn clusters(&self) -> impl Iterator<Item = usize> + use<> {
        [self.own, self.under].into_iter().filter(|c| *c != 0)
    }
}

/// A disk or snapshot, as the journal has it.
#[derive(Debug, Clone, PartialEq, Hash)]
pub(crate) struct Disk {
    pub(crate) entries: [Entry; LCNS],
    pub(crate) size: usize,
    pub(crate) family: Id,
    pub(crate) parent: Option<Id>,
    pub(crate) is_snapshot: bool,
    pub(crate) has_base: bool,
    pub(crate) last_fork: u32,
    pub(crate) birth: u32,
    pub(crate) changed: u32,
}

impl Disk {
    /// Where a block's contents are; `None` for zeros.
    pub(crate) fn place(&self, block: usize) -> Option<usize> {
        let (lcn, sub) = (block / SUBS, block % SUBS);
        let entry = &self.entries[lcn];
        if entry.alloc[sub] {
            Some(data_at(entry.own, sub))
        } else if entry.zero[sub] {
            None
        } else if entry.under != 0 {
            Some(data_at(entry.under, sub))
        } else {
            self.has_base.then(|| base_at(block))
        }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.size * SUBS
    }
}

/// What a batch says. All of it is how things are afterwards.
#[derive(Debug, Clone, PartialEq, Hash)]
pub(crate) enum Record {
    Map(Id, usize, Entry),
    Put(Id, Disk),
    Delete(Id),
}

#[derive(Debug, Clone, PartialEq, Hash, Default)]
pub(crate) struct Batch {
    pub(crate) seq: usize,
    pub(crate) opening: u32,
    /// Checksum of the batch before.
    pub(crate) previous: u64,
    pub(crate) generation: u32,
    pub(crate) next_id: Id,
    pub(crate) records: Vec<Record>,
    /// Only when R8 is broken: the data it names.
    pub(crate) checksums: Vec<(usize, Value)>,
}

impl Batch {
    pub(crate) fn checksum(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// I/O in flight.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) number: u64,
    pub(crate) disk: Id,
    /// Block of the disk.
    pub(crate) block: usize,
    pub(crate) work: Work,
    pub(crate) has_landed: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Work {
    /// `mark`: when it began, for the oracle.
    Read {
        at: Option<usize>,
        mark: usize,
        got: Value,
    },
    /// `is_fill`: the block is not allocated yet. `owed`: only when R10 is broken.
    Write {
        own: usize,
        value: Value,
        mark: usize,
        is_fill: bool,
        owed: Option<usize>,
    },
    /// Moves data to where a write can go on; then the entry becomes `after`.
    Copy {
        from: usize,
        to: usize,
        got: Option<Value>,
        before: Entry,
        after: Entry,
    },
    Punch {
        cluster: usize,
        frees: bool,
    },
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    broken: Option<Rule>,
    pub(crate) disks: BTreeMap<Id, Disk>,
    pub(crate) generation: u32,
    pub(crate) next_id: Id,
    pub(crate) counts: [usize; CLUSTERS],
    pub(crate) free: BTreeSet<usize>,
    /// References dropped by changes that no batch has.
    pub(crate) drops: Vec<usize>,
    /// References whose drop is durable, and the requests that may still use them.
    quarantine: Vec<(usize, BTreeSet<u64>)>,
    pub(crate) dirty: BTreeSet<(Id, usize)>,
    pub(crate) requests: Vec<Request>,
    next_request: u64,
    /// Something was written since the last flush began.
    pub(crate) is_unflushed: bool,
    pub(crate) is_frozen: bool,
    /// A flush of data failed.
    pub(crate) has_lost_data: bool,
    /// Flushes that wait for the next round.
    pub(crate) waiting: usize,
    pub(crate) change: Option<Change>,
    pub(crate) rounds: Vec<Round>,
    pub(crate) journal: Journal,
}

impl Pool {
    /// The pool that a journal led to: counts and free clusters are derived.
    pub(crate) fn derive(
        broken: Option<Rule>,
        disks: BTreeMap<Id, Disk>,
        last: &Batch,
        journal: Journal,
    ) -> Result<Self, String> {
        let mut counts = [0; CLUSTERS];
        let mut owners = BTreeMap::new();
        for (id, disk) in &disks {
            for (lcn, entry) in disk.entries.iter().enumerate() {
                for cluster in entry.clusters() {
                    counts[cluster] += 1;
                    let owner = (disk.family, lcn);
                    if *owners.entry(cluster).or_insert(owner) != owner {
                        return Err(format!(
                            "disk {id}: cluster {cluster} is used elsewhere (I1)"
                        ));
                    }
                }
            }
        }
        Ok(Self {
            broken,
            disks,
            generation: last.generation.max(1),
            next_id: last.next_id.max(1),
            counts,
            free: (1..CLUSTERS).filter(|c| counts[*c] == 0).collect(),
            drops: Vec::new(),
            quarantine: Vec::new(),
            dirty: BTreeSet::new(),
            requests: Vec::new(),
            next_request: 0,
            is_unflushed: false,
            is_frozen: false,
            has_lost_data: false,
            waiting: 0,
            change: None,
            rounds: Vec::new(),
            journal,
        })
    }

    pub(crate) fn breaks(&self, rule: Rule) -> bool {
        self.broken == Some(rule)
    }

    pub(crate) fn read_now(&self, device: &Device, id: Id, block: usize) -> Value {
        let place = self.disks[&id].place(block);
        place.map_or(0, |at| device.value(at))
    }

    // --- entries ---

    /// `lcn` maps to `new`; references follow.
    pub(crate) fn set(&mut self, id: Id, lcn: usize, new: Entry) {
        let disk = self.disks.get_mut(&id).expect("it is there");
        let old = std::mem::replace(&mut disk.entries[lcn], new);
        disk.changed = self.generation;
        self.dirty.insert((id, lcn));
        let (gained, lost) = (new.clusters(), old.clusters());
        for cluster in gained.filter(|c| !old.clusters().any(|other| other == *c)) {
            self.counts[cluster] += 1;
        }
        for cluster in lost.filter(|c| !new.clusters().any(|other| other == *c)) {
            self.drop_reference(cluster);
        }
    }

    /// R5: the reference counts until its drop is durable. R3: until then the cluster stays.
    pub(crate) fn drop_reference(&mut self, cluster: usize) {
        if self.breaks(Rule::DropsCount) {
            self.counts[cluster] -= 1;
        }
        if self.breaks(Rule::DurableBeforeReuse) {
            self.retire(vec![cluster]);
            return;
        }
        self.drops.push(cluster);
        let dropped = self.drops.iter().filter(|other| **other == cluster).count();
        if self.breaks(Rule::DurableBeforePunch) && self.counts[cluster] == dropped {
            let frees = false;
            self.begin(0, 0, Work::Punch { cluster, frees });
        }
    }

    /// The drops are durable. R6: they wait for the requests in flight.
    pub(crate) fn retire(&mut self, drops: Vec<usize>) {
        let mut in_flight: BTreeSet<u64> = self.requests.iter().map(|r| r.number).collect();
        if self.breaks(Rule::WaitForRequests) {
            in_flight.clear();
        }
        let waiting = drops
            .into_iter()
            .map(|cluster| (cluster, in_flight.clone()));
        self.quarantine.extend(waiting);
        self.reap();
    }

    fn reap(&mut self) {
        let is_over = |(_, waits_for): &(usize, BTreeSet<u64>)| waits_for.is_empty();
        let (over, waiting) = std::mem::take(&mut self.quarantine)
            .into_iter()
            .partition(is_over);
        self.quarantine = waiting;
        for (cluster, _) in Vec::<(usize, _)>::from_iter(over) {
            if !self.breaks(Rule::DropsCount) {
                self.counts[cluster] -= 1;
            }
            if self.counts[cluster] == 0 {
                self.free.insert(cluster);
            }
        }
    }

    /// R10: choosing a cluster and accounting for it are one step.
    fn take(&mut self, random: &mut Random) -> Option<usize> {
        let usable = self.free.len().checked_sub(1)?;
        let cluster = *self.free.iter().nth(random.below(usable + 1))?;
        if !self.breaks(Rule::AccountAtOnce) {
            self.free.remove(&cluster);
        }
        Some(cluster)
    }

    /// I4: it may be written in place.
    fn is_own(&self, id: Id, entry: &Entry) -> bool {
        entry.own != 0 && entry.birth > self.disks[&id].last_fork
    }

    // --- requests ---

    fn begin(&mut self, disk: Id, block: usize, work: Work) {
        self.next_request += 1;
        self.requests.push(Request {
            number: self.next_request,
            disk,
            block,
            work,
            has_landed: false,
        });
    }

    pub(crate) fn is_busy(&self, id: Id, lcn: usize) -> bool {
        let here = |r: &&Request| r.disk == id && r.block / SUBS == lcn;
        let mut here = self.requests.iter().filter(here);
        here.any(|r| matches!(r.work, Work::Copy { .. }))
    }

    pub(crate) fn begin_read(&mut self, oracle: &Oracle, id: Id, block: usize) {
        let at = self.disks[&id].place(block);
        let mark = oracle.cell(id, block).mark();
        self.begin(id, block, Work::Read { at, mark, got: 0 });
    }

    /// Plans a write, or the copy it needs first; `false` if it must wait.
    pub(crate) fn begin_write(
        &mut self,
        oracle: &mut Oracle,
        random: &mut Random,
        (id, block): (Id, usize),
        value: Value,
    ) -> bool {
        let (lcn, sub) = (block / SUBS, block % SUBS);
        let mut entry = self.disks[&id].entries[lcn];
        let mut owed = None;
        if self.is_busy(id, lcn) {
            return false;
        }
        if !self.is_own(id, &entry) && entry.own != 0 && self.counts[entry.own] == 1 {
            // R5 makes this safe: nobody else has it, drops on their way included.
            entry.birth = self.generation;
            self.set(id, lcn, entry);
        }
        if !self.is_own(id, &entry) {
            let Some(cluster) = self.take(random) else {
                return false;
            };
            let Some(new) = self.hang(id, lcn, cluster) else {
                return true;
            };
            self.set(id, lcn, new);
            owed = Some(cluster).filter(|_| self.breaks(Rule::AccountAtOnce));
            entry = new;
        }
        let is_fill = !entry.alloc[sub];
        if is_fill && self.breaks(Rule::BitsAtCompletion) {
            self.allocate(id, block);
        }
        let (own, mark) = (entry.own, oracle.cell(id, block).mark());
        oracle.change(id, block, |cell| cell.begin(value));
        self.begin(
            id,
            block,
            Work::Write {
                own,
                value,
                mark,
                is_fill,
                owed,
            },
        );
        true
    }

    /// The entry with a new cluster over what it was; `None` if a copy was begun, because it would
    /// be three deep otherwise (I3).
    fn hang(&mut self, id: Id, lcn: usize, cluster: usize) -> Option<Entry> {
        let disk = &self.disks[&id];
        let old = disk.entries[lcn];
        let birth = self.generation;
        let has_rest = (0..SUBS).any(|sub| old.is_rest(sub));
        if old.alloc == [false; SUBS] {
            return Some(Entry {
                own: cluster,
                birth,
                ..old
            });
        }
        if !has_rest || (old.under == 0 && !disk.has_base) {
            let zero = std::array::from_fn(|sub| old.zero[sub] || old.is_rest(sub));
            let (own, under) = (cluster, old.own);
            return Some(Entry {
                own,
                under,
                alloc: [false; SUBS],
                zero,
                birth,
            });
        }
        // One block of each kind: the allocated one moves, what is under stays.
        let sub = (0..SUBS).find(|sub| old.alloc[*sub]).expect("one is");
        let (from, to) = (data_at(old.own, sub), data_at(cluster, sub));
        let after = Entry {
            own: cluster,
            birth,
            ..old
        };
        let block = lcn * SUBS + sub;
        let copy = Work::Copy {
            from,
            to,
            got: None,
            before: old,
            after,
        };
        self.begin(id, block, copy);
        self.free.remove(&cluster);
        None
    }

    /// Brings a block of the base into the disk's own cluster; `false` if it must wait.
    pub(crate) fn begin_pull(&mut self, random: &mut Random, id: Id, block: usize) -> bool {
        let (lcn, sub) = (block / SUBS, block % SUBS);
        let here = |r: &Request| r.disk == id && r.block / SUBS == lcn;
        if self.requests.iter().any(here) {
            return false;
        }
        let mut entry = self.disks[&id].entries[lcn];
        if !self.is_own(id, &entry) {
            let Some(cluster) = self.take(random) else {
                return false;
            };
            self.free.remove(&cluster);
            let Some(new) = self.hang(id, lcn, cluster) else {
                return true;
            };
            self.set(id, lcn, new);
            entry = new;
        }
        let (from, to) = (base_at(block), data_at(entry.own, sub));
        let mut after = entry;
        after.alloc[sub] = true;
        let copy = Work::Copy {
            from,
            to,
            got: None,
            before: entry,
            after,
        };
        self.begin(id, block, copy);
        true
    }

    /// R4: a cluster is out of the free list while it is punched.
    pub(crate) fn begin_punch(&mut self, cluster: usize) {
        if !self.breaks(Rule::PunchBeforeFree) {
            self.free.remove(&cluster);
        }
        let frees = true;
        self.begin(0, 0, Work::Punch { cluster, frees });
    }

    /// The device does request `n`.
    pub(crate) fn land(&mut self, device: &mut Device, n: usize) {
        let request = &mut self.requests[n];
        let sub = request.block % SUBS;
        request.has_landed = true;
        match &mut request.work {
            Work::Read { at, got, .. } => *got = at.map_or(0, |at| device.value(at)),
            Work::Write {
                own, value, owed, ..
            } => {
                if let Some(cluster) = owed.take() {
                    self.free.remove(&cluster);
                }
                device.write(data_at(*own, sub), Content::Data(*value));
            }
            Work::Copy { from, to, got, .. } => match got {
                None => {
                    *got = Some(device.value(*from));
                    request.has_landed = false;
                }
                Some(value) => device.write(*to, Content::Data(*value)),
            },
            Work::Punch { cluster, .. } => {
                for sub in 0..SUBS {
                    device.write(data_at(*cluster, sub), Content::Data(0));
                }
            }
        }
    }

    /// Request `n`, which has landed, is over.
    pub(crate) fn finish(
        &mut self,
        device: &Device,
        oracle: &mut Oracle,
        n: usize,
    ) -> Result<(), String> {
        let request = self.requests.remove(n);
        let (id, block) = (request.disk, request.block);
        let lcn = block / SUBS;
        for (_, waits_for) in &mut self.quarantine {
            waits_for.remove(&request.number);
        }
        match request.work {
            Work::Read { mark, got, .. } => {
                if !oracle.cell(id, block).may_read(mark, got) {
                    return Err(format!("disk {id} block {block} reads as {got}"));
                }
            }
            Work::Write {
                own,
                value,
                mark,
                is_fill,
                ..
            } => {
                // Before the bit is set: the flush that makes it durable must cover the data.
                self.is_unflushed = true;
                // The cluster may have been discarded meanwhile: then the write came first.
                if is_fill && self.disks[&id].entries[lcn].own == own {
                    self.allocate(id, block);
                }
                let seen = self.read_now(device, id, block);
                let cell = oracle.cell(id, block);
                let was_discarded = cell.mark() > mark && seen == cell.now();
                if seen != value && !was_discarded {
                    return Err(format!(
                        "disk {id} block {block} reads as {seen}, not {value}"
                    ));
                }
                oracle.change(id, block, |cell| cell.end(value, seen));
            }
            Work::Copy { before, after, .. } => {
                self.is_unflushed = true;
                let now = self.disks[&id].entries[lcn];
                if now != before {
                    return Err(format!("disk {id}: {now:?} changed while it was copied"));
                }
                self.set(id, lcn, after);
            }
            Work::Punch { cluster, frees } => {
                self.is_unflushed = true;
                if frees && self.counts[cluster] == 0 {
                    self.free.insert(cluster);
                }
            }
        }
        self.reap();
        Ok(())
    }

    fn allocate(&mut self, id: Id, block: usize) {
        let (lcn, sub) = (block / SUBS, block % SUBS);
        let mut entry = self.disks[&id].entries[lcn];
        entry.alloc[sub] = true;
        entry.zero[sub] = false;
        self.set(id, lcn, entry);
    }

    /// Makes a block read as zeros; with the last one the cluster goes.
    pub(crate) fn zero(&mut self, oracle: &mut Oracle, id: Id, block: usize) -> bool {
        let (lcn, sub) = (block / SUBS, block % SUBS);
        if self.is_busy(id, lcn) {
            return false;
        }
        let mut entry = self.disks[&id].entries[lcn];
        entry.alloc[sub] = false;
        entry.zero[sub] = true;
        let here = |r: &Request| r.disk == id && r.block / SUBS == lcn && r.block != block;
        let is_fill = |r: &Request| matches!(r.work, Work::Write { is_fill: true, .. });
        // A write under way to another block would be lost with its cluster.
        let is_written = self.requests.iter().any(|r| here(r) && is_fill(r));
        if entry.zero == [true; SUBS] && !is_written {
            let zero = entry.zero;
            entry = Entry {
                zero,
                ..Entry::default()
            };
        }
        self.set(id, lcn, entry);
        oracle.change(id, block, |cell| cell.set(0));
        true
    }
}
