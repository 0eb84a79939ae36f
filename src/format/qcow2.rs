//! QEMU's copy-on-write format, as far as reading takes: the header, and what an entry of a table
//! says. The specification is `docs/interop/qcow2.txt` of QEMU; what it leaves open is decided as
//! QEMU decides it.

use super::units::bytes_of;

/// First bytes of an image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the header that every version has and that tell how long a cluster is.
pub const HEAD_LEN: usize = 104;
/// Longest level 1 table that is read, bytes: QEMU's bound too.
pub const L1_LEN_MAX: u64 = 32 << 20;
/// Longest name of a backing file, bytes.
const BACKING_LEN_MAX: u32 = 1023;
/// Clusters have 2^9 to 2^21 bytes; from 2^14 with subclusters.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const SUBCLUSTERS_BITS_MIN: u32 = 14;
/// Subclusters in a cluster that has them.
const SUBCLUSTERS: u32 = 32;

/// Marked while it is written; only the reference counts, which nothing here reads, may be wrong.
const DIRTY: u64 = 1 << 0;
/// Found damaged by a writer, which then stopped: may be read, as far as it goes.
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Bits of a table's entry that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const IS_COPIED: u64 = 1 << 63;
const IS_COMPRESSED: u64 = 1 << 62;
const IS_ZERO: u64 = 1;

/// Why an image is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another format, or nothing.
    #[error("it is no qcow2 image")]
    Magic,
    /// A version without a reader here.
    #[error("it is of version {0} of qcow2; 2 and 3 are read")]
    Version(u32),
    /// What it holds is encrypted.
    #[error("it is encrypted ({0}), and would be read as what it is encrypted to")]
    Encrypted(&'static str),
    /// Clusters compressed in a way that is not read.
    #[error("its clusters are compressed with {0}, which is not read")]
    Compression(&'static str),
    /// Features that a reader must know, and this one does not.
    #[error("it has features that are not known ({0:#x})")]
    Features(u64),
    /// A field whose value cannot be.
    #[error("its header is damaged: {field} is {value}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// It ends before what its header says.
    #[error("it is cut short")]
    Short,
    /// A name that is no text.
    #[error("the name of its {0} is not UTF-8")]
    Name(&'static str),
}

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    cluster_bits: u32,
    size: u64,
    l1_entries: u32,
    l1_offset: u64,
    has_subclusters: bool,
    is_data_elsewhere: bool,
    /// Name of the file it is a difference to, if it is.
    pub backing: Option<String>,
    /// Format of that file, if it is said.
    pub backing_format: Option<String>,
    /// Name of the file with its data, if that is not in the image itself and is said.
    pub data_file: Option<String>,
}

/// Where a piece of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the backing file, or nowhere: zeros.
    Below,
    /// Zeros.
    Zero,
    /// At this byte of the file with the data.
    Data(u64),
    /// In a compressed cluster, whose `len` bytes at most begin at byte `offset` of the file.
    Compressed {
        /// First byte.
        offset: u64,
        /// Bytes, and up to a sector more.
        len: u64,
    },
}

/// A level 2 table's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// The descriptor.
    pub descriptor: u64,
    /// Which subclusters are allocated (low half) and zeros (high half), where there are any.
    pub bitmap: u64,
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, Refusal> {
    let tail = bytes.get(at..).ok_or(Refusal::Short)?;
    let field = tail.first_chunk().ok_or(Refusal::Short)?;
    Ok(u32::from_be_bytes(*field))
}

fn be64(bytes: &[u8], at: usize) -> Result<u64, Refusal> {
    let tail = bytes.get(at..).ok_or(Refusal::Short)?;
    let field = tail.first_chunk().ok_or(Refusal::Short)?;
    Ok(u64::from_be_bytes(*field))
}

/// Bytes of a cluster of the image that begins with `head`, of [`HEAD_LEN`] bytes.
///
/// # Errors
/// Not an image, or of a version or a cluster size that cannot be.
pub fn cluster_len(head: &[u8]) -> Result<u64, Refusal> {
    if !head.starts_with(&MAGIC) {
        return Err(Refusal::Magic);
    }
    match be32(head, 4)? {
        2 | 3 => {}
        version => return Err(Refusal::Version(version)),
    }
    let bits = be32(head, 20)?;
    let value = u64::from(bits);
    let field = "the cluster size";
    if !CLUSTER_BITS.contains(&bits) {
        return Err(Refusal::Field { field, value });
    }
    1_u64
        .checked_shl(bits)
        .ok_or(Refusal::Field { field, value })
}

