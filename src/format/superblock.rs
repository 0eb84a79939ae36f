//! The superblock: where everything else is. Two copies, at bytes 0 and 1 MiB; both are written at
//! every change, one after the other, so that one is always whole.

use super::units::ClusterSize;
use super::{FormatError, crc32c, reserved_is_zero};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes in a superblock.
pub const SUPERBLOCK_LEN: usize = 4096;
/// Byte offsets of the two copies.
pub const SUPERBLOCK_AT: [u64; 2] = [0, 1 << 20];
/// Byte offset of the owner note: who has the pool open, as text for people. Not a record.
pub const OWNER_NOTE_AT: u64 = 4096;
/// Byte offset of the first journal half.
pub const JOURNAL_AT: u64 = 2 << 20;
/// Version written, and the newest one read.
pub const VERSION: u32 = 1;
/// `incompat` features known here. None yet.
pub const INCOMPAT_KNOWN: u64 = 0;
/// `ro_compat` features known here. None yet.
pub const RO_COMPAT_KNOWN: u64 = 0;
/// Smallest journal half, bytes.
pub const JOURNAL_HALF_MIN: u64 = 1 << 20;
/// Largest journal half, bytes.
pub const JOURNAL_HALF_MAX: u64 = 64 << 20;

/// Largest sequence number or generation taken for real.
pub const COUNTER_MAX: u64 = 1 << 62;
/// Most times a pool can be opened for writing: the largest [`Superblock::open_epoch`].
pub const OPEN_EPOCH_MAX: u32 = 1 << 31;
const MAGIC: [u8; 8] = *b"TIDEPOOL";
const SALT: [u8; 4] = *b"TPSB";
const WHAT: &str = "superblock";

/// On disk. Little-endian; the table in `docs/formats/pool.md` is made from this.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    uuid: [u8; 16],
    compat: U64,
    ro_compat: U64,
    incompat: U64,
    generation: U64,
    open_epoch: U32,
    clean: U32,
    cluster_log2: U32,
    cluster_count: U32,
    journal_half: [U64; 2],
    journal_half_len: U64,
    start_half: U32,
    start_prev_crc: U32,
    start_seq: U64,
    image_seq: U64,
    image_len: U64,
    image_head: U32,
    known_crc: U32,
    known_seq: U64,
    image_head_copy: U32,
    reserved: [u8; 3940],
}
const _: () = assert!(size_of::<Raw>() == SUPERBLOCK_LEN);
const _: () = assert!(std::mem::offset_of!(Raw, image_head) == 136);
const _: () = assert!(std::mem::offset_of!(Raw, reserved) == 156);

/// Where replay begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalStart {
    /// 0 or 1: the half whose first batch is `seq`.
    pub half: u32,
    /// Sequence number of the batch at the start of that half.
    pub seq: u64,
    /// Checksum of the batch before it (0 before the first of all).
    pub prev_crc: u32,
}

/// A batch that is known to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownBatch {
    /// Its sequence number; not 0.
    pub seq: u64,
    /// Its checksum.
    pub crc: u32,
}

/// The checkpoint image in force. None before the first one is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageRef {
    /// The last batch the image includes.
    pub seq: u64,
    /// Bytes of the image's stream.
    pub len: u64,
    /// Cluster of the first extent list.
    pub head: u32,
    /// Cluster of its copy; 0 in images of before there were any.
    pub head_copy: u32,
}

/// A checked superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Feature bits nobody needs to know; kept as found.
    pub compat: u64,
    /// Feature bits a writer must know.
    pub ro_compat: u64,
    /// One more at every write of a superblock.
    pub generation: u64,
    /// One more at every opening for writing.
    pub open_epoch: u32,
    /// Closed in good order, and nobody has opened it since.
    pub is_clean: bool,
    /// Cluster size.
    pub cluster_size: ClusterSize,
    /// Clusters in the pool, the metadata area included.
    pub cluster_count: u32,
    /// Byte offsets of the journal halves.
    pub journal_half: [u64; 2],
    /// Bytes in each half.
    pub journal_half_len: u64,
    /// Where replay begins.
    pub start: JournalStart,
    /// The image replay begins from.
    pub image: Option<ImageRef>,
    /// The last batch of the pool when it was opened for writing or, if it is clean, when it was
    /// closed: a journal that ends before it has lost what was acknowledged. None before the first
    /// batch, and in pools of releases that did not say.
    pub known: Option<KnownBatch>,
}

impl Superblock {
    /// Bytes the pool needs, end of the last cluster.
    #[must_use]
    pub fn pool_len(&self) -> u64 {
        u64::from(self.cluster_count).saturating_mul(self.cluster_size.bytes())
    }

