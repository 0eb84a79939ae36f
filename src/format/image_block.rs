//! Where a checkpoint image lies: blocks of one cluster each, filled with tokens; no token crosses
//! a block, so blocks are checked and read one at a time. The clusters of the blocks are listed in
//! a chain of extent lists ("heads").

use super::{Cursor, FormatError, crc32c, reserved_is_zero};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes before a block's tokens, and before a head's extents.
pub const BLOCK_HEADER_LEN: usize = 64;

const WHAT: &str = "checkpoint image block";
const BLOCK_MAGIC: [u8; 4] = *b"TPIB";
const HEAD_MAGIC: [u8; 4] = *b"TPIH";

/// Before the tokens of a block, and before the extents of a head.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
struct RawBlock {
    magic: [u8; 4],
    crc: U32,
    uuid_low: U64,
    seq: U64,
    /// Block: its index from 0. Head: cluster of the next head, or 0.
    index: U32,
    /// Bytes used after this header.
    used: U32,
    /// Head: cluster of the copy of the next head, or 0.
    next_copy: U32,
    reserved: [u8; 28],
}
const _: () = assert!(size_of::<RawBlock>() == BLOCK_HEADER_LEN);

/// Which pool and which image a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageStamp {
    /// First 8 bytes of the pool's uuid, little-endian.
    pub uuid_low: u64,
    /// The last batch the image includes.
    pub seq: u64,
}

/// A run of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First cluster.
    pub start: u32,
    /// Clusters; at least 1.
    pub count: u32,
}

/// Blocks that share a parity block, and are neighbours in no other way.
pub const PARITY_OF: u32 = 15;
/// Neighbouring blocks, each of which has another parity block.
pub const PARITY_BLOCKS: u32 = 16;
/// Blocks after which their parity follows, where there are so many.
pub const WINDOW: u32 = PARITY_OF * PARITY_BLOCKS;

/// Parity blocks that so many blocks have.
#[must_use]
pub fn parity_of(blocks: u32) -> u32 {
    let rest = blocks.checked_rem(WINDOW).unwrap_or(0);
    let windows = blocks.checked_div(WINDOW).unwrap_or(0);
    windows
        .saturating_mul(PARITY_BLOCKS)
        .saturating_add(rest.min(PARITY_BLOCKS))
}

/// Clusters that an image of so many blocks takes at most: blocks, parity, and heads twice.
#[must_use]
pub fn clusters_max(blocks: u32, cluster_len: usize) -> u32 {
    let listed = blocks.saturating_add(parity_of(blocks));
    let per_head = u32::try_from(extents_per_head(cluster_len)).unwrap_or(u32::MAX);
    let heads = listed.div_ceil(per_head.max(1));
    listed.saturating_add(heads.saturating_mul(2))
}

/// Adds `block` to a parity block, or takes it out: what is left of all but one is that one.
pub fn add_parity(parity: &mut [u8], block: &[u8]) {
    for (sum, byte) in parity.iter_mut().zip(block) {
        *sum ^= byte;
    }
}

/// Seals a block or head: header, payload, zeros up to `len` bytes.
fn seal(
    magic: [u8; 4],
    stamp: ImageStamp,
    (index, next_copy): (u32, u32),
    payload: &[u8],
    out: &mut [u8],
) {
    let mut raw = RawBlock::new_zeroed();
    raw.magic = magic;
    raw.next_copy = next_copy.into();
    raw.uuid_low = stamp.uuid_low.into();
    raw.seq = stamp.seq.into();
    raw.index = index.into();
    raw.used = u32::try_from(payload.len()).unwrap_or(u32::MAX).into();
    raw.crc = crc32c(magic, &[raw.as_bytes(), payload]).into();
    out.fill(0);
    if let Some(head) = out.get_mut(..BLOCK_HEADER_LEN) {
        head.copy_from_slice(raw.as_bytes());
    }
    let body = out.get_mut(BLOCK_HEADER_LEN..).unwrap_or_default();
    if let Some(body) = body.get_mut(..payload.len()) {
        body.copy_from_slice(payload);
    }
}

fn unseal(
    magic: [u8; 4],
    stamp: ImageStamp,
    block: &[u8],
) -> Result<((u32, u32), &[u8]), FormatError> {
    let (raw, body) =
        RawBlock::read_from_prefix(block).map_err(|_short| FormatError::Short { what: WHAT })?;
    if raw.magic != magic {
        return Err(FormatError::Magic { what: WHAT });
    }
    reserved_is_zero(WHAT, &raw.reserved)?;
    let used = usize::try_from(raw.used.get()).unwrap_or(usize::MAX);
    let payload = body.get(..used).ok_or(FormatError::Short { what: WHAT })?;
    let mut zeroed = raw.clone();
    zeroed.crc = 0.into();
    let computed = crc32c(magic, &[zeroed.as_bytes(), payload]);
    if computed != raw.crc.get() {
        return Err(FormatError::Checksum {
            what: WHAT,
            found: raw.crc.get(),
            computed,
        });
    }
    let found = ImageStamp {
        uuid_low: raw.uuid_low.get(),
        seq: raw.seq.get(),
    };
    if found != stamp {
        return Err(FormatError::Field {
            what: WHAT,
            field: "seq",
            value: found.seq,
        });
    }
    Ok(((raw.index.get(), raw.next_copy.get()), payload))
}

/// Seals block number `index` of tokens into `out`, one cluster long.
pub fn seal_block(stamp: ImageStamp, index: u32, tokens: &[u8], out: &mut [u8]) {
    seal(BLOCK_MAGIC, stamp, (index, 0), tokens, out);
}

