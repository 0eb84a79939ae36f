//! Bytes on disk, and the checked types they become. No I/O, no clock, no allocation policy; every
//! function here is total: it returns an error on any bytes it does not like and never panics.
//!
//! Versions: a reader refuses a version above its own and any `incompat` feature bit it does not
//! know; an unknown `ro_compat` bit allows reading only; unknown `compat` bits are kept as they are.
//! Reserved bytes are zero, and checked, so that a later version can give them a meaning.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::as_conversions
    )
)]

pub mod catalogue;
pub mod foreign;
pub mod image;
pub mod image_block;
pub mod journal;
pub mod qcow2;
pub mod superblock;
pub mod undo;
pub mod units;

use crc_fast::{CrcAlgorithm, Digest};

/// Why bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not this kind of record at all.
    #[error("{what}: wrong magic number; this is not a Tidepool {what}")]
    Magic {
        /// The record looked for.
        what: &'static str,
    },
    /// Right kind, damaged contents.
    #[error("{what}: checksum is {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// The record looked for.
        what: &'static str,
        /// CRC-32C stored in the record.
        found: u32,
        /// CRC-32C of the bytes.
        computed: u32,
    },
    /// Written by a newer release.
    #[error("{what}: written as version {found}; this program reads up to {known}: upgrade it")]
    Version {
        /// The record looked for.
        what: &'static str,
        /// Version in the record.
        found: u32,
        /// Newest version read here.
        known: u32,
    },
    /// Uses features this release does not have.
    #[error("{word} features {bits:#x} are not known to this program: upgrade it")]
    Features {
        /// `incompat` or `ro_compat`.
        word: &'static str,
        /// The unknown bits.
        bits: u64,
    },
    /// Fewer bytes than the record needs.
    #[error("{what}: cut short")]
    Short {
        /// The record looked for.
        what: &'static str,
    },
    /// A field whose value cannot be.
    #[error("{what}: field `{field}` has the impossible value {value}")]
    Field {
        /// The record looked for.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A catalogue row that is not the JSON it should be.
    #[error("catalogue row: {reason}")]
    Row {
        /// What the JSON reader said.
        reason: String,
    },
}

/// CRC-32C (Castagnoli) of `parts` one after another, preceded by `salt`, so that a record of one
/// kind never passes for another.
#[must_use]
pub fn crc32c(salt: [u8; 4], parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(&salt);
    for part in parts {
        digest.update(part);
    }
    // CRC-32 variants fit 32 bits by definition.
    u32::try_from(digest.finalize()).unwrap_or(u32::MAX)
}

/// `Err` unless every byte is zero.
fn reserved_is_zero(what: &'static str, bytes: &[u8]) -> Result<(), FormatError> {
    match bytes.iter().find(|byte| **byte != 0) {
        None => Ok(()),
        Some(byte) => Err(FormatError::Field {
            what,
            field: "reserved",
            value: u64::from(*byte),
        }),
    }
}

/// Reads little-endian fields off a slice.
struct Cursor<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(FormatError::Short { what: self.what })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(FormatError::Short { what: self.what })?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_castagnoli_over_salt_and_parts() {
        // RFC 3720 appendix B.4: 32 bytes of zeros give 0x8a9136aa.
        assert_eq!(crc32c([0; 4], &[&[0; 16], &[0; 12]]), 0x8a91_36aa);
        assert_ne!(crc32c(*b"AAAA", &[b"x"]), crc32c(*b"BBBB", &[b"x"]));
    }
}
