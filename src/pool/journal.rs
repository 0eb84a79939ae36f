//! Where the next batch goes, and reading batches back. Two halves are used in turn: a half is
//! written again only when a complete checkpoint image covers everything in it.

use super::error::PoolError;
use crate::format::FormatError;
use crate::format::journal::{
    BatchHeader, BatchWriter, HEADER_LEN, Record, SLOT_LEN, Stamp, decode_batch, decode_header,
};
use crate::format::superblock::{JournalStart, Superblock};
use crate::format::units::{BLOCK, index, len_of};
use crate::storage::{AlignedBuf, Storage};

/// Longest batch that is collected before it is written, bytes.
pub const BATCH_LEN_MAX: u64 = 256 << 10;

/// What a half holds.
#[derive(Debug, Clone, Copy)]
struct Half {
    /// Sequence number of its first batch, and the checksum of the batch before that one.
    first: JournalStart,
    /// Sequence number of its last batch; 0 if it holds none.
    last_seq: u64,
}

/// The journal's write position. Owned by whoever leads a commit: one batch is outstanding (R9).
#[derive(Debug)]
pub struct Journal {
    at: [u64; 2],
    half_len: u64,
    uuid_low: u64,
    open_epoch: u32,
    active: u32,
    used: u64,
    halves: [Option<Half>; 2],
    next_seq: u64,
    prev_crc: u32,
    /// Last batch included in the durable image.
    image_seq: u64,
    /// Byte and length of the last batch read or written.
    last: Option<(u64, u64)>,
}

impl Journal {
    /// The journal of a pool as `superblock` says, before replay.
    #[must_use]
    pub fn new(superblock: &Superblock) -> Self {
        let start = superblock.start;
        let mut halves = [None; 2];
        halves[index(start.half)] = Some(Half {
            first: start,
            last_seq: 0,
        });
        Self {
            at: superblock.journal_half,
            half_len: superblock.journal_half_len,
            uuid_low: uuid_low(&superblock.uuid),
            open_epoch: superblock.open_epoch,
            active: start.half,
            used: 0,
            halves,
            next_seq: start.seq,
            prev_crc: start.prev_crc,
            image_seq: superblock.image.map_or(0, |image| image.seq),
            last: None,
        }
    }

    /// Batches written from now on belong to opening `open_epoch`.
    pub fn set_open_epoch(&mut self, open_epoch: u32) {
        self.open_epoch = open_epoch;
    }

