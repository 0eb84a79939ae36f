//! How two disks differ. Disks related by fork share the parts of their maps that neither changed:
//! those are not looked at, so the time goes with the changes and not with the disks.

use super::disk::Disk;
use super::error::DiskError;
use crate::format::journal::Entry;
use crate::format::units::{Lcn, SECTOR, SUBS, bytes_of, len_of};
use crate::pool::PoolError;
use crate::pool::entry::Place;
use crate::pool::map::{Inner, Leaf};
use crate::pool::volume::Map;
use crate::storage::AlignedBuf;
use crate::sync::{Arc, Shared};
use std::ops::Range;

/// Most bytes compared at once.
const PART_LEN_MAX: u64 = 1 << 20;

/// How closely disks are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// Blocks differ if they are kept in different places: no data is read. Exact for what was
    /// written since a fork, block by block, unless the same was written again.
    Places,
    /// Of those, the sectors whose bytes differ.
    Contents,
}

/// The ranges, bytes, in which the disks `a` and `b` of one pool differ, in order. Where one is
/// longer, the other counts as zeros.
///
/// # Errors
/// They are in two pools; to compare contents, a disk cannot be read.
pub fn diff(a: &Disk, b: &Disk, comparison: Comparison) -> Result<Vec<Range<u64>>, DiskError> {
    if !Arc::ptr_eq(a.pool(), b.pool()) {
        let what = format!("`{}` and `{}` are in two pools", a.name(), b.name());
        return Err(PoolError::invalid(what).into());
    }
    let ranges = if Arc::ptr_eq(a.volume(), b.volume()) {
        Vec::new()
    } else {
        compare_places(a, b)
    };
    match comparison {
        Comparison::Places => Ok(ranges),
        Comparison::Contents => compare_contents(a, b, &ranges),
    }
}

fn compare_places(a: &Disk, b: &Disk) -> Vec<Range<u64>> {
    // Both at once, for a consistent answer; in one order always, so that two comparisons and two
    // writers cannot wait for each other in a ring.
    let (first, second) = match a.volume().id < b.volume().id {
        true => (a, b),
        false => (b, a),
    };
    let one = first.volume().map.read();
    let other = second.volume().map.read();
    let has_base = |disk: &Disk, map: &Map| disk.base().map_or(0, |_| map.base_len);
    let ends = [has_base(first, &one), has_base(second, &other)];
    let is_one_base = match (first.base(), second.base()) {
        (Some(one), Some(other)) => one.reference() == other.reference(),
        (None, _) | (_, None) => false,
    };
    let mut walk = Walk {
        cluster: first.pool().cluster_size(),
        sizes: [one.size, other.size],
        base_ends: ends,
        is_one_base,
        found: Vec::new(),
    };
    walk.compare(one.tree.root.as_ref(), other.tree.root.as_ref(), 0);
    walk.found
}

struct Walk {
    cluster: crate::format::units::ClusterSize,
    sizes: [u64; 2],
    base_ends: [u64; 2],
    is_one_base: bool,
    found: Vec<Range<u64>>,
}

/// What a block reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reads {
    Pool(u32),
    Zero,
    Base,
}

/// A node of a map.
trait Compare: Sized {
    /// Leaves below it, as an exponent of two.
    const LEAVES_LOG2: u32;
    fn compare(one: Option<&Self>, other: Option<&Self>, prefix: u64, walk: &mut Walk);
}

impl Walk {
    fn compare<N: Compare>(
        &mut self,
        one: Option<&Shared<N>>,
        other: Option<&Shared<N>>,
        prefix: u64,
    ) {
        let leaf_bytes = 64 * self.cluster.bytes();
        let begin = (prefix << N::LEAVES_LOG2).saturating_mul(leaf_bytes);
        let end = begin.saturating_add(leaf_bytes << N::LEAVES_LOG2);
        if begin >= self.sizes[0].max(self.sizes[1]) {
            return;
        }
        let is_same = match (one, other) {
            // Nothing above both bases: zeros, on whichever disk is longer too.
            (None, None) if begin >= self.base_ends[0].max(self.base_ends[1]) => true,
            (None, None) => self.is_alike(begin..end),
            (Some(one), Some(other)) => Shared::ptr_eq(one, other) && self.is_alike(begin..end),
            (None, Some(_)) | (Some(_), None) => false,
        };
        if !is_same {
            N::compare(one.map(|n| &**n), other.map(|n| &**n), prefix, self);
        }
    }

