//! A journal batch: a header and 32-byte records, padded with zeros to whole 4 KiB blocks, one
//! checksum over all. Every record says what things are afterwards, so replay is idempotent.
//!
//! A batch is one atom: after a crash all of its records count or none does. What must happen
//! together (fork COUNT disks, checkpoint the disks of a group of VMs) goes into one batch.

use super::catalogue::Row;
use super::units::{BLOCK, DiskId, Generation, Lcn, bytes_of, len_of};
use super::{FormatError, crc32c, reserved_is_zero};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes in a record slot.
pub const SLOT_LEN: usize = 32;
/// Bytes in a batch header.
pub const HEADER_LEN: usize = 64;
/// Longest catalogue row, bytes of JSON.
pub const ROW_LEN_MAX: usize = 8 << 10;

const MAGIC: [u8; 4] = *b"TPJB";
const SALT: [u8; 4] = *b"TPJB";
const WHAT: &str = "journal batch";

const KIND_MAP: u8 = 1;
const KIND_UNMAP: u8 = 2;
const KIND_FORK: u8 = 3;
const KIND_ROW: u8 = 4;
const KIND_DELETE: u8 = 5;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    crc: U32,
    uuid_low: U64,
    seq: U64,
    open_epoch: U32,
    prev_crc: U32,
    slots: U32,
    len: U32,
    reserved: [u8; 24],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);
const _: () = assert!(std::mem::offset_of!(RawHeader, slots) == 32);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
struct RawRecord {
    kind: u8,
    flags: u8,
    alloc: U16,
    zero: U16,
    reserved: U16,
    disk: U32,
    first: U32,
    second: U32,
    third: U32,
    fourth: U32,
    reserved_tail: U32,
}
const _: () = assert!(size_of::<RawRecord>() == SLOT_LEN);

/// What one cluster of a disk maps to. See `pool::entry` for how it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Pool cluster this disk writes to; 0 for none.
    pub own: u32,
    /// Pool cluster with the data of every sub-cluster in neither mask; 0 for the base, or zeros.
    pub under: u32,
    /// Sub-clusters whose data is in `own`.
    pub alloc: u16,
    /// Sub-clusters that read as zeros. Disjoint from `alloc`.
    pub zero: u16,
    /// Generation in which `own` became this disk's alone.
    pub birth: u32,
}

/// One change to the pool's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Cluster `lcn` of `disk` maps to `entry`.
    Map {
        /// The disk.
        disk: DiskId,
        /// Its cluster.
        lcn: Lcn,
        /// What it maps to.
        entry: Entry,
    },
    /// `count` clusters of `disk` from `first` map to nothing of their own.
    Unmap {
        /// The disk.
        disk: DiskId,
        /// First cluster.
        first: Lcn,
        /// Clusters; at least 1.
        count: u32,
        /// They read as zeros, although there is a base under them.
        is_zeroed: bool,
    },
    /// The map of `to` becomes that of `from`; neither may write in place to what it holds now.
    Fork {
        /// The disk that is copied.
        from: DiskId,
        /// The disk that becomes the copy: new, or rolled back, or committed into.
        to: DiskId,
        /// Generation that ends here.
        generation: Generation,
    },
    /// The catalogue row of a disk: new or changed.
    Row(Box<Row>),
    /// The disk and its map are gone.
    Delete {
        /// The disk.
        disk: DiskId,
    },
}

/// Identity and position of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// First 8 bytes of the pool's uuid, little-endian.
    pub uuid_low: u64,
    /// One more than the batch before.
    pub seq: u64,
    /// The opening of the pool that wrote it.
    pub open_epoch: u32,
    /// Checksum of the batch before, so that a batch of an earlier life never follows one of a
    /// later life.
    pub prev_crc: u32,
}

/// What a slot names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotNames {
    /// The disk.
    pub disk: DiskId,
    /// Clusters of the pool; 0 for none.
    pub clusters: [u32; 2],
}

/// What a slot of a batch that is damaged may have named; `None` if it is no record.
#[must_use]
pub fn slot_names(slot: &[u8]) -> Option<SlotNames> {
    let raw = RawRecord::read_from_bytes(slot).ok()?;
    let clusters = match raw.kind {
        KIND_MAP => [raw.second.get(), raw.third.get()],
        KIND_UNMAP | KIND_FORK | KIND_ROW | KIND_DELETE => [0, 0],
        _ => return None,
    };
    let disk = DiskId(raw.disk.get());
    Some(SlotNames { disk, clusters })
}

