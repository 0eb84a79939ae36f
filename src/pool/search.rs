//! Looking for batches where the journal does not say that there are any: whole ones tell what is
//! lost when it is damaged.

use super::error::PoolError;
use crate::format::journal::{BatchHeader, Record, Stamp, decode_batch, decode_header};
use crate::format::units::{BLOCK, bytes_of, index, len_of};
use crate::storage::{AlignedBuf, Storage};
use std::ops::Range;

/// Journal read at once, bytes.
const PART_LEN: u64 = 1 << 20;
/// Halves' worth of what only looks like batches, after which it is no longer looked at.
const BUDGET: u64 = 4;

/// Where to look, and for what.
#[derive(Clone, Copy)]
pub(super) struct Search<'a> {
    pub storage: &'a dyn Storage,
    /// Bytes of the store at which the halves begin.
    pub at: [u64; 2],
    /// Bytes in a half.
    pub half_len: u64,
    /// The pool.
    pub uuid_low: u64,
    /// Batches with lower numbers are of no interest.
    pub min_seq: u64,
}

/// A whole batch.
pub(super) struct Found {
    pub half: u32,
    /// Its byte in the half.
    pub used: u64,
    /// Bytes.
    pub len: u64,
    pub crc: u32,
    pub stamp: Stamp,
    pub records: Vec<Record>,
}

impl Search<'_> {
    /// Calls `visit` with every whole batch of the pool.
    ///
    /// # Errors
    /// The store failed.
    pub(super) fn all(&self, visit: &mut dyn FnMut(Found)) -> Result<(), PoolError> {
        for half in [0, 1] {
            self.range(half, 0..self.half_len, &mut |found| {
                visit(found);
                true
            })?;
        }
        Ok(())
    }

    /// Calls `visit` with every whole batch of the pool that begins in `range` of a half, until it
    /// has seen enough.
    ///
    /// # Errors
    /// The store failed.
    pub(super) fn range(
        &self,
        half: u32,
        range: Range<u64>,
        visit: &mut dyn FnMut(Found) -> bool,
    ) -> Result<(), PoolError> {
        let end = range.end.min(self.half_len);
        let mut budget = BUDGET * self.half_len;
        let mut used = range.start;
        while used < end {
            let part_at = used;
            let part = self.read(half, used..end.min(used + PART_LEN))?;
            let part_end = used + bytes_of(part.len());
            while used < part_end {
                let header = decode_header(&part[len_of(used - part_at)..]).ok();
                let header = header.filter(|header| self.is_wanted(header, used, budget));
                let Some(header) = header else {
                    used += BLOCK;
                    continue;
                };
                budget -= header.len;
                let batch = self.read(half, used..used + header.len)?;
                let Ok(records) = decode_batch(&header, &batch) else {
                    used += BLOCK;
                    continue;
                };
                let stamp = header.stamp;
                let found = Found {
                    half,
                    used,
                    len: header.len,
                    crc: header.crc,
                    stamp,
                    records,
                };
                if !visit(found) {
                    return Ok(());
                }
                used += header.len;
            }
        }
        Ok(())
    }

    fn is_wanted(&self, header: &BatchHeader, used: u64, budget: u64) -> bool {
        header.stamp.uuid_low == self.uuid_low
            && header.stamp.seq >= self.min_seq
            && header.len <= budget.min(self.half_len - used)
    }

    fn read(&self, half: u32, range: Range<u64>) -> Result<AlignedBuf, PoolError> {
        let mut bytes = AlignedBuf::new(len_of(range.end - range.start));
        let read = self
            .storage
            .read_at(&mut bytes, self.at[index(half)] + range.start);
        read.map_err(PoolError::storage("reading the journal"))?;
        Ok(bytes)
    }
}
