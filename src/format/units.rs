//! Counts, indices and byte sizes as different types, and the only conversions between them.
#![cfg_attr(
    not(test),
    expect(
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        reason = "the conversions other files are spared, each with the bound that makes it exact"
    )
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "the conversions other files are spared, each with the bound that makes it exact"
)]

use std::fmt;

/// Smallest unit a guest addresses, bytes.
pub const SECTOR: u64 = 512;
/// Sub-clusters in a cluster, whatever its size.
pub const SUBS: u32 = 16;
/// Alignment of every metadata structure, bytes.
pub const BLOCK: u64 = 4096;

/// A cluster of the pool file, by index from its start. Never 0, which holds the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cluster(pub u32);

impl Cluster {
    /// Index into a table with a row for every cluster.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A cluster of a disk, by index from the disk's start ("logical cluster number").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lcn(pub u32);

/// A disk or snapshot, unique in its pool for ever: never reused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct DiskId(pub u32);

/// Counts the events that make disks share clusters (fork, snapshot, rollback, commit).
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Size of a pool's clusters, and the arithmetic that follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterSize {
    log2: u8,
}

impl ClusterSize {
    /// 16 KiB.
    pub const LOG2_MIN: u32 = 14;
    /// 1 MiB.
    pub const LOG2_MAX: u32 = 20;
    /// 64 KiB.
    pub const DEFAULT: ClusterSize = ClusterSize { log2: 16 };

    /// From the exponent; `None` outside [`Self::LOG2_MIN`]..=[`Self::LOG2_MAX`].
    #[must_use]
    pub fn from_log2(log2: u32) -> Option<ClusterSize> {
        (Self::LOG2_MIN..=Self::LOG2_MAX)
            .contains(&log2)
            .then_some(ClusterSize { log2: log2 as u8 })
    }

    /// From a size in bytes; `None` unless it is a power of two in range.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<ClusterSize> {
        bytes
            .is_power_of_two()
            .then(|| Self::from_log2(bytes.trailing_zeros()))?
    }

    /// Exponent.
    #[must_use]
    pub fn log2(self) -> u32 {
        u32::from(self.log2)
    }

    /// Bytes in a cluster.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1_u64 << self.log2
    }

    /// Bytes in a cluster, as a length of memory.
    #[must_use]
    pub fn len(self) -> usize {
        1_usize << self.log2
    }

    /// Bytes in a sub-cluster.
    #[must_use]
    pub fn sub_bytes(self) -> u64 {
        self.bytes() / u64::from(SUBS)
    }

    /// Byte offset of `cluster` in the pool file.
    #[must_use]
    pub fn offset(self, cluster: Cluster) -> u64 {
        u64::from(cluster.0) << self.log2
    }

    /// Byte offset of `lcn` in its disk.
    #[must_use]
    pub fn disk_offset(self, lcn: Lcn) -> u64 {
        u64::from(lcn.0) << self.log2
    }

    /// Cluster of a disk that holds byte `offset`, and the byte's place in it. Disks are no larger
    /// than [`Self::disk_bytes_max`], so the index fits.
    #[must_use]
    pub fn split(self, offset: u64) -> (Lcn, u32) {
        let within = offset & self.bytes().wrapping_sub(1);
        (Lcn((offset >> self.log2) as u32), within as u32)
    }

    /// Clusters that hold `bytes`, the last perhaps in part; `None` if there are too many.
    #[must_use]
    pub fn count(self, bytes: u64) -> Option<u32> {
        u32::try_from(bytes.div_ceil(self.bytes())).ok()
    }

    /// Largest disk, bytes.
    #[must_use]
    pub fn disk_bytes_max(self) -> u64 {
        u64::from(u32::MAX) << self.log2
    }

    /// Sub-clusters that `[from, to)`, bytes within a cluster, touches: a bit each, bit 0 first.
    #[must_use]
    pub fn touched(self, from: u32, to: u32) -> u16 {
        let sub = self.sub_bytes() as u32;
        mask(from / sub, to.div_ceil(sub))
    }

    /// Sub-clusters that `[from, to)`, bytes within a cluster, covers whole.
    #[must_use]
    pub fn covered(self, from: u32, to: u32) -> u16 {
        let sub = self.sub_bytes() as u32;
        mask(from.div_ceil(sub), to / sub)
    }
}

/// Bits `from..to` of a 16-bit mask; empty if `from >= to`.
#[must_use]
pub fn mask(from: u32, to: u32) -> u16 {
    let below = |n: u32| {
        1_u32
            .checked_shl(n.min(SUBS))
            .map_or(0, |b| b.wrapping_sub(1))
    };
    (below(to) & !below(from)) as u16
}

/// A length of memory as a number of bytes: exact, `usize` has at most 64 bits.
#[must_use]
pub fn bytes_of(len: usize) -> u64 {
    len as u64
}

/// A number of bytes as a length of memory: exact, this crate is for 64-bit machines.
#[must_use]
pub fn len_of(bytes: u64) -> usize {
    const { assert!(usize::BITS >= u64::BITS, "64-bit machines only") };
    bytes as usize
}

/// A small count as an index: exact.
#[must_use]
pub fn index(n: u32) -> usize {
    n as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_what_they_say() {
        let size = ClusterSize::DEFAULT;
        assert_eq!(size.touched(0, 65536), 0xffff);
        assert_eq!(size.touched(4095, 4097), 0b11);
        assert_eq!(size.covered(4095, 4097), 0);
        assert_eq!(size.covered(0, 8191), 0b1);
        assert_eq!(size.covered(4096, 65536), 0xfffe);
        assert_eq!(mask(5, 5), 0);
        assert_eq!(mask(7, 3), 0);
    }

    #[test]
    fn cluster_sizes_outside_the_range_are_refused() {
        assert_eq!(ClusterSize::from_bytes(8192), None);
        assert_eq!(ClusterSize::from_bytes(2 << 20), None);
        assert_eq!(ClusterSize::from_bytes(65535), None);
        assert_eq!(ClusterSize::from_bytes(65536), Some(ClusterSize::DEFAULT));
    }
}