/// Slots that `record` takes in a batch.
///
/// # Errors
/// A row longer than [`ROW_LEN_MAX`].
pub fn slots_of(record: &Record) -> Result<usize, FormatError> {
    match record {
        Record::Map { .. } | Record::Unmap { .. } | Record::Fork { .. } | Record::Delete { .. } => {
            Ok(1)
        }
        Record::Row(row) => Ok(row.to_json()?.len().div_ceil(SLOT_LEN).saturating_add(1)),
    }
}

/// Collects records and seals them.
#[derive(Debug)]
pub struct BatchWriter {
    bytes: Vec<u8>,
    slots: u32,
}

impl Default for BatchWriter {
    fn default() -> Self {
        Self {
            bytes: vec![0; HEADER_LEN],
            slots: 0,
        }
    }
}

impl BatchWriter {
    /// Bytes of the batch if it were sealed now.
    #[must_use]
    pub fn len(&self) -> u64 {
        bytes_of(self.bytes.len()).next_multiple_of(BLOCK)
    }

    /// No record yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots == 0
    }

    /// Adds a record.
    ///
    /// # Errors
    /// A row longer than [`ROW_LEN_MAX`]; nothing was added.
    pub fn push(&mut self, record: &Record) -> Result<(), FormatError> {
        let mut raw = RawRecord::new_zeroed();
        match record {
            Record::Map { disk, lcn, entry } => {
                raw.kind = KIND_MAP;
                raw.alloc = entry.alloc.into();
                raw.zero = entry.zero.into();
                raw.disk = disk.0.into();
                raw.first = lcn.0.into();
                raw.second = entry.own.into();
                raw.third = entry.under.into();
                raw.fourth = entry.birth.into();
            }
            Record::Unmap {
                disk,
                first,
                count,
                is_zeroed,
            } => {
                raw.kind = KIND_UNMAP;
                raw.flags = u8::from(*is_zeroed);
                raw.disk = disk.0.into();
                raw.first = first.0.into();
                raw.second = (*count).into();
            }
            Record::Fork {
                from,
                to,
                generation,
            } => {
                raw.kind = KIND_FORK;
                raw.disk = from.0.into();
                raw.first = to.0.into();
                raw.second = generation.0.into();
            }
            Record::Row(row) => return self.push_row(row),
            Record::Delete { disk } => {
                raw.kind = KIND_DELETE;
                raw.disk = disk.0.into();
            }
        }
        self.bytes.extend_from_slice(raw.as_bytes());
        self.slots = self.slots.saturating_add(1);
        Ok(())
    }

    fn push_row(&mut self, row: &Row) -> Result<(), FormatError> {
        let json = row.to_json()?;
        let slots = json.len().div_ceil(SLOT_LEN);
        let mut raw = RawRecord::new_zeroed();
        raw.kind = KIND_ROW;
        raw.disk = row.id.0.into();
        raw.first = u32::try_from(json.len()).unwrap_or(u32::MAX).into();
        self.bytes.extend_from_slice(raw.as_bytes());
        self.bytes.extend_from_slice(&json);
        let padding = slots.saturating_mul(SLOT_LEN).saturating_sub(json.len());
        self.bytes
            .resize(self.bytes.len().saturating_add(padding), 0);
        let added = u32::try_from(slots).unwrap_or(u32::MAX).saturating_add(1);
        self.slots = self.slots.saturating_add(added);
        Ok(())
    }

    /// The bytes to write, and their checksum for the next batch's `prev_crc`.
    #[must_use]
    pub fn seal(mut self, stamp: Stamp) -> (Vec<u8>, u32) {
        let len = self.len();
        self.bytes.resize(len_of(len), 0);
        let mut header = RawHeader::new_zeroed();
        header.magic = MAGIC;
        header.uuid_low = stamp.uuid_low.into();
        header.seq = stamp.seq.into();
        header.open_epoch = stamp.open_epoch.into();
        header.prev_crc = stamp.prev_crc.into();
        header.slots = self.slots.into();
        header.len = u32::try_from(len).unwrap_or(u32::MAX).into();
        let body = self.bytes.get(HEADER_LEN..).unwrap_or_default();
        let crc = crc32c(SALT, &[header.as_bytes(), body]);
        header.crc = crc.into();
        if let Some(head) = self.bytes.get_mut(..HEADER_LEN) {
            head.copy_from_slice(header.as_bytes());
        }
        (self.bytes, crc)
    }
}

