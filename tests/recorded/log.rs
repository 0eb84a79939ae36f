//! The recording: one file of records in the order in which things happened, of two devices at
//! once. The *store* is what the pool lies on; the *disk* is what the guest was given.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::ops::Range;
use std::path::Path;
use tidepool::sync::Mutex;

/// What happened. What begins has a number, by which [`Tag::StoreEnd`] or [`Tag::DiskEnd`] ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Tag {
    /// A write of the payload to the store was received.
    StoreWrite = 1,
    /// The same, durable when it has ended.
    StoreDurable,
    /// A punch of the store was received.
    StorePunch,
    /// The write or punch was done, and its sender is told next.
    StoreEnd,
    /// A flush of the store was done: all that ended before is durable.
    StoreFlush,
    /// The store is `len` bytes long from now on.
    StoreLen,
    /// The guest's write is about to be given to the server; the payload has a hash a sector.
    DiskWrite,
    /// A write of zeros likewise.
    DiskZero,
    /// A discard likewise.
    DiskDiscard,
    /// The guest's flush likewise.
    DiskFlush,
    /// The server has answered, and the guest is told next.
    DiskEnd,
    /// The guest says something: the payload is text.
    Note,
}

const TAGS: [Tag; 12] = [
    Tag::StoreWrite,
    Tag::StoreDurable,
    Tag::StorePunch,
    Tag::StoreEnd,
    Tag::StoreFlush,
    Tag::StoreLen,
    Tag::DiskWrite,
    Tag::DiskZero,
    Tag::DiskDiscard,
    Tag::DiskFlush,
    Tag::DiskEnd,
    Tag::Note,
];

/// Bytes of a record before its payload: tag, number, offset, length, length of the payload.
const HEAD: usize = 33;

/// One thing that happened.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) tag: Tag,
    pub(crate) number: u64,
    /// Bytes.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Where in [`Recording::bytes`].
    payload: Range<usize>,
}

/// Writes a recording; one at a time, so that the file has one order.
pub(crate) struct Recorder {
    file: Mutex<BufWriter<File>>,
}

impl Recorder {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        Ok(Self {
            file: Mutex::new(file),
        })
    }

    pub(crate) fn add(&self, tag: Tag, number: u64, offset: u64, len: u64, payload: &[u8]) {
        let mut head = [0; HEAD];
        head[0] = TAGS[usize::from(tag as u8) - 1] as u8;
        let fields = [number, offset, len, payload.len() as u64];
        for (at, field) in head[1..].chunks_exact_mut(8).zip(fields) {
            at.copy_from_slice(&field.to_le_bytes());
        }
        let mut file = self.file.lock();
        file.write_all(&head).expect("the recording can be written");
        file.write_all(payload)
            .expect("the recording can be written");
    }

    pub(crate) fn finish(&self) {
        self.file
            .lock()
            .flush()
            .expect("the recording can be written");
    }
}

/// A recording read back.
pub(crate) struct Recording {
    bytes: Vec<u8>,
    pub(crate) records: Vec<Record>,
}

impl Recording {
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(path)?;
        let mut records = Vec::new();
        let mut at = 0;
        while let Some(head) = bytes.get(at..at + HEAD) {
            let field = |n: usize| {
                let field = head[1 + n * 8..9 + n * 8].try_into().expect("8 bytes");
                u64::from_le_bytes(field)
            };
            let start = at + HEAD;
            let end = start + usize::try_from(field(3)).expect("it was in memory once");
            if end > bytes.len() {
                break; // whoever recorded was killed
            }
            records.push(Record {
                tag: TAGS[usize::from(head[0]) - 1],
                number: field(0),
                offset: field(1),
                len: field(2),
                payload: start..end,
            });
            at = end;
        }
        Ok(Self { bytes, records })
    }

    pub(crate) fn payload(&self, record: &Record) -> &[u8] {
        &self.bytes[record.payload.clone()]
    }
}

/// What stands for a sector in recordings and oracles.
pub(crate) fn hash(sector: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, sector)
}