    /// First byte after the metadata area; data clusters begin at or after it.
    #[must_use]
    pub fn metadata_end(&self) -> u64 {
        let half_end = |at: u64| at.saturating_add(self.journal_half_len);
        self.journal_half
            .map(half_end)
            .into_iter()
            .max()
            .unwrap_or(0)
    }

    /// The same pool, laid out in the same way.
    #[must_use]
    pub fn is_like(&self, other: &Superblock) -> bool {
        let layout = |one: &Superblock| (one.uuid, one.cluster_size, one.journal_half);
        layout(self) == layout(other) && self.journal_half_len == other.journal_half_len
    }

    /// As the bytes of one copy.
    #[must_use]
    pub fn encode(&self) -> [u8; SUPERBLOCK_LEN] {
        let image = self.image.unwrap_or(ImageRef {
            seq: 0,
            len: 0,
            head: 0,
            head_copy: 0,
        });
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        raw.version = VERSION.into();
        raw.uuid = self.uuid;
        raw.compat = self.compat.into();
        raw.ro_compat = self.ro_compat.into();
        raw.generation = self.generation.into();
        raw.open_epoch = self.open_epoch.into();
        raw.clean = u32::from(self.is_clean).into();
        raw.cluster_log2 = self.cluster_size.log2().into();
        raw.cluster_count = self.cluster_count.into();
        raw.journal_half = self.journal_half.map(U64::new);
        raw.journal_half_len = self.journal_half_len.into();
        raw.start_half = self.start.half.into();
        raw.start_prev_crc = self.start.prev_crc.into();
        raw.start_seq = self.start.seq.into();
        raw.image_seq = image.seq.into();
        raw.image_len = image.len.into();
        raw.image_head = image.head.into();
        raw.image_head_copy = image.head_copy.into();
        raw.known_seq = self.known.map_or(0, |known| known.seq).into();
        raw.known_crc = self.known.map_or(0, |known| known.crc).into();
        raw.crc = crc32c(SALT, &[raw.as_bytes()]).into();
        zerocopy::transmute!(raw)
    }