/// The tokens of block number `index`.
///
/// # Errors
/// It is not that block.
pub fn unseal_block(stamp: ImageStamp, index: u32, block: &[u8]) -> Result<&[u8], FormatError> {
    let ((found, next_copy), tokens) = unseal(BLOCK_MAGIC, stamp, block)?;
    reserved_is_zero(WHAT, &next_copy.to_le_bytes())?;
    if found != index {
        return Err(FormatError::Field {
            what: WHAT,
            field: "index",
            value: u64::from(found),
        });
    }
    Ok(tokens)
}

/// The tokens of a block, as far as they may be left, although it is damaged.
#[must_use]
pub fn damaged_tokens(block: &[u8]) -> &[u8] {
    let Ok((raw, body)) = RawBlock::ref_from_prefix(block) else {
        return &[];
    };
    let used = usize::try_from(raw.used.get()).unwrap_or(usize::MAX);
    body.get(..used).unwrap_or(body)
}

/// Extents that fit a head of `cluster_len` bytes.
#[must_use]
pub fn extents_per_head(cluster_len: usize) -> usize {
    cluster_len
        .saturating_sub(BLOCK_HEADER_LEN)
        .checked_div(8)
        .unwrap_or(0)
}

/// Seals a head: `extents`, and the clusters of the `next` head and of its copy (0: none), into `out`.
pub fn seal_head(stamp: ImageStamp, next: (u32, u32), extents: &[Extent], out: &mut [u8]) {
    let mut payload = Vec::with_capacity(extents.len().saturating_mul(8));
    for extent in extents {
        payload.extend_from_slice(&extent.start.to_le_bytes());
        payload.extend_from_slice(&extent.count.to_le_bytes());
    }
    seal(HEAD_MAGIC, stamp, next, &payload, out);
}

/// The extents of a head, and the clusters of the next one and of its copy (0: none). Extents lie within
/// `cluster_count`.
///
/// # Errors
/// It is not a head of this image.
pub fn unseal_head(
    stamp: ImageStamp,
    cluster_count: u32,
    block: &[u8],
) -> Result<(Vec<Extent>, (u32, u32)), FormatError> {
    let (next, payload) = unseal(HEAD_MAGIC, stamp, block)?;
    let mut cursor = Cursor {
        what: WHAT,
        rest: payload,
    };
    let mut extents = Vec::new();
    while !cursor.rest.is_empty() {
        let extent = Extent {
            start: cursor.u32()?,
            count: cursor.u32()?,
        };
        let end = extent.start.checked_add(extent.count);
        if extent.start == 0 || extent.count == 0 || end.is_none_or(|end| end > cluster_count) {
            let value = u64::from(extent.start);
            return Err(FormatError::Field {
                what: WHAT,
                field: "extent",
                value,
            });
        }
        extents.push(extent);
    }
    let last = next.0.max(next.1);
    if last >= cluster_count {
        return Err(FormatError::Field {
            what: WHAT,
            field: "next",
            value: u64::from(last),
        });
    }
    Ok((extents, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: ImageStamp = ImageStamp {
        uuid_low: 1,
        seq: 2,
    };

    #[test]
    fn parity_is_small_and_never_missing() {
        for (blocks, parity) in [
            (0, 0),
            (1, 1),
            (16, 16),
            (17, 16),
            (240, 16),
            (241, 17),
            (480, 32),
        ] {
            assert_eq!(parity_of(blocks), parity, "{blocks}");
        }
        assert_eq!(clusters_max(1, 1 << 16), 1 + 1 + 2);
        let extents = u32::try_from(extents_per_head(1 << 14)).expect("few");
        assert_eq!(
            clusters_max(extents, 1 << 14),
            extents + parity_of(extents) + 4
        );
    }

    #[test]
    fn a_head_names_clusters_of_the_pool() {
        let head = |start, count, next| {
            let mut head = vec![0; 512];
            seal_head(STAMP, (next, 0), &[Extent { start, count }], &mut head);
            unseal_head(STAMP, 10, &head)
        };
        head(1, 9, 9).expect("to the last cluster");
        for (start, count, next) in [
            (0, 4, 9),
            (4, 0, 9),
            (4, 7, 9),
            (10, 1, 9),
            (4, u32::MAX, 9),
            (1, 9, 10),
        ] {
            head(start, count, next).expect_err("not a cluster of data");
        }
    }

    #[test]
    fn blocks_and_heads_notice_every_bit_fault() {
        let mut block = vec![0; 512];
        seal_block(STAMP, 5, b"tokens", &mut block);
        assert_eq!(unseal_block(STAMP, 5, &block), Ok(&b"tokens"[..]));
        unseal_block(STAMP, 6, &block).expect_err("another block");
        let mut head = vec![0; 512];
        let extents = vec![Extent { start: 3, count: 4 }];
        seal_head(STAMP, (9, 8), &extents, &mut head);
        assert_eq!(unseal_head(STAMP, 10, &head), Ok((extents, (9, 8))));
        assert!(
            unseal_head(STAMP, 6, &head).is_err(),
            "an extent past the end"
        );
        for bit in 0..(BLOCK_HEADER_LEN + 6) * 8 {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(
                unseal_block(STAMP, 5, &block).is_err(),
                "bit {bit} of a block"
            );
            block[bit / 8] ^= 1 << (bit % 8);
        }
        for bit in 0..(BLOCK_HEADER_LEN + 8) * 8 {
            head[bit / 8] ^= 1 << (bit % 8);
            assert!(
                unseal_head(STAMP, 10, &head).is_err(),
                "bit {bit} of a head"
            );
            head[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