/// A header that is worth reading the rest of the batch for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Identity and position.
    pub stamp: Stamp,
    /// Bytes of the whole batch; a multiple of 4096.
    pub len: u64,
    /// Record slots in it.
    pub slots: u32,
    /// Checksum of the whole batch.
    pub crc: u32,
}

/// Reads the header at the start of `block`.
///
/// # Errors
/// It is not one. Nothing is said yet of the batch's contents.
pub fn decode_header(block: &[u8]) -> Result<BatchHeader, FormatError> {
    let (raw, _) =
        RawHeader::read_from_prefix(block).map_err(|_short| FormatError::Short { what: WHAT })?;
    if raw.magic != MAGIC {
        return Err(FormatError::Magic { what: WHAT });
    }
    reserved_is_zero(WHAT, &raw.reserved)?;
    let len = u64::from(raw.len.get());
    let slots = raw.slots.get();
    let needed = u64::from(slots)
        .saturating_mul(bytes_of(SLOT_LEN))
        .saturating_add(bytes_of(HEADER_LEN));
    if slots == 0 || len != needed.next_multiple_of(BLOCK) {
        return Err(FormatError::Field {
            what: WHAT,
            field: "len",
            value: len,
        });
    }
    let stamp = Stamp {
        uuid_low: raw.uuid_low.get(),
        seq: raw.seq.get(),
        open_epoch: raw.open_epoch.get(),
        prev_crc: raw.prev_crc.get(),
    };
    Ok(BatchHeader {
        stamp,
        len,
        slots,
        crc: raw.crc.get(),
    })
}

/// The records of the batch `bytes`, whose header is `header`.
///
/// # Errors
/// A wrong checksum, or a record that cannot be.
pub fn decode_batch(header: &BatchHeader, bytes: &[u8]) -> Result<Vec<Record>, FormatError> {
    let short = FormatError::Short { what: WHAT };
    let batch = bytes.get(..len_of(header.len)).ok_or(short.clone())?;
    let (head, body) = batch.split_at_checked(HEADER_LEN).ok_or(short)?;
    let mut raw =
        RawHeader::read_from_bytes(head).map_err(|_short| FormatError::Short { what: WHAT })?;
    raw.crc = 0.into();
    let computed = crc32c(SALT, &[raw.as_bytes(), body]);
    if computed != header.crc {
        return Err(FormatError::Checksum {
            what: WHAT,
            found: header.crc,
            computed,
        });
    }
    let mut records = Vec::new();
    decode_slots(header, body, &mut records)?;
    Ok(records)
}

/// The records of the damaged batch `bytes` up to the first that cannot be. Any of them may be wrong.
#[must_use]
pub fn damaged_records(header: &BatchHeader, bytes: &[u8]) -> Vec<Record> {
    let batch = bytes.get(..len_of(header.len)).unwrap_or(bytes);
    let body = batch.get(HEADER_LEN..).unwrap_or_default();
    let mut records = Vec::new();
    match decode_slots(header, body, &mut records) {
        Ok(()) | Err(_) => records,
    }
}

fn decode_slots(
    header: &BatchHeader,
    body: &[u8],
    records: &mut Vec<Record>,
) -> Result<(), FormatError> {
    let mut slots = body
        .chunks_exact(SLOT_LEN)
        .take(usize::try_from(header.slots).unwrap_or(usize::MAX));
    while let Some(slot) = slots.next() {
        let raw =
            RawRecord::read_from_bytes(slot).map_err(|_short| FormatError::Short { what: WHAT })?;
        records.push(decode_record(&raw, &mut slots)?);
    }
    Ok(())
}

