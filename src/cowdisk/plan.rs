//! From a request to segments: which bytes are where. No I/O is done here; whoever has the ring
//! moves the bytes, then says so.

use super::disk::Disk;
use super::error::DiskError;
use super::pass::Pass;
use crate::format::units::{Cluster, Lcn, SECTOR, SUBS, len_of};
use crate::pool::entry::Place;
use crate::pool::volume::Map;

/// Where the bytes of a segment come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The pool's file, at this byte.
    Pool(u64),
    /// The base, at this byte; zeros beyond its end.
    Base(u64),
    /// Nowhere: zeros.
    Zero,
}

/// A part of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte, within the request.
    pub at: u32,
    /// Bytes.
    pub len: u32,
    /// Where they come from.
    pub source: Source,
}

/// A part of a request within one cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// The disk's cluster.
    pub lcn: Lcn,
    /// Bytes within the cluster.
    pub from: u32,
    /// End, within the cluster.
    pub to: u32,
    /// First byte, within the request.
    pub at: u32,
}

/// Cuts `[offset, offset + len)` at cluster borders.
pub(super) fn pieces(disk: &Disk, offset: u64, len: u32) -> impl Iterator<Item = Piece> + use<> {
    let size = disk.pool().cluster_size();
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let (lcn, from) = size.split(offset + u64::from(done));
        let cluster = u32::try_from(size.bytes()).expect("at most 1 MiB");
        let to = cluster.min(from + (len - done));
        let piece = Piece {
            lcn,
            from,
            to,
            at: done,
        };
        done += to - from;
        Some(piece)
    })
}

/// Adds a segment, or lengthens the last one.
fn push(out: &mut Vec<Segment>, first: usize, segment: Segment) {
    if let Some(last) = out[first..].last_mut() {
        let goes_on = match (last.source, segment.source) {
            (Source::Pool(at), Source::Pool(next)) | (Source::Base(at), Source::Base(next)) => {
                at + u64::from(last.len) == next
            }
            (Source::Zero, Source::Zero) => true,
            (Source::Pool(_) | Source::Base(_) | Source::Zero, _) => false,
        };
        if goes_on {
            last.len += segment.len;
            return;
        }
    }
    out.push(segment);
}

impl Disk {
    /// Where the bytes `[offset, offset + len)` are, appended to `out`: in order, without gaps.
    /// Never blocks.
    ///
    /// # Errors
    /// Out of range, or the disk was deleted.
    pub fn plan_read(
        &self,
        pass: &Pass,
        offset: u64,
        len: u32,
        out: &mut Vec<Segment>,
    ) -> Result<(), DiskError> {
        debug_assert!(!pass.is_paused(), "no cluster may be used");
        let map = self.volume().map.read();
        self.check_range(&map, offset, u64::from(len))?;
        let first = out.len();
        for piece in pieces(self, offset, len) {
            self.plan_piece(&map, piece, first, out);
        }
        Ok(())
    }

    fn plan_piece(&self, map: &Map, piece: Piece, first: usize, out: &mut Vec<Segment>) {
        let size = self.pool().cluster_size();
        let entry = map.get(piece.lcn);
        let base_len = if self.base().is_some() {
            map.base_len
        } else {
            0
        };
        let in_disk = |from: u32| size.disk_offset(piece.lcn) + u64::from(from);
        let source_of = |place: Place, from: u32| match place {
            Place::Pool(cluster) => Source::Pool(size.offset(cluster) + u64::from(from)),
            Place::Below if in_disk(from) < base_len => Source::Base(in_disk(from)),
            Place::Zero | Place::Below => Source::Zero,
        };
        // One place for the whole cluster is the usual case.
        if entry.alloc == u16::MAX || (entry.alloc == 0 && entry.zero == 0) {
            let source = source_of(entry.place(0), piece.from);
            let end_in_base = in_disk(piece.to) <= base_len;
            if end_in_base || !matches!(source, Source::Base(_)) {
                let len = piece.to - piece.from;
                push(
                    out,
                    first,
                    Segment {
                        at: piece.at,
                        len,
                        source,
                    },
                );
                return;
            }
        }
        let sub_len = u32::try_from(size.sub_bytes()).expect("at most 64 KiB");
        let mut from = piece.from;
        while from < piece.to {
            let sub = from / sub_len;
            let mut to = piece.to.min((sub + 1) * sub_len);
            let place = entry.place(sub.min(SUBS - 1));
            let source = source_of(place, from);
            if let Source::Base(at) = source {
                // The base ends inside this sub-cluster.
                let left = len_of(base_len - at);
                to = to.min(from.saturating_add(u32::try_from(left).unwrap_or(u32::MAX)));
            }
            push(
                out,
                first,
                Segment {
                    at: piece.at + (from - piece.from),
                    len: to - from,
                    source,
                },
            );
            from = to;
        }
    }

    /// `Err` unless the range is whole sectors of the disk, and the disk is there.
    pub(super) fn check_range(&self, map: &Map, offset: u64, len: u64) -> Result<(), DiskError> {
        if map.is_deleted {
            // The catalogue does not know it any more, and must not be asked with a map locked.
            let name = format!("deleted disk {}", map.id);
            return Err(DiskError::Deleted { name });
        }
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= map.size);
        if !is_inside || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(DiskError::OutOfRange {
                offset,
                len,
                size: map.size,
            });
        }
        Ok(())
    }

    /// Where sub-cluster `sub` of `lcn` comes from, `under` and below only when `entry` says so.
    pub(super) fn sub_source(&self, map: &Map, lcn: Lcn, place: Place, sub: u32) -> Source {
        let size = self.pool().cluster_size();
        let within = u64::from(sub) * size.sub_bytes();
        let in_disk = size.disk_offset(lcn) + within;
        match place {
            Place::Pool(cluster) => Source::Pool(size.offset(cluster) + within),
            Place::Below if self.base().is_some() && in_disk < map.base_len => {
                Source::Base(in_disk)
            }
            Place::Zero | Place::Below => Source::Zero,
        }
    }

    /// Byte of the pool's file where byte `from` of `cluster` is.
    pub(super) fn pool_offset(&self, cluster: u32, from: u32) -> u64 {
        self.pool().cluster_size().offset(Cluster(cluster)) + u64::from(from)
    }
}
