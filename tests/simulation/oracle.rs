//! Every disk as flat arrays in memory: for each sector the value it holds, and those it may hold
//! after a crash.

use crate::act::Act;
use crate::perform::base_values;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use tidepool::cowdisk::Disk;
use tidepool::pool::Pool;

pub(crate) const SECTOR: u64 = 512;
/// Sectors in a block (sub-cluster) and a cluster of the pools here.
pub(crate) const BLOCK: u64 = crate::common::SUB / SECTOR;
pub(crate) const CLUSTER: u64 = crate::common::CLUSTER / SECTOR;

/// A sector's value, which fills it; 0 is zeros. No two writes write the same.
pub(crate) type Value = u64;

/// A write in flight.
#[derive(Debug, Clone, Hash)]
struct Pending {
    number: u64,
    name: String,
    from: usize,
    values: Vec<Value>,
    /// Something else changed sectors of it meanwhile: either may be last.
    is_clouded: bool,
}

#[derive(Debug, Clone, Hash)]
pub(crate) struct Flat {
    pub(crate) now: Vec<Value>,
    /// Values since the last flush, of sectors that had others.
    past: BTreeMap<usize, Vec<Value>>,
    parent: Option<String>,
    /// The parent has not changed since the fork: a commit is possible.
    can_commit: bool,
    /// Some of it may come from the base image.
    has_base: bool,
}

impl Flat {
    /// A new disk.
    fn new(now: Vec<Value>, has_base: bool) -> Self {
        Self {
            now,
            past: BTreeMap::new(),
            parent: None,
            can_commit: false,
            has_base,
        }
    }

    fn set(&mut self, sector: usize, value: Value) {
        let old = std::mem::replace(&mut self.now[sector], value);
        let past = self.past.entry(sector).or_default();
        if past.last() != Some(&old) {
            past.push(old);
        }
    }

    fn may_be(&self, sector: usize, value: Value) -> bool {
        let was = || {
            self.past
                .get(&sector)
                .is_some_and(|past| past.contains(&value))
        };
        self.now[sector] == value || was()
    }
}

/// See the module.
#[derive(Debug, Clone, Default, Hash)]
pub(crate) struct Model {
    pub(crate) disks: BTreeMap<String, Flat>,
    pending: Vec<Pending>,
    pub(crate) next: Value,
    sectors: usize,
}

pub(crate) fn at(sector: u64) -> usize {
    usize::try_from(sector).expect("disks are small")
}

pub(crate) fn fill(value: Value) -> [u8; 512] {
    let mut sector = [0; 512];
    for part in sector.chunks_exact_mut(8) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    sector
}

/// The value that fills `sector`, if one does.
fn value_of(sector: &[u8]) -> Option<Value> {
    let (first, rest) = sector.split_first_chunk::<8>()?;
    let is_same = rest.chunks_exact(8).all(|part| part == first);
    is_same.then(|| u64::from_le_bytes(*first))
}

impl Model {
    /// Disks made here have this many clusters.
    pub(crate) fn new(clusters: u64) -> Self {
        Self {
            sectors: at(clusters * CLUSTER),
            ..Self::default()
        }
    }

    pub(crate) fn disk_len(&self) -> u64 {
        self.sectors as u64 * SECTOR
    }