fn decode_record<'a>(
    raw: &RawRecord,
    rest: &mut impl Iterator<Item = &'a [u8]>,
) -> Result<Record, FormatError> {
    let field = |field, value| FormatError::Field {
        what: "journal record",
        field,
        value,
    };
    if raw.reserved.get() != 0 || raw.reserved_tail.get() != 0 {
        return Err(field("reserved", u64::from(raw.reserved.get())));
    }
    if raw.flags > u8::from(raw.kind == KIND_UNMAP) {
        return Err(field("flags", u64::from(raw.flags)));
    }
    let disk = DiskId(raw.disk.get());
    match raw.kind {
        KIND_MAP => {
            let entry = Entry {
                own: raw.second.get(),
                under: raw.third.get(),
                alloc: raw.alloc.get(),
                zero: raw.zero.get(),
                birth: raw.fourth.get(),
            };
            Ok(Record::Map {
                disk,
                lcn: Lcn(raw.first.get()),
                entry,
            })
        }
        KIND_UNMAP => {
            let (first, count) = (raw.first.get(), raw.second.get());
            if count == 0 || first.checked_add(count).is_none() {
                return Err(field("count", u64::from(count)));
            }
            let is_zeroed = raw.flags & 1 != 0;
            Ok(Record::Unmap {
                disk,
                first: Lcn(first),
                count,
                is_zeroed,
            })
        }
        KIND_FORK => Ok(Record::Fork {
            from: disk,
            to: DiskId(raw.first.get()),
            generation: Generation(raw.second.get()),
        }),
        KIND_ROW => {
            let len = usize::try_from(raw.first.get()).unwrap_or(usize::MAX);
            if len > ROW_LEN_MAX {
                return Err(field("row length", u64::from(raw.first.get())));
            }
            let mut json: Vec<u8> = rest
                .take(len.div_ceil(SLOT_LEN))
                .flatten()
                .copied()
                .collect();
            if json.len() < len {
                return Err(FormatError::Short {
                    what: "catalogue row",
                });
            }
            json.truncate(len);
            let row = Row::from_json(&json)?;
            if row.id != disk {
                return Err(field("row id", u64::from(row.id.0)));
            }
            Ok(Record::Row(Box::new(row)))
        }
        KIND_DELETE => Ok(Record::Delete { disk }),
        kind => Err(field("kind", u64::from(kind))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::tests::sample_row;
    use super::*;

    fn records() -> Vec<Record> {
        let entry = Entry {
            own: 5,
            under: 6,
            alloc: 0xf0,
            zero: 0x0f,
            birth: 3,
        };
        vec![
            Record::Map {
                disk: DiskId(1),
                lcn: Lcn(99),
                entry,
            },
            Record::Unmap {
                disk: DiskId(1),
                first: Lcn(4),
                count: 7,
                is_zeroed: true,
            },
            Record::Row(Box::new(sample_row(2))),
            Record::Fork {
                from: DiskId(1),
                to: DiskId(2),
                generation: Generation(4),
            },
            Record::Delete { disk: DiskId(1) },
        ]
    }

    fn sealed() -> (Vec<u8>, u32) {
        let mut writer = BatchWriter::default();
        for record in records() {
            writer.push(&record).expect("short rows");
        }
        writer.seal(Stamp {
            uuid_low: 1,
            seq: 2,
            open_epoch: 3,
            prev_crc: 4,
        })
    }

    fn decode(bytes: &[u8]) -> Result<Vec<Record>, FormatError> {
        decode_batch(&decode_header(bytes)?, bytes)
    }

    #[test]
    fn round_trip() {
        let (bytes, crc) = sealed();
        assert_eq!(bytes.len() % 4096, 0);
        assert_eq!(decode_header(&bytes).map(|header| header.crc), Ok(crc));
        assert_eq!(decode(&bytes), Ok(records()));
    }

    #[test]
    fn every_single_bit_fault_is_refused() {
        let (good, _) = sealed();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit} was not noticed");
        }
    }

    #[test]
    fn slots_are_counted_as_pushed() {
        for record in records() {
            let mut writer = BatchWriter::default();
            writer.push(&record).expect("short rows");
            let slots = slots_of(&record).expect("short rows");
            assert_eq!(writer.bytes.len(), HEADER_LEN + slots * SLOT_LEN);
        }
    }
}