    /// Sequence number of the last batch; 0 before the first.
    #[must_use]
    pub fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    /// Bytes left in the active half.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.half_len - self.used
    }

    /// The active half is more than half full, and the image does not cover the other one yet.
    #[must_use]
    pub fn wants_image(&self) -> bool {
        let first = self.halves[index(self.active)].map_or(0, |half| half.first.seq);
        self.used > self.half_len / 2 && self.image_seq < first
    }

    /// The image covers all that is in the other half.
    #[must_use]
    pub fn can_switch(&self) -> bool {
        let other = self.halves[index(1 - self.active)];
        other.is_none_or(|half| half.last_seq <= self.image_seq)
    }

    /// Where replay must begin before the other half is overwritten, if it would begin there now:
    /// that the image covers a half does not keep a replay from looking for its first batch.
    #[must_use]
    pub fn start_before_switch(&self, start: JournalStart) -> Option<JournalStart> {
        (start.half != self.active).then(|| self.start_after(self.image_seq))
    }

    /// Goes on in the other half, whose contents are given up.
    pub fn switch(&mut self) {
        let half = 1 - self.active;
        let first = JournalStart {
            half,
            seq: self.next_seq,
            prev_crc: self.prev_crc,
        };
        self.halves[index(half)] = Some(Half { first, last_seq: 0 });
        self.active = half;
        self.used = 0;
    }

    /// Where replay must begin once an image of batch `image_seq` is in force.
    #[must_use]
    pub fn start_after(&self, image_seq: u64) -> JournalStart {
        let [active, other] = [self.active, 1 - self.active].map(|half| self.halves[index(half)]);
        let is_needed = |half: &Half| half.last_seq > image_seq;
        let half = other.filter(is_needed).or(active);
        half.expect("the active half always has a first batch")
            .first
    }

    /// The last batch the durable image includes; 0 without one.
    #[must_use]
    pub fn image_seq(&self) -> u64 {
        self.image_seq
    }

    /// The image of batch `seq` is durable, and the superblock names it.
    pub fn set_image_seq(&mut self, seq: u64) {
        self.image_seq = seq;
    }

    /// Writes `batch` durably. THE commit point: when this returns, its records count; before
    /// that, after a crash, either all or none.
    ///
    /// # Errors
    /// What the store said. The pool must be poisoned: whether the batch counts is not known.
    pub fn write(&mut self, storage: &dyn Storage, batch: BatchWriter) -> std::io::Result<()> {
        let len = batch.len();
        assert!(len <= self.room(), "the caller made room for the batch");
        let stamp = Stamp {
            uuid_low: self.uuid_low,
            seq: self.next_seq,
            open_epoch: self.open_epoch,
            prev_crc: self.prev_crc,
        };
        let (bytes, crc) = batch.seal(stamp);
        let mut aligned = AlignedBuf::new(bytes.len());
        aligned.copy_from_slice(&bytes);
        storage.write_durable_at(&aligned, self.at[index(self.active)] + self.used)?;
        self.advance(len, crc);
        Ok(())
    }

    fn advance(&mut self, len: u64, crc: u32) {
        self.last = Some((self.at[index(self.active)] + self.used, len));
        let half = self.halves[index(self.active)].as_mut();
        half.expect("the active half always has a first batch")
            .last_seq = self.next_seq;
        self.used += len;
        self.next_seq += 1;
        self.prev_crc = crc;
    }

    /// Reads the batch that would come next, and steps over it. `None` at the end of what was
    /// written. Batches an image covers are stepped over without being returned.
    ///
    /// # Errors
    /// The store failed, or a later batch is intact although this one is not: then the journal is
    /// damaged, and stopping here would lose what was acknowledged.
    pub fn replay_next(&mut self, storage: &dyn Storage) -> Result<Option<Vec<Record>>, PoolError> {
        loop {
            let found = match self.read_here(storage)? {
                Some(found) => Some(found),
                None if self.may_continue_in_other_half() => {
                    // The next batch may be there by a mistake of the device, and the others here.
                    self.refuse_if_later_batches(storage)?;
                    self.read_in_other_half(storage)?
                }
                None => None,
            };
            let Some((header, records)) = found else {
                self.refuse_if_later_batches(storage)?;
                return Ok(None);
            };
            let seq = self.next_seq;
            self.advance(header.len, header.crc);
            if seq > self.image_seq {
                return Ok(Some(records));
            }
        }
    }

    /// R11: makes the last batch that was read durable. The process that wrote it may have been
    /// killed, or told that it failed, before it was: then only a cache has it, and what the pool
    /// did next would outlive it. Those before it were durable when it was written (R9).
    ///
    /// # Errors
    /// The store failed.
    pub fn settle_last(&self, storage: &dyn Storage) -> Result<(), PoolError> {
        let Some((at, len)) = self.last else {
            return Ok(());
        };
        let mut batch = AlignedBuf::new(len_of(len));
        let settled = storage
            .read_at(&mut batch, at)
            .and_then(|()| storage.write_durable_at(&batch, at));
        settled.map_err(PoolError::storage("making the last batch durable"))
    }

    fn may_continue_in_other_half(&self) -> bool {
        self.used > 0 && self.halves[index(1 - self.active)].is_none()
    }

    fn read_in_other_half(
        &mut self,
        storage: &dyn Storage,
    ) -> Result<Option<(BatchHeader, Vec<Record>)>, PoolError> {
        let (active, used, halves) = (self.active, self.used, self.halves);
        self.switch();
        let found = self.read_here(storage)?;
        if found.is_none() {
            (self.active, self.used, self.halves) = (active, used, halves);
        }
        Ok(found)
    }

    /// The batch at the write position, if it is the next one.
    fn read_here(
        &self,
        storage: &dyn Storage,
    ) -> Result<Option<(BatchHeader, Vec<Record>)>, PoolError> {
        let read = PoolError::storage("reading the journal");
        if self.room() < BLOCK {
            return Ok(None);
        }
        let at = self.at[index(self.active)] + self.used;
        let mut block = AlignedBuf::new(len_of(BLOCK));
        storage.read_at(&mut block, at).map_err(read)?;
        let Ok(header) = decode_header(&block) else {
            return Ok(None);
        };
        if !self.is_next(&header) || header.len > self.room() {
            return Ok(None);
        }
        let mut batch = AlignedBuf::new(len_of(header.len));
        storage
            .read_at(&mut batch, at)
            .map_err(PoolError::storage("reading the journal"))?;
        match decode_batch(&header, &batch) {
            Ok(records) => Ok(Some((header, records))),
            Err(FormatError::Checksum { .. } | FormatError::Short { .. }) => Ok(None),
            // Whole, and the next one: it was acknowledged, and to stop before it would lose it.
            Err(e) => Err(e.into()),
        }
    }

    fn is_next(&self, header: &BatchHeader) -> bool {
        header.stamp.uuid_low == self.uuid_low
            && header.stamp.seq == self.next_seq
            && header.stamp.prev_crc == self.prev_crc
            && header.stamp.open_epoch <= self.open_epoch
    }

    /// Makes what follows the last good batch unreadable, for a repair that gives it up.
    ///
    /// # Errors
    /// The store failed.
    pub fn erase_rest(&self, storage: &dyn Storage) -> Result<(), PoolError> {
        let zeros = AlignedBuf::new(len_of(BATCH_LEN_MAX));
        let other = 1 - self.active;
        let is_needed = self.halves[index(other)].is_some_and(|half| half.last_seq > 0);
        let erase = |half: u32, from: u64| {
            let mut at = from;
            while at < self.half_len {
                let len = len_of((self.half_len - at).min(BATCH_LEN_MAX));
                storage.write_at(&zeros[..len], self.at[index(half)] + at)?;
                at += BATCH_LEN_MAX;
            }
            storage.flush()
        };
        let erased = erase(self.active, self.used)
            .and_then(|()| if is_needed { Ok(()) } else { erase(other, 0) });
        erased.map_err(PoolError::storage("erasing the damaged end of the journal"))
    }

    /// One batch is outstanding at a time (R9), so nothing intact follows the end of the journal
    /// except batches of earlier rounds, with lower numbers.
    fn refuse_if_later_batches(&self, storage: &dyn Storage) -> Result<(), PoolError> {
        let mut places = vec![(self.active, self.used)];
        let window = 2 * BATCH_LEN_MAX + 2 * BLOCK;
        let end = self.half_len.min(self.used.saturating_add(window));
        let blocks = (end - self.used.min(end)) / BLOCK;
        places.extend((1..blocks).map(|n| (self.active, self.used + n * BLOCK)));
        places.push((1 - self.active, 0));
        let mut block = AlignedBuf::new(len_of(BLOCK));
        for (half, used) in places {
            if used + BLOCK > self.half_len {
                continue;
            }
            let at = self.at[index(half)] + used;
            storage
                .read_at(&mut block, at)
                .map_err(PoolError::storage("reading the journal"))?;
            let Ok(header) = decode_header(&block) else {
                continue;
            };
            let is_ours = header.stamp.uuid_low == self.uuid_low;
            if is_ours && header.stamp.seq > self.next_seq && header.len <= self.half_len - used {
                let mut batch = AlignedBuf::new(len_of(header.len));
                storage
                    .read_at(&mut batch, at)
                    .map_err(PoolError::storage("reading the journal"))?;
                if decode_batch(&header, &batch).is_ok() {
                    return Err(PoolError::damaged(format!(
                        "journal batch {} cannot be read, but batch {} after it can",
                        self.next_seq, header.stamp.seq
                    )));
                }
            }
        }
        Ok(())
    }
}

