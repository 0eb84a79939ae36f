//! What the client may see: for each block of each disk, the values it may read now, and those it
//! may find after a crash.

use crate::device::Value;
use std::collections::BTreeMap;

/// A disk or snapshot; never used twice.
pub(crate) type Id = u32;

/// A block of a disk.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    /// Values in the order in which the changes were over, the present one last. A crash may leave
    /// any from `durable` on.
    history: Vec<Value>,
    durable: usize,
    /// Writes in flight.
    pending: Vec<Value>,
}

impl Cell {
    pub(crate) fn new(value: Value) -> Self {
        Self {
            history: vec![value],
            durable: 0,
            pending: Vec::new(),
        }
    }

    pub(crate) fn now(&self) -> Value {
        *self.history.last().expect("never empty")
    }

    pub(crate) fn begin(&mut self, value: Value) {
        self.pending.push(value);
    }

    /// The write of `value` is over, and the block reads as `seen`: not that value if the block was
    /// discarded meanwhile. Both may come back after a crash.
    pub(crate) fn end(&mut self, value: Value, seen: Value) {
        self.pending.retain(|pending| *pending != value);
        self.history.push(value);
        if seen != value {
            self.history.push(seen);
        }
    }

    pub(crate) fn set(&mut self, value: Value) {
        self.history.push(value);
    }

    /// Where reads that begin now begin to be right.
    pub(crate) fn mark(&self) -> usize {
        self.history.len() - 1
    }

    /// Whether a read that began at `mark` may give `value`.
    pub(crate) fn may_read(&self, mark: usize, value: Value) -> bool {
        let since = self.history.get(mark..).unwrap_or(&self.history);
        since.contains(&value) || self.pending.contains(&value)
    }

    pub(crate) fn may_survive(&self, value: Value) -> bool {
        self.may_read(self.durable, value)
    }

    /// After a crash: `seen` is what it holds. After a power cut that is durable; after the death of
    /// the process alone, the cache still has the others.
    fn recovered(&mut self, seen: Value, is_power_cut: bool) {
        self.history.append(&mut self.pending);
        self.history.push(seen);
        if is_power_cut {
            *self = Self::new(seen);
        }
    }
}

/// All disks; a disk is its blocks.
pub(crate) type State = BTreeMap<Id, Vec<Cell>>;

/// For each block, where its history was when a flush began.
pub(crate) type Marks = Vec<(Id, usize, usize)>;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct Oracle {
    pub(crate) now: State,
    /// While a structural change is in memory but not acknowledged: how it was without it.
    pub(crate) before: Option<State>,
}

impl Oracle {
    pub(crate) fn cell(&self, id: Id, block: usize) -> &Cell {
        &self.now[&id][block]
    }

    /// Changes a block, in the world with the structural change and in the one without.
    pub(crate) fn change(&mut self, id: Id, block: usize, change: impl Fn(&mut Cell)) {
        for state in [Some(&mut self.now), self.before.as_mut()] {
            if let Some(cell) = state
                .and_then(|state| state.get_mut(&id))
                .and_then(|blocks| blocks.get_mut(block))
            {
                change(cell);
            }
        }
    }

    /// `to` is what `from` is now, and durable with the change that makes it so.
    pub(crate) fn copy(&mut self, from: Id, to: Id) {
        let cells = self.now[&from].iter().map(|cell| Cell::new(cell.now()));
        let cells = cells.collect();
        self.now.insert(to, cells);
    }

    pub(crate) fn marks(&self) -> Marks {
        let blocks = self.now.iter().flat_map(|(id, blocks)| {
            let marks = blocks.iter().map(Cell::mark).enumerate();
            marks.map(|(block, mark)| (*id, block, mark))
        });
        blocks.collect()
    }

    /// A flush that began at `marks` is acknowledged.
    pub(crate) fn acknowledge(&mut self, marks: &Marks) {
        for (id, block, mark) in marks {
            self.change(*id, *block, |cell| cell.durable = cell.durable.max(*mark));
        }
    }

    /// The crashed pool is open again and holds `seen`: it must be one of the two worlds, with
    /// values each block may have.
    pub(crate) fn recovered(
        &mut self,
        seen: &BTreeMap<Id, Vec<Value>>,
        is_power_cut: bool,
    ) -> Result<(), String> {
        let worlds = [Some(&self.now), self.before.as_ref()];
        let agrees = worlds.map(|world| world.map(|world| difference(world, seen)));
        let [now, before] = agrees;
        match (now, before) {
            (Some(None), _) => {}
            (_, Some(None)) => self.now = self.before.take().expect("it was compared"),
            (now, _) => return Err(now.flatten().unwrap_or_default()),
        }
        self.before = None;
        for (id, blocks) in &mut self.now {
            for (cell, value) in blocks.iter_mut().zip(&seen[id]) {
                cell.recovered(*value, is_power_cut);
            }
        }
        Ok(())
    }
}

/// What is wrong with `seen`, if this was the world before the crash.
fn difference(world: &State, seen: &BTreeMap<Id, Vec<Value>>) -> Option<String> {
    let sizes = |id: &Id, len: usize| format!("disk {id} of {len} blocks");
    let expected: Vec<String> = world.iter().map(|(id, b)| sizes(id, b.len())).collect();
    let found: Vec<String> = seen.iter().map(|(id, b)| sizes(id, b.len())).collect();
    if expected != found {
        return Some(format!(
            "after a crash there are {found:?}, not {expected:?}"
        ));
    }
    for (id, blocks) in world {
        for (block, cell) in blocks.iter().enumerate() {
            let value = seen[id][block];
            if !cell.may_survive(value) {
                return Some(format!(
                    "disk {id} block {block} holds {value} after a crash, not one of {:?}",
                    &cell.history[cell.durable..]
                ));
            }
        }
    }
    None
}
