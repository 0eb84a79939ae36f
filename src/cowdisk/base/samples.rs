//! A few blocks of a base, remembered by their checksums: what is left to know its contents by once it
//! was moved or restored from a backup. Two images that differ in few blocks may well have the same
//! samples; that they are one image must be likely for other reasons.

use super::Base;
use crate::format::catalogue::Samples;
use crate::format::crc32c;
use crate::format::units::{bytes_of, len_of};
use std::io;
use std::ops::Range;

/// Equal parts of a base, with a checksum each.
const PARTS: u64 = 16;
/// Blocks that are read of a part, at equal distances.
const BLOCKS: u64 = 8;
const BLOCK_LEN: u64 = 4096;

/// Takes samples of `len` bytes that `read` fills a buffer with.
///
/// # Errors
/// As `read`.
pub(in crate::cowdisk) fn take(
    len: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Samples> {
    let mut crcs = Vec::new();
    let mut bytes = Vec::new();
    for part in 0..PARTS {
        bytes.clear();
        for block in blocks(len, part) {
            let at = bytes.len();
            bytes.resize(at + len_of(block.end - block.start), 0);
            read(&mut bytes[at..], block.start)?;
        }
        crcs.push(crc32c(*b"TPBS", &[&bytes]));
    }
    Ok(Samples { len, crcs })
}

/// Which bytes are looked at in a part.
fn blocks(len: u64, part: u64) -> Vec<Range<u64>> {
    let Range { start, end } = part_of(len, part);
    let is_small = end - start <= BLOCKS * BLOCK_LEN;
    let (count, step, len) = match is_small {
        true => (1, 0, end - start),
        false => (
            BLOCKS,
            (end - start) / BLOCKS / BLOCK_LEN * BLOCK_LEN,
            BLOCK_LEN,
        ),
    };
    let block = |n: u64| start + n * step..start + n * step + len;
    (0..count).map(block).collect()
}

/// Bytes of a part; whole blocks, but for the last.
fn part_of(len: u64, part: u64) -> Range<u64> {
    let end_of = |part: u64| match part == PARTS {
        true => len,
        false => len / PARTS / BLOCK_LEN * BLOCK_LEN * part,
    };
    end_of(part)..end_of(part + 1)
}

/// Where the contents differ: the bytes of the first part with a block that does.
pub(in crate::cowdisk) fn difference(was: &Samples, now: &Samples) -> Option<Range<u64>> {
    let differs = |(was, now): (&u32, &u32)| was != now;
    let mut pairs = was.crcs.iter().zip(&now.crcs);
    let part = pairs.position(differs)?;
    Some(part_of(was.len, bytes_of(part)))
}

/// Bytes that are looked at of a base.
pub(in crate::cowdisk) fn looked_at(len: u64) -> u64 {
    let all = (0..PARTS).flat_map(|part| blocks(len, part));
    all.map(|block| block.end - block.start).sum()
}

/// Samples of a base.
///
/// # Errors
/// As [`Base::read_at`].
pub(in crate::cowdisk) fn of(base: &Base) -> io::Result<Samples> {
    take(base.disk_len(), |buf, at| base.read_at(buf, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_cover_what_is_small_and_are_spread_over_what_is_large() {
        for len in [0, 1, 512, 4096, 65537, 1 << 19] {
            let all: Vec<_> = (0..PARTS).flat_map(|part| blocks(len, part)).collect();
            let mut at = 0;
            for block in all {
                assert_eq!(block.start, at, "{len}");
                at = block.end;
            }
            assert_eq!(at, len);
        }
        let len = (10 << 30) + 512;
        assert_eq!(looked_at(len), PARTS * BLOCKS * BLOCK_LEN);
        let mut last = 0;
        for block in (0..PARTS).flat_map(|part| blocks(len, part)) {
            assert!(block.end <= len && block.start - last < len / 64);
            last = block.start;
        }
    }

    #[test]
    fn the_part_that_differs_is_named() {
        let mut bytes = vec![0_u8; 1 << 20];
        let take_of = |bytes: &[u8]| {
            take(bytes_of(bytes.len()), |buf, at| {
                buf.copy_from_slice(&bytes[len_of(at)..][..buf.len()]);
                Ok(())
            })
            .expect("reads")
        };
        let was = take_of(&bytes);
        assert_eq!(difference(&was, &take_of(&bytes)), None);
        bytes[3 << 16] = 1;
        assert_eq!(difference(&was, &take_of(&bytes)), Some(3 << 16..4 << 16));
    }
}