impl Header {
    /// The header in `bytes`, the first cluster of the image (less if the file is shorter).
    ///
    /// # Errors
    /// An image that is not read, by what keeps it from being read.
    pub fn parse(bytes: &[u8]) -> Result<Header, Refusal> {
        let cluster = cluster_len(bytes)?;
        let cluster_bits = be32(bytes, 20)?;
        let is_old = be32(bytes, 4)? == 2;
        let (features, header_len) = match is_old {
            true => (0, 72),
            false => (be64(bytes, 72)?, be32(bytes, 100)?),
        };
        if !is_old && (header_len < 104 || u64::from(header_len) > cluster) {
            let value = u64::from(header_len);
            return Err(Refusal::Field {
                field: "its length",
                value,
            });
        }
        match be32(bytes, 32)? {
            0 => {}
            1 => return Err(Refusal::Encrypted("AES")),
            2 => return Err(Refusal::Encrypted("LUKS")),
            method => return Err(field("the encryption", u64::from(method))),
        }
        let unknown = features & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        if features & COMPRESSION != 0 {
            return Err(Refusal::Compression(match bytes.get(104) {
                Some(1) => "zstd",
                _ => "something unknown",
            }));
        }
        let mut header = Header {
            cluster_bits,
            size: be64(bytes, 24)?,
            l1_entries: be32(bytes, 36)?,
            l1_offset: be64(bytes, 40)?,
            has_subclusters: features & EXTENDED_L2 != 0,
            is_data_elsewhere: features & DATA_FILE != 0,
            backing: None,
            backing_format: None,
            data_file: None,
        };
        header.check()?;
        header.read_names(bytes, header_len, cluster)?;
        Ok(header)
    }

    /// `Err` if its numbers cannot be.
    fn check(&self) -> Result<(), Refusal> {
        if self.has_subclusters && self.cluster_bits < SUBCLUSTERS_BITS_MIN {
            return Err(field("the cluster size", u64::from(self.cluster_bits)));
        }
        if i64::try_from(self.size).is_err() {
            return Err(field("the size", self.size));
        }
        let l1_len = u64::from(self.l1_entries).saturating_mul(8);
        if l1_len > L1_LEN_MAX {
            return Err(field("the length of the first table", l1_len));
        }
        let needed = self.size.div_ceil(self.l2_span());
        if u64::from(self.l1_entries) < needed {
            return Err(field("the length of the first table", l1_len));
        }
        if !self.l1_offset.is_multiple_of(self.cluster_len()) || self.l1_offset & !OFFSET != 0 {
            return Err(field("the place of the first table", self.l1_offset));
        }
        Ok(())
    }