    /// Checks one copy.
    ///
    /// # Errors
    /// What is wrong with it. Magic, checksum and version are looked at in this order, so that a
    /// foreign file, a damaged pool and a newer pool give different errors.
    pub fn decode(bytes: &[u8]) -> Result<Superblock, FormatError> {
        let (raw, _) =
            Raw::read_from_prefix(bytes).map_err(|_short| FormatError::Short { what: WHAT })?;
        if raw.magic != MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        let mut zeroed = raw.clone();
        zeroed.crc = 0.into();
        let computed = crc32c(SALT, &[zeroed.as_bytes()]);
        if computed != raw.crc.get() {
            let found = raw.crc.get();
            return Err(FormatError::Checksum {
                what: WHAT,
                found,
                computed,
            });
        }
        let found = raw.version.get();
        if found > VERSION || found == 0 {
            return Err(FormatError::Version {
                what: WHAT,
                found,
                known: VERSION,
            });
        }
        let unknown = raw.incompat.get() & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(FormatError::Features {
                word: "incompat",
                bits: unknown,
            });
        }
        reserved_is_zero(WHAT, &raw.reserved)?;
        Self::checked(&raw)
    }

    /// `Err` if only a newer release may write to this pool.
    ///
    /// # Errors
    /// [`FormatError::Features`].
    pub fn check_writable(&self) -> Result<(), FormatError> {
        match self.ro_compat & !RO_COMPAT_KNOWN {
            0 => Ok(()),
            bits => Err(FormatError::Features {
                word: "ro_compat",
                bits,
            }),
        }
    }

    fn checked(raw: &Raw) -> Result<Superblock, FormatError> {
        let field = |field, value| FormatError::Field {
            what: WHAT,
            field,
            value,
        };
        let log2 = raw.cluster_log2.get();
        let cluster_size =
            ClusterSize::from_log2(log2).ok_or_else(|| field("cluster_log2", u64::from(log2)))?;
        let image = match raw.image_head.get() {
            0 => None,
            head => Some(ImageRef {
                seq: raw.image_seq.get(),
                len: raw.image_len.get(),
                head,
                head_copy: raw.image_head_copy.get(),
            }),
        };
        let start = JournalStart {
            half: raw.start_half.get(),
            seq: raw.start_seq.get(),
            prev_crc: raw.start_prev_crc.get(),
        };
        let known = match raw.known_seq.get() {
            0 => None,
            seq => Some(KnownBatch {
                seq,
                crc: raw.known_crc.get(),
            }),
        };
        let superblock = Superblock {
            uuid: raw.uuid,
            compat: raw.compat.get(),
            ro_compat: raw.ro_compat.get(),
            generation: raw.generation.get(),
            open_epoch: raw.open_epoch.get(),
            is_clean: raw.clean.get() == 1,
            cluster_size,
            cluster_count: raw.cluster_count.get(),
            journal_half: raw.journal_half.map(U64::get),
            journal_half_len: raw.journal_half_len.get(),
            start,
            image,
            known,
        };
        let half_len = superblock.journal_half_len;
        if !(JOURNAL_HALF_MIN..=JOURNAL_HALF_MAX).contains(&half_len)
            || !half_len.is_multiple_of(4096)
        {
            return Err(field("journal_half_len", half_len));
        }
        let [first, second] = superblock.journal_half;
        if first != JOURNAL_AT || second != JOURNAL_AT.saturating_add(half_len) {
            return Err(field("journal_half", second));
        }

        if start.seq == 0 {
            return Err(field("start_seq", 0));
        }
        if start.half > 1 {
            return Err(field("start_half", u64::from(start.half)));
        }
        if superblock.metadata_end() >= superblock.pool_len() {
            return Err(field("cluster_count", u64::from(superblock.cluster_count)));
        }
        superblock.check_numbers()?;
        Ok(superblock)
    }

    /// Counters that a life of writing never reaches, so that nothing ever overflows, and heads within
    /// the pool.
    fn check_numbers(&self) -> Result<(), FormatError> {
        let counters = [
            ("generation", self.generation),
            ("start_seq", self.start.seq),
            ("image_seq", self.image.map_or(0, |image| image.seq)),
            ("known_seq", self.known.map_or(0, |known| known.seq)),
            ("open_epoch", u64::from(self.open_epoch) << 31), // as OPEN_EPOCH_MAX << 31 is COUNTER_MAX
        ];
        let heads = self
            .image
            .map_or([0, 0], |image| [image.head, image.head_copy]);
        let outside = |head: &u32| *head >= self.cluster_count;
        let bad = match counters.into_iter().find(|(_, n)| *n > COUNTER_MAX) {
            Some(bad) => Some(bad),
            None => heads
                .into_iter()
                .find(outside)
                .map(|head| ("image_head", u64::from(head))),
        };
        match bad {
            Some((field, value)) => Err(FormatError::Field {
                what: WHAT,
                field,
                value,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Superblock {
        Superblock {
            uuid: [7; 16],
            compat: 0,
            ro_compat: 0,
            generation: 3,
            open_epoch: 2,
            is_clean: true,
            cluster_size: ClusterSize::DEFAULT,
            cluster_count: 1000,
            journal_half: [JOURNAL_AT, JOURNAL_AT + (1 << 20)],
            journal_half_len: 1 << 20,
            start: JournalStart {
                half: 1,
                seq: 9,
                prev_crc: 0xdead_beef,
            },
            image: Some(ImageRef {
                seq: 8,
                len: 12345,
                head: 77,
                head_copy: 78,
            }),
            known: Some(KnownBatch {
                seq: 10,
                crc: 0xcafe,
            }),
        }
    }

    #[test]
    fn round_trip() {
        assert_eq!(Superblock::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn every_single_bit_fault_is_refused() {
        let good = sample().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Superblock::decode(&bad).is_err(),
                "bit {bit} was not noticed"
            );
        }
    }

    #[test]
    fn newer_versions_and_features_are_named() {
        let reseal = |change: &dyn Fn(&mut Raw)| {
            let bytes = sample().encode();
            let mut raw = Raw::read_from_bytes(&bytes).expect("exact length");
            change(&mut raw);
            raw.crc = 0.into();
            raw.crc = crc32c(SALT, &[raw.as_bytes()]).into();
            Superblock::decode(raw.as_bytes())
        };
        assert!(matches!(
            reseal(&|raw| raw.version = 2.into()),
            Err(FormatError::Version {
                found: 2,
                known: 1,
                ..
            })
        ));
        assert!(matches!(
            reseal(&|raw| raw.incompat = 4.into()),
            Err(FormatError::Features {
                word: "incompat",
                bits: 4
            })
        ));
        let read_only = reseal(&|raw| raw.ro_compat = 8.into()).expect("readable");
        assert!(read_only.check_writable().is_err());
        assert!(matches!(
            reseal(&|raw| raw.reserved[9] = 1),
            Err(FormatError::Field {
                field: "reserved",
                ..
            })
        ));
    }
}
