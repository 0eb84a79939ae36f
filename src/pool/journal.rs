//! Where the next batch goes, and reading batches back. Two halves are used in turn: a half is
//! written again only when a complete checkpoint image covers everything in it.

use super::error::PoolError;
use super::search::Search;
use crate::format::FormatError;
use crate::format::journal::{
    BatchHeader, BatchWriter, HEADER_LEN, Record, SLOT_LEN, Stamp, damaged_records, decode_batch,
    decode_header,
};
use crate::format::superblock::{JournalStart, KnownBatch, Superblock};
use crate::format::units::{BLOCK, index, len_of};
use crate::storage::{AlignedBuf, Storage};
use std::collections::BTreeMap;

/// Longest batch that is collected before it is written, bytes.
pub const BATCH_LEN_MAX: u64 = 256 << 10;

/// Longest batch of all, bytes: one structural change of many rows.
pub const LONG_BATCH_LEN_MAX: u64 = 8 << 20;

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
    /// A batch that must be there.
    known: Option<KnownBatch>,
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
            known: superblock.known,
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

    /// The last batch; `None` before the first.
    #[must_use]
    pub fn last_batch(&self) -> Option<KnownBatch> {
        let (seq, crc) = (self.last_seq(), self.prev_crc);
        (seq > 0).then_some(KnownBatch { seq, crc })
    }

    /// The last batch that the superblock says there was; 0 if it says nothing.
    #[must_use]
    pub fn known_seq(&self) -> u64 {
        self.known.map_or(0, |known| known.seq)
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
    /// written. Of batches that an image covers, nothing is returned.
    ///
    /// # Errors
    /// The store failed; a later batch is intact although this one is not, or the superblock knows of
    /// this one: then the journal is damaged, and stopping here would lose what was acknowledged.
    pub fn replay_next(&mut self, storage: &dyn Storage) -> Result<Option<Vec<Record>>, PoolError> {
        let found = match self.read_here(storage)? {
            Some(found) => Some(found),
            None if self.may_continue_in_other_half() => {
                // The next batch may be there by a mistake of the device, and the others here.
                self.refuse_if_later(storage, self.active, self.used)?;
                self.read_in_other_half(storage)?
            }
            None => None,
        };
        let Some((header, records)) = found else {
            self.refuse_if_later(storage, self.active, self.used)?;
            self.refuse_if_later(storage, 1 - self.active, 0)?;
            return match self.last_seq() < self.known_seq() {
                true => Err(PoolError::damaged(format!(
                    "journal batch {} cannot be read, but the pool had batch {} when it was last \
                     opened or closed",
                    self.next_seq,
                    self.known_seq()
                ))),
                false => Ok(None),
            };
        };
        let is_other = |known: KnownBatch| known.seq == self.next_seq && known.crc != header.crc;
        if self.known.is_some_and(is_other) {
            return Err(PoolError::damaged(format!(
                "journal batch {} is not the one that the pool had when it was last opened or closed",
                self.next_seq
            )));
        }
        let is_covered = self.next_seq <= self.image_seq;
        self.advance(header.len, header.crc);
        Ok(Some(if is_covered { Vec::new() } else { records }))
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

    /// One batch is outstanding at a time (R9), so nothing intact follows the end of the journal
    /// except batches of earlier rounds, with lower numbers. Looks from byte `from` of a half on,
    /// over the longest batch that cannot be read and at the one after it.
    fn refuse_if_later(
        &self,
        storage: &dyn Storage,
        half: u32,
        from: u64,
    ) -> Result<(), PoolError> {
        let end = from.saturating_add(LONG_BATCH_LEN_MAX + BLOCK);
        let mut later = None;
        let search = self.search(storage, self.next_seq.saturating_add(1));
        search.range(half, from..end, &mut |found| {
            later = Some(found.stamp.seq);
            false
        })?;
        match later {
            None => Ok(()),
            Some(later) => Err(PoolError::damaged(format!(
                "journal batch {} cannot be read, but batch {later} after it can",
                self.next_seq
            ))),
        }
    }

    /// What all whole batches of this pool from number `seq` on say, in their order, wherever they
    /// are: what is lost if they are given up. Reads all of both halves.
    ///
    /// # Errors
    /// The store failed.
    pub fn intact_from(&self, storage: &dyn Storage, seq: u64) -> Result<GivenUp, PoolError> {
        let mut batches = BTreeMap::new();
        self.search(storage, seq).all(&mut |found| {
            let Stamp {
                seq, open_epoch, ..
            } = found.stamp;
            batches.insert((seq, open_epoch), found.records);
        })?;
        let follow = |((one, _), n): (&(u64, u32), u64)| *one == n;
        let is_whole = !batches.is_empty() && batches.keys().zip(seq..).all(follow);
        let last = batches.keys().last().map_or(0, |(seq, _)| *seq);
        Ok(GivenUp {
            first: seq,
            is_whole: is_whole && last >= self.known_seq(),
            records: batches.into_values().flatten().collect(),
            damaged: self.damaged_next(storage, seq)?,
        })
    }

    /// What is left of batch `seq` at the write position, if that is its place.
    fn damaged_next(&self, storage: &dyn Storage, seq: u64) -> Result<Vec<Record>, PoolError> {
        let reading = || PoolError::storage("reading the journal");
        if self.room() < BLOCK {
            return Ok(Vec::new());
        }
        let at = self.at[index(self.active)] + self.used;
        let mut block = AlignedBuf::new(len_of(BLOCK));
        storage.read_at(&mut block, at).map_err(reading())?;
        let header = decode_header(&block).ok();
        let is_its = |header: &BatchHeader| {
            let stamp = header.stamp;
            stamp.seq == seq && stamp.uuid_low == self.uuid_low && header.len <= self.room()
        };
        let Some(header) = header.filter(is_its) else {
            return Ok(Vec::new());
        };
        let mut batch = AlignedBuf::new(len_of(header.len));
        storage.read_at(&mut batch, at).map_err(reading())?;
        Ok(match decode_batch(&header, &batch) {
            // It is among those that can be read.
            Ok(_) => Vec::new(),
            Err(_) => damaged_records(&header, &batch),
        })
    }

    /// All whole batches of this pool from number `seq` on, in their order.
    ///
    /// # Errors
    /// The store failed.
    pub(super) fn batches_from(
        &self,
        storage: &dyn Storage,
        seq: u64,
    ) -> Result<Vec<Batch>, PoolError> {
        let mut batches = Vec::new();
        self.search(storage, seq).all(&mut |found| {
            batches.push(Batch {
                seq: found.stamp.seq,
                prev_crc: found.stamp.prev_crc,
                crc: found.crc,
                records: found.records,
            });
        })?;
        batches.sort_by_key(|batch| batch.seq);
        Ok(batches)
    }

    /// The highest number of a whole batch of this pool, wherever it is; 0 if there is none.
    ///
    /// # Errors
    /// The store failed.
    pub fn highest_intact(&self, storage: &dyn Storage) -> Result<u64, PoolError> {
        let mut highest = 0;
        self.search(storage, 0)
            .all(&mut |found| highest = highest.max(found.stamp.seq))?;
        Ok(highest)
    }

    /// Goes to the first batch that the image does not cover, wherever it is; whether there is one.
    ///
    /// # Errors
    /// The store failed.
    pub fn skip_to_image(&mut self, storage: &dyn Storage) -> Result<bool, PoolError> {
        let seq = self.image_seq.saturating_add(1);
        let mut best: Option<(u32, u64, Stamp)> = None;
        self.search(storage, seq).all(&mut |found| {
            let stamp = found.stamp;
            let is_newer = best.is_none_or(|(_, _, known)| known.open_epoch < stamp.open_epoch);
            if stamp.seq == seq && stamp.open_epoch <= self.open_epoch && is_newer {
                best = Some((found.half, found.used, stamp));
            }
        })?;
        let Some((half, used, stamp)) = best else {
            return Ok(false);
        };
        let first = JournalStart {
            half,
            seq,
            prev_crc: stamp.prev_crc,
        };
        (self.active, self.used) = (half, used);
        (self.next_seq, self.prev_crc) = (seq, stamp.prev_crc);
        // Nothing is known of the other half: the journal may go on there.
        self.halves = [None; 2];
        self.halves[index(half)] = Some(Half { first, last_seq: 0 });
        Ok(true)
    }

    /// For looking at all that there is.
    pub(super) fn search<'a>(&self, storage: &'a dyn Storage, min_seq: u64) -> Search<'a> {
        Search {
            storage,
            at: self.at,
            half_len: self.half_len,
            uuid_low: self.uuid_low,
            min_seq,
        }
    }
}

/// A whole batch.
#[derive(Debug)]
pub(super) struct Batch {
    pub seq: u64,
    pub prev_crc: u32,
    pub crc: u32,
    pub records: Vec<Record>,
}

/// What batches say that replay cannot reach.
#[derive(Debug, Default)]
pub struct GivenUp {
    /// Number of the first one that is given up.
    pub first: u64,
    /// Every batch from there on that is known of can be read.
    pub is_whole: bool,
    /// Of those that can be read, in their order.
    pub records: Vec<Record>,
    /// What is left of the first one, if that is damaged: any of it may be wrong.
    pub damaged: Vec<Record>,
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
        while let Some(records) = replay.replay_next(&storage).expect("nothing is missing") {
            found += u64::from(!records.is_empty());
        }
        assert_eq!(found, journal.last_seq() - image_seq);
    }
}