    fn read_names(&mut self, bytes: &[u8], header_len: u32, cluster: u64) -> Result<(), Refusal> {
        let backing_at = be64(bytes, 8)?;
        let backing_len = be32(bytes, 16)?;
        if backing_at != 0 {
            let end = backing_at.saturating_add(u64::from(backing_len));
            if backing_len > BACKING_LEN_MAX || end > cluster {
                return Err(field("the place of the backing file's name", backing_at));
            }
            let name = part(bytes, backing_at, backing_len)?;
            self.backing = text(name, "backing file")?;
        }
        let end = match backing_at {
            0 => cluster,
            at => at,
        };
        let mut at = u64::from(header_len);
        // Bounded by the cluster: every extension is 8 bytes or more.
        while at < end {
            let head = part(bytes, at, 8)?;
            let (kind, len) = (be32(head, 0)?, be32(head, 4)?);
            at = at.saturating_add(8);
            if kind == EXTENSION_END {
                break;
            }
            let padded = u64::from(len)
                .checked_next_multiple_of(8)
                .unwrap_or(u64::MAX);
            if u64::from(len) > end.saturating_sub(at) {
                return Err(field("the length of an extension", u64::from(len)));
            }
            let value = part(bytes, at, len)?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    self.backing_format = text(value, "backing file's format")?;
                }
                EXTENSION_DATA_FILE => self.data_file = text(value, "data file")?,
                _ => {}
            }
            at = at.saturating_add(padded);
        }
        Ok(())
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_len(&self) -> u64 {
        1_u64.checked_shl(self.cluster_bits).unwrap_or(u64::MAX)
    }

    /// Bytes of the virtual disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Entries of the first table, and the byte of the image at which it begins.
    #[must_use]
    pub fn l1(&self) -> (u32, u64) {
        (self.l1_entries, self.l1_offset)
    }

    /// Whether its data is in another file.
    #[must_use]
    pub fn is_data_elsewhere(&self) -> bool {
        self.is_data_elsewhere
    }

    /// Bytes of an entry of a second table.
    #[must_use]
    pub fn entry_len(&self) -> u64 {
        match self.has_subclusters {
            true => 16,
            false => 8,
        }
    }

    /// Bytes of the disk that a second table is about.
    #[must_use]
    pub fn l2_span(&self) -> u64 {
        // One cluster of entries of 2^3 or 2^4 bytes, each about a cluster.
        let entry_bits = if self.has_subclusters { 4 } else { 3 };
        let bits = self
            .cluster_bits
            .saturating_mul(2)
            .saturating_sub(entry_bits);
        1_u64.checked_shl(bits).unwrap_or(u64::MAX)
    }

    /// The byte of the image at which the second table begins that an entry of the first names, if
    /// there is one.
    ///
    /// # Errors
    /// It does not begin with a cluster.
    pub fn l2_offset(&self, l1_entry: u64) -> Result<Option<u64>, Refusal> {
        let offset = l1_entry & OFFSET;
        if !offset.is_multiple_of(self.cluster_len()) {
            return Err(field("the place of a table", offset));
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Where the byte `within` a cluster is that has `entry`, and up to which byte of the cluster
    /// that goes on.
    ///
    /// # Errors
    /// The entry cannot be.
    pub fn place(&self, entry: Entry, within: u64) -> Result<(Place, u64), Refusal> {
        let cluster = self.cluster_len();
        let Entry { descriptor, bitmap } = entry;
        if descriptor & IS_COMPRESSED != 0 {
            if self.is_data_elsewhere {
                return Err(field("a compressed cluster of a data file", descriptor));
            }
            return Ok((self.compressed(descriptor), cluster));
        }
        let host = descriptor & OFFSET;
        if !host.is_multiple_of(cluster) {
            return Err(field("the place of a cluster", host));
        }
        let is_there = host != 0 || (self.is_data_elsewhere && descriptor & IS_COPIED != 0);
        let data = Place::Data(host.saturating_add(within));
        if !self.has_subclusters {
            let place = match (descriptor & IS_ZERO != 0, is_there) {
                (true, _) => Place::Zero,
                (false, true) => data,
                (false, false) => Place::Below,
            };
            return Ok((place, cluster));
        }
        let sub_bits = self.cluster_bits.saturating_sub(SUBCLUSTERS.ilog2());
        let sub_len = 1_u64.checked_shl(sub_bits).unwrap_or(1);
        let sub = within.checked_shr(sub_bits).unwrap_or(0);
        let has = |bit: u64| bit < 64 && bitmap.checked_shr(to_u32(bit)).unwrap_or(0) & 1 != 0;
        let place = match (has(sub), has(sub.saturating_add(32))) {
            (true, false) if is_there => data,
            (false, true) => Place::Zero,
            (false, false) => Place::Below,
            (true, _) => return Err(field("the map of a cluster", bitmap)),
        };
        Ok((place, sub.saturating_add(1).saturating_mul(sub_len)))
    }

    fn compressed(&self, descriptor: u64) -> Place {
        // 62 - (cluster_bits - 8) bits are the offset, the rest below the flags the sectors.
        let offset_bits = 70_u32.saturating_sub(self.cluster_bits);
        let offset_mask = 1_u64
            .checked_shl(offset_bits)
            .unwrap_or(0)
            .saturating_sub(1);
        let offset = descriptor & offset_mask;
        let rest = descriptor & !(IS_COPIED | IS_COMPRESSED);
        let sectors = rest.checked_shr(offset_bits).unwrap_or(0);
        let len = sectors.saturating_add(1).saturating_mul(512);
        Place::Compressed {
            offset,
            len: len.saturating_sub(offset & 511),
        }
    }
}

fn to_u32(bit: u64) -> u32 {
    u32::try_from(bit).unwrap_or(u32::MAX)
}

fn field(field: &'static str, value: u64) -> Refusal {
    Refusal::Field { field, value }
}

fn part(bytes: &[u8], at: u64, len: u32) -> Result<&[u8], Refusal> {
    let end = at.saturating_add(u64::from(len));
    if end > bytes_of(bytes.len()) {
        return Err(Refusal::Short);
    }
    let (Ok(at), Ok(end)) = (usize::try_from(at), usize::try_from(end)) else {
        return Err(Refusal::Short);
    };
    bytes.get(at..end).ok_or(Refusal::Short)
}

/// A name; none if it is empty.
fn text(bytes: &[u8], what: &'static str) -> Result<Option<String>, Refusal> {
    let text = std::str::from_utf8(bytes).map_err(|_invalid| Refusal::Name(what))?;
    if text.contains('\0') {
        return Err(Refusal::Name(what));
    }
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first cluster of an image of 1 GiB with clusters of 64 KiB.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        bytes[..4].copy_from_slice(&MAGIC);
        let mut put = |at: usize, value: u32| {
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        };
        put(4, 3);
        put(20, 16);
        put(28, 1 << 30);
        put(36, 4);
        put(44, 3 << 16);
        put(96, 4);
        put(100, 112);
        bytes
    }

    fn with(at: usize, value: &[u8]) -> Vec<u8> {
        let mut bytes = image();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    }

    #[test]
    fn names_are_found_and_do_not_leave_the_first_cluster() {
        let mut bytes = image();
        let put = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| {
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        put(&mut bytes, 112, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        put(&mut bytes, 116, &3_u32.to_be_bytes());
        put(&mut bytes, 120, b"raw");
        put(&mut bytes, 8, &256_u64.to_be_bytes());
        put(&mut bytes, 16, &4_u32.to_be_bytes());
        put(&mut bytes, 256, b"base");
        let header = Header::parse(&bytes).expect("an image");
        assert_eq!(header.backing.as_deref(), Some("base"));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        put(&mut bytes, 16, &1024_u32.to_be_bytes());
        Header::parse(&bytes).expect_err("a name too long");
        put(&mut bytes, 16, &4_u32.to_be_bytes());
        put(&mut bytes, 8, &65533_u64.to_be_bytes());
        Header::parse(&bytes).expect_err("beyond the first cluster");
    }

    #[test]
    fn what_is_not_read_is_named() {
        let refusal = |bytes: &[u8]| Header::parse(bytes).expect_err("not read");
        assert_eq!(refusal(&with(0, b"QFJ")), Refusal::Magic);
        assert_eq!(refusal(&with(7, &[1])), Refusal::Version(1));
        assert_eq!(refusal(&with(35, &[1])), Refusal::Encrypted("AES"));
        assert_eq!(refusal(&with(35, &[2])), Refusal::Encrypted("LUKS"));
        assert_eq!(refusal(&with(79, &[32])), Refusal::Features(32));
        let mut zstd = with(79, &[8]);
        zstd[104] = 1;
        assert_eq!(refusal(&zstd), Refusal::Compression("zstd"));
        for (at, value) in [(23, 8), (23, 22), (39, 1), (47, 1), (24, 0x80), (36, 1)] {
            let refusal = refusal(&with(at, &[value]));
            assert!(matches!(refusal, Refusal::Field { .. }), "{at}: {refusal}");
        }
        assert_eq!(refusal(&image()[..90]), Refusal::Short);
        // Dirty and damaged images are read, as QEMU does.
        Header::parse(&with(79, &[3])).expect("an image");
    }

    #[test]
    fn entries_say_where_bytes_are() {
        let plain = Header::parse(&image()).expect("an image");
        let place = |descriptor, bitmap, within| {
            plain
                .place(Entry { descriptor, bitmap }, within)
                .expect("an entry")
        };
        assert_eq!(place(0, 0, 5), (Place::Below, 65536));
        assert_eq!(place(1, 0, 5), (Place::Zero, 65536));
        assert_eq!(
            place(IS_COPIED | 0x5_0000, 0, 5),
            (Place::Data(0x5_0005), 65536)
        );
        let compressed = IS_COMPRESSED | 2 << 54 | 0x1234;
        let expected = Place::Compressed {
            offset: 0x1234,
            len: 3 * 512 - 0x34,
        };
        assert_eq!(place(compressed, 0, 5), (expected, 65536));
        let odd = Entry {
            descriptor: 0x200,
            bitmap: 0,
        };
        plain.place(odd, 0).expect_err("not at a cluster");
        let subs = Header::parse(&with(79, &[16])).expect("an image");
        let place = |bitmap, within| {
            let descriptor = 0x5_0000;
            subs.place(Entry { descriptor, bitmap }, within)
        };
        assert_eq!(
            place(1 << 1 | 4 << 32, 2048),
            Ok((Place::Data(0x5_0800), 4096))
        );
        assert_eq!(place(1 << 1 | 4 << 32, 4096), Ok((Place::Zero, 6144)));
        assert_eq!(place(1 << 1 | 4 << 32, 0), Ok((Place::Below, 2048)));
        place(1 | 1 << 32, 0).expect_err("data and zeros at once");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let image = image();
        for at in 0..128 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = image.clone();
                bytes[at] = value;
                if let Ok(header) = Header::parse(&bytes) {
                    let descriptor = u64::from(value) << 56 | u64::from(value);
                    for bitmap in [0, u64::MAX, 1 << 33] {
                        let entry = Entry { descriptor, bitmap };
                        drop(header.place(entry, header.cluster_len() - 1));
                    }
                }
            }
        }
    }
}