    pub(crate) fn hash_of(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// Values for the sectors of a write.
    pub(crate) fn values(&self, len: u64) -> Vec<Value> {
        (1..=len).map(|n| self.next + n).collect()
    }

    pub(crate) fn has_pending(&self, number: u64) -> bool {
        self.pending.iter().any(|pending| pending.number == number)
    }

    pub(crate) fn pending_numbers(&self) -> Vec<u64> {
        self.pending.iter().map(|pending| pending.number).collect()
    }

    /// Whether `act` makes sense now; a history of which parts were left out skips the others.
    pub(crate) fn allows(&self, act: &Act) -> bool {
        let disk = |name: &str| self.disks.get(name).filter(|_| !name.contains('@'));
        let fits = |name: &str, from: u64, len: u64| {
            disk(name).is_some_and(|flat| len > 0 && at(from + len) <= flat.now.len())
        };
        let is_free = |name: &str| !self.disks.contains_key(name);
        match act {
            Act::Create(name) | Act::Over(name) => is_free(name),
            Act::Write(name, from, len) => {
                fits(name, *from, *len) && !self.overlaps(name, *from, *len)
            }
            Act::Begin(number, name, from, len) => {
                // Whole blocks: others need a copy first, which is not in flight.
                let is_whole = from.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK);
                let is_free = !self.has_pending(*number) && !self.overlaps(name, *from, *len);
                is_whole && is_free && fits(name, *from, *len)
            }
            Act::End(number) => self.has_pending(*number),
            Act::Discard(name, from, len) | Act::Zero(name, from, len) => fits(name, *from, *len),
            Act::Fork(from, to) => self.disks.contains_key(from) && is_free(to),
            Act::Snapshot(from, name) => disk(from).is_some() && is_free(&format!("{from}@{name}")),
            Act::Rollback(name) => name.contains('@') && self.disks.contains_key(name),
            Act::Commit(child) => disk(child).is_some_and(|flat| {
                let parent = flat.parent.as_deref();
                flat.can_commit && parent.is_some_and(|parent| disk(parent).is_some())
            }),
            Act::Flatten(name) => disk(name).is_some_and(|flat| flat.has_base),
            Act::Remove(name) => self.disks.contains_key(name),
            Act::Resize(name, len) => disk(name).is_some() && *len > 0,
            Act::Rename(name, new) => disk(name).is_some() && is_free(new),
            Act::Flush
            | Act::Trim
            | Act::Pool(_)
            | Act::Bulk
            | Act::Close
            | Act::Crash(_)
            | Act::Kill => true,
        }
    }

    fn overlaps(&self, name: &str, from: u64, len: u64) -> bool {
        let (from, end) = (at(from), at(from + len));
        self.pending.iter().any(|pending| {
            let there = pending.from..pending.from + pending.values.len();
            pending.name == name && there.start < end && from < there.end
        })
    }

    fn set(&mut self, name: &str, from: usize, values: &[Value]) {
        let flat = self.disks.get_mut(name).expect("it is there");
        for (n, value) in values.iter().enumerate() {
            flat.set(from + n, *value);
        }
        let end = from + values.len();
        for pending in self
            .pending
            .iter_mut()
            .filter(|pending| pending.name == name)
        {
            let there = pending.from..pending.from + pending.values.len();
            pending.is_clouded |= there.start < end && from < there.end;
        }
        self.changed(name);
    }

    fn changed(&mut self, name: &str) {
        for flat in self.disks.values_mut() {
            flat.can_commit &= flat.parent.as_deref() != Some(name);
        }
    }

    pub(crate) fn all_durable(&mut self) {
        for flat in self.disks.values_mut() {
            flat.past.clear();
        }
        // What is in flight may be found or not.
        for pending in &self.pending {
            if let Some(flat) = self.disks.get_mut(&pending.name) {
                for (n, value) in pending.values.iter().enumerate() {
                    flat.past.entry(pending.from + n).or_default().push(*value);
                }
            }
        }
    }

    fn copy(&mut self, from: &str, to: &str, parent: Option<String>, can_commit: bool) {
        let flat = Flat {
            parent,
            can_commit,
            ..self.disks[from].clone()
        };
        self.disks.insert(to.to_owned(), flat);
    }

    fn begin(&mut self, number: u64, name: &str, from: u64, len: u64) {
        let values = self.values(len);
        self.next += len;
        let flat = self.disks.get_mut(name).expect("it is there");
        for (n, value) in values.iter().enumerate() {
            flat.past.entry(at(from) + n).or_default().push(*value);
        }
        self.changed(name);
        self.pending.push(Pending {
            number,
            name: name.to_owned(),
            from: at(from),
            values,
            is_clouded: false,
        });
    }

