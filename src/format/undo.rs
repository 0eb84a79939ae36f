//! The undo of a repair or a restore: both superblocks as they were, kept in the pool where nothing
//! else is. Neither writes over anything else that the old superblocks lead to.

use super::superblock::{SUPERBLOCK_LEN, Superblock};
use super::{FormatError, crc32c, reserved_is_zero};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Byte offset of the undo.
pub const UNDO_AT: u64 = 8192;
/// Bytes of an undo: a block about it, and the two copies.
pub const UNDO_LEN: usize = 3 * SUPERBLOCK_LEN;

const MAGIC: [u8; 4] = *b"TPUN";
const WHAT: &str = "undo";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    crc: U32,
    uuid: [u8; 16],
    start_seq: U64,
    open_epoch: U32,
    reserved_word: U32,
    reserved: [u8; 4056],
}
const _: () = assert!(size_of::<Raw>() == SUPERBLOCK_LEN);

/// What puts metadata back that a repair or a restore took out of force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undo {
    /// The pool.
    pub uuid: [u8; 16],
    /// Batch that its journal begins with afterwards: no other state of the pool has that.
    pub start_seq: u64,
    /// The opening that wrote it. A later one may have written over what is to be put back.
    pub open_epoch: u32,
    /// Both copies of the superblock as they were, intact or not.
    pub copies: [Box<[u8; SUPERBLOCK_LEN]>; 2],
}

impl Undo {
    /// Whether `superblock`, the one in force, is what the repair or restore left, and nobody has
    /// opened the pool for writing since.
    #[must_use]
    pub fn is_of(&self, superblock: &Superblock) -> bool {
        self.uuid == superblock.uuid
            && self.start_seq == superblock.start.seq
            && superblock.open_epoch <= self.open_epoch
    }

    /// The superblock that was in force, if any.
    #[must_use]
    pub fn superblock(&self) -> Option<Superblock> {
        let copies = self.copies.iter();
        let intact = copies.filter_map(|copy| Superblock::decode(&copy[..]).ok());
        // The first one on equal generations, as when a pool is opened.
        intact.reduce(|one, next| match next.generation > one.generation {
            true => next,
            false => one,
        })
    }

    /// As bytes, [`UNDO_LEN`] of them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let [first, second] = &self.copies;
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        raw.uuid = self.uuid;
        raw.start_seq = self.start_seq.into();
        raw.open_epoch = self.open_epoch.into();
        raw.crc = crc32c(MAGIC, &[raw.as_bytes(), &first[..], &second[..]]).into();
        [raw.as_bytes(), &first[..], &second[..]].concat()
    }

    /// From bytes.
    ///
    /// # Errors
    /// There is none, or it is not whole.
    pub fn decode(bytes: &[u8]) -> Result<Undo, FormatError> {
        let short = || FormatError::Short { what: WHAT };
        let (raw, rest) = Raw::read_from_prefix(bytes).map_err(|_short| short())?;
        if raw.magic != MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        let (first, rest) = rest.split_first_chunk().ok_or_else(short)?;
        let (second, _) = rest.split_first_chunk().ok_or_else(short)?;
        let mut zeroed = raw.clone();
        zeroed.crc = 0.into();
        let computed = crc32c(MAGIC, &[zeroed.as_bytes(), &first[..], &second[..]]);
        if computed != raw.crc.get() {
            return Err(FormatError::Checksum {
                what: WHAT,
                found: raw.crc.get(),
                computed,
            });
        }
        reserved_is_zero(WHAT, raw.reserved_word.as_bytes())?;
        reserved_is_zero(WHAT, &raw.reserved)?;
        Ok(Undo {
            uuid: raw.uuid,
            start_seq: raw.start_seq.get(),
            open_epoch: raw.open_epoch.get(),
            copies: [Box::new(*first), Box::new(*second)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::superblock::tests::sample;
    use super::*;

    fn undo() -> Undo {
        let mut newer = sample();
        newer.generation += 1;
        Undo {
            uuid: sample().uuid,
            start_seq: 1 << 33,
            open_epoch: 7,
            copies: [Box::new(sample().encode()), Box::new(newer.encode())],
        }
    }

    #[test]
    fn an_undo_round_trips_and_notices_every_bit_fault() {
        let good = undo().encode();
        assert_eq!(good.len(), UNDO_LEN);
        assert_eq!(Undo::decode(&good), Ok(undo()));
        for bit in (0..good.len() * 8).step_by(7) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Undo::decode(&bad).is_err(), "bit {bit} was not noticed");
        }
        for len in [0, 4095, 4096, 8192, UNDO_LEN - 1] {
            Undo::decode(&good[..len]).expect_err("short");
        }
    }

    #[test]
    fn the_newer_copy_was_in_force() {
        let mut undo = undo();
        let generation = |undo: &Undo| undo.superblock().map(|one| one.generation);
        assert_eq!(generation(&undo), Some(sample().generation + 1));
        *undo.copies[1] = [0; SUPERBLOCK_LEN];
        assert_eq!(generation(&undo), Some(sample().generation));
        *undo.copies[0] = [0; SUPERBLOCK_LEN];
        assert_eq!(generation(&undo), None);
    }

    #[test]
    fn a_later_opening_is_another_state() {
        let mut now = sample();
        now.start.seq = undo().start_seq;
        for (epoch, is_of) in [(6, true), (7, true), (8, false)] {
            now.open_epoch = epoch;
            assert_eq!(undo().is_of(&now), is_of, "opening {epoch}");
        }
        now.open_epoch = 7;
        now.start.seq += 1;
        assert!(!undo().is_of(&now), "another journal");
    }
}