    /// Whether one map would read the same on both disks in `range`.
    fn is_alike(&self, range: Range<u64>) -> bool {
        let within = |ends: [u64; 2]| {
            ends[0] == ends[1]
                || range.end <= ends[0].min(ends[1])
                || range.start >= ends[0].max(ends[1])
        };
        let is_beyond_bases = range.start >= self.base_ends[0].max(self.base_ends[1]);
        within(self.sizes) && (is_beyond_bases || (self.is_one_base && within(self.base_ends)))
    }

    fn compare_entries(&mut self, one: Entry, other: Entry, lcn: u32) {
        let begin = self.cluster.disk_offset(Lcn(lcn));
        if one == other && self.is_alike(begin..begin + self.cluster.bytes()) {
            return;
        }
        for sub in 0..SUBS {
            let from = begin + u64::from(sub) * self.cluster.sub_bytes();
            let to = (from + self.cluster.sub_bytes()).min(self.sizes[0].max(self.sizes[1]));
            if from >= to {
                return;
            }
            let reads = [
                self.reads(0, one.place(sub), from),
                self.reads(1, other.place(sub), from),
            ];
            // A base that ends within the block, at different bytes, is not looked into further.
            let is_one_base = self.is_one_base && self.is_alike(from..to);
            let is_same = match reads {
                [Reads::Base, Reads::Base] => is_one_base,
                [one, other] => one == other,
            };
            if !is_same {
                self.push(from..to);
            }
        }
    }

    fn reads(&self, disk: usize, place: Place, at: u64) -> Reads {
        match place {
            _ if at >= self.sizes[disk] => Reads::Zero,
            Place::Pool(cluster) => Reads::Pool(cluster.0),
            Place::Below if at < self.base_ends[disk] => Reads::Base,
            Place::Zero | Place::Below => Reads::Zero,
        }
    }

    fn push(&mut self, range: Range<u64>) {
        push(&mut self.found, range);
    }
}

fn push(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        Some(_) | None => found.push(range),
    }
}

impl Compare for Leaf {
    const LEAVES_LOG2: u32 = 0;

    fn compare(one: Option<&Self>, other: Option<&Self>, prefix: u64, walk: &mut Walk) {
        let Ok(leaf) = u32::try_from(prefix) else {
            return;
        };
        let entry = |leaf: Option<&Self>, place: usize| {
            leaf.map_or(Entry::default(), |leaf| leaf.entries[place])
        };
        for (number, place) in (0..64).zip(0..) {
            walk.compare_entries(entry(one, place), entry(other, place), leaf * 64 + number);
        }
    }
}

impl<C: Compare> Compare for Inner<C> {
    const LEAVES_LOG2: u32 = C::LEAVES_LOG2 + 9;

    fn compare(one: Option<&Self>, other: Option<&Self>, prefix: u64, walk: &mut Walk) {
        for place in 0..crate::format::image::FANOUT {
            let one = one.and_then(|node| node.child[place].as_ref());
            let other = other.and_then(|node| node.child[place].as_ref());
            walk.compare(one, other, (prefix << 9) | bytes_of(place));
        }
    }
}

/// The sectors of `ranges` whose bytes differ.
fn compare_contents(
    a: &Disk,
    b: &Disk,
    ranges: &[Range<u64>],
) -> Result<Vec<Range<u64>>, DiskError> {
    let mut bufs = [
        AlignedBuf::new(len_of(PART_LEN_MAX)),
        AlignedBuf::new(len_of(PART_LEN_MAX)),
    ];
    let mut found = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let len = len_of((range.end - at).min(PART_LEN_MAX));
            let [one, other] = &mut bufs;
            read_or_zeros(a, at, &mut one[..len])?;
            read_or_zeros(b, at, &mut other[..len])?;
            let sector = len_of(SECTOR);
            let pairs = one[..len].chunks(sector).zip(other[..len].chunks(sector));
            for (number, (one, other)) in pairs.enumerate() {
                if one != other {
                    let from = at + bytes_of(number) * SECTOR;
                    push(&mut found, from..from + bytes_of(one.len()));
                }
            }
            at += bytes_of(len);
        }
    }
    Ok(found)
}

fn read_or_zeros(disk: &Disk, at: u64, buf: &mut [u8]) -> Result<(), DiskError> {
    let inside = len_of(disk.size().saturating_sub(at)).min(buf.len());
    let (data, zeros) = buf.split_at_mut(inside);
    zeros.fill(0);
    disk.read_at(data, at)
}