    /// The state after `act`; structural ones wait for what is in flight.
    pub(crate) fn apply(&mut self, act: &Act) {
        if act.is_structural() {
            for number in self.pending_numbers() {
                self.apply(&Act::End(number));
            }
        }
        match act {
            Act::Write(name, from, len) => {
                let values = self.values(*len);
                self.next += len;
                self.set(name, at(*from), &values);
                return;
            }
            Act::Begin(number, name, from, len) => {
                self.begin(*number, name, *from, *len);
                return;
            }
            Act::End(number) => {
                let found = self.pending.iter().position(|p| p.number == *number);
                let pending = self.pending.remove(found.expect("it was allowed"));
                self.set(&pending.name, pending.from, &pending.values);
                return;
            }
            Act::Discard(name, from, len) => {
                let first = from.next_multiple_of(BLOCK);
                let is_end = at(from + len) == self.disks[name].now.len();
                let end = if is_end {
                    from + len
                } else {
                    (from + len) / BLOCK * BLOCK
                };
                if first < end {
                    self.set(name, at(first), &vec![0; at(end - first)]);
                }
                return;
            }
            Act::Zero(name, from, len) => {
                self.set(name, at(*from), &vec![0; at(*len)]);
                return;
            }
            Act::Crash(_) | Act::Kill => {
                self.pending.clear();
                return;
            }
            Act::Create(_)
            | Act::Over(_)
            | Act::Fork(..)
            | Act::Snapshot(..)
            | Act::Rollback(_)
            | Act::Commit(_)
            | Act::Flatten(_)
            | Act::Remove(_)
            | Act::Resize(..)
            | Act::Rename(..) => self.apply_structural(act),
            // It flushes or not.
            Act::Pool(_) => return,
            Act::Flush | Act::Trim | Act::Bulk | Act::Close => {}
        }
        self.all_durable();
    }

    /// This with a new, empty disk, and nothing else forgotten.
    pub(crate) fn with_empty(&self, name: &str) -> Self {
        let mut with = self.clone();
        let flat = Flat::new(vec![0; self.sectors], false);
        with.disks.insert(name.to_owned(), flat);
        with
    }

    fn apply_structural(&mut self, act: &Act) {
        match act {
            Act::Create(name) => {
                let flat = Flat::new(vec![0; self.sectors], false);
                self.disks.insert(name.clone(), flat);
            }
            Act::Over(name) => {
                let mut now = base_values();
                now.resize(self.sectors, 0);
                self.disks.insert(name.clone(), Flat::new(now, true));
            }
            Act::Flatten(name) => {
                self.disks.get_mut(name).expect("it is there").has_base = false;
                self.changed(name);
            }
            Act::Fork(from, to) => {
                let parent = (!from.contains('@')).then(|| from.clone());
                self.copy(from, to, parent, true);
            }
            Act::Snapshot(from, name) => self.copy(from, &format!("{from}@{name}"), None, false),
            Act::Rollback(snapshot) => {
                let disk = snapshot.split('@').next().expect("a disk").to_owned();
                let parent = self.disks[&disk].parent.clone();
                self.copy(snapshot, &disk, parent, false);
                self.changed(&disk);
            }
            Act::Commit(child) => {
                let parent = self.disks[child].parent.clone().expect("it has one");
                let grandparent = self.disks[&parent].parent.clone();
                let len = self.disks[&parent].now.len();
                self.copy(child, &parent, grandparent, false);
                // A longer parent stays so.
                let target = self.disks.get_mut(&parent).expect("it is there");
                target.now.resize(len.max(target.now.len()), 0);
                self.changed(&parent);
                self.disks.get_mut(child).expect("it is there").can_commit = true;
            }
            Act::Remove(name) => {
                let prefix = format!("{name}@");
                self.disks
                    .retain(|other, _| other != name && !other.starts_with(&prefix));
                self.changed(name);
            }
            Act::Resize(name, len) => {
                let flat = self.disks.get_mut(name).expect("it is there");
                flat.now.resize(at(*len), 0);
                self.changed(name);
            }
            Act::Rename(name, new) => self.rename(name, new),
            Act::Write(..)
            | Act::Begin(..)
            | Act::End(_)
            | Act::Discard(..)
            | Act::Zero(..)
            | Act::Flush
            | Act::Trim
            | Act::Pool(_)
            | Act::Bulk
            | Act::Close
            | Act::Crash(_)
            | Act::Kill => unreachable!("{act} is not structural"),
        }
    }

    fn rename(&mut self, name: &str, new: &str) {
        let renamed = |key: String| match key.strip_prefix(name) {
            Some(rest) if rest.is_empty() || rest.starts_with('@') => format!("{new}{rest}"),
            Some(_) | None => key,
        };
        let old = std::mem::take(&mut self.disks).into_iter();
        self.disks = old.map(|(key, flat)| (renamed(key), flat)).collect();
        for flat in self.disks.values_mut() {
            flat.parent = flat.parent.take().map(renamed);
        }
    }

