//! A structural change as a batch in the making: what it records, and what it takes from the pool's
//! counters. How it is run and made durable is in `commit`.

use super::Pool;
use super::backlog::Changes;
use super::error::PoolError;
use super::map::Dropped;
use super::volume::Map;
use super::woken::Woken;
use crate::format::catalogue::Row;
use crate::format::journal::{BatchWriter, Record};
use crate::format::units::{DiskId, Generation};
use crate::sync::atomic::Ordering;

/// A batch being filled by a structural change, which runs alone.
#[derive(Debug)]
pub struct Transaction<'a> {
    /// The pool.
    pub pool: &'a Pool,
    pub(super) batch: BatchWriter,
    pub(super) drops: Vec<Dropped>,
    /// Requests that waited for what was taken into the batch.
    pub(super) woken: Woken,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(pool: &'a Pool) -> Self {
        Self {
            pool,
            batch: BatchWriter::default(),
            drops: Vec::new(),
            woken: Woken::default(),
        }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// A catalogue row that is too long.
    pub fn record(&mut self, record: &Record) -> Result<(), PoolError> {
        Ok(self.batch.push(record)?)
    }

    /// `Err` if `row` cannot be recorded: asked before anything is changed.
    ///
    /// # Errors
    /// A catalogue row that is too long.
    pub fn check_row(&self, row: &Row) -> Result<(), PoolError> {
        row.to_json()?;
        Ok(())
    }

    /// Adds what changed in a drained disk, so that the map in memory and the one the journal
    /// gives are the same from here on.
    ///
    /// # Errors
    /// Never for maps; as [`Transaction::record`].
    pub fn collect(&mut self, map: &mut Map) -> Result<(), PoolError> {
        let mut changes = Changes::default();
        self.woken
            .join(map.collect(self.pool.shelf(), &mut changes));
        self.add(changes)
    }

    /// Adds what a map said.
    pub(super) fn add(&mut self, changes: Changes) -> Result<(), PoolError> {
        let Changes { records, mut drops } = changes;
        self.drops.append(&mut drops);
        records.iter().try_for_each(|record| self.record(record))
    }

    /// Drops the changes of a disk that is going away: only its references matter now.
    pub fn discard_changes(&mut self, map: &mut Map) {
        let mut changes = Changes::default();
        self.woken
            .join(map.collect(self.pool.shelf(), &mut changes));
        self.drops.append(&mut changes.drops);
    }

    /// Takes a generation: what exists now may be shared afterwards, what is born later is not.
    ///
    /// # Errors
    /// As [`Transaction::check_generation`].
    pub fn end_generation(&mut self) -> Result<Generation, PoolError> {
        let ended = self.check_generation()?;
        self.pool.generation.store(ended.0 + 1, Ordering::Relaxed);
        Ok(ended)
    }

    /// The generation that [`Transaction::end_generation`] would end: asked before anything is
    /// changed.
    ///
    /// # Errors
    /// All 2^32 are used up.
    pub fn check_generation(&self) -> Result<Generation, PoolError> {
        match self.pool.generation() {
            Generation(u32::MAX) => Err(PoolError::invalid(
                "this pool has seen 2^32 forks; copy its disks to a new one",
            )),
            now => Ok(now),
        }
    }

    /// A disk id never used before.
    ///
    /// # Errors
    /// All 2^32 are used up.
    pub fn new_id(&mut self) -> Result<DiskId, PoolError> {
        let id = self.pool.next_disk.load(Ordering::Relaxed);
        let next = id.checked_add(1).ok_or_else(|| {
            PoolError::invalid("this pool has had 2^32 disks; copy them to a new one")
        })?;
        self.pool.next_disk.store(next, Ordering::Relaxed);
        Ok(DiskId(id))
    }
}