/// First 8 bytes of a pool's uuid: marks its batches and image blocks.
#[must_use]
pub fn uuid_low(uuid: &[u8; 16]) -> u64 {
    let (low, _) = uuid
        .split_first_chunk::<8>()
        .expect("16 bytes have a first 8");
    u64::from_le_bytes(*low)
}

/// Records that fit one batch, rows not counted.
#[must_use]
pub fn records_per_batch() -> usize {
    len_of(BATCH_LEN_MAX) / SLOT_LEN - HEADER_LEN / SLOT_LEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::units::DiskId;
    use crate::storage::SimStorage;

    /// Writes one-block batches until the half is full.
    fn fill(journal: &mut Journal, storage: &SimStorage) {
        while journal.room() >= BLOCK {
            let mut batch = BatchWriter::default();
            let record = Record::Delete { disk: DiskId(1) };
            batch.push(&record).expect("a short record");
            journal.write(storage, batch).expect("the store works");
        }
    }

    fn pool_with_image(start: JournalStart, image_seq: u64) -> Superblock {
        let mut superblock = crate::format::superblock::tests::sample();
        superblock.start = start;
        superblock.image = superblock
            .image
            .map(|image| crate::format::superblock::ImageRef {
                seq: image_seq,
                ..image
            });
        superblock
    }

    #[test]
    fn replay_never_begins_in_a_half_that_is_overwritten() {
        let storage = SimStorage::new(8 << 20);
        let first = JournalStart {
            half: 0,
            seq: 1,
            prev_crc: 0,
        };
        let mut journal = Journal::new(&pool_with_image(first, 0));
        fill(&mut journal, &storage);
        // An image of everything so far comes into force before the half is left.
        let image_seq = journal.last_seq();
        let start = journal.start_after(image_seq);
        journal.set_image_seq(image_seq);
        assert_eq!((start, journal.start_before_switch(start)), (first, None));
        journal.switch();
        fill(&mut journal, &storage);
        assert!(journal.can_switch(), "the image covers the first half");
        let start = journal
            .start_before_switch(start)
            .expect("replay would begin there");
        journal.switch();
        fill(&mut journal, &storage);
        let mut replay = Journal::new(&pool_with_image(start, image_seq));
        replay.set_open_epoch(journal.open_epoch);
        let mut found = 0;
        while replay
            .replay_next(&storage)
            .expect("nothing is missing")
            .is_some()
        {
            found += 1;
        }
        assert_eq!(found, journal.last_seq() - image_seq);
    }
}
