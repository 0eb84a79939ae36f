//! Where a disk's bytes are, from its start to its end.

use super::disk::Disk;
use super::error::DiskError;
use crate::format::units::{Lcn, SUBS, index};
use crate::pool::entry::Place;
use crate::pool::map::leaf_of;
use crate::pool::volume::Map;

/// What an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data in the pool, at this byte of its file.
    Data(u64),
    /// Zeros, and the map says so.
    Zero,
    /// Read from the base.
    Base,
    /// Never written: zeros.
    Hole,
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: ExtentKind,
}

impl Extent {
    /// First byte after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Adds an extent, or lengthens the last one.
fn push(out: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = out.last_mut() {
        let goes_on = match (last.kind, extent.kind) {
            (ExtentKind::Data(at), ExtentKind::Data(next)) => at + last.len == next,
            (one, other) => one == other,
        };
        if goes_on && last.end() == extent.offset {
            last.len += extent.len;
            return;
        }
    }
    out.push(extent);
}

impl Disk {
    /// Appends the extents of some part of the disk that begins at `offset`, a multiple of the
    /// cluster size, and returns where it ends: call again from there until that is the disk's
    /// size. A part is short, or all alike, so requests do not wait for it.
    ///
    /// # Errors
    /// The disk was deleted.
    pub fn extents_from(&self, offset: u64, out: &mut Vec<Extent>) -> Result<u64, DiskError> {
        let size = self.pool().cluster_size();
        let map = self.volume().map.read();
        self.check_range(&map, offset.min(map.size), 0)?;
        if offset >= map.size {
            return Ok(map.size);
        }
        let (leaf, _) = leaf_of(size.split(offset).0);
        let leaf_end = |leaf: u32| {
            let end = leaf.checked_add(1).and_then(|next| next.checked_mul(64));
            end.map_or(map.size, |end| size.disk_offset(Lcn(end)).min(map.size))
        };
        if map.tree.leaf(leaf).is_none() {
            let next = map.tree.next_leaf(leaf);
            let next = next.and_then(|next| next.checked_mul(64));
            let end = next.map_or(map.size, |lcn| size.disk_offset(Lcn(lcn)).min(map.size));
            self.push_below(&map, offset, end, out);
            return Ok(end);
        }
        let end = leaf_end(leaf);
        let mut at = offset;
        while at < end {
            let (lcn, _) = size.split(at);
            let cluster_end = (size.disk_offset(lcn) + size.bytes()).min(end);
            self.push_cluster(&map, lcn, at, cluster_end, out);
            at = cluster_end;
        }
        Ok(end)
    }

    /// All extents, in order and without gaps.
    ///
    /// # Errors
    /// The disk was deleted.
    pub fn extents(&self) -> Result<Vec<Extent>, DiskError> {
        let mut all: Vec<Extent> = Vec::new();
        let mut part = Vec::new();
        let mut at = 0;
        while at < self.size() {
            at = self.extents_from(at, &mut part)?;
            part.drain(..).for_each(|extent| push(&mut all, extent));
        }
        Ok(all)
    }

    fn push_cluster(&self, map: &Map, lcn: Lcn, from: u64, to: u64, out: &mut Vec<Extent>) {
        let size = self.pool().cluster_size();
        let entry = map.get(lcn);
        let begin = size.disk_offset(lcn);
        for sub in 0..SUBS {
            let sub_at = begin + u64::from(sub) * size.sub_bytes();
            let (offset, end) = (sub_at.max(from), (sub_at + size.sub_bytes()).min(to));
            if offset >= end {
                continue;
            }
            let kind = match entry.place(sub) {
                Place::Pool(cluster) => ExtentKind::Data(size.offset(cluster) + (offset - begin)),
                Place::Zero => ExtentKind::Zero,
                Place::Below => {
                    self.push_below(map, offset, end, out);
                    continue;
                }
            };
            let len = end - offset;
            push(out, Extent { offset, len, kind });
        }
    }

    /// What the map says nothing about: the base as far as it goes, then holes.
    fn push_below(&self, map: &Map, from: u64, to: u64, out: &mut Vec<Extent>) {
        let base_len = self.base().map_or(0, |_| map.base_len);
        let base_end = base_len.clamp(from, to);
        for (offset, end, kind) in [
            (from, base_end, ExtentKind::Base),
            (base_end, to, ExtentKind::Hole),
        ] {
            if offset < end {
                let len = end - offset;
                push(out, Extent { offset, len, kind });
            }
        }
    }
}

/// Blocks of `buf` that are not all zeros, as runs of bytes within it.
pub(super) fn data_runs(buf: &[u8], block: u32) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    let mut at = 0;
    for part in buf.chunks(index(block)) {
        let end = at + part.len();
        if !is_zero(part) {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end = end,
                Some(_) | None => runs.push(at..end),
            }
        }
        at = end;
    }
    runs
}

/// Whether all bytes are zero. Data mostly shows in the first bytes; the rest goes by words.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_le_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_blocks_with_data() {
        let mut buf = vec![0; 5 * 512 + 100];
        assert!(data_runs(&buf, 512).is_empty());
        buf[513] = 1;
        buf[1024] = 1;
        buf[5 * 512 + 99] = 1;
        assert_eq!(data_runs(&buf, 512), [512..1536, 2560..2660]);
    }
}