    /// This model with the values that `pool` holds now, if it may hold them after a crash.
    /// `is_durable`: after a power cut, they are the only ones from here on; after the death of the
    /// process alone, the cache has the others still.
    pub(crate) fn settled(&self, pool: &Arc<Pool>, is_durable: bool) -> Result<Model, String> {
        let mut settled = self.clone();
        settled.pending.clear();
        let mut bytes = Vec::new();
        for (name, flat) in &mut settled.disks {
            read_all(pool, name, flat.now.len(), &mut bytes)?;
            for (n, sector) in bytes.chunks_exact(512).enumerate() {
                let value = value_of(sector);
                let Some(value) = value.filter(|value| flat.may_be(n, *value)) else {
                    let found = u64::from_le_bytes(*sector.first_chunk().expect("8 bytes"));
                    let (now, past) = (flat.now[n], flat.past.get(&n));
                    return Err(format!("{name} sector {n}: {found}, not {now} or {past:?}"));
                };
                if value != flat.now[n] {
                    flat.set(n, value);
                }
            }
            if is_durable {
                flat.past.clear();
            }
        }
        Ok(settled)
    }

    /// After [`Act::End`] of a write that something else overlapped: which of the two was last. A
    /// live disk holds that.
    pub(crate) fn end_clouded(&mut self, pool: &Arc<Pool>, number: u64) -> Result<(), String> {
        let Some(pending) = self.pending.iter().find(|p| p.number == number) else {
            return Ok(());
        };
        if !pending.is_clouded {
            return Ok(());
        }
        let pending = pending.clone();
        let flat = self.disks.get_mut(&pending.name).expect("it is there");
        let mut bytes = Vec::new();
        read_all(pool, &pending.name, flat.now.len(), &mut bytes)?;
        let sectors = bytes.chunks_exact(512).skip(pending.from);
        for ((n, value), sector) in pending.values.iter().enumerate().zip(sectors) {
            let (n, found) = (pending.from + n, value_of(sector));
            if found != Some(*value) && found != Some(flat.now[n]) {
                return Err(format!(
                    "{} sector {n}: {found:?} after a write",
                    pending.name
                ));
            }
            flat.set(n, *value);
            flat.set(n, found.unwrap_or_default());
        }
        self.pending.retain(|p| p.number != number);
        self.changed(&pending.name);
        Ok(())
    }

    /// Whether a pool that is open holds exactly this.
    pub(crate) fn check_live(&self, pool: &Arc<Pool>) -> Result<(), String> {
        let mut bytes = Vec::new();
        for (name, flat) in &self.disks {
            read_all(pool, name, flat.now.len(), &mut bytes)?;
            for (n, sector) in bytes.chunks_exact(512).enumerate() {
                let found = value_of(sector);
                let is_pending = || {
                    let mut there = self
                        .pending
                        .iter()
                        .filter(|p| p.name == *name && n >= p.from);
                    there.any(|p| p.values.get(n - p.from).copied() == found)
                };
                if found != Some(flat.now[n]) && !is_pending() {
                    let now = flat.now[n];
                    return Err(format!("{name} sector {n} reads as {found:?}, not {now}"));
                }
            }
        }
        Ok(())
    }

    /// The disks that are in `pool`, besides the one for bulk.
    pub(crate) fn check_names(&self, pool: &Arc<Pool>) -> Result<(), String> {
        pool.with_catalogue(|all| {
            let found = all.iter().map(|item| item.row.name.as_str());
            let mut found: Vec<&str> = found.filter(|name| *name != "bulk").collect();
            found.sort_unstable();
            let expected: Vec<&str> = self.disks.keys().map(String::as_str).collect();
            match found == expected {
                true => Ok(()),
                false => Err(format!("disks {found:?}, not {expected:?}")),
            }
        })
    }
}

fn read_all(
    pool: &Arc<Pool>,
    name: &str,
    sectors: usize,
    bytes: &mut Vec<u8>,
) -> Result<(), String> {
    let disk = Disk::open(pool, name).map_err(|e| e.to_string())?;
    if disk.size() != sectors as u64 * SECTOR {
        return Err(format!(
            "{name} has {} bytes, not {sectors} sectors",
            disk.size()
        ));
    }
    bytes.resize(sectors * 512, 0);
    disk.read_at(bytes, 0).map_err(|e| format!("{name}: {e}"))
}
