//! What the disk may hold at any moment, sector by sector, from what the guest was told: after a
//! crash a sector holds the last version that was answered before an acknowledged flush was asked
//! for, or one that came after it, answered or not. Nothing of anybody else's, nothing torn.

use super::log::{Record, Tag, hash};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

pub(crate) const SECTOR: u64 = 512;
/// Bytes of a block in pools of clusters of 64 KiB: a discard zeros whole ones, and nothing else.
const BLOCK: u64 = 4096;

/// Contents a sector had at some time.
#[derive(Debug, Clone)]
struct Version {
    hash: u64,
    /// Moments, in records; 0 is before everything.
    begun: u64,
    ended: Option<u64>,
}

/// Sectors of one request.
#[derive(Debug, Clone)]
struct Span {
    first: u64,
    count: u64,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Oracle {
    /// The one version of a sector that is not in `open`.
    settled: Vec<u64>,
    open: BTreeMap<u64, Vec<Version>>,
    /// Requests without an answer.
    begun: BTreeMap<u64, Span>,
    /// Flushes without one, and when they began.
    flushes: BTreeMap<u64, u64>,
    now: u64,
    zero: u64,
    /// Flushes that were acknowledged.
    pub(crate) flushed: u64,
}

fn index(small: u64) -> usize {
    usize::try_from(small).expect("fits")
}

impl Oracle {
    /// A disk that holds `bytes`, durably.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let sector = index(SECTOR);
        Self {
            settled: bytes.chunks_exact(sector).map(hash).collect(),
            open: BTreeMap::new(),
            begun: BTreeMap::new(),
            flushes: BTreeMap::new(),
            now: 0,
            zero: hash(&[0; 512]),
            flushed: 0,
        }
    }

    /// One more thing that happened.
    pub(crate) fn apply(&mut self, record: &Record, payload: &[u8]) {
        self.now += 1;
        let number = record.number;
        match record.tag {
            Tag::DiskWrite => {
                let hashes = payload
                    .chunks_exact(8)
                    .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
                self.begin(number, record.offset, hashes);
            }
            Tag::DiskZero => self.begin_zeros(number, record.offset..record.offset + record.len),
            Tag::DiskDiscard => {
                let end = record.offset + record.len;
                let is_disk_end = end == self.settled.len() as u64 * SECTOR;
                let end = if is_disk_end {
                    end
                } else {
                    end / BLOCK * BLOCK
                };
                let begin = record.offset.next_multiple_of(BLOCK).min(end);
                self.begin_zeros(number, begin..end);
            }
            Tag::DiskFlush => {
                self.flushes.insert(number, self.now);
            }
            Tag::DiskEnd => {
                if let Some(asked) = self.flushes.remove(&number) {
                    self.flushed += 1;
                    self.settle(asked);
                } else {
                    self.end(number);
                }
            }
            Tag::StoreWrite
            | Tag::StoreDurable
            | Tag::StorePunch
            | Tag::StoreEnd
            | Tag::StoreFlush
            | Tag::StoreLen
            | Tag::Note => {}
        }
    }

    fn begin_zeros(&mut self, number: u64, range: Range<u64>) {
        let count = (range.end - range.start) / SECTOR;
        let zeros = std::iter::repeat_n(self.zero, index(count));
        self.begin(number, range.start, zeros);
    }

    fn begin(&mut self, number: u64, offset: u64, hashes: impl Iterator<Item = u64>) {
        let first = offset / SECTOR;
        let mut count = 0;
        for (sector, hash) in (first..).zip(hashes) {
            count += 1;
            if !self.open.contains_key(&sector) && self.settled[index(sector)] == hash {
                continue; // it makes no difference
            }
            let versions = self.open.entry(sector).or_insert_with(|| {
                vec![Version {
                    hash: self.settled[index(sector)],
                    begun: 0,
                    ended: Some(0),
                }]
            });
            versions.push(Version {
                hash,
                begun: self.now,
                ended: None,
            });
        }
        self.begun.insert(number, Span { first, count });
    }

    fn end(&mut self, number: u64) {
        let span = self.begun.remove(&number).expect("it began");
        let others: BTreeSet<u64> = self
            .begun
            .values()
            .flat_map(|other| {
                let end = (other.first + other.count).min(span.first + span.count);
                other.first.max(span.first)..end
            })
            .collect();
        for sector in span.first..span.first + span.count {
            if others.contains(&sector) {
                continue; // which of the two ended? The later answer ends both.
            }
            for version in self.open.get_mut(&sector).into_iter().flatten() {
                version.ended.get_or_insert(self.now);
            }
        }
    }

    /// A flush that was asked for at `asked` has been acknowledged.
    fn settle(&mut self, asked: u64) {
        let settled = &mut self.settled;
        self.open.retain(|sector, versions| {
            let is_saved = |version: &&Version| version.ended.is_some_and(|ended| ended < asked);
            let saved = versions.iter().filter(is_saved);
            let newest = saved.map(|version| version.begun).max().unwrap_or(0);
            // what had ended before the newest saved version began is gone for good
            versions.retain(|version| version.ended.is_none_or(|ended| ended >= newest));
            match versions.as_slice() {
                [only] if only.ended.is_some() => {
                    settled[index(*sector)] = only.hash;
                    false
                }
                _ => true,
            }
        });
    }

    /// Compares the disk's bytes from `offset`; what is wrong, if anything.
    pub(crate) fn compare(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let first = offset / SECTOR;
        for (sector, held) in (first..).zip(bytes.chunks_exact(index(SECTOR))) {
            let held = hash(held);
            let is_known = match self.open.get(&sector) {
                None => held == self.settled[index(sector)],
                Some(versions) => versions.iter().any(|version| version.hash == held),
            };
            if !is_known {
                return Err(format!(
                    "sector {sector} holds {held:#x}; it may hold {:#x} or one of {:x?}",
                    self.settled[index(sector)],
                    self.open.get(&sector)
                ));
            }
        }
        Ok(())
    }
}

/// What the guest said of its files: `sum PATH SHA256` once a file is durable, `loose PATH` before
/// it does anything to it again.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes {
    /// Sums by path below the mount point.
    pub(crate) files: BTreeMap<String, String>,
    /// The file system was made and mounted once, and that is durable.
    pub(crate) is_made: bool,
}

impl Notes {
    pub(crate) fn apply(&mut self, text: &str) {
        let mut words = text.split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some("sum"), Some(path), Some(sum)) => {
                self.files.insert(path.to_owned(), sum.to_owned());
            }
            (Some("loose"), Some(path), None) => {
                self.files.remove(path);
            }
            (Some("made"), None, None) => self.is_made = true,
            _ => panic!("the guest noted {text:?}"),
        }
    }
}
